"""A peer of every role killed at every step of a round: the others go on, with the mean over the agreed members."""

from __future__ import annotations

from typing import Literal

import pytest
import trio

from shoal.learning.events import PHASES, Event
from shoal.learning.reduce.slices import split
from shoal.sim.world import Member, World, simulate

from . import tiny

Role = Literal["leader", "owner", "contributor"]
ROLES: tuple[Role, ...] = ("leader", "owner", "contributor")

#: Five voters: two may die and a majority is left; one of them owns no slice.
NODES = 5
ROUNDS = 7
#: The round in which roles are looked at first: by then everybody is in and links are warm.
FIRST = 3


def role_of(member: Member) -> Role | None:
    """What the member is in the round it is in; None when it is in none."""
    run = member.run
    instance = run._instance
    if instance is None or instance.commit is not None:
        return None
    if instance.voter.leader() == run.me:
        return "leader"
    owners = {piece.owner for piece in split(0, tiny.SIZE, instance.voters, [1.0] * len(instance.voters))}
    return "owner" if run.me in owners else "contributor"


def kill_one(world: World, phase: str, role: Role, delay: float, killed: list[tuple[int, int]]) -> None:
    """Kill the first member of that role that says it begins that phase, ``delay`` seconds later."""

    async def later(number: int) -> None:
        await trio.sleep(delay)
        world.kill(number)

    def hook(member: Member, event: Event) -> None:
        if killed or event.round < FIRST or (event.phase, event.what) != (phase, "begin") or role_of(member) != role:
            return
        killed.append((member.number, event.round))
        if delay:
            world.nursery.start_soon(later, member.number)
        else:
            world.kill(member.number)

    world.hooks.append(hook)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("phase", PHASES)
# Before anything that follows was sent; with it under way; when it has just arrived and the answers are under way.
@pytest.mark.parametrize(
    "delay",
    [0.0, 1.01 * tiny.LATENCY, *(pytest.param(n * tiny.LATENCY, marks=pytest.mark.slow) for n in (0.5, 1.5))],
)
def test_survivors_finish_the_round_or_the_next_with_the_mean_over_its_members(
    phase: str, role: Role, delay: float
) -> None:
    killed: list[tuple[int, int]] = []
    watches: list[tiny.Watch] = []

    async def script(world: World) -> None:
        watches.append(tiny.Watch(world))
        kill_one(world, phase, role, delay, killed)

    world = simulate(tiny.scenario(NODES, ROUNDS), script)
    ((victim, round),) = killed
    assert [member.number for member in world.live()] == [n for n in range(NODES) if n != victim]
    watches[0].check(ROUNDS)
    name = world.members[victim].peer
    for member in world.live():
        reports = {report.round: report for report in member.run.reports}
        assert reports[round - 1].retries == 0
        # Every round had everybody that was alive and nobody was lost without need; the dead is out at the latest
        # after the round that followed.
        assert all(other.peer in reports[r].members for other in world.live() for r in reports)
        assert all(name not in reports[r].members for r in range(round + 2, ROUNDS + 1))
        assert name in (*reports[round].dropped, *reports[round + 1].dropped)
        assert not any(event.what in ("branch", "out-of-step", "step-aside") for event in member.events)
