"""From a peer's name to a link, a better link, a link again: plans and races, shared by all who wait."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias

import attrs
import trio

from . import deadlines
from .address import Address, PeerRecord, RelayAddress
from .contacts import Contacts
from .errors import ConfigError, LinkClosed, PeerUnreachable, ProtocolMisuse, RemoteError, WaitExpired
from .establish import open_pipe
from .host import Host
from .identity import PeerId
from .link import Link
from .linktable import LinkTable
from .mender import Mender
from .network import ByteStream
from .planner import OwnReach, Plan, Step, plan
from .race import Past, Race, reason_of
from .ways import Direct, Way

log = logging.getLogger(__name__)

#: Turns a stream that we opened by the named way into a running link, adopted by the table; the peer must be the given.
Dial: TypeAlias = Callable[[PeerId | None, ByteStream, str], Awaitable[Link]]


class Attempt:
    """One attempt to reach a peer, shared by all who wait for it."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        self.addresses = addresses
        self.done = trio.Event()
        self.scope = trio.CancelScope()
        self.waiters = 0
        self.race: Race | None = None
        self.link: Link | None = None
        self.error: PeerUnreachable | None = None


@attrs.frozen
class Connection:
    """A live link as ``status`` and ``doctor`` show it. ``reason``: why this way, or why not a better one."""

    peer: PeerId
    way: str
    remote: Address
    initiator: bool
    rtt: float
    reason: str


class Connector:
    """``dial`` shakes hands as the initiator, ``greet`` says hello on a new link."""

    def __init__(
        self,
        host: Host,
        own: PeerId,
        table: LinkTable,
        contacts: Contacts,
        lag: deadlines.LoopLag,
        *,
        dial: Dial,
        greet: Callable[[Link], Awaitable[None]],
        count: Callable[[str], None],
    ) -> None:
        #: Where attempts run, while the endpoint does.
        self.nursery: trio.Nursery | None = None
        #: It has run, and does no more.
        self.stopped = False
        self.direct = Direct(host, lag)
        self.table = table
        self.greet = greet
        #: The means we have, by name.
        self.ways: dict[str, Way] = {"direct": self.direct}
        #: What we know of ourselves; who may help to reach a peer whose record names no relay.
        self.reach: Callable[[], OwnReach] = lambda: OwnReach(own)
        self.helpers: Callable[[PeerId], Sequence[RelayAddress]] = lambda peer: ()
        self.past = Past()
        #: Gives links that exist new and better pipes; None where that is switched off.
        self.mender: Mender | None = None
        self._host, self._contacts, self._lag = host, contacts, lag
        self._dial, self._count = dial, count
        self._attempts: dict[PeerId, Attempt] = {}
        self._reasons: dict[Link, str] = {}
        table.on_link.append(self._linked)
        table.on_link_lost.append(self._lost)

    def _linked(self, link: Link) -> None:
        if not link.initiator and (attempt := self._attempts.get(link.peer)) is not None:
            if attempt.race is not None:
                if attempt.race.asked is not None and link.way == "direct":
                    link.best.way = attempt.race.asked.way
                    self._reasons[link] = attempt.race.asked.reason
                attempt.race.arrive()
            attempt.done.set()  # it came to us while we were on the way to it

    def _lost(self, link: Link) -> None:
        self._reasons.pop(link, None)

    async def connect(self, peer: PeerId, addresses: Sequence[Address], timeout: float | None) -> Link:
        """See :meth:`Endpoint.connect`."""
        seconds = deadlines.connect(self._lag.value(self._host.now())) if timeout is None else timeout
        link: Link | None = None
        with trio.move_on_after(seconds):
            link = await self._connect(peer, tuple(addresses))
        if link is None:
            raise WaitExpired("link", seconds, peer=peer.short)
        return link

    async def _connect(self, peer: PeerId, addresses: tuple[Address, ...]) -> Link:
        await trio.lowlevel.checkpoint()
        while True:
            link = self.table.get(peer)
            if link is not None:
                link.last_used = self._host.now()
                return link
            attempt = self._begin(peer, addresses)
            attempt.waiters += 1
            try:
                await attempt.done.wait()
            finally:
                attempt.waiters -= 1
                if not attempt.waiters and not attempt.done.is_set():
                    self._attempts.pop(peer, None)
                    attempt.scope.cancel()
            if self.table.get(peer) is None:
                if attempt.link is not None:
                    reason = attempt.link.close_reason
                    why = "the link ended as soon as it was made"
                    raise PeerUnreachable(f"{why}: {reason.message}" if reason else why, peer=peer.short)
                if attempt.error is not None and all(address in attempt.addresses for address in addresses):
                    raise PeerUnreachable(
                        attempt.error.summary, peer=peer.short, attempts=attempt.error.attempts
                    ) from attempt.error

    def _begin(self, peer: PeerId, addresses: tuple[Address, ...]) -> Attempt:
        """The attempt that is on, or a new one."""
        attempt = self._attempts.get(peer)
        if attempt is None or attempt.done.is_set():
            if self.nursery is None:
                raise self.not_running(peer)
            known = self._contacts.get(peer, self._host.wall())
            ways = addresses + (known[1].addresses if known is not None else ())
            attempt = self._attempts[peer] = Attempt(tuple(dict.fromkeys(ways)))
            self.nursery.start_soon(self._attempt, peer, attempt, addresses)
        return attempt

    async def _attempt(self, peer: PeerId, attempt: Attempt, addresses: tuple[Address, ...]) -> None:
        try:
            with attempt.scope:
                try:
                    attempt.race = self.race(peer, self.plan(peer, addresses), partial(self._dial, peer))
                    link = await attempt.race.run()
                    if link is not None:
                        attempt.link = link
                        self._note_reason(link, attempt.race.won)
                        await self.greet(link)
                except PeerUnreachable as error:
                    attempt.error = error
                    self._count("dials_failed")
        finally:
            if self._attempts.get(peer) is attempt:
                del self._attempts[peer]
            attempt.done.set()

    def not_running(self, peer: PeerId | None = None) -> LinkClosed | ProtocolMisuse:
        """What to raise where something is asked of an endpoint that does not run."""
        if self.stopped:
            return LinkClosed("this node stops", peer=peer.short if peer is not None else "")
        return ProtocolMisuse("the endpoint does not run")

    def contact(self, peer: PeerId) -> PeerRecord | None:
        """The newest record of ``peer`` that has not expired."""
        known = self._contacts.get(peer, self._host.wall())
        return known[1] if known is not None else None

    def plan(self, peer: PeerId, addresses: Sequence[Address] = (), *, linked: bool = False) -> Plan:
        """How we would reach ``peer`` now. ``linked``: there is a link with it, which can carry signals."""
        return plan(
            self.reach(),
            peer,
            self.contact(peer),
            addresses,
            self.past.of(peer),
            helpers=self.helpers(peer),
            linked=linked,
            now=self._host.now(),
        )

    def race(self, peer: PeerId, steps: Plan, finish: Callable[[ByteStream, str], Awaitable[Link]]) -> Race:
        """A race that has not begun; what becomes of its steps is remembered."""
        now = self._host.now
        return Race(peer, steps, self.ways, finish, partial(self.past.note, peer), now, self._lag.value(now()))

    def _note_reason(self, link: Link, step: Step | None) -> None:
        if step is not None and link.alive:
            self._reasons[link] = step.reason

    def call_back(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """``peer`` has asked us to dial it at ``addresses``: begin, without waiting."""
        if self.nursery is not None:
            self.nursery.start_soon(self._call_back, peer, tuple(addresses))

    async def _call_back(self, peer: PeerId, addresses: tuple[Address, ...]) -> None:
        """A pipe for the link that both may still have, else a new link, which an attempt of ours then finds."""
        steps = self.plan(peer, addresses)
        steps = attrs.evolve(steps, steps=tuple(step for step in steps.steps if step.way == "direct"))

        made: list[Link] = []

        async def finish(stream: ByteStream, way: str) -> Link:
            link = self.table.get(peer)
            if link is None:
                made.append(await self._dial(peer, stream, "reversal"))
                return made[-1]
            await open_pipe(self._host, link, stream, "reversal")
            return link

        try:
            try:
                await self.race(peer, steps, finish).run()
            except PeerUnreachable:
                old = self.table.get(peer)
                if old is None or not old.troubled:
                    raise
                old.give_up(LinkClosed("it asked for another link", peer=peer.short))
                await self.race(peer, steps, finish).run()
        except PeerUnreachable as error:
            log.info("%s asked us to dial it, in vain: %s", peer.short, error)
            return
        if (attempt := self._attempts.get(peer)) is not None and attempt.race is not None:
            attempt.race.arrive()
            attempt.done.set()
        for link in made:
            if link.alive:  # else nobody would take it out again
                self._reasons[link] = "it asked us to dial it"
                await self.greet(link)

    def why(self, link: Link) -> str:
        """Why ``link`` goes the way it goes, or has no better one."""
        found = self.mender.reasons.get(link) if self.mender is not None else None
        return found or self._reasons.get(link) or "it came to us"

    def connections(self) -> list[Connection]:
        """All live links and why they are as they are."""
        return [
            Connection(link.peer, link.way, link.remote, link.initiator, link.rtt, self.why(link))
            for link in self.table.live()
        ]

    async def identify(self, address: Address) -> Link:
        """See :meth:`Endpoint.identify`."""
        if self.nursery is None:
            raise self.not_running()
        try:
            link = await self._dial(None, await self.direct.dial(address), "direct")
        except (RemoteError, ConfigError) as error:
            lasting = isinstance(error, RemoteError) and error.lasting
            raise PeerUnreachable(
                "nobody was reached", attempts=((str(address), reason_of(error)),), lasting=lasting
            ) from error
        await self.greet(link)
        if not link.alive:
            reason = link.close_reason.message if link.close_reason is not None else "closed by us"
            raise PeerUnreachable("nobody was reached", attempts=((str(address), reason),))
        return link
