"""The record layer, sans-IO: plaintext to encrypted records on an ordered byte pipe, and back.

A record is 4 bytes of length (of what follows, big-endian, authenticated), the ciphertext, the tag. Its counter is
never sent: both sides count, so a record that is replayed, left out, reordered or altered does not open, and the link
ends with :class:`RecordError`. The counter runs through the whole session; after :data:`defaults.REKEY_RECORDS` records
both sides derive the next key from a chain that only runs forward, so no key and nonce ever meet twice and a stolen key
does not open what was sent under earlier ones.

A pipe cut between two records looks like a peer that is silent; that the peer really meant to end is said inside the
records (the mux's goodbye).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeAlias

from . import defaults, pool
from .aead import SUITES, Aead
from .errors import ProtocolMisuse, RecordError

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct(">I")
HEADER = _HEADER.size


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

    def advance(self) -> None:
        """Count one record that was sealed or opened; step to the next key when it is time."""
        self.counter += 1
        if self.counter % self._rekey_after == 0:
            self._step()


class Sealed:
    """A record as it went out, which the one who sealed it can open again."""

    __slots__ = ("_aead", "_counter", "wire")

    def __init__(self, wire: bytearray | memoryview, aead: Aead, counter: int) -> None:
        self.wire, self._aead, self._counter = wire, aead, counter

    def plain(self) -> memoryview:
        """The plaintext, in a new buffer."""
        body = bytearray(self.wire[HEADER:])
        if not self._aead.open(body, 0, len(body), self._counter, bytes(self.wire[:HEADER])):
            raise ProtocolMisuse("a record that waited to be sent again was changed in memory")
        return memoryview(body)[: len(body) - self._aead.suite.tag]


class RecordSealer:
    """The sending half: ``cipher`` names a suite of :mod:`aead`, ``secret`` is this direction's (32 bytes)."""

    def __init__(self, cipher: str, secret: bytes, *, rekey_after: int = defaults.REKEY_RECORDS) -> None:
        self._keys = _KeyChain(cipher, secret, rekey_after)
        self._tail = bytes(self._keys.suite.tag)
        #: Bytes that a record is longer than its plaintext.
        self.overhead = HEADER + len(self._tail)

    def seal_to_keep(self, parts: Sequence[Buffer]) -> Sealed:
        """As :meth:`seal`, for a record that may have to be opened again here."""
        aead, counter = self._keys.aead, self._keys.counter
        return Sealed(self.seal(parts), aead, counter)

    def seal(self, parts: Sequence[Buffer]) -> bytearray | memoryview:
        """One record holding the concatenation of ``parts``: the bytes for the wire, in a buffer of its own.

        Costs one copy of the parts; they are encrypted where they land. Raises :class:`ProtocolMisuse` above
        :data:`defaults.MAX_RECORD` bytes of plaintext.
        """
        keys = self._keys
        plain = sum(map(len, parts))
        if plain > defaults.MAX_RECORD:
            raise ProtocolMisuse(f"a record of {plain} bytes, at most {defaults.MAX_RECORD} allowed")
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


class RecordOpener:
    """The receiving half. Memory: at most one record beyond what :meth:`feed` returns, and never more than twice what
    has come.

    Bytes come in through :meth:`feed`, or within a large record straight to their place: see :meth:`room`.
    """

    def __init__(self, cipher: str, secret: bytes, *, rekey_after: int = defaults.REKEY_RECORDS) -> None:
        self._keys = _KeyChain(cipher, secret, rekey_after)
        self._tag = self._keys.suite.tag
        self._header = b""
        self._body: bytearray | memoryview = bytearray()
        #: Bytes of the body that have come, when it has its full size (with room for the next header); else -1.
        self._filled = -1
        self._largest = 0  # bytes of the largest record so far: the peer does send what it announces
        self._failure: RecordError | None = None

    @property
    def opened(self) -> int:
        """Records opened so far."""
        return self._keys.counter

    def feed(self, data: Buffer) -> list[memoryview]:
        """Take bytes as they come and return the plaintexts of the records they complete, each in its own buffer.

        ``data`` is not kept. Raises :class:`RecordError`, from then on always; records completed by the same ``data``
        before the bad one are dropped, as the link ends anyway.
        """
        if self._failure is not None:
            raise self._failure
        try:
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

    def fill(self, size: int) -> list[memoryview]:
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

    def eof(self) -> None:
        """The pipe has ended. Raises :class:`RecordError` when that cuts a record."""
        if self._failure is not None:
            raise self._failure
        if self._header:
            self._failure = RecordError(f"the connection ended inside record {self._keys.counter}")
            raise self._failure

    def _feed(self, data: memoryview) -> list[memoryview]:
        records: list[memoryview] = []
        at = 0
        while at < len(data):
            if len(self._header) < HEADER:
                taken = data[at : at + HEADER - len(self._header)]
                self._header += bytes(taken)
                at += len(taken)
                if len(self._header) < HEADER:
                    break
                length = self._check_length()
                if defaults.DIRECT_RECORD <= length <= self._largest:  # else memory grows with what has come
                    self._body, self._filled = pool.take()[: length + HEADER], 0
            length = _HEADER.unpack(self._header)[0]
            missing = length - (len(self._body) if self._filled < 0 else self._filled)
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
        length = _HEADER.unpack(self._header)[0]
        if not self._tag <= length <= defaults.MAX_RECORD + self._tag:
            raise RecordError(
                f"record {self._keys.counter} announces {length} bytes, "
                f"expected {self._tag} to {defaults.MAX_RECORD + self._tag}"
            )
        return int(length)

    def _open(self) -> memoryview:
        keys, body = self._keys, self._body
        length = _HEADER.unpack(self._header)[0]
        if not keys.aead.open(body, 0, length, keys.counter, self._header):
            raise RecordError(f"record {keys.counter} was altered, replayed or reordered")
        keys.advance()
        self._largest = max(self._largest, length)
        self._header, self._body, self._filled = b"", bytearray(), -1
        return memoryview(body)[: length - self._tag]
