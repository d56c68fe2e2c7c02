"""Real node processes on 127.0.0.1, killed with SIGKILL at random moments: founder, leaders, anybody."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import safetensors.torch
import torch
import trio

from shoal.learning.events import Event, RoundReport
from shoal.node.control import ControlClient, Ended, EventFrame, NodeStatus, RoundFrame, Watcher
from shoal.sim.processes import NodeProcess
from shoal.transport.errors import ConfigError

#: Seconds for anything that starts Python and torch on a busy machine, and for a round after a loss.
PATIENCE = 100.0


class Followed(NodeProcess):
    """A child and everything it has said."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.peer = ""
        self.killed = False
        self.events: list[Event] = []
        self.reports: dict[int, RoundReport] = {}
        self.ended: Ended | None = None

    @property
    def round(self) -> int:
        return max(self.reports, default=0)

    async def status(self) -> NodeStatus | None:
        try:
            return await trio.to_thread.run_sync(ControlClient(self.data).status, abandon_on_cancel=True)
        except ConfigError:
            return None

    async def follow(self) -> None:
        watcher = None
        while watcher is None:
            try:
                watcher = await Watcher.open(self.data)
            except ConfigError:
                assert self.code is None, f"{self.name} ended early:\n{self.tail()}"
                await trio.sleep(0.05)
        async with aclosing(watcher):
            while (frame := await watcher.receive()) is not None:
                match frame:
                    case EventFrame(event):
                        self.events.append(event)
                    case RoundFrame(report):
                        self.reports[report.round] = report
                    case Ended():
                        self.ended = frame

    def kill(self) -> None:
        self.killed = True
        self.signal(signal.SIGKILL)


class Swarm:
    """Nodes 0 (the founder) to ``count - 1`` of one run of ``task``; none outlives the block."""

    def __init__(self, folder: Path, count: int, rounds: int, *, task: str = "digits", steps: int = 100) -> None:
        self.nodes = [Followed(f"node-{number}", folder) for number in range(count)]
        self._rounds, self._task, self._steps = rounds, task, steps

    async def start(self, nursery: trio.Nursery, faults: dict[int, str] | None = None) -> None:
        for number, node in enumerate(self.nodes):
            arguments = ["start", self._task] if number == 0 else ["join", "-", "--task", self._task]
            arguments += ["--data-dir", str(node.data.path), "--host", "127.0.0.1", "--port", "0", "--leash"]
            arguments += ["--export", str(node.export), "--evaluate-every", "0", "--log-level", "info"]
            if number == 0:
                arguments += ["--rounds", str(self._rounds), "--min-peers", str(len(self.nodes))]
                arguments += ["--set", f"inner_steps={self._steps}"]
            if faults and number in faults:
                arguments += ["--fault", faults[number]]
            node.launch(arguments)
            nursery.start_soon(node.follow)
        ticket = ""
        with trio.fail_after(PATIENCE):
            while not ticket:
                await trio.sleep(0.1)
                status = await self.nodes[0].status()
                ticket = status.ticket if status is not None and status.run is not None else ""
        for node in self.nodes[1:]:
            node.tell(ticket)
        with trio.fail_after(PATIENCE):
            for node in self.nodes:
                while (status := await node.status()) is None:
                    await trio.sleep(0.1)
                node.peer = status.peer

    def live(self) -> list[Followed]:
        return [node for node in self.nodes if not node.killed]

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        with trio.move_on_after(PATIENCE):
            while not condition():
                for node in self.live():
                    assert node.code in (None, 0), f"{node.name} failed:\n{node.tail()}"
                await trio.sleep(0.02)
            return
        raise AssertionError(f"not within {PATIENCE:g} s: {what}\n" + "\n".join(n.tail() for n in self.live()))

    async def reached(self, round: int) -> None:
        """Every live node has committed ``round``."""
        await self.until(lambda: all(node.round >= round for node in self.live()), f"round {round} everywhere")

    async def leader(self) -> Followed | None:
        """Who leads the present round, as a live node sees it; None while nobody can tell."""
        for node in self.live():
            status = await node.status()
            if status is not None and status.run is not None:
                return next((n for n in self.live() if n.peer == status.run.leader), None)
        return None

    def end(self) -> None:
        for node in self.nodes:
            node.signal(signal.SIGKILL)
            if node.process is not None:
                node.process.wait()
            node.close()

    def check(self, rounds: int) -> None:
        """One history for all live nodes: members, digests, and in the end the very bits that they exported."""
        survivors = self.live()
        for round in range(1, rounds + 1):
            told = {(n.reports[round].digest, n.reports[round].members) for n in survivors if round in n.reports}
            assert len(told) == 1, f"round {round}: {told}"
        weights = [safetensors.torch.load_file(node.export) for node in survivors]
        assert all(list(found) == list(weights[0]) for found in weights)
        assert all(torch.equal(found[name], weights[0][name]) for found in weights for name in found)
        assert all(torch.isfinite(tensor).all() for tensor in weights[0].values())
        for node in survivors:
            assert node.ended is not None and node.ended.outcome == "finished"
            assert not any(event.what == "branch" for event in node.events)


@pytest.mark.process(timeout=300)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])  # other moments
async def test_survivors_of_kills_at_random_moments_end_with_identical_bits(tmp_path: Path, seed: int) -> None:
    draw = random.Random(f"kills at random moments {seed}")
    rounds = 24
    swarm = Swarm(tmp_path, 6, rounds)
    victims: list[tuple[Followed, int]] = []
    try:
        async with trio.open_nursery() as nursery:
            await swarm.start(nursery)
            for after, choose in ((2, "founder"), (7, "leader"), (12, "anybody")):
                await swarm.reached(after)
                await trio.sleep(draw.uniform(0.0, 0.6))
                victim = swarm.nodes[0] if choose == "founder" else await swarm.leader() if choose == "leader" else None
                if victim is None or victim.killed:
                    victim = draw.choice(swarm.live())
                victims.append((victim, swarm.live()[-1].round))
                victim.kill()
            await swarm.until(lambda: all(node.code == 0 for node in swarm.live()), "the end of the run")
        swarm.check(rounds)
        for victim, round in victims:
            assert victim.process is not None and victim.process.wait() == -signal.SIGKILL
            for node in swarm.live():
                # In the round it died in or the next the others went on without it.
                gone = next(r for r in sorted(node.reports) if victim.peer in node.reports[r].dropped)
                assert round < gone <= round + 4
                assert all(victim.peer not in node.reports[r].members for r in node.reports if r > gone)
        assert len(swarm.live()) == 3
        assert all(len(node.reports[rounds].members) == 3 for node in swarm.live())
    finally:
        swarm.end()


@pytest.mark.process(timeout=300)
async def test_a_spoiled_contribution_costs_its_peer_one_round(tmp_path: Path) -> None:
    rounds, bad = 6, 3
    swarm = Swarm(tmp_path, 3, rounds)
    try:
        async with trio.open_nursery() as nursery:
            await swarm.start(nursery, {2: f"spoil:{bad}"})
            await swarm.until(lambda: all(node.code == 0 for node in swarm.live()), "the end of the run")
        swarm.check(rounds)
        name = swarm.nodes[2].peer
        for node in swarm.nodes:
            assert name not in node.reports[bad].members
            assert all(name in node.reports[round].members for round in node.reports if round != bad)
        (told,) = [event for event in swarm.nodes[2].events if event.what == "refused"]
        assert told.round == bad and "not sent" in told.detail
    finally:
        swarm.end()
