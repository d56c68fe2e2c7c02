"""A lost stage comes back from its neighbours: blends of known values, bits, what cannot be recovered, rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning.pipeline.copies import guarded_by
from shoal.learning.pipeline.recovery import RateScale, TensorsLost, average, copy, gradient_norm, weights_of
from shoal.learning.tasks.stdlib import WarmupAdamW
from shoal.transport.errors import ProtocolMisuse

SHAPE = {"w": (2, 2)}


def test_a_gradient_norm_is_that_of_all_gradients_and_never_zero() -> None:
    assert gradient_norm([torch.tensor([3.0]), None, torch.tensor([[4.0]])]) == 5.0 + 1e-4
    assert gradient_norm([torch.zeros(3)]) == 1e-4


def test_norms_of_one_and_three_blend_one_to_three_exactly() -> None:
    before, after = {"w": torch.tensor([[0.0, 4.0], [8.0, -4.0]])}, {"w": torch.tensor([[4.0, 0.0], [0.0, 4.0]])}
    assert weights_of(1.0, 3.0) == (0.25, 0.75)
    recovered = average(before, after, weights_of(1.0, 3.0), own=SHAPE)
    assert recovered["w"].tolist() == [[3.0, 1.0], [2.0, 2.0]]
    assert weights_of(1.0, 3.0, exponent=2) == pytest.approx((0.1, 0.9))
    assert weights_of(1.0, 3.0, exponent=0) == (0.5, 0.5)


def test_clipped_gradients_weigh_the_same() -> None:
    norms = []
    for size in (10.0, 300.0):
        stage = nn.Linear(4, 4)
        for p in stage.parameters():
            p.grad = torch.full_like(p, size)
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        norms.append(gradient_norm(p.grad for p in stage.parameters()))
    assert weights_of(*norms) == pytest.approx((0.5, 0.5), abs=1e-6)


@pytest.mark.parametrize("norms", [(math.nan, 1.0), (1.0, math.nan), (1.0, math.inf), (-1.0, 1.0), (0.0, 0.0)])
def test_norms_that_weigh_nothing_are_refused(norms: tuple[float, float]) -> None:
    with pytest.raises(ProtocolMisuse, match="give no weights"):
        weights_of(*norms)


@pytest.mark.parametrize("weights", [(math.nan, 0.5), (0.0, 0.0), (-0.5, 1.5)])
def test_an_average_takes_no_such_weights_either(weights: tuple[float, float]) -> None:
    with pytest.raises(ProtocolMisuse, match="have no mean"):
        average({"w": torch.zeros(2, 2)}, {"w": torch.zeros(2, 2)}, weights, own=SHAPE)


@given(st.floats(0, 1e300), st.floats(1e-4, 1e300), st.sampled_from([0.0, 1.0, 2.0]))
def test_weights_of_any_norms_sum_to_one(before: float, after: float, exponent: float) -> None:
    left, right = weights_of(before, after, exponent)
    assert left >= 0 and right >= 0 and left + right == pytest.approx(1.0)


def test_every_replica_that_averages_gets_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    before, after = ({"w": torch.randn(37, 51, generator=generator)} for _ in range(2))
    weights = weights_of(0.731, 0.1173)
    shares = [torch.tensor(weight) for weight in weights]
    expected = shares[0] * before["w"] + shares[1] * after["w"]
    one = average(before, after, weights, own={"w": (37, 51)})["w"]
    # Laid out otherwise in the memory of another machine.
    other = average({"w": before["w"].t().contiguous().t()}, after, weights, own={"w": (37, 51)})["w"]
    assert torch.equal(one, expected) and torch.equal(one, other)


def test_embeddings_come_back_bit_for_bit_from_the_copies_that_neighbours_keep() -> None:
    embedding = torch.randn(5, 2)
    stage = {"w": torch.ones(2, 2)}
    own = {**SHAPE, "embed.weight": (5, 2)}
    for recovered in (
        average({**stage, "embed.weight": torch.zeros(5, 2)}, stage, (0.5, 0.5), own=own,
                keep={"embed.weight": embedding}),
        copy(stage, own=own, keep={"embed.weight": embedding}),
    ):  # fmt: skip
        assert torch.equal(recovered["embed.weight"], embedding)
        assert recovered["embed.weight"].data_ptr() != embedding.data_ptr()
        assert torch.equal(recovered["w"], stage["w"])


def test_what_one_neighbour_lacks_or_has_in_another_shape_is_taken_from_the_other() -> None:
    one, other = torch.ones(2, 2), torch.full((2, 2), 3.0)
    assert torch.equal(average({"w": one}, {}, (0.5, 0.5), own=SHAPE)["w"], one)
    assert torch.equal(average({"w": torch.ones(3, 2)}, {"w": other}, (0.5, 0.5), own=SHAPE)["w"], other)


def test_integers_are_copied_and_halves_keep_their_type() -> None:
    counters = {"n": torch.tensor(3)}, {"n": torch.tensor(8)}
    assert int(average(*counters, (0.5, 0.5), own={"n": ()})["n"]) == 3
    halves = {"w": torch.ones(2, 2).bfloat16()}, {"w": torch.full((2, 2), 2.0).bfloat16()}
    mean = average(*halves, (0.5, 0.5), own=SHAPE)["w"]
    assert mean.dtype == torch.bfloat16 and mean.tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_what_nobody_holds_is_named_unless_fresh_values_are_given() -> None:
    own = {**SHAPE, "a": (3,), "b": (1,)}
    stage = {"w": torch.ones(2, 2), "a": torch.ones(4)}
    with pytest.raises(TensorsLost, match="a, b") as caught:
        average(stage, stage, (0.5, 0.5), own=own)
    assert caught.value.names == ("a", "b")
    with pytest.raises(TensorsLost, match="b"):
        copy(stage, own=own, fresh={"a": torch.zeros(3)})
    fresh = {"a": torch.zeros(3), "b": torch.zeros(1), "w": torch.zeros(2, 2)}
    recovered = copy(stage, own=own, fresh=fresh)
    assert torch.equal(recovered["a"], fresh["a"]) and torch.equal(recovered["w"], stage["w"])


def test_what_belongs_to_a_place_in_the_chain_is_never_taken_from_a_neighbour() -> None:
    stage = {"w": torch.ones(2, 2)}
    with pytest.raises(TensorsLost, match="w"):
        average(stage, stage, (0.5, 0.5), own=SHAPE, local=("w",))
    fresh = torch.zeros(2, 2)
    assert torch.equal(average(stage, stage, (0.5, 0.5), own=SHAPE, local=("w",), fresh={"w": fresh})["w"], fresh)


def test_copies_of_another_shape_are_refused() -> None:
    stage = {"w": torch.ones(2, 2)}
    with pytest.raises(ProtocolMisuse, match=r"the copy of w is \(3,\)"):
        average(stage, stage, (0.5, 0.5), own=SHAPE, keep={"w": torch.ones(3)})
    with pytest.raises(ProtocolMisuse, match=r"the fresh value of w is \(3,\)"):
        copy({}, own=SHAPE, fresh={"w": torch.ones(3)})


# -- rates -------------------------------------------------------------------------------------------------------------


def sgd(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def adam(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate)


def warming_up(parameters: list[Tensor], rate: float) -> torch.optim.Optimizer:
    return WarmupAdamW([{"params": parameters}], rate, 4)


Make = Callable[[list[Tensor], float], torch.optim.Optimizer]


def trained(make: Make, rate: float, recoveries: int, *, schedule: bool, compound: bool = False) -> Tensor:
    """A parameter after six steps along given gradients; what is recovered is recovered before the first."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = make([parameter], rate)
    scaled = RateScale(optimizer, compound=compound)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if schedule else None
    for _ in range(recoveries):
        scaled.recovered()
    for step in range(6):
        parameter.grad = torch.linspace(-1, 2, 7) * (step + 1)
        scaled.step()
        if scheduler is not None:
            scheduler.step()
    return parameter.detach()


@pytest.mark.parametrize(("make", "schedule"), [(sgd, False), (sgd, True), (adam, True), (warming_up, False)])
def test_a_recovered_stage_learns_at_eleven_tenths_of_the_rate_whoever_sets_it(make: Make, schedule: bool) -> None:
    expected = trained(make, 1.1 * 0.01, 0, schedule=schedule)
    assert not torch.allclose(trained(make, 0.01, 0, schedule=schedule), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(trained(make, 0.01, 1, schedule=schedule), expected, rtol=0, atol=1e-6)
    # The code's way: it does not add up over failures. Alg. 1 as written: it does.
    torch.testing.assert_close(trained(make, 0.01, 3, schedule=schedule), expected, rtol=0, atol=1e-6)
    higher = trained(make, 1.1**3 * 0.01, 0, schedule=schedule)
    torch.testing.assert_close(trained(make, 0.01, 3, schedule=schedule, compound=True), higher, rtol=0, atol=1e-6)


def test_moments_are_fresh_after_a_recovery() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    scaled = RateScale(adam([parameter], 0.1))
    for _ in range(3):
        parameter.grad = torch.ones(3)
        scaled.step()
    assert float(scaled.optimizer.state[parameter]["step"]) == 3
    scaled.recovered()
    assert not scaled.optimizer.state
    parameter.grad = torch.full((3,), -1.0)
    start = parameter.detach().clone()
    scaled.step()
    # Adam's first step is the rate, against the sign of the gradient.
    torch.testing.assert_close(parameter.detach() - start, torch.full((3,), 0.11))
    assert scaled.factor == 1.1


@pytest.mark.parametrize("stages", range(2, 12))
def test_every_stage_is_guarded_and_the_ends_are_after_every_round_by_their_neighbours(stages: int) -> None:
    guards = [guarded_by(stage, stages) for stage in range(stages)]
    assert all(stage not in guarded for stage, guarded in enumerate(guards))
    assert {other for guarded in guards for other in guarded} == set(range(stages))
    assert guards[1][0]
    assert guards[stages - 2][stages - 1]
    assert max(map(len, guards)) <= 2
    if stages == 2:
        return
    for lost in range(stages - 1):
        # Two neighbours at once: somebody else keeps each.
        left = [guarded for stage, guarded in enumerate(guards) if stage not in (lost, lost + 1)]
        assert all(any(stage in guarded for guarded in left) for stage in (lost, lost + 1))
