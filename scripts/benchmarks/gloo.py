"""The peer of the group reduce: torch.distributed's gloo backend."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trio

from . import vectors
from .children import Worker, end_now, until


class GlooPeer(Worker):
    """One rank. Blocking calls run in a thread, so that an end of the parent is noticed."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._elements = 0

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "start":
                return {}
            case "meet":
                await trio.to_thread.run_sync(self._meet, arguments["file"], arguments["rank"], arguments["count"])
                return {}
            case "prepare":
                self._elements = arguments["elements"]
                self._base = vectors.base(dist.get_rank(), self._elements)
                self._mean = vectors.mean_base(dist.get_world_size(), self._elements)
                self._tensor = torch.empty_like(self._base)
                return {}
            case "open":
                self._run = arguments["run"]
                torch.add(self._base, self._run, out=self._tensor)
                return {}
            case "go":
                await until(arguments["at"])
                if "dies" in arguments:
                    self.nursery.start_soon(self._die, arguments["dies"], arguments["file"])
                return await trio.to_thread.run_sync(self._reduce)
            case "check":
                # A sum is what gloo is asked for: dividing is not on its bill.
                self._tensor /= dist.get_world_size()
                wrong = vectors.wrong(self._tensor, self._mean, self._run)
                return {"wrong": wrong, "digest": vectors.digest(self._tensor)}
        raise ValueError(order)

    def _meet(self, file: str, rank: int, count: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=timedelta(seconds=120)
        )
        dist.barrier()

    async def _die(self, after: float, file: str) -> None:
        await trio.sleep(after)
        end_now(Path(file))

    def _reduce(self) -> dict[str, Any]:
        began = time.monotonic()
        try:
            dist.all_reduce(self._tensor)
        except RuntimeError as error:
            return {"began": began, "ended": time.monotonic(), "wrong": str(error), "digest": ""}
        return {"began": began, "ended": time.monotonic()}
