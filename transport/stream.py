"""One stream of a link as a trio stream: backpressure by credits, half-close, reset."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from . import defaults
from .errors import LinkClosed, RemoteError, RemoteProtocolError, StreamReset
from .frames import Buffer, MuxStream, Priority, Receiving, ResetCode, Sending
from .mux import Mux
from .waiter import Waiter

if TYPE_CHECKING:
    from .identity import PeerId
    from .link import Link


class StreamBroken(StreamReset, trio.BrokenResourceError):
    """A :class:`StreamReset` that trio's stream interface understands as well."""


class StreamLost(LinkClosed, trio.BrokenResourceError):
    """A :class:`LinkClosed` that trio's stream interface understands as well."""


def link_lost(reason: RemoteError, peer: PeerId) -> StreamLost:
    """What a stream or call raises when its link ends for ``reason``."""
    goodbye = isinstance(reason, LinkClosed) and reason.goodbye
    return StreamLost(f"the link ended: {reason.message}", peer=peer.short, goodbye=goodbye)


class LinkStream(trio.abc.HalfCloseableStream):
    """One stream to one peer. Got from :meth:`Link.open_stream`, or handed to whoever serves its protocol.

    One task may send and one may receive at a time (:class:`trio.BusyResourceError` otherwise). When the peer resets
    the stream, both raise :class:`StreamReset`; when the link ends, :class:`LinkClosed` (what had come in before can
    still be read). Both are also :class:`trio.BrokenResourceError`. The stream's end never harms the link.
    """

    def __init__(self, link: Link, mux: Mux, stream: MuxStream) -> None:
        self.link = link
        #: Called, without waiting, when the peer resets the stream or the link ends.
        self.on_broken: Callable[[], None] | None = None
        self._mux = mux
        self._stream = stream
        self._sender = Waiter()
        self._receiver = Waiter()
        self._sending = False
        self._receiving = False
        self._closed = False
        self._lost: RemoteError | None = None
        stream.owner = self

    @property
    def peer(self) -> PeerId:
        return self.link.peer

    @property
    def protocol(self) -> str:
        return self._stream.protocol

    @property
    def priority(self) -> Priority:
        return self._stream.priority

    @property
    def stopped(self) -> bool:
        """True when the peer no longer reads but may still send."""
        return self._stream.stop_code is not None and self._stream.reset_code is None

    @property
    def ended(self) -> bool:
        """True when nothing more can be sent: we ended the stream, or it broke."""
        return self._stream.sending is not Sending.OPEN

    @property
    def broken(self) -> bool:
        """True when the peer has reset the stream, or the link has ended."""
        return self._stream.reset_code is not None or self._lost is not None

    def __repr__(self) -> str:
        return f"<LinkStream {self._stream.id} {self.protocol!r} with {self.peer.short}>"

    # Sending

    async def send_all(self, data: Buffer) -> None:
        """Send ``data``; returns when it is in a record on its way (small data: when it is copied).

        ``data`` is not copied and must not change meanwhile. Cancellation while it is partly sent resets the stream:
        the peer would otherwise take half a message for a whole one.
        """
        await self._send(data, end=False)

    async def send_last(self, data: Buffer) -> None:
        """As :meth:`send_all`, and close the sending half behind it, without a turn of the loop for that."""
        await self._send(data, end=True)

    async def _send(self, data: Buffer, *, end: bool) -> None:
        self._begin_sending()
        try:
            await checkpoint_if_cancelled()
            stream = self._stream
            self._check_sending()
            size = len(data) if not isinstance(data, memoryview) else data.nbytes
            if size <= defaults.SMALL_SEND and stream.queued < defaults.SMALL_QUEUE:
                self._mux.send(stream, bytes(data))
                if end:
                    self._mux.end(stream)
                self.link._changed()
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
            self._mux.send(stream, data)
            if end:
                self._mux.end(stream)
            self.link._changed()
            try:
                while stream.queued:
                    await self._sender.wait()
            except trio.Cancelled:
                self.reset(ResetCode.CANCELLED)
                raise
            # The queue is also empty because somebody dropped it: we, the peer, or the link's end.
            self._check_sending(ended=end)
        finally:
            self._sending = False

    def post(self, data: bytes, *, end: bool = False) -> bool:
        """Send small ``data`` at once, without waiting, and with ``end`` close the sending half in the same record.

        False, and nothing is sent, when it would have to wait: use :meth:`send_all`. Errors as there.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._check_sending()
        stream = self._stream
        if len(data) > defaults.SMALL_SEND or stream.queued >= defaults.SMALL_QUEUE:
            return False
        self._mux.send(stream, data)
        if end:
            self._mux.end(stream)
            self.link._send_at_once()
        else:
            self.link._changed()
        return True

    async def wait_send_all_might_not_block(self) -> None:
        self._begin_sending()
        try:
            await checkpoint()
            self._check_sending()
            while self._stream.queued >= defaults.SMALL_QUEUE:
                await self._sender.wait()
                self._check_sending()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Close the sending half after what was sent. Receiving goes on."""
        self._begin_sending()
        try:
            if self._closed:
                raise trio.ClosedResourceError("this stream is closed")
            if self._lost is None:
                self._mux.end(self._stream)
                self.link._changed()
            await checkpoint()
        finally:
            self._sending = False

    def _begin_sending(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True

    def _check_sending(self, *, ended: bool = False) -> None:
        """Raise what stands in the way of sending. ``ended``: that our half is closed is as it should be."""
        stream = self._stream
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if stream.reset_code is not None or stream.stop_code is not None:
            raise self._reset_error()
        if self._lost is not None:
            raise link_lost(self._lost, self.peer)
        if stream.sending is not Sending.OPEN and not ended:
            raise trio.ClosedResourceError("the sending half of this stream is closed")

    # Receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, as a copy; ``b""`` at the end. See :meth:`read_exactly_into` for bulk."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        self._begin_receiving()
        try:
            await checkpoint()
            while True:
                self._check_receiving()
                data = self._mux.read(self._stream, max_bytes or defaults.READ_SIZE)
                if data is not None:
                    self.link._changed()
                    return bytes(data)
                await self._wait_readable()
        finally:
            self._receiving = False

    async def read_exactly_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` (contiguous, writable). Raises :class:`RemoteProtocolError` when the stream ends before.

        Cancellation loses the bytes read so far: the stream is then good only for being reset or closed.
        """
        view = buffer if buffer.itemsize == 1 and buffer.ndim == 1 else buffer.cast("B")
        self._begin_receiving()
        try:
            await checkpoint_if_cancelled()
            waited = False
            done = 0
            while done < len(view):
                self._check_receiving()
                n = self._mux.read_into(self._stream, view[done:])
                if n:
                    done += n
                    self.link._changed()
                elif self._stream.receiving is Receiving.OPEN:
                    done += await self._wait_for(view[done:])
                    waited = True
                else:
                    raise RemoteProtocolError(
                        f"the stream ended after {done} of {len(view)} bytes", peer=self.peer.short
                    )
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._receiving = False

    async def read_exactly(self, size: int) -> bytearray:
        """The next ``size`` bytes, as a copy. No checkpoint when they are here already; else as the above."""
        data = self.read_available(size)
        if data is None:
            data = bytearray(size)
            await self.read_exactly_into(memoryview(data))
        return data

    def read_available(self, size: int) -> bytearray | None:
        """The next ``size`` bytes, as a copy, when all of them are here; None, and nothing is read, otherwise."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._check_receiving()
        if self._stream.unread < size:
            return None
        data = bytearray(size)
        self._mux.read_into(self._stream, memoryview(data))
        self.link._changed()
        return data

    async def _wait_for(self, sink: memoryview) -> int:
        """Wait until there is something to read, or ``sink`` is full; returns the bytes that were written to it."""
        self._stream.sink = sink
        self._mux.expect(self._stream)
        try:
            await self._wait_readable()
        finally:
            rest, self._stream.sink = self._stream.sink, None
        return len(sink) - len(rest or b"")

    async def _wait_readable(self) -> None:
        if self._lost is not None:
            raise link_lost(self._lost, self.peer)
        await self._receiver.wait()

    def _begin_receiving(self) -> None:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True

    def _check_receiving(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        if self._stream.reset_code is not None:
            raise self._reset_error()

    # The end

    async def aclose(self) -> None:
        """Close: what was sent still arrives, with its end; what comes in is no longer read. Never blocks for long."""
        self.close()
        await checkpoint()

    def close(self) -> None:
        """:meth:`aclose` without its checkpoint."""
        if not self._closed:
            self._closed = True
            if self._sending and self._stream.queued:
                self._mux.reset(self._stream, ResetCode.CANCELLED)  # another task's buffer must not be sent any more
            else:
                self._mux.end(self._stream)
                self._mux.stop(self._stream, ResetCode.NOT_READING)
            self.link._changed()
            self._wake()

    def reset(self, code: int = ResetCode.CANCELLED) -> None:
        """End both halves at once, without waiting; the peer gets :class:`StreamReset` with ``code``."""
        if not self._closed:
            self._closed = True
            self._mux.reset(self._stream, code)
            self.link._changed()
            self._wake()

    def stop_receiving(self, code: int = ResetCode.NOT_READING) -> None:
        """Tell the peer that the rest of what it sends is not wanted. Sending goes on."""
        self._mux.stop(self._stream, code)
        self.link._changed()

    # Called by the link

    def _wake_sender(self) -> None:
        self._sender.wake()

    def _wake_receiver(self) -> None:
        self._receiver.wake()

    def _wake(self) -> None:
        self._sender.wake()
        self._receiver.wake()

    def _broken(self) -> None:
        """The peer has reset the stream."""
        self._wake()
        if self.on_broken is not None:
            self.on_broken()

    def _link_lost(self, reason: RemoteError) -> None:
        self._lost = reason
        self._mux.drop_queue(self._stream)
        self._broken()

    def _reset_error(self) -> StreamBroken:
        stream = self._stream
        code = stream.reset_code if stream.reset_code is not None else stream.stop_code or 0
        verb = "reset the stream" if stream.reset_code is not None else "no longer reads the stream"
        name = ResetCode(code).name.lower().replace("_", " ") if code in tuple(ResetCode) else "an application's reason"
        return StreamBroken(f"it {verb}: {name} ({code})", peer=self.peer.short, code=code)
