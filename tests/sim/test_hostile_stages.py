"""Peers that lie about stages, or send them what does not fit: they are refused, by name, and the run goes on.

The liars are whole nodes of the run, whose endpoints and words the tests take over.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.learning.pipeline import defaults
from shoal.learning.pipeline.cargo import pack_batch, pack_tensor
from shoal.learning.pipeline.messages import PULL, PUSH, STEP, Hop, Key, Pull, Push, Shape, StepDone
from shoal.learning.pipeline.parts import part_fault
from shoal.learning.pipeline.staged import Staged
from shoal.learning.pipeline.trainer import StageTrainer
from shoal.learning.shard import Shard
from shoal.learning.spec import ParameterSpec, RunSpec, SignedSpec, StageOf
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import RemoteRefused
from shoal.transport.identity import Identity

from .test_stages import Chain, founding, stage_of, weights_of

Script = Callable[[World], Awaitable[None]]


def staged(member: Member) -> Staged:
    assert member.node.staged is not None
    return member.node.staged.staged


def trainer_of(member: Member) -> StageTrainer:
    trainer = member.run.trainer
    assert isinstance(trainer, StageTrainer)
    return trainer


def by_stage(world: World, stage: int) -> list[Member]:
    return [member for member in world.live() if stage_of(member) == stage]


async def after_round(world: World, round: int) -> None:
    await world.until(
        lambda: any(e.what == "done" and e.round >= round for m in world.live() for e in m.events), f"round {round}"
    )


def play(script: Script, *, peers: int = 4, rounds: int = 8, make: Callable[[], Chain] = Chain) -> World:
    """``script`` in a run of two stages, which must end, and learn."""
    scenario = Scenario(peers, founding(2, peers, rounds=rounds), make_task=make, evaluate_every=1, limit=120)
    world = simulate(scenario, script)
    fits = [r.metric for m in by_stage(world, 0) for r in m.run.reports if r.metric is not None]
    assert fits[-1] > fits[0]
    assert all(bool(torch.isfinite(weights).all()) for weights in weights_of(world, 2))
    return world


async def refused(sending: Awaitable[object]) -> str:
    with pytest.raises(RemoteRefused) as caught:
        await sending
    return caught.value.code


def pushed(liar: Member, victim: Member, **changes: Any) -> tuple[Push, list[memoryview]]:
    """A micro-batch as a feeder would send it."""
    given = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    tensors, nest = pack_batch((torch.zeros(8, 6), torch.zeros(8, 3)), torch.zeros(8, 6))
    packed = [pack_tensor(given), *map(pack_tensor, tensors)]
    key = Key(staged(liar).me, trainer_of(victim).flow.step + 1, 200)
    push = Push(staged(liar).crew.run_id, key, 77, (0, 1), 1, 8, tuple(shape for shape, _ in packed), nest)
    return attrs.evolve(push, **changes), [data for _, data in packed]


def call(liar: Member, victim: Member, method: Any, message: object, body: Sequence[memoryview] = ()) -> Awaitable[Any]:
    return liar.node.endpoint.call(staged(victim).me, method, message, body=list(body), timeout=5.0)


# --- who may send -----------------------------------------------------------------------------------------------------


def test_micro_batches_come_from_who_holds_the_stage_before_and_steps_end_by_feeders() -> None:
    codes: dict[str, str] = {}

    async def script(world: World) -> None:
        await after_round(world, 1)
        (liar, victim), (feeder, *_) = by_stage(world, 1), by_stage(world, 0)
        run = staged(liar).crew.run_id
        push, body = pushed(liar, victim)
        codes["not before"] = await refused(call(liar, victim, PUSH, push, body))
        codes["other stage"] = await refused(call(liar, feeder, PUSH, push, body))
        as_feeder = attrs.evolve(push, key=attrs.evolve(push.key, feeder=staged(feeder).me))
        codes["for another"] = await refused(call(liar, victim, PUSH, as_feeder, body))
        done = StepDone(run, trainer_of(victim).flow.step, ())
        codes["step"] = await refused(call(liar, victim, STEP, done))
        codes["run"] = await refused(call(liar, victim, STEP, attrs.evolve(done, run=b"\1" * 32)))
        shape, data = pack_tensor(torch.full((8, 8), 1e30))
        pull = Pull(run, push.key, 5, (Hop(staged(liar).me, 5),), shape, 0.0)
        codes["gradient"] = await refused(call(liar, feeder, PULL, pull, [data]))

    play(script)
    assert codes == {
        "not before": "stranger",
        "other stage": "other-stage",
        "for another": "stranger",
        "step": "stranger",
        "run": "unknown-run",
        "gradient": "not-wanted",
    }


def test_a_feeder_cannot_feed_for_another_or_more_than_is_there() -> None:
    codes: dict[str, str] = {}

    async def script(world: World) -> None:
        await after_round(world, 1)
        (liar, other), (victim, *_) = by_stage(world, 0), by_stage(world, 1)

        async def send(name: str, change: Callable[[Push], Push], body: Sequence[memoryview] | None = None) -> None:
            push, sound = pushed(liar, victim)
            codes[name] = await refused(call(liar, victim, PUSH, change(push), sound if body is None else body))

        await send("other's", lambda p: attrs.evolve(p, key=attrs.evolve(p.key, feeder=staged(other).me)))
        await send("samples", lambda p: attrs.evolve(p, samples=10**9))
        await send("far ahead", lambda p: attrs.evolve(p, key=attrs.evolve(p.key, step=p.key.step + 1000)))
        coded, data = pack_tensor(torch.ones(8, 8), "int8")
        await send("codec", lambda p: attrs.evolve(p, shapes=(coded, *p.shapes[1:])), [data])
        await send("body", lambda p: p, [])
        huge = Shape((1 << 13, 1 << 13), "float32", "", 1 << 28)  # as much as there may be at all
        await send("too large", lambda p: attrs.evolve(p, shapes=(huge, huge)), [])
        whole_numbers, data = pack_tensor(torch.ones(8, 8, dtype=torch.int64))
        await send("no floats", lambda p: attrs.evolve(p, shapes=(whole_numbers,), nest="0"), [data])

    play(script)
    assert codes.pop("far ahead") == "busy"
    assert codes.pop("other's") == "stranger"
    assert set(codes.values()) == {"bad_request"}
    assert len(codes) == 5


def test_what_one_peer_sends_takes_no_more_memory_than_is_meant_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(defaults, "MAX_HELD_OF_ONE", 4000)  # real micro-batches take 700 each

    async def script(world: World) -> None:
        await after_round(world, 1)
        (liar, *_), (victim, *_) = by_stage(world, 0), by_stage(world, 1)
        for index in range(30):
            push, body = pushed(liar, victim)
            ahead = attrs.evolve(push, key=attrs.evolve(push.key, step=push.key.step + 7, index=index))
            try:
                await call(liar, victim, PUSH, ahead, body)
                taken.append("taken")
            except RemoteRefused as error:
                taken.append(error.code)

    play(script)
    assert "busy" in taken
    assert 0 < taken.count("taken") <= 4000 // (8 * 8 * 4)


def test_a_micro_batch_that_does_not_fit_is_left_out_and_the_node_lives() -> None:
    seen: list[int] = []

    async def script(world: World) -> None:
        await after_round(world, 1)
        (liar, *_), (victim, *_) = by_stage(world, 0), by_stage(world, 1)
        for _ in range(20):
            push, body = pushed(liar, victim)
            shape, data = pack_tensor(torch.ones(8, 5))
            await call(liar, victim, PUSH, attrs.evolve(push, shapes=(shape, *push.shapes[1:])), [data, *body[1:]])
            with trio.move_on_after(1.0):
                while not trainer_of(victim).refused:
                    await trio.sleep(0.01)
            if trainer_of(victim).refused:
                break
        seen.append(trainer_of(victim).refused)

    play(script, rounds=20)
    assert seen[0] >= 1


def test_a_feeder_whose_activations_are_not_finite_costs_steps_but_no_weights() -> None:
    poisoned: list[str] = []

    class Poisoned(Chain):
        def batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
            for number, (x, y) in enumerate(super().batches(shard), 1):
                if number == 2:
                    poisoned.append("")
                    x = torch.full_like(x, float("nan"))
                yield x, y

    made: list[Chain] = []

    def make() -> Chain:
        made.append(Poisoned() if not made else Chain())
        return made[-1]

    async def script(world: World) -> None:
        pass

    play(script, rounds=8, make=make)
    assert poisoned


# --- whose word counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [0, 1, 1 << 40])
def test_a_run_that_nobody_has_shown_is_no_stage(generation: int) -> None:
    believed: list[bool] = []

    async def script(world: World) -> None:
        await after_round(world, 1)
        (liar, *_), (victim, *_) = by_stage(world, 1), by_stage(world, 0)
        honest, say = staged(liar).crew.own, staged(liar).crew.say
        for state in ("loading", "ready"):
            say(stage=0, state=state, part=b"\7" * 32, generation=generation, step=1 << 40)
            await trio.sleep(0.3)
            assert staged(victim).crew.beats[staged(liar).me].part == b"\7" * 32
            believed.append(staged(liar).me in staged(victim).crew.holders(0, loading=True))
            believed.append(staged(victim).crew.usual_step() > 1 << 20)
        say(**{name: getattr(honest, name) for name in ("stage", "state", "part", "generation", "step")})

    play(script, rounds=12)
    assert believed == [False] * 4


def parts() -> tuple[bytes, RunSpec, Identity, RunSpec]:
    """A run in two stages, and the spec of its second one."""
    found: list[tuple[bytes, RunSpec, Identity, RunSpec]] = []

    async def script(world: World) -> None:
        await after_round(world, 1)
        (member,) = by_stage(world, 1)
        crew = staged(member).crew
        part = crew.part(1)
        assert part is not None
        found.append((crew.run_id, crew.spec, member.node.identity, crew.parts[part[1]].open()))

    simulate(Scenario(2, founding(2, 2, rounds=2), make_task=Chain, limit=60), script)
    return found[0]


def test_a_stages_run_is_as_the_founder_of_the_whole_wanted_it() -> None:
    run, whole, identity, sound = parts()

    def fault(generation: int = 0, stage: int = 1, **changes: Any) -> str | None:
        spec = attrs.evolve(sound, **changes)
        return part_fault(run, whole, SignedSpec.sign(identity, spec), stage, generation)

    rescued = StageOf(run, 1, 3, defaults.RECOVERED_RATE, 40)
    assert fault() is None
    assert fault(3, part=rescued) is None
    assert fault(rounds=2, min_peers=1) is None
    wrong = {
        "of something else": fault(3),
        "times the rate": fault(3, part=attrs.evolve(rescued, rate=9.0)),
        "something else": fault(part=attrs.evolve(rescued, whole=b"\2" * 32, generation=0, rate=1.0)),
        "differs from the whole in seed": fault(seed=whole.seed + 1),
        "differs from the whole in strategy": fault(strategy="diloco"),
        "parameters": fault(parameters=(*sound.parameters, ParameterSpec("more", (1 << 20,), "float32"))),
    }
    for words, said in wrong.items():
        assert said is not None, words
        assert words in said
    assert fault(part=None) is not None
    forged = attrs.evolve(SignedSpec.sign(identity, sound), signature=b"\0" * 64)
    assert part_fault(run, whole, forged, 1, 0) is not None


def test_a_beat_of_a_stage_that_there_is_not_leaves_nothing_behind() -> None:
    async def script(world: World) -> None:
        await after_round(world, 1)
        (member, *_) = by_stage(world, 0)
        crew, stranger = staged(member).crew, Identity(b"\5" * 32).peer_id
        beat = attrs.evolve(crew.own, stage=crew.stages)
        for _ in range(3):
            crew._on_beat(SimpleNamespace(peer=stranger, request=beat))  # type: ignore[arg-type]
        assert stranger not in crew.beats
        assert stranger not in crew._heard
        assert stranger not in crew._spoke

    play(script)


def test_a_generation_far_beyond_those_known_does_not_count() -> None:
    answers: list[str | None] = []

    async def script(world: World) -> None:
        await after_round(world, 1)
        (member, *_), (other, *_) = by_stage(world, 0), by_stage(world, 1)
        crew = staged(member).crew
        part = crew.part(1)
        assert part is not None
        sound = crew.parts[part[1]].open()
        for generation in (65, 2):
            of = StageOf(crew.run_id, 1, generation, defaults.RECOVERED_RATE, 0)
            signed = SignedSpec.sign(other.node.identity, attrs.evolve(sound, founder=staged(other).me, part=of))
            answers.append(crew.prove(signed, 1, generation))
        assert crew.part(1) == part  # nobody is in the new one
        assert crew.generation(1) == 2
        await trio.sleep(2 * defaults.BEAT_EVERY)
        assert set(crew.parts) <= {beat.part for beat in (crew.own, *crew.beats.values())}, "what nobody is in stays"

    play(script)
    assert answers[0] is not None
    assert "0 is the newest one known" in answers[0]
    assert answers[1] is None


# --- where peers are needed -------------------------------------------------------------------------------------------


def test_peers_go_where_others_are_missing() -> None:
    """Six peers, three of each stage; two of one die, and one of the other three takes their place."""

    class Even(Chain):
        step_seconds = 1.0

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))

    before: list[int] = []

    async def script(world: World) -> None:
        await after_round(world, 3)
        before.extend(len(by_stage(world, stage)) for stage in (0, 1))
        for member in by_stage(world, 1)[:2]:
            world.kill(member.number)
        await world.until(lambda: len(by_stage(world, 1)) == 2 and _all_train(world), "a peer at the other stage", 120)
        rounds = max(m.run.round for m in by_stage(world, 1))
        await world.until(lambda: min(m.run.round for m in by_stage(world, 1)) >= rounds + 2, "it trains there")

    world = simulate(Scenario(6, founding(2, 6, rounds=40), make_task=Even, limit=600), script)
    assert before == [3, 3]
    assert [len(by_stage(world, stage)) for stage in (0, 1)] == [2, 2]


def _all_train(world: World) -> bool:
    return all(staged(member).crew.own.state == "ready" for member in world.live())
