"""hivemind's DHT: a node in asyncio, and beside each a p2pd daemon in Go that carries its bytes."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.utils.timed_storage import get_dht_time

from .dht_base import DhtWorker

#: Nothing that a swarm on one machine does not need.
PLAIN = {"auto_nat": False, "nat_port_map": False, "use_relay": False, "idle_timeout": 3600}
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
#: Seconds for which the values are stored.
LIFETIME = 3600.0


class HivemindDht(DhtWorker):
    """`DHTNode` itself: `hivemind.DHT` would put it into one more process and pass each call through a pipe."""

    framework = "asyncio"

    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[DHTNode] = []

    def facts(self) -> dict[str, Any]:
        return {"security": "encrypted", "copies": "5"}

    async def begin(self, count: int, hello: dict[str, Any] | None) -> dict[str, Any]:
        for _ in range(count):
            peers = [] if hello is None else hello["peers"]
            node = await DHTNode.create(initial_peers=peers, host_maddrs=LOOPBACK, **PLAIN)
            self._nodes.append(node)
            if hello is None:
                hello = {"peers": await self._addresses(node)}
        return {"peers": await self._addresses(self._nodes[0])}

    async def _addresses(self, node: DHTNode) -> list[str]:
        return [str(address) for address in await node.p2p.get_visible_maddrs(latest=True)]

    def count(self) -> int:
        return len(self._nodes)

    def helpers(self) -> int:
        total = 0
        for node in self._nodes:
            with open(f"/proc/{node.p2p._child.pid}/status") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("RssAnon:"))
        return total

    def helpers_cpu(self) -> float:
        ticks = 0
        for node in self._nodes:
            with open(f"/proc/{node.p2p._child.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def holds(self, node: int, where: str) -> bool:
        protocol, key = self._nodes[node].protocol, DHTID.generate(where)
        return protocol.storage.get(key) is not None or protocol.cache.get(key) is not None

    async def store(self, node: int, name: str, data: bytes) -> str:
        if not await self._nodes[node].store(name, data, get_dht_time() + LIFETIME):
            raise AssertionError("nobody stored it")
        return name

    async def get(self, node: int, where: str) -> bytes | None:
        found = await self._nodes[node].get(where)
        # What it does behind an answer (copies to more nodes) shall not run into the next act.
        await asyncio.sleep(0)
        return None if found is None else bytes(found.value)
