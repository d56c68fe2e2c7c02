"""Shoal's DHT: links with encryption over TCP, signed records that their author can replace."""

from __future__ import annotations

import time
from typing import Any

from shoal.dht.kademlia import records
from shoal.dht.kademlia.node import Dht
from shoal.dht.kademlia.records import SignedRecord, owned_key
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

from .dht_base import DhtWorker

#: Seconds for which the records are stored.
LIFETIME = 3600.0


class ShoalDht(DhtWorker):
    """Records of the namespace ``owned``: a read takes three holders that agree."""

    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[Dht] = []

    def facts(self) -> dict[str, Any]:
        return {"security": "encrypted, signed", "copies": "20"}

    async def begin(self, count: int, hello: dict[str, Any] | None) -> dict[str, Any]:
        for _ in range(count):
            host = RealHost()
            endpoint = Endpoint(host, Identity(host.entropy(32)))
            assert endpoint._acceptor.throttle is not None
            endpoint._acceptor.throttle = None  # all the handshakes of a run come from one address
            await self.nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            node = Dht(endpoint)
            self.nursery.start_soon(node.run)
            if hello is not None:
                await node.bootstrap([Address.parse(hello["address"])])
            else:
                hello = {"address": str(endpoint.addresses()[0])}
            self._nodes.append(node)
        return {"address": str(self._nodes[0].endpoint.addresses()[0])}

    def count(self) -> int:
        return len(self._nodes)

    def holds(self, node: int, where: str) -> bool:
        return self._nodes[node].store.get("owned", bytes.fromhex(where), time.time()) is not None

    async def store(self, node: int, name: str, data: bytes) -> str:
        identity = self._nodes[node].endpoint.identity
        key = owned_key(identity.peer_id, name.encode())
        expires = time.time() + LIFETIME
        if not await self._nodes[node].put(SignedRecord.sign(identity, "owned", key, data, seq=1, expires=expires)):
            raise AssertionError("nobody stored it")
        return key.hex()

    async def get(self, node: int, where: str) -> bytes | None:
        records._verified.cache_clear()  # another node of this process may have checked the same signature
        found = await self._nodes[node].get("owned", bytes.fromhex(where))
        return None if found is None else found.value
