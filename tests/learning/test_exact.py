"""Replicated arithmetic: equal to a naive loop bit for bit, and the same on every thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.learning import defaults, exact
from shoal.transport.errors import ProtocolMisuse


def naive_mean(contributions: list[Tensor], weights: list[float]) -> Tensor:
    total = sum(weights)
    out = []
    for column in zip(*(c.tolist() for c in contributions), strict=True):
        acc = np.float32(column[0]) * np.float32(weights[0] / total)
        for value, weight in zip(column[1:], weights[1:], strict=True):
            acc = np.float32(acc + np.float32(np.float32(value) * np.float32(weight / total)))
        out.append(acc)
    return torch.from_numpy(np.array(out, dtype=np.float32))


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.view(torch.int32).tolist()
    return values


@given(
    rows=st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)] * n),
            min_size=1,
            max_size=20,
        )
    ),
    weights=st.lists(st.integers(1, 1000), min_size=6, max_size=6),
)
def test_a_weighted_mean_has_the_bits_of_the_naive_loop(rows: list[tuple[float, ...]], weights: list[int]) -> None:
    exact.flush_denormals()
    contributions = [torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True)]
    used = [float(w) for w in weights[: len(contributions)]]
    with np.errstate(all="ignore"):
        expected = naive_mean(contributions, used)
    result = exact.weighted_mean(contributions, used)
    flushed = torch.where(expected.abs() < 2**-126, torch.zeros(()), expected)
    assert bits(result.abs()) == bits(flushed.abs())


def test_known_means_are_exact() -> None:
    one, three = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 6.0])
    assert exact.weighted_mean([one, three], [1, 1]).tolist() == [2.0, 2.0]
    assert exact.weighted_mean([one, three], [3, 1]).tolist() == [1.5, 0.0]
    assert exact.weighted_mean([one], [17]).tolist() == [1.0, -2.0]
    assert exact.weighted_mean([one, three], [0, 2]).tolist() == [3.0, 6.0]


def test_chunks_and_slices_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    contributions = [torch.randn(10_007, generator=generator) for _ in range(5)]
    weights = [3.0, 1.0, 4.0, 1.0, 5.0]
    whole = exact.weighted_mean(contributions, weights)
    monkeypatch.setattr(defaults, "EXACT_CHUNK", 97)
    assert torch.equal(whole, exact.weighted_mean(contributions, weights))
    cut = 4321
    parts = [exact.weighted_mean([c[a:b] for c in contributions], weights) for a, b in ((0, cut), (cut, 10_007))]
    assert torch.equal(whole, torch.cat(parts))


def test_the_order_of_contributions_is_the_callers() -> None:
    a, b, c = torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1.0])
    assert exact.weighted_mean([a, b, c], [1, 1, 1]).item() != exact.weighted_mean([a, c, b], [1, 1, 1]).item()


def test_a_mean_lands_in_the_tensor_given_and_may_replace_the_first_contribution() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    out = torch.empty(2)
    assert exact.weighted_mean([a, b], [1, 1], out=out) is out
    exact.weighted_mean([a, b], [1, 1], out=a)
    assert torch.equal(a, out)


@pytest.mark.parametrize("weights", [[], [1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_without_a_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(ProtocolMisuse):
        exact.weighted_mean([torch.zeros(2), torch.zeros(2)], weights)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(4)[::2], torch.zeros(3)],
    ids=["2-D", "float64", "strided", "other size"],
)
def test_other_shapes_and_dtypes_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ProtocolMisuse):
        exact.weighted_mean([torch.zeros(2), wrong], [1, 1])
    with pytest.raises(ProtocolMisuse):
        exact.add_(torch.zeros(2), wrong)


def test_elementwise_operations_have_known_answers() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -4.0])
    assert exact.add(a, b).tolist() == [1.5, -2.0]
    assert exact.sub(a, b).tolist() == [0.5, 6.0]
    assert exact.scale(a, 0.25).tolist() == [0.25, 0.5]
    assert a.tolist() == [1.0, 2.0]
    assert exact.add_(a, b) is a
    assert exact.sub_(a, b).tolist() == [1.0, 2.0]
    assert exact.scale_(a, 0.1).tolist() == [float(np.float32(0.1)), float(np.float32(0.2))]


def test_a_product_is_rounded_before_it_is_added() -> None:
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: float32 drops the last term, a fused multiply-add would keep it.
    x = torch.tensor([1 + 2**-12])
    left = exact.sub(exact.scale(x, 1 + 2**-12), torch.tensor([1 + 2**-11]))
    assert left.item() == 0.0


def test_denormals_are_flushed_on_every_thread() -> None:
    tiny = torch.full((8,), 2.0**-126)
    results: list[list[float]] = []

    def work() -> None:
        results.append(exact.scale(tiny, 0.5).tolist())
        results.append(exact.weighted_mean([tiny, tiny], [1, 3]).tolist())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work()
    assert results == [[0.0] * 8] * 8


def test_prepare_torch_sets_threads_and_flushes() -> None:
    exact.prepare_torch()
    assert torch.get_num_threads() == 1
    assert (torch.tensor([2.0**-126]) * 0.5).item() == 0.0


def test_a_value_that_is_not_finite_is_named() -> None:
    vector = torch.zeros(200_000)
    assert exact.check_finite(vector) is None
    assert exact.check_finite(torch.zeros(0)) is None
    vector[150_000] = float("inf")
    vector[150_001] = float("nan")
    assert exact.check_finite(vector) == "infinity at 150000; 2 of 200000 values are not finite"
    vector[7] = float("nan")
    assert exact.check_finite(vector, lambda i: f"w{i}") == "NaN at 7 (w7); 3 of 200000 values are not finite"


def test_values_whose_sum_overflows_are_finite() -> None:
    assert exact.check_finite(torch.full((1000,), 3e38)) is None
    assert exact.check_finite(torch.tensor([float("inf"), float("-inf")])) is not None
