"""kademlia of PyPI: UDP, nothing encrypted, signed or checked."""

from __future__ import annotations

from typing import Any

from kademlia.network import Server
from kademlia.utils import digest

from .dht_base import DhtWorker


class KademliaDht(DhtWorker):
    framework = "asyncio"

    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[Server] = []

    def facts(self) -> dict[str, Any]:
        return {"security": "none", "copies": "20"}

    async def begin(self, count: int, hello: dict[str, Any] | None) -> dict[str, Any]:
        for _ in range(count):
            node = Server()
            await node.listen(0, "127.0.0.1")
            self._nodes.append(node)
            if hello is not None:
                await node.bootstrap([("127.0.0.1", hello["port"])])
            else:
                hello = {"port": node.transport.get_extra_info("sockname")[1]}
        return {"port": self._nodes[0].transport.get_extra_info("sockname")[1]}

    def count(self) -> int:
        return len(self._nodes)

    def holds(self, node: int, where: str) -> bool:
        return digest(where) in self._nodes[node].storage.data

    async def store(self, node: int, name: str, data: bytes) -> str:
        if not await self._nodes[node].set(name, data):
            raise AssertionError("nobody stored it")
        return name

    async def get(self, node: int, where: str) -> bytes | None:
        found = await self._nodes[node].get(where)
        return None if found is None else bytes(found)
