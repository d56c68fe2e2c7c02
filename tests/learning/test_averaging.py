"""Averaging that keeps the variance of weights: known answers, no-ops, tensors without a variance, buffers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning.averaging import Averaging, corrected, mix, restore_, variances
from shoal.learning.spec import ParameterSpec
from shoal.learning.state import Layout, flatten_model, unflatten


def drawn(make: Callable[[], nn.Module], count: int, seed: int = 0) -> tuple[Layout, list[Tensor]]:
    """``count`` models with initial values of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [make() for _ in range(count)]
    layout = Layout.of(models[0])
    return layout, [flatten_model(layout, model) for model in models]


def xavier() -> nn.Module:
    layer = nn.Linear(200, 300)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mean(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).mean(0)


def combine(rule: Averaging, layout: Layout, vectors: list[Tensor]) -> Tensor:
    """What the first makes of itself and the others."""
    spreads = [variances(layout, vector) for vector in vectors]
    return rule.combine(layout, vectors[0], mean(vectors[1:]), spreads[0], mean(spreads[1:]))


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_the_mean_of_n_models_has_an_nth_of_the_variance_and_the_correction_restores_all_of_it(count: int) -> None:
    layout, vectors = drawn(xavier, count)
    plain = combine(Averaging(1 / count, correct=False), layout, vectors)
    whole = combine(Averaging(1 / count), layout, vectors)
    wanted = mean([variances(layout, vector) for vector in vectors[1:]])[0]
    assert float(variances(layout, plain)[0] / wanted) == pytest.approx(1 / count, rel=0.03)
    assert float(whole[:60000].var() / wanted) == pytest.approx(1.0, abs=1e-6)
    assert float(whole[:60000].mean()) == pytest.approx(float(plain[:60000].mean()), abs=1e-7)


def test_what_the_authors_add_to_the_variances_would_restore_three_quarters_where_this_restores_all() -> None:
    layout, vectors = drawn(xavier, 16)
    spread = float(variances(layout, mean(vectors))[0])
    wanted = float(mean([variances(layout, vector) for vector in vectors])[0])
    assert (wanted + 1e-4) / (spread + 1e-4) * spread / wanted == pytest.approx(0.74, abs=0.02)
    restored = restore_(layout, mean(vectors), torch.tensor([wanted, 0.0]))
    assert float(restored[:60000].var()) / wanted == pytest.approx(1.0, abs=1e-5)


def test_equal_parents_stay_what_they_are() -> None:
    layout, (vector,) = drawn(xavier, 1)
    for target in (0.0, 0.5, 1.0):
        torch.testing.assert_close(combine(Averaging(0.5, target), layout, [vector] * 3), vector, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("target", "weights"), [(0.0, (0, 1)), (1.0, (1, 0)), (0.5, (0.5, 0.5)), (0.3, (0.3, 0.7))])
def test_the_target_is_the_variance_of_the_others_or_ones_own_or_between(
    target: float, weights: tuple[float, float]
) -> None:
    layout, vectors = drawn(xavier, 3)
    vectors[0] = vectors[0] * 2
    own = variances(layout, vectors[0])[0]
    others = mean([variances(layout, vector) for vector in vectors[1:]])[0]
    found = variances(layout, combine(Averaging(0.5, target), layout, vectors))[0]
    assert float(found) == pytest.approx(float(weights[0] * own + weights[1] * others), rel=1e-5)


def test_without_correction_and_with_all_weight_on_one_side_it_is_that_side() -> None:
    layout, vectors = drawn(xavier, 3)
    assert torch.equal(combine(Averaging(1.0, correct=False), layout, vectors), vectors[0])
    torch.testing.assert_close(combine(Averaging(0.0, correct=False), layout, vectors), mean(vectors[1:]))


class Odd(nn.Module):
    """With everything that has no variance: one element, constants, statistics, integers, nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(1))
        self.scalar = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.zeros(0))
        self.constant = nn.Parameter(torch.full((50,), 0.1))
        self.weight = nn.Parameter(torch.randn(20, 10))
        self.norm = nn.BatchNorm1d(10)
        self.norm.running_mean = torch.randn(10)
        self.norm.running_var = torch.rand(10) + 0.5
        self.norm.num_batches_tracked = torch.tensor(8)
        self.register_buffer("table", torch.arange(12))


def test_only_tensors_with_a_variance_are_corrected_and_statistics_never() -> None:
    layout, vectors = drawn(Odd, 5)
    names = [segment.name for segment in corrected(layout)]
    assert names == ["constant", "weight", "norm.weight", "norm.bias"]
    result = combine(Averaging(0.2), layout, vectors)
    assert bool(result.isfinite().all())
    parts, plain = unflatten(layout, result), unflatten(layout, mix(vectors[0], mean(vectors[1:]), 0.2))
    for name in parts:
        assert torch.equal(parts[name], plain[name]) == (name != "weight"), name
    assert bool((parts["norm.running_var"] > 0).all()) and int(parts["norm.num_batches_tracked"]) == 8


def test_rounding_of_values_that_are_all_the_same_is_not_blown_up() -> None:
    layout = Layout.of_signature((ParameterSpec("bias", (1000,), "float32"),))
    vector = torch.full((1000,), 0.1)
    vector[::2] = torch.nextafter(vector[0], torch.tensor(1.0))
    assert torch.equal(restore_(layout, vector.clone(), torch.tensor([0.5])), vector)


def test_parents_that_cancel_out_leave_rounding_that_is_not_blown_up_either() -> None:
    layout, (vector,) = drawn(xavier, 1)
    result = combine(Averaging(0.5), layout, [vector, -vector])
    assert float(result.abs().max()) < 1e-6


@pytest.mark.parametrize("wanted", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_target_that_cannot_be_leaves_the_average(wanted: float) -> None:
    layout, (vector,) = drawn(xavier, 1)
    assert torch.equal(restore_(layout, vector.clone(), torch.tensor([wanted, wanted])), vector)


def test_models_of_a_batch_are_corrected_each_by_itself() -> None:
    layout, vectors = drawn(xavier, 4)
    batch, target = torch.stack(vectors), torch.rand(4, 2) + 0.1
    one_by_one = [restore_(layout, vector.clone(), wanted) for vector, wanted in zip(vectors, target, strict=True)]
    torch.testing.assert_close(restore_(layout, batch.clone(), target), torch.stack(one_by_one))
    torch.testing.assert_close(variances(layout, batch), torch.stack([variances(layout, v) for v in vectors]))


def test_a_model_without_anything_to_correct_is_averaged() -> None:
    layout = Layout.of_signature((ParameterSpec("one", (1,), "float32"),))
    assert variances(layout, torch.ones(1)).shape == (0,)
    result = Averaging(0.5).combine(layout, torch.ones(1), torch.zeros(1), torch.zeros(0), torch.zeros(0))
    assert result.tolist() == [0.5]


def test_shares_outside_of_0_and_1_and_variances_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="own is a share"):
        Averaging(own=1.5)
    with pytest.raises(ValueError, match="target is a share"):
        Averaging(target=-0.1)
    layout, vectors = drawn(xavier, 2)
    with pytest.raises(ValueError, match="variances of the others"):
        Averaging().combine(layout, vectors[0], vectors[1])


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40),
    wanted=st.floats(1e-9, 1e9),
    shift=st.floats(-10, 10),
)
def test_a_corrected_tensor_has_the_target_variance_or_is_untouched(
    values: list[float], wanted: float, shift: float
) -> None:
    layout = Layout.of_signature((ParameterSpec("x", (len(values),), "float32"),))
    vector = torch.tensor(values) + shift
    result = restore_(layout, vector.clone(), torch.tensor([wanted]))
    assert bool(result.isfinite().all())
    if not torch.equal(result, vector):
        assert (
            float(result.double().var()) == pytest.approx(wanted, rel=1e-2)
            or float(result.double().square().mean()) > 1e8 * wanted
        )  # about a mean so far away float32 has no room for this spread
