"""What the matrix of the NAT lab says: what each pair must reach, what it did, as table, JSON and picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import attrs
from rich.table import Table
from rich.text import Text

from .netlab_kinds import KINDS, Kind
from .outputs import save_figure

#: Not a kind, but an answerer: a second host behind the dialler's own NAT.
NEIGHBOUR = "neighbour"

#: Best first, with the shade of each in the picture.
_SHADES = {
    "direct": "#a6dba0", "reversal": "#c7e9c0", "punch": "#9ecae1", "webrtc": "#fff2ae", "relay": "#fdcc8a",
    "none": "#f4a6a6",
}  # fmt: skip
WAYS = tuple(_SHADES)
_COLOURS = {"direct": "green", "reversal": "green", "punch": "cyan", "webrtc": "yellow", "relay": "magenta"}


@attrs.frozen
class Requirement:
    """Ways of which a pair's link must have one in the end, and why."""

    ways: tuple[str, ...]
    reason: str

    @property
    def enough(self) -> tuple[str, ...]:
        """Ways after which nothing better can come: kernel TCP from end to end."""
        return tuple(way for way in self.ways if way in ("direct", "reversal", "punch"))


def required(dialler: str, answerer: str) -> Requirement:
    """What the link of two kinds of hosts must reach. Kinds are those of :data:`KINDS`."""
    if answerer == NEIGHBOUR:
        return Requirement(("direct",), "they are on one LAN")
    one, other = KINDS[dialler], KINDS[answerer]
    end_to_end = ("direct", "reversal")
    for there, here, sentence in (
        (other, one, "{there} can be dialled by {family}, and {here} has it"),
        (one, other, "{there} can be dialled by {family}, so {here} is asked to"),
    ):
        for family in ("IPv4", "IPv6"):
            if _reachable(there, family) and _has(here, family):
                return Requirement(
                    end_to_end, sentence.format(there=there.name, here=here.name, family=family).replace("_", " ")
                )
    both = [family for family in ("IPv4", "IPv6") if _has(one, family) and _has(other, family)]
    if not both:
        return Requirement(("relay",), "they share no IP version, and the relay has both")
    if "IPv6" in both:
        return Requirement(("direct", "reversal", "punch"), "both have public IPv6 behind stateful firewalls")
    if one.fresh_ports or other.fresh_ports:
        # A NAT that maps freshly cannot be punched from a cone that filters by address and port, as Linux does.
        return Requirement(("relay", "webrtc"), "nobody knows the port that the symmetric NAT will open next")
    return Requirement(("punch", *end_to_end), "both NATs keep the port, so both can open towards each other")


def _has(kind: Kind, family: str) -> bool:
    return kind.four if family == "IPv4" else kind.six


def _reachable(kind: Kind, family: str) -> bool:
    """Whether strangers can dial it, by its router's port mapping if need be."""
    return _has(kind, family) and (not kind.nat or (kind.upnp and family == "IPv4"))


@attrs.frozen
class PairResult:
    """How ``dialler`` fared with ``answerer``. Seconds count from the dialler's first move; None: it never came.

    ``first``, ``first_way``: when the first byte came back, and how. ``best``, ``way``: when the last change of the way
    was, and to which. ``rate``: bytes per second over the final way. ``error``: why there is no link. ``earlier``: what
    it got at a first try that was not enough; this is the second then.
    """

    dialler: str
    answerer: str
    first: float | None = None
    first_way: str = "none"
    best: float | None = None
    way: str = "none"
    changes: tuple[tuple[float, str], ...] = ()
    rate: float | None = None
    error: str = ""
    earlier: str = ""

    @property
    def requirement(self) -> Requirement:
        return required(self.dialler, self.answerer)

    @property
    def ok(self) -> bool:
        return self.way in self.requirement.ways

    def complaint(self) -> str:
        needed = self.requirement
        before = f", and at the first try {self.earlier}" if self.earlier else ""
        ways = " or ".join(needed.ways)
        return f"{self.dialler} → {self.answerer} has {self.got()}{before}; required {ways}: {needed.reason}"

    def second_try(self) -> str:
        return f"{self.dialler} → {self.answerer} has {self.got()}, at the first try {self.earlier}"

    def got(self) -> str:
        return self.way if self.first is not None else f"no link ({_short(self.error)})"


@attrs.frozen
class Matrix:
    """All pairs of ``kinds``, each kind as dialler (row) and as answerer (column), and neighbours behind one NAT.

    ``skipped``: kind → why.
    """

    kinds: tuple[str, ...]
    results: tuple[PairResult, ...]
    seconds: float
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.results)

    @property
    def answerers(self) -> tuple[str, ...]:
        found = any(result.answerer == NEIGHBOUR for result in self.results)
        return (*self.kinds, NEIGHBOUR) if found else self.kinds

    def result(self, dialler: str, answerer: str) -> PairResult | None:
        for result in self.results:
            if (result.dialler, result.answerer) == (dialler, answerer):
                return result
        return None

    def table(self) -> Table:
        """For a terminal: way used, milliseconds to the first byte and to the best way."""
        table = Table(
            title="way in the end, ms to the first byte → ms to that way",
            title_style="",
            show_lines=True,
            padding=(0, 1),
        )
        table.add_column("dials ↓  answers →", style="bold", no_wrap=True)
        for answerer in self.answerers:
            table.add_column(answerer, justify="center")
        for dialler in self.kinds:
            table.add_row(dialler, *(_cell(self.result(dialler, answerer)) for answerer in self.answerers))
        return table

    def summary(self) -> list[str]:
        """A line per way that links have in the end: how many, and medians."""
        lines = []
        for way in WAYS:
            found = [result for result in self.results if result.way == way and result.first is not None]
            if found:
                first = statistics.median(result.first for result in found if result.first is not None)
                best = statistics.median(result.best for result in found if result.best is not None)
                rates = [result.rate for result in found if result.rate is not None]
                rate = f"{statistics.median(rates) / 1e6:.0f} MB/s" if rates else "no rate"
                times = f"first byte after {first * 1e3:.0f} ms, this way after {best * 1e3:.0f} ms"
                lines.append(f"{way:<9} {len(found):3} pairs: {times}, {rate} (medians)")
        return lines

    def to_json(self) -> str:
        pairs = [
            {
                **attrs.asdict(result),
                "required": list(result.requirement.ways),
                "because": result.requirement.reason,
                "ok": result.ok,
            }
            for result in self.results
        ]
        return json.dumps(
            {
                "kinds": {name: KINDS[name].what for name in self.kinds},
                "seconds": self.seconds,
                "skipped": dict(self.skipped),
                "notes": list(self.notes),
                "ok": self.ok,
                "pairs": pairs,
            },
            indent=1,
        )

    def plot(self, path: Path) -> None:
        """A heat map: shade by way, milliseconds written in. Raises :class:`ConfigError` naming the file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap

        rows, columns = self.kinds, self.answerers
        shades = [[float("nan")] * len(columns) for _ in rows]
        size = 2.2 + 1.25 * len(columns), 1.6 + 0.8 * len(rows)
        figure, axis = pyplot.subplots(figsize=size, layout="constrained")
        for row, dialler in enumerate(rows):
            for column, answerer in enumerate(columns):
                result = self.result(dialler, answerer)
                if result is None:
                    continue
                shades[row][column] = WAYS.index(result.way)
                mark = "" if result.ok else "\n(not as required)"
                axis.text(column, row, f"{result.way}\n{_times(result)}{mark}", ha="center", va="center", fontsize=7)
        axis.imshow(shades, cmap=ListedColormap(list(_SHADES.values())), vmin=-0.5, vmax=len(WAYS) - 0.5)
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlabel("answers")
        axis.set_ylabel("dials")
        axis.set_title("NAT lab: way in the end, ms to the first byte → ms to that way", fontsize=10)
        save_figure(figure, path)


def _times(result: PairResult) -> str:
    if result.first is None or result.best is None:
        return "–"
    first = f"{result.first * 1e3:.0f}"
    return first if result.way == result.first_way else f"{first} → {result.best * 1e3:.0f}"


def _cell(result: PairResult | None) -> Text:
    if result is None:
        return Text("")
    colour = _COLOURS.get(result.way, "red") if result.ok else "bold red"
    return Text.assemble((result.way if result.ok else f"{result.way}!", colour), "\n", (_times(result), "dim"))


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}…"


def legend(kinds: Sequence[str]) -> str:
    return "\n".join(f"  {name:<12} {KINDS[name].what}" for name in kinds)
