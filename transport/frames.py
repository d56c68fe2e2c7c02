"""What travels on a multiplexed link, and what becomes of it: frames, codes, limits, streams, events."""

from __future__ import annotations

import struct
from collections import deque
from enum import Enum, IntEnum
from typing import Any, TypeAlias

import attrs

from . import defaults

Buffer: TypeAlias = bytes | bytearray | memoryview

#: kind u8, stream u32, value u32
HEADER = struct.Struct(">BII")
HEADER_BYTES = HEADER.size


class Priority(IntEnum):
    """CONTROL goes before BULK, always."""

    CONTROL = 0
    BULK = 1


class Frame(IntEnum):
    OPEN = 1
    DATA = 2
    EOF = 3
    STOP = 4
    RESET = 5
    CREDIT = 6
    LINK_CREDIT = 7
    GOODBYE = 8
    CALL = 9
    ANSWER = 10
    PART = 11
    CANCEL = 12


class ResetCode(IntEnum):
    """Why a stream was reset or stopped. Codes above 255 are the application's."""

    CANCELLED = 0  #: whoever worked on it gave up
    TOO_MANY_STREAMS = 1  #: refused: the receiver of OPEN holds as many as it allows
    UNKNOWN_PROTOCOL = 2  #: refused: nobody serves this protocol
    NOT_READING = 3  #: the reader closed its end
    PROTOCOL_ERROR = 4  #: what was said on this stream made no sense
    EXPIRED = 5  #: a deadline of the receiver passed


class GoodbyeCode(IntEnum):
    LEAVING = 0  #: the node stops
    IDLE = 1  #: the link was unused and its slot is needed; nothing opened after this was looked at
    PROTOCOL_ERROR = 2  #: the other side broke the protocol; the reason says how
    BUSY = 3  #: no slot for another link


class Sending(Enum):
    OPEN = "open"
    ENDING = "ending"
    CLOSED = "closed"


class Receiving(Enum):
    OPEN = "open"
    ENDED = "ended"
    CLOSED = "closed"


@attrs.frozen
class MuxLimits:
    """Both ends of a link must run with the same windows: they are part of the wire version."""

    #: Bytes in flight and unread per stream, by priority (CONTROL, BULK).
    stream_window: tuple[int, int] = (defaults.CONTROL_WINDOW, defaults.BULK_WINDOW)
    #: The same, over all streams of a priority on one link.
    link_window: tuple[int, int] = (defaults.LINK_CONTROL_WINDOW, defaults.LINK_BULK_WINDOW)
    #: Streams we open at once.
    max_outgoing: int = defaults.MAX_OUTGOING_STREAMS
    #: Streams a peer may have open here at once; more are refused with a code.
    max_incoming: int = defaults.MAX_INCOMING_STREAMS


class MuxStream:
    """The state of one stream. Read its attributes freely; change it only through :class:`Mux`."""

    __slots__ = (
        "_allowance",
        "_chunks",
        "_credit",
        "_queue",
        "_ready",
        "_unacknowledged",
        "id",
        "outgoing",
        "owner",
        "priority",
        "protocol",
        "queued",
        "receiving",
        "reset_code",
        "sending",
        "sink",
        "stop_code",
        "unread",
    )

    def __init__(self, id: int, protocol: str, outgoing: bool, window: int) -> None:
        self.id = id
        self.protocol = protocol
        self.priority = Priority(id >> 1 & 1)
        #: True when we opened it.
        self.outgoing = outgoing
        #: Whatever the I/O adapter hangs on the stream; the mux never looks at it.
        self.owner: Any = None
        self.sending = Sending.OPEN
        self.receiving = Receiving.OPEN
        #: Bytes accepted by :meth:`Mux.send` and not yet in a record.
        self.queued = 0
        #: Bytes received and not yet read.
        self.unread = 0
        #: Where the reader, who waits, wants the next bytes; what is written to it is cut off its front.
        self.sink: memoryview | None = None
        #: The peer's code when it reset the stream, or stopped reading.
        self.reset_code: int | None = None
        self.stop_code: int | None = None
        self._queue: deque[memoryview] = deque()
        self._chunks: deque[Buffer] = deque()
        self._credit = window  # what we may still send
        self._allowance = window  # what the peer may still send
        self._unacknowledged = 0  # read by the application, not yet granted anew
        self._ready = False

    def __repr__(self) -> str:
        return f"<MuxStream {self.id} {self.protocol!r} {self.sending.value}/{self.receiving.value}>"


@attrs.frozen
class StreamOpened:
    stream: MuxStream


@attrs.frozen
class DataReceived:
    """There is something (or, at the end of the stream, nothing more) to read."""

    stream: MuxStream


@attrs.frozen
class StreamStopped:
    """The peer no longer reads; what was queued is dropped and the sending half is closed."""

    stream: MuxStream


@attrs.frozen
class StreamWasReset:
    stream: MuxStream


@attrs.frozen
class GoodbyeReceived:
    code: int
    reason: str


Event: TypeAlias = StreamOpened | DataReceived | StreamStopped | StreamWasReset | GoodbyeReceived
