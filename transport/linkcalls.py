"""The side of a link that calls see: ask and wait, answer, and what becomes of both when the link ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import ParkingLot

from .callmux import NOT_SERVED, CallAnswered, CallCancelled, CallEvent, CallReceived, IncomingCall
from .errors import RemoteError
from .stream import StreamLost, link_lost
from .waiter import Waiter

if TYPE_CHECKING:
    from .host import Host
    from .identity import PeerId
    from .mux import Mux
    from .pipe import Pipe
    from .pipeset import PipeSet


class _Asker(Waiter):
    """Who waits for an answer."""

    __slots__ = ("lost",)

    def __init__(self) -> None:
        super().__init__()
        self.lost: RemoteError | None = None


class CarriesCalls:
    """A link, to those who call and answer over it."""

    peer: PeerId
    _host: Host
    _mux: Mux
    _pipes: PipeSet

    def __init__(self) -> None:
        #: Takes calls that the peer makes: the link, the call, its request (a view that must not be kept). Must not
        #: wait. Each call is to be answered once.
        self.on_call: Callable[[Any, IncomingCall, memoryview], None] | None = None
        self._call_slots = ParkingLot()

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def _changed(self) -> None: ...

    @abstractmethod
    def _compose(self, pipe: Pipe) -> bytearray | memoryview | None: ...

    @abstractmethod
    def _sent(self, pipe: Pipe, size: int, seconds: float, now: float) -> None: ...

    @abstractmethod
    def _closed_error(self) -> StreamLost: ...

    @property
    def can_call(self) -> bool:
        """True when :meth:`ask` may be used."""
        return self.alive and self._mux.calls.can_call

    async def wait_can_call(self) -> None:
        """Wait while as many calls as are allowed wait for their answers. Raises :class:`LinkClosed`."""
        while self.alive and not self._mux.calls.can_call:
            await self._call_slots.park()
        if not self.alive:
            raise self._closed_error()

    async def ask(self, request: bytes) -> bytes:
        """Send a small request and return its answer. Only right after :meth:`wait_can_call`, without a checkpoint.

        Cancellation cancels the call at the peer. Raises :class:`LinkClosed`.
        """
        asker = _Asker()
        calls = self._mux.calls
        call = calls.call(request, asker)
        if calls.open == 1:
            self._send_at_once()
        else:
            self._changed()
        try:
            while call.answer is None:
                if asker.lost is not None:
                    raise link_lost(asker.lost, self.peer)
                await asker.wait()
        finally:
            if call.answer is None:
                self._mux.calls.cancel(call)
                self._changed()
                self._call_slots.unpark()
        return call.answer

    async def wait_can_answer(self) -> None:
        """Wait while too much waits to be sent. For an answer that is small one need not wait."""
        while self._mux.calls.full:
            await self._call_slots.park()

    def answer(self, call: IncomingCall, data: bytes) -> None:
        """Answer a call, without waiting."""
        calls = self._mux.calls
        calls.answer(call, data)
        if calls.open:
            self._changed()
        else:
            self._send_at_once()

    def _send_at_once(self) -> None:
        """Send what is due without waking the writer, which costs two turns of the loop.

        For a call that is alone on the link; where there are more, it is better that one record takes them all.
        """
        pipe = self._pipes.best
        if len(self._pipes.all) > 1 or not pipe.work or not pipe.usable or pipe.has_frames:
            self._changed()
            return
        try:
            wire = self._compose(pipe)
            sent = pipe.stream.send_now(wire) if wire else 0
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError):
            pipe.work.wake()  # the writer meets the same, and knows what to do
            return
        if sent:
            self._sent(pipe, sent, 0.0, self._host.now())
        if wire and sent < len(wire):
            pipe.unsent = memoryview(wire)[sent:]
        if pipe.unsent is not None or self._mux.has_output:
            pipe.work.wake()

    def _on_call_event(self, event: CallEvent) -> None:
        match event:
            case CallReceived(call, request):
                if self.on_call is None:
                    self._mux.calls.answer(call, NOT_SERVED)
                else:
                    self.on_call(self, call, request)
            case CallAnswered(call):
                call.owner.wake()
                self._call_slots.unpark()
            case CallCancelled(call):
                if call.on_broken is not None:
                    call.on_broken()

    def _calls_sent(self) -> None:
        if self._call_slots and not self._mux.calls.full:
            self._call_slots.unpark_all()

    def _break_calls(self, reason: RemoteError) -> None:
        outgoing, incoming = self._mux.calls.drop()
        for asked in outgoing:
            asked.owner.lost = reason
            asked.owner.wake()
        for call in incoming:
            if call.on_broken is not None:
                call.on_broken()
        self._call_slots.unpark_all()
