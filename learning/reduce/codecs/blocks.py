"""int8 and e3m0: blocks of 1024 values, each a float32 scale followed by the codes of the block.

int8: symmetric, 255 levels, scale = max|x| / 127, rounded to nearest even.

e3m0: the 4 bits of Streaming DiLoCo (arXiv 2501.18512, section 2.3: one sign bit, three of exponent, no mantissa):
0 and 1/64, 1/32, … 1 times the scale, which is max|x| (the paper does not say how it scales); to the nearest level.

Scale and codes of a block stand together, so that the code of a vector is those of its slices one after the other, and
a part that has arrived can be combined before the rest is there.
"""

from __future__ import annotations

import attrs
import numpy as np
from torch import Tensor

from ... import defaults, exact
from .. import kernels
from . import base
from .base import Buffer

_BLOCK = defaults.CODEC_BLOCK
_LEAST = np.array([defaults.CODEC_LEAST_BITS], dtype=np.int32).view(np.float32)[0]
_MOST = np.finfo(np.float32).max


@attrs.frozen
class BlockCodec:
    """A codec with one scale per 1024 elements; ``kind`` is the kernels'."""

    name: str
    kind: int

    @property
    def block(self) -> int:
        return _BLOCK

    @property
    def elementwise(self) -> bool:
        return True

    def wire_size(self, n: int) -> int:
        whole, rest = divmod(n, _BLOCK)
        return whole * (4 + self._codes(_BLOCK)) + (4 + self._codes(rest) if rest else 0)

    def encode(self, vector: Tensor, out: Buffer) -> None:
        exact.flush_denormals()
        codes = base.bytes_of(self, out, len(vector), write=True)
        if kernels.active.block_encode(self.kind, exact.array_of(vector), codes, None, None) >= 0:
            raise base.not_finite(self, vector)

    def encode_compensated(self, vector: Tensor, residual: Tensor, new_residual: Tensor, out: Buffer) -> None:
        """``base.encode_compensated`` in one pass over the vectors."""
        arrays = [exact.array_of(tensor) for tensor in (vector, residual, new_residual)]
        base.same_sizes(arrays)
        exact.flush_denormals()
        codes = base.bytes_of(self, out, len(vector), write=True)
        if kernels.active.block_encode(self.kind, arrays[0], codes, arrays[1], arrays[2]) >= 0:
            raise base.not_finite(self, vector)

    def decode(self, data: Buffer, out: Tensor) -> None:
        exact.flush_denormals()
        codes = base.bytes_of(self, data, len(out))
        kernels.active.block_put(self.kind, codes, 1.0, exact.array_of(out), kernels.DECODE)

    def accumulate(self, data: Buffer, weight: float, out: Tensor, first: bool) -> None:
        exact.flush_denormals()
        codes = base.bytes_of(self, data, len(out))
        kernels.active.block_put(self.kind, codes, weight, exact.array_of(out), base.how_of(first))

    def fault(self, data: Buffer, n: int) -> str | None:
        if wrong := base.wrong_size(self, data, n):
            return wrong
        codes = np.frombuffer(data, dtype=np.uint8)
        whole, rest = divmod(n, _BLOCK)
        size = 4 + self._codes(_BLOCK)
        scales = codes[: whole * size].reshape(whole, size)[:, :4].reshape(-1)
        if rest:
            scales = np.concatenate((scales, codes[whole * size : whole * size + 4]))
        values = scales.view("<u4")
        # As integers, because they may be anything. Scales of encoders are 0 or within these bounds.
        least, most = (int(bound.view(np.uint32)) for bound in self._bounds())
        bad = (values != 0) & ((values < least) | (values > most))
        if bad.any():
            first = int(np.argmax(bad))
            return f"the scale {values[first : first + 1].view('<f4')[0]} of block {first} is no scale of {self.name}"
        if self.kind == kernels.INT8 and kernels.active.int8_wrong(codes, n):
            return "a code of -128, which int8 does not use"
        if self.kind == kernels.E3M0 and rest % 2 and codes[-1] > 15:
            return "a code after the last element"
        return None

    def _codes(self, n: int) -> int:
        return n if self.kind == kernels.INT8 else (n + 1) // 2

    def _bounds(self) -> tuple[np.float32, np.float32]:
        if self.kind == kernels.INT8:
            return _LEAST / np.float32(127.0), _MOST / np.float32(127.0)
        return _LEAST, _MOST


INT8 = BlockCodec("int8", kernels.INT8)
E3M0 = BlockCodec("e3m0", kernels.E3M0)
