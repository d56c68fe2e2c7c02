"""`shoal lab stages`: a pipeline loses stages; ways to recover by rate of failure, in virtual hours."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch
from rich.console import Console

from ..learning import exact
from ..learning.pipeline import recovery
from ..learning.tasks import stdlib
from ..transport.errors import ConfigError
from . import defaults, stages_field, stages_models
from .outputs import check_outputs, leave_behind, tell, write_text
from .stages_field import (
    METHODS,
    PATIENCE,
    RATES,
    TIMED,
    TRAINED,
    WHOLE,
    Case,
    Costs,
    Outcome,
    Shared,
    first_loss,
    times,
)  # fmt: skip
from .stages_models import PROBLEMS, STAGES
from .sweep import Kept, run_all, stopwatch

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
class Claim:
    """Something the paper says. ``unreached``: seeds in which the method never came to the target."""

    what: str
    difference: Difference
    unit: str = ""
    unreached: int = 0

    @property
    def measured(self) -> str:
        if self.unreached:
            return f"nothing: {self.unreached} times it does not reach it"
        return f"{self.difference} {self.unit}".strip()


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

    def claims(self) -> list[Claim]:
        """What the paper says, in the mean over the seeds."""
        result = []
        for more, less in (("random", "copy"), ("copy", "gradient")):
            difference = _difference(self.probed("none", more, INNER), self.probed("none", less, INNER))
            told = "the weighted average" if less == "gradient" else less
            what = f"an inner stage recovered by {more} is worse than by {told}"
            result.append(Claim(what, difference))
        apart, alike = (self.probed(method, "copy", (0,)) for method in WHOLE)
        result.append(Claim("swapping makes the loss of a copied first stage cheaper", _difference(apart, alike)))
        for rate in [rate for rate in self.rates if rate in JUDGED and "checkpoint" in self.methods]:
            for method in [method for method in ("checkfree", "checkfree+") if method in self.methods]:
                difference = _difference(self.hours("checkpoint", rate), self.hours(method, rate))
                unreached = sum(math.isinf(hours) for hours in self.hours(method, rate))
                what = f"{method} reaches the target before checkpointing at {rate} %"
                result.append(Claim(what, difference, "h", unreached))
        return result

    def verdicts(self) -> list[tuple[bool, str]]:
        """Claims, and whether they hold here."""
        return [
            (claim.difference.clear, f"{self.problem}: {claim.what}, by {claim.measured}") for claim in self.claims()
        ]

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
    check_outputs(options.json, options.plot, options.markdown)
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
    if options.resume is not None:
        Kept.prepare(options.resume)
    sweep = sweep_over(
        problems, methods, rates, options.seeds, options.iterations, costs, options.processes, console, options.resume
    )  # fmt: skip
    # They bring tables and curves, which a sweep does without.
    from .stages_tables import markdown, plot, report

    report(sweep, console)
    code = tell(console, sweep.verdicts())
    console.print(f"{sweep.seconds:.0f} s; mean and deviation over {options.seeds} seeds", soft_wrap=True)
    if options.markdown is not None:
        write_text(options.markdown, markdown(sweep))
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
    folder: Path | None = None,
) -> Sweep:
    """Every combination, ``processes`` runs at a time; ``iterations`` None: as many as the problem is meant for.
    ``folder``: where runs are kept as they end, and looked for."""
    elapsed = stopwatch()
    lengths = {problem: iterations or PROBLEMS[problem].iterations for problem in problems}
    # Those without failures first: they say what the target is, and the others begin with what they come to.
    whole = [Case(p, method, 0, seed, lengths[p]) for p in problems for method in WHOLE for seed in range(seeds)]
    trained = [
        Case(problem, method, rate, seed, lengths[problem])
        for problem in problems
        for method in methods
        if method in TRAINED
        for rate in rates
        for seed in range(seeds)
    ]
    kept = None if folder is None else Kept[Case, Outcome](folder, Outcome, version())
    with _starts(folder) as starts:
        run = Shared(starts, tuple((method, rate) for method in methods if method in TRAINED for rate in rates))
        outcomes = run_all(
            run, whole, processes, console, kept=kept, cost=_cost, later=sum(map(_cost, trained))
        )  # fmt: skip
        targets = {
            (case.problem, case.seed): outcomes[case].at(round(TARGET * case.iterations))
            for case in whole
            if case.method == "none"
        }
        trained = [attrs.evolve(case, target=targets[case.problem, case.seed]) for case in trained]
        outcomes |= run_all(run, trained, processes, console, kept=kept, cost=_cost)
    blocks = []
    for problem in problems:
        runs: dict[tuple[str, int], tuple[Outcome, ...]] = {}
        for case in [case for case in (*whole, *trained) if case.problem == problem]:
            runs[case.method, case.rate] = (*runs.get((case.method, case.rate), ()), outcomes[case])
        blocks.append(Block(problem, lengths[problem], costs, tuple(rates), tuple(methods), runs))
    return Sweep(tuple(blocks), elapsed())


def version() -> str:
    """Of everything that an outcome follows from beside its case: sources, the text that is learnt, torch."""
    digest = hashlib.blake2b(f"{torch.__version__} {platform.python_version()}".encode(), digest_size=8)
    for module in (stages_field, stages_models, recovery, exact, stdlib):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


@contextmanager
def _starts(folder: Path | None) -> Iterator[Path]:
    """A folder for what runs begin with. Beside kept runs it outlives a sweep that is killed."""
    where = None if folder is None else folder / f"starts-{version()}"
    if where is None:
        with tempfile.TemporaryDirectory(prefix="shoal-lab-stages-") as scratch:
            yield Path(scratch)
        return
    where.mkdir(exist_ok=True)
    yield where
    # All is done, or it raised above.
    shutil.rmtree(where, ignore_errors=True)


def _cost(case: Case) -> float:
    """Milliseconds that it takes, about, on a core of 2026 that it has for itself."""
    method = WHOLE.get(case.method) or TRAINED[case.method]
    length = case.iterations if case.method in WHOLE else 0.5 * (1 + PATIENCE) * case.iterations - first_loss(case)
    return length * PROBLEMS[case.problem].milliseconds * (1.3 if method.swap else 1.0)
