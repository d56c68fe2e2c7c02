"""The side of a link that opens streams: as many at once as are allowed, and who waits for its turn."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import ParkingLot

from .errors import LinkClosed, Overloaded
from .frames import Priority
from .stream import LinkStream, StreamLost

if TYPE_CHECKING:
    from .host import Host
    from .identity import PeerId
    from .link import Link
    from .mux import Mux


class OpensStreams:
    """A link, to those who open streams on it."""

    peer: PeerId
    last_used: float
    _host: Host
    _mux: Mux
    _slots: ParkingLot

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def _changed(self) -> None: ...

    @abstractmethod
    def _closed_error(self) -> StreamLost: ...

    @abstractmethod
    def _as_link(self) -> Link: ...

    async def open_stream(self, protocol: str, priority: Priority = Priority.CONTROL) -> LinkStream:
        """Open a stream. Waits while our side holds the most streams allowed; the caller's deadline bounds that.

        Raises :class:`LinkClosed`.
        """
        await trio.lowlevel.checkpoint()
        while (stream := self.try_open_stream(protocol, priority)) is None:
            await self._slots.park()
        return stream

    def try_open_stream(self, protocol: str, priority: Priority = Priority.CONTROL) -> LinkStream | None:
        """Open a stream without waiting; None when :meth:`open_stream` would wait. Raises :class:`LinkClosed`."""
        if not self.alive:
            raise self._closed_error()
        if not self._mux.can_open:
            return None
        try:
            stream = self._mux.open(protocol, priority)
        except Overloaded as error:
            raise LinkClosed(str(error), peer=self.peer.short) from None
        self.last_used = self._host.now()
        self._changed()
        return LinkStream(self._as_link(), self._mux, stream)

    def _slots_changed(self) -> None:
        if self._slots and self._mux.can_open:
            self._slots.unpark()
