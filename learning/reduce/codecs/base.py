"""What a codec is, and what works with any of them: combining coded contributions, coding with a residual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ....transport.errors import ProtocolMisuse
from ... import defaults, exact
from .. import kernels

#: Bytes in memory; those that are written to are writable.
Buffer = bytes | bytearray | memoryview


class Codec(Protocol):
    """A way to write a float32 vector down in exactly ``wire_size(n)`` bytes.

    Vectors are contiguous, 1-D, float32, on the CPU. Encoding is deterministic: the same values give the same bytes on
    every machine (each function sets flush-to-zero on its thread; denormal values count as zeros wherever arithmetic is
    done with them). Nothing here suspends; vectors of more than ``defaults.INLINE`` elements belong on a thread, and
    the kernels let other threads run meanwhile.

    Bytes from others: ask ``fault`` first. ``decode`` and ``accumulate`` of other bytes of the right length are safe
    for memory, but what they give is anything; a wrong length is a ``ProtocolMisuse``.
    """

    @property
    def name(self) -> str:
        """What ``resolve`` takes."""

    @property
    def block(self) -> int:
        """Bounds of slices are multiples of so many elements, but for the end of the vector. A divisor of 1024."""

    @property
    def elementwise(self) -> bool:
        """Slicing and coding commute: the code of a vector is the codes of its slices, one after the other.

        The slice from element a (a multiple of ``block``) begins at byte ``wire_size(a)``.
        """

    def wire_size(self, n: int) -> int:
        """Bytes of ``n`` elements."""

    def encode(self, vector: Tensor, out: Buffer) -> None:
        """Write ``vector`` to ``out``, writable and of ``wire_size`` bytes.

        A value that is not finite is a ``ProtocolMisuse``: ``out`` is incomplete then. Finite values beyond the range
        of a format become its largest.
        """

    def decode(self, data: Buffer, out: Tensor) -> None:
        """Read the values in ``data`` into ``out``."""

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        """``out += float32(weight) * values``, or ``out = …`` for the ``first``; products rounded before the sum."""

    def fault(self, data: Buffer, n: int) -> str | None:
        """Why ``data`` is no code of ``n`` finite values, or None. Looks at all that could make NaN or infinity."""


def combine(parts: Sequence[tuple[Codec, Buffer]], weights: Sequence[float], out: Tensor) -> None:
    """The weighted mean of coded contributions, in this order, into ``out``.

    It has the bits of ``exact.weighted_mean`` over the decoded vectors (with a codec that is not ``elementwise``, but
    for the sign of zeros). ``parts``: at least one, each of ``len(out)`` elements and without ``fault``. Works in
    chunks that stay in cache: each contribution is read once and ``out`` written once.
    """
    if not parts or len(parts) != len(weights):
        raise ProtocolMisuse(f"{len(parts)} contributions with {len(weights)} weights have no mean")
    shares = exact.factors(weights)
    n = len(out)
    views = [(codec, view_of(codec, data, n)) for codec, data in parts]
    if len(views) > 1 and all(codec.elementwise for codec, _ in views):
        ranges = list(chunks(n))
    else:
        ranges = [(0, n)]
    for start, end in ranges:
        piece = out[start:end]
        for number, ((codec, data), share) in enumerate(zip(views, shares, strict=True)):
            code = data[codec.wire_size(start) : codec.wire_size(end)] if len(ranges) > 1 else data
            codec.accumulate(code, share, piece, number == 0)


def encode_compensated(codec: Codec, vector: Tensor, residual: Tensor, new_residual: Tensor, out: Buffer) -> None:
    """Error feedback: encode ``y = vector + residual`` to ``out``; ``new_residual = y - decoded``.

    All of one size; ``new_residual`` may be ``residual``. Raises as ``encode`` does; then ``out`` and ``new_residual``
    are incomplete.
    """
    from .blocks import BlockCodec

    if isinstance(codec, BlockCodec):
        codec.encode_compensated(vector, residual, new_residual, out)
        return
    same_sizes([exact.array_of(tensor) for tensor in (vector, residual, new_residual)])
    code = view_of(codec, out, len(vector))
    for start, end in chunks(len(vector)) if codec.elementwise else [(0, len(vector))]:
        whole, rest = exact.add(vector[start:end], residual[start:end]), new_residual[start:end]
        part = code[codec.wire_size(start) : codec.wire_size(end)] if codec.elementwise else code
        codec.encode(whole, part)
        codec.decode(part, rest)
        rest.copy_(exact.sub_(whole, rest))


def chunks(n: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``n`` elements; all bounds but the last are multiples of every codec's block."""
    step = max(defaults.EXACT_CHUNK // defaults.CODEC_BLOCK, 1) * defaults.CODEC_BLOCK
    for start in range(0, n, step):
        yield start, min(start + step, n)


def view_of(codec: Codec, data: Buffer, n: int) -> memoryview:
    """``data`` as bytes, of exactly the size that ``n`` elements take."""
    view = memoryview(data).cast("B")
    if len(view) != codec.wire_size(n):
        raise ProtocolMisuse(f"{len(view)} bytes are not {n} elements of {codec.name}: {codec.wire_size(n)}")
    return view


def bytes_of(codec: Codec, data: Buffer, n: int, *, write: bool = False) -> NDArray[np.uint8]:
    """As ``view_of``, as an array."""
    view = view_of(codec, data, n)
    if write and view.readonly:
        raise ProtocolMisuse(f"{codec.name} is to be written to memory that is read-only")
    return np.frombuffer(view, dtype=np.uint8)


def same_sizes(arrays: Sequence[NDArray[np.float32]]) -> None:
    """Refuses vectors of unlike sizes."""
    if len({len(array) for array in arrays}) > 1:
        raise ProtocolMisuse(f"vectors of unlike sizes: {', '.join(str(len(array)) for array in arrays)}")


def wrong_size(codec: Codec, data: Buffer, n: int) -> str | None:
    """What is wrong with the size of ``data``, or None."""
    size = memoryview(data).nbytes
    if size != codec.wire_size(n):
        return f"{size} bytes where {n} elements of {codec.name} take {codec.wire_size(n)}"
    return None


def not_finite(codec: Codec, vector: Tensor) -> ProtocolMisuse:
    """The error of an encoder that met a value that is not finite."""
    return ProtocolMisuse(f"{codec.name} codes finite values only: {exact.check_finite(vector) or 'the sum overflows'}")


def how_of(first: bool) -> int:
    return kernels.FIRST if first else kernels.FURTHER
