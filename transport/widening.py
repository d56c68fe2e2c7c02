"""Opens the pipes for bulk that a link wants; the side that dialled the link dials these too, the other asks it to."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import attrs
import trio

from . import deadlines, defaults
from .address import Address
from .errors import RemoteError, RemoteRefused
from .establish import open_pipe
from .host import Host
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
    """``dial`` opens a byte stream to an address, as for a new link."""

    def __init__(self, host: Host, dial: Callable[[Address], Awaitable[ByteStream]]) -> None:
        #: Where this runs, while the endpoint does.
        self.nursery: trio.Nursery | None = None
        self._host, self._dial = host, dial
        self._busy: dict[Link, None] = {}

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
        async with trio.open_nursery() as nursery:
            for _ in range(wanted - sum(pipe.bulk_only for pipe in link.pipes)):
                nursery.start_soon(self._open_one, link, link.best.remote)

    async def _open_one(self, link: Link, address: Address) -> None:
        try:
            stream = await self._dial(address)
            await open_pipe(self._host, link, stream, link.way, bulk_only=True)
        except RemoteError as error:
            log.info("bulk to %s has no further pipe: %s", link.peer.short, error)


def dialled(link: Link) -> bool:
    """We dialled the best pipe at a listener, which takes more of the same."""
    opened = link.best.index & 1 == 1 or link.best.index == 0
    return link.way == "direct" and opened == link.initiator
