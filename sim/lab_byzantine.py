"""`shoal lab byzantine`: every rule under every attack, over several seeds, as a table, a verdict and a heat-map."""

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

from ..learning.aggregate import resolve as resolve_rule
from ..transport.errors import ConfigError
from . import defaults
from .attacks import ATTACKS
from .attacks import resolve as resolve_attack
from .byzantine_field import Case, Field, Outcome, run
from .outputs import check_outputs, leave_behind, save_figure, tell
from .sweep import run_all, stopwatch

#: Rules of a sweep, without f. The mean, and the mean of vectors of equal length, are what all others must beat.
RULES = (
    *("mean", "normalise+mean", "normalise:to=median+mean", "descent+mean", "median", "trimmed_mean", "meamed", "flag"),
    *("krum", "multikrum", "geometric_median", "centered_clipping", "mda", "monna", "caf", "smea"),
    *("nnm+trimmed_mean", "nnm+geometric_median", "arc+multikrum"),
)
#: Attacks made against one of our own rules: what they do is told, and is no part of what is required.
AIMED = ("sleeper",)
#: No attack at all, in tables.
NONE = "none"
#: Points below the mean without attackers that a rule may lose under an attack, and without one.
UNDER_ATTACK, UNATTACKED = 2.0, 1.0
#: Points by which Flag must beat the mean under attacks by length, as far as such attacks were made.
FLAG_GAIN, BY_LENGTH = 50.0, ("gaussian", "reverse")


@attrs.frozen
class Cell:
    """Accuracies of one rule under one attack, one for each seed, in points (0 … 100)."""

    values: tuple[float, ...]
    quality: tuple[float, float] | None
    skipped: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f}±{self.spread:.1f}"


@attrs.frozen
class Block:
    """All rules and attacks with one number of liars in one field; ``impossible``: rules that cannot stand so many."""

    field: Field
    liars: int
    cells: Mapping[tuple[str, str], Cell]
    impossible: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.liars} liars of {self.field.peers}, {self.field.label}"

    @property
    def reference(self) -> float:
        """The mean without attackers."""
        return self.cells["mean", NONE].mean

    def drop(self, rule: str, attack: str) -> float:
        """Points below the mean without attackers."""
        return self.reference - self.cells[rule, attack].mean

    def worst(self, rule: str) -> tuple[float, str]:
        """The largest drop under an attack of the literature, and under which."""
        found = [attack for known, attack in self.cells if known == rule]
        judged = [attack for attack in found if attack not in AIMED] or found
        return max((self.drop(rule, attack), attack) for attack in judged)


@attrs.frozen
class Sweep:
    """Everything that was run. ``rules`` and ``attacks`` in the order of the tables."""

    rules: tuple[str, ...]
    attacks: tuple[str, ...]
    seeds: int
    blocks: tuple[Block, ...]
    seconds: float

    def recommended(self) -> tuple[str, float, str]:
        """The rule with the smallest drop in its worst case: (rule, points, where)."""
        found = []
        for rule in self.rules:
            if all(rule not in block.impossible for block in self.blocks):
                drop, attack, title = max((*block.worst(rule), block.title) for block in self.blocks)
                found.append((drop, rule, f"{attack}, {title}"))
        drop, rule, where = min(found)
        return rule, drop, where

    def verdicts(self) -> list[tuple[bool, str]]:
        """What is required of the rules, and whether it holds here."""
        found = []
        for block in self.blocks:
            live = [rule for rule in self.rules if rule not in block.impossible]
            for attack in [attack for attack in self.attacks if attack not in AIMED]:
                drop, rule = min((block.drop(rule, attack), rule) for rule in live)
                if drop > UNDER_ATTACK:
                    text = f"{block.title}: under {attack} the best rule, {rule}, loses {drop:.1f} points"
                    found.append((False, text))
            costly = [f"{rule} {block.drop(rule, NONE):.1f}" for rule in live if block.drop(rule, NONE) > UNATTACKED]
            text = f"{block.title}: without attackers no rule costs more than {UNATTACKED:g} point"
            found.append((not costly, text + (f", but {', '.join(costly)}" if costly else "")))
            if "flag" in live:
                for attack in [attack for attack in BY_LENGTH if attack in self.attacks]:
                    gain = block.cells["flag", attack].mean - block.cells["mean", attack].mean
                    found.append(
                        (gain >= FLAG_GAIN, f"{block.title}: flag beats the mean by {gain:.1f} under {attack}")
                    )
        rule, drop, where = self.recommended()
        text = f"{rule} loses at most {drop:.1f} points under any attack ({where})"
        return [(drop <= UNDER_ATTACK, text), *found]

    def distances(self) -> list[str]:
        """How Flag stands to the simplest baseline and to Multi-Krum, as it is."""
        lines = []
        for block in self.blocks:
            for other in ("normalise+mean", "multikrum"):
                if "flag" in block.impossible or other in block.impossible or other not in self.rules:
                    continue
                if "flag" not in self.rules:
                    continue
                gaps = {a: block.cells["flag", a].mean - block.cells[other, a].mean for a in (NONE, *self.attacks)}
                low, high = min(gaps, key=lambda a: gaps[a]), max(gaps, key=lambda a: gaps[a])
                lines.append(
                    f"{block.title}: flag against {other}: {statistics.fmean(gaps.values()):+.1f} points in the mean, "
                    f"{gaps[low]:+.1f} under {low}, {gaps[high]:+.1f} under {high}"
                )
            for attack in [attack for attack in self.attacks if attack in AIMED]:
                live = [rule for rule in self.rules if rule not in block.impossible]
                least, best = min((block.drop(rule, attack), rule) for rule in live)
                remember = [rule for rule in live if resolve_rule(with_liars(rule, block.liars)).memory is not None]
                told = ", ".join(f"{rule} {block.drop(rule, attack):.1f}" for rule in remember) or "none here"
                lines.append(
                    f"{block.title}: under {attack}, made against rules with a memory, {best} loses {least:.1f} "
                    f"points; rules with one: {told}"
                )
        return lines

    def to_json(self) -> str:
        blocks = [
            {
                "field": attrs.asdict(block.field),
                "liars": block.liars,
                "impossible": dict(block.impossible),
                "cells": [
                    {"rule": rule, "attack": attack, **attrs.asdict(cell)}
                    for (rule, attack), cell in block.cells.items()
                ],
            }
            for block in self.blocks
        ]
        rule, drop, where = self.recommended()
        verdicts = [{"holds": holds, "what": text} for holds, text in self.verdicts()]
        best = {"rule": rule, "drop": drop, "where": where}
        whole = {"seeds": self.seeds, "seconds": self.seconds, "recommended": best, "verdicts": verdicts}
        return json.dumps({**whole, "distances": self.distances(), "blocks": blocks}, indent=1)


def byzantine(options: argparse.Namespace) -> int:
    """Run the sweep that the command line asks for; 0 when all that is required of the rules holds."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else defaults.LAB_WIDTH)
    check_outputs(options.json, options.plot)
    rules = tuple(dict.fromkeys(("mean", *(options.rules or RULES))))
    attacks = tuple(dict.fromkeys(options.attacks or ATTACKS))
    for attack in attacks:
        resolve_attack(attack)
    fields = [
        Field(
            options.peers, options.steps, options.batch, options.rate, options.hidden, alpha, options.momentum,
            options.loss, options.noise, options.shift,
        )
        for alpha in options.alpha
    ]  # fmt: skip
    sweep = sweep_over(fields, options.liars, rules, attacks, options.seeds, options.processes, console)
    for block in sweep.blocks:
        for part in tables(sweep, block, console.width):
            console.print(part)
        for rule, why in block.impossible.items():
            console.print(f"[dim]{rule}: {why}[/]")
    for line in sweep.distances():
        console.print(line, soft_wrap=True)
    code = tell(console, sweep.verdicts())
    console.print(
        f"{sweep.seconds:.0f} s; accuracy on held-out digits in %, mean and deviation over {sweep.seeds} seeds"
    )
    leave_behind(console, sweep.to_json, lambda path: plot(sweep, path), options.json, options.plot)
    return code


def sweep_over(
    fields: Sequence[Field],
    liars: Sequence[int],
    rules: tuple[str, ...],
    attacks: tuple[str, ...],
    seeds: int,
    processes: int | None = None,
    console: Console | None = None,
) -> Sweep:
    """Every combination, ``processes`` runs at a time (default: a core each). Raises :class:`ConfigError`."""
    seconds = stopwatch()
    cases: dict[Case, list[tuple[int, str, str]]] = {}
    impossible: list[dict[str, str]] = []
    plan = [(field, count) for field in fields for count in liars]
    for index, (field, count) in enumerate(plan):
        if not 0 < count < field.peers / 2:
            raise ConfigError(f"{count} liars of {field.peers} peers: there must be one, and fewer than half")
        impossible.append({})
        for rule in rules:
            try:
                text = with_liars(rule, count)
                resolve_rule(text).check(field.peers)
            except ConfigError as error:
                if not _needs_more(rule, count):
                    raise
                impossible[-1][rule] = str(error)
                continue
            for attack in (NONE, *attacks):
                for seed in range(seeds):
                    active = 0 if attack == NONE else count
                    case = Case(field, text, "" if attack == NONE else attack, active, seed)
                    # Without liars a run is the same however many there might be.
                    cases.setdefault(case, []).append((index, rule, attack))
    outcomes = run_all(run, list(cases), processes, console)
    gathered: list[dict[tuple[str, str], list[Outcome]]] = [{} for _ in plan]
    for case, places in cases.items():
        for index, rule, attack in places:
            gathered[index].setdefault((rule, attack), []).append(outcomes[case])
    blocks = tuple(
        Block(field, count, {key: _cell(found) for key, found in gathered[index].items()}, impossible[index])
        for index, (field, count) in enumerate(plan)
    )
    return Sweep(rules, attacks, seeds, blocks, seconds())


def with_liars(rule: str, liars: int) -> str:
    """``rule`` told to tolerate so many, if it needs to be told and is not."""
    try:
        resolve_rule(rule)
    except ConfigError as error:
        if "needs f" not in str(error):
            raise
        return f"{rule}{',' if ':' in rule.rpartition('+')[2] else ':'}f={liars}"
    return rule


def _needs_more(rule: str, liars: int) -> bool:
    """Whether the text is right, and only the peers are too few."""
    try:
        resolve_rule(with_liars(rule, liars))
    except ConfigError:
        return False
    return True


def _cell(outcomes: Sequence[Outcome]) -> Cell:
    qualities = [outcome.quality for outcome in outcomes if outcome.quality is not None]
    quality = None
    if qualities:
        quality = statistics.fmean(q[0] for q in qualities), statistics.fmean(q[1] for q in qualities)
    return Cell(tuple(100 * o.accuracy for o in outcomes), quality, sum(o.skipped for o in outcomes))


def tables(sweep: Sweep, block: Block, width: int) -> list[Table]:
    """Rules by attacks, as many tables as a terminal of ``width`` columns needs to hold all attacks.

    Green within the points that a rule may lose, red where a fifth of the digits are lost.
    """
    rules = [rule for rule in sweep.rules if rule not in block.impossible]
    columns = [NONE, *sweep.attacks, "worst"]
    each = max(len("100.0±10.0"), *(len(name) for name in columns)) + 3
    fit = max(1, (width - max(len(rule) for rule in rules) - 4) // each)
    found = []
    for first in range(0, len(columns), fit):
        shown = Table(title=block.title if not first else f"{block.title}, continued")
        shown.add_column("rule", no_wrap=True)
        for name in columns[first : first + fit]:
            shown.add_column(name, justify="right", no_wrap=True)
        for rule in rules:
            shown.add_row(rule, *(_shown(block, rule, name) for name in columns[first : first + fit]))
        found.append(shown)
    return found


def _shown(block: Block, rule: str, column: str) -> str:
    if column == "worst":
        return f"{-block.worst(rule)[0]:+.1f}"
    drop = block.drop(rule, column)
    colour = "green" if drop <= UNDER_ATTACK else "red" if drop > 20.0 else "yellow"
    return f"[{colour}]{block.cells[rule, column]}[/]"


def plot(sweep: Sweep, path: Path) -> None:
    """A heat-map for each block: accuracy by rule and attack."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attacks = (NONE, *sweep.attacks)
    figure, grid = pyplot.subplots(
        len(sweep.blocks), 1, squeeze=False, layout="constrained",
        figsize=(2.5 + 0.75 * len(attacks), (1.4 + 0.34 * len(sweep.rules)) * len(sweep.blocks)),
    )  # fmt: skip
    for axes, block in zip((row[0] for row in grid), sweep.blocks, strict=True):
        rules = [rule for rule in sweep.rules if rule not in block.impossible]
        values = [[block.cells[rule, attack].mean for attack in attacks] for rule in rules]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="x-small")
        axes.set_xticks(range(len(attacks)), attacks, rotation=30, ha="right", fontsize="small")
        axes.set_yticks(range(len(rules)), rules, fontsize="small")
        axes.set_title(f"{block.title}: accuracy in %, {sweep.seeds} seeds", fontsize="medium")
        figure.colorbar(image, ax=axes)
    save_figure(figure, path)
