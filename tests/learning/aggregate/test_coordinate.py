"""Coordinate-wise rules against their definitions in numpy, and byzfl."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.learning import exact
from shoal.learning.aggregate import aggregate, resolve
from shoal.learning.aggregate.order import network
from shoal.learning.reduce import kernels, pure_kernels
from tests.learning.aggregate.cases import Floats, byzfl, examples, needs_byzfl

#: (float64 result, mean magnitude of what was averaged): the error of float32 is relative to the second.
Answer = tuple[Floats, Floats]


def mean_of(chosen: Floats) -> Answer:
    return chosen.mean(axis=0), np.abs(chosen).mean(axis=0)


def mean(x: NDArray[np.float32], f: int) -> Answer:
    return mean_of(x.astype(np.float64))


def median(x: NDArray[np.float32], f: int) -> Answer:
    ordered = np.sort(x.astype(np.float64), axis=0)
    return mean_of(ordered[(len(x) - 1) // 2 : len(x) // 2 + 1])


def trimmed_mean(x: NDArray[np.float32], f: int) -> Answer:
    return mean_of(np.sort(x.astype(np.float64), axis=0)[f : len(x) - f])


def meamed(x: NDArray[np.float32], f: int) -> Answer:
    ordered = np.sort(x, axis=0)
    half = np.float32(0.5)
    middle = half * ordered[(len(x) - 1) // 2] + half * ordered[len(x) // 2]
    nearest = np.argsort(np.abs(ordered - middle), axis=0, kind="stable")[: len(x) - f]
    return mean_of(np.take_along_axis(ordered, nearest, axis=0).astype(np.float64))


RULES: dict[str, Callable[[NDArray[np.float32], int], Answer]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean:f={f}": trimmed_mean,
    "meamed:f={f}": meamed,
}


@pytest.fixture(params=["native", "pure"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure":
        monkeypatch.setattr(kernels, "active", pure_kernels)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("text", RULES)
def test_a_thousand_random_cases_agree_with_the_definition(text: str) -> None:
    for case in examples(1000):
        ours = aggregate(case.x, text.format(f=case.f)).vector.numpy()
        theirs, size = RULES[text](case.x, case.f)
        assert (np.abs(ours - theirs) <= 1e-6 * size + 1e-30).all(), (case.kind, case.f, case.x)


@needs_byzfl
@pytest.mark.parametrize(
    ("text", "name"),
    [("median", "Median"), ("trimmed_mean:f={f}", "TrMean"), ("meamed:f={f}", "Meamed"), ("mean", "Average")],
)
def test_a_thousand_random_cases_agree_with_byzfl(text: str, name: str) -> None:
    # Of values equally near to the median byzfl takes any.
    kinds = ("normal", "duplicates", "outliers", "shifted") if name == "Meamed" else None
    for case in examples(1000, **({} if kinds is None else {"kinds": kinds})):  # type: ignore[arg-type]
        arguments: dict[str, Any] = {"f": case.f} if "{f}" in text else {}
        ours = aggregate(case.x, text.format(**arguments)).vector.numpy()
        theirs = getattr(byzfl, name)(**arguments)(case.wide)
        size = np.sort(np.abs(case.wide), axis=0)[: case.n - (case.f if arguments else 0)].max(axis=0)
        assert (np.abs(ours - theirs) <= 2e-6 * size + 1e-30).all(), (case.kind, case.f, case.x)


@pytest.mark.parametrize("text", ["median", "trimmed_mean:f={f}", "meamed:f={f}"])
def test_the_order_of_the_contributions_does_not_change_a_bit(text: str) -> None:
    rng = np.random.default_rng(2)
    for case in examples(100):
        rule = text.format(f=case.f)
        one = aggregate(case.x, rule).vector
        other = aggregate(case.x[rng.permutation(case.n)], rule).vector
        assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("text", list(RULES))
def test_a_shift_or_a_scale_of_all_contributions_is_one_of_the_result(text: str) -> None:
    for case in examples(100, kinds=("ties", "normal", "outliers")):
        rule = text.format(f=case.f)
        result = aggregate(case.x, rule).vector.numpy()
        quadruple = aggregate(case.x * np.float32(4.0), rule).vector.numpy()
        assert np.array_equal(quadruple, 4 * result)  # powers of two change no rounding
        if case.kind == "ties":  # small integers: exact
            moved = aggregate(case.x + np.float32(8.0), rule).vector.numpy()
            assert np.abs(moved - result - 8.0).max() <= 4e-6


@pytest.mark.parametrize("text", ["mean", "median", "trimmed_mean:f=2", "meamed:f=2"])
def test_slices_have_the_bits_of_the_whole_on_both_paths(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = resolve(text)
    rng = np.random.default_rng(3)
    rows = [torch.from_numpy(rng.standard_normal(10_007).astype(np.float32)) for _ in range(9)]
    rows[3][:100] = 0.0
    rows[4][:100] = -0.0
    rows[5][50:80] = 1e-42  # denormal
    results = []
    for implementation in (kernels.active, pure_kernels):
        monkeypatch.setattr(kernels, "active", implementation)
        for bounds in ([0, 10_007], [0, 1, 128, 129, 5000, 10_007]):
            out = torch.empty(10_007)
            for a, b in itertools.pairwise(bounds):
                assert rule.combine([row[a:b] for row in rows], None, out[a:b])
            results.append(out.numpy().tobytes())
    assert len(set(results)) == 1


def test_weights_are_heard_by_the_mean_alone() -> None:
    rows = [torch.full((4,), value) for value in (0.0, 1.0, 4.0)]
    weights = [1.0, 1.0, 2.0]
    assert aggregate(rows, "mean", weights).vector.tolist() == exact.weighted_mean(rows, weights).tolist() == [2.25] * 4
    assert aggregate(rows, "median", weights).vector.tolist() == [1.0] * 4


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11, 16, 31, 32, 57, 100, 256])
def test_a_network_puts_what_is_wanted_in_its_place(n: int) -> None:
    rng = np.random.default_rng(n)
    for wanted in (range(n), range((n - 1) // 2, n // 2 + 1), range(n // 4, n - n // 4)):
        pairs = network(n, wanted)
        # Columns of zeros and ones suffice (Knuth's 0-1 principle): all of them for small n.
        columns = (
            (np.arange(1 << n)[None, :] >> np.arange(n)[:, None]) & 1 if n <= 11 else rng.integers(0, 2, (n, 2000))
        ).astype(np.int8)
        ordered = np.sort(columns, axis=0)
        for i, j in pairs.tolist():
            assert i < j < n
            low, high = np.minimum(columns[i], columns[j]), np.maximum(columns[i], columns[j])
            columns[i], columns[j] = low, high
        assert (columns[list(wanted)] == ordered[list(wanted)]).all()
    assert len(network(n, range((n - 1) // 2, n // 2 + 1))) <= len(network(n, range(n)))
