"""The geometric median by Weiszfeld's iteration, smoothed (RFA: Pillutla, Kakade, Harchaoui 2022, arXiv 1912.13445)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .. import defaults
from .base import Floats, GramRule, Verdict, count, not_negative, one_of, positive
from .geometry import inverse, squared_distances, squared_distances_to


@attrs.frozen
class GeometricMedian(GramRule):
    """z = argmin Σ ‖x_i - z‖, where a distance below ``nu`` counts as (‖·‖²/ν + ν)/2 (RFA's smoothed objective).

    Algorithm 2: β_i = 1 / max(ν, ‖x_i - z‖), z ← Σ β_i x_i / Σ β_i, until a step is shorter than ``tolerance`` times
    the mean distance, at most ``iterations`` times. From z = 0; but where a vector is itself the median, which the
    iteration may approach too slowly, from there (unless ``tolerance`` is 0). Tolerates any f with n > 2 f.

    ``nu`` is in median distances ‖x_i - z‖ (of each step; where that is 0, in smallest ones above), with
    ``unit=length`` a length, as in the paper: vectors much smaller than that would just be averaged. byzfl's is
    ``nu=0.1,unit=length,iterations=3,tolerance=0``, which has not converged. Quality: β_i over the largest.
    """

    name: ClassVar[str] = "geometric_median"

    nu: float = attrs.field(default=1e-6, validator=positive)
    tolerance: float = attrs.field(default=1e-9, validator=not_negative)
    unit: str = attrs.field(default="median", validator=one_of("median", "length"))
    iterations: int = attrs.field(default=defaults.AGGREGATE_ITERATIONS, validator=count)

    def decide(self, gram: Floats, n: int) -> Verdict:
        z = at_a_vector(gram) if self.tolerance else np.zeros(n)
        beta = np.ones(n)
        for _ in range(self.iterations):
            distances = np.sqrt(squared_distances_to(gram, z))
            beta = 1.0 / np.maximum(distances, self.nu * (scale(distances) if self.unit == "median" else 1.0))
            before, z = z, beta / beta.sum()
            step = z - before
            if step @ gram @ step <= (self.tolerance * distances.mean()) ** 2:
                break
        return Verdict(z, beta / beta.max())


def scale(distances: Floats) -> float:
    """The median distance; where that is 0, the smallest above; where all are 0, 1."""
    above = distances[distances > 0]
    return float(np.median(distances)) or (float(above.min()) if len(above) else 1.0)


def at_a_vector(gram: Floats) -> Floats:
    """Coefficients of the vector that is the geometric median, zeros when none is: x_i is, when the unit vectors from
    it to the others add up to no more than the number of vectors that lie at x_i (Kuhn 1973)."""
    distances = np.sqrt(squared_distances(gram))
    pulls = inverse(distances)  # Σ_j (x_j - x_i) / ‖x_j - x_i‖ = X (pulls_i - (Σ_j pulls_ij) e_i)
    pulls -= np.diag(pulls.sum(axis=1))
    lengths = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", pulls, gram, pulls), 0.0))
    median = np.zeros(len(gram))
    excess = lengths - (distances == 0).sum(axis=1)
    best = int(np.argmin(excess))
    median[best] = float(excess[best] <= 0)
    return median
