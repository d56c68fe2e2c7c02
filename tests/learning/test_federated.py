"""FedAvg and SCAFFOLD on quadratics of unlike curvature: fixed points, sampling, and peers that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.learning.run import Run
from shoal.learning.shard import Shard, frozen_random
from shoal.learning.strategies import resolve
from shoal.learning.strategies.scaffold import Control
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.memory import Route

from ..sim.tiny import SIZE, Point, Pull, target

STEPS, RATE = 10, 0.1


def curvature(peer: bytes) -> Tensor:
    """Of each coordinate: between 0.2 and 2."""
    values = frozen_random(int.from_bytes(peer[:8], "big"), "curvature").uniform(0.2, 2.0, SIZE)
    return torch.from_numpy(values).float()


class Bowl(Pull):
    """Peer i pulls with a strength of its own in each coordinate: ``h_i (target_i - θ)``."""

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        while True:
            yield torch.stack([target(shard.peer), curvature(shard.peer)])[None]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, Point)
        where, strength = batch[0]
        return 0.5 * (strength * (model.at - where).square()).sum()


def optimum(peers: list[bytes]) -> Tensor:
    """Where the sum of all losses is least."""
    strength = torch.stack([curvature(peer) for peer in peers])
    return (strength * torch.stack([target(peer) for peer in peers])).sum(0) / strength.sum(0)


def fixed_point(peers: list[bytes]) -> Tensor:
    """Where FedAvg stays: each peer goes ``P_i = 1 - (1 - η h_i)^K`` of the way to its own target."""
    way = 1 - (1 - RATE * torch.stack([curvature(peer) for peer in peers])) ** STEPS
    return (way * torch.stack([target(peer) for peer in peers])).sum(0) / way.sum(0)


def swarm(strategy: str, nodes: int, rounds: int, participants: int = 0, **more: Any) -> Scenario:
    args = (("inner_steps", float(STEPS)), ("rate", RATE), ("participants", float(participants)))
    late = more.get("late", ())
    founding = Founding(strategy=strategy, strategy_args=args, min_peers=nodes - len(late), rounds=rounds)
    return Scenario(nodes, founding, make_task=Bowl, route=Route(latency=0.02), **more)


def keys(world: World) -> list[bytes]:
    return sorted(member.run.me.key for member in world.live())


def shared(world: World) -> Tensor:
    assert len({member.run.digest() for member in world.live()}) == 1
    return world.live()[0].run.weights()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def controls(run: Run) -> tuple[Tensor, Tensor]:
    """What all share, and what is this peer's own."""
    return run.snapshots[-1].vectors["control.variate"], run.snapshots[-1].own["control.variate"]


def test_fedavg_ends_at_its_own_fixed_point_and_not_at_the_optimum() -> None:
    world = simulate(swarm("fedavg", 4, 40))
    found, peers = shared(world), keys(world)
    assert off(found, fixed_point(peers)) < 1e-5
    assert off(found, optimum(peers)) > 0.05


def test_fedavg_takes_the_mean_over_exactly_those_that_were_drawn() -> None:
    world = simulate(swarm("fedavg", 6, 12, participants=2))
    shared(world)
    members = [report.members for report in world.members[0].run.reports]
    assert all(len(each) == 2 for each in members)
    assert len(set(members)) > 4  # others every time
    assert {peer for each in members for peer in each} == {member.peer for member in world.live()}


def test_scaffold_ends_at_the_optimum_with_all_and_with_some_of_the_peers() -> None:
    for participants, rounds in ((0, 60), (2, 150)):
        world = simulate(swarm("scaffold", 5, rounds, participants))
        assert off(shared(world), optimum(keys(world))) < 1e-4, participants
        common = controls(world.members[0].run)[0]
        own = torch.stack([controls(member.run)[1] for member in world.live()])
        # The invariant of the method: c is the mean of all c_i at all times.
        assert off(common, own.mean(0)) < 1e-5


def test_scaffold_with_the_control_variates_off_would_be_fedavg() -> None:
    # Its first round has none yet.
    one, other = simulate(swarm("scaffold", 4, 1)), simulate(swarm("fedavg", 4, 1))
    assert off(shared(one), shared(other)) < 1e-6


def test_control_variates_outlive_a_restart() -> None:
    kept: dict[str, Tensor] = {}

    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 8, "round 8")
        world.stop(2)
        await world.until(lambda: world.members[2].ended, "the end of node 2")
        kept["own"] = world.members[2].run.snapshots[-1].own["control.variate"].clone()
        member = world.restart(2)
        await world.until(lambda: member.node.run_here is not None and bool(member.run.owned), "what was saved")
        kept["found"] = member.run.owned["control.variate"].clone()

    world = simulate(swarm("scaffold", 4, 80, participants=2), script)
    assert torch.equal(kept["own"], kept["found"])
    assert off(shared(world), optimum(keys(world))) < 1e-4


def test_whoever_leaves_for_good_leaves_no_bias_behind_and_newcomers_bring_none() -> None:
    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 10, "round 10")
        world.kill(1)
        await world.until(lambda: founder.run.round >= 20, "round 20")
        world.start(4)

    world = simulate(swarm("scaffold", 5, 160, participants=2, late=(4,)), script)
    assert len(world.live()) == 4
    assert off(shared(world), optimum(keys(world))) < 1e-4
    common = controls(world.members[0].run)[0]
    own = torch.stack([controls(member.run)[1] for member in world.live()])
    assert off(common, own.mean(0)) < 1e-5


def test_a_peer_whose_work_was_left_out_keeps_its_control_variate() -> None:
    seen: dict[int, list[bool]] = {}

    async def script(world: World) -> None:
        before: dict[int, Tensor] = {}

        def see(member: Member, event: Any) -> None:
            if (event.phase, event.what) != ("commit", "done"):
                return
            own = member.run.snapshots[-1].own.get("control.variate", torch.zeros(SIZE))
            took_part = member.run.me.text in member.run.reports[-1].members
            moved = not torch.equal(own, before.get(member.number, torch.zeros(SIZE)))
            seen.setdefault(member.number, []).append(moved == took_part)
            before[member.number] = own

        world.hooks.append(see)

    simulate(swarm("scaffold", 5, 12, participants=2), script)
    assert sorted(seen) == [0, 1, 2, 3, 4] and all(all(each) for each in seen.values())


def test_a_control_variate_goes_on_from_what_was_saved() -> None:
    one, other = Control(), Control()
    one.value, one.roster = torch.randn(5), torch.arange(4.0)
    other.restore(one.vectors())
    assert torch.equal(one.variate(torch.zeros(5)), other.variate(torch.zeros(5)))
    assert torch.equal(one.roster, other.roster)
    other.restore({})
    assert other.vectors() == {} and torch.equal(other.variate(torch.ones(3)), torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("scaffold", {"rate": 0.0}, "rate must be above 0, got 0.0"),
        ("fedavg", {"participants": -1.0}, "participants must not be negative, got -1"),
        ("fedavg", {"participants": 1.5}, "participants must be a whole number, got 1.5"),
    ],
)
def test_parameters_that_make_no_sense_are_named(name: str, args: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, args)
    assert message in str(caught.value)
