"""Peers of unequal speed: with a time budget everybody takes part, and the mean is weighted by samples."""

from __future__ import annotations

import pytest

from shoal.node.node import Founding
from shoal.sim.world import Scenario, World, simulate

SPEEDS = {0: 1.0, 1: 2.0, 2: 4.0}


def train(time_budget: float | None) -> World:
    founding = Founding(min_peers=3, rounds=3, strategy_args=(("inner_steps", 8),))
    return simulate(Scenario(nodes=3, founding=founding, slowness=SPEEDS, time_budget=time_budget))


def test_with_a_time_budget_slow_peers_give_fewer_samples_and_weigh_less() -> None:
    world = train(time_budget=2.0)
    record = world.live()[0].run.membership.head.record
    assert len(record.members) == 3
    assert record.weights == record.samples
    samples = {peer.text: count for peer, count in zip(record.members, record.samples, strict=True)}
    fast, middle, slow = (samples[world.members[number].peer] for number in range(3))
    assert fast == pytest.approx(2 * middle, rel=0.15)
    assert middle == pytest.approx(2 * slow, rel=0.2)
    assert len({member.run.digest() for member in world.live()}) == 1


def test_with_a_number_of_steps_all_weigh_the_same_and_the_slowest_sets_the_pace() -> None:
    world = train(time_budget=None)
    record = world.live()[0].run.membership.head.record
    # 8 steps each; the last batch of an epoch is shorter.
    assert all(7 * 32 < count <= 8 * 32 for count in record.samples)
    assert set(record.weights) == {1}
    assert len({member.run.digest() for member in world.live()}) == 1
