"""Worlds in virtual time: determinism of whole swarms, and what a script can do to their nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import trio
from torch import nn

from shoal.learning.events import Event
from shoal.learning.sync import state_digest
from shoal.sim.world import Member, World, simulate
from shoal.transport.errors import WaitExpired

from . import tiny

SCRIPT = Path(__file__).with_name("swarm_of_fifty.py")


def outcomes(*runs: tuple[Sequence[int], str]) -> list[dict[str, Any]]:
    """What :data:`SCRIPT` prints for each (arguments, PYTHONHASHSEED), in a process each.

    One after the other: the other core is for tests in real time.
    """
    found = []
    for arguments, hash_seed in runs:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
    return found


@pytest.mark.process(computes=True)
@pytest.mark.parametrize(("nodes", "groups"), [(26, [6, 7]), pytest.param(50, [7, 8], marks=pytest.mark.slow)])
def test_dozens_of_nodes_in_groups_of_eight_do_the_same_in_every_process(nodes: int, groups: list[int]) -> None:
    """26 peers are 4 groups: two of 6, two of 7. 50 are 7: one of 8, six of 7. All complete at the first attempt."""
    one, again = outcomes(([nodes, 8, 5, 0], "1"), ([nodes, 8, 5, 0], "4711"))
    assert one["weights"] == again["weights"]
    assert one["trace"] == again["trace"]
    assert one["events"] == again["events"] > 50_000
    assert one["rounds"] == [8]
    assert one["groups"] == groups
    assert one["retries"] == 0
    # Ten classes: who guesses has 2.3.
    assert max(one["losses"]) < 1.5


@pytest.mark.process(computes=True)
def test_another_seed_is_another_history() -> None:
    one, other = outcomes(([9, 3, 2, 0], "1"), ([9, 3, 2, 1], "1"))
    assert one["trace"] != other["trace"]
    assert one["rounds"] == other["rounds"] == [3]


def test_one_seed_repeats_every_event_in_one_process_too() -> None:
    first, second, other = (simulate(tiny.scenario(3, 3, seed=seed)) for seed in (5, 5, 6))
    assert first.trace.hexdigest() == second.trace.hexdigest() != other.trace.hexdigest()
    assert first.trace.events == second.trace.events
    assert [m.events for m in first.live()] == [m.events for m in second.live()]


def test_the_trace_holds_what_nodes_say_and_what_the_network_does() -> None:
    world = simulate(tiny.scenario(2, 2))
    said = sum(len(member.events) for member in world.members.values())
    assert world.trace.events > said + sum(1 for _ in world.network.traffic())


def committed(world: World, number: int, round: int) -> bool:
    node = world.members[number].node
    return node.run_here is not None and node.run_here.round >= round


async def test_a_wait_that_expires_says_for_what_and_where_everybody_is() -> None:
    async with trio.open_nursery() as nursery:
        world = World(tiny.scenario(2, 2), nursery)
        world.start(0)
        with pytest.raises(WaitExpired, match="second coming.*node0: round 0, join: 1 of 2 peers are here"):
            await world.until(lambda: False, "second coming", 30.0)
        nursery.cancel_scope.cancel()


def test_a_late_node_joins_and_ends_with_the_same_bits() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 0, 4), "round 4")
        world.start(3)

    world = simulate(tiny.scenario(4, 12, late=(3,)), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    late = world.members[3].run.reports
    assert len(late) >= 3
    assert late[0].round > 4


def test_a_killed_node_comes_back_with_its_key_and_catches_up() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 0, 3), "round 3")
        world.kill(2)
        await world.until(lambda: committed(world, 0, 6), "round 6")
        world.restart(2)

    world = simulate(tiny.scenario(4, 16), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert [member.number for member in world.live()] == [0, 1, 2, 3]
    back = world.members[2]
    assert any(event.what == "loaded" for event in back.events)
    name = back.peer
    reports = {report.round: report for report in world.members[0].run.reports}
    assert name not in reports[6].members
    assert name in reports[16].members


def test_the_founder_may_be_killed_and_comes_back_as_a_member() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 1, 3), "round 3")
        world.kill(0)
        await world.until(lambda: committed(world, 1, 6), "round 6")
        world.restart(0)

    world = simulate(tiny.scenario(4, 16), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert world.members[0].peer in world.members[1].run.reports[-1].members


def test_all_nodes_killed_at_once_go_on_where_they_were() -> None:
    seen: list[int] = []

    async def script(world: World) -> None:
        await world.until(lambda: all(committed(world, n, 40) for n in range(3)), "round 40")
        # The state is saved every few seconds: some rounds are done again.
        for number in range(3):
            world.kill(number)
        for number in range(3):
            world.restart(number)
        await world.until(lambda: all(world.members[n].node.run_here is not None for n in range(3)), "runs")
        await world.until(lambda: any(world.members[n].run.reports for n in range(3)), "a round of the second life")
        seen.extend(r.round for n in range(3) for r in world.members[n].run.reports[:1])

    world = simulate(tiny.scenario(3, 60), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert min(seen) > 1, "the run began anew"


def test_a_node_that_stops_is_out_of_the_roster_without_a_wait() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 0, 3), "round 3")
        world.stop(2)
        await world.until(lambda: world.members[2].ended, "end of node2")

    world = simulate(tiny.scenario(4, 8), script)
    reports = world.members[0].run.reports
    assert len(reports[-1].members) == 3
    assert all(report.wall_s < 1.0 for report in reports)
    assert world.members[2].node.outcome == "left"


def test_a_frozen_node_is_left_behind_and_takes_part_again_when_it_thaws() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 0, 3), "round 3")
        world.freeze(3)
        await trio.sleep(60)
        assert committed(world, 0, 5)
        world.unfreeze(3)

    world = simulate(tiny.scenario(4, 60, slowness=20.0), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    reports = world.members[0].run.reports
    assert any(len(report.members) == 3 for report in reports)
    assert len(reports[-1].members) == 4


@pytest.mark.parametrize("mode", ["strict", "available"])
def test_a_partition_heals_into_one_history(mode: str) -> None:
    def minority(world: World) -> list[Event]:
        return [event for number in (3, 4) for event in world.members[number].events]

    async def script(world: World) -> None:
        await world.until(lambda: committed(world, 0, 3), "round 3")
        world.partition((0, 1, 2), (3, 4))
        await trio.sleep(90)
        branched = any(event.what == "branch" for event in minority(world))
        assert branched == (mode == "available")
        assert committed(world, 0, 5)
        world.heal()

    world = simulate(tiny.scenario(5, 90, mode=mode, slowness=20.0), script)
    assert len({member.run.digest() for member in world.live()}) == 1
    assert len(world.members[0].run.reports[-1].members) == 5


def test_a_hook_may_kill_a_node_on_the_spot_and_its_last_words_are_not_heard() -> None:
    async def script(world: World) -> None:
        def hook(member: Member, event: Event) -> None:
            if member.number == 1 and (event.round, event.phase, event.what) == (3, "combine", "begin"):
                world.kill(1)

        world.hooks.append(hook)

    world = simulate(tiny.scenario(4, 6), script)
    last = world.members[1].events[-1]
    assert (last.round, last.phase, last.what) == (3, "combine", "begin")


@pytest.mark.parametrize("strategy", ["diloco", "noloco", "allreduce"])
def test_what_a_node_holds_for_joiners_does_not_change_while_it_goes_on(strategy: str) -> None:
    """The state after a round is given away, saved and exported while the next round is being done."""
    looked: list[int] = []

    async def script(world: World) -> None:
        def hook(member: Member, event: Event) -> None:
            for snapshot in member.run.snapshots if member.node.run_here is not None else ():
                if snapshot.digest:
                    assert state_digest(snapshot.round, snapshot.vectors) == snapshot.digest, f"round {snapshot.round}"
                    looked.append(len(snapshot.vectors))

        world.hooks.append(hook)

    base = tiny.scenario(3, 5)
    arguments = (("inner_steps", 2.0), ("momentum", 0.5)) if strategy == "diloco" else ()
    founding = attrs.evolve(base.founding, strategy=strategy, strategy_args=arguments)
    simulate(attrs.evolve(base, founding=founding, make_task=Adaptive), script)
    # Not only weights: momentum of the outer step or of the shared optimiser.
    assert max(looked) > 1


class Adaptive(tiny.Pull):
    """With an optimiser that has state of its own."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=tiny.RATE, momentum=0.5)
