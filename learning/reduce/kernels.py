"""The loops over contributions: which implementation runs, native or pure, and what each function does.

``kernels.c`` is compiled when Shoal is installed; where it cannot be (no compiler, another byte order), or where the
environment variable ``SHOAL_PURE`` is set to 1, ``pure_kernels.py`` does the same with numpy. Both give the same bits:
one float32 operation after the other, a product rounded before it is added, round to nearest even, magnitudes compared
as integers. Neither sets flush-to-zero: the caller does, on the thread it calls from (``exact.flush_denormals()``).

All arrays are contiguous and 1-D: float32 vectors of the machine's byte order, aligned; uint8 for what travels. A call
may not be given overlapping arrays, unless it says so. Sizes are checked by the callers (codecs, ``exact``); the native
functions check them again and raise ``ValueError``, whatever the bytes in a code are.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import attrs
import numpy as np
from numpy.typing import NDArray

from . import pure_kernels

#: What becomes of a decoded value v: ``out = v``, ``out = factor * v``, ``out += factor * v``.
DECODE, FIRST, FURTHER = 0, 1, 2

#: Kinds of ``block_encode`` and ``block_put``.
INT8, E3M0 = 0, 1

#: Kinds of ``middle``.
MEDIAN, TRIMMED, AROUND = 0, 1, 2

#: What kernels.c must say of itself: raised with every change of what its functions do.
REVISION = 3


class Kernels(Protocol):
    """What both implementations offer."""

    def finite(self, vector: NDArray[np.float32]) -> bool:
        """Whether no value is NaN or infinite."""

    def mean(
        self, vectors: tuple[NDArray[np.float32], ...], factors: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """``out = f0 v0; out += f1 v1; …`` in this order. ``out`` may be the first vector."""

    def fp32_put(self, data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
        """Values of 4 bytes, little-endian, of any alignment, to ``out``."""

    def bf16_put(self, data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
        """Values of 2 bytes, the upper half of a float32, to ``out``."""

    def bf16_encode(self, vector: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
        """Rounds to nearest even; finite values that would become infinite become the largest of bf16."""

    def block_encode(
        self,
        kind: int,
        vector: NDArray[np.float32],
        out: NDArray[np.uint8],
        residual: NDArray[np.float32] | None,
        new_residual: NDArray[np.float32] | None,
    ) -> int:
        """Codes ``y = vector + residual`` in blocks of 1024: a float32 scale, then the codes of the block.

        int8: scale = max|y| / 127, code = y · (127 / max|y|) rounded to nearest even. e3m0: scale = max|y|, code = sign
        and level of the nearest of 0, 1/64, 1/32, … 1 (halfway: the larger); the first half of a block in the low
        nibbles, the rest in the high ones. A block whose largest magnitude is below 2^-100 is coded as zeros with scale
        0. ``new_residual`` becomes ``y - decoded``; it may be ``residual``, neither may be ``vector``.

        Returns -1, or the first block with a value that is not finite; outputs are incomplete then.
        """

    def block_put(self, kind: int, data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
        """Values ``scale · code`` of what ``block_encode`` wrote to ``out``."""

    def int8_wrong(self, data: NDArray[np.uint8], n: int) -> bool:
        """Whether a code of int8 is -128, which no encoder makes."""

    def topk(self, vector: NDArray[np.float32], positions: NDArray[np.uint32]) -> None:
        """Positions of the ``len(positions)`` largest magnitudes, ascending; of equal ones the first."""

    def middle(
        self,
        vectors: tuple[NDArray[np.float32], ...],
        network: NDArray[np.uint16],
        kind: int,
        f: int,
        factor: float,
        out: NDArray[np.float32],
    ) -> bool:
        """What stands in the middle of each column of n values, when sorted w_0 ≤ … ≤ w_n-1; 2 f < n. Whether all are
        finite: if not, the result is anything.

        MEDIAN: the middle one, or ``0.5 a`` plus ``0.5 b`` of the two. TRIMMED: the sum of ``factor · w_i`` for i = f …
        n-f-1, ascending. AROUND: with k = n - f and the median μ, the sum of ``factor · v_r`` for r = 0 … k-1, where
        v_r is w_r, but for r < f it is w_r+k where ``w_r+k - μ < μ - w_r``: the k values nearest to μ, of two equally
        near the smaller. Before all this -0 becomes 0.

        ``network``: pairs (i, j), i < j < n, of compare-and-swaps that put all rows in order that the kind looks at
        (``aggregate/order.py``). The pure path sorts without it.
        """

    def gram(self, vectors: tuple[NDArray[np.float32], ...], n: int, out: NDArray[np.float64]) -> None:
        """All inner products of vectors of ``n`` elements to ``out``, float64 (len(vectors), len(vectors)).

        Products are exact; they are added in float64 in any order, so bits may differ between machines and paths:
        each sum is off by at most (n/8192 + 1100) 2^-53 Σ|x_i y_i|, typically by 1e-15 of it. Symmetric, and equal
        pairs of vectors give equal bits with the native kernels. Not finite on the diagonal where a vector is not.
        """

    def gram_row(self, vectors: tuple[NDArray[np.float32], ...], pivot: int, n: int, out: NDArray[np.float64]) -> None:
        """Row ``pivot`` and the diagonal of what ``gram`` gives, with the same bits, to ``out``, float64 (2,
        len(vectors)). Natively it takes one pass of the memory; the pure path is not faster than ``gram``.
        """


@attrs.frozen
class Which:
    """The implementation in use: ``native``, with ``instructions``; or not, with the ``reason``."""

    native: bool
    instructions: str
    reason: str

    def __str__(self) -> str:
        return f"native ({self.instructions})" if self.native else f"pure numpy ({self.reason})"


def load(pure: bool) -> tuple[Kernels, Which]:
    """The native kernels, or the pure ones when asked for or when there is no other way, and why."""
    if pure:
        return pure_kernels, Which(False, "numpy", "SHOAL_PURE is set")
    try:
        native = importlib.import_module("._kernels", __package__)
    except ImportError as error:
        return pure_kernels, Which(False, "numpy", f"the native helper is not installed: {error}")
    if native.REVISION != REVISION:
        reason = f"the native helper is of revision {native.REVISION}, not {REVISION}: install Shoal again"
        return pure_kernels, Which(False, "numpy", reason)
    return cast(Kernels, native), Which(True, native.level(), "")


#: The implementation in use. Tests and benchmarks replace it.
active, _which = load(os.environ.get("SHOAL_PURE", "0") not in ("", "0"))


def which() -> Which:
    """What was chosen when this module was imported, and why."""
    return _which
