"""The mean, weighted: what every rule is compared with. One liar moves it wherever it likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import numpy as np
from torch import Tensor

from .. import exact
from .base import CoordinateRule, Floats


@attrs.frozen
class Mean(CoordinateRule):
    """Σ c_i x_i with c_i = w_i / Σ w; without weights 1/n each. Tolerates f = 0."""

    name: ClassVar[str] = "mean"

    def linear(self, n: int) -> Floats:
        return np.full(n, 1.0 / n)

    def combine(self, rows: Sequence[Tensor], weights: Sequence[float] | None, out: Tensor) -> bool:
        exact.weighted_mean(rows, [1.0] * len(rows) if weights is None else weights, out=out)
        # What is not finite stays so in a sum, even with a weight of 0; but a sum of finite values may overflow.
        return exact.check_finite(out) is None or all(exact.check_finite(row) is None for row in rows)
