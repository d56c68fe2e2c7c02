"""A contribution with NaN or infinities: refused for that round, its peer told why; the round goes on without it."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.learning.events import Event
from shoal.learning.faults import Faults
from shoal.sim.world import Member, World, simulate

from . import tiny

ROUND, ROUNDS = 3, 6


def check(world: World, watch: tiny.Watch, bad: int) -> None:
    watch.check(ROUNDS)
    name = world.members[bad].peer
    for member in world.live():
        reports = {report.round: report for report in member.run.reports}
        assert name not in reports[ROUND].members
        assert len(reports[ROUND].members) == 3
        for round in (ROUND - 1, *range(ROUND + 1, ROUNDS + 1)):
            assert len(reports[round].members) == 4
        # Refused for the round, not thrown out of the run.
        assert all(report.dropped == () for report in reports.values())
        assert torch.isfinite(member.run.weights()).all()


def test_a_node_does_not_send_a_contribution_of_its_own_that_is_not_finite() -> None:
    watches: list[tiny.Watch] = []

    async def script(world: World) -> None:
        watches.append(tiny.Watch(world))

    world = simulate(tiny.scenario(4, ROUNDS, faults={2: Faults(spoil=(ROUND,))}), script)
    check(world, watches[0], 2)
    (told,) = [event for event in world.members[2].events if event.what == "refused"]
    assert (told.round, told.phase, told.peer) == (ROUND, "convene", world.members[2].peer)
    assert "not sent" in told.detail and "nan" in told.detail.lower() and "at" in told.detail
    # The others know why somebody is missing.
    reasons = [member.run.reports[ROUND - 1].reason for member in world.live()]
    assert all("without a contribution" in reason and world.members[2].peer[:8] in reason for reason in reasons)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_owners_refuse_a_contribution_that_is_not_finite_and_say_why(value: float) -> None:
    """From a peer that does not look at what it sends."""
    watches: list[tiny.Watch] = []

    def poison(member: Member, event: Event) -> None:
        if member.number == 2 and (event.round, event.phase, event.what) == (ROUND, "convene", "begin"):
            instance = member.run._instance
            assert instance is not None and instance.buffers.own is not None
            instance.buffers.own.fill_(value)

    async def script(world: World) -> None:
        watches.append(tiny.Watch(world))
        world.hooks.append(poison)

    world = simulate(tiny.scenario(4, ROUNDS), script)
    check(world, watches[0], 2)
    told = [event for event in world.members[2].events if event.what == "refused"]
    assert len(told) == 3
    for event in told:
        assert (event.round, event.phase) == (ROUND, "scatter")
        assert f"your contribution of round {ROUND} is refused" in event.detail
    seen = [event for number in (0, 1, 3) for event in world.members[number].events if event.what == "not-finite"]
    assert {event.peer for event in seen} == {world.members[2].peer}
