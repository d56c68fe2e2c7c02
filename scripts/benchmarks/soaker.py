"""One node of the soak: everything of a real one but the command line, reducing vectors that anybody can compute."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trio
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.directions import Direction, Move
from shoal.learning.events import Event, RoundReport
from shoal.learning.shard import Shard
from shoal.learning.task import Task
from shoal.learning.worker import Part, TrainResult
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.ticket import Ticket
from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId

from .children import Worker

#: Numbers in the state: a quarter of the longest vector that is reduced (a round may reduce four times the state).
STATE = 1 << 16
#: Elements of the shortest and longest vector, as powers of two: 4 KiB to 1 MiB.
SHORTEST, LONGEST = 10, 18


def length(round: int) -> int:
    """Elements of the vectors of a round, the same for all: as many short ones as long ones, never a round number."""
    draw = np.random.default_rng(round)
    return int(2 ** draw.uniform(SHORTEST, LONGEST))


def contribution(peer: bytes, round: int) -> Tensor:
    """What ``peer`` contributes to ``round``: whole numbers as float32, shape ``(length(round),)``."""
    seed = int.from_bytes(hashlib.blake2b(peer + round.to_bytes(8, "big"), digest_size=8).digest(), "big")
    drawn = np.random.default_rng(seed).integers(-100, 100, length(round), dtype=np.int8)
    return torch.from_numpy(drawn.astype(np.float32))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(STATE))


class Drift(Task):
    """Only names the model: :class:`Draws` trains it."""

    name = "soak"

    def model(self) -> nn.Module:
        return Flat()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)

    def batches(self, shard: Shard) -> Any:
        raise NotImplementedError("nothing is trained on batches here")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        raise NotImplementedError("nothing is trained on batches here")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"zero": 0.0}


class Draws:
    """A trainer whose gradient is :func:`contribution` and whose state remembers every mean that was applied."""

    def __init__(self, peer: PeerId) -> None:
        self.model: nn.Module = Flat()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.mean: Tensor | None = None
        self._peer, self._round = peer, 0
        self._state = torch.zeros(STATE)

    def set_shard(self, shard: Shard) -> None:
        self._round = shard.round

    def reset_optimizer(self) -> None: ...

    async def train(self, steps: int | None = None, seconds: float | None = None) -> TrainResult:
        raise NotImplementedError("the soak takes gradients")

    async def gradient(self) -> tuple[Tensor, TrainResult]:
        await trio.lowlevel.checkpoint()
        return contribution(self._peer.key, self._round), TrainResult(1, 1, 0.0, 0.0)

    async def apply(self, gradient: Tensor) -> None:
        await trio.lowlevel.checkpoint()
        self.mean, size = gradient, min(STATE, gradient.numel())
        # Halved, then added to: a mean that was missed, or applied twice, shows in every later state.
        self._state[:size] = exact.add(self._state[:size] * 0.5, gradient[:size])

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]:
        raise NotImplementedError("the soak takes gradients")

    async def descend(self, moves: Sequence[Move]) -> None:
        raise NotImplementedError("the soak takes gradients")

    async def weights(self, out: Tensor | None = None) -> Tensor:
        await trio.lowlevel.checkpoint()
        return self._state.clone() if out is None else out.copy_(self._state)

    async def load(self, vector: Tensor) -> None:
        await trio.lowlevel.checkpoint()
        self._state = vector.clone()

    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]:
        await trio.lowlevel.checkpoint()
        return {"zero": 0.0}


class Soaker(Worker):
    """Orders: ``begin`` (returns once it takes part in the run), ``look`` (what it takes up now), ``stop``."""

    def __init__(self) -> None:
        exact.prepare_torch()
        self._said = 0
        self._ended = trio.Event()
        self._events: list[str] = []

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "begin":
                return await self._begin(**arguments)
            case "look":
                return self._look()
            case "stop":
                self._node.stop()
                await self._ended.wait()
                return {"outcome": self._node.outcome}
        raise ValueError(order)

    async def _begin(
        self, folder: str, number: int, peers: int, port: int, ticket: str, key: str, life: int
    ) -> dict[str, Any]:
        self._number, self._peers = number, peers
        identity = Identity(bytes.fromhex(key))
        home = Path(folder) / f"node-{number}"
        home.mkdir(exist_ok=True)
        # Written with one call for each line: what was said stays said after a SIGKILL.
        self._log = os.open(Path(folder) / f"rounds-{number}-{life}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._trainer = Draws(identity.peer_id)
        founding = Founding(strategy="allreduce", mode="strict", min_peers=peers)
        config = NodeConfig(
            bind=(Address("tcp", "127.0.0.1", port),),
            folder=home / "run",
            documents=home / "documents.sqlite",
            founding=None if ticket or number else founding,
            ticket=Ticket.parse(ticket) if ticket else None,
            evaluate_every=0,
        )
        self._node = Node(
            RealHost(),
            identity,
            config,
            task=Drift(),
            trainer=self._trainer,
            on_round=self._round,
            on_event=self._event,
        )
        self.nursery.start_soon(self._live)
        await self._node.taking_part.wait()
        found = self._node.ticket()
        port = self._node.endpoint.addresses()[0].port
        return {"peer": identity.peer_id.text, "ticket": "" if found is None else found.encode(), "port": port}

    async def _live(self) -> None:
        await self._node.run()
        self._ended.set()

    def _round(self, report: RoundReport, samples: int) -> None:
        wrong = ""
        if report.round % self._peers == self._number:
            wrong = self._check(report)
        line = [report.round, report.digest, report.wall_s, wrong]
        os.write(self._log, json.dumps(line).encode() + b"\n")

    def _check(self, report: RoundReport) -> str:
        """What is wrong with the mean of a round, bit for bit."""
        parts = [contribution(PeerId.parse(member).key, report.round) for member in report.members]
        mean, expected = self._trainer.mean, exact.weighted_mean(parts, [1.0] * len(parts)) if parts else None
        if mean is None or expected is None or torch.equal(mean, expected):
            return ""
        return f"round {report.round} is not the mean over its {len(parts)} members"

    def _event(self, event: Event) -> None:
        if event.phase == "run" or event.what not in ("begin", "done", "members"):
            what = f"{event.round} {event.phase} {event.what} {event.peer[:8]} {event.detail[:160]}"
            self._events = [*self._events[-30:], f"{time.monotonic():.2f} {what}"]

    def _look(self) -> dict[str, Any]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        status = self._node.status()
        return {
            "rss": pages * os.sysconf("SC_PAGE_SIZE"),
            "fds": len(os.listdir("/proc/self/fd")),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "round": 0 if status is None else status.round,
            "phase": "" if status is None else f"{status.phase}: {status.reason}",
            "ticket": ticket.encode() if (ticket := self._node.ticket()) is not None else "",
            "events": self._events,
        }
