"""MoNNA: mean of the nearest neighbours of one trusted vector (Farhadkhani et al., ICML 2023)."""

from __future__ import annotations

from typing import ClassVar

import attrs

from .base import Floats, GramRule, Verdict, count, majority, tolerance
from .geometry import choose, nearest, squared_distances


@attrs.frozen
class MoNNA(GramRule):
    """The mean of the n - ``f`` vectors nearest to that of the member at place ``pivot``, itself included; n > 2 f.

    The paper's peers each take their own vector as pivot and get different results. Where all need one result, the
    pivot must be honest: the rule then tolerates f others. Of equally near ones the first. Quality: 1 for those taken.
    """

    name: ClassVar[str] = "monna"

    f: int = attrs.field(validator=count)
    pivot: int = attrs.field(default=0, validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)
        tolerance(self, n, self.f, self.pivot + 1, f"pivot = {self.pivot}, counted from 0")

    def pivot_of(self, p: int) -> int:
        return self.pivot

    def decide(self, gram: Floats, n: int) -> Verdict:
        distances = squared_distances(gram)[self.pivot]
        distances[self.pivot] = -1.0
        return Verdict(*choose(n, nearest(distances, n - self.f)))
