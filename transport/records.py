"""The record layer, sans-IO: plaintext to encrypted records on an ordered byte pipe, and back.

A record is 4 bytes of length (of what follows, big-endian, authenticated), the ciphertext, the tag. Its counter is
never sent: both sides count, so a record that is replayed, left out, reordered or altered does not open, and the link
ends with :class:`RecordError`. The counter runs through the whole session; after :data:`defaults.REKEY_RECORDS` records
both sides derive the next key from a chain that only runs forward, so no key and nonce ever meet twice and a stolen key
does not open what was sent under earlier ones.

A large piece of data is sealed straight from its sender's memory and opened straight into its receiver's, in a *split*
record: its ciphertext is the head (up to :data:`MAX_HEAD` bytes: everything that says where the body belongs), the
head's tag, the body, the body's tag; each part takes a counter of its own. The length then holds, from the highest bit
on: 1, the head's bytes (9 bits), the bytes of all that follows (22 bits).

A pipe cut between two records looks like a peer that is silent; that the peer really meant to end is said inside the
records (the mux's goodbye).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeAlias

import attrs

from . import defaults, pool, pump
from .aead import SUITES, Aead
from .errors import ProtocolMisuse, RecordError

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct(">I")
HEADER = _HEADER.size

#: Bytes of the head of a split record at most.
MAX_HEAD = 511
_SPLIT = 1 << 31
_LENGTH_BITS = 22
_LENGTH = (1 << _LENGTH_BITS) - 1
assert defaults.MAX_RECORD + 64 <= _LENGTH


class _KeyChain:
    """The keys of one direction: ``chain`` is a secret of 32 bytes that each step replaces."""

    def __init__(self, cipher: str, chain: bytes, rekey_after: int) -> None:
        if len(chain) != 32:
            raise ProtocolMisuse("the secret of a record layer has 32 bytes")
        if rekey_after < 1:
            raise ProtocolMisuse("a key must serve for one record at least")
        self.suite = SUITES[cipher]
        self.counter = 0
        self._chain = chain
        self._rekey_after = rekey_after
        self._step()

    def _step(self) -> None:
        key = hashlib.blake2b(self.suite.name.encode(), key=self._chain, person=b"shoal record key")
        self._chain = hashlib.blake2b(key=self._chain, person=b"shoal next chain", digest_size=32).digest()
        self.aead = Aead(self.suite, key.digest()[: self.suite.key])

    def left(self) -> int:
        """Records until the key steps."""
        return self._rekey_after - self.counter % self._rekey_after

    def skip(self, count: int) -> None:
        """:meth:`advance` as often, at most :meth:`left` times."""
        if count:
            self.counter += count - 1
            self.advance()

    def advance(self) -> None:
        """Count one record that was sealed or opened; step to the next key when it is time."""
        self.counter += 1
        if self.counter % self._rekey_after == 0:
            self._step()


class SealedBody:
    """The body of a split record that has come: to be opened once, where it is wanted."""

    __slots__ = ("_aead", "_counter", "_header", "_start", "_whole")

    def __init__(self, whole: bytearray | memoryview, start: int, aead: Aead, counter: int, header: bytes) -> None:
        self._whole, self._start, self._aead, self._counter, self._header = whole, start, aead, counter, header

    def __len__(self) -> int:
        return len(self._whole) - self._start - self._aead.suite.tag

    def open_into(self, target: memoryview) -> None:
        """Write the plaintext to ``target``, of exactly its length. Raises :class:`RecordError`."""
        if not self._aead.open_into(self._whole, self._start, target, self._counter, self._header):
            raise RecordError(f"record {self._counter} was altered, replayed or reordered")

    def open(self) -> memoryview:
        """The plaintext, in the buffer of the record. Raises :class:`RecordError`."""
        stop = len(self._whole)
        if not self._aead.open(self._whole, self._start, stop, self._counter, self._header):
            raise RecordError(f"record {self._counter} was altered, replayed or reordered")
        return memoryview(self._whole)[self._start : stop - self._aead.suite.tag]


@attrs.frozen
class Record:
    """The plaintext of one record, in a buffer of its own; of a split one its head's, and the body still sealed."""

    data: memoryview
    body: SealedBody | None = None

    def __len__(self) -> int:
        return len(self.data) + (0 if self.body is None else len(self.body))

    def __bytes__(self) -> bytes:
        return bytes(self.whole())

    def whole(self) -> memoryview:
        """All of the plaintext. Raises :class:`RecordError`."""
        return self.data if self.body is None else memoryview(b"".join((self.data, self.body.open())))


class Sealed:
    """A record as it went out, which the one who sealed it can open again."""

    __slots__ = ("_body", "_head", "wire")
    count = 1

    def __init__(
        self, wire: bytearray | memoryview, head: tuple[Aead, int], body: tuple[Aead, int] | None = None
    ) -> None:
        self.wire, self._head, self._body = wire, head, body

    @property
    def size(self) -> int:
        return len(self.wire)

    def plain(self) -> memoryview:
        """The plaintext, in a new buffer."""
        header, copy = bytes(self.wire[:HEADER]), bytearray(self.wire[HEADER:])
        aead, counter = self._head
        tag = aead.suite.tag
        stop = len(copy)
        if self._body is not None:
            start = (_HEADER.unpack(header)[0] >> _LENGTH_BITS & MAX_HEAD) + tag
            if not self._body[0].open(copy, start, stop, self._body[1], header):
                raise ProtocolMisuse("a record that waited to be sent again was changed in memory")
            del copy[stop - tag :]
            stop = start
        if not aead.open(copy, 0, stop, counter, header):
            raise ProtocolMisuse("a record that waited to be sent again was changed in memory")
        del copy[stop - tag : stop]
        return memoryview(copy)


class SealedRun:
    """Records of one run as they went out: ``wires``, all under one key, with two counters each from ``counter`` on."""

    __slots__ = ("_aead", "_counter", "size", "wires")

    def __init__(self, wires: list[memoryview], aead: Aead, counter: int) -> None:
        self.wires, self._aead, self._counter = wires, aead, counter
        self.size = sum(map(len, wires))

    @property
    def count(self) -> int:
        return len(self.wires)

    def drop(self, count: int) -> int:
        """Forget the first ``count`` records; returns their bytes."""
        size = sum(map(len, self.wires[:count]))
        del self.wires[:count]
        self.size -= size
        self._counter += 2 * count
        return size

    def singly(self) -> list[Sealed]:
        """Each of them by itself."""
        aead, first = self._aead, self._counter
        return [Sealed(wire, (aead, first + 2 * n), (aead, first + 2 * n + 1)) for n, wire in enumerate(self.wires)]


class RecordSealer:
    """The sending half: ``cipher`` names a suite of :mod:`aead`, ``secret`` is this direction's (32 bytes)."""

    def __init__(self, cipher: str, secret: bytes, *, rekey_after: int = defaults.REKEY_RECORDS) -> None:
        self._keys = _KeyChain(cipher, secret, rekey_after)
        self._tail = bytes(self._keys.suite.tag)
        #: Bytes that a record is longer than its plaintext.
        self.overhead = HEADER + len(self._tail)

    def seal_to_keep(self, parts: Sequence[Buffer], *, split: bool = False) -> Sealed:
        """As :meth:`seal`, for a record that may have to be opened again here.

        ``split``: the last part may become the body of a split record.
        """
        if split and len(parts[-1]) >= defaults.DIRECT_BODY and sum(map(len, parts[:-1])) <= MAX_HEAD:
            return self._seal_split(b"".join(parts[:-1]), parts[-1])
        head = self._keys.aead, self._keys.counter
        return Sealed(self.seal(parts), head)

    @property
    def room(self) -> int:
        """Records of the next run at most, so that one key serves for all of them."""
        return min(self._keys.left() // 2, pump.MOST_RUN)

    def launch(self, descriptor: int, head: tuple[int, int, int], stretch: pump.Stretch) -> tuple[SealedRun, int, int]:
        """The records of ``stretch``, at most :attr:`room`; arguments and what else comes back as of
        :func:`pump.launch`. ``stretch.body`` is free for other use afterwards."""
        keys, left = self._keys, len(stretch.body)
        around, before = HEADER + pump.SPLIT_HEAD + 2 * len(self._tail), len(stretch.credits)
        wires = []
        for _ in range(stretch.records):
            body = min(stretch.piece - before, left)
            size = around + before + body
            # Those of the pool are for the largest records: a small one would keep ten times of what it needs.
            wires.append(pool.take()[:size] if size >= defaults.DIRECT_RECORD else memoryview(bytearray(size)))
            left -= body
            before = 0
        aead, counter = keys.aead, keys.counter
        sent, error = pump.launch(aead, counter, descriptor, wires, head, stretch)
        keys.skip(2 * stretch.records)
        return SealedRun(wires, aead, counter), sent, error

    def _seal_split(self, head: bytes, body: Buffer) -> Sealed:
        keys, tag = self._keys, len(self._tail)
        wire, header = self._frame(head, body)
        at = HEADER + len(head)
        first = keys.aead, keys.counter
        keys.aead.seal(wire, HEADER, at, keys.counter, header)
        keys.advance()
        second = keys.aead, keys.counter
        keys.aead.seal_from(body, wire, at + tag, keys.counter, header)
        keys.advance()
        return Sealed(wire, first, second)

    def _frame(self, head: bytes, body: Buffer) -> tuple[memoryview, bytes]:
        """The wire of a split record with its length and ``head`` in clear, and the length."""
        tag = len(self._tail)
        self._check(len(head) + len(body))
        length = len(head) + len(body) + 2 * tag
        header = _HEADER.pack(_SPLIT | len(head) << _LENGTH_BITS | length)
        large = length >= defaults.DIRECT_RECORD
        wire = pool.take()[: HEADER + length] if large else memoryview(bytearray(HEADER + length))
        at = HEADER + len(head)
        wire[:at] = header + head
        return wire, header

    def seal(self, parts: Sequence[Buffer]) -> bytearray | memoryview:
        """One record holding the concatenation of ``parts``: the bytes for the wire, in a buffer of its own.

        Costs one copy of the parts; they are encrypted where they land. Raises :class:`ProtocolMisuse` above
        :data:`defaults.MAX_RECORD` bytes of plaintext.
        """
        keys = self._keys
        plain = sum(map(len, parts))
        self._check(plain)
        header = _HEADER.pack(plain + len(self._tail))
        wire: bytearray | memoryview
        if plain >= defaults.DIRECT_RECORD:
            wire = pool.take()[: HEADER + plain + len(self._tail)]
            wire[:HEADER] = header
            at = HEADER
            for part in parts:
                wire[at : at + len(part)] = part
                at += len(part)
        else:
            wire = bytearray().join((header, *parts, self._tail))
        keys.aead.seal(wire, HEADER, HEADER + plain, keys.counter, header)
        keys.advance()
        return wire

    @staticmethod
    def _check(plain: int) -> None:
        if plain > defaults.MAX_RECORD:
            raise ProtocolMisuse(f"a record of {plain} bytes, at most {defaults.MAX_RECORD} allowed")


class RecordOpener:
    """The receiving half. Memory: at most one record beyond what :meth:`feed` returns, and never more than twice what
    has come.

    Bytes come in through :meth:`feed`, or within a large record straight to their place: see :meth:`room`.
    """

    def __init__(self, cipher: str, secret: bytes, *, rekey_after: int = defaults.REKEY_RECORDS) -> None:
        self._keys = _KeyChain(cipher, secret, rekey_after)
        self._tag = self._keys.suite.tag
        self._header = b""
        self._length = 0
        self._body: bytearray | memoryview = bytearray()
        #: Bytes of the body that have come, when it has its full size (with room for the next header); else -1.
        self._filled = -1
        self._largest = 0  # bytes of the largest record so far: the peer does send what it announces
        self._failure: RecordError | None = None

    @property
    def opened(self) -> int:
        """Records opened so far."""
        return self._keys.counter

    def feed(self, data: Buffer) -> list[Record]:
        """Take bytes as they come and return the records they complete, each in its own buffer.

        ``data`` is not kept. Raises :class:`RecordError`, from then on always; records completed by the same ``data``
        before the bad one are dropped, as the link ends anyway.
        """
        if self._failure is not None:
            raise self._failure
        try:
            if not self._header and HEADER < len(data) < defaults.DIRECT_RECORD:
                length = _HEADER.unpack_from(data)[0]
                if len(data) == HEADER + length >= HEADER + self._tag:  # what comes most: one small record, whole
                    self._header, self._length, self._body = bytes(data[:HEADER]), length, bytearray(data[HEADER:])
                    return [self._open()]
            return self._feed(memoryview(data))
        except RecordError as failure:
            self._failure = failure
            raise

    def room(self) -> memoryview | None:
        """Where the next bytes may be received without a copy, to be counted with :meth:`fill`; None: feed them."""
        if self._filled < 0 or self._failure is not None:
            return None
        assert isinstance(self._body, memoryview)
        return self._body[self._filled :]

    def fill(self, size: int) -> list[Record]:
        """``size`` bytes have come to the start of :meth:`room`: as :meth:`feed`."""
        self._filled += size
        length = len(self._body) - HEADER
        if self._filled < length:
            return []
        rest = bytes(self._body[length : self._filled])
        try:
            return [self._open(), *self._feed(memoryview(rest))]
        except RecordError as failure:
            self._failure = failure
            raise

    @property
    def at_lane(self) -> bool:
        """True when what comes next may be for :meth:`land`: a large split record is under way, with a head of frames
        that have no bytes of their own, or large ones have come and the next record has not begun."""
        if self._failure is not None or self._keys.left() < 2:
            return False
        if not self._header:
            return self._largest >= defaults.DIRECT_RECORD
        if self._filled < 0 or self._filled >= len(self._body) - HEADER:
            return False
        word = _HEADER.unpack(self._header)[0]
        more = (word >> _LENGTH_BITS & MAX_HEAD) - pump.SPLIT_HEAD
        return bool(word & _SPLIT) and more >= 0 and more % pump.FRAME_HEAD == 0

    def land(self, descriptor: int, lane: pump.Lane, most: int) -> tuple[pump.Run, list[Record]]:
        """Receive from a socket what the native helper knows how to, about ``most`` bytes of it, where :attr:`at_lane`.

        Also returns the records that it left: to be taken in after what the :class:`pump.Run` says, as those of
        :meth:`fill`. Raises :class:`RecordError`; then nothing of this run counts.
        """
        keys, suite = self._keys, self._keys.suite
        if self._header:
            assert isinstance(self._body, memoryview)
            whole, filled, length = memoryview(self._body.obj), self._filled, self._length
            word = _HEADER.unpack(self._header)[0]
        else:
            whole, word, filled, length = pool.take(), 0, 0, self._largest
        (
            status, records, size, came, word, filled, drained, control, bulk, counter, error, credits, other,
        ) = pump.active.receive(
            descriptor, suite.addresses[1], suite.nonce, suite.counter_at, suite.tag, keys.aead.key,
            keys.counter, whole.obj, word, filled, defaults.DIRECT_RECORD,
            self._largest, lane.number, lane.stream, lane.sink, min(keys.left() // 2, most // length + 1),
        )  # fmt: skip
        run = pump.Run(records, size, came, drained, control, bulk, error, credits)
        length = word & _LENGTH
        keys.skip(counter - keys.counter)
        if not word:  # the next record has not begun, or is none for the helper
            return run, self.feed(other)
        self._header = _HEADER.pack(word)
        try:
            if status == pump.FORGED:
                raise RecordError(f"record {keys.counter} was altered, replayed or reordered")
            self._length, self._body, self._filled = length, whole[: length + HEADER], filled
            if status == pump.LANDED:
                rest = bytes(whole[length:filled])
                self._header, self._body, self._filled = b"", bytearray(), -1
                return run, self._feed(memoryview(rest))
            if status == pump.HEADED:
                rest = bytes(whole[length:filled])
                return run, [self._opened(), *self._feed(memoryview(rest))]
        except RecordError as failure:
            self._failure = failure
            raise
        return run, []

    def eof(self) -> None:
        """The pipe has ended. Raises :class:`RecordError` when that cuts a record."""
        if self._failure is not None:
            raise self._failure
        if self._header:
            self._failure = RecordError(f"the connection ended inside record {self._keys.counter}")
            raise self._failure

    def _feed(self, data: memoryview) -> list[Record]:
        records: list[Record] = []
        at = 0
        while at < len(data):
            if len(self._header) < HEADER:
                taken = data[at : at + HEADER - len(self._header)]
                self._header += bytes(taken)
                at += len(taken)
                if len(self._header) < HEADER:
                    break
                self._length = length = self._check_length()
                if defaults.DIRECT_RECORD <= length <= self._largest:  # else memory grows with what has come
                    self._body, self._filled = pool.take()[: length + HEADER], 0
            missing = self._length - (len(self._body) if self._filled < 0 else self._filled)
            taken = data[at : at + missing]
            at += len(taken)
            if isinstance(self._body, bytearray):
                self._body += taken
            else:
                self._body[self._filled : self._filled + len(taken)] = taken
                self._filled += len(taken)
            if len(taken) == missing:
                records.append(self._open())
        return records

    def _check_length(self) -> int:
        word = int(_HEADER.unpack(self._header)[0])
        split, length = word & _SPLIT, word & _LENGTH if word & _SPLIT else word
        if not split:
            least, most = self._tag, defaults.MAX_RECORD + self._tag
        else:
            least = (word >> _LENGTH_BITS & MAX_HEAD) + 2 * self._tag + 1
            most = defaults.MAX_RECORD + 2 * self._tag
        if not least <= length <= most:
            raise RecordError(f"record {self._keys.counter} announces {length} bytes, expected {least} to {most}")
        return length

    def _open(self) -> Record:
        keys, buffer, header, length = self._keys, self._body, self._header, self._length
        word = _HEADER.unpack(header)[0]
        stop = (word >> _LENGTH_BITS & MAX_HEAD) + self._tag if word & _SPLIT else length
        if not keys.aead.open(buffer, 0, stop, keys.counter, header):
            raise RecordError(f"record {keys.counter} was altered, replayed or reordered")
        return self._opened()

    def _opened(self) -> Record:
        """The record under way, whose tag (of a split one its head's) was verified."""
        keys, header, length = self._keys, self._header, self._length
        word = _HEADER.unpack(header)[0]
        keys.advance()
        view = memoryview(self._body)[:length]
        self._largest = max(self._largest, length)
        self._header, self._body, self._filled = b"", bytearray(), -1
        if not word & _SPLIT:
            return Record(view[: length - self._tag])
        stop = (word >> _LENGTH_BITS & MAX_HEAD) + self._tag
        body = SealedBody(view, stop, keys.aead, keys.counter, header)
        keys.advance()
        return Record(view[: stop - self._tag], body)
