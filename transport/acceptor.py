"""Byte streams that come to us, of every kind, until each is a link: admission, half-open limit, handshake."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from . import defaults
from .errors import RemoteError
from .link import Link
from .linktable import LinkTable
from .network import ByteStream, Listener

log = logging.getLogger(__name__)


class Acceptor:
    """Turns incoming byte streams into links of ``table``. ``shake`` makes a link of a stream, as the responder."""

    def __init__(
        self, table: LinkTable, shake: Callable[[ByteStream, str], Awaitable[Link]], count: Callable[[str], None]
    ) -> None:
        self._table, self._shake, self._count = table, shake, count
        self._half_open: dict[int, trio.CancelScope] = {}
        self._number = 0

    async def serve(self, listener: Listener, nursery: trio.Nursery) -> None:
        """Accept from ``listener`` until cancelled; each stream gets a task in ``nursery``."""
        while True:
            stream = await listener.accept()
            nursery.start_soon(self.incoming, stream, "direct")

    async def incoming(self, stream: ByteStream, way: str) -> None:
        """Make a link of ``stream``, which came by ``way``, or close it."""
        if len(self._half_open) >= defaults.MAX_HALF_OPEN:
            oldest = next(iter(self._half_open))
            self._half_open.pop(oldest).cancel()
            self._count("half_open_dropped")
        self._number += 1
        number = self._number
        link: Link | None = None
        with trio.CancelScope() as scope:
            self._half_open[number] = scope
            try:
                link = await self._shake(stream, way)
            except RemoteError as error:
                log.info("no link with %s: %s", stream.remote, error)
            finally:
                self._half_open.pop(number, None)
        if link is None:
            return
        if self._table.full:
            self._table.refuse(link)
        else:
            self._table.adopt(link)
