"""Errors of rules under attack as an independent implementation measured them (docs/aggregation.md has the table)."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.learning.aggregate import aggregate
from tests.learning.aggregate.cases import Floats

#: Relative error and cosine to the honest mean: rand[0,1), randn, -10 x, a little is enough (1.5); 20 seeds.
KNOWN = {
    "mean": [(2.12, 0.383), (2.34, 0.328), (2.50, -0.78), (0.30, 0.961)],
    "flag:scaling=paper,normalise=false": [(2.12, 0.377), (2.34, 0.327), (2.51, -0.79), (0.33, 0.951)],
    "flag": [(0.48, 0.956), (0.47, 0.981), (0.60, 0.987), (0.38, 0.973)],
    "median": [(0.37, 0.942), (0.28, 0.966), (0.31, 0.962), (0.38, 0.938)],
    "geometric_median": [(0.22, 0.977), (0.14, 0.991), (0.21, 0.995), (0.25, 0.973)],
    "multikrum:f=3,definition=byzfl": [(0.0, 1.0)] * 4,
    "nnm+trimmed_mean:f=3": [(0.0, 1.0)] * 4,
}


def attacked(attack: int, seed: int, d: int = 400, p: int = 15, f: int = 3) -> tuple[Floats, Floats]:
    """(p, d) vectors: a signal and noise of length 1 each, the first f by liars; and the mean of the honest ones."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal(d)
    x = signal / np.linalg.norm(signal) + rng.standard_normal((p, d)) / np.sqrt(d)
    mean = x[f:].mean(axis=0)
    lies = (
        lambda: rng.random((f, d)),
        lambda: rng.standard_normal((f, d)),
        lambda: -10 * x[:f],
        lambda: np.tile(mean + 1.5 * x[f:].std(axis=0, ddof=1), (f, 1)),
    )
    x[:f] = lies[attack]()
    return x, mean


@pytest.mark.parametrize("text", KNOWN)
def test_errors_under_attack_are_those_of_the_reference(text: str) -> None:
    for attack, (error, cosine) in enumerate(KNOWN[text]):
        errors, cosines = [], []
        for seed in range(20):
            x, mean = attacked(attack, seed)
            result = aggregate(x.astype(np.float32), text).vector.numpy().astype(np.float64)
            if text == "flag":
                result *= 8 / 15  # m/p
            errors.append(np.linalg.norm(result - mean) / np.linalg.norm(mean))
            cosines.append(result @ mean / np.linalg.norm(result) / np.linalg.norm(mean))
        assert abs(np.mean(errors) - error) < 0.02 + 0.1 * error
        assert abs(np.mean(cosines) - cosine) < 0.01 + 0.2 * (1 - cosine)


def test_flag_is_nearly_the_sum_of_unit_vectors() -> None:
    for d in (400, 5000):
        for attack, least in ((1, 0.995), (2, 0.95)):
            x, _ = attacked(attack, 1, d)
            units = (x / np.linalg.norm(x, axis=1, keepdims=True)).sum(axis=0)
            result = aggregate(x.astype(np.float32), "flag").vector.numpy().astype(np.float64)
            assert result @ units / np.linalg.norm(result) / np.linalg.norm(units) > least


def test_the_ratios_of_flag_do_not_tell_liars() -> None:
    found = []
    for seed in range(20):
        quality = aggregate(attacked(1, seed)[0].astype(np.float32), "flag").quality
        assert quality is not None
        found.append((quality[:3].mean(), quality[3:].mean()))
    liars, honest = np.mean(found, axis=0)
    assert liars > honest + 0.1
