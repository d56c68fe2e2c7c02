"""A swarm of real nodes that train a model in stages, whose nodes die by SIGKILL at exactly chosen actions.

What is measured is read from the traces that the nodes write (:mod:`.stage_kill_child`), on the clock of the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from shoal.node.control import ControlClient, NodeStatus
from shoal.sim.processes import NodeProcess
from shoal.transport.errors import ConfigError

#: Seconds for anything that starts Python and torch on a busy machine.
PATIENCE = 100.0
#: Seconds that are given to survivors, far beyond what is asked of them.
LIMIT = 40.0
CHILD = Path(__file__).with_name("stage_kill_child.py")


@attrs.frozen
class Moment:
    """An action of whoever holds ``stage``. ``index``: of the micro-batch, -1: of none."""

    stage: int
    point: str
    index: int = -1


@attrs.frozen
class Outcome:
    """Seconds after the kill until another holder has the stage (``taken``), has computed its first micro-batch
    (``computed``), and a gradient that it gave has come back to a feeder (``on``); until a feeder's step is over
    (``step``). ``usual``: seconds that a micro-batch is on its way, median of those before."""

    moment: Moment
    taken: float
    computed: float
    on: float
    step: float
    usual: float
    how: str


def moments(stages: int, micro: int) -> list[Moment]:
    """Every kind of action of the first stage, an inner one (1), and the last, and of each micro-batch."""
    found = []
    for stage in (0, 1, stages - 1):
        first, last = stage == 0, stage == stages - 1
        each = [] if first else ["before receive", "after receive"]
        each += ["before forward", "after forward"]
        each += [] if last else ["before send on", "after send on", "before gradient", "after gradient"]
        each += [] if last else ["before backward", "after backward"]
        each += [] if first else ["before send back", "after send back"]
        once = ["before tell", "after tell"] if first else ["before word", "after word"]
        once += ["before end of step", "after end of step", "round: before settling", "round: after settling"]
        once += [f"round: {phase} begin" for phase in ("train", "convene", "scatter", "combine", "gather", "commit")]
        once += ["round: commit done"]
        found += [Moment(stage, point, index) for point in each for index in range(micro)]
        found += [Moment(stage, point) for point in once]
    return found


class Child(NodeProcess):
    """A node, and what it has done."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.trace, self.order = folder / f"{name}.trace", folder / f"{name}.order"
        self.lines: list[dict[str, Any]] = []
        self.seat: tuple[str, int] = ("spare", -1)
        self._read = 0

    def launch(self, arguments: Sequence[str], attack: str = "") -> None:
        environment = {**self.environment(), "TRACE": str(self.trace), "ORDER": str(self.order)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), *arguments], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def refresh(self) -> None:
        if not self.trace.exists():
            return
        with self.trace.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            self.lines.append(line)
            if line["what"] == "seat":
                self.seat = (line["state"], line["stage"])

    def since(self, t: float, stage: int, point: str) -> Iterable[dict[str, Any]]:
        """What it did at ``stage`` from ``t`` on."""
        return (line for line in self.lines if line["t"] >= t and (line["stage"], line.get("point")) == (stage, point))

    async def status(self) -> NodeStatus | None:
        try:
            return await trio.to_thread.run_sync(ControlClient(self.data).status, abandon_on_cancel=True)
        except ConfigError:
            return None


class StagedSwarm:
    """``stages`` stages of a model, one node more than those; others come when they are needed. None outlives
    :meth:`end`."""

    def __init__(self, folder: Path, stages: int, micro: int) -> None:
        self.folder, self.stages, self._micro = folder, stages, micro
        self.nodes: list[Child] = []
        self._waiting: list[Child] = []

    # -- lives --------------------------------------------------------------------------------------------------------

    def _launch(self) -> Child:
        number = len(self.nodes) + len(self._waiting)
        node = Child(f"node-{number}", self.folder)
        arguments = ["start", "stdlib-small"] if number == 0 else ["join", "-"]
        arguments += ["--data-dir", str(node.data.path), "--host", "127.0.0.1", "--port", "0", "--leash"]
        if number == 0:
            arguments += ["--rounds", "1000000", "--stages", str(self.stages), "--set", "inner_steps=3"]
            arguments += ["--min-peers", str(self.stages + 1), "--micro-batches", str(self._micro)]
        node.launch([*arguments, "--evaluate-every", "4", "--log-level", "info"])
        return node

    def prepare(self, count: int) -> None:
        """So many processes are loaded and wait for a ticket."""
        while len(self._waiting) < count:
            self._waiting.append(self._launch())

    async def start(self) -> None:
        self.nodes.append(self._launch())
        self.prepare(self.stages)
        for _ in range(self.stages):
            await self.join()
        await self.until(lambda: all(len(self.holders(stage)) for stage in range(self.stages)), "all stages are held")

    async def join(self) -> None:
        """One more, by a ticket of somebody who lives."""
        self.prepare(1)
        node = self._waiting.pop(0)
        ticket = ""
        with trio.fail_after(PATIENCE):
            while not ticket:
                for other in self.live():
                    status = await other.status()
                    if status is not None and status.ticket:
                        ticket = status.ticket
                        break
                await trio.sleep(0.05)
        node.tell(ticket)
        self.nodes.append(node)

    def live(self) -> list[Child]:
        return [node for node in self.nodes if node.code is None]

    def end(self) -> None:
        for node in (*self.nodes, *self._waiting):
            if node.process is not None:
                node.process.kill()
                node.process.wait()
            node.close()

    # -- what is so ---------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        for node in self.nodes:
            node.refresh()

    def holders(self, stage: int) -> list[Child]:
        return [node for node in self.live() if node.seat == ("ready", stage)]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        with trio.move_on_after(seconds):
            while True:
                self.refresh()
                if condition():
                    return
                await trio.sleep(0.02)
        seats = ", ".join(f"{node.name} {node.seat}" for node in self.live())
        raise AssertionError(f"not within {seconds:g} s: {what}; {seats}\n" + "\n".join(n.tail() for n in self.live()))

    async def steady(self, rounds: int = 1) -> None:
        """Until all stages have done so many rounds from now."""
        now = max(line["t"] for node in self.live() for line in node.lines)

        def settled(stage: int) -> bool:
            return any(
                sum(1 for _ in node.since(now, stage, "round: after settling")) >= rounds
                for node in self.holders(stage)
            )

        await self.until(lambda: all(map(settled, range(self.stages))), f"{rounds} rounds of every stage")

    # -- kills --------------------------------------------------------------------------------------------------------

    def at(self, moment: Moment) -> Moment:
        """Of an inner stage: the same action at the inner stage that somebody holds alone now, if there is one."""
        inner = range(1, self.stages - 1) if moment.stage == 1 else [moment.stage]
        alone = [stage for stage in inner if len(self.holders(stage)) == 1]
        return attrs.evolve(moment, stage=alone[0]) if alone else moment

    async def alone(self, stage: int) -> Child:
        """The only holder of ``stage``, while another stage has a second one. Peers come and go until it is so."""
        give_up = trio.current_time() + PATIENCE
        while trio.current_time() < give_up:
            self.refresh()
            counts = [len(self.holders(each)) for each in range(self.stages)]
            spare = any(count > 1 for each, count in enumerate(counts) if each != stage)
            if counts[stage] == 1 and spare and sum(counts) == len(self.live()):
                return self.holders(stage)[0]
            if counts[stage] > 1 and spare:
                node = self.holders(stage)[-1]
                node.signal(15)
                assert node.process is not None
                await trio.to_thread.run_sync(node.process.wait)
            elif sum(counts) == len(self.live()):
                await self.join()
                await self.until(lambda: self.nodes[-1].seat[0] == "ready", "who came takes a stage")
            await trio.sleep(0.1)
        raise AssertionError(f"stage {stage} is never held by one alone")

    async def kill(self, moment: Moment) -> Outcome:
        """The only holder of a stage kills itself at ``moment``; what became of it."""
        victim = await self.alone(moment.stage)
        temporary = victim.order.with_suffix(".tmp")
        temporary.write_text(json.dumps(attrs.asdict(moment)))
        os.replace(temporary, victim.order)
        assert victim.process is not None
        with trio.move_on_after(LIMIT):
            await trio.to_thread.run_sync(victim.process.wait, abandon_on_cancel=True)
        self.refresh()
        killed = [line for line in victim.lines if line["what"] == "killed"]
        assert killed, f"{moment}: it did not come to that\n{victim.tail()}"
        assert victim.code == -9
        at = killed[0]["t"]
        usual = self._usual(at)
        found: dict[str, float] = {}

        def going() -> bool:
            found.update(self._after(moment.stage, at))
            return "step" in found

        await self.until(going, f"training goes on after {moment}", LIMIT)
        how = next((line["detail"] for n in self.nodes for line in n.lines
                    if line.get("event") == "recovered" and line["t"] >= at), "")  # fmt: skip
        return Outcome(moment, *(found[name] - at for name in ("taken", "computed", "on", "step")), usual, how)

    def _after(self, stage: int, at: float) -> dict[str, float]:
        found: dict[str, float] = {}
        new = self.holders(stage)
        seats = [line["t"] for n in new for line in n.lines
                 if line["t"] > at and line["what"] == "seat" and line["state"] == "ready"]  # fmt: skip
        if not seats:
            return found
        found["taken"] = min(seats)
        work = "after forward" if stage == self.stages - 1 else "after backward"
        for name, where, point, since in (
            ("computed", stage, "after forward", at),
            ("passed", stage, work, at),
            ("on", 0, "after backward", "passed"),
            ("step", 0, "after end of step", "on"),
        ):
            begin = found[since] if isinstance(since, str) else since
            times = [line["t"] for node in self.live() for line in node.since(begin, where, point)]
            if not times:
                break
            found[name] = min(times)
        return found

    def _usual(self, before: float) -> float:
        """Seconds from a micro-batch's forward pass at a feeder to the end of its backward pass there, the median."""
        times = []
        for node in self.nodes:
            begun: dict[tuple[int, int], float] = {}
            for line in node.lines:
                if line["stage"] != 0 or line["t"] > before or line["t"] < before - 10 or line["what"] != "act":
                    continue
                key = (line["step"], line["index"])
                if line["point"] == "before forward":
                    begun[key] = line["t"]
                elif line["point"] == "after backward" and key in begun:
                    times.append(line["t"] - begun.pop(key))
        return statistics.median(times) if times else 0.0
