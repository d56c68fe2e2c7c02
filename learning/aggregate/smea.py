"""SMEA: smallest maximum eigenvalue averaging (Allouah et al., ICML 2023)."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import attrs
import numpy as np

from ...transport.errors import ConfigError
from .. import defaults
from .base import Floats, GramRule, Verdict, count, majority
from .geometry import choose

#: Sets whose eigenvalues are computed in one call.
_BATCH = 1024


@attrs.frozen
class SMEA(GramRule):
    """The mean of the n - ``f`` vectors whose covariance has the smallest largest eigenvalue; n > 2 f.

    Looks at all C(n, f) sets, and refuses where there are more than ``defaults.SMEA_MAX_SETS``. Of sets that are equal
    within rounding the first. Quality: 1 for those in the set.
    """

    name: ClassVar[str] = "smea"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)
        if math.comb(n, self.f) > defaults.SMEA_MAX_SETS:
            raise ConfigError(
                f"smea: f = {self.f} of {n} vectors means {math.comb(n, self.f)} sets; at most {defaults.SMEA_MAX_SETS}"
            )

    def decide(self, gram: Floats, n: int) -> Verdict:
        sets = itertools.combinations(range(n), n - self.f)
        best, smallest = np.arange(n - self.f), np.inf
        while batch := list(itertools.islice(sets, _BATCH)):
            members = np.array(batch)
            grams = gram[members[:, :, None], members[:, None, :]]
            means = grams.mean(axis=2)
            centred = grams - means[:, :, None] - means[:, None, :] + means.mean(axis=1)[:, None, None]
            largest = np.linalg.eigvalsh(centred)[:, -1]
            first = int(np.argmin(largest))
            if largest[first] < smallest * (1 - defaults.AGGREGATE_TIE):
                best, smallest = members[first], float(largest[first])
        return Verdict(*choose(n, best))
