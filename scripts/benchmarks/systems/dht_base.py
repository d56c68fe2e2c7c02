"""What every measured DHT is asked to do: some of its nodes in one process, stores, gets, memory."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from ..children import Worker
from .base import many_files, memory


def value(name: str) -> bytes:
    """The 128 bytes that belong to the key ``name``, printable: not every system stores others."""
    return (name + " ").encode().ljust(128, b"=")


class DhtWorker(Worker):
    """A process with some nodes of a DHT. Every act is timed alone, and by the nodes in turns."""

    def __init__(self) -> None:
        self._turn = 0

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match order:
            case "ready":
                many_files()
                return {"kib": memory(), **self.facts()}
            case "begin":
                return await self.begin(arguments["count"], arguments["hello"])
            case "store":
                return {"stored": [await self._store(name) for name in arguments["names"]]}
            case "get":
                return {"times": [await self._get(name, where) for name, where in arguments["keys"]]}
            case "cpu":
                return {"seconds": time.process_time() + self.helpers_cpu()}
            case "memory":
                return {"kib": memory(), "helpers_kib": self.helpers()}
        raise ValueError(order)

    async def _store(self, name: str) -> tuple[float, str]:
        """Seconds, and where a reader finds it."""
        node = self._turn % self.count()
        self._turn += 1
        began = time.perf_counter()
        where = await self.store(node, name, value(name))
        return time.perf_counter() - began, where

    async def _get(self, name: str, where: str) -> float | None:
        """Seconds; None when each node of this process holds the key, so that none has to ask."""
        self._turn += 1
        for offset in range(self.count()):
            node = (self._turn + offset) % self.count()
            if self.holds(node, where):
                continue
            began = time.perf_counter()
            found = await self.get(node, where)
            taken = time.perf_counter() - began
            if found != value(name):
                raise AssertionError(f"{name} was stored, and {found!r} found")
            return taken
        return None

    def facts(self) -> dict[str, Any]:
        """What the table says about it: ``security``, ``copies``."""
        return {}

    def helpers(self) -> int:
        """Resident KiB, not those of mapped files, of other processes that belong to the nodes."""
        return 0

    def helpers_cpu(self) -> float:
        """Seconds of processor time of those."""
        return 0.0

    @abstractmethod
    async def begin(self, count: int, hello: dict[str, Any] | None) -> dict[str, Any]:
        """Start ``count`` nodes that join by ``hello``, without one a new swarm; returns the ``hello`` of the first."""

    @abstractmethod
    def count(self) -> int:
        """How many nodes are here."""

    @abstractmethod
    def holds(self, node: int, where: str) -> bool:
        """Whether this node has the key itself, stored or in a cache."""

    @abstractmethod
    async def store(self, node: int, name: str, data: bytes) -> str:
        """Store a new key; returns what :meth:`get` is to be called with. Raises when nobody else took it."""

    @abstractmethod
    async def get(self, node: int, where: str) -> bytes | None: ...
