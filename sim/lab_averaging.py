"""`shoal lab averaging`: models that began apart are averaged, by method, graph and data, beside those that did not."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from ..learning import topologies
from ..transport.errors import ConfigError
from . import defaults
from .averaging_field import EVERY, GRAPHLESS, GRAPHS, METHODS, Case, Field, Outcome, run
from .outputs import check_outputs, leave_behind, save_figure, tell
from .sweep import run_all, stopwatch

#: What is required: points that plain averaging stays below, that the correction reaches (same mixture for all, and
#: Dirichlet), and by which it may stay behind those that began alike and behind FedAvg.
BROKEN, REACHED, REACHED_APART, BEHIND = 30.0, 95.0, 90.0, 2.0
#: The method of which all that is required.
JUDGED, CONTROL, REFERENCE = "corrected", "same init", "fedavg"


@attrs.frozen
class Block:
    """One way in which classes are spread and one number of exchanges: outcomes by (method, graph), one for each seed.

    Methods without a graph stand under the graph ``""``.
    """

    field: Field
    runs: Mapping[tuple[str, str], tuple[Outcome, ...]]

    @property
    def title(self) -> str:
        return f"{self.field.label}, {exchanges(self.field)}"

    def found(self, method: str, graph: str) -> tuple[Outcome, ...]:
        return self.runs.get((method, "" if method in GRAPHLESS else graph), ())

    def accuracy(self, method: str, graph: str) -> float | None:
        """Mean over the seeds after the last round, in points; None if it was not run."""
        found = self.found(method, graph)
        return 100 * statistics.fmean(outcome.accuracy[-1] for outcome in found) if found else None

    def text(self, method: str, graph: str) -> str:
        """Mean and deviation over the seeds."""
        last = [100 * outcome.accuracy[-1] for outcome in self.found(method, graph)]
        if not last:
            return ""
        return f"{statistics.fmean(last):.1f}±{statistics.stdev(last) if len(last) > 1 else 0.0:.1f}"

    def curve(self, method: str, graph: str) -> list[float]:
        """Mean over the seeds at each look, in points."""
        return [
            100 * statistics.fmean(values)
            for values in zip(*(o.accuracy for o in self.found(method, graph)), strict=True)
        ]

    def variance(self, method: str, graph: str) -> float | None:
        """The variance of the weights after the last round, in parts of that in the beginning."""
        found = self.found(method, graph)
        return statistics.fmean(outcome.variance[-1] for outcome in found) if found else None


def exchanges(field: Field) -> str:
    """In words."""
    count = f"{field.exchanges} exchanges" if field.exchanges > 1 else "one exchange"
    return f"{count} a round of {field.steps} steps"


@attrs.frozen
class Sweep:
    """Everything that was run."""

    methods: tuple[str, ...]
    graphs: tuple[str, ...]
    form: str
    seeds: int
    blocks: tuple[Block, ...]
    seconds: float

    def verdicts(self) -> list[tuple[bool, str]]:
        """What is required, and whether it holds here: in each block, of those that exchanged most."""
        found: list[tuple[bool, str]] = []
        most = max(block.field.exchanges for block in self.blocks)
        for block in [block for block in self.blocks if block.field.exchanges == most]:
            least = REACHED if block.field.alpha is None else REACHED_APART
            for graph in self.graphs:
                where = f"{block.title}, {graph}"
                plain, judged = block.accuracy("plain", graph), block.accuracy(JUDGED, graph)
                if plain is not None:
                    found.append((plain < BROKEN, f"{where}: plain averaging ends at {plain:.1f} (below {BROKEN:g})"))
                if judged is None:
                    continue
                found.append((judged >= least, f"{where}: {JUDGED} ends at {judged:.1f} (at least {least:g})"))
                for other in (CONTROL, REFERENCE):
                    beside = block.accuracy(other, graph)
                    if beside is not None:
                        text = f"{where}: {JUDGED} is {judged - beside:+.1f} to {other} ({-BEHIND:g} at most)"
                        found.append((judged >= beside - BEHIND, text))
        return found

    def to_json(self) -> str:
        blocks = [
            {
                "field": attrs.asdict(block.field),
                "runs": [
                    {"method": method, "graph": graph, "outcomes": [attrs.asdict(outcome) for outcome in outcomes]}
                    for (method, graph), outcomes in block.runs.items()
                ],
            }
            for block in self.blocks
        ]
        verdicts = [{"holds": holds, "what": text} for holds, text in self.verdicts()]
        whole = {"form": self.form, "seeds": self.seeds, "seconds": self.seconds, "verdicts": verdicts}
        return json.dumps({**whole, "blocks": blocks}, indent=1)


def averaging(options: argparse.Namespace) -> int:
    """Run the sweep that the command line asks for; 0 when all that is required holds."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else defaults.LAB_WIDTH)
    check_outputs(options.json, options.plot)
    methods = tuple(dict.fromkeys(options.methods or METHODS))
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"no method is called {method!r}; there are: {'; '.join(METHODS)}")
    graphs = tuple(dict.fromkeys(options.graphs or GRAPHS))
    for graph in graphs:
        topologies.check(graph)
    fields = []
    for alpha in options.alpha:
        for count in sorted(options.exchanges):
            if not count or options.steps % count:
                raise ConfigError(f"{count} exchanges cannot be spread evenly over {options.steps} steps")
            fields.append(
                Field(
                    peers=options.peers, rounds=options.rounds, steps=options.steps, rate=options.rate, alpha=alpha,
                    model=options.model, exchanges=count, decay=not options.steady,
                )
            )  # fmt: skip
    sweep = sweep_over(fields, methods, graphs, options.form, options.seeds, options.processes, console)
    for block in sweep.blocks:
        console.print(table(sweep, block))
    code = tell(console, sweep.verdicts())
    console.print(
        f"{sweep.seconds:.0f} s; accuracy of the peers' own models on held-out digits in %, mean and deviation over "
        f"{sweep.seeds} seeds",
        soft_wrap=True,
    )
    leave_behind(console, sweep.to_json, lambda path: plot(sweep, path), options.json, options.plot)
    return code


def sweep_over(
    fields: Sequence[Field],
    methods: tuple[str, ...],
    graphs: tuple[str, ...],
    form: str,
    seeds: int,
    processes: int | None = None,
    console: Console | None = None,
) -> Sweep:
    """Every combination, ``processes`` runs at a time (default: a core each)."""
    elapsed = stopwatch()
    # Without a graph there are no exchanges: such a run stands in all blocks of its data.
    plan: dict[Case, list[tuple[int, str, str]]] = {}
    for index, field in enumerate(fields):
        for method in methods:
            alone = method in GRAPHLESS
            for graph in ("",) if alone else graphs:
                for seed in range(seeds):
                    case = Case(attrs.evolve(field, exchanges=1) if alone else field, method, graph, form, seed)
                    plan.setdefault(case, []).append((index, method, graph))
    outcomes = run_all(run, list(plan), processes, console)
    runs: list[dict[tuple[str, str], list[Outcome]]] = [{} for _ in fields]
    for case, places in plan.items():
        for index, method, graph in places:
            runs[index].setdefault((method, graph), []).append(outcomes[case])
    blocks = tuple(
        Block(field, {key: tuple(found) for key, found in runs[index].items()}) for index, field in enumerate(fields)
    )
    return Sweep(methods, graphs, form, seeds, blocks, elapsed())


def table(sweep: Sweep, block: Block) -> Table:
    """Methods by graphs: accuracy after the last round, and the variance that is left of the weights on the first."""
    shown = Table(title=f"{block.title}, {sweep.form}")
    shown.add_column("method", no_wrap=True)
    for graph in sweep.graphs:
        shown.add_column(graph, justify="right", no_wrap=True)
    shown.add_column(f"variance, {sweep.graphs[0]}", justify="right")
    for method in sweep.methods:
        variance = block.variance(method, sweep.graphs[0])
        left = "" if variance is None else f"{variance:.2f}"
        shown.add_row(method, *(block.text(method, graph) for graph in sweep.graphs), left)
    return shown


#: How methods are drawn.
_STYLES = {
    "plain": ("tab:red", "-"), "corrected": ("tab:blue", "-"), "corrected:self": ("tab:cyan", "-"),
    "corrected:conservative": ("tab:purple", "-"), "dimat": ("tab:green", "-"), "dimat, corrected": ("tab:olive", "-"),
    "same init": ("black", "--"), "same init, corrected": ("grey", "--"), "fedavg": ("tab:brown", ":"),
    "solo": ("grey", ":"),
}  # fmt: skip


def plot(sweep: Sweep, path: Path) -> None:
    """Accuracy over rounds: a row for each block, a column for each graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(sweep.blocks), len(sweep.graphs), squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=(max(5.0, 1.5 + 2.9 * len(sweep.graphs)), 0.8 + 2.3 * len(sweep.blocks)),
    )  # fmt: skip
    for row, block in zip(grid, sweep.blocks, strict=True):
        for axes, graph in zip(row, sweep.graphs, strict=True):
            looks = [min(block.field.rounds, EVERY * (at + 1)) for at in range(-(-block.field.rounds // EVERY))]
            for method in sweep.methods:
                curve = block.curve(method, graph) if block.found(method, graph) else []
                colour, line = _STYLES[method]
                axes.plot(looks[: len(curve)], curve, line, c=colour, lw=1.3, label=method)
            axes.set_title(graph, fontsize="small")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(block.title.replace(", ", "\n"), fontsize="x-small")
    for axes in grid[-1]:
        axes.set_xlabel("round", fontsize="small")
    figure.suptitle(f"accuracy in %, {sweep.blocks[0].field.peers} peers, {sweep.seeds} seeds, {sweep.form}")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(5, 1 + len(sweep.graphs)),
        fontsize="small",
    )
    save_figure(figure, path)
