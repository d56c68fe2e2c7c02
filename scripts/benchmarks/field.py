"""Federated averaging on digits: a field, plain and batched, beside the shortest loop over the clients, and Flower."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import trio

from shoal.learning import exact
from shoal.learning.shard import Shard
from shoal.learning.tasks.digits import Digits, load, parts
from shoal.sim.field import FieldCase, identity_of, run_field

from .processes import ChildFailed
from .report import Row, machine, show, write

FLOWER = "flower"

#: Seconds that one run of Flower may take.
PATIENCE = 900.0


@attrs.frozen
class Run:
    """One run: seconds by the clock and of the processor, the accuracy at the end, and seconds of a round once warm."""

    wall: float
    cpu: float
    accuracy: float
    round: float


def shards(clients: int) -> list[Shard]:
    """Of each client, for its first pass through its data."""
    ids = sorted(identity_of(0, number).key for number in range(clients))
    return [Shard(0, ids[index], 1, index, clients) for index in range(clients)]


def loop(clients: int, rounds: int, steps: int) -> float:
    """FedAvg as one writes it down: no time, no bytes, no faults. Returns the accuracy."""
    exact.prepare_torch()
    torch.manual_seed(0)
    task = Digits()
    model = task.model()
    models = [task.model() for _ in range(clients)]
    optimizers = [task.optimizer(each) for each in models]
    accuracy = 0.0

    def endless(shard: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in itertools.count():
            yield from task.batches(attrs.evolve(shard, epoch=epoch))

    streams = [endless(shard) for shard in shards(clients)]
    for _ in range(rounds):
        start = [p.detach().clone() for p in model.parameters()]
        total = [torch.zeros_like(p) for p in start]
        for own, optimizer, stream in zip(models, optimizers, streams, strict=True):
            with torch.no_grad():
                for p, value in zip(own.parameters(), start, strict=True):
                    p.copy_(value)
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                task.loss(own, next(stream)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                for sum_, p in zip(total, own.parameters(), strict=True):
                    sum_ += p
        with torch.no_grad():
            for p, sum_ in zip(model.parameters(), total, strict=True):
                p.copy_(sum_ / clients)
            accuracy = task.evaluate(model)["accuracy"]
    return accuracy


def field(clients: int, rounds: int, steps: int, batched: bool) -> float:
    """The same as a field: DiLoCo whose outer step is the mean itself."""
    args = {"inner_steps": steps, "outer_lr": 1.0, "momentum": 0.0}
    return run_field(FieldCase("diloco", args, clients, rounds, batched=batched)).last.metric


class Flower:
    """Flower's simulation of the same clients with the same batches, in a process of its own, under ``python``."""

    def __init__(self, python: str, clients: int, rounds: int, steps: int, folder: str) -> None:
        self._command = [python, str(Path(__file__).with_name("flower.py")), f"{folder}/case.npz"]
        torch.manual_seed(0)
        start = {f"start{i}": p.detach().numpy() for i, p in enumerate(Digits().model().parameters())}
        tables = load()
        np.savez(
            self._command[-1], picks=_picks(clients, rounds * steps), steps=np.array(steps),
            train_x=tables.train_x.numpy(), train_y=tables.train_y.numpy(), test_x=tables.test_x.numpy(),
            test_y=tables.test_y.numpy(), **start,
        )  # fmt: skip

    def missing(self) -> str:
        """Why it cannot be run; empty if it can."""
        done = self._start([self._command[0], "-c", "import flwr, ray, torch"])
        return done.stderr.decode(errors="replace").strip().rpartition("\n")[2] if done.returncode else ""

    def run(self) -> Run:
        done = self._start(self._command)
        if done.returncode:
            raise ChildFailed(f"flower ended with {done.returncode}:\n{done.stderr.decode(errors='replace')[-4000:]}")
        said: dict[str, Any] = json.loads(done.stdout)
        return Run(said["wall_s"], said["cpu_s"], said["accuracy"], statistics.median(said["round_s"]))

    @staticmethod
    def _start(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)


def _picks(clients: int, batches: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(clients, batches, samples): which training images are in each batch, -1 where it is short."""
    found = np.full((clients, batches, Digits.batch), -1, dtype=np.int64)
    for shard in shards(clients):
        at = 0
        for epoch in itertools.count():
            if at == batches:
                break
            own = parts(clients, shard.seed, Digits().alpha)[shard.index]
            order = attrs.evolve(shard, epoch=epoch).rng("order").permutation(own)
            for start in range(0, len(order), Digits.batch)[: batches - at]:
                piece = order[start : start + Digits.batch]
                found[shard.index, at, : len(piece)] = piece
                at += 1
    return found


def _timed(act: Callable[[], float], rounds: int) -> Run:
    clock, cpu = time.monotonic(), time.process_time()
    accuracy = act()
    wall = time.monotonic() - clock
    return Run(wall, time.process_time() - cpu, accuracy, wall / rounds)


async def run(options: argparse.Namespace) -> None:
    """Turns of all of them. Ours and the loop are one thread; Flower's clients have a process for each core."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        await _run(options, folder)


async def _run(options: argparse.Namespace, folder: str) -> None:
    sizes = options.clients, options.rounds, options.steps
    acts: dict[str, Callable[[], Run]] = {
        "loop": lambda: _timed(lambda: loop(*sizes), options.rounds),
        "field": lambda: _timed(lambda: field(*sizes, batched=False), options.rounds),
        "field batched": lambda: _timed(lambda: field(*sizes, batched=True), options.rounds),
    }
    flower = Flower(options.peer_python, *sizes, folder)
    why = "it takes three rounds at least" if options.rounds < 3 else await trio.to_thread.run_sync(flower.missing)
    if not why:
        acts[FLOWER] = flower.run
    case = {"clients": options.clients, "rounds": options.rounds, "steps": options.steps}
    await trio.to_thread.run_sync(field, 2, 1, 1, True)  # torch loads half of itself with the first optimiser
    found: dict[str, list[Run]] = {system: [] for system in acts}
    began = time.monotonic()
    for done in range(options.runs):
        for system, act in acts.items():
            found[system].append(await trio.to_thread.run_sync(act))  # a field is a run of trio of its own
        if options.seconds is not None and done >= 2 and time.monotonic() - began > options.seconds:
            break
    if found["field"][-1].accuracy != found["field batched"][-1].accuracy:
        raise AssertionError(f"batched learns something else: {found}")
    rows, lines = [], []
    plain = {what: _median(found["loop"], what) for what in ("wall", "cpu")}
    for system, runs in found.items():
        row = Row("field", case, system, "median_s", [each.wall for each in runs])
        cpu, warm = _median(runs, "cpu"), _median(runs, "round")
        row.extra |= {"accuracy": runs[-1].accuracy, "times_loop": row.median / plain["wall"], "cpu_s": cpu,
                      "cpu_times_loop": cpu / plain["cpu"], "round_s": warm, **machine()}  # fmt: skip
        rows.append(row)
        lines.append((
            system, f"{row.median:.2f}", f"{row.median / plain['wall']:.2f}", f"{cpu:.2f}", f"{cpu / plain['cpu']:.2f}",
            f"{warm:.3f}", f"{runs[-1].accuracy:.3f}",
        ))  # fmt: skip
    show(
        f"{options.clients} clients, {options.rounds} rounds of {options.steps} steps, digits: medians",
        ("system", "s", "× loop", "CPU s", "× loop", "s a round", "accuracy"),
        lines,
        [f"{FLOWER} is left out: {why}"] if why else [],
    )
    write(rows, options.json)


def _median(runs: list[Run], what: str) -> float:
    return statistics.median(getattr(each, what) for each in runs)
