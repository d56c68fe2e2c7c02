"""What owners do for rules on the Gram matrix: partial inner products of their slice, and linear combinations of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import defaults, exact
from ..reduce import kernels
from .base import Floats


def partial_gram(slices: Sequence[Tensor], pivot: int | None = None) -> Floats:
    """⟨x_i, x_j⟩ over one slice: float64 (p, p). The Gram matrix is the sum over all slices.

    ``slices``: p ≥ 1 contributions' slices (d,), float32, contiguous, on the CPU. Products of float32 are exact in
    float64 and added there: each sum is off by at most (d/8192 + 1100) 2^-53 Σ|x_i x_j|, 1e-15 of it in practice. Not
    finite on the diagonal, exactly where a slice is not. Bits may differ between machines.

    With ``pivot`` only that row and column and the diagonal, with the same bits, in one pass of the memory: a third of
    the time. The others are NaN.
    """
    arrays = tuple(exact.array_of(one) for one in slices)
    p = len(arrays)
    exact.flush_denormals()
    if pivot is None:
        gram = np.empty((p, p))
        kernels.active.gram(arrays, len(arrays[0]), gram)
        return gram
    gram, found = np.full((p, p), np.nan), np.empty((2, p))
    kernels.active.gram_row(arrays, pivot, len(arrays[0]), found)
    gram[pivot, :] = gram[:, pivot] = found[0]
    np.fill_diagonal(gram, found[1])
    return gram


def linear_combination(slices: Sequence[Tensor], coefficients: Floats, out: Tensor) -> None:
    """``out`` = Σ c_i x_i with c_i = float32(``coefficients``[i]), in this order, products rounded before they are
    added.

    The same bits on every machine for the same coefficients, however the vectors are cut. Rows with c_i = 0 are not
    read.
    ``out`` (d,) is none of the ``slices``, but may be the first.
    """
    factors = coefficients.astype(np.float32)
    used = np.flatnonzero(factors)
    exact.flush_denormals()
    if not len(used):
        out.zero_()
        return
    arrays = tuple(exact.array_of(slices[i]) for i in used.tolist())
    kernels.active.mean(arrays, factors[used], exact.array_of(out))


def mixed(slices: Sequence[Tensor], matrix: Floats) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows that ``matrix`` (q, p) makes of the slices, piece by piece: (where, q tensors that the next piece
    overwrites). Each is a :func:`linear_combination`."""
    d, q = len(slices[0]), len(matrix)
    step = min(max(defaults.AGGREGATE_CHUNK // max(len(slices), q), 1), d)
    arrays = [exact.array_of(one) for one in slices]
    made = torch.zeros(q, step)
    plans = [(np.flatnonzero(factors).tolist(), factors[factors != 0]) for factors in matrix.astype(np.float32)]
    exact.flush_denormals()
    for start in range(0, d, step):
        where = slice(start, min(start + step, d))
        parts = [array[where] for array in arrays]
        rows = [row[: where.stop - start] for row in made]
        for row, (used, factors) in zip(rows, plans, strict=True):
            if used:
                kernels.active.mean(tuple(parts[i] for i in used), factors, row.numpy())
        yield where, rows


def fault(gram: Floats, p: int, *, spectrum: bool = True) -> str | None:
    """Why ``gram`` is no Gram matrix of ``p`` finite vectors, or None: for sums of what others computed.

    Without ``spectrum`` it takes no look at the eigenvalues, which cost p^3.
    """
    if gram.shape != (p, p):
        return f"shape {gram.shape} instead of ({p}, {p})"
    if not np.isfinite(gram).all():
        return "not finite"
    if not (gram == gram.T).all():
        return "not symmetric"
    sizes = np.diag(gram)
    if sizes.min() < 0:
        return f"row {int(np.argmin(sizes))} has a negative square"
    lengths = np.sqrt(sizes)
    if (np.abs(gram) > np.outer(lengths, lengths) * (1 + defaults.GRAM_SLACK)).any():
        return "an inner product is larger than the lengths allow"
    if not spectrum:
        return None
    least = float(np.linalg.eigvalsh(gram)[0])
    if least < -defaults.GRAM_SLACK * sizes.sum():
        return f"a negative eigenvalue, {least:.3g}"
    return None
