"""Byte streams that come to us, of every kind, until each is a link or a pipe of one: admission, limits, handshake."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from . import defaults
from .deadlines import LoopLag
from .errors import RemoteError
from .establish import join_pipe
from .host import Host
from .link import Link
from .linktable import LinkTable
from .network import ByteStream, Listener
from .secure import PipeKnock
from .throttle import HalfOpen, Throttle

log = logging.getLogger(__name__)


class Acceptor:
    """Turns incoming byte streams into links of ``table``. ``shake`` makes a link of a stream, as the responder."""

    def __init__(
        self,
        host: Host,
        table: LinkTable,
        lag: LoopLag,
        shake: Callable[[ByteStream, str], Awaitable[Link]],
        count: Callable[[str], None],
    ) -> None:
        #: Who may connect how often; None admits everybody (benchmarks).
        self.throttle: Throttle | None = Throttle(host.now())
        #: May take an accepted stream for itself (a punched hole that ended at our listener).
        self.claim: Callable[[ByteStream], bool] = lambda stream: False
        self._host, self._table, self._lag, self._shake, self._count = host, table, lag, shake, count
        self._half_open = HalfOpen(defaults.MAX_HALF_OPEN)
        self._scopes: dict[int, trio.CancelScope] = {}
        self._number = 0
        self._throttled = 0

    async def serve(self, listener: Listener, nursery: trio.Nursery) -> None:
        """Accept from ``listener`` until cancelled; each stream that is admitted gets a task in ``nursery``."""
        listener.admit = self._admit
        while True:
            stream = await listener.accept()
            if self.claim(stream):
                continue
            nursery.start_soon(self.incoming, stream, "direct")

    def _admit(self, host: str) -> bool:
        if self.throttle is None:
            return True
        admitted, reason = self.throttle.admit(host, self._host.now())
        if not admitted:
            self._count("connections_throttled")
            self._throttled += 1
            if self._throttled & (self._throttled - 1) == 0:  # 1st, 2nd, 4th, 8th …: a flood must not fill the log
                log.warning("refused %d connections so far: %s", self._throttled, reason)
        return admitted

    async def incoming(self, stream: ByteStream, way: str) -> None:
        """Make a link, or a pipe of one, of ``stream``, which came by ``way``, or close it."""
        self._number += 1
        number = self._number
        gives_way = self._half_open.add(number, stream.remote.host)
        if gives_way is not None:
            self._count("half_open_dropped")
            if gives_way == number:
                await trio.aclose_forcefully(stream)
                return
            self._scopes.pop(gives_way).cancel()
        link: Link | None = None
        with trio.CancelScope() as scope:
            self._scopes[number] = scope
            try:
                link = await self._shake(stream, way)
            except PipeKnock as knock:
                await self._join(stream, knock.got, way)
            except RemoteError as error:
                log.info("no link with %s: %s", stream.remote, error)
            finally:
                self._half_open.remove(number)
                self._scopes.pop(number, None)
        if link is None:
            return
        if self._table.make_room(link):
            self._table.adopt(link)
        else:
            self._table.refuse(link)

    async def _join(self, stream: ByteStream, got: bytes, way: str) -> None:
        try:
            await join_pipe(self._host, stream, got, way, self._table.session, self._lag)
        except RemoteError as error:
            self._count("pipes_refused")
            log.info("no pipe with %s: %s", stream.remote, error)
