"""Tables and curves of `shoal lab stages`, for the terminal and as they stand in docs/stages.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from .lab_stages import INNER, PAPER, TARGET, Block, Sweep
from .outputs import save_figure
from .stages_field import RATES, TRAINED, WAYS, WHOLE
from .stages_models import PROBLEMS, STAGES

#: Where stages stand, for tables of jumps.
PLACES = {"first": (0,), "inner": tuple(INNER), "last": (STAGES - 1,)}
#: Seconds of a checkpoint that the table of dearer ones has.
DEARER = (3.0, 16.0, 60.0, 300.0)


@attrs.frozen
class Shown:
    """A table. ``parts``: rows of cells, in groups; the first cell of a row is a name."""

    title: str
    columns: tuple[str, ...]
    parts: tuple[tuple[tuple[str, ...], ...], ...]

    def rich(self) -> Table:
        found = Table(title=self.title)
        for number, column in enumerate(self.columns):
            found.add_column(column, justify="right" if number else "left", no_wrap=True)
        for part in self.parts:
            for row in part:
                found.add_row(*row)
            found.add_section()
        return found

    def markdown(self) -> str:
        rows = [self.columns, ("---",) * len(self.columns), *(row for part in self.parts for row in part)]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def report(sweep: Sweep, console: Console) -> None:
    """Tables and remarks."""
    for block in sweep.blocks:
        for shown in tables(block):
            console.print(shown.rich())
    for block in sweep.blocks:
        for remark in block.remarks():
            console.print(remark, soft_wrap=True)


def markdown(sweep: Sweep) -> str:
    """All of it as it stands in docs/stages.md."""
    texts = [shown.markdown() for block in sweep.blocks for shown in tables(block)]
    whats = list(dict.fromkeys(claim.what for block in sweep.blocks for claim in block.claims()))
    rows = []
    for what in whats:
        found = [next((c for c in block.claims() if c.what == what), None) for block in sweep.blocks]
        cells = [
            "" if c is None else f"{c.measured}, {'holds' if c.difference.clear else '**does not hold**'}"
            for c in found
        ]
        rows.append((what, *cells))
    titles = ("claim", *(block.problem for block in sweep.blocks))
    claims = Shown("Mean ± standard error over the seeds; a difference counts from two of them", titles, (tuple(rows),))
    remarks = [f"- {remark}" for block in sweep.blocks for remark in block.remarks()]
    return "\n".join([*texts, claims.markdown(), *remarks, ""])


def tables(block: Block) -> list[Shown]:
    """All that is shown of a problem."""
    return [methods_table(block), jumps_table(block), dearer_table(block)]


def methods_table(block: Block) -> Shown:
    """Methods by rates: hours to the target, and what else came of them."""
    title = f"{block.problem}: {PROBLEMS[block.problem].what}, {block.iterations} iterations"
    columns = ("method", "failures % / h", "losses", "h to target", "final loss", "jump", "paper, h")
    parts = [tuple((f"`{m}`", "", "", *_cells(block, m, 0), "") for m in block.methods if m in WHOLE)]
    for rate in block.rates:
        rows = []
        for method in [method for method in block.methods if method not in WHOLE]:
            losses = [len(outcome.jumps) for outcome in block.found(method, rate)] if method in TRAINED else []
            paper = PAPER.get((method, rate))
            mean = f"{statistics.fmean(losses):.1f}" if losses else ""
            last = "" if paper is None else f"{paper:.0f}"
            rows.append((f"`{method}`", str(rate), mean, *_cells(block, method, rate), last))
        parts.append(tuple(rows))
    return Shown(title, columns, tuple(parts))


def _cells(block: Block, method: str, rate: int) -> tuple[str, str, str]:
    hours = block.hours(method, rate)
    reached = [value for value in hours if math.isfinite(value)]
    share = "" if len(reached) == len(hours) else f" ({len(reached)}/{len(hours)})"
    time = f"{spread(reached, 1)}{share}" if reached else "never"
    return time, spread(block.final(method, rate), 4), spread(block.jumps(method, rate), 4)


def jumps_table(block: Block) -> Shown:
    """By how much the loss jumps by each way, had a stage been lost in runs without failures; with swapping beside."""
    columns = [place if method == "none" else f"{place}, swapped" for method in WHOLE for place in PLACES]
    rows = [
        (way, *(spread(block.probed(method, way, place), 4) for method in WHOLE for place in PLACES.values()))
        for way in WAYS
    ]
    title = f"{block.problem}: jump of the loss right after a recovery, had a stage been lost"
    return Shown(title, ("recovered by", *columns), (tuple(rows),))


def dearer_table(block: Block) -> Shown:
    """Hours until the part TARGET of the iterations is done with checkpoints of other costs, at Young's interval."""
    done, rows = round(TARGET * block.iterations), []
    for seconds in DEARER:
        dearer = attrs.evolve(block, costs=attrs.evolve(block.costs, checkpoint=seconds))
        cells = []
        for rate in block.rates:
            clocks = [dearer.clock("checkpoint:tuned", rate, seed, done)[done] for seed in range(block.seeds)]
            cells.append(f"{spread(clocks, 1)} ({dearer.costs.tuned(RATES[rate])})")
        rows.append((f"{seconds:g}", *cells))
    title = (
        f"{block.problem}: hours of nine tenths of the iterations with checkpoints of other costs, at the interval of "
        "least cost (in brackets, in iterations)"
    )
    return Shown(title, ("seconds of a checkpoint", *(f"{rate} %" for rate in block.rates)), (tuple(rows),))


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
