"""The geometric median by Weiszfeld's iteration, smoothed (RFA: Pillutla, Kakade, Harchaoui 2022, arXiv 1912.13445)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .. import defaults
from .base import Floats, GramRule, Verdict, count, not_negative, positive
from .geometry import squared_distances_to


@attrs.frozen
class GeometricMedian(GramRule):
    """z = argmin Σ ‖x_i - z‖, where a distance below ``nu`` counts as (‖·‖²/ν + ν)/2 (RFA's smoothed objective).

    Algorithm 2: β_i = 1 / max(ν, ‖x_i - z‖), z ← Σ β_i x_i / Σ β_i, from z = 0, until a step is shorter than
    ``tolerance`` times the mean distance, at most ``iterations`` times. Tolerates any f with n > 2 f.

    byzfl's is ``nu=0.1,iterations=3,tolerance=0``, which has not converged. Quality: β_i over the largest.
    """

    name: ClassVar[str] = "geometric_median"

    nu: float = attrs.field(default=1e-6, validator=positive)
    tolerance: float = attrs.field(default=1e-9, validator=not_negative)
    iterations: int = attrs.field(default=defaults.AGGREGATE_ITERATIONS, validator=count)

    def decide(self, gram: Floats, n: int) -> Verdict:
        z = np.zeros(n)
        beta = np.ones(n)
        for _ in range(self.iterations):
            distances = np.sqrt(squared_distances_to(gram, z))
            beta = 1.0 / np.maximum(distances, self.nu)
            before, z = z, beta / beta.sum()
            step = z - before
            if step @ gram @ step <= (self.tolerance * distances.mean()) ** 2:
                break
        return Verdict(z, beta / beta.max())
