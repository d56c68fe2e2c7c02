"""Minimum diameter averaging (El Mhamdi et al., PODC 2020)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from ...transport.errors import ConfigError
from .. import defaults
from .base import Floats, GramRule, Verdict, count, majority
from .geometry import choose, squared_distances


@attrs.frozen
class MDA(GramRule):
    """The mean of the n - ``f`` vectors whose largest distance among each other is smallest; n > 2 f.

    Of several such sets the first, as places ascend. Exact: with all pairs further apart than t as edges of a graph,
    n - f vectors of diameter ≤ t are what a vertex cover of f leaves over. Quality: 1 for those in the set.
    """

    name: ClassVar[str] = "mda"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)
        if self.f > defaults.MDA_MAX_F:
            raise ConfigError(f"mda: f = {self.f} takes too long; at most {defaults.MDA_MAX_F}")

    def decide(self, gram: Floats, n: int) -> Verdict:
        squares = squared_distances(gram)
        diameters = np.unique(squares)
        low, high = 0, len(diameters) - 1  # the smallest diameter at which f vectors can be left out
        while low < high:
            middle = (low + high) // 2
            if coverable(squares > diameters[middle], self.f):
                high = middle
            else:
                low = middle + 1
        far = squares > diameters[low]
        out = np.zeros(n, dtype=np.bool_)
        members: list[int] = []
        for i in range(n):
            without = out | far[i]  # what i cannot stand beside
            rest = far & ~without[:, None] & ~without[None, :]
            budget = self.f - int(without.sum())
            if len(members) == n - self.f or out[i] or budget < 0 or not coverable(rest, budget):
                out[i] = True
            else:
                members.append(i)
                out = without
        return Verdict(*choose(n, np.array(members)))


def coverable(edges: NDArray[np.bool_], f: int) -> bool:
    """Whether some ``f`` vertices touch all ``edges`` (n, n): one of the busiest vertex and its neighbours must go."""
    degrees = edges.sum(axis=1)
    busiest = int(np.argmax(degrees))
    most = int(degrees[busiest])
    if most == 0:
        return True
    if most * f < int(degrees.sum()) // 2:
        return False
    neighbours = np.flatnonzero(edges[busiest])
    rest = edges.copy()
    rest[busiest, :] = rest[:, busiest] = False
    if most == 1 or coverable(rest, f - 1):
        return True  # edges that do not meet, as many as f at most
    rest[neighbours, :] = rest[:, neighbours] = False
    return most <= f and coverable(rest, f - most)
