"""fp32, fp16 and bf16: every value by itself, little-endian, rounded to nearest even."""

from __future__ import annotations

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import defaults, exact
from .. import kernels
from . import base
from .base import Buffer

#: The largest finite fp16.
_MOST_FP16 = 65504.0


@attrs.frozen
class _Fp32:
    """The values as they are: 32 bits each."""

    name: str = attrs.field(default="fp32", init=False)
    block: int = attrs.field(default=1, init=False)
    elementwise: bool = attrs.field(default=True, init=False)

    def wire_size(self, n: int) -> int:
        return 4 * n

    def encode(self, vector: Tensor, out: Buffer) -> None:
        array, codes = exact.array_of(vector), base.bytes_of(self, out, len(vector), write=True)
        for start, end in base.chunks(len(array)):
            if not kernels.active.finite(array[start:end]):
                raise base.not_finite(self, vector)
            codes[4 * start : 4 * end] = array[start:end].astype("<f4", copy=False).view(np.uint8)

    def decode(self, data: Buffer, out: Tensor) -> None:
        kernels.active.fp32_put(base.bytes_of(self, data, len(out)), 1.0, exact.array_of(out), kernels.DECODE)

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        exact.flush_denormals()
        kernels.active.fp32_put(base.bytes_of(self, data, len(out)), weight, exact.array_of(out), base.how_of(first))

    def fault(self, data: Buffer, n: int) -> str | None:
        if wrong := base.wrong_size(self, data, n):
            return wrong
        codes = np.frombuffer(data, dtype="<u4")
        return _first_beyond(codes, 0x7FFFFFFF, 0x7F800000)


@attrs.frozen
class _Fp16:
    """IEEE half precision, 16 bits each; magnitudes beyond 65504 become 65504."""

    name: str = attrs.field(default="fp16", init=False)
    block: int = attrs.field(default=1, init=False)
    elementwise: bool = attrs.field(default=True, init=False)

    def wire_size(self, n: int) -> int:
        return 2 * n

    def encode(self, vector: Tensor, out: Buffer) -> None:
        array, codes = exact.array_of(vector), base.bytes_of(self, out, len(vector), write=True).view("<u2")
        exact.flush_denormals()
        for start, end in base.chunks(len(array)):
            # torch, because numpy converts one by one. Whether its threads flush denormals is all the same: those are
            # zero in fp16 anyway.
            half = vector.detach()[start:end].to(torch.float16).view(torch.int16).numpy().view(np.uint16)
            if _first_beyond(half, 0x7FFF, 0x7C00):
                if not kernels.active.finite(array[start:end]):
                    raise base.not_finite(self, vector)
                within = vector.detach()[start:end].clamp(-_MOST_FP16, _MOST_FP16)
                half = within.to(torch.float16).view(torch.int16).numpy().view(np.uint16)
            codes[start:end] = half

    def decode(self, data: Buffer, out: Tensor) -> None:
        codes, array = self._codes(data, len(out)), exact.array_of(out)
        for start, end in base.chunks(len(array)):
            array[start:end] = _floats(codes[start:end])

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        codes, array = self._codes(data, len(out)), exact.array_of(out)
        exact.flush_denormals()
        for start, end in base.chunks(len(array)):
            values = _floats(codes[start:end]).astype("<f4", copy=False).view(np.uint8)
            kernels.active.fp32_put(values, weight, array[start:end], base.how_of(first))

    def fault(self, data: Buffer, n: int) -> str | None:
        return base.wrong_size(self, data, n) or _first_beyond(np.frombuffer(data, dtype="<u2"), 0x7FFF, 0x7C00)

    def _codes(self, data: Buffer, n: int) -> NDArray[np.uint16]:
        codes: NDArray[np.uint16] = base.bytes_of(self, data, n).view("<u2")
        return codes


@attrs.frozen
class _Bf16:
    """The upper half of a float32, 16 bits each; magnitudes beyond 3.39e38 become that."""

    name: str = attrs.field(default="bf16", init=False)
    block: int = attrs.field(default=1, init=False)
    elementwise: bool = attrs.field(default=True, init=False)

    def wire_size(self, n: int) -> int:
        return 2 * n

    def encode(self, vector: Tensor, out: Buffer) -> None:
        array, codes = exact.array_of(vector), base.bytes_of(self, out, len(vector), write=True)
        for start, end in base.chunks(len(array)):
            if not kernels.active.finite(array[start:end]):
                raise base.not_finite(self, vector)
            kernels.active.bf16_encode(array[start:end], codes[2 * start : 2 * end])

    def decode(self, data: Buffer, out: Tensor) -> None:
        kernels.active.bf16_put(base.bytes_of(self, data, len(out)), 1.0, exact.array_of(out), kernels.DECODE)

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        exact.flush_denormals()
        kernels.active.bf16_put(base.bytes_of(self, data, len(out)), weight, exact.array_of(out), base.how_of(first))

    def fault(self, data: Buffer, n: int) -> str | None:
        return base.wrong_size(self, data, n) or _first_beyond(np.frombuffer(data, dtype="<u2"), 0x7FFF, 0x7F80)


def _floats(codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    # A copy: what came over the network may stand at any address, and torch wants whole ones.
    aligned = torch.from_numpy(codes.astype(np.int16))
    array: NDArray[np.float32] = aligned.view(torch.float16).to(torch.float32).numpy()
    return array


def _first_beyond(codes: NDArray[np.unsignedinteger], magnitude: int, infinite: int) -> str | None:
    """The first code that means NaN or infinity."""
    for start in range(0, len(codes), defaults.EXACT_CHUNK):
        sizes = codes[start : start + defaults.EXACT_CHUNK] & codes.dtype.type(magnitude)
        if sizes.max() >= infinite:
            first = int(np.argmax(sizes >= infinite))
            what = "infinity" if sizes[first] == infinite else "NaN"
            return f"{what} at {start + first} of {len(codes)}"
    return None


FP32 = _Fp32()
FP16 = _Fp16()
BF16 = _Bf16()
