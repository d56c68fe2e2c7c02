"""Krum and Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757), in each of the definitions that are about."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Floats, GramRule, Verdict, count, majority, one_of, tolerance
from .geometry import choose, nearest, squared_distances

DEFINITIONS = ("blanchard", "byzfl", "garfield")


@attrs.frozen
class Krum(GramRule):
    """The vector with the smallest score s(i) = Σ_{i→j} ‖x_i - x_j‖² over its nearest others (Section 4).

    ``definition``: how many others, and which distance. They choose different vectors in a fifth to a third of random
    cases.

    * ``blanchard``: n - f - 2 nearest, squared distances, n ≥ 2 f + 3: the paper's (and flwr's);
    * ``byzfl``: n - f - 1 nearest, squared, n > 2 f;
    * ``garfield``: n - f - 1 nearest, distances not squared, n ≥ 2 f + 3 (garfield and the Flag authors' repository).

    Of equal scores the first wins. Quality: 1 for the chosen, 0 for the others.
    """

    name: ClassVar[str] = "krum"

    f: int = attrs.field(validator=count)
    definition: str = attrs.field(default="blanchard", validator=one_of(*DEFINITIONS))

    def check(self, n: int) -> None:
        if self.definition == "byzfl":
            majority(self, n, self.f)
        else:
            tolerance(self, n, self.f, 2 * self.f + 3, "n >= 2 f + 3")

    def decide(self, gram: Floats, n: int) -> Verdict:
        return Verdict(*choose(n, nearest(scores(gram, self.f, self.definition), 1)))


@attrs.frozen
class MultiKrum(Krum):
    """The mean of the ``keep`` vectors with the smallest scores.

    ``keep`` 0 is what the definition says: n - f - 2 (``blanchard``, ``garfield``), n - f (``byzfl``).
    """

    name: ClassVar[str] = "multikrum"

    keep: int = attrs.field(default=0, validator=count)

    def check(self, n: int) -> None:
        super().check(n)
        tolerance(self, n, self.f, self.keep, f"keep = {self.keep}")

    def decide(self, gram: Floats, n: int) -> Verdict:
        keep = self.keep or n - self.f - (0 if self.definition == "byzfl" else 2)
        return Verdict(*choose(n, nearest(scores(gram, self.f, self.definition), keep)))


def scores(gram: Floats, f: int, definition: str) -> Floats:
    """s (n,). Added in ascending order, so that equal distances give equal scores on every machine."""
    others = len(gram) - f - (2 if definition == "blanchard" else 1)
    distances = squared_distances(gram)
    if definition == "garfield":
        distances = np.sqrt(distances)
    np.fill_diagonal(distances, -1.0)  # first in its row
    ordered = np.sort(distances, axis=1)[:, 1:]
    if not others:
        return np.zeros(len(gram))
    totals: Floats = np.cumsum(ordered, axis=1)[:, others - 1]
    return totals
