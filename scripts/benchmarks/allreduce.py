"""``bench.py allreduce``: rounds of the group reduce and of others' all-reduces, in turns."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

from .costs import Costs, measure
from .processes import Child, ChildFailed, Children, act_all, ask_all, children
from .report import Row, machine, show, write

SYSTEMS = ("shoal", "shoal int8", "gloo", "torchft", "hivemind")
#: The processes that run a system, and the codec of its rounds.
TEAMS = {
    "shoal": ("shoal", "fp32"),
    "shoal int8": ("shoal", "int8"),
    "gloo": ("gloo", "fp32"),
    "torchft": ("reduce-torchft", "fp32"),
    "hivemind": ("reduce-hivemind", "fp32"),
}
#: Ours, whose rows say more.
OURS = ("shoal", "shoal int8")
#: What is put beside ours if it is installed somewhere.
OPTIONAL = ("torchft", "hivemind")
#: Runs that a case gets even when its time is over.
LEAST_RUNS = 3
#: Seconds that one run of a system may take.
PATIENCE = 180.0

#: The processes of each kind.
Teams = dict[str, list[Child]]


async def run(options: argparse.Namespace) -> None:
    costs = measure()
    rows: list[Row] = []
    share = None if options.seconds is None else options.seconds / (len(options.peers) * len(options.mb))
    wanted = [system for system in SYSTEMS if system in options.systems]
    pythons, missing = await _interpreters(wanted, options.peer_python)
    systems = [system for system in wanted if system not in missing]
    try:
        for peers in options.peers:
            async with children() as group:
                kinds = dict.fromkeys(TEAMS[system][0] for system in systems)
                teams = {kind: await group.start(kind, peers, pythons.get(kind, sys.executable)) for kind in kinds}
                for kind in pythons:
                    for child in teams[kind]:
                        await child.missing()
                await _introduce(teams)
                for mb in options.mb:
                    case = await _case(systems, teams, peers, mb, options.runs, options.warmup, share, costs)
                    _print_case(case)
                    rows += case
    finally:
        # What was measured before an interruption is worth showing.
        if rows:
            _table(rows, costs)
            for system, why in missing.items():
                print(f"{system} is left out: {why}")
            write(rows, options.json)
            if options.plot is not None:
                _plot(rows, options.plot)


async def _interpreters(systems: list[str], pythons: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """For each kind of process that may lack a package the first of ``pythons`` that has it; and who is missing why."""
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    async with children() as group:
        for system in systems:
            if system not in OPTIONAL:
                continue
            kind, reasons = TEAMS[system][0], []
            for python in pythons:
                if not (lack := await _lack(group, kind, python)):
                    found[kind] = python
                    break
                reasons.append(lack)
            else:
                missing[system] = "; ".join(dict.fromkeys(reasons))
                print(f"{system} is left out: {missing[system]}", file=sys.stderr)
    return found, missing


async def _lack(group: Children, kind: str, python: str) -> str:
    try:
        (child,) = await group.start(kind, 1, python)
    except OSError as error:
        return f"{python}: {error.strerror}"
    try:
        return await child.missing()
    except ChildFailed as error:
        return f"{python}: {str(error).splitlines()[-1].strip()}"
    finally:
        await group.end(child)


async def _introduce(teams: Teams) -> None:
    """Start all processes, and let each team find together."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        for kind, team in teams.items():
            hellos = await ask_all(team, "start")
            each = [{"rank": rank} for rank in range(len(team))]
            match kind:
                case "shoal":
                    everybody: list[Any] = [[hello["peer"], hello["address"]] for hello in hellos]
                    await ask_all(team, "meet", each, everybody=everybody)
                case "gloo":
                    await ask_all(team, "meet", each, count=len(team), file=str(Path(folder) / "gloo"))
                case _:
                    await ask_all(team, "meet", each, everybody=hellos)


async def _case(
    systems: list[str],
    teams: Teams,
    peers: int,
    mb: int,
    runs: int,
    warmup: int,
    share: float | None,
    costs: Costs,
) -> list[Row]:
    size = mb << 20
    case = {"peers": peers, "bytes": size, "dtype": "float32"}
    rows = {system: Row("allreduce", case, system, "median_s") for system in systems}
    details: dict[str, list[list[dict[str, Any]]]] = {system: [] for system in systems}
    for team in teams.values():
        await ask_all(team, "prepare", elements=size // 4)
    wrong = dict.fromkeys(systems, 0)
    ends = None if share is None else trio.current_time() + share
    for number in range(-warmup, runs):
        if ends is not None and number >= LEAST_RUNS and trio.current_time() > ends:
            break
        for system in systems:
            kind, codec = TEAMS[system]
            seconds, answers = await _once(system, teams[kind], number + warmup, codec)
            if any(answer["wrong"] is not None for answer in answers):
                wrong[system] += 1  # that system says no word of it itself
            elif number >= 0:
                rows[system].runs.append(seconds)
                details[system].append(answers)
    for system in [system for system, row in rows.items() if not row.runs]:
        print(f"{system}: all {wrong[system]} results of {peers} peers and {mb} MiB were wrong", file=sys.stderr)
        del rows[system]
    for system, row in rows.items():
        row.extra = {**_facts(system, row, rows, details[system], costs), "wrong": wrong[system]}
    return list(rows.values())


def _facts(
    system: str, row: Row, rows: dict[str, Row], seen: list[list[dict[str, Any]]], costs: Costs
) -> dict[str, Any]:
    """What else the row says."""
    size, peers = row.case["bytes"], row.case["peers"]
    extra: dict[str, Any] = {"encrypted": system not in ("gloo", "torchft")}
    if "gloo" in rows and system != "gloo":
        extra["ratio"] = row.median / rows["gloo"].median
    if system not in OURS and "shoal" in rows:
        extra["shoal_ratio"] = rows["shoal"].median / row.median
    if all("cpu" in answer for answers in seen for answer in answers):
        extra["cpu_s"] = statistics.median(sum(answer["cpu"] for answer in answers) for answers in seen)
    if system in OURS:
        extra["floor_s"] = costs.reduce_floor(peers, size) if system == "shoal" else None
        extra["sent_bytes"] = statistics.median(sum(answer["sent"] for answer in answers) for answers in seen)
        extra["memory"] = max(answer["memory"] for answers in seen for answer in answers) / size
        extra["attempts"] = max(answer["attempts"] for answers in seen for answer in answers)
    return {**extra, **machine()}


async def _once(system: str, team: list[Child], number: int, codec: str) -> tuple[float, list[dict[str, Any]]]:
    """One reduce: seconds from the first peer's beginning to the last one's end, and what the peers say."""
    await ask_all(team, "open", run=number, codec=codec, patience=PATIENCE)
    answers = await act_all(team, PATIENCE)
    for child, answer in zip(team, answers, strict=True):
        if answer["wrong"] is not None and system not in OPTIONAL:
            raise ChildFailed(f"{child.name} holds a wrong result in run {number}: {answer['wrong']}")
    # hivemind does not promise the same bits: each peer adds the differences to what it had, none where a part failed.
    if system not in OPTIONAL and len({answer["digest"] for answer in answers}) != 1:
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
        for system in dict.fromkeys(row.system for row in rows):
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
        "shoal ÷ it",
        "MB/s",
        "floor ms",
        "CPU ms",
        "sent MB",
        "memory ×",
    )
    lines, before = [], None
    for row in rows:
        case = f"{row.case['peers']} peers, {row.case['bytes'] >> 20} MiB"
        extra = row.extra
        lines.append(
            (
                case if case != before else "",
                row.system,
                f"{row.median * 1e3:.1f}",
                f"{min(row.runs) * 1e3:.1f}",
                f"{max(row.runs) * 1e3:.1f}",
                str(len(row.runs)) + (f" (+{extra['wrong']} wrong)" if extra["wrong"] else ""),
                _cell(extra, "ratio", "{:.2f}"),
                _cell(extra, "shoal_ratio", "{:.2f}"),
                f"{row.case['bytes'] / row.median / 1e6:.0f}",
                _cell(extra, "floor_s", "{:.1f}", 1e3),
                _cell(extra, "cpu_s", "{:.0f}", 1e3),
                _cell(extra, "sent_bytes", "{:.1f}", 1e-6),
                _cell(extra, "memory", "{:.2f}"),
            )
        )
        before = case
    facts = machine()
    notes = [
        "shoal: encrypted, agreed by vote, checked for NaN, fingerprinted, committed; gloo: none of these.",
        "torchft: gloo with a quorum, which is there before the clock starts, and its decision to commit.",
        "hivemind: its transfer alone, encrypted, without matchmaking (its default timeouts: none).",
        "Every result was checked: the mean, and the same bits on all peers. Votes were kept in memory.",
        "MB/s: tensor bytes (10⁶) per second. CPU, sent: of all peers together. memory: how much a process has grown",
        "since before its first round, at the end of a round, ÷ tensor (fp32 and int8 share their memory).",
        f"{facts['cores']} cores, load {facts['load'][0]} at the end.",
        f"ns per byte on one core: TCP {costs.wire:.3f}, sealing and opening {costs.cipher:.3f}, "
        f"reducing {costs.reduce:.3f}, NaN check {costs.check:.3f}, fingerprint {costs.fingerprint:.3f}.",
    ]
    show("allreduce: one fp32 tensor, the mean over all peers", columns, lines, notes)


def _cell(extra: dict[str, Any], name: str, form: str, factor: float = 1.0) -> str:
    value = extra.get(name)
    return "" if value is None else form.format(value * factor)
