"""The receiving half of the mux, and what both halves share: streams, credits, what each frame does. Sans-IO.

See :mod:`mux` for the theory of operation.
"""

from __future__ import annotations

from typing import Any

from . import defaults
from .callmux import CallEvent, CallMux
from .errors import RemoteProtocolError
from .frames import (
    HEADER,
    HEADER_BYTES,
    DataReceived,
    Event,
    Frame,
    GoodbyeReceived,
    MuxLimits,
    MuxStream,
    Priority,
    Receiving,
    ResetCode,
    Sending,
    StreamOpened,
    StreamStopped,
    StreamWasReset,
)
from .records import Record, SealedBody

# As plain numbers, which is what comes: a member of an enumeration is five times slower to compare.
_WITH_PAYLOAD = frozenset(map(int, (Frame.DATA, Frame.CALL, Frame.ANSWER, Frame.OPEN, Frame.PART, Frame.GOODBYE)))
_CALLS = frozenset(map(int, (Frame.CALL, Frame.ANSWER, Frame.PART, Frame.CANCEL)))


class MuxInput:
    """The state of one end of a multiplexed link, and what comes in on it. Use :class:`mux.Mux`."""

    def __init__(self, *, initiator: bool, limits: MuxLimits | None = None, peer: str = "") -> None:
        self.limits = limits or MuxLimits()
        self.peer = peer
        self.goodbye_sent = False
        self._opener = 1 if initiator else 0
        self._streams: dict[int, MuxStream] = {}
        self._number = [0, 0, 0, 0]  # highest stream number so far, by priority and opener: the last two bits of an id
        self._open_count = [0, 0]  # live streams: opened by the responder, by the initiator
        # By channel. Lists: an empty deque takes 760 bytes, and these are short.
        self._frames: tuple[list[bytes], list[bytes]] = ([], [])  # in order, before all data
        self._ready: tuple[list[MuxStream], list[MuxStream]] = ([], [])
        self._credit = list(self.limits.link_window)
        self._allowance = list(self.limits.link_window)
        self._unacknowledged = [0, 0]
        self._drained: list[MuxStream] = []
        self._answers = 0  # queued frames that the peer made us send; bounded
        self._last: MuxStream | None = None  # whose data of bulk came last, or are expected
        self.calls = CallMux(self._broken)

    # Input

    def receive(self, payload: Record, channel: Priority) -> list[Event | CallEvent]:
        """Take the plaintext of the next record of ``channel``. Raises :class:`RemoteProtocolError`: the link must end.

        Received data stay views of the record unless they are a small part of it. The body of a split record must be
        the end of its last frame, a DATA frame.
        """
        events: list[Any] = []
        record, body = payload.data, payload.body
        at, size = 0, len(record)
        while at < size:
            if size - at < HEADER_BYTES:
                raise self._broken("a record ends within a frame's header")
            kind, id, value = HEADER.unpack_from(record, at)
            at += HEADER_BYTES
            content = record[at:at]
            if body is not None and kind == Frame.DATA and value == size - at + len(body) and id >> 1 & 1 == channel:
                if at < size:
                    self._on_data(id, record[at:], len(payload), events)
                self._on_data(id, body, len(payload), events)
                return events
            if kind in _WITH_PAYLOAD:
                if value > size - at:
                    raise self._broken(f"a frame announces {value} bytes, its record holds {size - at}")
                content = record[at : at + value]
                at += value
            if kind in _CALLS and channel is Priority.CONTROL:  # most of what comes, where calls are small
                if (event := self.calls.receive(kind, id, content)) is not None:
                    events.append(event)
                continue
            if kind in (Frame.CREDIT, Frame.LINK_CREDIT):
                pass  # in either channel: it is no part of an order
            elif kind > Frame.RESET:
                if channel is not Priority.CONTROL:
                    raise self._broken(f"a frame of kind {kind} among bulk")
            elif id >> 1 & 1 != channel:
                raise self._broken(f"a frame of stream {id} in the wrong channel")
            match kind:
                case Frame.DATA:
                    self._on_data(id, content, size, events)
                case Frame.OPEN:
                    self._on_open(id, content, events)
                case Frame.EOF:
                    self._on_eof(id, events)
                case Frame.STOP:
                    self._on_stop(id, value, events)
                case Frame.RESET:
                    self._on_reset(id, value, events)
                case Frame.CREDIT:
                    self._on_credit(id, value)
                case Frame.LINK_CREDIT:
                    self._on_link_credit(id, value)
                case Frame.GOODBYE:
                    if value > defaults.MAX_GOODBYE:
                        raise self._broken(f"a goodbye of {value} bytes")
                    events.append(GoodbyeReceived(id, bytes(content).decode(errors="replace")))
                case _:
                    raise self._broken(f"an unknown kind of frame, {kind}")
        if body is not None:
            raise self._broken(f"a split record whose body of {len(body)} bytes no frame announces")
        return events

    def expect(self, stream: MuxStream) -> None:
        """The reader of ``stream`` waits for data in its sink: they are what comes next, unless others have begun."""
        if stream.priority and (self._last is None or self._last.sink is None):
            self._last = stream

    def lane(self) -> tuple[MuxStream, memoryview] | None:
        """The stream of the last or next bulk, if its reader waits, and where it wants what may still come."""
        stream = self._last
        if stream is None or not stream.sink or stream._chunks or stream.receiving is not Receiving.OPEN:
            return None
        most = min(stream._allowance, self._allowance[Priority.BULK])
        return stream, stream.sink[:most]

    def landed(self, stream: MuxStream, size: int, credits: bytes = b"") -> list[DataReceived]:
        """``size`` bytes came and stand at the beginning of what :meth:`lane` gave for ``stream``, and ``credits`` with
        them: frames that grant credit. Raises :class:`RemoteProtocolError`."""
        assert stream.sink is not None
        for kind, id, value in HEADER.iter_unpack(credits):
            if kind == Frame.CREDIT:
                self._on_credit(id, value)
            else:
                self._on_link_credit(id, value)
        self._allowance[stream.priority] -= size
        stream._allowance -= size
        stream.unread += size
        stream.sink = stream.sink[size:]
        self._consumed(stream, size)
        return [] if stream.sink else [DataReceived(stream)]

    def _on_open(self, id: int, payload: memoryview, events: list[Event]) -> None:
        if id & 1 == self._opener:
            raise self._broken(f"it opened stream {id}, whose number is ours to give")
        other = 1 - self._opener
        if id >> 2 <= self._number[id & 3]:
            raise self._broken(f"it opened stream {id} again")
        if not 0 < len(payload) <= defaults.MAX_PROTOCOL_NAME:
            raise self._broken(f"a protocol name of {len(payload)} bytes")
        try:
            protocol = bytes(payload).decode()
        except UnicodeDecodeError:
            raise self._broken("a protocol name that is not UTF-8") from None
        self._number[id & 3] = id >> 2
        if self._answers > defaults.MAX_PENDING_ANSWERS:
            raise self._broken("it keeps opening streams without reading our answers")
        if self._open_count[other] >= self.limits.max_incoming:
            self._answers += 1
            self._frames[id >> 1 & 1].append(HEADER.pack(Frame.RESET, id, ResetCode.TOO_MANY_STREAMS))
            return
        stream = MuxStream(id, protocol, False, self.limits.stream_window[id >> 1 & 1])
        self._streams[id] = stream
        self._open_count[other] += 1
        events.append(StreamOpened(stream))

    def _on_data(self, id: int, payload: memoryview | SealedBody, record_size: int, events: list[Event]) -> None:
        n = len(payload)
        if not n:
            raise self._broken("an empty DATA frame")
        priority = id >> 1 & 1
        if n > self._allowance[priority]:
            raise self._broken(f"{n} bytes on stream {id}, the link's credit is {self._allowance[priority]}")
        self._allowance[priority] -= n
        stream = self._find(id)
        if stream is None or stream.receiving is Receiving.CLOSED:
            self._give_back(priority, n)
            if isinstance(payload, SealedBody):
                payload.open()  # altered, it ends the link as any other
            return
        if stream.receiving is Receiving.ENDED:
            raise self._broken(f"data after the end of stream {id}")
        if n > stream._allowance:
            raise self._broken(f"{n} bytes on stream {id}, its credit is {stream._allowance}")
        stream._allowance -= n
        stream.unread += n
        if priority:
            self._last = stream
        chunks = stream._chunks
        if (sink := stream.sink) is not None and n <= len(sink) and not chunks:
            if isinstance(payload, SealedBody):
                payload.open_into(sink[:n])
            else:
                sink[:n] = payload
            stream.sink = sink[n:]
            self._consumed(stream, n)
            if n == len(sink):
                events.append(DataReceived(stream))
            return
        if isinstance(payload, SealedBody):
            payload = payload.open()
        if n * 2 >= record_size and n >= defaults.SMALL_CHUNK:
            chunks.append(payload)
        elif chunks and type(chunks[-1]) is bytearray and len(chunks[-1]) < defaults.SMALL_CHUNK:
            # A view would pin the whole record in memory, and a chunk per byte cost more than its credit.
            chunks[-1] += payload
        else:
            chunks.append(bytearray(payload))
        events.append(DataReceived(stream))

    def _on_eof(self, id: int, events: list[Event]) -> None:
        stream = self._find(id)
        if stream is None or stream.receiving is Receiving.CLOSED:
            return
        if stream.receiving is Receiving.ENDED:
            raise self._broken(f"a second end of stream {id}")
        stream.receiving = Receiving.ENDED
        events.append(DataReceived(stream))
        self._settle(stream)

    def _on_stop(self, id: int, code: int, events: list[Event]) -> None:
        stream = self._find(id)
        if stream is None or stream.sending is Sending.CLOSED:
            return
        stream.stop_code = code
        self.drop_queue(stream)
        self._finish_sending(stream)
        events.append(StreamStopped(stream))

    def _on_reset(self, id: int, code: int, events: list[Event]) -> None:
        stream = self._find(id)
        if stream is not None:
            stream.reset_code = code
            self._abandon(stream)
            events.append(StreamWasReset(stream))

    def _on_credit(self, id: int, amount: int) -> None:
        stream = self._find(id)
        if stream is None:
            return
        stream._credit += amount
        if amount == 0 or stream._credit > self.limits.stream_window[stream.priority]:
            raise self._broken(f"it granted {amount} bytes on stream {id}, more than it was sent")
        if stream.queued:
            self._make_ready(stream)

    def _on_link_credit(self, priority: int, amount: int) -> None:
        if priority > 1:
            raise self._broken(f"credit for priority {priority}")
        self._credit[priority] += amount
        if amount == 0 or self._credit[priority] > self.limits.link_window[priority]:
            raise self._broken(f"it granted {amount} bytes to the link, more than it was sent")

    # Bookkeeping

    def _find(self, id: int) -> MuxStream | None:
        """The stream, or None when it has been forgotten; an id that nobody ever opened breaks the protocol."""
        stream = self._streams.get(id)
        if stream is None and not 0 < id >> 2 <= self._number[id & 3]:
            raise self._broken(f"a frame for stream {id}, which was never opened")
        return stream

    def _make_ready(self, stream: MuxStream) -> None:
        if not stream._ready and stream._credit > 0 and not self.goodbye_sent:
            stream._ready = True
            self._ready[stream.priority].append(stream)

    def _consumed(self, stream: MuxStream, n: int) -> None:
        stream.unread -= n
        self._give_back(stream.priority, n)
        if stream.receiving is Receiving.OPEN:
            stream._unacknowledged += n
            # A quarter: few credit frames, and the sender never waits for one while the reader keeps up.
            if stream._unacknowledged >= self.limits.stream_window[stream.priority] // 4:
                self._credit_channel(stream.priority).append(
                    HEADER.pack(Frame.CREDIT, stream.id, stream._unacknowledged)
                )
                stream._allowance += stream._unacknowledged
                stream._unacknowledged = 0
        self._settle(stream)

    def _give_back(self, priority: int, n: int) -> None:
        self._unacknowledged[priority] += n
        if self._unacknowledged[priority] >= self.limits.link_window[priority] // 4:
            amount = self._unacknowledged[priority]
            self._credit_channel(priority).append(HEADER.pack(Frame.LINK_CREDIT, priority, amount))
            self._allowance[priority] += amount
            self._unacknowledged[priority] = 0

    def _credit_channel(self, priority: int) -> list[bytes]:
        """Where a grant goes: along with data that is due in its channel, which saves a record of its own."""
        along = self._ready[priority] and self._credit[priority] > 0
        return self._frames[priority if along else Priority.CONTROL]

    def drop_queue(self, stream: MuxStream) -> None:
        """Forget what is queued, without a word to the peer (the link has ended, or its half of the stream)."""
        stream._queue.clear()
        stream.queued = 0
        if stream._ready:
            stream._ready = False
            self._ready[stream.priority].remove(stream)

    def _drop_unread(self, stream: MuxStream) -> None:
        stream._chunks.clear()
        n, stream.unread = stream.unread, 0
        if n:
            self._give_back(stream.priority, n)

    def _finish_sending(self, stream: MuxStream) -> None:
        stream.sending = Sending.CLOSED
        self._settle(stream)

    def _abandon(self, stream: MuxStream) -> None:
        self.drop_queue(stream)
        stream.sending = Sending.CLOSED
        stream.receiving = Receiving.CLOSED
        self._drop_unread(stream)
        self._settle(stream)

    def _settle(self, stream: MuxStream) -> None:
        """Forget the stream when both halves are done and everything has been read."""
        if stream.receiving is Receiving.ENDED and not stream.unread:
            stream.receiving = Receiving.CLOSED
        if (
            stream.sending is Sending.CLOSED
            and stream.receiving is Receiving.CLOSED
            and self._streams.pop(stream.id, None) is not None
        ):
            self._open_count[stream.id & 1] -= 1
            if stream is self._last:
                self._last = None

    def _say(self, stream: MuxStream, kind: Frame, value: int) -> None:
        if not stream.outgoing:
            self._answers += 1
        self._frames[stream.priority].append(HEADER.pack(kind, stream.id, value))

    def _broken(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(what, peer=self.peer)
