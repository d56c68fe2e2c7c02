"""``bench.py rpc``: small calls, one at a time and many in flight, against other systems, in turns."""

from __future__ import annotations

import argparse
import statistics

from .pairs import Pair, meet, ratio, turns
from .processes import children
from .report import Row, machine, show, write
from .systems.base import SMALL

SYSTEMS = ("shoal", "tcp", "grpc", "hivemind", "libp2p")


async def run(options: argparse.Namespace) -> None:
    async with children() as group:
        pairs, missing = await meet(group, SYSTEMS, options)
        rows: list[Row] = []
        for in_flight in options.in_flight:
            case = {pair.system: _row(pair, in_flight) for pair in pairs}
            times: dict[str, list[float]] = {pair.system: [] for pair in pairs}

            async def once(
                pair: Pair,
                counts: bool,
                case: dict[str, Row] = case,
                times: dict[str, list[float]] = times,
                in_flight: int = in_flight,
            ) -> None:
                answer = await pair.client.ask("calls", seconds=options.time, in_flight=in_flight)
                if counts:
                    case[pair.system].runs.append(len(answer["times"]) / answer["seconds"])
                    times[pair.system] += answer["times"]

            await turns(pairs, once, options, 1 / len(options.in_flight))
            for system, row in case.items():
                cuts = statistics.quantiles(times[system], n=100)
                row.extra |= {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, **machine()}
            rows += case.values()
    _table(rows)
    for line in missing:
        print(line)
    write(rows, options.json)


def _row(pair: Pair, in_flight: int) -> Row:
    case = {"what": "calls", "bytes": SMALL, "in_flight": in_flight}
    return Row("rpc", case, pair.name, "per_s", extra={"cipher": pair.cipher})


def _table(rows: list[Row]) -> None:
    ours = {row.case["in_flight"]: row.median for row in rows if row.system == "shoal"}
    lines = [
        (
            f"{row.case['in_flight']} in flight",
            row.system,
            row.extra["cipher"],
            *(f"{value:.0f}" for value in (row.median, min(row.runs), max(row.runs))),
            str(len(row.runs)),
            "" if row.system == "shoal" or not ours else ratio(ours[row.case["in_flight"]], row.median),
            f"{row.extra['p50_ms']:.3f}",
            f"{row.extra['p99_ms']:.3f}",
        )
        for row in rows
    ]
    show(
        f"calls of {SMALL} bytes and as much back, per second",
        ("case", "system", "cipher", "median", "min", "max", "runs", "shoal ÷ it", "p50 ms", "p99 ms"),
        lines,
        [
            f"machine: {machine()['cores']} cores, load {machine()['load']}",
            "trio TCP: an echo without names, types, deadlines or refusals; a connection for each call in flight.",
        ],
    )
