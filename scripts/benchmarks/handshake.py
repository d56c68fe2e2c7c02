"""``bench.py handshake``: new connections, each with one small call, against other systems, in turns."""

from __future__ import annotations

import argparse

from .pairs import Pair, meet, ratio, turns
from .processes import children
from .report import Row, machine, show, write

SYSTEMS = ("shoal", "tcp", "tls", "libp2p", "hivemind")
#: These keep one connection per pair of peers: no second handshake beside the first.
ONE_AT_A_TIME = ("libp2p", "hivemind")


async def run(options: argparse.Namespace) -> None:
    async with children() as group:
        pairs, missing = await meet(group, SYSTEMS, options)
        rows: list[Row] = []
        for what, in_flight in (("returning", 1), ("returning", options.at_once), ("strangers", 1)):
            able = [
                pair
                for pair in pairs
                if (in_flight == 1 or pair.system not in ONE_AT_A_TIME)
                and (what == "returning" or pair.system == "shoal")
            ]
            case = {pair.system: _row(pair, what, in_flight) for pair in able}

            async def once(
                pair: Pair, counts: bool, case: dict[str, Row] = case, what: str = what, in_flight: int = in_flight
            ) -> None:
                answer = await pair.client.ask("handshakes", seconds=options.time, in_flight=in_flight, what=what)
                if counts:
                    case[pair.system].runs.append(answer["count"] / answer["seconds"])

            await turns(able, once, options, 1 / 3)
            for row in case.values():
                row.extra |= machine()
            rows += case.values()
    _table(rows)
    for line in missing:
        print(line)
    write(rows, options.json)


def _row(pair: Pair, what: str, in_flight: int) -> Row:
    case = {"what": what, "in_flight": in_flight}
    return Row("handshake", case, pair.name, "per_s", extra={"cipher": pair.cipher})


def _table(rows: list[Row]) -> None:
    ours = {tuple(row.case.values()): row.median for row in rows if row.system == "shoal"}
    lines = [
        (
            f"{row.case['what']}, {row.case['in_flight']} at once",
            row.system,
            *(f"{value:.0f}" for value in (row.median, min(row.runs), max(row.runs))),
            str(len(row.runs)),
            "" if row.system == "shoal" or not ours else ratio(ours[tuple(row.case.values())], row.median),
        )
        for row in rows
    ]
    show(
        "connections with handshake and one small exchange, per second",
        ("case", "system", "median", "min", "max", "runs", "shoal ÷ it"),
        lines,
        [
            f"machine: {machine()['cores']} cores, load {machine()['load']}",
            "returning: the same two peers again and again; strangers: a new identity each time.",
            "shoal: both identities proved, a call, a goodbye; TLS: only the server's certificate is looked at.",
        ],
    )
