"""Nearest-neighbour mixing (Allouah et al. 2023, arXiv 2302.01772, Algorithm 2)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Before, Floats, count, majority
from .geometry import nearest, squared_distances


@attrs.frozen
class NNM(Before):
    """Each vector becomes the mean of the n - ``f`` nearest to it, itself included; of equally near ones the first."""

    name: ClassVar[str] = "nnm"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def matrix(self, gram: Floats, seed: int) -> Floats:
        n = len(gram)
        distances = squared_distances(gram)
        np.fill_diagonal(distances, -1.0)
        mixing = np.zeros((n, n))
        np.put_along_axis(mixing, nearest(distances, n - self.f), 1.0 / (n - self.f), axis=1)
        return mixing
