#!/usr/bin/env python
"""What docs/spsa.md says of SPSA, measured anew: ``onebyte.py memory|nodes [founder]|drift|digits|adapt [SEEDS]``.

``memory``: peak resident memory of a process that looks and steps, beside inference and a step of SGD in processes of
their own. ``nodes``: that of whole nodes, in MiB, as a line of JSON: a founder with a folder, from its first round on,
while it trains alone, and (unless ``founder``) while another one joins; and beside it inference with nothing but torch.
``drift``: bfloat16 with and without what we do about it. ``digits``: the rounds in which ``digits-finetune`` passes
0.93, by seed; peers take turns in this process, with the strategy's own functions and no network. ``adapt``:
``stdlib-small``, trained here for 250 steps, on C++ headers, by SPSA and by DiLoCo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import trio
from torch import Tensor, nn

from shoal.learning.checkpoints import Keeping
from shoal.learning.directions import Direction, Kind, Move, Moved, descend, seed_of, trainable_of
from shoal.learning.shard import Shard
from shoal.learning.strategies.spsa import SPSA
from shoal.learning.task import Task
from shoal.learning.tasks.finetune import DigitsFinetune, StdlibFinetune
from shoal.learning.tasks.stdlib import StdlibSmall
from shoal.learning.worker import Worker
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.ticket import Ticket
from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

PEERS = tuple(bytes([65 + i]) * 32 for i in range(4))


def stream(task: Task, shard: Shard) -> Iterator[Any]:
    while True:
        yield from task.batches(shard)
        shard = attrs.evolve(shard, epoch=shard.epoch + 1)


def score(task: Task, model: nn.Module) -> float:
    with torch.no_grad():
        return next(iter(task.evaluate(model).values()))


def spsa(rule: SPSA, task: Task, model: nn.Module, rounds: int, seed: int) -> Iterator[float]:
    """The metric after each round."""
    model.eval()
    parameters, run = trainable_of(model), bytes([seed % 256]) * 32
    data = [stream(task, Shard(seed, peer, 1, i, len(PEERS))) for i, peer in enumerate(PEERS)]
    for round in range(1, rounds + 1):
        said = {}
        for batches, peer in zip(data, PEERS, strict=True):
            losses = []
            for sample in range(rule.grads):
                batch, direction = next(batches), rule.direction(run, round, (peer,), sample)
                sides = []
                for side in (1, -1):
                    with torch.inference_mode(), Moved(parameters, direction, side * rule.eps):
                        sides.append(float(task.loss(model, batch)))
                losses.append(tuple(sides))
            said[peer] = rule.payload(losses)
        descend([(n, p.detach()) for n, p in parameters.items()], rule.moves(run, round, PEERS, said))
        yield score(task, model)


def digits(seeds: int) -> None:
    for name, rule in (("signs", SPSA(grads=8, lr=0.02)), ("normal", SPSA(grads=8, lr=0.02, normal=1))):
        for seed in range(seeds):
            task = DigitsFinetune()
            found = list(spsa(rule, task, task.model(), 32, seed))
            first = next((i for i, value in enumerate(found, 1) if value >= 0.93), None)
            print(f"{name} seed {seed}: 0.93 in round {first}, after 8 {found[7]:.3f}, after 32 {found[31]:.3f}")


def adapt(seeds: int) -> None:
    source, task = StdlibSmall(), StdlibFinetune()
    torch.manual_seed(0)
    model = source.model()
    optimizer, batches = source.optimizer(model), stream(source, Shard(0, bytes(32), 0, 0, 1))
    for _ in range(250):
        optimizer.zero_grad()
        for _ in range(2):
            (source.loss(model, next(batches)) / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"before: {score(task, model):.4f} bits per byte of C++, {score(source, model):.4f} of Python")
    for seed in range(seeds):
        model.load_state_dict(start)
        for round, value in enumerate(spsa(SPSA(grads=16, lr=0.04), task, model, 24, seed), 1):
            if round % 4 == 0:
                print(f"spsa seed {seed} round {round}, {64 * round} bytes: {value:.4f}", flush=True)
    shared = start
    data = [stream(task, Shard(0, peer, 1, i, len(PEERS))) for i, peer in enumerate(PEERS)]
    for round in range(1, 5):
        total = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        for batches in data:
            model.load_state_dict(shared)
            model.train()
            inner = task.optimizer(model)
            for _ in range(10):
                inner.zero_grad()
                task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
                inner.step()
            for name, tensor in model.state_dict().items():
                total[name] += tensor / len(PEERS)
        shared = total
        model.load_state_dict(shared)
        print(f"diloco round {round}: {score(task, model):.4f}", flush=True)


class Deep(Task):
    """224 MiB in layers of 16."""

    metric = "loss"

    def model(self) -> nn.Module:
        layers = [part for _ in range(14) for part in (nn.Linear(2048, 2048), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(2048, 16))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    def batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(8, 2048), torch.zeros(8, dtype=torch.int64)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, next(self.batches(Shard(0, PEERS[0], 0, 0, 1)))))}


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MiB of resident memory at most, since it was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


async def work(mode: str) -> None:
    worker = Worker(RealHost(), Deep(), Shard(0, PEERS[0], 1, 0, 1))
    forget_peak()
    start = time.monotonic()
    match mode:
        case "inference":
            worker.model.eval()
            with torch.inference_mode():
                for _ in range(3):
                    worker.task.loss(worker.model, next(iter(worker.task.batches(worker.shard))))
        case "signs" | "normal":
            kind: Kind = "signs" if mode == "signs" else "normal"
            directions = [Direction(seed_of(b"r", 1, b"p", sample), kind) for sample in range(3)]
            await worker.probe(directions, 1e-3, (1, -1))
            await worker.descend([Move(direction, 1e-4) for direction in directions] * 8)
        case _:
            await worker.train(steps=3)
    print(f"{mode}: peak {peak():.0f} MiB, {time.monotonic() - start:.1f} s", flush=True)


#: Inference, as one writes it down.
BARE = """
import torch
from torch import nn
torch.set_num_threads(1)
model = nn.Sequential(*[part for _ in range(14) for part in (nn.Linear(2048, 2048), nn.GELU())], nn.Linear(2048, 16))
model.eval()
with torch.inference_mode():
    for _ in range(3):
        float(nn.functional.cross_entropy(model(torch.randn(8, 2048)), torch.zeros(8, dtype=torch.int64)))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""


def nodes(only_founder: bool) -> None:
    bare = subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True, text=True)
    found = {"inference": float(bare.stdout)}
    with tempfile.TemporaryDirectory() as folder:
        lives: list[subprocess.Popen[str]] = []
        try:
            founder = _live(lives, f"{folder}/founder", "")
            ticket = _word(founder, "ticket")
            found["founder"] = float(_word(founder, "alone"))
            if not only_founder:
                joiner = _live(lives, f"{folder}/joiner", ticket)
                digest = _word(joiner, "digest")
                found["joining"] = float(_word(joiner, "began"))
                found["joined"] = float(_word(joiner, "end"))
                found["founder, joined"] = float(_word(founder, "end"))
                if digest not in _word(founder, "digests").split(","):
                    raise AssertionError("the joiner has another state than the founder")
        finally:
            for life in lives:
                life.kill()
                life.wait()
    print(json.dumps(found))


def _live(lives: list[subprocess.Popen[str]], folder: str, ticket: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "node", folder, ticket]
    lives.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return lives[-1]


def _word(life: subprocess.Popen[str], name: str) -> str:
    """What it says under this name, next."""
    assert life.stdout is not None
    for line in life.stdout:
        found, _, rest = line.strip().partition(" ")
        if found == name:
            return rest
    raise AssertionError(f"a node ended without a word about {name}")


async def live(folder: str, ticket: str) -> None:
    """A node. A founder does 6 rounds alone; then it goes on until there were 6 with somebody else."""
    torch.set_num_threads(1)
    founding = Founding(strategy="spsa", strategy_args=(("grads", 1.0), ("lr", 1e-4)))
    config = NodeConfig(
        bind=(Address("tcp", "127.0.0.1", 0),),
        folder=Path(folder),
        founding=None if ticket else founding,
        ticket=Ticket.parse(ticket) if ticket else None,
        # States are written as often as they can be.
        keeping=Keeping(every=2, apart=0.0),
    )
    alone = together = 0
    digests: list[str] = []

    def committed(report: Any, samples: int) -> None:
        nonlocal alone, together
        digests.append(report.digest)
        alone, together = alone + (len(report.members) == 1), together + (len(report.members) == 2)
        if ticket and together == 1:
            print(f"digest {report.digest}\nbegan {peak():.0f}", flush=True)
            forget_peak()
        if not ticket and alone == 1:
            forget_peak()
        if not ticket and alone == 6:
            print(f"alone {peak():.0f}", flush=True)
            forget_peak()
            alone += 1
        if together == 6:
            print(f"end {peak():.0f}\ndigests {','.join(digests)}", flush=True)

    node = Node(RealHost(), Identity(os.urandom(32)), config, task=Deep(), on_round=committed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run)
        await node.taking_part.wait()
        print(f"ticket {node.ticket()}", flush=True)


def drift() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        weights = torch.randn(100_000).to(dtype)
        before = weights.float().clone()
        for _ in range(100):
            z = torch.randn(100_000).to(dtype)
            weights.add_(z, alpha=1e-3).sub_(z, alpha=2e-3).add_(z, alpha=1e-3)
        moved = weights.float() - before
        print(
            f"{dtype}, 100 looks in place: rms {float(moved.square().mean().sqrt()):.2g}, max {moved.abs().max():.2g}"
        )
    start = torch.randn(100_000).bfloat16()
    master, plain = start.float(), start
    for round in range(200):
        moves, step = [Move(Direction(seed_of(b"r", round, b"p", 0)), 1e-4)], torch.zeros(100_000)
        descend([("w", master)], moves)
        descend([("w", step)], moves)
        plain = (plain.float() + step).bfloat16()
    lost = float((plain.float() - master).norm() / (master - start.float()).norm())
    print(f"200 steps of 1e-4 without a master: {lost:.0%} of the move is lost")


def main() -> None:
    torch.set_num_threads(1)
    what, number = sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2] if len(sys.argv) > 2 else ""
    match what:
        case "memory" if number:
            trio.run(work, number)
        case "memory":
            for mode in ("inference", "signs", "normal", "sgd"):
                subprocess.run([sys.executable, __file__, "memory", mode], check=True)
        case "nodes":
            nodes(only_founder=number == "founder")
        case "node":
            trio.run(live, number, sys.argv[3])
        case "drift":
            drift()
        case "digits":
            digits(int(number or 6))
        case "adapt":
            adapt(int(number or 1))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
