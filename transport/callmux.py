"""Small calls on a link without a stream each: one frame asks, one answers. Sans-IO, a part of the mux.

Frames, all in the CONTROL channel, ``number`` modulo 2^32 and one higher with each call of a side::

    CALL(number, request)   ANSWER(number, bytes)   PART(number, bytes)   CANCEL(number)

An answer of more than :data:`defaults.CALL_PIECE` bytes comes in PARTs before its ANSWER. A side that cancels forgets
the call at once; an answer that crosses its CANCEL is dropped. Each side has at most :data:`defaults.MAX_LINK_CALLS`
calls without an answer, so requests need no credit; answers need none as somebody waits for each of them, and whoever
answers holds back while more than :data:`defaults.ANSWER_WINDOW` bytes of answers are queued (:attr:`CallMux.full`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from . import defaults
from .errors import Overloaded, ProtocolMisuse, RemoteProtocolError
from .frames import HEADER, HEADER_BYTES, Buffer, Frame

#: The answer where nobody serves calls: of no kind that there is.
NOT_SERVED = b"\0"

_ANSWERS = (Frame.ANSWER, Frame.PART)
_MASK = 0xFFFFFFFF
_HALF = 1 << 31


class OutgoingCall:
    """A call of ours. ``owner`` belongs to the I/O adapter; ``answer`` is None until it has come."""

    __slots__ = ("_parts", "_size", "answer", "number", "owner")

    def __init__(self, number: int, owner: Any) -> None:
        self.number, self.owner = number, owner
        self.answer: bytes | None = None
        self._parts: list[bytes] = []
        self._size = 0


class IncomingCall:
    """A call of the peer. ``open`` until it is answered, cancelled, or the link has ended."""

    __slots__ = ("number", "on_broken", "open")

    def __init__(self, number: int) -> None:
        self.number = number
        self.open = True
        #: Called, without waiting, when the peer gives up or the link ends.
        self.on_broken: Callable[[], None] | None = None


@attrs.frozen
class CallReceived:
    """``request`` is a view of the record it came in."""

    call: IncomingCall
    request: memoryview


@attrs.frozen
class CallAnswered:
    call: OutgoingCall


@attrs.frozen
class CallCancelled:
    call: IncomingCall


CallEvent = CallReceived | CallAnswered | CallCancelled


class CallMux:
    """The calls of one link, in both directions. ``broken`` makes the error for a peer that breaks the protocol."""

    def __init__(self, broken: Callable[[str], RemoteProtocolError]) -> None:
        self._broken = broken
        self._outgoing: dict[int, OutgoingCall] = {}
        self._incoming: dict[int, IncomingCall] = {}
        self._frames: list[bytes] = []  # an empty deque would take 760 bytes
        self._number = 0  # of our last call
        self._seen = 0  # of the peer's
        self._queued = 0  # bytes of answers
        self._asking = 0  # and of everything else, that wait to be sent

    @property
    def open(self) -> int:
        """Calls without an answer, of both sides."""
        return len(self._outgoing) + len(self._incoming)

    @property
    def can_call(self) -> bool:
        return len(self._outgoing) < defaults.MAX_LINK_CALLS and self._asking < defaults.REQUEST_WINDOW

    @property
    def full(self) -> bool:
        """True while so much waits to be sent that nobody should answer."""
        return self._queued >= defaults.ANSWER_WINDOW

    @property
    def has_output(self) -> bool:
        return bool(self._frames)

    def call(self, request: bytes, owner: Any = None) -> OutgoingCall:
        """Ask. Raises :class:`Overloaded` when ``can_call`` is False."""
        if len(request) > defaults.CALL_PIECE:
            raise ProtocolMisuse(f"a request of {len(request)} bytes in one frame")
        if not self.can_call:
            raise Overloaded("as many calls as are allowed wait for their answers already, or to be sent")
        self._number = number = self._number + 1 & _MASK
        call = self._outgoing[number] = OutgoingCall(number, owner)
        self._frames.append(HEADER.pack(Frame.CALL, number, len(request)) + request)
        self._asking += HEADER_BYTES + len(request)
        return call

    def cancel(self, call: OutgoingCall) -> None:
        """Forget ``call``, and tell the peer; nothing when it has been answered."""
        if self._outgoing.pop(call.number, None) is not None:
            self._frames.append(HEADER.pack(Frame.CANCEL, call.number, 0))
            self._asking += HEADER_BYTES

    def answer(self, call: IncomingCall, data: bytes) -> None:
        """Answer; nothing when the peer no longer wants it."""
        if not call.open:
            return
        call.open = False
        del self._incoming[call.number]
        last = max(0, len(data) - 1) // defaults.CALL_PIECE * defaults.CALL_PIECE
        for at in range(0, last, defaults.CALL_PIECE):
            self._queue(Frame.PART, call.number, data[at : at + defaults.CALL_PIECE])
        self._queue(Frame.ANSWER, call.number, data[last:])

    def _queue(self, kind: Frame, number: int, data: bytes) -> None:
        self._frames.append(HEADER.pack(kind, number, len(data)) + data)
        self._queued += HEADER_BYTES + len(data)

    def drop(self) -> tuple[list[OutgoingCall], list[IncomingCall]]:
        """The link says goodbye, or has ended: forget everything; returns what was open."""
        lost = list(self._outgoing.values()), list(self._incoming.values())
        for call in lost[1]:
            call.open = False
        self._outgoing.clear()
        self._incoming.clear()
        self._frames.clear()
        self._queued = self._asking = 0
        return lost

    def take(self, out: list[Buffer], room: int) -> int:
        """Move frames that fit into ``room`` bytes to ``out``; returns the bytes moved."""
        count = taken = 0
        for frame in self._frames:
            if taken + len(frame) > room:
                break
            count += 1
            taken += len(frame)
            out.append(frame)
            if frame[0] in _ANSWERS:
                self._queued -= len(frame)
            else:
                self._asking -= len(frame)
        del self._frames[:count]
        return taken

    def receive(self, kind: int, number: int, payload: memoryview) -> CallEvent | None:
        """One frame. Raises :class:`RemoteProtocolError`."""
        if len(payload) > defaults.CALL_PIECE:
            raise self._broken(f"{len(payload)} bytes of a call in one frame")
        if kind == Frame.CALL:
            return self._on_call(number, payload)
        if kind == Frame.CANCEL:
            return self._on_cancel(number)
        return self._on_answer(number, payload, last=kind == Frame.ANSWER)

    def _on_call(self, number: int, payload: memoryview) -> CallEvent:
        if number != self._seen + 1 & _MASK:
            raise self._broken(f"call {number} after call {self._seen}")
        if len(self._incoming) >= defaults.MAX_LINK_CALLS:
            raise self._broken(f"more than {defaults.MAX_LINK_CALLS} calls at once")
        if self._queued > 4 * defaults.ANSWER_WINDOW:
            raise self._broken("it keeps calling without reading our answers")
        self._seen = number
        call = self._incoming[number] = IncomingCall(number)
        return CallReceived(call, payload)

    def _on_cancel(self, number: int) -> CallEvent | None:
        call = self._incoming.pop(number, None)
        if call is None:
            if (self._seen - number) & _MASK >= _HALF:
                raise self._broken(f"it cancels call {number}, which it never made")
            return None  # answered meanwhile
        call.open = False
        return CallCancelled(call)

    def _on_answer(self, number: int, payload: memoryview, *, last: bool) -> CallEvent | None:
        call = self._outgoing.get(number)
        if call is None:
            if (self._number - number) & _MASK >= _HALF:
                raise self._broken(f"an answer to call {number}, which was never made")
            return None  # cancelled meanwhile
        call._size += len(payload)
        if not payload or call._size > defaults.MAX_ANSWER:
            raise self._broken(f"an answer of {call._size} bytes with {len(payload)} in a frame")
        if not last:
            call._parts.append(bytes(payload))
            return None
        call.answer = b"".join((*call._parts, payload)) if call._parts else bytes(payload)
        del self._outgoing[number]
        return CallAnswered(call)
