"""Which chunks of a blob somebody has: a bitmap of fixed size that also counts."""

from __future__ import annotations

from collections.abc import Iterator

from ...transport.errors import DecodeError

_COUNTS = bytes(byte.bit_count() for byte in range(256))


class Bits:
    """``size`` bits, all clear at first. Bit i is bit ``i % 8`` (lowest first) of byte ``i // 8``."""

    __slots__ = ("_data", "count", "size")

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._data = bytearray(-(-size // 8))

    @classmethod
    def full(cls, size: int) -> Bits:
        bits = cls(size)
        bits._data = bytearray(b"\xff" * len(bits._data))
        if size % 8:
            bits._data[-1] = (1 << size % 8) - 1
        bits.count = size
        return bits

    @classmethod
    def decode(cls, data: bytes, size: int) -> Bits:
        """What :meth:`encode` gave. Raises :class:`DecodeError` for another length, or bits beyond the last."""
        bits = cls(size)
        if len(data) != len(bits._data) or (size % 8 and data[-1] >> size % 8):
            raise DecodeError(f"a bitmap of {len(data)} bytes for {size} chunks")
        bits._data = bytearray(data)
        bits.count = sum(bits._data.translate(_COUNTS))
        return bits

    def encode(self) -> bytes:
        return bytes(self._data)

    def copy(self) -> Bits:
        made = Bits(self.size)
        made._data, made.count = bytearray(self._data), self.count
        return made

    @property
    def complete(self) -> bool:
        return self.count == self.size

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.size and bool(self._data[index >> 3] >> (index & 7) & 1)

    def add(self, index: int) -> None:
        if index not in self:
            self._data[index >> 3] |= 1 << (index & 7)
            self.count += 1

    def discard(self, index: int) -> None:
        if index in self:
            self._data[index >> 3] &= ~(1 << (index & 7))
            self.count -= 1

    def __iter__(self) -> Iterator[int]:
        """The set ones, in order."""
        for at, byte in enumerate(self._data):
            if byte:
                yield from (8 * at + bit for bit in range(8) if byte >> bit & 1)

    def missing(self) -> Iterator[int]:
        """The clear ones, in order."""
        for at, byte in enumerate(self._data):
            if byte != 0xFF:
                yield from (8 * at + bit for bit in range(8) if not byte >> bit & 1 and 8 * at + bit < self.size)
