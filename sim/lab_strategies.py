"""`shoal lab strategies`: every strategy on every task, split of the data and kind of lines, over several seeds."""

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

from ..learning.strategies import resolve as resolve_strategy
from ..learning.task import Task, resolve
from ..learning.tasks.digits import Digits
from ..transport.errors import ConfigError
from . import defaults
from .field import FieldCase, FieldPoint, run_field
from .field_links import Line, Links
from .outputs import check_outputs, leave_behind, save_figure
from .sweep import run_all, stopwatch

#: Methods of a sweep, as ``strategy`` or ``strategy:name=value,name=value``.
METHODS = (
    "allreduce", "diloco", "streaming", "streaming:bits=4", "async", "co2", "noloco", "fedavg", "fedavg:participants=4",
    "scaffold", "local",
)  # fmt: skip
#: Rounds of a run in which it is looked at, about.
POINTS = 25


@attrs.frozen
class Setting:
    """Lines and machines: ``slowness`` of every fourth peer, whose line is ``slow``."""

    usual: Line
    slow: Line
    slowness: float
    what: str

    def links(self, peers: int) -> Links:
        return Links(self.usual, tuple((number, self.slow) for number in self._slow(peers)))

    def machines(self, peers: int) -> tuple[tuple[int, float], ...]:
        return tuple((number, self.slowness) for number in self._slow(peers)) if self.slowness != 1 else ()

    def _slow(self, peers: int) -> range:
        return range(3, peers, 4) if self.slow != self.usual or self.slowness != 1 else range(0)


_DATACENTRE = Line(up=125e6, down=125e6, latency=0.0005)
_HOME = Line(up=12.5e6, down=12.5e6, latency=0.02)
SETTINGS: Mapping[str, Setting] = {
    "datacentre": Setting(_DATACENTRE, _DATACENTRE, 1.0, "1 Gbit/s, 0.5 ms one way"),
    "home": Setting(_HOME, _HOME, 1.0, "100 Mbit/s, 20 ms one way"),
    "mixed": Setting(
        _HOME, Line(up=2.5e6, down=12.5e6, latency=0.05), 3.0,
        "home, but every fourth peer has 20 Mbit/s up, 50 ms, and trains three times slower",
    ),
}  # fmt: skip


@attrs.frozen
class Method:
    """A strategy with arguments; ``text``: as on the command line."""

    text: str
    strategy: str
    args: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Method:
        """Raises :class:`ConfigError` naming what is wrong."""
        name, _, rest = text.partition(":")
        args: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            try:
                args[key.strip()] = float(value)
            except ValueError:
                equals = ""
            if not equals:
                raise ConfigError(f"{text!r}: {part!r} is no name=value of strategy {name}")
        resolve_strategy(name, args)
        return cls(text, name, tuple(sorted(args.items())))

    def rounds(self, task: Task, steps: int) -> int:
        """How many rounds it takes a peer to train ``steps`` steps."""
        strategy = resolve_strategy(self.strategy, {**task.recommended.get(self.strategy, {}), **dict(self.args)})
        return max(1, steps // strategy.round_steps)


@attrs.frozen
class Block:
    """One task with one split of the data over one kind of lines: the runs of every method, one for each seed."""

    task: str
    alpha: float | None
    setting: str
    runs: Mapping[str, tuple[tuple[FieldPoint, ...], ...]]

    @property
    def split(self) -> str:
        if self.task != "digits":
            return "own files"
        return "IID" if self.alpha is None else f"Dirichlet {self.alpha:g}"

    @property
    def title(self) -> str:
        return f"{self.task}, {self.split}, {self.setting}"

    def target(self, better: bool) -> float:
        """Nine tenths of the way that data parallel training comes (the best method, where it was not run)."""
        ends = {name: _mean([run[-1].metric for run in runs]) for name, runs in self.runs.items()}
        best = ends.get("allreduce", (max if better else min)(ends.values()))
        start = _mean([run[0].metric for runs in self.runs.values() for run in runs])
        return start + 0.9 * (best - start)


@attrs.frozen
class Sweep:
    """Everything that was run."""

    methods: tuple[str, ...]
    peers: int
    steps: int
    seeds: int
    blocks: tuple[Block, ...]
    seconds: float

    def to_json(self) -> str:
        blocks = [
            {
                "task": block.task,
                "split": block.split,
                "lines": block.setting,
                "runs": {
                    name: [
                        [
                            {
                                "round": p.round, "seconds": p.seconds, "bytes_per_peer": p.bytes_per_peer,
                                "loss": p.loss, "metric": p.metric, "local_metric": p.local_metric,
                            }
                            for p in run
                        ]
                        for run in runs
                    ]
                    for name, runs in block.runs.items()
                },
            }
            for block in self.blocks
        ]  # fmt: skip
        whole = {"peers": self.peers, "steps": self.steps, "seeds": self.seeds, "seconds": self.seconds}
        return json.dumps({**whole, "blocks": blocks}, indent=1)


def strategies(options: argparse.Namespace) -> int:
    """Run the sweep that the command line asks for."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else defaults.LAB_WIDTH)
    check_outputs(options.json, options.plot)
    methods = tuple(Method.parse(text) for text in dict.fromkeys(options.methods or METHODS))
    for name in options.lines:
        if name not in SETTINGS:
            raise ConfigError(f"no kind of lines is called {name!r}; there are {', '.join(SETTINGS)}")
    sweep = sweep_over(
        options.task, options.alpha, options.lines, methods, options.peers, options.steps, options.seeds,
        options.processes, console,
    )  # fmt: skip
    for block in sweep.blocks:
        console.print(table(block))
    told = "; ".join(f"{name}: {SETTINGS[name].what}" for name in options.lines)
    console.print(
        f"{sweep.peers} peers, {sweep.steps} steps each; mean and deviation over {sweep.seeds} seeds of the mean model "
        f"on held-out data; MB that a peer sends, virtual seconds. {told}. {sweep.seconds:.0f} s",
        soft_wrap=True,
    )
    leave_behind(console, sweep.to_json, lambda path: plot(sweep, path), options.json, options.plot)
    return 0


def sweep_over(
    tasks: Sequence[str],
    alphas: Sequence[float | None],
    settings: Sequence[str],
    methods: Sequence[Method],
    peers: int,
    steps: int,
    seeds: int,
    processes: int | None = None,
    console: Console | None = None,
) -> Sweep:
    """Every combination, ``processes`` runs at a time. Raises :class:`ConfigError`."""
    seconds = stopwatch()
    plan: list[tuple[str, float | None, str]] = []
    for name in tasks:
        # Only the split of digits can be chosen; elsewhere a peer has files of its own.
        splits: Sequence[float | None] = alphas if name == "digits" else (None,)
        plan += [(name, alpha, setting) for alpha in splits for setting in settings]
    cases: dict[FieldCase, list[tuple[int, str]]] = {}
    for index, (name, alpha, setting) in enumerate(plan):
        for method in methods:
            for seed in range(seeds):
                case = case_of(name, alpha, setting, method, peers, steps, seed)
                cases.setdefault(case, []).append((index, method.text))
    found = run_all(points_of, list(cases), processes, console)
    runs: list[dict[str, list[tuple[FieldPoint, ...]]]] = [{} for _ in plan]
    for case, places in cases.items():
        for index, text in places:
            runs[index].setdefault(text, []).append(found[case])
    blocks = tuple(
        Block(name, alpha, setting, {text: tuple(each) for text, each in runs[index].items()})
        for index, (name, alpha, setting) in enumerate(plan)
    )
    return Sweep(tuple(m.text for m in methods), peers, steps, seeds, blocks, seconds())


def case_of(
    task: str, alpha: float | None, setting: str, method: Method, peers: int, steps: int, seed: int
) -> FieldCase:
    """One run."""
    of = Digits() if task == "digits" else resolve(task, allow_import=False)
    rounds = method.rounds(of, steps)
    return FieldCase(
        strategy=method.strategy,
        args=method.args,
        peers=peers,
        rounds=rounds,
        seed=seed,
        task=task,
        alpha=alpha,
        links=SETTINGS[setting].links(peers),
        slowness=SETTINGS[setting].machines(peers),
        evaluate_every=max(1, rounds // POINTS),
        local=2,
    )


def points_of(case: FieldCase) -> tuple[FieldPoint, ...]:
    """What is kept of a run."""
    return run_field(case).rounds


def table(block: Block) -> Table:
    """Methods by what came of them. The target is nine tenths of the way of data parallel training."""
    better = _better(block.task)
    target = block.target(better)
    shown = Table(title=block.title)
    shown.add_column("method", no_wrap=True)
    for column in ("metric", "loss", "own models", "MB sent", "time", f"MB to {target:.3g}", "time to it"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, runs in block.runs.items():
        ends = [run[-1] for run in runs]
        reached = [point for run in runs if (point := reaching(run, target, better)) is not None]
        share = "" if len(reached) == len(runs) else f" ({len(reached)}/{len(runs)})"
        shown.add_row(
            name,
            _spread([end.metric for end in ends]),
            _spread([end.loss for end in ends if end.loss is not None]),
            f"{_mean([end.local_metric for end in ends]):.3f}",
            f"{_mean([end.bytes_per_peer for end in ends]) / 1e6:.3g}",
            f"{_mean([end.seconds for end in ends]):.1f}",
            f"{_mean([p.bytes_per_peer for p in reached]) / 1e6:.3g}{share}" if reached else "never",
            f"{_mean([p.seconds for p in reached]):.1f}" if reached else "",
        )
    return shown


def reaching(run: Sequence[FieldPoint], target: float, better: bool) -> FieldPoint | None:
    """The first point at which ``target`` is reached; ``better``: a greater metric is."""
    return next((p for p in run if (p.metric >= target if better else p.metric <= target)), None)


def _better(task: str) -> bool:
    return (Digits if task == "digits" else type(resolve(task, allow_import=False))).higher_is_better


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{_mean(values):.3f}" + (f"±{statistics.stdev(values):.3f}" if len(values) > 1 else "")


def plot(sweep: Sweep, path: Path) -> None:
    """A row for each block: held-out loss (the metric, where there is none) against bytes, and against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(sweep.blocks), 2, squeeze=False, layout="constrained", figsize=(12, 3.6 * len(sweep.blocks))
    )
    colours = pyplot.get_cmap("tab20")
    for row, block in zip(grid, sweep.blocks, strict=True):
        for number, (name, runs) in enumerate(block.runs.items()):
            length = min(len(run) for run in runs)
            mean = [
                tuple(_mean([value(run[at]) for run in runs]) for value in (_megabytes, _seconds, _height))
                for at in range(length)
            ]
            for axes, which in ((row[0], 0), (row[1], 1)):
                axes.plot(
                    [point[which] for point in mean], [point[2] for point in mean], label=name,
                    color=colours(number % 20), linestyle="--" if number >= 10 else "-",
                )  # fmt: skip
        for axes, what in ((row[0], "MB that a peer has sent"), (row[1], "virtual seconds")):
            axes.set(xscale="symlog", yscale="log", xlabel=what, ylabel="held-out loss", title=block.title)
            axes.grid(alpha=0.3)
    grid[0][1].legend(fontsize="x-small", ncols=2)
    save_figure(figure, path)


def _megabytes(point: FieldPoint) -> float:
    return point.bytes_per_peer / 1e6


def _seconds(point: FieldPoint) -> float:
    return point.seconds


def _height(point: FieldPoint) -> float:
    return point.metric if point.loss is None else point.loss
