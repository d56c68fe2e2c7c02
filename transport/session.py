"""What a link keeps so that its records survive the pipe they travelled on: numbers, acknowledgements, copies. Sans-IO.

A session has two channels, CONTROL and BULK, each an ordered sequence of records in each direction. A record may travel
on any pipe of the link; its head carries its number, and what its sender has received so far::

    kind u8 (0 control, 1 bulk, 2 of this pipe alone)   number u32   received control u32   received bulk u32

Numbers count modulo 2^32. The receiver hands records on in order, holds those that came early, drops those it had.
The sender keeps each record, sealed as it went out, until it is acknowledged; when its pipe dies, the record is opened
again and goes out anew on another pipe. So nothing is copied for this, and nothing is lost or delivered twice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import attrs

from . import defaults
from .errors import RemoteProtocolError
from .pump import SPLIT_HEAD, Run, Stretch
from .records import Buffer, Record, RecordSealer, Sealed, SealedRun

_HEAD = struct.Struct(">BIII")
#: Bytes before the payload of every record.
HEAD_BYTES = _HEAD.size
#: The kind of a record that concerns only the pipe it travels on: not numbered, never sent again.
PIPE = 2
BULK = 1

_MASK = 0xFFFFFFFF
_HALF = 1 << 31


@attrs.define(slots=True)
class Sent:
    """A record on its way, or a run of them, the first with this ``number``. ``sealed`` gives the whole plaintext back,
    head included."""

    number: int
    pipe: int
    sealed: Sealed | SealedRun

    @property
    def singly(self) -> list[Sent]:
        """Each record by itself."""
        if isinstance(self.sealed, Sealed):
            return [self]
        return [Sent(self.number + n, self.pipe, sealed) for n, sealed in enumerate(self.sealed.singly())]


class Outbox:
    """The sending half of one channel. ``window``: bytes kept beyond which nothing new goes out."""

    def __init__(self, window: int = defaults.MAX_UNACKNOWLEDGED) -> None:
        self._window = self._most = window
        #: Bytes sent and not acknowledged.
        self.kept = 0
        #: The same, by pipe; of those that have some.
        self.kept_on: dict[int, int] = {}
        self._next = 0
        self._acknowledged = 0  # all before this number
        # In order of numbers; those to be sent again are in both. Lists: an empty deque takes 760 bytes.
        self._sent: list[Sent] = []
        self._again: list[Sent] = []

    @property
    def next(self) -> int:
        """The number of the next new record, not yet modulo."""
        return self._next

    @property
    def full(self) -> bool:
        """True while a new record could be further ahead of a missing one than the peer may hold (:class:`Inbox`)."""
        return self._next - self._acknowledged > defaults.MAX_EARLY_RECORDS or self.kept >= self._window

    @property
    def window(self) -> int:
        return self._window

    @property
    def room(self) -> int:
        """Bytes until it is :attr:`full`."""
        return self._window - self.kept

    @property
    def records(self) -> int:
        """Records until it is :attr:`full`, by their number."""
        return defaults.MAX_EARLY_RECORDS + 1 - (self._next - self._acknowledged)

    def _count(self, pipe: int, size: int) -> None:
        """``size`` bytes more on ``pipe``, or less."""
        self.kept += size
        on = self.kept_on.get(pipe, 0) + size
        if on:
            self.kept_on[pipe] = on
        else:
            self.kept_on.pop(pipe, None)

    def bound(self, size: int) -> None:
        """The window is ``size`` bytes from here on, or that of the beginning if that is less."""
        self._window = min(size, self._most)

    def keep(self, pipe: int, sealed: Sealed | SealedRun) -> None:
        """The record :attr:`next` went out on ``pipe``, or a run of them from there on. Raises
        :class:`RemoteProtocolError` when too much is kept."""
        self._sent.append(Sent(self._next, pipe, sealed))
        self._next += sealed.count
        self._count(pipe, sealed.size)
        if self.kept > defaults.MAX_UNACKNOWLEDGED:
            raise RemoteProtocolError("it takes our records and never acknowledges them")

    def acknowledge(self, received: int) -> None:
        """The peer has everything before ``received`` (modulo 2^32). Raises :class:`RemoteProtocolError`."""
        if received == self._acknowledged & _MASK:
            return
        step = (received - self._acknowledged) & _MASK
        if step >= _HALF:
            return  # an older acknowledgement, overtaken on another pipe
        if self._acknowledged + step > self._next:
            raise RemoteProtocolError("it acknowledges records that were never sent")
        self._acknowledged += step
        done = 0
        for sent in self._sent:
            have = self._acknowledged - sent.number
            if have <= 0:
                break
            if isinstance(sent.sealed, SealedRun) and have < sent.sealed.count:
                self._count(sent.pipe, -sent.sealed.drop(have))
                sent.number = self._acknowledged
                break
            self._count(sent.pipe, -sent.sealed.size)
            done += 1
        del self._sent[:done]
        while self._again and self._again[0].number < self._acknowledged:
            self._again.pop(0)

    def lost(self, pipe: int) -> None:
        """``pipe`` is dead: what went out on it and is not acknowledged must go out again."""
        if any(sent.pipe == pipe for sent in self._sent):
            waiting = {sent.number: None for sent in self._again}
            self._sent = [single for sent in self._sent for single in (sent.singly if sent.pipe == pipe else [sent])]
            self._again = [sent for sent in self._sent if sent.pipe == pipe or sent.number in waiting]

    def repeat(self) -> Sent | None:
        """The next record that must go out again, in order of numbers; then say :meth:`moved`."""
        return self._again[0] if self._again else None

    def moved(self, sent: Sent, pipe: int, sealed: Sealed) -> None:
        """``sent``, the head of what must be repeated, went out again on ``pipe``."""
        assert self._again[0] is sent
        self._again.pop(0)
        self._count(sent.pipe, -sent.sealed.size)
        self._count(pipe, sealed.size)
        sent.pipe, sent.sealed = pipe, sealed


class Inbox:
    """The receiving half of one channel. ``limit``: bytes of early records held at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._expected = 0
        self._early: dict[int, Record] = {}
        self._early_bytes = 0
        self._told = 0
        #: Bytes and records taken since the last acknowledgement.
        self._untold = 0

    @property
    def held(self) -> int:
        """Bytes of early records."""
        return self._early_bytes

    @property
    def expected(self) -> int:
        """The number of the next record in order, modulo 2^32: what to acknowledge."""
        return self._expected & _MASK

    @property
    def owes(self) -> bool:
        """True when enough has come to be worth an acknowledgement of its own."""
        return self._untold >= defaults.ACKNOWLEDGE_BYTES or self._expected - self._told >= defaults.ACKNOWLEDGE_RECORDS

    def told(self) -> None:
        """:attr:`expected` is on its way to the peer."""
        self._told, self._untold = self._expected, 0

    def landed(self, records: int, size: int) -> None:
        """The next ``records`` came, with ``size`` bytes of payload, while none was held."""
        assert not self._early
        self._expected += records
        self._untold += size

    def take(self, number: int, payload: Record) -> Sequence[Record]:
        """A record came: the payloads that are now in order. Raises :class:`RemoteProtocolError` for one far ahead."""
        ahead = (number - self._expected) & _MASK
        if ahead == 0:
            self._expected += 1
            self._untold += len(payload)
            if not self._early:
                return (payload,)
            ready = [payload]
            while (early := self._early.pop(self._expected, None)) is not None:
                self._early_bytes -= len(early)
                self._untold += len(early)
                self._expected += 1
                ready.append(early)
            return ready
        if ahead >= _HALF:
            return ()  # it came before, on another pipe
        place = self._expected + ahead
        if place not in self._early:
            self._early_bytes += len(payload)
            if ahead > defaults.MAX_EARLY_RECORDS or self._early_bytes > self._limit:
                raise RemoteProtocolError(f"record {number} is too far ahead of record {self.expected}")
            self._early[place] = payload
        return ()


def _unwatched(size: int) -> None:
    """Nobody wants to know."""


class Session:
    """Both channels of a link, in both directions. ``windows``: bytes under way at most, by channel, but for the last
    record; the same on both sides, so that what comes early fits.
    """

    #: Told of the bytes of every record, in and out. Must not wait.
    note: Callable[[int], None] = staticmethod(_unwatched)

    def __init__(self, windows: tuple[int, int]) -> None:
        control, bulk = windows
        self.out = (Outbox(control), Outbox(bulk))
        self.into = (Inbox(control + defaults.MAX_RECORD), Inbox(bulk + defaults.MAX_RECORD))

    @property
    def held(self) -> int:
        """Bytes kept here: sent and not acknowledged, received out of order."""
        return sum(outbox.kept for outbox in self.out) + sum(inbox.held for inbox in self.into)

    @property
    def owes(self) -> bool:
        """True when an acknowledgement should go out even if nothing else does."""
        return self.into[0].owes or self.into[1].owes

    def must_repeat(self, channel: int) -> bool:
        """True when a record has to go out again."""
        return self.out[channel].repeat() is not None

    def bound_bulk(self, size: int) -> None:
        """From here on no more than ``size`` bytes of bulk are under way, or what was allowed in the beginning."""
        self.out[BULK].bound(size)

    def lost(self, pipe: int) -> None:
        """``pipe`` is dead."""
        for outbox in self.out:
            outbox.lost(pipe)

    def receive(self, record: Record) -> tuple[int, Sequence[Record]]:
        """The kind of a record, and the payloads that are now in order (of :data:`PIPE`: its own).

        Raises :class:`RemoteProtocolError`.
        """
        if len(record.data) < HEAD_BYTES:
            raise RemoteProtocolError(f"a record of {len(record.data)} bytes, shorter than its head")
        kind, number, control, bulk = _HEAD.unpack_from(record.data)
        self.note(len(record))
        self.out[0].acknowledge(control)
        self.out[1].acknowledge(bulk)
        payload = Record(record.data[HEAD_BYTES:], record.body)
        if kind == PIPE:
            return kind, (payload,)
        if kind > PIPE:
            raise RemoteProtocolError(f"a record of an unknown kind, {kind}")
        return kind, self.into[kind].take(number, payload)

    def landed(self, run: Run) -> None:
        """As :meth:`receive` of the records of bulk that ``run`` counts, which came in order while none was held.

        Raises :class:`RemoteProtocolError`.
        """
        heads = run.records * SPLIT_HEAD + len(run.credits)
        self.note(run.size + heads)
        self.out[0].acknowledge(run.control)
        self.out[1].acknowledge(run.bulk)
        self.into[BULK].landed(run.records, run.size + heads - run.records * HEAD_BYTES)

    def launch(
        self,
        pipe: int,
        sealer: RecordSealer,
        found: Callable[[int, int], Stretch | None],
        most: int,
        send: Callable[[RecordSealer, tuple[int, int, int], Stretch], tuple[SealedRun, int, int]],
    ) -> tuple[Sequence[memoryview], int, int]:
        """New records of bulk for the wire, of about ``most`` bytes, made and sent by ``send``, which is as
        :meth:`RecordSealer.launch`; how many bytes it sent of them, and the error it met.

        ``found``: gives what they carry, by how many bytes there should be and how many records there may be.
        """
        outbox = self.out[BULK]
        if outbox.full or outbox.repeat() is not None:
            return (), 0, 0
        stretch = found(min(most, outbox.room), min(sealer.room, outbox.records))
        if stretch is None:
            return (), 0, 0
        run, sent, error = send(sealer, self._tell(outbox.next), stretch)
        self.note(run.size)
        outbox.keep(pipe, run)
        return run.wires, sent, error

    def seal(self, sealer: RecordSealer, frames: bytes) -> bytearray | memoryview:
        """A record of :data:`PIPE` for the wire."""
        return sealer.seal((self._head(PIPE, 0), frames))

    def compose(
        self, channel: int, pipe: int, sealer: RecordSealer, fresh: Callable[[], Sequence[Buffer] | None]
    ) -> bytearray | memoryview | None:
        """The next record of ``channel`` for the wire: one that must go out again, else what ``fresh`` gives."""
        outbox = self.out[channel]
        sent = outbox.repeat()
        if sent is not None:
            assert isinstance(sent.sealed, Sealed)  # runs are taken apart before anything of them is repeated
            sealed = sealer.seal_to_keep((self._head(channel, sent.number), sent.sealed.plain()[HEAD_BYTES:]))
            outbox.moved(sent, pipe, sealed)
            return sealed.wire
        parts = None if outbox.full else fresh()
        if parts is None:
            return None
        # Of bulk the last part is a piece of data, or a frame too small to be a body.
        sealed = sealer.seal_to_keep((self._head(channel, outbox.next), *parts), split=channel == BULK)
        outbox.keep(pipe, sealed)
        self.note(len(sealed.wire))
        return sealed.wire

    def _head(self, kind: int, number: int) -> bytes:
        return _HEAD.pack(kind, *self._tell(number))

    def _tell(self, number: int) -> tuple[int, int, int]:
        """What the head of the record ``number`` says, which is on its way to the peer."""
        control, bulk = self.into
        control.told()
        bulk.told()
        return number & _MASK, control.expected, bulk.expected
