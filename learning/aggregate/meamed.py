"""Mean around the median of each coordinate (Xie, Koyejo, Gupta 2018, arXiv 1802.10116)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from ..reduce import kernels
from .base import CoordinateRule, count, majority
from .order import middle


@attrs.frozen
class Meamed(CoordinateRule):
    """The mean of the n - ``f`` values nearest to the median; of two equally near, the smaller; n > 2 f."""

    name: ClassVar[str] = "meamed"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float] | None, out: Tensor) -> bool:
        return middle(rows, range(len(rows)), kernels.AROUND, self.f, len(rows) - self.f, out)
