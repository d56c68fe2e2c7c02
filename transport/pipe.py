"""One byte pipe of a link: its stream, its keys, what was measured on it, and what it says about itself alone."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Protocol

import trio

from . import deadlines, defaults
from .errors import RemoteError, RemoteProtocolError
from .frames import Buffer
from .pipehello import WAYS
from .waiter import Waiter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .network import ByteStream
    from .pipehello import PipeChannel
    from .records import Record, RecordOpener, RecordSealer
    from .secure import Established

_FRAME = struct.Struct(">BI")
_PING, _PONG, _RETIRE = 1, 2, 3
#: How good a way is, for choosing among pipes: the first three are plain TCP between the two hosts.
RANK = {"direct": 0, "reversal": 0, "punch": 0, "webrtc": 1, "relay": 2}
assert tuple(RANK) == WAYS


class Channel(Protocol):
    """What a pipe needs of :class:`SecureChannel` and :class:`PipeChannel`."""

    @property
    def sealer(self) -> RecordSealer: ...
    def receive(self, data: Buffer) -> Sequence[Established | Record]: ...
    @property
    def opener(self) -> RecordOpener | None: ...
    def eof(self) -> None: ...


class Pipe:
    """A pipe of a link, run by it. ``index`` names it in its session; 0 is the one of the handshake.

    ``records``: those that came in behind the handshake. ``rtt``: seconds, of the handshake.
    """

    __slots__ = (  # a dictionary of so many takes 1.6 kB of an idle link
        "_answered",
        "_asked_system",
        "_measured",
        "_pace",
        "_pings_due",
        "_pong",
        "_seen",
        "_token",
        "_unsent",
        "_whole",
        "asked",
        "bandwidth",
        "bulk_only",
        "bytes_received",
        "bytes_sent",
        "channel",
        "confirmed",
        "heard",
        "index",
        "local",
        "nearest",
        "opened_at",
        "peer_retired",
        "reason",
        "record_limit",
        "records",
        "refused",
        "remote",
        "retired",
        "retiring",
        "rtt",
        "scope",
        "sent_bulk",
        "stream",
        "suspect",
        "unheard",
        "unheard_since",
        "unsent",
        "way",
        "work",
        "writing",
    )

    def __init__(
        self,
        stream: ByteStream,
        channel: Channel | PipeChannel,
        *,
        index: int = 0,
        way: str = "direct",
        bulk_only: bool = False,
        rtt: float = 0.0,
        now: float,
        records: list[Record] | None = None,
    ) -> None:
        self.stream, self.channel = stream, channel
        self.index, self.way, self.bulk_only = index, way, bulk_only
        self.remote, self.local = stream.remote, stream.local
        self.records = records or []
        self.opened_at = now
        #: Smoothed round trip in seconds: of pings, before the first of them the handshake's duration.
        self.rtt = rtt
        #: The shortest of its pings, before the first of them as `rtt`, or what the operating system saw where it is
        #: less: that of packets, however busy the two nodes are.
        self.nearest = rtt
        #: Bytes per second, smoothed, at which the network took larger records; None: not measured yet.
        self.bandwidth: float | None = None
        self.bytes_sent = self.bytes_received = 0
        #: Bytes of a record at most.
        self.record_limit = defaults.FIRST_RECORD
        #: A record has come: both sides hold the keys. The pipe of the handshake needs no proof.
        self.confirmed = index == 0
        #: It answers late: another pipe is preferred.
        self.suspect = False
        #: We send nothing more on it, and have said so; the peer has.
        self.retiring = self.retired = self.peer_retired = False
        #: Why it ended.
        self.reason: RemoteError | None = None
        self.scope: trio.CancelScope | None = None
        #: Wakes its writer.
        self.work = Waiter()
        self.writing = False
        #: The rest of a record that went out in part, past the writer: it goes before everything else.
        self.unsent: memoryview | None = None
        #: Others have what there may be under way: it is woken when that has changed.
        self.refused = False
        #: Its last record was of bulk.
        self.sent_bulk = False
        self.heard = self._whole = now
        #: Bytes sent since the peer was last heard on it, and since when.
        self.unheard = 0
        self.unheard_since: float | None = None
        #: When the ping was sent that waits for its answer.
        self.asked: float | None = None
        self._measured = False
        self._token = self._answered = 0  # the last ping, and the last that was answered
        self._pings_due: list[bytes] = []
        self._pong: int | None = None
        self._asked_system, self._seen = -math.inf, False  # when that was, and whether it knew
        self._pace: float | None = None  # smoothed seconds per byte of larger records
        self._unsent = defaults.UNSENT[0][1]  # what may wait in the kernel

    def __repr__(self) -> str:
        return f"<Pipe {self.index} {self.way} to {self.remote}>"

    @property
    def rank(self) -> int:
        return RANK[self.way]

    @property
    def usable(self) -> bool:
        """True when records may be given to it."""
        return self.confirmed and not self.retiring and self.reason is None

    @property
    def run(self) -> int:
        """Bytes of records to write in one turn, the last one counted as nothing."""
        return min(self.stream.run, int((self.bandwidth or 0.0) * defaults.RUN_TIME))

    def fail(self, reason: RemoteError) -> None:
        """It is dead: its tasks end."""
        if self.reason is None:
            self.reason = reason
        if self.scope is not None:
            self.scope.cancel()

    def retire(self) -> None:
        """Say that nothing more comes on it."""
        self.retiring = True
        self.work.wake()

    # What it says about itself

    def ping(self, now: float) -> None:
        """Ask for a sign of life. One at a time: a second one before the answer changes nothing."""
        if self.asked is None:
            self._token = self._token + 1 & 0xFFFFFFFF
            self.asked = now
            self._pings_due.append(_FRAME.pack(_PING, self._token))
            self.work.wake()

    def take_unsent(self) -> memoryview | None:
        unsent, self.unsent = self.unsent, None
        return unsent

    @property
    def has_frames(self) -> bool:
        return bool(self._pings_due) or self._pong is not None

    def take_frames(self) -> bytes:
        """The frames that are due; empty when there are none."""
        if not self.has_frames:
            return b""
        frames = b"".join(self._pings_due)
        self._pings_due.clear()
        if self._pong is not None:
            frames += _FRAME.pack(_PONG, self._pong)
            self._pong = None
        return frames

    @staticmethod
    def retirement() -> bytes:
        return _FRAME.pack(_RETIRE, 0)

    def receive_frames(self, payload: memoryview, now: float) -> None:
        """Raises :class:`RemoteProtocolError`."""
        if len(payload) % _FRAME.size:
            raise RemoteProtocolError("frames of a pipe that are cut short")
        for kind, value in _FRAME.iter_unpack(payload):
            if kind == _PING:
                self._pong = value  # only the last one is answered: a flood of pings makes no queue
            elif kind == _PONG:
                self._on_pong(value, now)
            elif kind == _RETIRE:
                self.peer_retired = True
            else:
                raise RemoteProtocolError(f"an unknown kind of frame of a pipe, {kind}")

    def _on_pong(self, token: int, now: float) -> None:
        # Something else may have been heard before the answer, and a further ping been sent: both answers may come.
        if not 0 < token - self._answered & 0xFFFFFFFF <= self._token - self._answered & 0xFFFFFFFF:
            raise RemoteProtocolError("an answer to no ping of ours")
        self._answered = token
        if token != self._token:
            return
        if self.asked is not None:
            sample = max(0.0, now - self.asked)
            self.rtt = 0.875 * self.rtt + 0.125 * sample if self._measured else sample  # RFC 6298
            # That of the handshake was no ping; what the system saw is one of the best.
            known = self._measured or self._seen
            self.nearest = min(self.nearest, sample) if known else sample
            self._measured = True
        self.asked = None

    # What is measured

    def note_heard(self, size: int, now: float, *, whole: bool) -> None:
        """``size`` bytes came; ``whole``: with them a record that only the peer can have made."""
        self.bytes_received += size
        if whole:
            self._whole = now
        elif now - self._whole > defaults.UNFINISHED_RECORD:
            return
        self.heard = now
        self.unheard, self.unheard_since = 0, None

    def note_sent(self, size: int, seconds: float, now: float) -> None:
        """``size`` bytes were taken by the network within ``seconds``."""
        self.bytes_sent += size
        self.unheard += size
        if self.unheard_since is None:
            self.unheard_since = now
        if size < defaults.MIN_RECORD // 2:
            return
        if now >= self._asked_system + defaults.ASK_SYSTEM:
            self._asked_system = now
            seen = self.stream.round_trip()
            if seen is not None:
                self._seen, self.nearest = True, min(self.nearest, seen)
        # Seconds per byte are averaged, not bytes per second: a record that vanished in the kernel's buffer in no time
        # says little about the line, one that took long says much.
        sample = seconds / size
        self._pace = sample if self._pace is None else 0.5 * (self._pace + sample)
        self.bandwidth = 1.0 / max(self._pace, 1e-12)
        self.record_limit = deadlines.record_size(self.bandwidth, self.record_limit)
        unsent = deadlines.unsent(self.bandwidth, self._unsent)
        if unsent != self._unsent:
            self._unsent = unsent
            self.stream.allow_unsent(unsent)
