"""``bench.py overlap``: what a step of training takes while a fragment of the model is under way, and while none is."""

from __future__ import annotations

import argparse
import bisect
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trio

from shoal.learning import exact
from shoal.learning.events import Event
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.ticket import Ticket
from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

from .busy_task import LOG, STEP_MS, Busy, flush
from .children import Worker
from .processes import ask_all, children
from .report import Row, machine, show, write

#: Steps between two fragments, and steps during which one may be under way.
EVERY, OVERLAP, FRAGMENTS = 40, 30, 3


class Overlapper(Worker):
    """One node with the task :class:`Busy` and Streaming DiLoCo. Order ``start``, whose answer has its ticket; then
    ``finish``, which waits for the end of the run."""

    def __init__(self) -> None:
        self._flights: list[tuple[float, float]] = []
        #: Seconds of the processor that this process took in each: with training apart, what a fragment costs here.
        self._spent: list[float] = []
        self._began = self._clock = 0.0
        self._log = ""
        self._ended = trio.Event()

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if order == "start":
            node = self._node(arguments)
            self.nursery.start_soon(self._run, node)
            await node.taking_part.wait()
            return {"ticket": str(node.ticket())}
        assert order == "finish"
        await self._ended.wait()
        return {"flights": self._flights, "spent": self._spent, "steps": _written(self._log)}

    def _node(self, arguments: dict[str, Any]) -> Node:
        self._log = os.environ[LOG] = arguments["log"]
        os.environ[STEP_MS] = str(arguments["step_ms"])
        # Where a training process of its own finds the task.
        os.chdir(Path(__file__).resolve().parents[1])
        sys.setswitchinterval(0.0005)
        exact.prepare_torch(1)
        args = {"inner_steps": float(FRAGMENTS * EVERY), "fragments": float(FRAGMENTS), "overlap": float(OVERLAP)}
        founding = Founding(
            strategy="streaming", strategy_args=tuple(args.items()), min_peers=arguments["peers"],
            rounds=arguments["rounds"],
        )  # fmt: skip
        ticket = arguments["ticket"]
        config = NodeConfig(
            bind=(Address("tcp", "127.0.0.1", 0),),
            task="benchmarks.busy_task:Busy",
            founding=None if ticket else founding,
            ticket=Ticket.parse(ticket) if ticket else None,
            train_apart=arguments["apart"],
            evaluate_every=0,
        )
        return Node(RealHost(), Identity(os.urandom(32)), config, task=Busy(), on_event=self._event)

    async def _run(self, node: Node) -> None:
        await node.run()
        flush()
        self._ended.set()

    def _event(self, event: Event) -> None:
        if (event.phase, event.what) == ("scatter", "begin"):
            self._began, self._clock = time.monotonic(), time.process_time()
        elif (event.phase, event.what) == ("commit", "begin") and self._began:
            self._flights.append((self._began, time.monotonic()))
            self._spent.append(time.process_time() - self._clock)
            self._began = 0.0


def _written(log: str) -> list[float]:
    return [float(line) for line in Path(log).read_text().split()]


async def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    for step_ms in options.step_ms:
        for apart in (False, True):
            for _ in range(options.runs):
                found = await _once(options.peers[0], step_ms, options.rounds, apart)
                _count(rows, step_ms, apart, found)
    for row in rows:
        row.extra |= machine()
    _table(rows)
    write(rows, options.json)


async def _once(peers: int, step_ms: float, rounds: int, apart: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        common = {"peers": peers, "step_ms": step_ms, "rounds": rounds, "apart": apart}
        async with children() as group:
            processes = await group.start("overlapper", peers)
            ticket = ""
            for number, process in enumerate(processes):
                log = f"{folder}/log{number}"
                ticket = (await process.ask("start", **common, ticket=ticket, log=log))["ticket"]
            return await ask_all(processes, "finish", patience=600.0)


def durations(answer: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of the steps that began and ended while a fragment was under way, and of those while none was.

    Between rounds a peer does other things too: the step before such a pause is left out, by its length.
    """
    steps, flights = answer["steps"], answer["flights"]
    starts = [start for start, _ in flights]
    inside, outside = [], []
    for one, next_one in itertools.pairwise(steps):
        at = bisect.bisect_right(starts, one) - 1
        under_way = at >= 0 and next_one <= flights[at][1]
        clear = (at < 0 or one >= flights[at][1]) and (at + 1 >= len(starts) or next_one <= starts[at + 1])
        if under_way:
            inside.append(next_one - one)
        elif clear:
            outside.append(next_one - one)
    return inside, outside


def _count(rows: list[Row], step_ms: float, apart: bool, found: list[dict[str, Any]]) -> None:
    inside: list[float] = []
    outside: list[float] = []
    lengths: list[float] = []
    spent: list[float] = []
    for answer in found:
        one, other = durations(answer)
        inside += one
        outside += other
        lengths += [stop - start for start, stop in answer["flights"]]
        spent += answer["spent"] if apart else []
    for what, values in (("under way", inside), ("none", outside)):
        system = "own process" if apart else "same process"
        row = next((r for r in rows if r.case == {"step_ms": step_ms, "fragment": what} and r.system == system), None)
        if row is None:
            row = Row("overlap", {"step_ms": step_ms, "fragment": what}, system, "median_s", extra={"steps": 0})
            rows.append(row)
        if values:
            row.runs.append(statistics.median(values))
        row.extra["steps"] += len(values)
        row.extra["flight_s"] = statistics.median(lengths) if lengths else 0.0
        if spent:
            row.extra["flight_cpu_s"] = statistics.median(spent)


def _table(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        if row.case["fragment"] != "under way" or not row.runs:
            continue
        case = {"step_ms": row.case["step_ms"], "fragment": "none"}
        other = next(r for r in rows if r.case == case and r.system == row.system)
        lines.append((
            f"{row.case['step_ms']:g} ms, {row.system}", f"{1e3 * other.median:.2f}", f"{1e3 * row.median:.2f}",
            f"{row.median / other.median:.2f}", str(row.extra["steps"]), f"{1e3 * row.extra['flight_s']:.0f}",
            f"{1e3 * row.extra['flight_cpu_s']:.0f}" if "flight_cpu_s" in row.extra else "",
        ))  # fmt: skip
    show(
        "a step of training, ms",
        ("step asked for", "no fragment", "under way", "ratio", "steps seen", "fragment, ms", "its CPU, ms"),
        lines,
        [
            f"{torch.get_num_threads()} thread; a fragment is a third of 12.6 MB, encrypted, over loopback; all peers "
            "train all the time, so cores that carry two of them have none left for the network."
        ],
    )
