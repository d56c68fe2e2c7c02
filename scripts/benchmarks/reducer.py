"""One peer of the group reduce: an endpoint, and rounds one after the other without a run around them."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import trio
from torch import Tensor

from shoal.learning import defaults, exact
from shoal.learning.reduce.coding import PLAIN, Coding
from shoal.learning.rounds.actions import Note, Pace
from shoal.learning.rounds.hub import Hub
from shoal.learning.rounds.instance import Instance
from shoal.learning.rounds.messages import Accepted, CommitRecord, instance_key
from shoal.learning.rounds.post import Post
from shoal.learning.rounds.presence import Presence
from shoal.learning.rounds.setting import Setting
from shoal.learning.rounds.terms import Terms, fill
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId

from . import vectors
from .children import Worker, until

RUN = bytes(32)
PACE = Pace(grace=30.0, suspect=30.0, scatter=30.0, gather=30.0, accept=defaults.ACCEPT_WAIT)
#: Seconds for one round: far beyond every wait of a healthy one.
ROUND_LIMIT = 120.0


def resident() -> int:
    """Bytes of memory of this process."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    """From now on :func:`peak` says what is most from now on (Linux; elsewhere it is that of the process's life)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes of memory that this process has had."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def genesis(voters: tuple[PeerId, ...]) -> CommitRecord:
    """The record before the first round: the same for all."""
    return CommitRecord(RUN, 0, "genesis", b"", (), (), (), voters, 0, 0, b"", (), "", b"", "")


class ShoalPeer(Worker):
    """Builds for each round what :mod:`shoal.learning.chain` and :mod:`shoal.learning.run` build, less the training."""

    def __init__(self) -> None:
        exact.prepare_torch()
        self._host = RealHost()
        self._endpoint = Endpoint(self._host, Identity(self._host.entropy(32)))
        self._coding, self._resident = PLAIN, 0
        self._notes: list[tuple[float, Note]] = []
        self._votes: dict[bytes, tuple[int, Accepted | None]] = {}
        self._result: Tensor | None = None

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                await self.nursery.start(self._endpoint.run, [Address("tcp", "127.0.0.1", 0)])
                self._post = self._make_post()
                self._presence = Presence(self._endpoint, self.nursery)
                self._hub = Hub(self._endpoint, self._post)
                self._presence.on_change = self._hub.peer_changed
                return {"peer": self._endpoint.peer_id.text, "address": str(self._endpoint.addresses()[0])}
            case "meet":
                return await self._meet(arguments["everybody"], arguments["rank"])
            case "prepare":
                self._base = vectors.base(self._rank, arguments["elements"])
                self._vector = torch.empty_like(self._base)
                self._mean = vectors.mean_base(len(self._voters), arguments["elements"])
                self._vector.zero_()
                self._resident = resident()
                reset_peak()
                return {}
            case "open":
                self._coding = Coding.of(arguments.get("codec", "fp32"))
                return self._open(arguments["run"])
            case "go":
                await until(arguments["at"])
                return await self._reduce()
            case "check":
                return self._look()
        raise ValueError(order)

    async def _meet(self, everybody: list[list[str]], rank: int) -> dict[str, Any]:
        """Connect to those after us; those before us connect to us."""
        self._rank = rank
        self._voters = tuple(sorted(PeerId.parse(peer) for peer, _ in everybody))
        self._head = genesis(self._voters)
        for peer, address in everybody[rank + 1 :]:
            await self._endpoint.connect(PeerId.parse(peer), [Address.parse(address)])
        complete = trio.Event()

        def look(_: object = None) -> None:
            if len(self._endpoint.links()) >= len(everybody) - 1:
                complete.set()

        self._endpoint.on_link.append(look)
        look()
        await complete.wait()
        self._endpoint.on_link.remove(look)
        self._presence.watch(self._voters)
        return {"cipher": self._endpoint.links()[0].cipher}

    def _open(self, run: int) -> dict[str, Any]:
        """The next round opens while its contribution is still being made."""
        self._run, head = run, self._head
        key = instance_key(RUN, head.round + 1, head.digest, self._voters)

        base = attrs.evolve(head, round=head.round + 1, prev=head.digest, state=b"", reason="")

        def check(record: CommitRecord) -> str | None:
            if (record.run, record.round, record.prev) != (RUN, head.round + 1, head.digest):
                return "it does not follow our last commit"
            return self._wrong_members(record)

        def save(promised: int, accepted: Accepted | None) -> None:
            self._votes[key] = (promised, accepted)

        setting = Setting(
            key=key,
            round=head.round + 1,
            prev=head.digest,
            voters=self._voters,
            terms=Terms(partial(fill, lambda: base), lambda: (), lambda: (), False, defaults.MAX_ROSTER),
            pace=self._pace(),
            check=check,
            max_length=len(self._base),
            save=save,
            stored=None,
            note=self._on_note,
            hold=lambda phase: False,
        )
        self._instance = Instance(self._endpoint, self._post, setting, self._presence.lost, self._hub.memory)
        self._hub.add(self._instance)
        self.nursery.start_soon(self._instance.run)
        torch.add(self._base, run, out=self._vector)
        return {}

    # What a benchmark of faults does otherwise:

    def _make_post(self) -> Post:
        return Post(self._endpoint, self.nursery)

    def _pace(self) -> Pace:
        return PACE

    def _wrong_members(self, record: CommitRecord) -> str | None:
        return None if record.members == self._voters else "somebody is missing"

    def _on_note(self, note: Note) -> None:
        self._notes.append((time.monotonic(), note))

    def _check_result(self, result: Tensor, record: CommitRecord) -> str | None:
        return vectors.wrong(result, self._mean, self._run, 1e-4 if self._coding.plain else 0.03 * (128 + self._run))

    def _look(self) -> dict[str, Any]:
        """At the result of the last reduce."""
        result, self._result = self._result, None  # its memory is for the next round
        if result is None:
            return {"wrong": "it has no result", "digest": ""}
        return {"wrong": self._check_result(result, self._head), "digest": vectors.digest(result)}

    async def _reduce(self) -> dict[str, Any]:
        instance, vector = self._instance, self._vector
        self._notes.clear()
        sent = sum(link.bytes_sent for link in self._endpoint.links())
        cpu = time.process_time()
        began = time.monotonic()
        result = None
        with trio.move_on_after(ROUND_LIMIT):
            why = await self._host.run_blocking(exact.check_finite, vector)
            given = vector if why is None else None
            instance.begin(given, 1, 1, len(vector), why or "", coding=self._coding)
            result = await instance.outcome()
        ended = time.monotonic()
        cpu = time.process_time() - cpu
        most = peak()
        if result is None or instance.commit is None:
            notes = "; ".join(f"{note.phase} {note.what} {note.detail}" for _, note in self._notes)
            return {"wrong": f"no result after {ROUND_LIMIT:.0f} s: {instance.voter.reason} ({notes})", "digest": ""}
        self._head, self._result = instance.commit.record, result
        self._hub.remember(instance.commit)
        self._votes.clear()
        return {
            "began": began,
            "ended": ended,
            "attempts": instance.voter.attempt + 1,
            "cpu": cpu,
            "memory": resident() - self._resident,
            "peak": most - self._resident,
            "buffers": self._hub.memory.held,
            "sent": sum(link.bytes_sent for link in self._endpoint.links()) - sent,
            "notes": [[note.phase, note.what, at, note.detail] for at, note in self._notes],
        }
