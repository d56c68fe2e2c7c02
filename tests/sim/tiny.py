"""A task of 64 numbers whose every contribution can be computed by hand, and swarms that train it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.faults import Faults
from shoal.learning.shard import Shard, frozen_random
from shoal.learning.task import Task
from shoal.node.node import Founding
from shoal.sim.world import Scenario, World
from shoal.transport.identity import PeerId
from shoal.transport.memory_flow import Route

#: Numbers in the model. Four slices of 16: of five owners one gets none.
SIZE = 64
#: What one step moves towards the peer's target.
RATE = 0.25
LATENCY = 0.02


def target(peer: bytes) -> Tensor:
    """Where the peer ``peer`` pulls: its own, fixed vector of shape ``(SIZE,)``."""
    values = frozen_random(int.from_bytes(peer[:8], "big"), "target").standard_normal(SIZE)
    return torch.from_numpy(values).float()


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(SIZE))


class Pull(Task):
    """Every peer pulls the weights θ towards a target of its own: one step moves them by ``RATE (target - θ)``."""

    name: ClassVar[str] = "pull"
    step_seconds: ClassVar[float] = 0.05

    def model(self) -> nn.Module:
        return Point()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=RATE)

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        while True:
            yield target(shard.peer)[None]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, Point)
        return 0.5 * (model.at - batch[0]).square().sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Point)
        return {"norm": float(model.at.norm())}


def contribution(start: Tensor, peer: bytes, steps: int) -> Tensor:
    """What the peer contributes to a round of DiLoCo that begins at ``start``, by hand: its outer gradient."""
    at = start.clone()
    for _ in range(steps):
        at = at - RATE * (at - target(peer))
    return start - at


def mean_of(start: Tensor, members: Sequence[str], steps: int) -> Tensor:
    """The mean of the members' contributions, in the order in which a round names them."""
    parts = [contribution(start, PeerId.parse(member).key, steps) for member in members]
    return exact.weighted_mean(parts, [1.0] * len(parts))


#: Inner steps of a round, and the outer step: with rate 1 and no momentum the new weights are ``start - mean``.
STEPS = 2
PLAIN = (("inner_steps", float(STEPS)), ("outer_lr", 1.0), ("momentum", 0.0))


def scenario(
    nodes: int,
    rounds: int,
    *,
    seed: int = 0,
    mode: str = "available",
    late: tuple[int, ...] = (),
    faults: dict[int, Faults] | None = None,
    slowness: float = 1.0,
) -> Scenario:
    """``nodes`` peers that train :class:`Pull` with plain DiLoCo for ``rounds`` rounds; it begins without the late.

    A round takes about ``0.25 + 0.1 * slowness`` virtual seconds.
    """
    founding = Founding(strategy="diloco", strategy_args=PLAIN, mode=mode, min_peers=nodes - len(late), rounds=rounds)
    route = Route(latency=LATENCY)
    return Scenario(
        nodes,
        founding,
        make_task=Pull,
        seed=seed,
        route=route,
        late=late,
        faults=faults or {},
        slowness=dict.fromkeys(range(nodes), slowness),
    )


class Watch:
    """Keeps the weights of every member after every round it reports, and checks the swarm's history in the end."""

    def __init__(self, world: World) -> None:
        self.weights: dict[tuple[int, int], Tensor] = {}
        world.hooks.append(self._event)
        self._world = world

    def _event(self, member: object, event: object) -> None:
        if (event.phase, event.what) == ("commit", "done"):  # type: ignore[attr-defined]
            report = member.run.reports[-1]  # type: ignore[attr-defined]
            self.weights[member.number, report.round] = member.run.weights()  # type: ignore[attr-defined]

    def check(self, rounds: int) -> None:
        """All live members hold the same bits, and each round moved them by the mean over exactly its members."""
        live = self._world.live()
        assert len({member.run.digest() for member in live}) == 1
        assert all(member.run.round == rounds for member in live)
        members: dict[int, tuple[str, ...]] = {}
        for member in live:
            for report in member.run.reports:
                assert members.setdefault(report.round, report.members) == report.members
        found: dict[int, Tensor] = {}
        for (_, round), weights in self.weights.items():
            assert torch.equal(found.setdefault(round, weights), weights), f"round {round}: weights differ"
        assert sorted(found) == list(range(1, rounds + 1))
        for round in range(2, rounds + 1):
            start = found[round - 1]
            assert torch.equal(found[round], exact.sub(start, mean_of(start, members[round], STEPS))), (
                f"round {round} is not the mean over {len(members[round])} members"
            )
