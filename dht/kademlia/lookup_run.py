"""One lookup over RPC: puts the queries of a :class:`Lookup` to peers, and checks whom the answers name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from ...transport.address import SignedPeerRecord
from ...transport.errors import DecodeError, Overloaded, RemoteError, RemoteProtocolError
from ...transport.identity import PeerId
from ...transport.waiter import Waiter
from . import defaults
from .lookup import Answered, Failed, Lookup, Slow

if TYPE_CHECKING:
    from .walk import Walker


@attrs.frozen
class Reply:
    """What one peer added to a lookup: ``closer`` as it named them; ``enough`` ends the lookup.

    ``missing``: how many more answers of its kind would be enough; None: that cannot be said.
    """

    closer: Sequence[SignedPeerRecord]
    enough: bool = False
    missing: int | None = None


#: Puts the question of a lookup, which it is told, to one peer. Raises :class:`RemoteError` when that fails.
Ask: TypeAlias = Callable[[PeerId, Lookup], Awaitable[Reply]]


class LookupRun:
    """A class and no closures, which would be cycles: a world of thousands of nodes leaves nothing to the collector."""

    def __init__(self, walker: Walker, lookup: Lookup, ask: Ask, costs: Mapping[PeerId, float] | None = None) -> None:
        self._walker, self._lookup, self._ask, self._costs = walker, lookup, ask, costs
        #: The records under which peers were named, with who named them; verified when they are used.
        self._claims: dict[PeerId, list[tuple[PeerId, SignedPeerRecord]]] = {}
        #: When the peers were asked whose answer is still awaited, and is not slow; oldest first.
        self._asked: dict[PeerId, float] = {}
        self._finished = Waiter()

    async def run(self, seconds: float) -> bool:
        """Returns when the lookup is done, or ``seconds`` are over: False. Cancelling cancels the queries in flight."""
        lookup = self._lookup
        async with trio.open_nursery() as nursery:
            end = trio.current_time() + seconds
            self._launch(lookup.start(self._costs), nursery)
            while not lookup.done and (now := trio.current_time()) < end:
                # Whoever waits is woken, not cancelled, when it is done: mostly no query is in flight then.
                with trio.CancelScope(deadline=min(end, now + defaults.SLOW_AFTER / 2)):
                    await self._finished.wait()
                if not lookup.done:
                    self._hurry(nursery)
            if nursery.child_tasks:
                nursery.cancel_scope.cancel()
        return lookup.done

    def _launch(self, peers: Sequence[PeerId], nursery: trio.Nursery) -> None:
        now = self._walker.host.now()
        for peer in peers:
            self._asked[peer] = now
            nursery.start_soon(self._query, peer, nursery)

    async def _query(self, peer: PeerId, nursery: trio.Nursery) -> None:
        lookup = self._lookup
        event: Answered | Failed = Failed(peer)
        try:
            if peer not in self._claims or self._introduce(peer):
                reply = await self._ask(peer, lookup)
                if reply.enough:  # whom it names is of no interest
                    lookup.stop()
                else:
                    event = Answered(peer, self._named(peer, reply.closer))
                    if reply.missing is not None:
                        lookup.expect(reply.missing)
        except RemoteProtocolError:
            self._walker.counters.lies += 1
            self._walker.missed(peer)
        except (RemoteError, Overloaded):
            pass
        self._asked.pop(peer, None)
        if not lookup.done:
            self._launch(lookup.receive(event), nursery)
        if lookup.done:
            self._finished.wake()

    def _hurry(self, nursery: trio.Nursery) -> None:
        """Ask others beside those that take long."""
        before = self._walker.host.now() - defaults.SLOW_AFTER
        for peer, began in list(self._asked.items()):
            if began > before or self._lookup.done:
                break
            del self._asked[peer]
            self._launch(self._lookup.receive(Slow(peer)), nursery)

    def _named(self, source: PeerId, closer: Sequence[SignedPeerRecord]) -> tuple[PeerId, ...]:
        """Note the peers that ``source`` named and their records, not verified. Raises :class:`DecodeError`."""
        most = self._walker.table.k
        if len(closer) > most:
            raise DecodeError(f"named {len(closer)} peers, at most {most} allowed", peer=source.short)
        peers = []
        for record in closer:
            peer = record.claimed
            if peer is None:
                raise DecodeError("named a peer under a record that is none", peer=source.short)
            # Several records of one peer: a forged one must not stand in for the real one of another source.
            held = self._claims.get(peer)
            if held is None:
                self._claims[peer] = [(source, record)]
            elif held[0][1] is not record and len(held) < defaults.MAX_CLAIMS and record not in [r for _, r in held]:
                held.append((source, record))
            peers.append(peer)
        return tuple(peers)

    def _introduce(self, peer: PeerId) -> bool:
        """Verify the records under which others named ``peer``; False when none of them tells where it is.

        Whoever named it under a record that it never signed has lied.
        """
        walker = self._walker
        wall, useful = walker.host.wall(), walker.endpoint.contact(peer) is not None
        for source, record in self._claims.pop(peer):
            try:
                opened = record.open(-float("inf"))
            except DecodeError:
                walker.counters.lies += 1
                walker.missed(source)
                self._lookup.expose(source)
                continue
            if opened.expires > wall and opened.addresses:
                walker.learn(record)
                useful = True
        return useful

    def introduce_all(self) -> None:
        """Verify the contacts of those that are closest and were not asked; twice k, as some of them may be gone."""
        while waiting := [peer for peer in self._lookup.ranked(2 * self._lookup.k) if peer in self._claims]:
            for peer in waiting:
                if not self._introduce(peer):
                    self._lookup.discard(peer)
