"""`shoal doctor`: looks at this machine, its network and a peer; says what is wrong, how it knows, and what to do."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

import attrs
import trio

from ..transport.address import Address
from ..transport.host import RealHost
from .boundary import first_error
from .datadir import DataDir
from .doctor_checks import Finding, Level, judge, worst
from .doctor_gather import Wishes, gather
from .listening import parse_remote
from .terminal import configure_logging, read_line
from .ticket import PREFIX, Ticket

if TYPE_CHECKING:
    from .doctor_checks import Facts

#: Exit codes by the worst finding, also in `shoal doctor --help`.
EXIT: dict[Level, int] = {"skipped": 0, "ok": 0, "warn": 3, "fail": 1}
_MARKS: dict[Level, tuple[str, str]] = {
    "ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red"), "skipped": ("-", "dim"),
}  # fmt: skip


def doctor(options: argparse.Namespace) -> int:
    """Run the checks; returns the exit code."""
    configure_logging(options.log_level)
    data = DataDir(options.data_dir)
    target = _target(options.target)
    psk = target.psk if isinstance(target, Ticket) else data.swarm_key()
    wishes = Wishes(target, psk, tuple(options.host), not options.no_port_mapping, not options.no_torch)

    async def main() -> Facts:
        return await gather(RealHost(), data, wishes)

    try:
        facts = trio.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    findings = judge(facts)
    level = worst(findings)
    if options.json:
        report = {"worst": level, "findings": [attrs.asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(findings, everything=options.verbose)
    return EXIT[level]


def _target(text: str | None) -> Ticket | Address | None:
    """Raises :class:`ConfigError`."""
    if text == "-":
        text = read_line().strip()
    if text is None:
        return None
    return Ticket.parse(text) if text.lower().startswith(PREFIX[:-1]) else parse_remote(text)


def show(findings: tuple[Finding, ...], *, everything: bool = False) -> None:
    """Findings by group, one line each; evidence and advice below those that are not fine."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    width = max(len(finding.check) for finding in findings)
    for group in dict.fromkeys(finding.group for finding in findings):
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(width=4)
        table.add_column(width=width)
        table.add_column(ratio=1, overflow="fold")
        for finding in (f for f in findings if f.group == group):
            mark, style = _MARKS[finding.level]
            quiet = "dim" if finding.level == "skipped" else ""
            table.add_row("", Text(mark, style), Text(finding.check, quiet), Text(finding.finding, quiet))
            if finding.evidence and (everything or finding.level != "skipped"):
                table.add_row("", "", "", Text(finding.evidence, "dim"))
            if finding.advice:
                table.add_row("", "", "", Text(f"→ {finding.advice}", "cyan"))
        console.print(Text(group, style="bold"))
        console.print(table)
    counted = {level: sum(f.level == level for f in findings) for level in _MARKS}
    console.print(f"{counted['ok']} ok, {counted['warn']} warnings, {counted['fail']} failures")
