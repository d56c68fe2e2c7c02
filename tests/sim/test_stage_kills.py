"""Real processes: the only holder of a stage kills itself at an exact step of the schedule, and training goes on."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path

import pytest

from .stage_kills import Moment, Outcome, StagedSwarm, moments

#: Seconds that are asked for, beyond a micro-batch, on a machine that does nothing else; and what is given to one that
#: is shared by others while it runs all tests.
ASKED, GIVEN = 2.0, 8.0
STAGES, MICRO = 4, 3


def table(outcomes: list[Outcome]) -> str:
    """Medians and maxima by stage and kind of action."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault((kind(each), each.moment.point), []).append(each)
    lines = ["| stage | killed | kills | taken over | goes on, median | most |", "|---|---|---|---|---|---|"]
    for (stage, point), found in groups.items():
        on = [each.on for each in found]
        taken = statistics.median(each.taken for each in found)
        lines.append(
            f"| {stage} | {point} | {len(found)} | {taken:.2f} | {statistics.median(on):.2f} | {max(on):.2f} |"
        )
    for stage in dict.fromkeys(map(kind, outcomes)):
        found = [each for each in outcomes if kind(each) == stage]
        on = sorted(each.on for each in found)
        late = sum(each.on > ASKED + each.usual for each in found)
        lines.append(
            f"{stage}: {len(on)} kills, median {statistics.median(on):.2f}, most {on[-1]:.2f} s; a micro-batch takes "
            f"{statistics.median(each.usual for each in found):.2f} s; {late} beyond {ASKED:g} s and a micro-batch"
        )
    return "\n".join(lines)


def kind(outcome: Outcome) -> str:
    return {0: "first", STAGES - 1: "last"}.get(outcome.moment.stage, "inner")


async def sweep(folder: Path, chosen: list[Moment]) -> list[Outcome]:
    """One swarm of five in four stages, in which a holder dies at each of these moments and another peer comes."""
    swarm, outcomes, left = StagedSwarm(folder, STAGES, MICRO), list[Outcome](), list(chosen)
    try:
        await swarm.start()
        await swarm.steady()
        while left:
            swarm.prepare(1)
            # Of a stage that somebody holds alone now, if there is one left.
            swarm.refresh()
            moment = next((each for each in left if len(swarm.holders(swarm.at(each).stage)) == 1), left[0])
            left.remove(moment)
            outcomes.append(await swarm.kill(swarm.at(moment)))
            print(outcomes[-1], flush=True)
            if left:
                await swarm.join()
                await swarm.until(lambda: swarm.nodes[-1].seat[0] == "ready", "who came takes a stage")
                await swarm.steady()
    finally:
        swarm.end()
    return outcomes


@pytest.mark.process(timeout=300)
async def test_the_only_holder_of_a_stage_dies_at_a_step_of_the_schedule_and_training_goes_on(tmp_path: Path) -> None:
    chosen = [Moment(0, "after send on", 1), Moment(1, "before backward", 1), Moment(3, "round: commit begin")]
    outcomes = await sweep(tmp_path, chosen)
    print("\n" + table(outcomes))
    assert len(outcomes) == len(chosen)
    for each in outcomes:
        assert each.on < GIVEN, each
        assert each.how, "nobody said that it was recovered"


@pytest.mark.slow
@pytest.mark.process(timeout=7200)
async def test_the_only_holder_of_any_stage_dies_at_every_step_of_the_schedule(tmp_path: Path) -> None:
    outcomes = await sweep(tmp_path, moments(STAGES, MICRO))
    print("\n" + table(outcomes))
    assert len(outcomes) == len(moments(STAGES, MICRO))
    assert statistics.median(each.on for each in outcomes) < ASKED


@pytest.mark.process(timeout=300)
async def test_two_neighbours_killed_at_once_go_back_to_the_checkpoints_on_others_disks(tmp_path: Path) -> None:
    swarm = StagedSwarm(tmp_path, 3, MICRO)
    try:
        await swarm.start()
        swarm.prepare(2)
        await swarm.steady(2)
        swarm.refresh()
        victims = [node for stage in (1, 2) for node in swarm.holders(stage)]
        at = time.monotonic()
        for node in victims:
            node.signal(signal.SIGKILL)
        await swarm.join()
        await swarm.join()
        said: dict[int, str] = {}

        def recovered() -> bool:
            for node in swarm.live():
                said.update({line["stage"]: line["detail"] for line in node.lines if line.get("event") == "recovered"})
            return {1, 2} <= said.keys()

        await swarm.until(recovered, "both stages have a holder")
        for stage, other in ((1, 2), (2, 1)):
            assert f"it was lost together with stage {other}; the checkpoint of it after round " in said[stage]
        # The files from which that came: one blob of each stage that is guarded, whole.
        kept = [path for node in swarm.holders(0) for path in (node.data.path / "run" / "blobs").glob("*.safetensors")]
        assert kept
        back = time.monotonic()
        await swarm.until(
            lambda: any(True for node in swarm.holders(0) for _ in node.since(back, 0, "after end of step")), "a step"
        )
        print(f"\na step is done {time.monotonic() - at:.1f} s after two neighbours died, with the start of two others")
    finally:
        swarm.end()
