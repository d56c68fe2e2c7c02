"""Streaming DiLoCo, async DiLoCo and CO2: identities bit for bit, answers by hand, and swarms in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.shard import Shard
from shoal.learning.spec import ParameterSpec
from shoal.learning.state import Layout
from shoal.learning.strategies import resolve
from shoal.learning.strategies.co2 import CO2, ClippedMomentum
from shoal.learning.strategies.outer import Nesterov
from shoal.learning.strategies.streaming import fragments_of
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.memory import Route

from ..sim.tiny import SIZE, Point, Pull, contribution, target


class Halves(nn.Module):
    """The weights of :class:`Pull`, in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Half(), Half()

    @property
    def at(self) -> Tensor:
        return torch.cat([self.left.at, self.right.at])


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(SIZE // 2))


class Pull2(Pull):
    """:class:`Pull` on a model of two layers."""

    def model(self) -> nn.Module:
        return Halves()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, Halves)
        return 0.5 * (model.at - batch[0]).square().sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Halves)
        return {"norm": float(model.at.norm())}


def swarm(strategy: str, args: dict[str, float], nodes: int = 3, rounds: int = 5, **more: Any) -> Scenario:
    """A swarm of :class:`Pull2`."""
    founding = Founding(strategy=strategy, strategy_args=tuple(args.items()), min_peers=nodes, rounds=rounds)
    values = {"make_task": Pull2, "route": Route(latency=0.02), **more}
    return Scenario(nodes, founding, **values)


class Watch:
    """What the swarm shares, and each peer's own model, after every round."""

    def __init__(self) -> None:
        self.shared: dict[int, Tensor] = {}
        self.own: dict[tuple[bytes, int], Tensor] = {}
        self.times: dict[int, float] = {}

    async def __call__(self, world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and bool(founder.run.snapshots), "a first state")
        self.shared[0] = founder.run.snapshots[0].vectors["weights"].clone()

        def see(member: Member, event: Any) -> None:
            if (event.phase, event.what) == ("commit", "done"):
                round = member.run.reports[-1].round
                weights = member.run.weights()
                same = torch.equal(self.shared.setdefault(round, weights), weights)
                assert same or not member.run.strategy.replicated, f"round {round}"
                # On the main thread of virtual time nobody trains at this moment.
                model = [p.detach().reshape(-1) for p in member.run.trainer.model.parameters()]
                self.own[member.run.me.key, round] = torch.cat(model).clone()
                self.times[round] = member.run.reports[-1].t

        world.hooks.append(see)


def run(scenario: Scenario) -> tuple[World, Watch]:
    watch = Watch()
    return simulate(scenario, watch), watch


def keys(world: World) -> list[bytes]:
    return sorted(member.run.me.key for member in world.live())


# -- Streaming DiLoCo -----------------------------------------------------------------------------------


def test_streaming_in_one_piece_that_nobody_waits_to_mix_is_diloco_bit_for_bit() -> None:
    outer = {"inner_steps": 4.0, "outer_lr": 0.7, "momentum": 0.5}
    _, plain = run(swarm("diloco", outer))
    _, streaming = run(swarm("streaming", {**outer, "fragments": 1, "overlap": 0, "mixing": 0}))
    assert plain.shared.keys() == streaming.shared.keys() == set(range(6))
    assert all(torch.equal(plain.shared[round], streaming.shared[round]) for round in plain.shared)


def test_streaming_with_all_weight_on_what_is_local_trains_as_if_alone_bit_for_bit() -> None:
    args = {"inner_steps": 4.0, "fragments": 2, "overlap": 1, "mixing": 1.0}
    _, streaming = run(swarm("streaming", args, rounds=6))
    _, local = run(swarm("local", {"inner_steps": 2.0}, rounds=6))
    own = {key: value for key, value in streaming.own.items() if key[1] == 6}
    assert len(own) == 3
    for key, weights in own.items():
        assert torch.equal(weights, local.own[key])


def test_streaming_moves_a_fragment_by_the_mean_as_it_was_overlap_steps_ago() -> None:
    args = {"inner_steps": 6.0, "fragments": 2, "overlap": 1, "mixing": 0.25, "outer_lr": 0.7, "momentum": 0.5}
    world, watch = run(swarm("streaming", args, rounds=6))
    peers, half = keys(world), SIZE // 2
    shared = watch.shared[0]
    own = dict.fromkeys(peers, shared)
    outers = [Nesterov(0.7, 0.5), Nesterov(0.7, 0.5)]
    for round in range(1, 7):
        part = slice(0, half) if round % 2 else slice(half, SIZE)
        deltas = []
        for peer in peers:
            at = own[peer] - contribution(own[peer], peer, 2)
            deltas.append(shared[part] - at[part])
            own[peer] = at - contribution(at, peer, 1)
        after = outers[(round - 1) % 2].step(shared[part].clone(), exact.weighted_mean(deltas, [1.0] * 3))
        shared = shared.clone()
        shared[part] = after
        for peer in peers:
            own[peer] = own[peer].clone()
            own[peer][part] = 0.25 * own[peer][part] + 0.75 * after
        torch.testing.assert_close(watch.shared[round], shared, rtol=1e-5, atol=1e-5)
        for peer in peers:
            torch.testing.assert_close(watch.own[peer, round], own[peer], rtol=1e-5, atol=1e-5)


def test_streaming_sends_one_fragment_in_each_round() -> None:
    lengths: list[int] = []

    async def script(world: World) -> None:
        def see(member: Member, event: Any) -> None:
            if (event.phase, event.what) == ("commit", "done"):
                instance = member.run._instance
                assert instance is not None and instance.voter.plan is not None
                lengths.append(instance.voter.plan.length)

        world.hooks.append(see)

    simulate(swarm("streaming", {"inner_steps": 4.0, "fragments": 2}, rounds=4), script)
    assert lengths == [SIZE // 2] * 12


def test_whoever_joins_a_streaming_run_late_or_comes_back_holds_what_the_others_share() -> None:
    args = {"inner_steps": 4.0, "fragments": 2, "overlap": 1, "mixing": 0.5}

    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 3, "round 3")
        world.start(3)
        await world.until(lambda: founder.run.round >= 6, "round 6")
        world.kill(1)
        await world.until(lambda: founder.run.round >= 8, "round 8")
        world.restart(1)

    founding = Founding(strategy="streaming", strategy_args=tuple(args.items()), min_peers=3, rounds=30)
    world = simulate(Scenario(4, founding, make_task=Pull2, late=(3,)), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert all(member.run.round == 30 for member in world.live())
    assert world.members[3].run.me.text in world.members[0].run.reports[-1].members
    assert world.members[1].run.me.text in world.members[0].run.reports[-1].members


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 9))
def test_fragments_cover_every_layer_once(tensors: list[int], count: int) -> None:
    specs = [
        ParameterSpec(f"blocks.{layer}.p{number}", (layer + 1, number + 1), "float32")
        for layer, size in enumerate(tensors)
        for number in range(size)
    ]
    layout = Layout.of_signature(tuple(specs))
    if count > len(tensors):
        with pytest.raises(ConfigError, match=f"a model of {len(tensors)} layers cannot be cut in {count}"):
            fragments_of(layout, count)
        return
    parts = fragments_of(layout, count)
    vector = torch.arange(float(layout.size))
    assert torch.equal(torch.cat([part.take(vector) for part in parts]).sort().values, vector)
    written = torch.full((layout.size,), -1.0)
    for part in parts:
        part.put(written, part.take(vector))
    assert torch.equal(written, vector)


# -- identities whose arithmetic loses nothing ------------------------------------------------------------


class Dyadic(Pull):
    """:class:`Pull` among few binary digits, so that for some rounds no operation of a float32 has to round: methods
    that are equal on paper are equal to the bit, however their terms are grouped."""

    def model(self) -> nn.Module:
        model = Point()
        nn.init.zeros_(model.at)
        return model

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        while True:
            yield (8 * target(shard.peer)).round()[None] / 8


@pytest.mark.parametrize("nodes", [4, 1])
def test_diloco_of_one_inner_step_and_plain_outer_steps_is_data_parallel_training_bit_for_bit(nodes: int) -> None:
    plain = {"inner_steps": 1.0, "outer_lr": 1.0, "momentum": 0.0}
    _, one = run(swarm("diloco", plain, nodes, 4, make_task=Dyadic))
    _, other = run(swarm("allreduce", {}, nodes, 4, make_task=Dyadic))
    assert one.shared.keys() == other.shared.keys() and len(one.shared) == 5
    assert all(torch.equal(one.shared[round], other.shared[round]) for round in one.shared)


def test_one_peer_with_plain_outer_steps_trains_as_if_alone_bit_for_bit() -> None:
    plain = {"inner_steps": 2.0, "outer_lr": 1.0, "momentum": 0.0}
    alone, begin = run(swarm("local", {"inner_steps": 2.0}, 1, 4, make_task=Dyadic))[1], torch.zeros(SIZE)
    for strategy, args in (
        ("diloco", plain),
        ("streaming", {**plain, "fragments": 1.0, "overlap": 0.0, "mixing": 0.0}),
    ):
        _, found = run(swarm(strategy, args, 1, 4, make_task=Dyadic))
        assert torch.equal(found.shared[0], begin) and not torch.equal(found.shared[4], begin)
        assert all(torch.equal(found.shared[round], alone.shared[round]) for round in range(5)), strategy


# -- one round late -------------------------------------------------------------------------------------


def test_async_diloco_applies_each_move_one_round_late() -> None:
    args = {"inner_steps": 2.0, "outer_lr": 0.5, "momentum": 0.3}
    world, watch = run(swarm("async", args, rounds=6))
    peers, outer, before = keys(world), Nesterov(0.5, 0.3), torch.zeros(SIZE)
    theta = watch.shared[0]
    for round in range(1, 7):
        moves = exact.weighted_mean([contribution(theta, peer, 2) for peer in peers], [1.0] * 3)
        theta, before = outer.step(theta, before), moves
        torch.testing.assert_close(watch.shared[round], theta, rtol=1e-5, atol=1e-5)
    assert torch.equal(watch.shared[1], watch.shared[0])  # nothing to apply yet


def test_co2_clips_its_momentum_and_divides_by_the_penalty() -> None:
    outer = ClippedMomentum(CO2(outer_lr=0.5, momentum=0.5, penalty=2.0, clip=1.0))
    at = outer.step(torch.zeros(3), torch.tensor([1.0, 6.0, -6.0]))
    assert torch.equal(at, torch.tensor([-0.25, -0.5, 0.5]))
    at = outer.step(at, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(at, torch.tensor([-0.25 - 0.375, -0.75, 0.75]))
    again = ClippedMomentum(outer.rule)
    again.restore(outer.vectors())
    assert torch.equal(again.step(at, torch.ones(3)), outer.step(at, torch.ones(3)))


def test_co2_without_momentum_penalty_and_clipping_is_async_diloco_without_momentum_bit_for_bit() -> None:
    _, one = run(swarm("co2", {"inner_steps": 2.0, "outer_lr": 0.5, "momentum": 0.0, "clip": 0.0}))
    _, other = run(swarm("async", {"inner_steps": 2.0, "outer_lr": 0.5, "momentum": 0.0}))
    assert all(torch.equal(one.shared[round], other.shared[round]) for round in range(6))


def test_a_reduce_that_is_one_round_late_hides_behind_training() -> None:
    # A round trip takes 0.2 s and a step 0.25 s. What a round of DiLoCo takes beside training is hidden here.
    slow = {"route": Route(latency=0.1), "slowness": dict.fromkeys(range(3), 5.0), "rounds": 8}
    _, plain = run(swarm("diloco", {"inner_steps": 8.0}, **slow))
    _, late = run(swarm("async", {"inner_steps": 8.0}, **slow))

    def per_round(watch: Watch) -> float:
        return (watch.times[8] - watch.times[3]) / 5

    training = 8 * 5 * Pull2.step_seconds
    assert per_round(plain) > training + 0.6
    assert per_round(late) < training + 0.25  # what is left is said while nothing is trained: that a round has ended


def test_whoever_joins_late_takes_the_first_result_without_giving() -> None:
    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 3, "round 3")
        world.start(2)

    founding = Founding(strategy="async", strategy_args=(("inner_steps", 2.0),), min_peers=2, rounds=16)
    world = simulate(Scenario(3, founding, make_task=Pull2, late=(2,)), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    newcomer = world.members[2].run
    voted = [r.round for r in newcomer.reports]
    gave = [r.round for r in newcomer.reports if newcomer.me.text in r.members]
    assert gave and gave == voted[1:]


def test_the_mean_of_pulls_is_where_all_of_the_family_ends() -> None:
    for strategy in ("streaming", "async", "co2"):
        args = {"inner_steps": 2.0, "fragments": 2, "overlap": 0} if strategy == "streaming" else {"inner_steps": 1.0}
        world, watch = run(swarm(strategy, args, rounds=40))
        wanted = torch.stack([target(peer) for peer in keys(world)]).mean(0)
        assert (watch.shared[40] - wanted).abs().max() < 0.05, strategy


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("streaming", {"inner_steps": 30.0, "fragments": 4.0}, "inner_steps 30 must be a multiple of fragments 4"),
        ("streaming", {"inner_steps": 6.0, "fragments": 3.0, "overlap": 2.0}, "overlap 2 must be in 0..1"),
        ("streaming", {"mixing": 1.5}, "mixing must be in 0..1, got 1.5"),
        ("streaming", {"bits": 8.0}, "bits must be 4 (E3M0), or 0 for the codec of the run, got 8"),
        ("co2", {"clip": -1.0}, "clip must not be negative, got -1.0"),
        ("co2", {"penalty": 0.0}, "penalty must be above 0, got 0.0"),
        ("async", {"momentum": 1.0}, "momentum must be in 0..1 (1 excluded), got 1.0"),
    ],
)
def test_parameters_that_make_no_sense_are_named(name: str, args: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, args)
    assert message in str(caught.value)


def test_a_model_of_too_few_layers_is_refused_by_name() -> None:
    with pytest.raises(BaseException) as caught:
        simulate(swarm("streaming", {"inner_steps": 3.0, "fragments": 3.0, "overlap": 0.0}))
    found = cast(BaseException, caught.value)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert "a model of 2 layers cannot be cut in 3 fragments; --set fragments=N" in str(found)
