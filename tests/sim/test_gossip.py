"""Swarms without a roster: groups drawn from views that spread by gossip, through deaths, joins and partitions."""

from __future__ import annotations

import attrs
import torch
import trio

from shoal.learning import defaults
from shoal.sim.world import Scenario, World, simulate

from . import tiny


def swarm(nodes: int, rounds: int, *, late: tuple[int, ...] = (), slowness: float = 5.0) -> Scenario:
    """Groups of 4; a round takes about a virtual second."""
    base = tiny.scenario(nodes, rounds, late=late, slowness=slowness)
    founding = attrs.evolve(base.founding, strategy="noloco", strategy_args=(("inner_steps", 2.0),), group=4)
    return attrs.evolve(base, founding=founding)


def round_of(world: World, number: int) -> int:
    run = world.members[number].node.run_here
    return -1 if run is None else run.round


def test_all_begin_together_and_every_group_is_complete() -> None:
    world = simulate(swarm(9, 10))
    for member in world.live():
        assert [report.round for report in member.run.reports] == list(range(1, 11))
        # Nine peers are three groups of three.
        assert {len(report.members) for report in member.run.reports} == {3}
        assert sum(report.retries for report in member.run.reports) == 0


def test_nobody_waits_for_the_dead_and_in_time_groups_are_drawn_from_the_living() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: round_of(world, 0) >= 4, "round 4")
        world.kill(3)
        world.kill(5)

    rounds = defaults.VIEW_ROUNDS + 16
    world = simulate(swarm(9, rounds), script)
    dead = {world.members[3].peer, world.members[5].peer}
    for member in world.live():
        assert member.run.round == rounds
        assert torch.isfinite(member.run.weights()).all()
        # The round in which they died, and then nobody's time is lost.
        after = [report for report in member.run.reports if report.round > 6]
        assert all(dead.isdisjoint(report.members) for report in after)
        assert all(report.wall_s < 2.0 for report in after)
        # Seven peers are a group of four and one of three.
        assert {len(report.members) for report in after[-5:]} <= {3, 4}
        status = member.node.status()
        assert status is not None and dead.isdisjoint(status.members)


def test_a_late_peer_takes_a_state_over_and_is_drawn_into_groups() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: round_of(world, 0) >= 5, "round 5")
        world.start(8)

    world = simulate(swarm(9, 40, late=(8,)), script)
    late = world.members[8]
    assert any(event.what == "loaded" for event in late.events)
    assert late.run.reports[0].round > 5
    assert late.run.round == 40
    together = [report for report in late.run.reports if len(report.members) > 1]
    assert len(together) >= 5


def test_two_halves_meet_again_after_a_partition() -> None:
    async def script(world: World) -> None:
        await world.until(lambda: round_of(world, 0) >= 4, "round 4")
        world.partition((0, 1, 2, 3), (4, 5, 6, 7))
        await trio.sleep(25)
        world.heal()

    world = simulate(swarm(8, 50), script)
    assert all(member.run.round == 50 for member in world.live())
    near = {world.members[number].peer for number in range(4)}
    crossing = [
        report
        for report in world.members[0].run.reports
        if report.round > 40 and any(peer not in near for peer in report.members)
    ]
    assert crossing
