"""``bench.py allreduce``: rounds of the group reduce and of gloo's, in turns."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from .children import HEAD_START
from .costs import Costs, measure
from .processes import Child, ChildFailed, ask_all, children
from .report import Row, machine, show, write

SYSTEMS = ("shoal", "shoal int8", "gloo")
#: The processes that run a system, and the codec of its rounds.
TEAMS = {"shoal": ("shoal", "fp32"), "shoal int8": ("shoal", "int8"), "gloo": ("gloo", "fp32")}
#: Runs that a case gets even when its time is over.
LEAST_RUNS = 3


async def run(options: argparse.Namespace) -> None:
    costs = measure()
    rows: list[Row] = []
    share = None if options.seconds is None else options.seconds / (len(options.peers) * len(options.mb))
    try:
        for peers in options.peers:
            async with children() as group:
                teams = {kind: await group.start(kind, peers) for kind in ("shoal", "gloo")}
                await _introduce(teams)
                for mb in options.mb:
                    rows += await _case(teams, peers, mb, options.runs, options.warmup, share, costs)
                    _print_case(rows[-3:])
    finally:
        # What was measured before an interruption is worth showing.
        if rows:
            _table(rows, costs)
            write(rows, options.json)
            if options.plot is not None:
                _plot(rows, options.plot)


async def _introduce(teams: dict[str, list[Child]]) -> None:
    """Start all processes, and let each team find together."""
    shoal, gloo = teams["shoal"], teams["gloo"]
    hellos = await ask_all(shoal, "start")
    await ask_all(gloo, "start")
    everybody = [[hello["peer"], hello["address"]] for hello in hellos]
    await ask_all(shoal, "meet", [{"rank": rank} for rank in range(len(shoal))], everybody=everybody)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        each = [{"rank": rank} for rank in range(len(gloo))]
        await ask_all(gloo, "meet", each, count=len(gloo), file=str(Path(folder) / "gloo"))


async def _case(
    teams: dict[str, list[Child]], peers: int, mb: int, runs: int, warmup: int, share: float | None, costs: Costs
) -> list[Row]:
    size = mb << 20
    case = {"peers": peers, "bytes": size, "dtype": "float32"}
    rows = {system: Row("allreduce", case, system, "median_s") for system in SYSTEMS}
    details: dict[str, list[list[dict[str, Any]]]] = {system: [] for system in SYSTEMS}
    for team in teams.values():
        await ask_all(team, "prepare", elements=size // 4)
    ends = None if share is None else trio.current_time() + share
    for number in range(-warmup, runs):
        if ends is not None and number >= LEAST_RUNS and trio.current_time() > ends:
            break
        for system in SYSTEMS:
            kind, codec = TEAMS[system]
            seconds, answers = await _once(system, teams[kind], number + warmup, codec)
            if number >= 0:
                rows[system].runs.append(seconds)
                details[system].append(answers)
    for system in ("shoal", "shoal int8"):
        seen = details[system]
        rows[system].extra = {
            "ratio": rows[system].median / rows["gloo"].median,
            "floor_s": costs.reduce_floor(peers, size) if system == "shoal" else None,
            "cpu_s": statistics.median(sum(answer["cpu"] for answer in answers) for answers in seen),
            "sent_bytes": statistics.median(sum(answer["sent"] for answer in answers) for answers in seen),
            "memory": max(answer["memory"] for answers in seen for answer in answers) / size,
            "attempts": max(answer["attempts"] for answers in seen for answer in answers),
            "encrypted": True,
            **machine(),
        }
    rows["gloo"].extra = {"encrypted": False, **machine()}
    return list(rows.values())


async def _once(system: str, team: list[Child], number: int, codec: str) -> tuple[float, list[dict[str, Any]]]:
    """One reduce: seconds from the first peer's beginning to the last one's end, and what the peers say."""
    await ask_all(team, "open", run=number, codec=codec)
    answers = await ask_all(team, "go", at=time.monotonic() + HEAD_START)
    for child, answer in zip(team, answers, strict=True):
        if answer["wrong"] is not None:
            raise ChildFailed(f"{child.name} holds a wrong result in run {number}: {answer['wrong']}")
    if len({answer["digest"] for answer in answers}) != 1:
        raise ChildFailed(f"the peers of {system} hold different results in run {number}")
    return max(a["ended"] for a in answers) - min(a["began"] for a in answers), answers


def _print_case(rows: list[Row]) -> None:
    case = f"{rows[0].case['peers']} peers, {rows[0].case['bytes'] >> 20} MiB"
    medians = ", ".join(f"{row.system} {row.median * 1e3:.1f} ms" for row in rows)
    print(f"{case}: {medians} (medians)", flush=True)


def _plot(rows: list[Row], file: Path) -> None:
    """Tensor bytes per second over the tensor's size, a panel for each number of peers."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    counts = sorted({row.case["peers"] for row in rows})
    figure, panels = pyplot.subplots(1, len(counts), figsize=(4 * len(counts), 3.4), sharey=True, squeeze=False)
    for panel, count in zip(panels[0], counts, strict=True):
        for system in SYSTEMS:
            mine = sorted((r for r in rows if r.case["peers"] == count and r.system == system), key=_size)
            sizes = [row.case["bytes"] / 2**20 for row in mine]
            panel.plot(sizes, [row.case["bytes"] / row.median / 1e6 for row in mine], marker="o", label=system)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{count} peers")
        panel.set_xlabel("tensor, MiB")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("MB of tensor per second")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _size(row: Row) -> int:
    return int(row.case["bytes"])


def _table(rows: list[Row], costs: Costs) -> None:
    columns = (
        "case",
        "system",
        "median ms",
        "min",
        "max",
        "runs",
        "× gloo",
        "MB/s",
        "floor ms",
        "CPU ms",
        "sent MB",
        "memory ×",
    )
    lines = []
    for row in rows:
        ours, first = row.system != "gloo", row.system == SYSTEMS[0]
        lines.append(
            (
                f"{row.case['peers']} peers, {row.case['bytes'] >> 20} MiB" if first else "",
                row.system,
                f"{row.median * 1e3:.1f}",
                f"{min(row.runs) * 1e3:.1f}",
                f"{max(row.runs) * 1e3:.1f}",
                str(len(row.runs)),
                f"{row.extra['ratio']:.2f}" if ours else "",
                f"{row.case['bytes'] / row.median / 1e6:.0f}",
                f"{row.extra['floor_s'] * 1e3:.1f}" if first else "",
                f"{row.extra['cpu_s'] * 1e3:.0f}" if ours else "",
                f"{row.extra['sent_bytes'] / 1e6:.1f}" if ours else "",
                f"{row.extra['memory']:.2f}" if ours else "",
            )
        )
    facts = machine()
    notes = [
        "shoal: encrypted, agreed by vote, checked for NaN, fingerprinted, committed; gloo: none of these.",
        "Every result was checked: the mean, and the same bits on all peers. Votes were kept in memory.",
        "MB/s: tensor bytes (10⁶) per second. CPU, sent: of all peers together. memory: how much a process has grown",
        "since before its first round, at the end of a round, ÷ tensor (fp32 and int8 share their memory).",
        f"{facts['cores']} cores, load {facts['load'][0]} at the end.",
        f"ns per byte on one core: TCP {costs.wire:.3f}, sealing and opening {costs.cipher:.3f}, "
        f"reducing {costs.reduce:.3f}, NaN check {costs.check:.3f}, fingerprint {costs.fingerprint:.3f}.",
    ]
    show("allreduce: one fp32 tensor, the mean over all peers", columns, lines, notes)
