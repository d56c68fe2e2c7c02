"""``bench.py idle``: what an idle link costs a process in memory, against other systems, fresh processes each run."""

from __future__ import annotations

import argparse

from .pairs import Pair, meet
from .processes import children
from .report import Row, machine, show, write

SYSTEMS = ("shoal", "tcp", "tls", "libp2p")
#: Links before the first measurement: what the first ones load and cache is no cost of a link.
WARM = 10


async def run(options: argparse.Namespace) -> None:
    rows: dict[str, Row] = {}
    missing: list[str] = []
    for _ in range(options.runs):
        async with children() as group:
            pairs, missing = await meet(group, SYSTEMS, options)
            for pair in pairs:
                row = rows.setdefault(pair.system, _row(pair, options.links))
                row.runs.append(await _once(pair, options.links))
    for row in rows.values():
        row.extra |= machine()
    _table(list(rows.values()), options.links)
    for line in missing:
        print(line)
    write(list(rows.values()), options.json)


async def _once(pair: Pair, links: int) -> float:
    await pair.client.ask("hold", count=WARM)
    before = (await pair.server.ask("memory"))["kib"]
    await pair.client.ask("hold", count=links)
    return ((await pair.server.ask("memory"))["kib"] - before) / links


def _row(pair: Pair, links: int) -> Row:
    return Row("idle", {"what": "memory", "links": links}, pair.name, "kib", extra={"cipher": pair.cipher})


def _table(rows: list[Row], links: int) -> None:
    show(
        f"memory of a server with {links} idle links, KiB per link",
        ("system", "cipher", "median", "min", "max", "runs"),
        [
            (
                row.system,
                row.extra["cipher"],
                *(f"{value:.1f}" for value in (row.median, min(row.runs), max(row.runs))),
                str(len(row.runs)),
            )
            for row in rows
        ],
        ["anonymous resident memory of the accepting process, grown ÷ links; buffers in the kernel are not in it."],
    )
