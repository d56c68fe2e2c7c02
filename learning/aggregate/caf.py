"""CAF: covariance-bound agnostic filter (Allouah, Guerraoui, Stephan, ICML 2025)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Floats, GramRule, Verdict, count, majority


@attrs.frozen
class CAF(GramRule):
    """Weighs down what lies far out along the direction in which the vectors vary most; n > 2 ``f``.

    From c_i = 1, while Σ c > n - 2 f: μ = Σ c_i x_i / Σ c; (λ, v): the largest eigenvalue of
    Σ c_i (x_i - μ)(x_i - μ)ᵀ / Σ c and its vector; τ_i = ⟨v, x_i - μ⟩²; c_i ← c_i (1 - τ_i / max τ). The result is the
    μ with the smallest λ. Quality: c of that μ.

    The maximum is taken over vectors with c_i > 0, so each step removes one. (byzfl takes it over all, and v from one
    step of a power iteration from a random start.)
    """

    name: ClassVar[str] = "caf"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def decide(self, gram: Floats, n: int) -> Verdict:
        c = np.ones(n)
        best, smallest = c, np.inf
        while (total := c.sum()) > n - 2 * self.f:
            mu = c / total
            products = gram @ mu
            centred = gram - products[:, None] - products[None, :] + mu @ products  # ⟨x_i - μ, x_j - μ⟩
            roots = np.sqrt(mu)
            values, vectors = np.linalg.eigh(roots[:, None] * centred * roots[None, :])
            largest = max(float(values[-1]), 0.0)
            if largest < smallest:
                best, smallest = c, largest
            if largest <= n * np.finfo(np.float64).eps * float(np.diag(gram).max(initial=0.0)):
                break  # all the same but for rounding
            tau = (centred @ (roots * vectors[:, -1])) ** 2 / largest  # v = Σ roots_i u_i (x_i - μ) / √λ
            c = c * np.maximum(1.0 - tau / tau[c > 0].max(), 0.0)
        return Verdict(best / best.sum(), best)
