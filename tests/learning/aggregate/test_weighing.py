"""Rules that weigh vectors (geometric median, centered clipping, CAF) against their definitions, and byzfl."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.learning.aggregate import aggregate
from tests.learning.aggregate.cases import Floats, byzfl, examples, needs_byzfl


def near(ours: Floats, theirs: Floats, scale: float, tolerance: float = 2e-6) -> bool:
    return bool(np.abs(ours - theirs).max() <= tolerance * scale + 1e-30)


def total_distance(x: Floats, z: Floats) -> float:
    return float(np.linalg.norm(x - z, axis=1).sum())


def test_nothing_lies_nearer_to_all_than_the_geometric_median_in_a_thousand_cases() -> None:
    rng = np.random.default_rng(1)
    for case in examples(1000):
        result = aggregate(case.x, "geometric_median")
        assert result.coefficients is not None
        x = case.wide
        z = result.coefficients @ x
        least = total_distance(x, z)
        spread = least / case.n
        # Convex: what no neighbour and no vector itself betters is the minimum.
        others = [*x, *(z + spread * scale * rng.standard_normal(x.shape[1]) for scale in (1e-1, 1e-2, 1e-3, 1e-4))]
        assert least <= min(total_distance(x, other) for other in others) + 2e-6 * case.n + 1e-9 * least, case
        assert near(result.vector.numpy(), z, float(np.abs(result.coefficients) @ np.abs(x).max(axis=1)))


def test_a_majority_at_one_place_is_the_geometric_median() -> None:
    x = np.random.default_rng(1).standard_normal((9, 20)).astype(np.float32) * 100
    x[:5] = x[0]
    assert np.allclose(aggregate(x, "geometric_median").vector, x[0], atol=1e-4)


@needs_byzfl
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_geometric_median_takes_the_steps_of_byzfl_in_a_thousand_cases(steps: int) -> None:
    text = f"geometric_median:nu=0.1,unit=length,iterations={steps},tolerance=0"
    for case in examples(1000):
        ours = aggregate(case.x, text).vector.numpy()
        theirs = byzfl.GeometricMedian(nu=0.1, T=steps)(case.wide)
        assert near(ours, theirs, float(np.median(np.abs(case.wide).max(axis=1))) + 1.0), case


def test_tiny_vectors_have_a_median_too() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((9, 20)) * 1e-9).astype(np.float32)
    x[:3] = 1e-4
    for text in ("geometric_median", "centered_clipping:iterations=20"):
        assert np.abs(aggregate(x, text).vector.numpy()).max() < 4e-9
        assert np.abs(aggregate(x, f"{text}{',' if ':' in text else ':'}unit=length").vector.numpy()).max() > 5e-8


def clip_around(x: Floats, v: Floats, tau: float, steps: int, median: bool) -> Floats:
    for _ in range(steps):
        lengths = np.linalg.norm(x - v, axis=1)
        bound = tau * np.median(lengths) if median else tau
        share = np.minimum(1.0, np.divide(bound, lengths, out=np.ones(len(x)), where=lengths > 0))
        v = v + ((x - v) * share[:, None]).mean(axis=0)
    return v


def test_centered_clipping_agrees_with_the_definition_in_a_thousand_cases() -> None:
    rng = np.random.default_rng(1)
    for number, case in enumerate(examples(1000)):
        steps, tau, median = number % 3 + 1, float(rng.choice([0.5, 2.0, 50.0])), number % 2 == 1
        text = f"centered_clipping:tau={tau},iterations={steps},unit={'median' if median else 'length'}"
        last = None if number % 5 == 0 else rng.standard_normal(case.x.shape[1]).astype(np.float32)
        v = np.zeros(case.x.shape[1]) if last is None else last.astype(np.float64)
        ours = aggregate(case.x, text, reference=None if last is None else torch.from_numpy(last)).vector.numpy()
        theirs = clip_around(case.wide, v, tau, steps, median)
        size = float(np.abs(theirs).max()) + float(np.median(np.abs(case.wide).max(axis=1))) + 1.0
        assert near(ours, theirs, size, 4e-6), case


@needs_byzfl
def test_centered_clipping_remembers_what_byzfl_does_round_after_round() -> None:
    for case in examples(200, kinds=("normal", "outliers")):
        stateful = byzfl.CenteredClipping(L=2, tau=2.0)
        last = None
        for _ in range(3):
            theirs = stateful(case.wide)
            last = aggregate(case.x, "centered_clipping:tau=2,iterations=2,unit=length", reference=last).vector
            assert near(last.numpy(), theirs, float(np.median(np.abs(case.wide).max(axis=1))) + 1.0, 5e-6), case


def caf(x: Floats, f: int) -> tuple[Floats, bool]:
    """The result, and whether a direction was ambiguous on the way."""
    c, best, smallest, vague = np.ones(len(x)), x.mean(axis=0), np.inf, False
    while c.sum() > len(x) - 2 * f:
        mu = c @ x / c.sum()
        apart = x - mu
        values, vectors = np.linalg.eigh((c[:, None] * apart).T @ apart / c.sum())
        if values[-1] <= 1e-12 * (x**2).sum(axis=1).max():
            return (mu if values[-1] < smallest else best), vague
        vague |= bool(len(values) > 1 and values[-2] > (1 - 1e-6) * values[-1])
        vague |= bool(abs(values[-1] - smallest) < 1e-9 * values[-1])
        if values[-1] < smallest:
            best, smallest = mu, float(values[-1])
        tau = (apart @ vectors[:, -1]) ** 2
        most = tau[c > 0].max()
        vague |= bool((np.abs(tau[c > 0] - most) < 1e-6 * most).sum() > 1)
        c = c * np.maximum(1 - tau / most, 0)
    return best, vague


def test_caf_agrees_with_the_definition_in_a_thousand_cases() -> None:
    compared = 0
    for case in examples(1500):
        result = aggregate(case.x, f"caf:f={case.f}")
        theirs, vague = caf(case.wide, case.f)
        assert result.coefficients is not None and abs(result.coefficients.sum() - 1) < 1e-9
        if vague:
            continue
        compared += 1
        size = float(np.abs(result.coefficients) @ np.abs(case.wide).max(axis=1)) + 1e-12
        assert near(result.vector.numpy(), theirs, size, 1e-5), case
    assert compared >= 1000


@pytest.mark.parametrize("text", ["geometric_median", "caf:f=2", "centered_clipping:tau=2,unit=median"])
def test_weights_follow_the_vectors_when_these_are_permuted_moved_or_scaled(text: str) -> None:
    rng = np.random.default_rng(5)
    for case in examples(40, sizes=(9,), kinds=("normal",), d=10):
        reference = None if "caf" in text or "geometric" in text else torch.zeros(10)
        first = aggregate(case.x, text, reference=reference).vector.numpy()
        again = aggregate(case.x[rng.permutation(9)], text, reference=reference).vector.numpy()
        assert near(again, first, 4.0, 2e-5)
        assert near(aggregate(case.x * np.float32(4), text, reference=reference).vector.numpy(), 4 * first, 16.0, 2e-5)
        moved = None if reference is None else torch.full((10,), 3.0)
        shifted = aggregate(case.x + np.float32(3), text, reference=moved).vector.numpy()
        assert near(shifted, first + 3, 16.0, 2e-5)
