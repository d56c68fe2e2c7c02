"""Opens the pipes for bulk that a link wants; the side that dialled the link dials these too, the other asks it to.

Where the peer listens at several addresses of one kind (a host with two network cards, say), these are different paths
to it as far as anybody can tell: pipes are dealt out to them in turns. Each pipe takes records as fast as it gets rid
of them, so every path carries what it can, and :class:`Width` gives them back where they make nothing faster.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import attrs
import trio

from . import deadlines, defaults
from .address import Address, family_of, scope_of
from .errors import RemoteError, RemoteRefused
from .establish import open_pipe
from .host import Host
from .identity import PeerId
from .link import Link
from .network import ByteStream
from .rpc import Call, Method, exchange

log = logging.getLogger(__name__)


@attrs.frozen
class Widen:
    """Open pipes for bulk until there are ``pipes``."""

    pipes: int


@attrs.frozen
class Widened:
    """How many there are now."""

    pipes: int


WIDEN = Method("transport.widen", Widen, Widened)


class Widening:
    """``dial`` opens a byte stream to an address, as for a new link. ``known``: where a peer says that it listens;
    ``own``: where we do."""

    def __init__(
        self,
        host: Host,
        dial: Callable[[Address], Awaitable[ByteStream]],
        known: Callable[[PeerId], Iterable[Address]],
        own: Callable[[], Iterable[Address]],
    ) -> None:
        #: Where this runs, while the endpoint does.
        self.nursery: trio.Nursery | None = None
        self._host, self._dial, self._known, self._own = host, dial, known, own
        self._busy: dict[Link, None] = {}
        #: Paths that lead nowhere, and until when that is believed.
        self._dead: dict[tuple[PeerId, str], float] = {}

    def paths(self, link: Link) -> int:
        """How many paths seem to lead to the peer: addresses that the side which dialled the link may dial."""
        if dialled(link):
            return len(self._addresses(link))
        here = link.best.local
        return len({here.host} | {own.host for own in self._own() if _alike(own, here)})

    def _addresses(self, link: Link) -> list[Address]:
        """One for each path, that of the best pipe first. What leads nowhere counts among the most that a peer may
        have: else it could have us dial whatever it writes into its records."""
        best, now = link.best.remote, self._host.now()
        dead = [host for (peer, host), until in self._dead.items() if peer == link.peer and until > now]
        hosts = {best.host: best}
        for address in self._known(link.peer):
            if len(hosts) + len(dead) < defaults.MAX_PATHS and _alike(address, best) and address.host not in dead:
                hosts.setdefault(address.host, address)
        return list(hosts.values())

    def wanted(self, link: Link) -> None:
        """``link.width`` has changed its mind. Does not wait."""
        log.info("bulk to %s: %s", link.peer.short, link.width.reason)
        if self.nursery is not None and link not in self._busy:
            self._busy[link] = None
            self.nursery.start_soon(self._fulfil, link)

    async def _fulfil(self, link: Link) -> None:
        link.width.opening = True
        try:
            wanted = link.width.wanted
            if wanted < len(link.bulk_pipes):
                link.narrow(wanted)
            elif dialled(link):
                await self._open(link, wanted)
            elif wanted:
                async with exchange(link, WIDEN, Widen(wanted), timeout=deadlines.connect(link.lag)) as reply:
                    await reply.result()
        except RemoteError as error:
            log.info("no more pipes for bulk: %s", error)
        finally:
            link.width.opening = False
            self._busy.pop(link, None)

    async def answer(self, call: Call[Widen]) -> Widened:
        """Serves :data:`WIDEN`."""
        link = call.link
        if not dialled(link):
            raise RemoteRefused("not_ours", "we did not dial this link by a way that can be used again")
        if link in self._busy:
            raise RemoteRefused("busy", "pipes are being opened already")
        self._busy[link] = None
        try:
            await self._open(link, min(call.request.pipes, defaults.MAX_PIPES - 1))
        finally:
            self._busy.pop(link, None)
        return Widened(len(link.bulk_pipes))

    async def _open(self, link: Link, wanted: int) -> None:
        addresses = self._addresses(link)
        have = [pipe.remote.host for pipe in link.pipes if pipe.bulk_only]
        async with trio.open_nursery() as nursery:
            for _ in range(wanted - len(have)):
                # That with the fewest pipes, the best one's first.
                address = min(addresses, key=lambda address: have.count(address.host))
                have.append(address.host)
                nursery.start_soon(self._open_one, link, address)

    async def _open_one(self, link: Link, address: Address) -> None:
        try:
            try:
                stream = await self._dial(address)
                await open_pipe(self._host, link, stream, link.way, bulk_only=True)
            except RemoteError as error:
                main = link.best.remote
                if address.host == main.host:
                    raise
                log.info("no path to %s by %s: %s", link.peer.short, address, error)
                if len(self._dead) >= defaults.MAX_DEAD_PATHS:
                    del self._dead[next(iter(self._dead))]
                self._dead[link.peer, address.host] = self._host.now() + defaults.DEAD_PATH
                if link.nearest >= defaults.WIDE_RTT:  # else a second one on the same path is of no use
                    await open_pipe(self._host, link, await self._dial(main), link.way, bulk_only=True)
        except RemoteError as error:
            log.info("bulk to %s has no further pipe: %s", link.peer.short, error)


def _alike(one: Address, other: Address) -> bool:
    """Whether whoever reaches one of them may reach the other, and not by the very same path for sure."""
    return one.kind == other.kind and family_of(one) == family_of(other) and scope_of(one) == scope_of(other)


def dialled(link: Link) -> bool:
    """We dialled the best pipe at a listener, which takes more of the same."""
    opened = link.best.index & 1 == 1 or link.best.index == 0
    return link.way == "direct" and opened == link.initiator
