"""Rounds over slow lines in virtual time: near the best that the lines allow, stragglers left out and told."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from shoal.learning.rounds.decisions import told
from shoal.sim import cli
from shoal.sim.determinism import run_virtual
from shoal.sim.reduce_world import ReduceScenario, ReduceWorld, RoundResult, optimum, reduce_rounds

#: 16 MiB over 25 Mbit/s take as long as 64 MiB over 100.
SIZE, LINE = 16 << 20, 3.125e6


def test_equal_uplinks_are_used_to_nine_tenths() -> None:
    scenario = ReduceScenario((LINE,) * 8, SIZE, rounds=2)
    for result in reduce_rounds(scenario):
        assert optimum(scenario) / result.seconds >= 0.9
        assert result.members == tuple(range(8))
        assert result.attempts == result.epochs == 1


def test_unequal_uplinks_come_within_a_tenth_of_the_planners_optimum() -> None:
    scenario = ReduceScenario(tuple(LINE * factor for factor in (0.5, 1, 2, 4) * 2), SIZE, rounds=2)
    blind, planned = reduce_rounds(scenario)
    assert planned.seconds <= 1.1 * optimum(scenario)
    assert planned.seconds < 0.9 * blind.seconds
    assert planned.shares[3] > 2 * planned.shares[0]
    assert "slices sized for" in planned.reason


def lab(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["lab", "reduce", *arguments])
    return code, " ".join(capsys.readouterr().out.split())


def test_the_lab_says_that_few_bytes_are_bound_by_latency_and_does_not_judge_their_speed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, said = lab(capsys, "--peers", "4", "--mb", "0.01", "--rounds", "1")
    assert code == 0
    assert "bound by latency: messages alone take 0.40 s here, beside 0.01 s for the bytes" in said
    assert "not as required" not in said


def test_the_lab_judges_a_round_whose_bytes_take_long(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lab(capsys, "--peers", "4", "--mb", "2", "--uplink", "2", "--rounds", "1", "--unequal", "1,4")
    assert code == 1  # the first round knows nothing of the lines
    assert "not as required: the last round has" in said
    assert "bound by latency" not in said


def rounds(scenario: ReduceScenario, before_second: object = None) -> tuple[ReduceWorld, list[RoundResult]]:
    async def main() -> tuple[ReduceWorld, list[RoundResult]]:
        results = []
        async with trio.open_nursery() as nursery:
            world = ReduceWorld(scenario)
            await world.connect(nursery)
            for number in range(scenario.rounds):
                if number == 1 and callable(before_second):
                    before_second(world)
                results.append(await world.round())
                await trio.sleep(1.0)
            nursery.cancel_scope.cancel()
        return world, results

    return run_virtual(main, seed=scenario.seed)


def test_a_member_that_becomes_a_trickle_is_left_out_within_its_deadline_and_told() -> None:
    scenario = ReduceScenario((6.25e6,) * 5, 8 << 20, rounds=2)

    def throttle(world: ReduceWorld) -> None:
        world.network.set_uplink("peer3", 6.25e4)

    world, (clean, late) = rounds(scenario, throttle)
    assert clean.members == (0, 1, 2, 3, 4)
    assert late.members == (0, 1, 2, 4)
    name = world.peers[3].endpoint.peer_id.short
    assert name in late.reason
    # A phase ends 1.5 times its expected time, four seconds and eight round trips after it began; then once more for
    # what the slow one owned.
    assert late.median < 3 * clean.median + 8.0 + 16 * 0.08
    notes = [note for _, note in world.peers[3].notes if note.what == "left-out"]
    assert (notes and name in notes[-1].detail) or "in time" in notes[0].detail


def test_a_member_known_to_be_a_trickle_is_not_waited_for_at_all() -> None:
    scenario = ReduceScenario((6.25e6, 6.25e6, 6.25e6, 6.25e4, 6.25e6), 8 << 20, rounds=2)
    _, (blind, known) = rounds(scenario)
    assert known.members == (0, 1, 2, 4)
    assert "left out, as their lines are too slow" in known.reason
    assert known.median < blind.median / 2


def test_a_member_whose_loop_lags_by_half_a_second_is_waited_for() -> None:
    scenario = ReduceScenario((6.25e6,) * 5, 8 << 20, rounds=2, lag={3: 0.5})
    for result in reduce_rounds(scenario):
        assert result.members == (0, 1, 2, 3, 4)
        assert result.attempts == 1


def test_a_member_that_is_not_ready_is_told_when_the_round_begins_without_it() -> None:
    scenario = ReduceScenario((6.25e6,) * 5, 1 << 20, rounds=1, late={3: 30.0})
    said: list[str] = []

    async def watch(world: ReduceWorld) -> None:
        voter = world.peers[3].instance.voter if world.peers[3].instance is not None else None
        while voter is not None and not voter.decided:
            now = trio.current_time()
            said.append(told(now, voter.due, voter.reason, "training" if voter.offer is None else None))
            await trio.sleep(0.25)

    async def main() -> RoundResult:
        async with trio.open_nursery() as nursery:
            world = ReduceWorld(scenario)
            await world.connect(nursery)
            nursery.start_soon(_soon, partial(watch, world))
            result = await world.round()
            nursery.cancel_scope.cancel()
        return result

    result = run_virtual(main, seed=0)
    assert result.members == (0, 1, 2, 4)
    assert "the time for stragglers is over" in result.reason
    assert any("the round begins without us in 2." in text for text in said)


async def _soon(then: object) -> None:
    await trio.sleep(0.1)
    assert callable(then)
    await then()
