"""Centered clipping around the last result (Karimireddy, He, Jaggi 2021, arXiv 2012.10333)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Floats, GramRule, Verdict, count, one_of, positive
from .geometry import squared_distances_to


@attrs.frozen
class CenteredClipping(GramRule):
    """v ← v + (1/n) Σ (x_i - v) min(1, τ / ‖x_i - v‖), ``iterations`` times, from the last result, or from 0.

    With ``start=last`` (where there is a last result) that is one more row of the Gram matrix: the rule itself has no
    state. With ``start=zero`` it looks at nothing but the round; then it needs a few iterations. ``tau`` is in median
    distances ‖x_i - v‖ (of each iteration), which follow the size of the vectors; with ``unit=length`` a length, as in
    the paper. Quality: min(1, τ / ‖x_i - v‖) of the last iteration.
    """

    name: ClassVar[str] = "centered_clipping"
    tau: float = attrs.field(default=1.0, validator=positive)
    iterations: int = attrs.field(default=1, validator=count)
    unit: str = attrs.field(default="median", validator=one_of("median", "length"))
    start: str = attrs.field(default="last", validator=one_of("last", "zero"))

    @property
    def reference(self) -> bool:
        return self.start == "last"

    def pivot_of(self, p: int) -> int | None:
        # The first iteration starts at the last row or, without one, at 0, from where squares are enough.
        return p - 1 if self.iterations <= 1 else None

    def decide(self, gram: Floats, n: int) -> Verdict:
        v = np.zeros(len(gram))
        v[n:] = 1.0
        share = np.ones(n)
        for _ in range(self.iterations):
            distances = np.sqrt(squared_distances_to(gram, v))[:n]
            tau = self.tau * (float(np.median(distances)) if self.unit == "median" else 1.0)
            share = np.divide(tau, distances, out=np.ones(n), where=distances > tau)
            v *= 1.0 - share.sum() / n
            v[:n] += share / n
        return Verdict(v, share)
