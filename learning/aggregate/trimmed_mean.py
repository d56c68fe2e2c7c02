"""The trimmed mean of each coordinate (Yin et al. 2018, arXiv 1803.01498, Definition 2, with β = f/n)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from ..reduce import kernels
from .base import CoordinateRule, count, majority
from .order import middle


@attrs.frozen
class TrimmedMean(CoordinateRule):
    """The mean of what is left when the ``f`` smallest and the f largest values are removed; n > 2 f."""

    name: ClassVar[str] = "trimmed_mean"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float] | None, out: Tensor) -> bool:
        n = len(rows)
        return middle(rows, range(self.f, n - self.f), kernels.TRIMMED, self.f, n - 2 * self.f, out)
