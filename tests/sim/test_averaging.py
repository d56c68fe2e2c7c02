"""Strategies `gossip` and `dimat` as swarms: strangers, who is in the mean with which share, what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.learning.faults import Faults
from shoal.learning.strategies import resolve
from shoal.learning.tasks.digits import Digits
from shoal.node.node import Founding
from shoal.sim.field import FieldCase, run_field
from shoal.sim.world import Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.memory import Route

from .tiny import Pull, target


class Deep(Digits):
    """Five layers with tanh: deep enough that it cannot be trained from weights that are too small."""

    def __init__(self) -> None:
        super().__init__(None)

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for outputs in (64, 64, 64, 64, 10):
            layer = nn.Linear(64, outputs)
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


def accuracy(strategy: str, rounds: int, **args: float) -> float:
    """Of the peers' own models, the mean."""
    case = FieldCase(strategy, {"inner_steps": 5, **args}, 8, rounds, make_task=Deep, evaluate_every=0)
    return run_field(case).last.local_metric


def test_models_that_began_apart_learn_together_only_when_the_variance_of_their_mean_is_corrected() -> None:
    assert accuracy("gossip", 12, strangers=1, correct=0) < 0.3
    corrected = accuracy("gossip", 12, strangers=1)
    assert corrected > 0.85
    assert corrected > accuracy("gossip", 12, correct=0) - 0.06  # all from the same weights


def test_dimat_trains_models_that_began_apart() -> None:
    assert accuracy("dimat", 8, strangers=1, samples=64) > 0.4


class Still(Pull):
    """Nothing is learned: what the weights become is averaging alone."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)


def swarm(strategy: str, args: dict[str, float], nodes: int, rounds: int, **more: Any) -> Scenario:
    founding = Founding(
        strategy=strategy, strategy_args=tuple({"inner_steps": 1, **args}.items()), min_peers=nodes, rounds=rounds,
        group=more.pop("group", 0), codec=more.pop("codec", "fp32"),
    )  # fmt: skip
    return partial(Scenario, nodes, founding, route=Route(latency=0.02))(**{"make_task": Still, **more})


def weights(world: World) -> list[Tensor]:
    return [member.run.weights() for member in world.live()]


def test_strangers_begin_with_weights_of_their_own_and_others_with_those_of_the_run() -> None:
    alone = weights(simulate(swarm("gossip", {"own": 1, "correct": 0, "strangers": 1}, 3, 2)))
    assert all((one - other).abs().mean() > 0.5 for one in alone for other in alone if one is not other)
    together = weights(simulate(swarm("gossip", {"own": 1, "correct": 0}, 3, 2)))
    assert all(torch.equal(one, together[0]) for one in together)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_group_of_four_combines_each_of_its_own_with_the_mean_of_the_others(codec: str) -> None:
    args = {"own": 0.25, "strangers": 1}
    before = weights(simulate(swarm("gossip", {**args, "own": 1, "correct": 0}, 4, 1)))
    loose = {"rtol": 0, "atol": 1e-5 if codec == "fp32" else 3e-2}
    plain = weights(simulate(swarm("gossip", {**args, "correct": 0}, 4, 1, group=4, codec=codec)))
    for vector in plain:
        torch.testing.assert_close(vector, torch.stack(before).mean(0), **loose)
    whole = weights(simulate(swarm("gossip", args, 4, 1, group=4, codec=codec)))
    for at, vector in enumerate(whole):
        wanted = torch.stack([other.var() for other in before[:at] + before[at + 1 :]]).mean()
        average = torch.stack(before).mean(0)
        expected = average.mean() + (average - average.mean()) * (wanted / average.var()).sqrt()
        torch.testing.assert_close(vector, expected, **loose)


def test_a_member_that_gives_nothing_is_not_taken_for_one_of_the_others() -> None:
    # Its contribution is not a number: the group of three goes on without it, and it takes the mean of the others.
    args = {"own": 0.5, "strangers": 1, "correct": 0}
    before = weights(simulate(swarm("gossip", {**args, "own": 1}, 3, 1)))
    after = weights(simulate(swarm("gossip", args, 3, 1, group=3, faults={2: Faults(spoil=frozenset({1}))})))
    for at, wanted in enumerate(
        (0.5 * (before[0] + before[1]), 0.5 * (before[0] + before[1]), 0.5 * before[2] + 0.25 * (before[0] + before[1]))
    ):
        torch.testing.assert_close(after[at], wanted, rtol=0, atol=1e-5)


def test_a_run_of_one_peer_goes_on_by_itself() -> None:
    world = simulate(swarm("gossip", {"inner_steps": 3}, 1, 4, make_task=Pull))
    (found,) = weights(world)
    assert (found - target(world.members[0].run.me.key)).abs().max() < 0.3


def test_what_peers_agree_on_stays_as_it_is_when_corrected() -> None:
    world = simulate(swarm("gossip", {}, 4, 6))
    found = weights(world)
    for vector in found:
        torch.testing.assert_close(vector, found[0], rtol=1e-5, atol=1e-5)
        assert 0.5 < float(vector.var()) < 2


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gossip", {"own": 1.2}, "own must be in 0..1, got 1.2"),
        ("gossip", {"target": -0.5}, "target must be in 0..1, got -0.5"),
        ("gossip", {"correct": 2}, "correct must be 0 or 1, got 2"),
        ("gossip", {"strangers": 0.5}, "strangers must be a whole number, got 0.5"),
        ("gossip", {"own": math.nan}, "own must be a finite number"),
        ("dimat", {"samples": 0}, "samples must be above 0"),
        ("dimat", {"samples": 1e9}, "'samples' must be <= 65536"),
    ],
)
def test_parameters_that_make_no_sense_are_named(name: str, args: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, args)
    assert message in str(caught.value)


def test_dimat_refuses_other_models_and_groups_that_are_no_pairs() -> None:
    with pytest.raises(ConfigError, match=r"units can be matched in an nn\.Sequential of linear layers"):
        run_field(FieldCase("dimat", {"inner_steps": 1}, 2, 1, make_task=Pull))
    with pytest.raises(ConfigError, match="dimat merges pairs, and this group has 4 peers"):
        run_field(FieldCase("dimat", {"inner_steps": 1}, 4, 1, group=4, alpha=None))
