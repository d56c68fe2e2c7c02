"""``bench.py dht``: stores and gets in DHTs on real sockets, in turns, laid out over processes alike."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs
import trio

from .children import OPTIONAL
from .processes import Child, ChildFailed, Children, ask_all, children
from .report import Row, machine, show, write

SYSTEMS = ("shoal", "kademlia", "hivemind", "libp2p")
NAMES = {"shoal": "shoal", "kademlia": "kademlia (PyPI)", "hivemind": "hivemind DHT", "libp2p": "py-libp2p kad-dht"}
#: Seconds for a whole system to start, and for one batch.
PATIENCE = 600.0
COLUMNS = (
    *("system", "security", "store", "p99", "×", "CPU"),
    *("get", "p99", "×", "CPU", "MiB", "daemon", "start"),
)


@attrs.define
class Swarm:
    """The processes of one system; all its nodes know each other."""

    system: str
    processes: list[Child]
    nodes: int
    security: str
    copies: str
    start_s: float
    memory_kib: float
    helpers_kib: float
    stores: list[float] = attrs.field(factory=list)
    gets: list[float] = attrs.field(factory=list)
    store_cpu: float = 0.0
    get_cpu: float = 0.0
    numbered: int = 0

    @property
    def name(self) -> str:
        return NAMES[self.system]


async def run(options: argparse.Namespace) -> None:
    async with children() as group:
        swarms, missing = [], []
        for system in SYSTEMS:
            if system not in options.systems:
                continue
            try:
                swarm = await _start(group, system, options)
            except ChildFailed as error:
                if f"dht-{system}" not in OPTIONAL:
                    raise
                swarm = str(error)
            if isinstance(swarm, Swarm):
                swarms.append(swarm)
            else:
                missing.append(f"{NAMES[system]} is left out: {swarm}")
                print(missing[-1], file=sys.stderr)
        ends = None if options.seconds is None else trio.current_time() + options.seconds
        for turn in range(-1, options.runs):
            if ends is not None and turn >= 3 and trio.current_time() > ends:
                break
            for swarm in swarms:
                # The first turn is for links that nobody had yet: each node stores and gets at least once.
                keys = options.keys if turn >= 0 else max(options.keys, 2 * swarm.nodes)
                if not await _turn(swarm, keys, turn >= 0):
                    raise SystemExit(
                        f"bench dht: {swarm.name} keeps {swarm.copies} copies, so every one of {swarm.nodes} nodes "
                        "holds every key, and there is nothing to get from others: give --nodes more than that"
                    )
        for swarm in swarms:
            await _weigh(swarm)
    rows = [row for swarm in swarms for row in _rows(swarm, options)]
    _table(swarms, options)
    for line in missing:
        print(line)
    write(rows, options.json)


async def _start(group: Children, system: str, options: argparse.Namespace) -> Swarm | str:
    kind = f"dht-{system}"
    count = min(options.processes, options.nodes)
    python = options.peer_python if kind in OPTIONAL else sys.executable
    processes = await group.start(kind, count, python)
    if kind in OPTIONAL:
        for child in processes:
            if lack := await child.missing():
                return lack
    before = await ask_all(processes, "ready", patience=PATIENCE)
    share = [options.nodes // count + (number < options.nodes % count) for number in range(count)]
    began = time.perf_counter()
    hello = await processes[0].ask("begin", count=share[0], hello=None, patience=PATIENCE)
    others = [{"count": nodes} for nodes in share[1:]]
    if others:
        await ask_all(processes[1:], "begin", others, hello=hello, patience=PATIENCE)
    start = time.perf_counter() - began
    facts = before[0]
    empty = sum(answer["kib"] for answer in before)
    return Swarm(system, processes, options.nodes, facts["security"], facts["copies"], start, -empty, 0.0)


async def _turn(swarm: Swarm, keys: int, counts: bool) -> int:
    """Store ``keys`` new keys, then get each by a node that does not hold it; one act at a time. How many were got."""
    names = [f"key-{swarm.numbered + number}" for number in range(keys)]
    swarm.numbered += keys
    held: list[tuple[str, str]] = []
    before = await _cpu(swarm)
    for number, child in enumerate(swarm.processes):
        mine = names[number :: len(swarm.processes)]
        answer = await child.ask("store", names=mine, patience=PATIENCE)
        held += [(name, where) for name, (_, where) in zip(mine, answer["stored"], strict=True)]
        if counts:
            swarm.stores += [seconds for seconds, _ in answer["stored"]]
    between, got = await _cpu(swarm), 0
    for number in range(len(swarm.processes)):
        left = held[number :: len(swarm.processes)]
        for offset in range(1, len(swarm.processes) + 1):
            child = swarm.processes[(number + offset) % len(swarm.processes)]
            times = (await child.ask("get", keys=left, patience=PATIENCE))["times"] if left else []
            left = [key for key, seconds in zip(left, times, strict=True) if seconds is None]
            got += len(times) - len(left)
            if counts:
                swarm.gets += [seconds for seconds in times if seconds is not None]

    if counts:
        swarm.store_cpu += between - before
        swarm.get_cpu += await _cpu(swarm) - between
    return got


async def _cpu(swarm: Swarm) -> float:
    """Seconds that all processes of it have worked, daemons too."""
    return sum(float(answer["seconds"]) for answer in await ask_all(swarm.processes, "cpu"))


async def _weigh(swarm: Swarm) -> None:
    answers = await ask_all(swarm.processes, "memory")
    swarm.memory_kib = (swarm.memory_kib + sum(answer["kib"] for answer in answers)) / swarm.nodes
    swarm.helpers_kib = sum(answer["helpers_kib"] for answer in answers) / swarm.nodes


def _rows(swarm: Swarm, options: argparse.Namespace) -> list[Row]:
    case = {"nodes": options.nodes, "processes": options.processes, "value_bytes": 128}
    extra: dict[str, Any] = {"security": swarm.security, "copies": swarm.copies, **machine()}
    rows = []
    for what, times, cpu in (("store", swarm.stores, swarm.store_cpu), ("get", swarm.gets, swarm.get_cpu)):
        cost = {"p99_ms": statistics.quantiles(times, n=100)[98] * 1e3, "cpu_ms": cpu / len(times) * 1e3}
        rows.append(Row("dht", {**case, "what": what}, swarm.name, "median_s", times, {**extra, **cost}))
    kib = swarm.memory_kib + swarm.helpers_kib
    parts = {"own_kib": swarm.memory_kib, "helpers_kib": swarm.helpers_kib}
    rows.append(Row("dht", {**case, "what": "memory of a node"}, swarm.name, "kib", [kib], {**extra, **parts}))
    rows.append(Row("dht", {**case, "what": "start"}, swarm.name, "median_s", [swarm.start_s], extra))
    return rows


def _table(swarms: Sequence[Swarm], options: argparse.Namespace) -> None:
    ours = next((swarm for swarm in swarms if swarm.system == "shoal"), None)
    lines = []
    for swarm in swarms:
        cells = [swarm.name, f"{swarm.security}, {swarm.copies}"]
        for what, cpu in (("stores", swarm.store_cpu), ("gets", swarm.get_cpu)):
            times = getattr(swarm, what)
            median = statistics.median(times)
            cells += [f"{median * 1e3:.2f}", f"{statistics.quantiles(times, n=100)[98] * 1e3:.2f}"]
            cells.append("" if ours in (None, swarm) else f"{median / statistics.median(getattr(ours, what)):.2f}")
            cells.append(f"{cpu / len(times) * 1e3:.2f}")
        cells += [f"{swarm.memory_kib / 1024:.1f}", f"{swarm.helpers_kib / 1024:.1f}", f"{swarm.start_s:.1f}"]
        lines.append(cells)
    show(
        f"{options.nodes} nodes in {min(options.processes, options.nodes)} processes: "
        "ms for one store, and for one get by a node that does not hold the key",
        COLUMNS,
        lines,
        [
            f"machine: {machine()['cores']} cores, load {machine()['load']}; "
            f"{len(swarms[0].stores) if swarms else 0} distinct keys of each system, one act at a time.",
            "After security: copies. CPU: ms of all processes together, daemons too, for one act. ×: of shoal's.",
            "MiB of a node: anonymous memory that the processes grew by, ÷ nodes; daemon: p2pd's, one for each node.",
        ],
    )
