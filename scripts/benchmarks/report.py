"""Rows of results: medians, as JSON for machines and as tables for people."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.table import Table

PACKAGES = ("shoal", "torch", "trio", "pynacl", "numpy", "msgpack", "cattrs")


def versions() -> dict[str, str]:
    """What was measured with."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@attrs.define
class Row:
    """All runs of one system in one case. ``unit``: ``median_s``, ``per_s`` or ``mb_s`` (10⁶ bytes per second)."""

    bench: str
    case: dict[str, Any]
    system: str
    unit: str
    runs: list[float] = attrs.field(factory=list)
    extra: dict[str, Any] = attrs.field(factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "case": self.case,
            "system": self.system,
            self.unit: self.median,
            "min": min(self.runs),
            "max": max(self.runs),
            "runs": len(self.runs),
            "versions": versions(),
            **self.extra,
        }


def machine() -> dict[str, Any]:
    """How busy the machine was: the figures of a shared one cannot be judged without."""
    return {"cores": os.cpu_count(), "load": [round(value, 2) for value in os.getloadavg()]}


def write(rows: Sequence[Row], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
        print(f"{len(rows)} rows written to {file}")


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """A table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(width=None if os.isatty(1) else 140)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
