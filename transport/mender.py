"""Links that exist: a pipe again for one that has lost its last, a better way for one that has a worse.

Both run the connector's planned race of ways; what differs is that the stream that wins is greeted as a further
pipe of the session instead of being shaken into a new link.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from . import defaults
from .address import Address, scope_of
from .errors import LinkClosed, PeerUnreachable, RemoteError
from .establish import open_pipe
from .pipehello import UNKNOWN_SESSION, PipeRefused
from .planner import QUALITY, Plan, Step
from .widening import dialled

if TYPE_CHECKING:
    from .connector import Connector
    from .host import Host
    from .link import Link
    from .linktable import LinkTable
    from .network import ByteStream
    from .race import Race

log = logging.getLogger(__name__)


def at_once(plan: Plan) -> Plan:
    """Every step without waiting for another: somebody's streams stand still meanwhile."""
    return attrs.evolve(plan, steps=tuple(attrs.evolve(step, head_start=0.0) for step in plan.steps))


def is_gone(last: Address, dialled: bool, has_relays: bool, step: Step, error: Exception) -> tuple[bool, str]:
    """(decision, reason): whether this failure of ``step`` shows that the peer's process has ended.

    ``last``: where its last pipe came from or went to; ``dialled``: we had dialled that pipe directly. Its own machine
    must have said so; the same private address may be another machine's here, and a NAT refuses in the name of whoever
    is behind it: but not where we have found it listening before, nor on this machine.
    """
    if step.way != "direct" or step.address is None or step.address.host != last.host:
        return False, "another place than where it was"
    if isinstance(error, PipeRefused) and error.code == UNKNOWN_SESSION:
        return True, "it has been started anew, or has closed this link"
    was_there = (dialled and step.address == last) or scope_of(last) == "loopback"
    if has_relays and not was_there:
        return False, "it is behind a NAT, which may refuse in its name"
    reasons = [reason for _, reason in error.attempts] if isinstance(error, PeerUnreachable) else []
    if any(reason.startswith("connection refused") for reason in reasons):
        return True, "nobody listens any more where it was"
    return False, "no answer that says so"


def _half_open(step: Step, last: Address, error: Exception) -> bool:
    """Was the connection taken where the peer was, and then dropped?"""
    if step.way != "direct" or step.address is None or step.address.host != last.host:
        return False
    reasons = [reason for _, reason in error.attempts] if isinstance(error, PeerUnreachable) else []
    return isinstance(error, LinkClosed) or any(reason.startswith("connection reset") for reason in reasons)


class Mender:
    """Keeps the links of ``table`` alive and makes them better, by ``connector``."""

    def __init__(self, host: Host, table: LinkTable, connector: Connector) -> None:
        self._host, self._table, self._connector = host, table, connector
        self._resuming: dict[Link, Race | None] = {}
        self._improving: dict[Link, Race | None] = {}
        self._knocking: dict[Link, None] = {}
        self._greeted: dict[Link, int] = {}  # the pipe on which both have said how they see each other
        #: Why a link has no better way, for people.
        self.reasons: dict[Link, str] = {}
        table.on_link.append(self._linked)
        table.on_link_lost.append(self._lost)
        table.on_trouble = self._troubled

    def _linked(self, link: Link) -> None:
        self._greeted[link] = link.best.index
        link.on_pipes = partial(self._pipes_changed, link)
        self._pipes_changed(link)

    def _lost(self, link: Link) -> None:
        self.reasons.pop(link, None)
        self._greeted.pop(link, None)
        for racing in (self._resuming, self._improving):
            if (race := racing.get(link)) is not None:
                race.arrive()

    def _pipes_changed(self, link: Link) -> None:
        """Another pipe is the best one now, or one has gone."""
        race = self._resuming.get(link)
        if race is not None and not link.troubled:
            race.arrive()
        race = self._improving.get(link)
        if race is not None and not QUALITY[link.way]:
            race.arrive()
        # One side drives: the other would only do the same at the same time.
        nursery = self._connector.nursery
        if nursery is None or not link.initiator or not link.alive or link.interrupted:
            return
        if link.best.index != self._greeted.get(link):
            self._greeted[link] = link.best.index
            nursery.start_soon(self._connector.greet, link)
        if QUALITY[link.way] and link not in self._improving:
            self._improving[link] = None
            nursery.start_soon(self._improve, link)

    # Again

    def _troubled(self, link: Link) -> None:
        """It has no pipe, or none that answers."""
        nursery = self._connector.nursery
        if link not in self._resuming and nursery is not None:
            self._resuming[link] = None
            nursery.start_soon(self._resume, link)

    async def _resume(self, link: Link) -> None:
        """Both ends do this, as each may be the one that can be dialled. The link itself knows when it is too late."""
        connector = self._connector
        pause = defaults.RESUME_PAUSE
        try:
            while link.troubled and not link.closed.is_set():
                contact = connector.contact(link.peer)
                has_relays = contact is not None and bool(contact.relays)
                race = connector.race(link.peer, at_once(connector.plan(link.peer)), partial(self._join, link))
                race.on_failure = partial(self._judge, link, link.remote, dialled(link), has_relays)
                self._resuming[link] = race
                try:
                    await race.run()
                except PeerUnreachable as error:
                    log.info("the link to %s has no new pipe yet: %s", link.peer.short, error)
                # Not in step with the other side, which does the same.
                await trio.sleep(pause * (0.75 + 0.5 * self._host.random.random()))
                pause = min(2 * pause, defaults.RESUME_PAUSE_MAX)
        finally:
            del self._resuming[link]

    async def _join(self, link: Link, stream: ByteStream, way: str) -> Link:
        await open_pipe(self._host, link, stream, way)
        return link

    def _judge(self, link: Link, last: Address, dialled: bool, has_relays: bool, step: Step, error: Exception) -> None:
        gone, reason = is_gone(last, dialled, has_relays, step, error)
        nursery = self._connector.nursery
        if not link.interrupted:
            return
        if gone:
            link.give_up(LinkClosed(f"the connection broke, and {reason}", peer=link.peer.short))
        elif link not in self._knocking and nursery is not None and _half_open(step, last, error):
            self._knocking[link] = None
            nursery.start_soon(self._knock, link, last, dialled, has_relays, step)

    async def _knock(self, link: Link, last: Address, dialled: bool, has_relays: bool, step: Step) -> None:
        """Somebody's kernel took our connection and dropped it: that process is ending, or its machine is at its limit.

        Soon it will say which; the other ways of the race may take much longer than that.
        """
        assert step.address is not None
        try:
            for pause in defaults.KNOCK_PAUSES:
                await trio.sleep(pause)
                if not link.interrupted:
                    return
                try:
                    await self._join(link, await self._connector.direct.dial(step.address), step.way)
                    return
                except RemoteError as error:
                    gone, reason = is_gone(last, dialled, has_relays, step, error)
                    if gone and link.interrupted:
                        link.give_up(LinkClosed(f"the connection broke, and {reason}", peer=link.peer.short))
        finally:
            del self._knocking[link]

    # Better

    async def _improve(self, link: Link) -> None:
        connector = self._connector
        said = ""
        try:
            for pause in itertools.chain(defaults.IMPROVE_PAUSES, itertools.repeat(defaults.IMPROVE_PAUSE_MAX)):
                await self._sleep(link, pause * (0.75 + 0.5 * self._host.random.random()))
                while link.alive and (link.troubled or link in self._resuming):
                    await self._sleep(link, defaults.RESUME_PAUSE_MAX)  # first a pipe, then a better one
                if not link.alive or not QUALITY[link.way]:
                    return
                before = link.way
                plan = connector.plan(link.peer, linked=True).better_than(before)
                race = connector.race(link.peer, plan, partial(self._join, link))
                self._improving[link] = race
                try:
                    await race.run()
                except PeerUnreachable as error:
                    self.reasons[link] = str(error)
                if link.way != before:
                    self.reasons.pop(link, None)
                elif self.reasons.get(link, "") != said:
                    said = self.reasons.get(link, "")
                    log.info("the link to %s stays on %s: %s", link.peer.short, before, said)
        finally:
            del self._improving[link]

    @staticmethod
    async def _sleep(link: Link, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await link.closed.wait()
