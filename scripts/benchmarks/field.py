"""Federated averaging on digits: a field, plain and batched, beside the shortest loop over the clients."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch
import trio

from shoal.learning import exact
from shoal.learning.shard import Shard
from shoal.learning.tasks.digits import Digits
from shoal.sim.field import FieldCase, identity_of, run_field

from .report import Row, machine, show, write

SYSTEMS = ("loop", "field", "field batched")


def loop(clients: int, rounds: int, steps: int) -> float:
    """FedAvg as one writes it down: no time, no bytes, no faults. Returns the accuracy."""
    exact.prepare_torch()
    torch.manual_seed(0)
    task = Digits()
    model = task.model()
    models = [task.model() for _ in range(clients)]
    optimizers = [task.optimizer(each) for each in models]
    ids = sorted(identity_of(0, number).key for number in range(clients))
    accuracy = 0.0

    def endless(index: int) -> object:
        epoch = 0
        while True:
            yield from task.batches(Shard(0, ids[index], 1, index, clients, epoch))
            epoch += 1

    streams = [endless(index) for index in range(clients)]
    for _ in range(rounds):
        start = [p.detach().clone() for p in model.parameters()]
        total = [torch.zeros_like(p) for p in start]
        for own, optimizer, stream in zip(models, optimizers, streams, strict=True):
            with torch.no_grad():
                for p, value in zip(own.parameters(), start, strict=True):
                    p.copy_(value)
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                task.loss(own, next(stream)).backward()  # type: ignore[call-overload]
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


async def run(options: argparse.Namespace) -> None:
    """Turns of all three; CPU seconds, as each is one thread."""
    sizes = options.clients, options.rounds, options.steps
    acts: dict[str, Callable[[], float]] = {
        "loop": lambda: loop(*sizes),
        "field": lambda: field(*sizes, batched=False),
        "field batched": lambda: field(*sizes, batched=True),
    }
    case = {"clients": options.clients, "rounds": options.rounds, "steps": options.steps}
    rows = {system: Row("field", case, system, "median_s") for system in SYSTEMS}
    await trio.to_thread.run_sync(field, 2, 1, 1, True)  # torch loads half of itself with the first optimiser
    accuracies = dict.fromkeys(SYSTEMS, 0.0)
    began = time.monotonic()
    for done in range(options.runs):
        for system, act in acts.items():
            clock = time.process_time_ns()
            accuracies[system] = await trio.to_thread.run_sync(act)  # a field is a run of trio of its own
            rows[system].runs.append(max(time.process_time_ns() - clock, 1) * 1e-9)
        if options.seconds is not None and done >= 2 and time.monotonic() - began > options.seconds:
            break
    if accuracies["field"] != accuracies["field batched"]:
        raise AssertionError(f"batched learns something else: {accuracies}")
    plain = rows["loop"].median
    for system, row in rows.items():
        row.extra |= {"accuracy": accuracies[system], "times_loop": row.median / plain, **machine()}
    lines = [
        (system, f"{row.median:.2f}", f"{row.median / plain:.2f}", f"{accuracies[system]:.3f}")
        for system, row in rows.items()
    ]
    there = importlib.util.find_spec("flwr") is not None
    notes = [f"flwr's simulation is left out: {'no adapter is written' if there else 'it is not installed'}"]
    show(
        f"{options.clients} clients, {options.rounds} rounds of {options.steps} steps, digits: CPU seconds",
        ("system", "median s", "× loop", "accuracy"),
        lines,
        notes,
    )
    write(list(rows.values()), options.json)
