"""FedAvg and SCAFFOLD on quadratics of unlike curvature: fixed points, sampling, and peers that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

from shoal.learning.shard import Shard, frozen_random
from shoal.learning.strategies import resolve
from shoal.learning.strategies.scaffold import Control
from shoal.node.node import Founding
from shoal.sim.determinism import run_virtual
from shoal.sim.field import Churn, Field, FieldCase
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError
from shoal.transport.memory import Route

from ..sim.tiny import SIZE, Point, Pull, target

STEPS, RATE = 5, 0.3


def curvature(peer: bytes) -> Tensor:
    """Of each coordinate: between 0.2 and 2."""
    values = frozen_random(int.from_bytes(peer[:8], "big"), "curvature").uniform(0.2, 2.0, SIZE)
    return torch.from_numpy(values).float()


class Bowl(Pull):
    """Peer i pulls with a strength of its own in each coordinate: ``h_i (target_i - θ)``."""

    step_seconds: ClassVar[float] = 0.002

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


def arguments(participants: int) -> dict[str, float]:
    return {"inner_steps": float(STEPS), "rate": RATE, "participants": float(participants)}


def swarm(strategy: str, nodes: int, rounds: int, participants: int = 0, **more: Any) -> Scenario:
    """With the whole protocol."""
    args = tuple(arguments(participants).items())
    founding = Founding(strategy=strategy, strategy_args=args, min_peers=nodes, rounds=rounds)
    return Scenario(nodes, founding, make_task=Bowl, route=Route(latency=0.02), **more)


def field(strategy: str, peers: int, rounds: int, participants: int = 0, churn: tuple[Churn, ...] = ()) -> Ending:
    """In the light world, in which many rounds take no time."""
    case = FieldCase(
        strategy, arguments(participants), peers, rounds, make_task=Bowl, evaluate_every=0, churn=churn
    )  # fmt: skip
    ended = Field(case)
    found = run_virtual(ended.run, seed=0)
    keys = [ended.ids[number].key for number in sorted(found.weights)]
    controls = [ended.runs[number].peer for number in sorted(found.weights)]
    return Ending(
        keys=keys,
        weights=next(iter(found.weights.values())),
        shared=controls[0].vectors().get("control.variate"),
        own=torch.stack([peer.own_vectors().get("control.variate", torch.zeros(SIZE)) for peer in controls]),
    )


@attrs.frozen(eq=False)
class Ending:
    """Who was there at the end, what they shared, and the control variates: shared, and each one's own."""

    keys: list[bytes]
    weights: Tensor
    shared: Tensor | None
    own: Tensor


def shared(world: World) -> Tensor:
    assert len({member.run.digest() for member in world.live()}) == 1
    return world.live()[0].run.weights()


def off(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    return float((found - wanted).abs().max())


def test_fedavg_ends_at_its_own_fixed_point_and_not_at_the_optimum() -> None:
    end = field("fedavg", 6, 30)
    assert off(end.weights, fixed_point(end.keys)) < 1e-5
    assert off(end.weights, optimum(end.keys)) > 0.05


def test_fedavg_takes_the_mean_over_exactly_those_that_were_drawn() -> None:
    world = simulate(swarm("fedavg", 5, 8, participants=2))
    shared(world)
    members = [report.members for report in world.members[0].run.reports]
    assert all(len(each) == 2 for each in members)
    assert len(set(members)) > 3  # others every time
    drawn = {peer for each in members for peer in each}
    assert len(drawn) >= 4 and drawn <= {member.peer for member in world.live()}


def test_scaffold_ends_at_the_optimum_with_all_and_with_some_of_the_peers() -> None:
    for participants, rounds in ((0, 40), (3, 100)):
        end = field("scaffold", 6, rounds, participants)
        assert off(end.weights, optimum(end.keys)) < 1e-4, participants
        # The invariant of the method: c is the mean of all c_i at all times.
        assert off(end.shared, end.own.mean(0)) < 1e-5


def test_the_first_round_of_scaffold_which_has_no_control_variates_yet_is_one_of_fedavg() -> None:
    one, other = field("scaffold", 4, 1), field("fedavg", 4, 1)
    assert off(one.weights, other.weights) < 1e-6


def test_control_variates_outlive_a_restart() -> None:
    kept: dict[str, Tensor] = {}

    async def script(world: World) -> None:
        founder = world.members[0]
        await world.until(lambda: founder.node.run_here is not None and founder.run.round >= 4, "round 4")
        world.stop(2)
        await world.until(lambda: world.members[2].ended, "the end of node 2")
        kept["own"] = world.members[2].run.snapshots[-1].own["control.variate"].clone()
        member = world.restart(2)
        await world.until(lambda: member.node.run_here is not None and bool(member.run.owned), "what was saved")
        kept["found"] = member.run.owned["control.variate"].clone()

    world = simulate(swarm("scaffold", 3, 16, participants=2), script)
    assert torch.equal(kept["own"], kept["found"])
    shared(world)
    digests = {member.run.snapshots[-1].digest for member in world.live()}
    owns = [member.run.snapshots[-1].own["control.variate"] for member in world.live()]
    assert len(digests) == 1 and not torch.equal(owns[0], owns[1])  # what is one's own is in no digest


def test_whoever_leaves_for_good_leaves_no_bias_behind_and_newcomers_bring_none() -> None:
    churn = (Churn(3.0, 1, "leave"), Churn(6.0, 2, "leave"), Churn(9.0, 5, "join"), Churn(15.0, 1, "join"))
    end = field("scaffold", 6, 130, 2, churn)
    assert len(end.keys) == 5
    assert off(end.weights, optimum(end.keys)) < 1e-4
    assert off(end.shared, end.own.mean(0)) < 1e-5


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

    simulate(swarm("scaffold", 4, 8, participants=2), script)
    assert sorted(seen) == [0, 1, 2, 3] and all(all(each) for each in seen.values())


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
