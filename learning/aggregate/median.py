"""The median of each coordinate (Yin et al. 2018, arXiv 1803.01498, Definition 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
from torch import Tensor

from ..reduce import kernels
from .base import CoordinateRule
from .order import middle


@attrs.frozen
class Median(CoordinateRule):
    """The middle value; of an even number, the mean of the two in the middle. Tolerates any f with n > 2 f."""

    name: ClassVar[str] = "median"

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float] | None, out: Tensor) -> bool:
        n = len(rows)
        return middle(rows, range((n - 1) // 2, n // 2 + 1), kernels.MEDIAN, 0, 1, out)
