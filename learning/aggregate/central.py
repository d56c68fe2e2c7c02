"""The centralised form of every aggregator: all vectors in one place, through the same code as the owners'."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...transport.errors import ConfigError
from .. import exact
from .aggregator import Aggregator, Decision
from .base import Floats
from .linear import partial_gram
from .names import resolve

Vectors = Sequence[Tensor] | Sequence[NDArray[np.float32]] | Tensor | NDArray[np.float32]


@attrs.frozen(eq=False)
class Result:
    """``vector`` (d,), float32. ``coefficients`` (p,) where it is a linear combination (the last one is that of the
    last result, where that took part); ``quality`` (n,), 0 … 1, where the rule has one; ``scores`` (n,), -1 … 1, where
    it remembers something of each."""

    vector: Tensor
    coefficients: Floats | None = None
    quality: Floats | None = None
    scores: Floats | None = None


def aggregate(
    vectors: Vectors,
    rule: str | Aggregator,
    weights: Sequence[float] | None = None,
    *,
    reference: Tensor | None = None,
    seed: int = 0,
    scores: Floats | None = None,
) -> Result:
    """``rule`` over n ``vectors`` of d elements: a list of (d,) or a matrix (n, d), float32, tensors on the CPU or
    arrays.

    ``weights``: n, for the mean alone. ``reference``: the last result, (d,), for rules that look at it. ``seed``: of
    what is drawn. ``scores`` (n,): :attr:`Result.scores` of the round before, for rules with a memory. Raises
    :class:`ConfigError` for NaN and infinity (which vector, where), a wrong shape or dtype, too few vectors for the
    rule. Works in slices that stay in cache; on the calling thread alone.
    """
    aggregator = resolve(rule) if isinstance(rule, str) else rule
    rows = _rows(vectors)
    n = len(rows)
    aggregator.check(n)
    if scores is not None and len(scores) != n:
        raise ConfigError(f"{len(scores)} scores for {n} vectors")
    if weights is not None and len(weights) != n:
        raise ConfigError(f"{len(weights)} weights for {n} vectors")
    if reference is not None and aggregator.needs_reference:
        rows.append(_row(reference, "the reference"))
        _same_sizes(rows)
    out = torch.empty(len(rows[0]))
    decision: Decision | None = None
    if aggregator.needs_gram:
        gram = partial_gram(rows, aggregator.pivot_of(len(rows)))
        for i in np.flatnonzero(~np.isfinite(np.diag(gram))).tolist():
            _refuse(i, rows[i], n)
        decision = aggregator.decide(gram, n, seed, scores)
        aggregator.combine(rows, decision, out, weights)
    elif not aggregator.combine(rows, None, out, weights):
        for i, row in enumerate(rows):
            if exact.check_finite(row) is not None:
                _refuse(i, row, n)
    if decision is None:
        return Result(out)
    coefficients = decision.matrix[0] if len(decision.matrix) == 1 else None
    return Result(out, coefficients, decision.quality, decision.scores)


def _rows(vectors: Vectors) -> list[Tensor]:
    if isinstance(vectors, Tensor | np.ndarray) and vectors.ndim != 2:
        raise ConfigError(f"vectors are a list of (d,) or a matrix (n, d), got the shape {tuple(vectors.shape)}")
    if not len(vectors):
        raise ConfigError("no vectors to aggregate")
    if isinstance(vectors, np.ndarray) and vectors.dtype == np.float32 and vectors.flags.c_contiguous:
        vectors = torch.from_numpy(vectors)  # once, instead of each row
    rows = [_row(vector, f"vector {i}") for i, vector in enumerate(vectors)]
    _same_sizes(rows)
    return rows


def _row(vector: Tensor | NDArray[np.float32], what: str) -> Tensor:
    if isinstance(vector, np.ndarray):
        if vector.dtype != np.float32:
            raise ConfigError(f"{what} is {vector.dtype}; rules take float32")
        vector = torch.from_numpy(np.ascontiguousarray(vector))
    if not isinstance(vector, Tensor):
        raise ConfigError(f"{what} is a {type(vector).__name__}, neither tensor nor array")
    if vector.dtype != torch.float32 or not vector.is_cpu:
        raise ConfigError(f"{what} is {vector.dtype} on {vector.device}; rules take float32 on the CPU")
    if vector.dim() != 1 or not vector.numel():
        raise ConfigError(f"{what} has the shape {tuple(vector.shape)}; rules take (d,) with d of 1 or more")
    return vector.detach().contiguous()


def _same_sizes(rows: list[Tensor]) -> None:
    d = rows[0].numel()
    for i, row in enumerate(rows):
        if row.numel() != d:
            raise ConfigError(f"vector {i} has {row.numel()} elements, vector 0 has {d}")


def _refuse(i: int, row: Tensor, n: int) -> None:
    what = f"vector {i}" if i < n else "the reference"
    raise ConfigError(f"{what} is refused: {exact.check_finite(row)}")
