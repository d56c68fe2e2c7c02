"""`shoal lab reduce`: the group reduce over slow lines in virtual time, beside the least time that the lines allow."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import attrs
from rich.console import Console
from rich.table import Table

from ..learning.reduce import topology
from ..transport.errors import ConfigError
from .determinism import seeded
from .outputs import check_outputs, save_figure, write_text
from .reduce_world import ReduceScenario, ReduceWorld, RoundResult, optimum, reduce_rounds

#: What is required of the last round: the part of the best possible speed, for equal and for unequal lines.
REQUIRED, REQUIRED_UNEQUAL = 0.9, 1.0 / 1.1

#: Bytes that all peers together may hold: three vectors each, two of them their own.
MOST_MEMORY = 12 << 30


@attrs.frozen
class ReduceReport:
    """What was tried, what came out. ``best``: seconds, by uplinks alone, no latency."""

    scenario: ReduceScenario
    best: float
    rounds: tuple[RoundResult, ...]
    cpu: float

    @property
    def required(self) -> float:
        return REQUIRED if len(set(self.scenario.uplinks)) == 1 else REQUIRED_UNEQUAL

    @property
    def waiting(self) -> float:
        """Seconds that a round waits at least for messages: round trips of control, and the last byte of two phases."""
        return (2.0 * topology.CONTROL_ROUND_TRIPS + 2.0) * self.scenario.latency

    @property
    def latency_bound(self) -> bool:
        """Whether the bound says nothing here: with no byte too many it would be missed by waiting alone."""
        return self.best / (self.best + self.waiting) < self.required

    def complaints(self) -> list[str]:
        """What is not as required of the last round; earlier ones know nothing of the lines."""
        last = self.rounds[-1]
        found = []
        if not self.latency_bound and not self.scenario.routes and self.best / last.seconds < self.required:
            share = self.best / last.seconds
            found.append(f"the last round has {share:.1%} of the best speed, not {self.required:.1%}")
        if len(last.members) < len(self.scenario.uplinks):
            found.append(f"{len(last.members)} of {len(self.scenario.uplinks)} peers are in the last round")
        return found

    def table(self) -> Table:
        scenario = self.scenario
        ups = sorted({round(up * 8e-6, 3) for up in scenario.uplinks})
        lines = f"{ups[0]:g} Mbit/s" if len(ups) == 1 else f"{ups[0]:g} to {ups[-1]:g} Mbit/s"
        title = f"{len(scenario.uplinks)} peers, {scenario.size / 2**20:g} MiB, {lines}, {1e3 * scenario.latency:g} ms"
        table = Table(title=f"{title}; best possible {self.best:.2f} s")
        for column in ("round", "seconds", "of best", "plan known", "scatter over", "gather over"):
            table.add_column(column, justify="right")
        for number, result in enumerate(self.rounds, 1):
            at = [f"{result.phases.get(phase, 0.0):.2f}" for phase in ("scatter", "gather", "commit")]
            share = f"{self.best / result.seconds:.1%}"
            table.add_row(str(number), f"{result.seconds:.2f}", share, *at)
        return table

    def to_json(self) -> str:
        rounds = [{**attrs.asdict(result), "of_best": self.best / result.seconds} for result in self.rounds]
        scenario = {
            "uplinks": self.scenario.uplinks, "size": self.scenario.size,
            "latency": self.scenario.latency, "seed": self.scenario.seed,
        }  # fmt: skip
        return json.dumps({"scenario": scenario, "best": self.best, "cpu": self.cpu, "rounds": rounds}, indent=1)


def reduce(options: argparse.Namespace) -> int:
    """Run the trial that the command line asks for; 0 when the last round is as fast as required."""
    console = Console(highlight=False, width=None)
    check_outputs(options.json, options.plot)
    scenario = scenario_of(options)
    if 2 * len(scenario.uplinks) * scenario.size > MOST_MEMORY:
        raise ConfigError(
            f"{len(scenario.uplinks)} vectors of {options.mb:g} MiB do not fit into memory; take smaller ones and, for "
            "the same times, as much slower lines"
        )
    began = time.process_time()

    def tell(world: ReduceWorld, result: RoundResult) -> None:
        console.print(f"round {world.head.round}: {result.seconds:.2f} s; {result.reason}", soft_wrap=True)

    rounds = tuple(reduce_rounds(scenario, tell))
    report = ReduceReport(scenario, optimum(scenario), rounds, time.process_time() - began)
    console.print(report.table())
    console.print(f"{report.cpu:.0f} s of CPU for {rounds[-1].seconds:.1f} virtual seconds a round")
    if scenario.routes:
        console.print(
            f"{len(scenario.routes)} paths are slower than the lines, so the part of the best speed, which is that of "
            "the uplinks alone, is not judged",
            soft_wrap=True,
        )
    elif report.latency_bound:
        console.print(
            f"bound by latency: messages alone take {report.waiting:.2f} s here, beside {report.best:.2f} s for the "
            "bytes, so the part of the best speed is not judged; take more bytes or slower lines for that",
            soft_wrap=True,
        )
    for line in report.complaints():
        console.print(f"[bold red]not as required:[/] {line}")
    if options.json is not None:
        write_text(options.json, report.to_json())
    if options.plot is not None:
        plot(report, options.plot)
        console.print(f"wrote {options.plot}")
    return 1 if report.complaints() else 0


def scenario_of(options: argparse.Namespace) -> ReduceScenario:
    """``--unequal 1,4``: uplinks in these proportions, in turns."""
    factors: Sequence[float] = options.unequal or (1.0,)
    uplinks = tuple(options.uplink * factors[number % len(factors)] for number in range(options.peers))
    size = int(options.mb * 2**20) // 4 * 4
    routes = slow_paths(uplinks, options.slow_paths, options.seed)
    return ReduceScenario(
        uplinks, size, options.latency, options.rounds, options.seed, routes=routes, probes=options.probes
    )


def slow_paths(uplinks: Sequence[float], part: float, seed: int) -> dict[tuple[int, int], float]:
    """A ``part`` of all paths, from number to number, and their bytes per second."""
    chance = seeded(seed, "slow paths")
    count = range(len(uplinks))
    slow = [(i, j) for i in count for j in count if i != j and chance.random() < part]
    return {(i, j): uplinks[i] / chance.uniform(5.0, 20.0) for i, j in slow}


def plot(report: ReduceReport, path: object) -> None:
    """Where the time of each round goes, as bars beside the best possible."""
    from pathlib import Path

    from matplotlib import pyplot

    assert isinstance(path, Path)
    figure, axes = pyplot.subplots(figsize=(8, 4))
    names = ("convene", "scatter", "gather", "commit")
    for number, result in enumerate(report.rounds, 1):
        marks = [0.0, *(result.phases.get(phase, 0.0) for phase in names[1:]), result.seconds]
        for index, name in enumerate(names):
            width = max(0.0, marks[index + 1] - marks[index])
            axes.barh(number, width, left=marks[index], color=f"C{index}", label=name if number == 1 else None)
    axes.axvline(report.best, color="black", linestyle="--", label="best possible")
    axes.set_yticks(range(1, len(report.rounds) + 1))
    axes.set_xlabel("virtual seconds")
    axes.set_ylabel("round")
    axes.legend(loc="lower right")
    figure.tight_layout()
    save_figure(figure, path)
