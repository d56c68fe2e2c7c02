"""The Flag Aggregator (Almasi, Mishra, Vamanan, Ravi, ICLR 2024, arXiv 2302.05865), on the Gram matrix."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Floats, GramRule, Verdict, count, not_negative, one_of
from .geometry import inverse, norms, points

#: Added to 1 - v before roots of it are taken, as in the authors' code.
_EPSILON = 1e-7

#: Squared distances below this share of the squared lengths are none: float32 cannot tell such vectors apart.
_EQUAL = 1e-12


@attrs.frozen
class Flag(GramRule):
    """The subspace Y, of dimension m, that reconstructs the vectors best; the result is their sum projected on it.

    v_i(Y) = g_iᵀ Y Yᵀ g_i / ‖g_i‖² is the share of g_i that lies in Y, and v_ij the same of g_i - g_j:

        min over Y, YᵀY = I, of  Σ_i √(1 - v_i)  +  λ/(p-1) Σ_{i≠j} √(1 - v_ij)

    by iteratively reweighted least squares (IRLS): Y ← the first m left singular vectors of the columns w_i g_i/‖g_i‖
    (and w_ij (g_i - g_j)/‖g_i - g_j‖), w² ∝ (1 - v)^-½. First all weights are equal: v of a random Y is 0 in many
    dimensions. It ends when a step improves the objective by less than ``tolerance`` or after ``iterations``; a step
    that makes it worse is taken back. One step, as in the authors' code, is the default. More of them pull Y towards m
    of the vectors (v_i = 1) and away from the others, and what they end at need not be reproducible: the objective has
    many minima, and after 20 steps rounding errors of 1e-15 had grown beyond 1e-6 in 8 % of random cases with liars.

    ``m`` 0: ⌈(p+1)/2⌉. ``lam``: λ. ``scaling``: ``authors``, 1/m Y Yᵀ G 1, as in their code; ``paper``, 1/p Y Yᵀ G 1.
    ``normalise``: G has unit columns, as in their code; otherwise the vectors as they are. ``pairs``: ``paper``, as
    above; ``authors``: w_ij = λ/(p(p-1)) (|1 - ‖Yᵀ(g_i - g_j)‖²| + ε)^-¼, not divided by the distance, and the
    objective that ends the iteration leaves them out. Their code is ``pairs=authors``.

    Quality: v_i, which is no verdict on honesty: with p = 15, m = 8 and 3 liars that send noise, theirs are larger.
    """

    name: ClassVar[str] = "flag"

    m: int = attrs.field(default=0, validator=count)
    lam: float = attrs.field(default=0.0, validator=not_negative)
    iterations: int = attrs.field(default=1, validator=count)
    tolerance: float = attrs.field(default=1e-10, validator=not_negative)
    scaling: str = attrs.field(default="authors", validator=one_of("authors", "paper"))
    normalise: bool = True
    pairs: str = attrs.field(default="paper", validator=one_of("paper", "authors"))

    def __attrs_post_init__(self) -> None:
        if not self.iterations:
            raise ValueError("iterations must be 1 or more")

    def decide(self, gram: Floats, n: int) -> Verdict:
        m = self.m or -(-(n + 1) // 2)
        lengths = norms(gram)
        scale = inverse(lengths)
        units, back = points(scale[:, None] * gram * scale[None, :])  # ĝ_i in r ≤ p dimensions
        vectors = units if self.normalise else units * lengths
        y, ratios = self.subspace(units, vectors, m, np.zeros(n))[:2]
        result = y @ (y.T @ vectors.sum(axis=1))  # Y Yᵀ G 1
        divisor = m if self.scaling == "authors" else n
        return Verdict(scale * (back @ result) / divisor, np.clip(ratios, 0.0, 1.0))

    def subspace(
        self, units: Floats, vectors: Floats, m: int, ratios: Floats, pair_ratios: Floats | None = None
    ) -> tuple[Floats, Floats, list[float]]:
        """Y (r, m), the ratios v (p,) and the objective after each step, the first before it.

        ``units`` (r, p): ĝ_i; ``vectors`` (r, p): those whose differences are the pairs; ``ratios`` (p,),
        ``pair_ratios`` (p, p): v_i and v_ij (authors: ‖Yᵀ(g_i - g_j)‖²) of the Y to begin with.
        """
        pairs = Pairs(self, vectors) if self.lam else None
        between = np.zeros((len(ratios), len(ratios))) if pair_ratios is None else pair_ratios
        objectives = [self._objective(ratios, pairs, between)]
        y = np.zeros((len(units), min(m, len(units))))
        for _ in range(self.iterations):
            squares = (units * (np.abs(1.0 - ratios) + _EPSILON) ** -0.5) @ units.T  # Σ w_i² ĝ_i ĝ_iᵀ
            if pairs is not None:
                squares = squares + pairs.squares(between)
            before = y, ratios
            y = np.linalg.eigh(squares)[1][:, ::-1][:, :m]
            ratios = ((y.T @ units) ** 2).sum(axis=0)
            if pairs is not None:
                between = pairs.ratios(y)
            objectives.append(self._objective(ratios, pairs, between))
            gain = objectives[-2] - objectives[-1]
            if gain <= 0 and len(objectives) > 2:
                return *before, objectives[:-1]
            if gain <= self.tolerance or objectives[-1] <= self.tolerance:
                break
        return y, ratios, objectives

    def _objective(self, ratios: Floats, pairs: Pairs | None, between: Floats) -> float:
        total = float(np.sqrt(np.maximum(1.0 - ratios, 0.0)).sum())
        if pairs is not None and self.pairs == "paper":
            total += pairs.factor * float((pairs.apart * np.sqrt(np.maximum(1.0 - between, 0.0))).sum())
        return total


class Pairs:
    """The differences g_i - g_j of all ordered pairs, without writing them down: Σ ω_ij (g_i - g_j)(g_i - g_j)ᵀ over
    them is 2 G (diag(ω 1) - ω) Gᵀ."""

    def __init__(self, rule: Flag, vectors: Floats) -> None:
        p = vectors.shape[1]
        self.vectors = vectors
        self.authors = rule.pairs == "authors"
        self.factor = rule.lam / max(p - 1, 1)
        self.lam = rule.lam / max(p * (p - 1), 1)
        self.lengths = self._squares(vectors)
        sizes = (vectors**2).sum(axis=0)
        self.lengths[self.lengths <= _EQUAL * (sizes[:, None] + sizes[None, :])] = 0.0
        self.apart = (self.lengths > 0).astype(np.float64)

    def _squares(self, rows: Floats) -> Floats:
        """(p, p): squared distances between the columns."""
        return np.stack([((rows - column[:, None]) ** 2).sum(axis=0) for column in rows.T])

    def ratios(self, y: Floats) -> Floats:
        within = self._squares(y.T @ self.vectors)
        return within if self.authors else within * inverse(self.lengths)

    def squares(self, between: Floats) -> Floats:
        omega = (np.abs(1.0 - between) + _EPSILON) ** -0.5
        omega = omega * self.lam**2 if self.authors else omega * self.factor * inverse(self.lengths)
        np.fill_diagonal(omega, 0.0)
        laplacian = np.diag(omega.sum(axis=1)) - omega
        result: Floats = 2.0 * self.vectors @ laplacian @ self.vectors.T
        return result
