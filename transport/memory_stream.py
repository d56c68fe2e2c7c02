"""Streams and listeners of the memory network: the calls of their users, over the flows beneath."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import trio

from .address import Address
from .memory_flow import EOF, RESET, Flow, Sleeper
from .network import ByteStream, Listener

if TYPE_CHECKING:
    from .memory import MemoryNetwork

#: Connections waiting to be accepted.
BACKLOG = 1024


def _immutable(data: bytes | bytearray | memoryview) -> bytes | memoryview:
    """``data`` itself where nobody can change it, else a copy."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, memoryview) and isinstance(data.obj, bytes):
        return data.cast("B") if data.format != "B" else data
    return bytes(data)


class MemoryStream(ByteStream):
    """One end of a connection. Its flows outlive it: what was sent still arrives after ``aclose``."""

    def __init__(self, process: MemoryNetwork, out: Flow, into: Flow, local: Address, remote: Address) -> None:
        self.local, self.remote = local, remote
        self._process, self._out, self._in = process, out, into
        self._sending = self._receiving = self._closed = self._ended = False
        process.streams[self] = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As :class:`trio.abc.SendStream`. A cancelled call has sent everything all the same."""
        await self._send(_immutable(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._send(None)

    async def _send(self, data: bytes | memoryview | None) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._process.running()
            self._check_writable(sending=data is not None)
            if data:
                self._out.push(data, len(data))
            waited = False
            while not self._closed and (ready := self._out.ready_at()) > trio.current_time():
                await self._out.writer.sleep(ready)
                waited = True
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            await self._process.running()
            self._check_writable(sending=data is not None)
        finally:
            self._sending = False

    def _check_writable(self, *, sending: bool) -> None:
        if self._closed or (self._out.eof and sending):
            raise trio.ClosedResourceError("this stream was already closed")
        if self._out.broken() and sending:
            raise trio.BrokenResourceError(f"{self.remote} reset the connection")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As :class:`trio.abc.ReceiveStream`; without a limit one whole piece as it was sent, not copied."""
        if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
            raise (ValueError if isinstance(max_bytes, int) else TypeError)("max_bytes must be a positive integer")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            if self._closed or self._ended or self._in.ready() is not None:
                await trio.lowlevel.checkpoint()  # else it waits below
            while True:
                await self._process.running()
                if self._closed:
                    raise trio.ClosedResourceError("this stream was already closed")
                if self._ended:
                    return b""
                piece = self._in.ready()
                if piece is None:
                    await self._in.reader.sleep(self._in.pieces[0].arrival if self._in.pieces else math.inf)
                elif piece.data is EOF:
                    self._in.pieces.popleft()
                    self._ended = True
                elif piece.data is RESET:
                    raise trio.BrokenResourceError(f"{self.remote} reset the connection")
                else:
                    return self._in.take(piece, max_bytes)
        finally:
            self._receiving = False

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            await self._process.running()
            if self._closed:
                raise trio.ClosedResourceError("this stream was already closed")
            self._push_eof()
        finally:
            self._sending = False

    def _push_eof(self) -> None:
        if not self._out.eof:
            self._out.eof = True
            self._out.push(EOF, 0)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once. A frozen machine's peers learn of it when it goes on."""
        if not self._closed:
            self._closed = True
            self._in.reader.wake()
            self._out.writer.wake()
            self._process.when_running(self.hang_up)

    def abort(self) -> None:
        """Close with a reset, whatever was read or not."""
        self._closed = True
        self._out.push_reset(-math.inf)
        self.hang_up()

    def hang_up(self) -> None:
        """The kernel's part of closing."""
        if self in self._process.streams:
            del self._process.streams[self]
            self._push_eof()
            self._in.close_reader()
            if self._out.closed:
                self._process.world.forget(self._in, self._out)


class MemoryListener(Listener):
    """Connections waiting to be accepted at one port."""

    def __init__(self, process: MemoryNetwork, address: Address) -> None:
        self.address = address
        self.process = process
        self._waiting: deque[tuple[float, MemoryStream]] = deque()
        self._accepting = False
        self._arrived = Sleeper()
        self.closed = False

    @property
    def full(self) -> bool:
        return len(self._waiting) >= BACKLOG

    def offer(self, at: float, stream: MemoryStream) -> None:
        """A connection that is complete at the time ``at``; reset if the listener was closed since it answered."""
        if self.closed:
            stream.abort()
            return
        self._waiting.append((at, stream))
        self._arrived.wake()

    async def accept(self) -> MemoryStream:
        """The next connection, for one task at a time. Cancellation loses none."""
        if self._accepting:
            raise trio.BusyResourceError("another task is accepting here")
        self._accepting = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                await self.process.running()
                if self.closed:
                    raise trio.ClosedResourceError("this listener was already closed")
                if self._waiting and self._waiting[0][0] <= trio.current_time():
                    stream = self._waiting.popleft()[1]
                    if self.admit(stream.remote.host):
                        return stream
                    stream.abort()
                    continue
                await self._arrived.sleep(self._waiting[0][0] if self._waiting else math.inf)
        finally:
            self._accepting = False

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Refuse from now on; connections not accepted are reset."""
        if not self.closed:
            self.closed = True
            self._arrived.wake()
            self.process.when_running(self.hang_up)

    def hang_up(self) -> None:
        self.process.listeners.pop(self.address.port, None)
        for _, stream in self._waiting:
            stream.abort()
        self._waiting.clear()
