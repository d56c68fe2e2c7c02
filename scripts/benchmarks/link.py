"""``bench.py link``: bulk messages over one link, and small calls beside them, against other systems, in turns."""

from __future__ import annotations

import argparse
import statistics

from .costs import measure
from .pairs import NAMES, Pair, loopback, meet, ratio, turns
from .processes import children
from .report import Row, machine, show, write
from .systems.base import MESSAGE

SYSTEMS = ("tcp", "shoal", "tls", "hivemind", "grpc", "libp2p")
#: These carry streams and calls on one connection; plain TCP and TLS take one more, to compare with.
LOADED = ("shoal", "tcp", "tls", "grpc", "libp2p", "hivemind")


async def run(options: argparse.Namespace) -> None:
    costs = measure()
    async with children() as group:
        pairs, missing = await meet(group, SYSTEMS, options)
        bulk = {pair.system: _row(pair, "messages", "mb_s") for pair in pairs}
        wire: dict[str, list[float]] = {pair.system: [] for pair in pairs}
        sizes: dict[str, int] = {}

        async def messages(pair: Pair, counts: bool) -> None:
            count = sizes.get(pair.system, 16)
            before = loopback()
            seconds = (await pair.client.ask("messages", count=count))["seconds"]
            after = loopback()
            rate = count * MESSAGE / seconds
            if counts:
                bulk[pair.system].runs.append(rate / 1e6)
                if before is not None and after is not None:
                    wire[pair.system].append((after - before) / (count * MESSAGE))
            else:
                sizes[pair.system] = max(16, int(rate * options.time / MESSAGE))

        await turns(pairs, messages, options, 0.5)
        beside = {pair.system: _row(pair, "calls beside a full stream", "p99_s") for pair in pairs}

        async def loaded(pair: Pair, counts: bool) -> None:
            times = sorted((await pair.client.ask("loaded", seconds=options.time, in_flight=1))["times"])
            if counts:
                beside[pair.system].runs.append(times[int(len(times) * 0.99)])
                beside[pair.system].extra.setdefault("calls", []).append(len(times))
                beside[pair.system].extra.setdefault("p50_s", []).append(statistics.median(times))

        if "load" in options.what:
            await turns(pairs, loaded, options, 0.5)
    for pair in pairs:
        bulk[pair.system].extra |= machine()
        # Whatever else goes over the interface only adds: the least of all runs is nearest to ours alone.
        if wire[pair.system]:
            bulk[pair.system].extra["loopback_per_byte"] = round(min(wire[pair.system]), 4)
    if "shoal" in bulk:
        bulk["shoal"].extra["floor_mb_s"] = MESSAGE / costs.link_floor(MESSAGE) / 1e6
    rows = [*bulk.values(), *(row for row in beside.values() if row.runs)]
    _tables(bulk, beside)
    for line in missing:
        print(line)
    write(rows, options.json)


def _row(pair: Pair, what: str, unit: str) -> Row:
    return Row("link", {"what": what, "bytes": MESSAGE}, pair.name, unit, extra={"cipher": pair.cipher})


def _tables(bulk: dict[str, Row], beside: dict[str, Row]) -> None:
    tcp = bulk["tcp"].median if "tcp" in bulk else None
    lines = [
        (
            row.system,
            row.extra["cipher"],
            *(f"{value:.0f}" for value in (row.median, min(row.runs), max(row.runs))),
            str(len(row.runs)),
            ratio(row.median, tcp),
            f"{row.extra['loopback_per_byte']:.3f}" if "loopback_per_byte" in row.extra else "",
        )
        for row in bulk.values()
    ]
    notes = [
        f"machine: {machine()['cores']} cores, load {machine()['load']}",
        "lo/byte: bytes on the loopback interface, headers and answers included, for each byte of message; the least "
        "of all runs, as other programs on this machine may use that interface too.",
    ]
    if "shoal" in bulk:
        notes.append(
            f"floor of shoal on this machine (TCP, sealing, opening): {bulk['shoal'].extra['floor_mb_s']:.0f} MB/s"
        )
    title = "messages of 1 MiB, one after the other on one stream, MB/s"
    show(title, ("system", "cipher", "median", "min", "max", "runs", f"÷ {NAMES['tcp']}", "lo/byte"), lines, notes)
    lines = [
        (
            row.system,
            *(
                f"{value * 1e3:.2f}"
                for value in (statistics.median(row.extra["p50_s"]), row.median, min(row.runs), max(row.runs))
            ),
            str(sum(row.extra["calls"])),
        )
        for row in beside.values()
        if row.runs
    ]
    if lines:
        show(
            "small calls, one at a time, while a bulk stream takes all it can get, ms",
            ("system", "p50", "p99 (median of runs)", "min", "max", "calls"),
            lines,
            ["trio TCP and TLS: the calls have a connection of their own; the others: one connection for both."],
        )
