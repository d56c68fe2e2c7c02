"""Whole nodes in virtual time whose run combines by a rule: one that sends garbage keeps nobody from learning."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from shoal.learning.events import Event
from shoal.learning.placing import rule_of
from shoal.learning.spec import RunSpec
from shoal.learning.strategies import resolve as resolve_strategy
from shoal.node.node import Founding
from shoal.sim.world import Member, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity

from . import tiny

PEERS, ROUNDS, BAD = 6, 12, 2


def founding(strategy: str, aggregator: str, **changes: object) -> Founding:
    args = tiny.PLAIN if strategy == "diloco" else ()
    return Founding(
        strategy=strategy, strategy_args=args, aggregator=aggregator, min_peers=PEERS, rounds=ROUNDS, **changes
    )


def with_garbage(strategy: str, aggregator: str, codec: str = "fp32", loud: float = 50.0) -> World:
    """A run in which one peer sends noise instead of its contribution, in every round."""
    generator = torch.Generator().manual_seed(7)

    def poison(member: Member, event: Event) -> None:
        if member.number == BAD and (event.phase, event.what) == ("convene", "begin"):
            own = member.run._instance.buffers.own  # type: ignore[union-attr]
            assert own is not None
            own.copy_(loud * torch.randn(len(own), generator=generator))

    async def script(world: World) -> None:
        world.hooks.append(poison)

    scenario = tiny.scenario(PEERS, ROUNDS)
    return simulate(attrs.evolve(scenario, founding=founding(strategy, aggregator, codec=codec)), script)


def honest_target(world: World) -> Tensor:
    targets = [tiny.target(m.node.identity.peer_id.key) for m in world.live() if m.number != BAD]
    return torch.stack(targets).mean(0)


def away(world: World) -> float:
    """How far the weights are from where honest peers pull, in lengths of the way from one of these to the middle."""
    middle = honest_target(world)
    spread = max(
        float((tiny.target(m.node.identity.peer_id.key) - middle).norm()) for m in world.live() if m.number != BAD
    )
    return float((world.members[0].run.weights() - middle).norm()) / spread


@pytest.mark.parametrize(
    ("strategy", "aggregator", "codec"),
    [
        ("diloco", "multikrum:f=1", "fp32"),
        ("diloco", "multikrum:f=1", "int8"),
        ("diloco", "trimmed_mean:f=1", "int8"),
        ("diloco", "nnm+trimmed_mean:f=1", "fp32"),
        ("allreduce", "multikrum:f=1", "fp32"),
    ],
)
def test_honest_peers_learn_beside_one_that_sends_garbage(strategy: str, aggregator: str, codec: str) -> None:
    world = with_garbage(strategy, aggregator, codec)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert all(member.run.round == ROUNDS for member in world.live())
    assert away(world) < 1.0
    liar = world.members[BAD].peer
    for member in world.live():
        for report in member.run.reports:
            assert len(report.members) == PEERS and report.retries == 0, report.reason
            if aggregator == "multikrum:f=1":
                assert len(report.quality) == PEERS and sum(report.quality) == PEERS - 1 - 2
                assert report.quality[report.members.index(liar)] == 0.0
            else:
                assert report.quality == ()


def test_the_same_garbage_ruins_the_mean() -> None:
    assert away(with_garbage("diloco", "mean")) > 5.0


def test_a_run_that_loses_too_many_peers_says_why_it_learns_nothing_and_goes_on_when_one_joins() -> None:
    """Multi-Krum with f = 1 needs five. Of six two die; one comes back."""
    watches: list[tiny.Watch] = []

    async def script(world: World) -> None:
        watches.append(tiny.Watch(world))
        first = world.members[0].run
        await world.until(lambda: first.round >= 2, "two rounds")
        world.kill(4)
        world.kill(5)
        await world.until(lambda: any(not report.members for report in first.reports), "a round without a result")
        world.restart(5)
        empty = len(first.reports)
        await world.until(lambda: any(report.members for report in first.reports[empty:]), "a round with a result")

    longer = attrs.evolve(founding("diloco", "multikrum:f=1"), rounds=20)
    scenario = attrs.evolve(tiny.scenario(PEERS, 20), founding=longer)
    world = simulate(scenario, script)
    assert len({member.run.digest() for member in world.live()}) == 1
    reports = world.members[0].run.reports
    without = [report for report in reports if not report.members]
    assert without and len(reports[-1].members) == 5
    for report in without:
        assert "no contribution is combined: multikrum: f = 1 of 4 vectors cannot be tolerated" in report.reason
        assert report.samples == 0
        found = watches[0].weights
        assert torch.equal(found[0, report.round], found[0, report.round - 1])


SPEC = RunSpec(
    "pull", b"h" * 32, "diloco", (), 0, "available", 0, 5, 0, (), Identity(b"k" * 32).peer_id, 1.7e9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator": "krumm:f=1"}, "there is no 'krumm'; rules: mean, median"),
        ({"aggregator": "multikrum"}, "multikrum needs f, how many liars it tolerates"),
        (
            {"aggregator": "multikrum:f=1", "min_peers": 4},
            "multikrum: f = 1 of 4 vectors cannot be tolerated: .* rounds begin with 4 (min_peers)",
        ),
        ({"aggregator": "trimmed_mean:f=1", "min_peers": 1}, "rounds begin with 1 (min_peers)"),
        ({"aggregator": "centered_clipping"}, "centered_clipping begins at the last result.*start=zero"),
        ({"aggregator": "median", "strategy": "noloco"}, "its aggregator is mean, not median"),
    ],
)
def test_a_rule_that_can_never_stand_is_refused_before_anything_is_signed(
    changes: dict[str, object], words: str
) -> None:
    spec = attrs.evolve(SPEC, **changes)  # type: ignore[arg-type]
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ConfigError, match=pattern):
        rule_of(spec, resolve_strategy(spec.strategy, {}))
    bad = attrs.evolve(founding(spec.strategy, spec.aggregator), strategy_args=(), min_peers=spec.min_peers)

    async def script(world: World) -> None:
        pass

    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=pattern), allow_unwrapped=True, flatten_subgroups=True):
        simulate(attrs.evolve(tiny.scenario(1, 2), founding=bad), script)


@pytest.mark.parametrize("aggregator", ["mean", "median", "multikrum:f=1", "nnm:f=1+median", "flag"])
def test_a_rule_that_stands_is_taken(aggregator: str) -> None:
    assert str(rule_of(attrs.evolve(SPEC, aggregator=aggregator), resolve_strategy("diloco", {}))) == aggregator
