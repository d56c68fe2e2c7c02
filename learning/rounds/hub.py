"""Takes in everything peers say about rounds and hands it to the instance it names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from .. import defaults
from ..reduce.memory import RoundMemory
from .early import Early
from .instance import Instance
from .messages import ANSWERED, MESSAGES, Commit
from .methods import (
    FORWARD,
    PART,
    PASS,
    SAY,
    SCATTER,
    SHARE,
    WANT,
    Ack,
    AskPart,
    Forward,
    Given,
    Opened,
    Passed,
    Scatter,
    Shared,
    Taken,
    Want,
)
from .post import Post


class Hub:
    """Routes calls by instance key. A message for a round we have not reached waits a little; one for a round that is
    over is answered with its commit. Holds the memory that the rounds of a run share."""

    def __init__(self, endpoint: Endpoint, post: Post) -> None:
        self._endpoint, self._post, self._now = endpoint, post, endpoint.host.now
        self._live: dict[bytes, Instance] = {}
        self._commits: dict[bytes, Commit] = {}
        self._awaited: dict[bytes, trio.Event] = {}
        self._early = Early()
        self.memory = RoundMemory()
        self._remembered = self._ring_broke = -math.inf
        self._no_ring = defaults.RING_AGAIN  # seconds after the last one that broke, doubled with each
        #: A commit of a round we are not in: we may have been admitted by it, or left behind.
        self.on_foreign_commit: Callable[[PeerId, Commit], None] = lambda sender, commit: None
        for kind in MESSAGES:
            endpoint.serve_at_once(SAY[kind], self._on_message)
        endpoint.serve(SCATTER, self._on_scatter)
        endpoint.serve(PASS, self._on_pass)
        endpoint.serve(SHARE, self._on_share)
        endpoint.serve(WANT, self._on_want)
        endpoint.serve(PART, self._on_part)
        endpoint.serve(FORWARD, self._on_forward)

    def add(self, instance: Instance) -> None:
        """Begin to route to ``instance``."""
        self._live[instance.key] = instance
        instance.on_open = self._make_room
        instance.rings = lambda: self._now() - self._ring_broke > self._no_ring
        for letter in self._early.take(self._now(), instance.key):
            # It was taken in already, so nobody is there to hear of a refusal.
            with contextlib.suppress(RemoteRefused):
                instance.receive(letter.sender, letter.message)
        event = self._awaited.pop(instance.key, None)
        if event is not None:
            event.set()

    def remember(self, commit: Commit) -> None:
        """Answer late peers of a decided round with ``commit``; forget the oldest, and results before the last two."""
        self._commits[commit.key] = commit
        ended = self._live.get(commit.key)
        if ended is not None and ended.voter.ring_broken:
            before, self._ring_broke = self._ring_broke, self._now()
            again = self._ring_broke - before < 4.0 * self._no_ring
            self._no_ring = min(2.0 * self._no_ring, defaults.RING_NEVER) if again else defaults.RING_AGAIN
        while len(self._commits) > defaults.REMEMBERED_COMMITS:
            self._commits.pop(next(iter(self._commits)))
        decided = [key for key, instance in self._live.items() if instance.commit is not None]
        for key in decided[: -defaults.REMEMBERED_RESULTS]:
            self._live.pop(key).close()
        now = self._now()
        if now - self._remembered > defaults.KEEP_MEMORY:
            self.memory.release()
        self.memory.next_round()
        self._remembered = now

    def _make_room(self, size: int) -> None:
        """A round begins to gather a result of ``size`` bytes."""
        if size > defaults.LARGE_RESULT:
            for key in [key for key, instance in self._live.items() if instance.commit is not None]:
                self._live.pop(key).close()

    def drop(self, instance: Instance) -> None:
        """Give up an undecided instance."""
        self._live.pop(instance.key, None)
        instance.close()

    def peer_changed(self, peer: PeerId, why: str | None) -> None:
        for instance in self._live.values():
            instance.peer_changed(peer, why)

    def _on_message(self, call: Call[Any]) -> Ack:
        message, sender = call.request, call.peer
        instance = self._live.get(message.key)
        if instance is None and message.key in self._commits:
            if isinstance(message, ANSWERED):
                self._post.send(sender, self._commits[message.key])
            return Ack()
        if instance is None and isinstance(message, Commit):
            self.on_foreign_commit(sender, message)
            return Ack()
        if instance is None:
            self._early.keep(self._now(), sender, message)
        else:
            instance.receive(sender, message)
        return Ack()

    async def _await(self, key: bytes) -> Instance:
        if key not in self._live:
            event = self._awaited.get(key)
            if event is None:
                if len(self._awaited) >= defaults.MAX_EARLY_MESSAGES:
                    raise RemoteRefused("busy", "too many transfers for rounds that are not open here")
                event = self._awaited[key] = trio.Event()
            with trio.move_on_after(defaults.EARLY_MESSAGE):
                await event.wait()
            if key not in self._live:
                self._awaited.pop(key, None)
                raise RemoteRefused("unknown-round", "no such round is open here")
        return self._live[key]

    async def _on_scatter(self, call: Call[Scatter]) -> Taken:
        return await (await self._await(call.request.key)).traffic.on_scatter(call)

    async def _on_pass(self, call: Call[Passed]) -> Ack:
        return await (await self._await(call.request.key)).traffic.relay.on_pass(call)

    async def _on_share(self, call: Call[Shared]) -> Ack:
        return await (await self._await(call.request.key)).traffic.on_share(call)

    async def _on_forward(self, call: Call[Forward]) -> Taken:
        return await (await self._await(call.request.key)).traffic.delivery.on_forward(call)

    async def _on_part(self, call: Call[AskPart]) -> Opened:
        return await (await self._await(call.request.key)).auditor.on_part(call)

    async def _on_want(self, call: Call[Want]) -> Given:
        handler: Callable[[Call[Want]], Awaitable[Given]] = (await self._await(call.request.key)).traffic.on_want
        return await handler(call)
