"""Top-k: positions and values of the largest magnitudes of each slice.

Not elementwise: k is a share of the length of the slice that is coded, so a vector coded in two slices keeps other
values than coded whole, and a slice that is cut anew is coded anew. All who must agree on bytes code the same slice.
What it leaves out is lost unless the contributor keeps it: use it with ``EControl`` (plain error feedback stalls).
"""

from __future__ import annotations

from fractions import Fraction

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....transport.errors import ProtocolMisuse
from ... import exact
from .. import kernels
from . import base
from .base import Buffer
from .plain import FP16, FP32


@attrs.frozen
class TopK:
    """``ceil(fraction · n)`` of n elements: uint32 positions, ascending, then as many values in fp32 or fp16.

    Of equal magnitudes the first are taken. ``fraction``: 0 < fraction ≤ 1.
    """

    fraction: Fraction
    half: bool = False

    def __attrs_post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ProtocolMisuse(f"top-k of a share of {float(self.fraction)}: it must be above 0 and at most 1")

    @property
    def name(self) -> str:
        return f"topk:{float(self.fraction)!r}" + (":fp16" if self.half else "")

    @property
    def block(self) -> int:
        return 1

    @property
    def elementwise(self) -> bool:
        return False

    def kept(self, n: int) -> int:
        """How many of ``n`` elements are sent."""
        return -(-self.fraction.numerator * n // self.fraction.denominator)

    def wire_size(self, n: int) -> int:
        return self.kept(n) * (4 + self._values.wire_size(1))

    def encode(self, vector: Tensor, out: Buffer) -> None:
        array = exact.array_of(vector)
        codes = base.bytes_of(self, out, len(array), write=True)
        if not kernels.active.finite(array):
            raise base.not_finite(self, vector)
        kept = self.kept(len(array))
        positions = np.empty(kept, dtype=np.uint32)
        kernels.active.topk(array, positions)
        codes[: 4 * kept] = positions.astype("<u4", copy=False).view(np.uint8)
        self._values.encode(torch.from_numpy(array[positions]), memoryview(out).cast("B")[4 * kept :])

    def decode(self, data: Buffer, out: Tensor) -> None:
        positions, values = self._parts(data, len(out))
        array = exact.array_of(out)
        array[:] = 0.0
        array[positions] = values

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        positions, values = self._parts(data, len(out))
        array = exact.array_of(out)
        exact.flush_denormals()
        with np.errstate(all="ignore"):
            values = values * np.float32(weight)
            if first:
                array[:] = 0.0
                array[positions] = values
            else:
                array[positions] += values

    def fault(self, data: Buffer, n: int) -> str | None:
        if wrong := base.wrong_size(self, data, n):
            return wrong
        view = memoryview(data).cast("B")
        kept = self.kept(n)
        positions = np.frombuffer(view[: 4 * kept], dtype="<u4")
        if (positions[1:] <= positions[:-1]).any():
            return "positions that do not ascend"
        if kept and positions[-1] >= n:
            return f"position {positions[-1]} of {n}"
        return self._values.fault(view[4 * kept :], kept)

    @property
    def _values(self) -> base.Codec:
        return FP16 if self.half else FP32

    def _parts(self, data: Buffer, n: int) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        view = base.view_of(self, data, n)
        kept = self.kept(n)
        positions = np.frombuffer(view[: 4 * kept], dtype="<u4").astype(np.uint32)
        if kept and int(positions.max()) >= n:
            raise ProtocolMisuse(f"position {positions.max()} of {n}: nobody asked whether these bytes have a fault")
        values = torch.empty(kept)
        self._values.decode(view[4 * kept :], values)
        return positions, values.numpy()
