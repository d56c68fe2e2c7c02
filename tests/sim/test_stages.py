"""Models in stages on whole nodes in virtual time: the same numbers as unsplit, and lost stages recovered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import trio
from torch import Tensor, nn

from shoal.learning.events import RoundReport
from shoal.learning.pipeline.cutting import stages_of
from shoal.learning.pipeline.messages import BEAT
from shoal.learning.pipeline.trainer import StageTrainer
from shoal.learning.shard import Shard
from shoal.learning.state import Layout, flatten_model
from shoal.learning.task import Task
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.identity import PeerId
from shoal.transport.memory_flow import Route


class Chain(Task):
    """Three layers, four samples at a time, plain gradient descent: what a step does can be computed by hand."""

    name: ClassVar[str] = "chain"
    step_seconds: ClassVar[float] = 0.05
    rate: ClassVar[float] = 0.2

    def __init__(self) -> None:
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.rate)

    def batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(shard.entropy("chain") >> 1)
        while True:
            x = torch.randn(8, 6, generator=generator)
            self.drawn.append((x, x[:, :3].sin()))
            yield self.drawn[-1]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 60).reshape(10, 6)
        return {"fit": -float(F.mse_loss(model(x), x[:, :3].sin()))}


def founding(stages: int, peers: int, *, rounds: int = 6, micro: int = 4, **more: object) -> Founding:
    return Founding("allreduce", rounds=rounds, min_peers=peers, stages=stages, micro=micro, **more)  # type: ignore[arg-type]


def stage_of(member: Member) -> int:
    assert member.node.staged is not None
    return member.node.staged.crew.own.stage


def weights_of(world: World, stages: int) -> list[Tensor]:
    """Of every stage, after the last commit of somebody who held it."""
    found: dict[int, Tensor] = {}
    for member in world.live():
        found[stage_of(member)] = member.run.weights()
    return [found[stage] for stage in range(stages)]


def reference(world: World, tasks: dict[int, Chain], rounds: int, stages: int) -> list[Tensor]:
    """What one machine makes of the same batches: in each round those of all feeders that gave something to it.

    A feeder draws one in every round that it is in, also when it comes too late to give anything.
    """
    torch.manual_seed(0)
    cut = stages_of(Chain(), stages)
    whole = nn.Sequential(*cut)
    optimizer = Chain().optimizer(whole)
    feeders = [member for member in world.live() if stage_of(member) == 0]
    reports: dict[int, RoundReport] = {r.round: r for member in feeders for r in member.run.reports}
    for round in range(1, rounds + 1):
        batches = []
        for member in feeders:
            if member.peer in reports[round].members:
                drawn = tasks[member.number].drawn
                batches.append(drawn[len(drawn) - rounds + round - 1])
        x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        optimizer.zero_grad()
        F.mse_loss(whole(x), y).backward()
        optimizer.step()
    return [flatten_model(Layout.of(module), module) for module in cut]


@pytest.mark.parametrize(
    ("stages", "peers", "micro"), [(2, 2, 1), (3, 3, 3), (4, 4, 4), (4, 4, 8), (2, 4, 2), (3, 6, 4), (2, 5, 3)]
)
def test_stages_train_what_the_unsplit_model_trains(stages: int, peers: int, micro: int) -> None:
    tasks: list[Chain] = []

    def make() -> Task:
        tasks.append(Chain())
        return tasks[-1]

    world = simulate(Scenario(peers, founding(stages, peers, micro=micro), make_task=make, evaluate_every=1, limit=120))
    by_number = dict(enumerate(tasks))
    expected = reference(world, by_number, 6, stages)
    fits = [report.metric for member in world.live() if stage_of(member) == 0 for report in member.run.reports]
    assert fits[-1] is not None
    assert fits[0] is not None
    assert fits[-1] > fits[0]
    for found, wanted in zip(weights_of(world, stages), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_peers_say_what_a_sample_takes_over_the_line_and_both_sides_of_a_boundary_say_the_same() -> None:
    world = simulate(Scenario(5, founding(3, 5), make_task=Chain, limit=120))
    said = [(stage_of(m), m.node.staged.crew.own) for m in world.live() if m.node.staged is not None]
    assert {stage for stage, _ in said} == {0, 1, 2}
    for stage, beat in said:
        # All layers are 8 wide but the first and the last: 8 float32 go on for each sample, and come.
        assert beat.out == (32 if stage < 2 else 0)
        assert beat.into == (32 if stage > 0 else 0)


class WideChain(Chain):
    """Much goes from the first layer to the second: 2 MiB for half a batch."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, 8), nn.Linear(8, 3))

    def batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(shard.entropy("chain") >> 1)
        while True:
            x = torch.randn(256, 6, generator=generator)
            yield x, x[:, :3].sin()


def test_what_uplinks_carry_is_measured_in_a_run_that_fills_them() -> None:
    route = Route(latency=0.02, bandwidth=1e6)  # of each pair: who sends to two sends twice as much
    world = simulate(
        Scenario(3, founding(2, 3, rounds=4, micro=2), make_task=WideChain, route=route, seed=1, limit=900)
    )
    said = [m.node.staged.crew.own for m in world.live() if m.node.staged is not None]
    feeders = [beat for beat in said if beat.stage == 0]
    assert feeders
    assert len(said) == 3
    for beat in feeders:
        to = sum(other.stage == 1 for other in said)
        assert beat.line == pytest.approx(to * 1e6, rel=0.3)
        assert beat.out == 4 * 4096


def test_the_same_seed_gives_the_same_run_to_the_bit() -> None:
    scenario = Scenario(4, founding(2, 4), make_task=Chain, limit=120)
    assert simulate(scenario).trace.hexdigest() == simulate(scenario).trace.hexdigest()


def killing(stage: int, after: int, delay: float) -> Callable[[World], Awaitable[None]]:
    """Kills the only holder of ``stage``, ``delay`` seconds after round ``after``."""

    async def script(world: World) -> None:
        def committed() -> bool:
            return any(e.what == "done" and e.round >= after for m in world.live() for e in m.events)

        await world.until(committed, f"round {after}")
        await trio.sleep(delay)
        (victim,) = [member for member in world.live() if stage_of(member) == stage]
        world.kill(victim.number)

    return script


@pytest.mark.parametrize("delay", [0.0, 0.07, 0.2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_without_holders_goes_on_elsewhere_within_two_seconds(stage: int, delay: float) -> None:
    # Five peers: some stage has two or three holders, of which one goes where nobody is left.
    killed_at, recovered_at, detail = 0.0, 0.0, ""

    async def script(world: World) -> None:
        nonlocal killed_at

        def note(member: Member, event: object) -> None:
            nonlocal recovered_at, detail
            if getattr(event, "what", "") == "recovered":
                recovered_at, detail = trio.current_time(), event.detail  # type: ignore[attr-defined]

        world.hooks.append(note)
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        await trio.sleep(delay)
        holders = [member for member in world.live() if stage_of(member) == stage]
        killed_at = trio.current_time()
        for member in holders:
            world.kill(member.number)

    world = simulate(Scenario(7, founding(3, 7, rounds=8), make_task=Chain, evaluate_every=1, limit=120), script)
    assert recovered_at, "nobody took the stage over"
    assert recovered_at - killed_at < 2.0
    assert "stage" in detail
    last = [report.round for member in world.live() if stage_of(member) == 0 for report in member.run.reports]
    assert max(last) >= 5


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_to_take_a_stage_over_does_it_also_who_founded_the_one_that_it_leaves(seed: int) -> None:
    """Four peers, three stages: one of the two replicas goes, now the one that founded its stage, now the other."""
    details: list[str] = []

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            if getattr(event, "what", "") == "recovered":
                details.append(f"{trio.current_time() - killed_at:.1f} s: {event.detail}")  # type: ignore[attr-defined]

        world.hooks.append(note)
        await world.until(lambda: any(e.what == "done" and e.round >= 3 for m in world.live() for e in m.events), "3")
        stages = [stage_of(member) for member in world.live()]
        only = [member for member in world.live() if stages.count(stage_of(member)) == 1]
        killed_at = trio.current_time()
        world.kill(only[seed % 2].number)

    scenario = Scenario(4, founding(3, 4, rounds=8), make_task=Chain, evaluate_every=1, limit=60, seed=seed)
    world = simulate(scenario, script)
    assert len(details) == 1
    assert float(details[0].split()[0]) < 2.0
    assert "the checkpoint of it" in details[0] or "mean of stages" in details[0]
    assert max(r.round for m in world.live() if stage_of(m) == 0 for r in m.run.reports) >= 3


def test_micro_batches_of_a_feeder_that_died_keep_no_place_from_those_of_the_next_one() -> None:
    """It dies when as many are between forward and backward as there may be at the stage before the last."""
    rounds: list[int] = []

    async def script(world: World) -> None:
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        (feeder,) = [member for member in world.live() if stage_of(member) == 0]
        (following,) = [member for member in world.live() if stage_of(member) == 1]
        trainer = following.run.trainer
        assert isinstance(trainer, StageTrainer)
        while trainer.flow.schedule.in_flight() < 2:
            await trio.sleep(0.01)
        world.kill(feeder.number)
        world.start(4)

        def trained() -> bool:
            new = [member for member in world.live() if member.node.run_here is not None and stage_of(member) == 0]
            return any(report.round >= 3 for member in new for report in member.run.reports)

        await world.until(trained, "training goes on", 30.0)
        rounds.append(1)
        world.nursery.cancel_scope.cancel()

    simulate(Scenario(5, founding(4, 4, rounds=200, micro=3), make_task=Chain, late=(4,), limit=100), script)
    assert rounds


def test_who_is_about_to_load_one_stage_takes_another_one_that_is_lost_meanwhile() -> None:
    """No round of the stage that it loads can take it in, as all wait for the lost one."""
    details: list[str] = []

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            if getattr(event, "what", "") == "recovered":
                details.append(f"{member.number} {trio.current_time() - killed_at:.1f} s")

        world.hooks.append(note)
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        late = world.start(2)
        # It leaves as soon as it waits to be admitted.
        await world.until(lambda: any(event.what == "wish" for event in late.events), "it loads a stage")
        (victim,) = [m for m in world.live() if m is not late and stage_of(m) != stage_of(late)]
        killed_at = trio.current_time()
        world.kill(victim.number)
        await world.until(lambda: bool(details), "the stage that was lost", 30.0)
        world.nursery.cancel_scope.cancel()

    simulate(Scenario(3, founding(2, 2, rounds=60), make_task=Chain, late=(2,), limit=100), script)
    assert details[0].startswith("2 ")
    assert float(details[0].split()[1]) < 2.0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_spare_that_only_ever_saw_all_stages_held_takes_one_over_as_soon_as_others(number: int) -> None:
    taken: list[float] = []

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            if getattr(event, "what", "") == "recovered":
                assert member is spare
                taken.append(trio.current_time() - killed_at)

        world.hooks.append(note)
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        spare = world.start(3)
        await trio.sleep(5.0)
        killed_at = trio.current_time()
        world.kill(number)
        await world.until(lambda: bool(taken), "the stage that was lost", 60.0)
        world.nursery.cancel_scope.cancel()

    # It has no memory for any stage, so that it takes none before one is lost.
    simulate(Scenario(4, founding(3, 3, rounds=400), make_task=Chain, late=(3,), memory={3: 1}, limit=200), script)
    assert taken[0] < 2.0


def test_a_stage_that_nobody_can_take_waits_for_who_joins_and_says_so() -> None:
    reasons: list[str] = []

    async def script(world: World) -> None:
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        (victim,) = [member for member in world.live() if stage_of(member) == 1 and member.number]
        world.kill(victim.number)
        await trio.sleep(10.0)
        (left,) = world.live()
        assert left.node.staged is not None
        reasons.append(left.node.staged.staged.reason)
        world.start(2)

    world = simulate(Scenario(3, founding(2, 2, rounds=8), make_task=Chain, late=(2,), limit=100), script)
    assert reasons[0].startswith("stage 1 stays lost")
    assert reasons[0].endswith("waiting for a peer to join")
    assert max(report.round for report in world.members[0].run.reports) == 8


def test_an_inner_stage_comes_back_as_the_mean_of_its_neighbours() -> None:
    class Equal(Chain):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    details: list[str] = []

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            if getattr(event, "what", "") == "recovered":
                details.append(event.detail)  # type: ignore[attr-defined]

        world.hooks.append(note)
        await killing(1, 2, 0.05)(world)

    simulate(Scenario(5, founding(4, 5, rounds=6), make_task=Equal, limit=120), script)
    assert len(details) == 1
    assert "the mean of stages 0 and 2" in details[0]


def test_a_stalled_replica_is_gone_round() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        # Three replicas: two of them are a majority, and need not wait for a lease to run out.
        (frozen, *others) = [member for member in world.live() if stage_of(member) == 1]
        assert len(others) == 2
        before = max(r.round for m in world.live() if stage_of(m) == 0 for r in m.run.reports)
        world.freeze(frozen.number)
        await trio.sleep(20.0)
        done = max(r.round for m in world.live() if stage_of(m) == 0 for r in m.run.reports)
        assert done >= before + 3, "the others waited for it"
        world.kill(frozen.number)

    simulate(Scenario(6, founding(2, 6, rounds=60), make_task=Chain, limit=300), script)


def test_who_comes_later_takes_the_stage_that_needs_it_and_trains() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: any(e.what == "done" and e.round >= 1 for m in world.live() for e in m.events), "1")
        world.start(2)

    world = simulate(Scenario(3, founding(2, 2, rounds=30), make_task=Chain, late=(2,), limit=200), script)
    late = world.members[2]
    assert [report for report in late.run.reports if late.peer in report.members]


def test_an_answer_that_was_given_before_the_last_beat_does_not_take_that_back() -> None:
    stays: list[bool] = []

    async def script(world: World) -> None:
        await world.until(lambda: any(e.what == "done" and e.round >= 2 for m in world.live() for e in m.events), "2")
        (holder,) = [member for member in world.live() if stage_of(member) == 1]
        endpoint, staged = holder.node.endpoint, holder.node.staged
        assert staged is not None
        call = endpoint.call

        async def late(peer: PeerId, method: Any, *arguments: Any, **more: Any) -> Any:
            answer = await call(peer, method, *arguments, **more)
            if method is BEAT:
                await trio.sleep(0.5)
            return answer

        endpoint.call = late  # type: ignore[method-assign]
        await world.until(staged.crew.over, "the end")
        for _ in range(16):
            await trio.sleep(0.05)
            stays.append(staged.crew.over())

    simulate(Scenario(2, founding(2, 2, rounds=60), make_task=Chain, limit=100), script)
    assert all(stays)
    assert stays


def test_swapped_micro_batches_train_too() -> None:
    class Equal(Chain):
        def model(self) -> nn.Module:
            return nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 3))

    world = simulate(Scenario(6, founding(6, 6, rounds=4, swap=True), make_task=Equal, evaluate_every=1, limit=120))
    fits = [report.metric for member in world.live() if stage_of(member) == 0 for report in member.run.reports]
    assert fits[-1] is not None
    assert fits[0] is not None
    assert fits[-1] > fits[0]


def test_when_all_peers_are_killed_and_start_again_they_go_on_from_what_they_kept() -> None:
    details: list[str] = []
    before: dict[int, tuple[int, int]] = {}

    async def script(world: World) -> None:
        def note(member: Member, event: object) -> None:
            if getattr(event, "what", "") == "recovered":
                details.append(event.detail)  # type: ignore[attr-defined]

        world.hooks.append(note)
        await world.until(lambda: any(e.what == "done" and e.round >= 20 for m in world.live() for e in m.events), "20")
        for member in list(world.live()):
            before[member.number] = (stage_of(member), member.run.round)
            world.kill(member.number)
        await trio.sleep(5.0)
        # The only holder of a stage comes last, long after the others.
        alone = [n for n, (stage, _) in before.items() if [s for s, _ in before.values()].count(stage) == 1]
        for number in sorted(before, key=lambda n: (n in alone[:1], n)):
            if number in alone[:1]:
                await trio.sleep(15.0)
            world.start(number)
            await trio.sleep(1.0)

    world = simulate(Scenario(4, founding(3, 4, rounds=60), make_task=Chain, evaluate_every=1, limit=300), script)
    assert not details, "a stage was founded anew though its holder came back"
    for member in world.live():
        restored = [event for event in member.events if event.what == "restored"]
        assert restored, "it began anew"
        assert stage_of(member) == before[member.number][0]
    rounds = [r.round for m in world.live() if stage_of(m) == 0 for r in m.run.reports]
    assert min(rounds) > 1
    assert max(rounds) == 60
