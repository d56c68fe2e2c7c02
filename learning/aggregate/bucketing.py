"""Bucketing: means of a few vectors drawn at random (Karimireddy, He, Jaggi 2022, arXiv 2006.09365, Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Before, Floats, positive


@attrs.frozen
class Bucketing(Before):
    """Means of ``s`` vectors each, in the order of a permutation; the last bucket may hold fewer.

    The permutation comes from ``seed`` and the round's seed, so all members draw the same. A bucket with one liar in it
    is spoilt: f of n vectors are up to f of ⌈n/s⌉ buckets.
    """

    name: ClassVar[str] = "bucketing"

    s: int = attrs.field(default=2, validator=positive)
    seed: int = 0

    def rows(self, n: int) -> int:
        return -(-n // self.s)

    def matrix(self, gram: Floats, seed: int) -> Floats:
        n = len(gram)
        order = np.random.default_rng([abs(self.seed), abs(seed)]).permutation(n)
        mixing = np.zeros((self.rows(n), n))
        for row, start in enumerate(range(0, n, self.s)):
            bucket = order[start : start + self.s]
            mixing[row, bucket] = 1.0 / len(bucket)
        return mixing
