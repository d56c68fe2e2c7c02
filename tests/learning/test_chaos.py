"""Whole swarms under random kills, stops, restarts, freezes and partitions, in virtual time."""

from __future__ import annotations

import random
from typing import ClassVar

import attrs
import pytest
import trio

from shoal.learning.events import Event
from shoal.sim.world import Member, World, simulate

from ..sim.tiny import Pull
from .test_chain import agree, reach, scenario

NODES = 5
ROUNDS = 50
FAULTS = 8


class Brisk(Pull):
    """Rounds of about one second."""

    step_seconds: ClassVar[float] = 0.5


async def torment(world: World, chance: random.Random) -> None:
    """A fault every few seconds, a majority always alive and awake; in the end everything is well again."""
    down: list[int] = []
    asleep: list[int] = []
    few = (NODES - 1) // 2
    for _ in range(FAULTS):
        await trio.sleep(chance.uniform(0.3, 6.0))
        awake = [n for n in range(NODES) if n not in down and n not in asleep]
        victim, spare = chance.choice(awake), len(down) + len(asleep) < few
        match chance.choice(("kill", "kill", "stop", "restart", "restart", "freeze", "thaw", "part", "heal")):
            case "kill" if spare:
                down.append(victim)
                world.kill(victim)
            case "stop" if spare:
                down.append(victim)
                world.stop(victim)
                await world.until(lambda n=victim: world.members[n].ended, "a stop", 10.0)  # type: ignore[misc]
            case "restart" if down:
                world.restart(down.pop(chance.randrange(len(down))))
            case "freeze" if spare:
                asleep.append(victim)
                world.freeze(victim)
            case "thaw" if asleep:
                world.unfreeze(asleep.pop())
            case "part":
                order, cut = chance.sample(range(NODES), NODES), chance.randrange(1, NODES)
                world.partition(tuple(order[:cut]), tuple(order[cut:]))
            case "heal":
                world.heal()
    world.heal()
    for number in asleep:
        world.unfreeze(number)
    for number in down:
        world.restart(number)


@pytest.mark.parametrize("mode", ["strict", "available"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_after_any_mixture_of_faults_all_end_with_the_same_bits_and_a_strict_run_never_forks(
    mode: str, seed: int
) -> None:
    commits: dict[tuple[int, int], dict[bytes, None]] = {}

    def hook(member: Member, event: Event) -> None:
        if (event.phase, event.what) == ("commit", "done"):
            record = member.run.membership.head.record
            commits.setdefault((record.branch, record.round), {})[record.digest] = None

    async def script(world: World) -> None:
        world.hooks.append(hook)
        await reach(world, 1)
        await torment(world, random.Random(f"torment {seed}"))

    world = simulate(attrs.evolve(scenario(NODES, ROUNDS, mode=mode, task=Brisk, seed=seed), limit=600.0), script)
    agree(world, rounds=ROUNDS)
    if mode == "strict":
        assert all(branch == 0 for branch, _ in commits)
        assert all(len(digests) == 1 for digests in commits.values())
