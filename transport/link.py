"""One live link to one peer: a secure channel and a mux over a byte stream, run by three small tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import ParkingLot

from . import deadlines, defaults
from .errors import LinkClosed, Overloaded, RemoteError, RemoteProtocolError, WaitExpired
from .frames import (
    DataReceived,
    Event,
    GoodbyeCode,
    GoodbyeReceived,
    MuxLimits,
    PongReceived,
    Priority,
    ResetCode,
    StreamOpened,
    StreamStopped,
    StreamWasReset,
)
from .mux import Mux
from .secure import Established, Record, SecureChannel
from .stream import LinkStream, StreamLost
from .waiter import Waiter
from .wire import printable

if TYPE_CHECKING:
    from .address import Address
    from .deadlines import LoopLag
    from .host import Host
    from .identity import PeerId
    from .network import ByteStream

__all__ = ["Link", "LinkStream", "Priority", "StreamLost", "establish"]


async def establish(
    host: Host, stream: ByteStream, channel: SecureChannel, lag: LoopLag, *, limits: MuxLimits | None = None
) -> Link:
    """Shake hands over ``stream`` and return the link, not yet running.

    Raises :class:`HandshakeError` (and other :class:`RemoteProtocolError`), :class:`LinkClosed` when the other side
    hangs up, :class:`WaitExpired` when it is silent. ``stream`` is closed on every error, and on cancellation.
    """
    began = host.now()
    seconds = deadlines.handshake(lag.value(began))
    sent = received = 0
    records: list[memoryview] = []
    try:
        with trio.move_on_after(seconds) as scope:
            due = channel.start()
            while True:
                if due:
                    await stream.send_all(due)
                    sent += len(due)
                if channel.established:
                    break
                data = await stream.receive_some(defaults.READ_SIZE)
                if not data:
                    raise LinkClosed("it hung up during the handshake")
                received += len(data)
                for event in channel.receive(data):
                    if isinstance(event, Record):
                        records.append(event.data)
                    else:
                        assert isinstance(event, Established)
                due = channel.outgoing()
        if scope.cancelled_caught:
            what = "complete handshake" if received else "handshake: it connected and says nothing"
            raise WaitExpired(what, seconds)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(stream)
        raise LinkClosed("the connection broke during the handshake") from None
    except RemoteProtocolError:
        # Our refusal (another version, a wrong identity) may still be worth hearing for the other side.
        due = channel.outgoing()
        with trio.move_on_after(deadlines.goodbye()):
            try:
                if due:
                    await stream.send_all(due)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        await trio.aclose_forcefully(stream)
        raise
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    link = Link(host, stream, channel, lag, limits=limits, rtt=host.now() - began, records=records)
    link.bytes_sent, link.bytes_received = sent, received
    return link


class Link:
    """An authenticated, encrypted connection to ``peer`` that carries many streams.

    Run by :meth:`run`, in a nursery of the endpoint. ``closed`` is set when everything about it has ended;
    ``close_reason`` then says why.
    """

    def __init__(
        self,
        host: Host,
        stream: ByteStream,
        channel: SecureChannel,
        lag: LoopLag,
        *,
        limits: MuxLimits | None = None,
        rtt: float = 0.0,
        records: list[memoryview] | None = None,
    ) -> None:
        self.peer: PeerId = channel.peer
        self.remote: Address = stream.remote
        #: How the link came about: "direct", "reversal", "punch", "webrtc" or "relay".
        self.way = "direct"
        self.initiator: bool = channel.initiator
        self.cipher: str = channel.cipher
        self.exporter: bytes = channel.exporter
        self.bytes_sent = 0
        self.bytes_received = 0
        #: Bytes per second, smoothed, at which the network took larger records; None: not measured yet.
        self.bandwidth: float | None = None
        self.opened_at = self.last_used = host.now()
        self.closed = trio.Event()
        self.close_reason: LinkClosed | RemoteError | None = None
        #: The code of the peer's goodbye.
        self.goodbye_code: int | None = None
        #: True when we closed the link because it was idle.
        self.closed_idle = False
        #: The address under which the peer sees us, once it has said so.
        self.observed: Address | None = None
        #: Takes streams that the peer opens. Must not wait.
        self.on_stream: Callable[[LinkStream], None] | None = None
        #: Called each time the link has been idle for a keepalive interval. Must not wait.
        self.on_idle: Callable[[], None] | None = None
        self._host = host
        self._stream = stream
        self._channel = channel
        self._lag = lag
        self._mux = Mux(initiator=channel.initiator, limits=limits, peer=self.peer.short)
        self._handshake_rtt = rtt
        self._records = records or []
        self._work = Waiter()
        self._slots = ParkingLot()
        self._scope: trio.CancelScope | None = None
        self._writing = False
        self._pace: float | None = None  # smoothed seconds per byte of larger records
        self._record_limit = defaults.FIRST_RECORD
        self._fast = False  # the line, so that more may wait in the kernel
        self._parting = ""  # what we said in our goodbye
        self._heard = host.now()
        self._unheard = 0  # bytes sent since we last heard from the peer

    def __repr__(self) -> str:
        state = "closed" if self.close_reason is not None else "live"
        return f"<Link to {self.peer.short} at {self.remote} {state}>"

    @property
    def rtt(self) -> float:
        """Smoothed round trip in seconds: of pings, before the first of them the handshake's duration."""
        return self._handshake_rtt if self._mux.rtt is None else self._mux.rtt

    @property
    def alive(self) -> bool:
        """True while streams can be opened."""
        return self.close_reason is None and not self._mux.goodbye_sent

    @property
    def idle(self) -> bool:
        """True when no stream is open."""
        return self._mux.streams == 0

    @property
    def streams(self) -> int:
        return self._mux.streams

    @property
    def lag(self) -> float:
        """Our loop's lag in seconds, for deadlines."""
        return self._lag.value(self._host.now())

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
        return LinkStream(self, self._mux, stream)

    async def aclose(self, reason: str = "goodbye", code: int = GoodbyeCode.LEAVING) -> None:
        """Say goodbye (best effort, at most :func:`deadlines.goodbye` seconds), then close.

        Cancellation skips what is left of the goodbye; the link closes all the same.
        """
        try:
            self.say_goodbye(reason, code)
            with trio.move_on_after(deadlines.goodbye()):
                await self.closed.wait()
        finally:
            self._end(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))
            with trio.CancelScope(shield=True):
                await self.closed.wait()

    def say_goodbye(self, reason: str, code: int = GoodbyeCode.LEAVING) -> None:
        """Begin to close, without waiting: from here on no stream opens and nothing that comes in is looked at."""
        if self.alive:
            self._parting = reason
            self.closed_idle = code == GoodbyeCode.IDLE
            self._mux.goodbye(code, reason)
            self._break_streams(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))
            self._work.wake()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link until it ends, for whatever reason. A peer's fault is no exception here: it is recorded."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                if self.close_reason is not None:
                    nursery.cancel_scope.cancel()
                task_status.started()
                for task in (self._read, self._write, self._keepalive):
                    nursery.start_soon(self._guard, task)
        finally:
            if self.close_reason is None:
                self.close_reason = LinkClosed("closed by us", peer=self.peer.short)
            with trio.CancelScope(shield=True):
                await self._say_why()
                await trio.aclose_forcefully(self._stream)
            self._break_streams(self.close_reason)
            self._slots.unpark_all()
            self._records.clear()
            self.closed.set()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except RemoteError as error:
            self._end(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            how = (
                f"closed by us: {self._parting}" if self._mux.goodbye_sent else "the connection broke without a goodbye"
            )
            self._end(LinkClosed(how, peer=self.peer.short))

    def _end(self, reason: LinkClosed | RemoteError) -> None:
        if self.close_reason is None:
            self.close_reason = reason
        if self._scope is not None:
            self._scope.cancel()

    async def _say_why(self) -> None:
        """Tell a peer that broke the protocol what it did: the other side's log is where somebody will look."""
        reason = self.close_reason
        if not isinstance(reason, RemoteProtocolError) or self._writing or self._mux.goodbye_sent:
            return
        self._mux.goodbye(GoodbyeCode.PROTOCOL_ERROR, reason.message)
        record = self._mux.next_record(defaults.MAX_RECORD)
        with trio.move_on_after(deadlines.goodbye()):
            try:
                if record is not None:
                    await self._stream.send_all(self._channel.seal(record))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    # The three tasks

    async def _read(self) -> None:
        for record in self._records:
            self._receive(record)
        self._records.clear()
        while True:
            data: bytes | bytearray = b""
            room = self._channel.room()
            if room is None:
                data = await self._stream.receive_some(defaults.READ_SIZE)
                size = len(data)
            else:
                size = await self._stream.receive_into(room)
            if not size and self._mux.goodbye_sent:
                raise LinkClosed(f"closed by us: {self._parting}", peer=self.peer.short)
            if not size:
                self._channel.eof()
                raise LinkClosed("the connection ended without a goodbye", peer=self.peer.short)
            self._heard = self._host.now()
            self._unheard = 0
            self.bytes_received += size
            if self._mux.goodbye_sent:
                continue
            for event in self._channel.receive(data) if room is None else self._channel.fill(size):
                assert isinstance(event, Record)
                self._receive(event.data)

    async def _write(self) -> None:
        while True:
            record = self._mux.next_record(self._record_limit)
            if record is None:
                if self._mux.goodbye_sent:
                    await self._stream.send_eof()
                    return  # the reader goes on until the peer has hung up, so that no reset overtakes the goodbye
                await self._work.wait()
                continue
            wire = self._channel.seal(record)
            del record
            for drained in self._mux.take_drained():
                if drained.owner is not None:
                    drained.owner._wake_sender()
            self._slots_changed()
            began = self._host.now()
            self._writing = True
            await self._stream.send_all(wire)
            self._writing = False
            self.bytes_sent += len(wire)
            self._unheard += len(wire)
            if len(wire) >= defaults.MIN_RECORD // 2:
                self._measure(len(wire), self._host.now() - began)

    async def _keepalive(self) -> None:
        while True:
            due = self._heard + defaults.KEEPALIVE_IDLE
            await self._sleep_until(due)
            if self._heard + defaults.KEEPALIVE_IDLE > self._host.now():
                continue
            if self.on_idle is not None:
                self.on_idle()
            asked = self._host.now()
            self._mux.ping(asked)
            self._changed()
            while True:
                seconds = deadlines.sign_of_life(self.rtt, self.lag, self._unheard, self.bandwidth)
                overshoot = await self._sleep_until(self._host.now() + seconds)
                if self._heard >= asked:
                    break
                if overshoot < defaults.LAG_TOLERANCE:
                    waited = self._host.now() - asked
                    raise WaitExpired("sign of life", waited, peer=self.peer.short)

    async def _sleep_until(self, deadline: float) -> float:
        """Sleep, and return (and note) by how many seconds too long."""
        await trio.sleep(max(0.0, deadline - self._host.now()))
        now = self._host.now()
        overshoot = max(0.0, now - deadline)
        self._lag.note(overshoot, now)
        return overshoot

    # Between the mux and its streams

    def _receive(self, record: memoryview) -> None:
        for event in self._mux.receive(record, self._host.now()):
            self._handle(event)
        self._changed()

    def _handle(self, event: Event) -> None:
        match event:
            case DataReceived(stream):
                if stream.owner is not None:
                    stream.owner._wake_receiver()
            case StreamOpened(stream):
                self.last_used = self._host.now()
                if self.on_stream is None:
                    self._mux.reset(stream, ResetCode.UNKNOWN_PROTOCOL)
                else:
                    self.on_stream(LinkStream(self, self._mux, stream))
            case StreamStopped(stream):
                if stream.owner is not None:
                    stream.owner._wake_sender()
            case StreamWasReset(stream):
                if stream.owner is not None:
                    stream.owner._broken()
            case PongReceived():
                pass
            case GoodbyeReceived(code, reason):
                self.goodbye_code = code
                what = f"it said goodbye: {printable(reason)}" if reason else "it said goodbye"
                raise LinkClosed(what, peer=self.peer.short, goodbye=True)

    def _changed(self) -> None:
        """Something happened in the mux: there may be a record to write, or a slot for a stream."""
        if self._work and self._mux.has_output:
            self._work.wake()
        if self._slots:
            self._slots_changed()

    def _slots_changed(self) -> None:
        if self._slots and self._mux.can_open:
            self._slots.unpark()

    def _break_streams(self, reason: RemoteError) -> None:
        for stream in self._mux.live_streams():
            if stream.owner is not None:
                stream.owner._link_lost(reason)

    def _closed_error(self) -> StreamLost:
        reason = self.close_reason
        if reason is None:
            return StreamLost("the link is being closed by us", peer=self.peer.short)
        goodbye = isinstance(reason, LinkClosed) and reason.goodbye
        return StreamLost(f"the link ended: {reason.message}", peer=self.peer.short, goodbye=goodbye)

    def _measure(self, size: int, seconds: float) -> None:
        # Seconds per byte are averaged, not bytes per second: a record that vanished in the kernel's buffer in no time
        # says little about the line, one that took long says much.
        sample = seconds / size
        self._pace = sample if self._pace is None else 0.5 * (self._pace + sample)
        self.bandwidth = 1.0 / max(self._pace, 1e-12)
        self._record_limit = deadlines.record_size(self.bandwidth, self._record_limit)
        fast = self.bandwidth > (defaults.SLOW_LINE if self._fast else defaults.FAST_LINE)
        if fast != self._fast:
            self._fast = fast
            self._stream.allow_unsent(defaults.UNSENT_FAST if fast else defaults.UNSENT_SLOW)
