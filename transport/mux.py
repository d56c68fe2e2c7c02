"""Many streams over one ordered pipe of records: credits, priorities, half-close, resets, pings. Sans-IO.

Theory of operation
-------------------
The mux is fed with the plaintext of records (:meth:`Mux.receive`) and asked for the next plaintext to send
(:meth:`Mux.next_record`). A record holds whole frames; a frame is nine bytes of header (kind u8, stream u32,
value u32, big-endian), followed for ``OPEN``, ``DATA`` and ``GOODBYE`` by ``value`` bytes::

    OPEN(stream, protocol name)  DATA(stream, bytes)  EOF(stream)      STOP(stream, code)   RESET(stream, code)
    CREDIT(stream, bytes)        LINK_CREDIT(priority, bytes)          GOODBYE(code, reason)

and the frames of small calls, which need no stream (:mod:`callmux`).

Records belong to one of two channels, CONTROL and BULK, each in order in itself but not to the other (they may travel
on different pipes). The first line above travels in the channel of the stream's priority, the second in CONTROL.

A stream id is ``number << 2 | priority << 1 | opener``: the opener bit is 1 for the initiator of the link (odd ids) and
0 for the responder; numbers of one priority and opener only rise. So what may be said about a forgotten stream is known
without remembering it.

A stream has two halves that close on their own::

    sending     OPEN --end()--> ENDING --queue empty, EOF sent--> CLOSED     (STOP received, RESET: CLOSED at once)
    receiving   OPEN --EOF received--> ENDED --all read--> CLOSED            (stop(), RESET: CLOSED at once)

When both are closed the mux forgets the stream. Frames that cross our RESET or STOP on the way are dropped, their
bytes given back to the link's credit.

Credit: DATA may be sent while the stream and the link (for each priority its own, so that unread bulk data never
starve control) have credit left; a receiver grants more as its application reads. Output order: link frames first,
then calls (in half of a record when streams wait too), then data, round robin among the streams of a priority.
"""

from __future__ import annotations

from typing import Any

from . import defaults
from .callmux import CallEvent, CallMux
from .errors import Overloaded, ProtocolMisuse, RemoteProtocolError
from .frames import (
    HEADER,
    HEADER_BYTES,
    Buffer,
    DataReceived,
    Event,
    Frame,
    GoodbyeCode,
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

__all__ = ["Mux", "Priority"]

_WITH_PAYLOAD = (Frame.DATA, Frame.CALL, Frame.ANSWER, Frame.OPEN, Frame.PART, Frame.GOODBYE)


class Mux:
    """One end of a multiplexed link.

    ``initiator``: True on the side that dialled. ``peer`` names the other side in errors. All methods may raise
    :class:`ProtocolMisuse` for calls in a state that does not allow them; only :meth:`receive` raises
    :class:`RemoteProtocolError`, after which the link must end.
    """

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
        self.calls = CallMux(self._broken)

    # What the application does

    @property
    def streams(self) -> int:
        """Streams that are remembered (neither half-closed nor unread ones are forgotten)."""
        return len(self._streams)

    @property
    def can_open(self) -> bool:
        return self._open_count[self._opener] < self.limits.max_outgoing

    def live_streams(self) -> list[MuxStream]:
        return list(self._streams.values())

    def open(self, protocol: str, priority: Priority = Priority.CONTROL) -> MuxStream:
        """Open a stream. Raises :class:`Overloaded` when ``can_open`` is False."""
        name = protocol.encode()
        if not 0 < len(name) <= defaults.MAX_PROTOCOL_NAME:
            raise ProtocolMisuse(f"protocol name of {len(name)} bytes")
        if not self.can_open:
            raise Overloaded(f"{self.limits.max_outgoing} streams to {self.peer or 'one peer'} are open already")
        place = priority << 1 | self._opener
        number = self._number[place] + 1
        if number >= 1 << 30:
            raise Overloaded("this link has used up its stream numbers")
        self._number[place] = number
        id = number << 2 | place
        stream = MuxStream(id, protocol, True, self.limits.stream_window[priority])
        self._streams[id] = stream
        self._open_count[self._opener] += 1
        self._frames[priority].append(HEADER.pack(Frame.OPEN, id, len(name)) + name)
        return stream

    def send(self, stream: MuxStream, data: Buffer) -> None:
        """Queue ``data`` without a copy: it must not change before it is drained (:meth:`take_drained`)."""
        if stream.sending is not Sending.OPEN:
            raise ProtocolMisuse(f"send on {stream}")
        view = memoryview(data)
        if view.itemsize != 1 or not view.contiguous:
            view = view.cast("B")
        if not len(view):
            return
        stream._queue.append(view)
        stream.queued += len(view)
        self._make_ready(stream)

    def end(self, stream: MuxStream) -> None:
        """Close the sending half after what is queued."""
        if stream.sending is not Sending.OPEN:
            return
        stream.sending = Sending.ENDING
        if not stream.queued:
            self._finish_sending(stream)
            self._say(stream, Frame.EOF, 0)

    def stop(self, stream: MuxStream, code: int = ResetCode.NOT_READING) -> None:
        """Read no more: drop what is unread, and tell the peer unless it has ended already."""
        if stream.receiving is Receiving.CLOSED:
            return
        if stream.receiving is Receiving.OPEN:
            self._say(stream, Frame.STOP, code)
        stream.receiving = Receiving.CLOSED
        self._drop_unread(stream)
        self._settle(stream)

    def reset(self, stream: MuxStream, code: int = ResetCode.CANCELLED) -> None:
        """End both halves at once, dropping what is queued and unread."""
        if stream.id in self._streams:
            self._say(stream, Frame.RESET, code)
            self._abandon(stream)

    def drop_queue(self, stream: MuxStream) -> None:
        """Forget what is queued, without a word to the peer (the link has ended, or its half of the stream)."""
        stream._queue.clear()
        stream.queued = 0
        if stream._ready:
            stream._ready = False
            self._ready[stream.priority].remove(stream)

    def read(self, stream: MuxStream, limit: int) -> Buffer | None:
        """Up to ``limit`` received bytes; None: nothing has come yet; empty: the peer has ended its half."""
        if not stream._chunks:
            return None if stream.receiving is Receiving.OPEN else b""
        chunk = stream._chunks.popleft()
        if len(chunk) > limit:
            view = memoryview(chunk)
            chunk = view[:limit]
            stream._chunks.appendleft(view[limit:])
        self._consumed(stream, len(chunk))
        return chunk

    def read_into(self, stream: MuxStream, buffer: memoryview) -> int:
        """Copy received bytes into ``buffer``; returns how many (0: nothing has come, or the end)."""
        done = 0
        while done < len(buffer) and stream._chunks:
            chunk = stream._chunks.popleft()
            room = len(buffer) - done
            if len(chunk) > room:
                view = memoryview(chunk)
                chunk = view[:room]
                stream._chunks.appendleft(view[room:])
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done:
            self._consumed(stream, done)
        return done

    def goodbye(self, code: int = GoodbyeCode.LEAVING, reason: str = "") -> None:
        """Say that nothing follows. Everything queued and not yet in a record is dropped."""
        if self.goodbye_sent:
            return
        self.goodbye_sent = True
        text = reason.encode()[: defaults.MAX_GOODBYE]
        self._frames[0].append(HEADER.pack(Frame.GOODBYE, code, len(text)) + text)
        for ready in self._ready:
            for stream in ready:
                stream._ready = False
            ready.clear()

    # Output

    @property
    def has_output(self) -> bool:
        return self.has(Priority.CONTROL) or self.has(Priority.BULK)

    def has(self, channel: Priority) -> bool:
        """True when :meth:`next_record` has something for ``channel``."""
        if self._frames[channel] or (self._ready[channel] and self._credit[channel] > 0):
            return True
        return channel is Priority.CONTROL and self.calls.has_output

    def next_record(self, channel: Priority, limit: int) -> list[Buffer] | None:
        """The buffers that make up the next record of ``channel`` (at most ``limit`` bytes); None: nothing may be sent.

        The buffers are views of what was given to :meth:`send`: seal them first, then call :meth:`take_drained` and
        tell those who wait.
        """
        out: list[Buffer] = []
        room = limit
        frames = self._frames[channel]
        for frame in frames:
            if len(frame) > room:
                break
            out.append(frame)
            room -= len(frame)
        del frames[: len(out)]
        if not frames:
            if not self._frames[1 - channel]:
                self._answers = 0
            if channel is Priority.CONTROL and self.calls.has_output:
                room -= self.calls.take(out, room // 2 if self._ready[channel] else room)
            if self._ready[channel]:
                self._fill(out, room, channel)
        return out or None

    def take_drained(self) -> list[MuxStream]:
        """The streams whose queue has become empty since the last call, in order."""
        drained, self._drained = self._drained, []
        return drained

    def _fill(self, out: list[Buffer], room: int, priority: Priority) -> None:
        ready = self._ready[priority]
        while ready and self._credit[priority] > 0 and room > HEADER_BYTES:
            stream = ready.pop(0)
            n = min(stream.queued, stream._credit, self._credit[priority], room - HEADER_BYTES)
            out.append(HEADER.pack(Frame.DATA, stream.id, n))
            room -= HEADER_BYTES + n
            stream.queued -= n
            stream._credit -= n
            self._credit[priority] -= n
            queue = stream._queue
            while n:
                view = queue[0]
                if len(view) <= n:
                    out.append(queue.popleft())
                else:
                    out.append(view[:n])
                    queue[0] = view[n:]
                n -= min(n, len(view))
            stream._ready = False
            if stream.queued:
                self._make_ready(stream)
                continue
            self._drained.append(stream)
            if stream.sending is Sending.ENDING:
                self._finish_sending(stream)
                eof = HEADER.pack(Frame.EOF, stream.id, 0)
                if room >= HEADER_BYTES:
                    out.append(eof)
                    room -= HEADER_BYTES
                else:
                    self._frames[priority].append(eof)

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
            if kind > Frame.RESET:
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
                case Frame.CALL | Frame.ANSWER | Frame.PART | Frame.CANCEL:
                    if (event := self.calls.receive(kind, id, content)) is not None:
                        events.append(event)
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
                self._frames[0].append(HEADER.pack(Frame.CREDIT, stream.id, stream._unacknowledged))
                stream._allowance += stream._unacknowledged
                stream._unacknowledged = 0
        self._settle(stream)

    def _give_back(self, priority: int, n: int) -> None:
        self._unacknowledged[priority] += n
        if self._unacknowledged[priority] >= self.limits.link_window[priority] // 4:
            amount = self._unacknowledged[priority]
            self._frames[0].append(HEADER.pack(Frame.LINK_CREDIT, priority, amount))
            self._allowance[priority] += amount
            self._unacknowledged[priority] = 0

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

    def _say(self, stream: MuxStream, kind: Frame, value: int) -> None:
        if not stream.outgoing:
            self._answers += 1
        self._frames[stream.priority].append(HEADER.pack(kind, stream.id, value))

    def _broken(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(what, peer=self.peer)
