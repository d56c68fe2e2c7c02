"""`shoal lab stages`: a pipeline loses stages; ways to recover by rate of failure, in virtual hours."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from ..transport.errors import ConfigError
from . import defaults
from .outputs import check_outputs, leave_behind, save_figure, tell
from .stages_field import METHODS, RATES, TIMED, TRAINED, WAYS, WHOLE, Case, Costs, Outcome, run, times
from .stages_models import PROBLEMS, STAGES
from .sweep import run_all, stopwatch

#: Hours of the paper's model of 500 M to a validation loss of 2.85 (Table 2), by method and failures in % per hour.
PAPER: Mapping[tuple[str, int], float] = {
    ("checkpoint", 5): 558.23, ("redundant", 5): 419.56, ("checkfree:spared", 5): 367.81, ("checkfree+", 5): 355.13,
    ("checkpoint", 10): 621.67, ("redundant", 10): 419.56, ("checkfree:spared", 10): 405.87, ("checkfree+", 10): 367.81,
    ("checkpoint", 16): 634.35, ("redundant", 16): 419.56, ("checkfree:spared", 16): 562.96, ("checkfree+", 16): 460.6,
}  # fmt: skip
#: The target: held-out loss of the run without failures of the same seed when this part of its iterations is done.
TARGET = 0.9
#: A difference over the seeds that is this many times its standard error is one.
CLEAR = 2.0
#: Rates at which the paper's methods must be before checkpointing (its abstract: low and medium rates).
JUDGED = (5, 10)
INNER = range(1, STAGES - 1)
#: Where stages stand, for tables of jumps.
PLACES = {"first": (0,), "inner": tuple(INNER), "last": (STAGES - 1,)}


@attrs.frozen
class Difference:
    """Of paired values, one for each seed."""

    values: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Above zero by more than the spread over the seeds explains."""
        if not self.values or not all(math.isfinite(value) for value in self.values):
            return False
        return statistics.fmean(self.values) > CLEAR * self.error

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 for one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{statistics.fmean(self.values):+.3g} ± {self.error:.2g}"


@attrs.frozen
class Block:
    """One problem: outcomes by (method, rate), one for each seed. What needs no failures stands at rate 0."""

    problem: str
    iterations: int
    costs: Costs
    rates: tuple[int, ...]
    methods: tuple[str, ...]
    runs: Mapping[tuple[str, int], tuple[Outcome, ...]]

    @property
    def seeds(self) -> int:
        return len(self.runs["none", 0])

    def found(self, method: str, rate: int) -> tuple[Outcome, ...]:
        """Its trainings; checkpointing and redundant computation go through the states of the run without failures."""
        if method in TIMED:
            return self.runs["none", 0]
        return self.runs[method, 0 if method in WHOLE else rate]

    def hours(self, method: str, rate: int) -> list[float]:
        """For each seed: virtual hours to the target; inf: not reached."""
        result = []
        for seed, (outcome, whole) in enumerate(zip(self.found(method, rate), self.runs["none", 0], strict=True)):
            done = outcome.reaching(whole.at(round(TARGET * self.iterations)))
            result.append(math.inf if done is None else float(self.clock(method, rate, seed, done)[done]))
        return result

    def clock(self, method: str, rate: int, seed: int, iterations: int) -> Sequence[float]:
        """Virtual hours after each iteration."""
        hours: Sequence[float] = times(method, seed, rate, iterations, self.costs).tolist()
        return hours

    def final(self, method: str, rate: int) -> list[float]:
        """Held-out loss after the iterations of the run without failures."""
        return [outcome.at(self.iterations) for outcome in self.found(method, rate)]

    def jumps(self, method: str, rate: int) -> list[float]:
        """For each seed in which something was lost: the mean jump of the loss at recoveries."""
        if method not in TRAINED:
            return []
        return [statistics.fmean(j.height for j in o.jumps) for o in self.found(method, rate) if o.jumps]

    def probed(self, method: str, way: str, stages: Sequence[int]) -> list[float]:
        """For each seed: the mean jump that a recovery by ``way`` would have meant in runs without failures."""
        return [
            statistics.fmean(probe.height for probe in outcome.probes if probe.way == way and probe.stage in stages)
            for outcome in self.runs[method, 0]
        ]

    def verdicts(self) -> list[tuple[bool, str]]:
        """What the paper says, and whether it holds here, in the mean over the seeds."""
        result = []
        for more, less in (("random", "copy"), ("copy", "gradient")):
            difference = _difference(self.probed("none", more, INNER), self.probed("none", less, INNER))
            told = "the weighted average" if less == "gradient" else less
            text = f"{self.problem}: an inner stage recovered by {more} is {difference} worse than by {told}"
            result.append((difference.clear, text))
        apart, alike = (self.probed(method, "copy", (0,)) for method in WHOLE)
        difference = _difference(apart, alike)
        text = f"{self.problem}: without swapping a copied first stage raises the loss by {difference} more than with"
        result.append((difference.clear, text))
        for rate in [rate for rate in self.rates if rate in JUDGED and "checkpoint" in self.methods]:
            for method in [method for method in ("checkfree", "checkfree+") if method in self.methods]:
                difference = _difference(self.hours("checkpoint", rate), self.hours(method, rate))
                unreached = sum(math.isinf(hours) for hours in self.hours(method, rate))
                how = f"{difference} hours before checkpointing" if not unreached else f"not at all, {unreached} times"
                text = f"{self.problem}, {rate} %: {method} reaches the target {how}"
                result.append((difference.clear, text))
        return result

    def remarks(self) -> list[str]:
        """Who is first at each rate, and what redundant computation is ahead of."""
        result = []
        for rate in self.rates:
            means = {
                method: statistics.fmean(self.hours(method, rate)) for method in self.methods if method not in WHOLE
            }
            first = min(means, key=lambda method: means[method])
            text = f"{self.problem}, {rate} %: {first} is first with {means[first]:.1f} h"
            if math.isinf(means[first]):
                text = f"{self.problem}, {rate} %: nothing reaches the target"
            if "redundant" in means:
                behind = [name for name, mean in means.items() if mean > means["redundant"]]
                text += f"; redundant computation is before {', '.join(behind) or 'nobody'}"
            result.append(text)
        return result


def _difference(more: Sequence[float], less: Sequence[float]) -> Difference:
    # inf - inf: neither is before the other.
    return Difference(tuple(a - b if math.isfinite(b) else -math.inf for a, b in zip(more, less, strict=True)))


@attrs.frozen
class Sweep:
    """Everything that was run."""

    blocks: tuple[Block, ...]
    seconds: float

    def verdicts(self) -> list[tuple[bool, str]]:
        return [verdict for block in self.blocks for verdict in block.verdicts()]

    def to_json(self) -> str:
        """Strict JSON: null for what is never reached."""
        blocks = [
            {
                "problem": block.problem,
                "iterations": block.iterations,
                "costs": attrs.asdict(block.costs),
                "methods": [
                    {
                        "method": method,
                        "rate": rate,
                        "hours": [hours if math.isfinite(hours) else None for hours in block.hours(method, rate)],
                        "final": block.final(method, rate),
                        "outcomes": [] if method in TIMED else [attrs.asdict(o) for o in block.found(method, rate)],
                    }
                    for rate in block.rates
                    for method in block.methods
                ],
            }
            for block in self.blocks
        ]
        verdicts = [{"holds": holds, "what": text} for holds, text in self.verdicts()]
        remarks = [text for block in self.blocks for text in block.remarks()]
        whole = {"seconds": self.seconds, "verdicts": verdicts, "remarks": remarks, "blocks": blocks}
        return json.dumps(whole, indent=1, allow_nan=False)


def stages(options: argparse.Namespace) -> int:
    """Run the sweep that the command line asks for; 0 when all that the paper says holds."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else defaults.LAB_WIDTH)
    check_outputs(options.json, options.plot)
    methods = tuple(dict.fromkeys(options.methods or METHODS))
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"no method is called {method!r}; there are {', '.join(METHODS)}")
    problems = tuple(dict.fromkeys(options.problems))
    for problem in problems:
        if problem not in PROBLEMS:
            raise ConfigError(f"no problem is called {problem!r}; there are {', '.join(PROBLEMS)}")
    rates = tuple(dict.fromkeys(options.rates))
    for rate in rates:
        if rate not in RATES:
            raise ConfigError(
                f"no probabilities are known for {rate} % per hour; there are {', '.join(map(str, RATES))}"
            )
    costs = Costs(every=options.every, checkpoint=options.checkpoint, recovery=options.recovery)
    sweep = sweep_over(
        problems, methods, rates, options.seeds, options.iterations, costs, options.processes, console
    )  # fmt: skip
    report(sweep, console)
    code = tell(console, sweep.verdicts())
    console.print(f"{sweep.seconds:.0f} s; mean and deviation over {options.seeds} seeds", soft_wrap=True)
    leave_behind(console, sweep.to_json, lambda path: plot(sweep, path), options.json, options.plot)
    return code


def sweep_over(
    problems: Sequence[str],
    methods: Sequence[str],
    rates: Sequence[int],
    seeds: int,
    iterations: int | None,
    costs: Costs,
    processes: int | None = None,
    console: Console | None = None,
) -> Sweep:
    """Every combination, ``processes`` runs at a time; ``iterations`` None: as many as the problem is meant for."""
    elapsed = stopwatch()
    lengths = {problem: iterations or PROBLEMS[problem].iterations for problem in problems}
    # Those without failures first: they say what the target is.
    whole = [Case(p, method, 0, seed, lengths[p]) for p in problems for method in WHOLE for seed in range(seeds)]
    outcomes = run_all(run, whole, processes, console)
    targets = {
        (case.problem, case.seed): outcomes[case].at(round(TARGET * case.iterations))
        for case in whole
        if case.method == "none"
    }
    trained = [
        Case(problem, method, rate, seed, lengths[problem], targets[problem, seed])
        for problem in problems
        for method in methods
        if method in TRAINED
        for rate in rates
        for seed in range(seeds)
    ]
    outcomes |= run_all(run, trained, processes, console)
    blocks = []
    for problem in problems:
        runs: dict[tuple[str, int], tuple[Outcome, ...]] = {}
        for case in [case for case in (*whole, *trained) if case.problem == problem]:
            runs[case.method, case.rate] = (*runs.get((case.method, case.rate), ()), outcomes[case])
        blocks.append(Block(problem, lengths[problem], costs, tuple(rates), tuple(methods), runs))
    return Sweep(tuple(blocks), elapsed())


# -- what is shown -----------------------------------------------------------------------------------------------------


def report(sweep: Sweep, console: Console) -> None:
    """Tables and remarks."""
    for block in sweep.blocks:
        console.print(table(block))
        console.print(jumps_table(block))
    for block in sweep.blocks:
        for remark in block.remarks():
            console.print(remark, soft_wrap=True)


def table(block: Block) -> Table:
    """Methods by rates: hours to the target, and what else came of them."""
    shown = Table(title=f"{block.problem}: {PROBLEMS[block.problem].what}, {block.iterations} iterations")
    shown.add_column("method", no_wrap=True)
    for column in ("failures % / h", "losses", "h to target", "final loss", "jump", "paper, h"):
        shown.add_column(column, justify="right", no_wrap=True)
    for method in [method for method in block.methods if method in WHOLE]:
        shown.add_row(method, "", "", *_cells(block, method, 0), "")
    for rate in block.rates:
        shown.add_section()
        for method in [method for method in block.methods if method not in WHOLE]:
            losses = [len(outcome.jumps) for outcome in block.found(method, rate)] if method in TRAINED else []
            paper = PAPER.get((method, rate))
            shown.add_row(
                method, str(rate), f"{statistics.fmean(losses):.1f}" if losses else "", *_cells(block, method, rate),
                "" if paper is None else f"{paper:.0f}",
            )  # fmt: skip
    return shown


def _cells(block: Block, method: str, rate: int) -> tuple[str, str, str]:
    hours = block.hours(method, rate)
    reached = [value for value in hours if math.isfinite(value)]
    share = "" if len(reached) == len(hours) else f" ({len(reached)}/{len(hours)})"
    time = f"{spread(reached, 1)}{share}" if reached else "never"
    return time, spread(block.final(method, rate), 4), spread(block.jumps(method, rate), 4)


def jumps_table(block: Block) -> Table:
    """By how much the loss jumps by each way, had a stage been lost in runs without failures; with swapping beside."""
    shown = Table(title=f"{block.problem}: jump of the loss right after a recovery, had a stage been lost")
    shown.add_column("recovered by", no_wrap=True)
    for method in WHOLE:
        for place in PLACES:
            shown.add_column(place if method == "none" else f"{place}, swapped", justify="right", no_wrap=True)
    for way in WAYS:
        cells = [spread(block.probed(method, way, place), 4) for method in WHOLE for place in PLACES.values()]
        shown.add_row(way, *cells)
    return shown


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f}±{deviation:.{digits}f}"


#: How methods are drawn.
_STYLES = {
    "none": ("black", "-"), "none:swapped": ("grey", "-"), "checkpoint": ("tab:red", "-"),
    "checkpoint:tuned": ("tab:red", ":"), "redundant": ("tab:orange", "-"), "random": ("tab:brown", "--"),
    "skip": ("tab:olive", "--"), "copy": ("tab:purple", "--"), "checkfree": ("tab:blue", "-"),
    "checkfree:spared": ("tab:cyan", "-"), "checkfree+": ("tab:green", "-"),
}  # fmt: skip


def plot(sweep: Sweep, path: Path) -> None:
    """Held-out loss against virtual hours, mean over the seeds: a row for each problem, a column for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(len(block.rates) for block in sweep.blocks)
    figure, grid = pyplot.subplots(
        len(sweep.blocks), columns, squeeze=False, layout="constrained",
        figsize=(1.5 + 3.6 * columns, 1.2 + 3.0 * len(sweep.blocks)),
    )  # fmt: skip
    for row, block in zip(grid, sweep.blocks, strict=True):
        for axes in row[len(block.rates) :]:
            axes.set_visible(False)
        for axes, rate in zip(row, block.rates, strict=False):
            latest = 0.0
            for method in block.methods:
                hours, losses = curve(block, method, rate)
                colour, line = _STYLES[method]
                axes.plot(hours, losses, line, c=colour, lw=1.3, label=method)
                latest = max(latest, hours[-1] if method == "redundant" else 0.0)
            axes.set(title=f"{block.problem}, {rate} % per hour", yscale="log")
            axes.set_xlabel("virtual hours", fontsize="small")
            axes.grid(alpha=0.3, which="both")
            if latest:
                axes.set_xlim(0, 1.1 * latest)
        row[0].set_ylabel(PROBLEMS[block.problem].what, fontsize="small")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    save_figure(figure, path)


def curve(block: Block, method: str, rate: int) -> tuple[list[float], list[float]]:
    """Hours and losses at the looks that all seeds had, in the mean; up to the first that one never came to."""
    found = block.found(method, rate)
    hours, losses = list[float](), list[float]()
    last = min(outcome.looks[-1][0] for outcome in found)
    clocks = [block.clock(method, rate, seed, last) for seed in range(len(found))]
    for looks in zip(*(outcome.looks for outcome in found), strict=False):
        done = looks[0][0]
        if not (math.isfinite(now := statistics.fmean(clock[done] for clock in clocks))) or done > block.iterations:
            break
        hours.append(now)
        losses.append(statistics.fmean(loss for _, loss in looks))
    return hours, losses
