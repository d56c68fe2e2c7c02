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
on different pipes). The first line above travels in the channel of the stream's priority, the second in CONTROL, but
for credit, which may travel in either: it goes along with data where there is some.

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

from . import defaults
from .errors import Overloaded, ProtocolMisuse
from .frames import (
    HEADER,
    HEADER_BYTES,
    Buffer,
    Frame,
    GoodbyeCode,
    MuxStream,
    Priority,
    Receiving,
    ResetCode,
    Sending,
)
from .muxinput import MuxInput
from .pump import Stretch

__all__ = ["Mux", "Priority"]

#: Grants of credit may go along with a piece of bulk, as many as the head of a split record surely has room for.
_CREDITS, _MOST_CREDITS = frozenset(map(int, (Frame.CREDIT, Frame.LINK_CREDIT))), 32


class Mux(MuxInput):
    """One end of a multiplexed link.

    ``initiator``: True on the side that dialled. ``peer`` names the other side in errors. All methods may raise
    :class:`ProtocolMisuse` for calls in a state that does not allow them; only :meth:`receive` raises
    :class:`RemoteProtocolError`, after which the link must end.
    """

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
        # Asked after everything that happens: as :meth:`has` of both channels, in one go.
        frames, ready, credit = self._frames, self._ready, self._credit
        return bool(
            frames[0] or frames[1] or self.calls._frames or (ready[0] and credit[0] > 0) or (ready[1] and credit[1] > 0)
        )

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
            self._frames_sent(channel)
            if channel is Priority.CONTROL and self.calls.has_output:
                room -= self.calls.take(out, room // 2 if self._ready[channel] else room)
            if self._ready[channel]:
                self._fill(out, room, channel)
        return out or None

    def _frames_sent(self, channel: Priority) -> None:
        if not self._frames[1 - channel]:
            self._answers = 0

    def next_stretch(self, limit: int, most: int, records: int) -> Stretch | None:
        """Data of BULK for a run of at most ``records`` that take ``limit`` bytes each and ``most`` together (or one
        more), each filled but for one that ends its stream's data, with the grants of credit that are due; None where
        :meth:`next_record` has to look."""
        ready, frames = self._ready[Priority.BULK], self._frames[Priority.BULK]
        if len(ready) != 1 or len(frames) > _MOST_CREDITS:
            return None
        piece, first = limit - HEADER_BYTES, limit - HEADER_BYTES * (len(frames) + 1)
        records = min(records, -(-most // limit))
        if first < defaults.DIRECT_BODY or records < 1 or not all(frame[0] in _CREDITS for frame in frames):
            return None
        stream = ready[0]
        view = stream._queue[0]
        size = min(len(view), stream._credit, self._credit[Priority.BULK], first + piece * (records - 1))
        rest = size if size < first else (size - first) % piece
        if rest and (size < stream.queued or rest < defaults.DIRECT_BODY):
            size -= rest
        if not size:
            return None
        stream.queued -= size
        stream._credit -= size
        self._credit[Priority.BULK] -= size
        credits = b"".join(frames)
        if frames:
            frames.clear()
            self._frames_sent(Priority.BULK)
        stretch = Stretch(stream.id, credits, view[:size], piece, 1 + -(-max(0, size - first) // piece))
        if size < len(view):
            stream._queue[0] = view[size:]
        else:
            stream._queue.popleft()
        if not stream.queued or stream._credit <= 0:
            ready.clear()
            stream._ready = False
        if not stream.queued:
            self._is_drained(stream)
            if stream.sending is Sending.CLOSED:
                frames.append(HEADER.pack(Frame.EOF, stream.id, 0))
        return stretch

    def take_drained(self) -> list[MuxStream]:
        """The streams whose queue has become empty since the last call, in order."""
        drained, self._drained = self._drained, []
        return drained

    def _fill(self, out: list[Buffer], room: int, priority: Priority) -> None:
        ready = self._ready[priority]
        while ready and self._credit[priority] > 0 and room > HEADER_BYTES:
            stream = ready.pop(0)
            n = min(stream.queued, stream._credit, self._credit[priority], room - HEADER_BYTES)
            alone = self._leading(stream, n) if priority is Priority.BULK else 0
            n = alone or n
            out.append(HEADER.pack(Frame.DATA, stream.id, n))
            room -= HEADER_BYTES + n
            stream.queued -= n
            stream._credit -= n
            self._credit[priority] -= n
            queue, last = stream._queue, n
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
                if alone:
                    break
                continue
            self._is_drained(stream)
            if stream.sending is Sending.CLOSED:
                eof = HEADER.pack(Frame.EOF, stream.id, 0)
                # Behind a large piece of bulk it would cost a copy of it: only what ends a record is sealed where it
                # lies.
                if room >= HEADER_BYTES and not (priority is Priority.BULK and last >= defaults.DIRECT_BODY):
                    out.append(eof)
                    room -= HEADER_BYTES
                else:
                    self._frames[priority].append(eof)

    def _is_drained(self, stream: MuxStream) -> None:
        self._drained.append(stream)
        if stream.sending is Sending.ENDING:
            self._finish_sending(stream)

    @staticmethod
    def _leading(stream: MuxStream, n: int) -> int:
        """Bytes of small data before a piece of bulk that is more than the rest of ``n``: they go ahead, in a record of
        their own, as they may say what the bulk is, and only what comes after its reader waits is received in place."""
        size = 0
        for view in stream._queue:
            if len(view) >= defaults.DIRECT_BODY:
                return size if len(view) > n - size else 0
            size += len(view)
            if size >= n:
                break
        return 0
