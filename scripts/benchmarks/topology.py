"""Schedules compared over random meshes: predicted seconds of butterflies and rings, and which the planner picks."""

from __future__ import annotations

import argparse
import json
import math
import random
from statistics import median

import attrs
import trio

from shoal.learning.reduce import ring, topology
from shoal.learning.reduce.sizing import optimal, predict
from shoal.transport.identity import Identity, PeerId

#: Bytes of the vector, seconds of every path one way.
SIZE, LATENCY = 64 << 20, 0.04
LINE = 12.5e6

NAMES = ("equal", "sized", "shortest tour", "max-min")


@attrs.frozen
class Row:
    """Of ``meshes`` of one kind and size: median seconds by schedule, how often each is best, what is picked."""

    kind: str
    peers: int
    meshes: int
    seconds: dict[str, float]
    best: dict[str, int]
    picked: dict[str, int]


def mesh(kind: str, count: int, rng: random.Random) -> topology.Mesh:
    """``equal`` lines; ``unequal`` ones, 1:16; ``paths``: 30 % of the paths are 5 to 100 times slower than the lines;
    ``sparse``: 70 % of them."""
    peers: tuple[PeerId, ...] = tuple(sorted(Identity(rng.randbytes(32)).peer_id for _ in range(count)))
    up = tuple(LINE * (4 ** rng.uniform(-1, 1) if kind != "equal" else 1.0) for _ in peers)
    part = {"paths": 0.3, "sparse": 0.7}.get(kind, 0.0)
    paths = {
        (i, j): LINE / 10 ** rng.uniform(0.7, 2.0)
        for i in range(count)
        for j in range(count)
        if i != j and rng.random() < part
    }
    return topology.Mesh(peers, up, (math.inf,) * count, paths, count, 2 * LATENCY)


def compare(kind: str, count: int, meshes: int, seed: int) -> Row:
    """Deterministic in ``seed``."""
    rng = random.Random(f"{kind} {count} {seed}")
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    best, picked = dict.fromkeys(NAMES, 0), dict.fromkeys(("butterfly, equal", "butterfly, sized", "ring"), 0)
    for _ in range(meshes):
        found = mesh(kind, count, rng)
        everybody = set(found.peers)
        lines = found.lines(SIZE, everybody, everybody, everybody)
        rate = found.matrix(SIZE)
        late = [[LATENCY] * count for _ in range(count)]
        cost = [[0.0 if i == j else LATENCY + 1 / (count * rate[i][j]) for j in range(count)] for i in range(count)]
        times = {
            "equal": predict(lines, (1.0 / count,) * count).seconds + 2 * LATENCY,
            "sized": optimal(lines).seconds + 2 * LATENCY,
            "shortest tour": ring.seconds(ring.shortest(cost), rate, late),
            "max-min": ring.seconds(ring.widest(rate), rate, late),
        }
        for name, value in times.items():
            seconds[name].append(value)
        best[min(times, key=lambda name: times[name])] += 1
        butterfly = min(times["equal"], times["sized"])
        if min(times["shortest tour"], times["max-min"]) < (1 - topology.RING_WORTH) * butterfly:
            picked["ring"] += 1
        elif times["sized"] < (1 - topology.WORTH) * times["equal"]:
            picked["butterfly, sized"] += 1
        else:
            picked["butterfly, equal"] += 1
    return Row(kind, count, meshes, {name: median(values) for name, values in seconds.items()}, best, picked)


async def run(options: argparse.Namespace) -> None:
    """Print the table; nothing is sent anywhere."""
    rows = []
    print("| mesh | peers | " + " | ".join(NAMES) + " | best (in this order) | planner: equal, sized, ring |")
    print("|---|---|" + "---:|" * len(NAMES) + "---|---|")
    for kind in ("equal", "unequal", "paths", "sparse"):
        for count in (4, 8, 16, 32):
            row = compare(kind, count, options.runs, options.seed)
            rows.append(row)
            times = " | ".join(f"{row.seconds[name]:.1f}" for name in NAMES)
            best = ", ".join(str(row.best[name]) for name in NAMES)
            print(f"| {kind} | {count} | {times} | {best} | {', '.join(map(str, row.picked.values()))} |")
            await trio.lowlevel.checkpoint()
    if options.json is not None:
        options.json.write_text(json.dumps([attrs.asdict(row) for row in rows], indent=1))
