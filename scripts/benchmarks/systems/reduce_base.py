"""What every measured all-reduce is asked to do: find together, take a tensor, average it at a given moment."""

from __future__ import annotations

import asyncio
import os
import time
from abc import abstractmethod
from typing import Any

import torch
import trio
from torch import Tensor

from .. import vectors
from ..children import Worker, until


class ReducePeer(Worker):
    """One peer. What it holds afterwards, and a digest of it, is looked at when the clock has stopped."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                return await self.begin()
            case "meet":
                self._rank, self._count = arguments["rank"], len(arguments["everybody"])
                await self.meet(arguments["everybody"], self._rank)
                return {}
            case "prepare":
                self._base = vectors.base(self._rank, arguments["elements"])
                self._mean = vectors.mean_base(self._count, arguments["elements"])
                self._tensor = torch.empty_like(self._base)
                return {}
            case "open":
                self._run = arguments["run"]
                torch.add(self._base, self._run, out=self._tensor)
                await self.open(self._run)
                return {}
            case "go":
                await self.until(arguments["at"])
                return await self._reduce()
            case "check":
                wrong = vectors.wrong(self._result, self._mean, self._run, self.tolerance)
                return {"wrong": wrong, "digest": vectors.digest(self._result)}
        raise ValueError(order)

    async def _reduce(self) -> dict[str, Any]:
        cpu, began = self.cpu(), time.monotonic()
        self._result = await self.reduce(self._tensor)
        return {"began": began, "ended": time.monotonic(), "cpu": self.cpu() - cpu}

    #: How far a value may be from the mean: float32's rounding.
    tolerance = 1e-4

    def cpu(self) -> float:
        """Seconds of processor time so far, helping processes too."""
        return time.process_time()

    async def until(self, moment: float) -> None:
        if self.framework == "trio":
            await until(moment)
        else:
            await asyncio.sleep(max(0.0, moment - time.monotonic()))

    async def open(self, run: int) -> None:
        """What is done before a round while its contribution is still being made."""

    @abstractmethod
    async def begin(self) -> dict[str, Any]:
        """Start; what the others must know to find us."""

    @abstractmethod
    async def meet(self, everybody: list[dict[str, Any]], rank: int) -> None:
        """``everybody``: what :meth:`begin` said on each, by rank."""

    @abstractmethod
    async def reduce(self, tensor: Tensor) -> Tensor:
        """The mean over all peers; may be ``tensor`` itself."""


class BlockingPeer(ReducePeer):
    """A system whose calls block: they run in a thread, so that an end of the parent is noticed."""

    async def begin(self) -> dict[str, Any]:
        return await trio.to_thread.run_sync(self.begin_blocking)

    async def meet(self, everybody: list[dict[str, Any]], rank: int) -> None:
        await trio.to_thread.run_sync(self.meet_blocking, everybody, rank)

    async def open(self, run: int) -> None:
        await trio.to_thread.run_sync(self.open_blocking, run)

    async def reduce(self, tensor: Tensor) -> Tensor:
        return await trio.to_thread.run_sync(self.reduce_blocking, tensor)

    def open_blocking(self, run: int) -> None: ...

    @abstractmethod
    def begin_blocking(self) -> dict[str, Any]: ...

    @abstractmethod
    def meet_blocking(self, everybody: list[dict[str, Any]], rank: int) -> None: ...

    @abstractmethod
    def reduce_blocking(self, tensor: Tensor) -> Tensor: ...


def cpu_of(pid: int) -> float:
    """Seconds of processor time of another process (Linux)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
