"""Real node processes on 127.0.0.1 that stand still (SIGSTOP) or lag, and come back, as in virtual time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio

from .test_real_kills import Followed, Swarm

#: Steps that wait: those who are not stopped do not race through the rounds meanwhile, as fast as two cores can.
TASK = """
import time
from shoal.learning.tasks.digits import Digits

class Unhurried(Digits):
    name = "unhurried"

    def loss(self, model, batch):
        time.sleep(0.02)
        return super().loss(model, batch)
"""


async def stopped(node: Followed, seconds: float) -> None:
    """SIGSTOP, and SIGCONT so many seconds later whatever happens."""
    node.signal(signal.SIGSTOP)
    try:
        await trio.sleep(seconds)
    finally:
        node.signal(signal.SIGCONT)


@pytest.mark.process(timeout=500)
@pytest.mark.parametrize(
    ("seconds", "rounds"), [(14.0, 45), pytest.param(60.0, 200, marks=pytest.mark.slow)], ids=["14 s", "a minute"]
)
async def test_a_process_that_is_stopped_is_left_behind_and_ends_with_the_bits_of_the_others(
    tmp_path: Path, seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unhurried.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    swarm = Swarm(tmp_path, 4, rounds, task="unhurried:Unhurried", steps=30)
    try:
        async with trio.open_nursery() as nursery:
            await swarm.start(nursery)
            await swarm.reached(2)
            victim = await swarm.leader() or swarm.nodes[1]
            others = [node for node in swarm.nodes if node is not victim]
            at = max(node.round for node in others)
            await stopped(victim, seconds)
            # The others went on without it.
            assert min(node.round for node in others) > at
            for part in range(1, 5):
                await swarm.reached(part * rounds // 4)  # the patience of one wait is not meant for so many rounds
            await swarm.until(lambda: all(node.code == 0 for node in swarm.live()), "the end of the run")
        swarm.check(rounds)
        assert any(victim.peer not in report.members for report in others[0].reports.values())
        assert victim.peer in others[0].reports[rounds].members
    finally:
        swarm.end()


@pytest.mark.process(timeout=300)
async def test_a_process_that_lags_half_a_second_all_the_time_is_not_taken_for_dead(tmp_path: Path) -> None:
    rounds = 12
    swarm = Swarm(tmp_path, 4, rounds)
    try:
        async with trio.open_nursery() as nursery:
            await swarm.start(nursery)
            await swarm.reached(1)
            victim = swarm.nodes[2]
            while victim.code is None:
                await stopped(victim, 0.5)
                await trio.sleep(0.1)
            await swarm.until(lambda: all(node.code == 0 for node in swarm.live()), "the end of the run")
        swarm.check(rounds)
        for node in swarm.nodes:
            assert not any(report.dropped for report in node.reports.values())
            # Lost is also who has finished and left.
            assert not any(e.what == "lost" and e.peer == victim.peer for e in node.events if e.round < rounds)
    finally:
        swarm.end()
