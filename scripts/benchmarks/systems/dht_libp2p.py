"""py-libp2p's Kademlia over Noise and yamux."""

from __future__ import annotations

from typing import Any

import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from .dht_base import DhtWorker
from .libp2p import host, serve

PREFIX = "/bench/"


class Anything(Validator):
    """Every system here takes what it is given, but for Shoal."""

    def validate(self, key: str, value: bytes) -> None:
        pass

    def select(self, key: str, values: list[bytes]) -> int:
        return 0


class Libp2pDht(DhtWorker):
    def __init__(self) -> None:
        super().__init__()
        self._nodes: list[KadDHT] = []

    def facts(self) -> dict[str, Any]:
        return {"security": "encrypted", "copies": "20"}

    async def begin(self, count: int, hello: dict[str, Any] | None) -> dict[str, Any]:
        first = ""
        for _ in range(count):
            one = host()
            address = (await self.nursery.start(serve, one))["address"]
            validator = NamespacedValidator({"bench": Anything()})
            # 32 nodes of one machine are one subnet to it.
            node = KadDHT(one, DHTMode.SERVER, validator=validator, validator_changed=True, max_peers_per_subnet=0)
            await self.nursery.start(_run, node)
            self._nodes.append(node)
            first = first or address
            if hello is None:
                hello = {"address": address}
            else:
                info = info_from_p2p_addr(Multiaddr(hello["address"]))
                await one.connect(info)
                await node.add_peer(info.peer_id)
                await node.peer_routing.find_closest_peers_network(one.get_id().to_bytes())
                await node.peer_routing.refresh_routing_table()
        return {"address": first}

    def count(self) -> int:
        return len(self._nodes)

    def holds(self, node: int, where: str) -> bool:
        return bool(self._nodes[node].value_store.has(where.encode()))

    async def store(self, node: int, name: str, data: bytes) -> str:
        await self._nodes[node].put_value(PREFIX + name, data)
        return PREFIX + name

    async def get(self, node: int, where: str) -> bytes | None:
        return await self._nodes[node].get_value(where)


async def _run(node: KadDHT, *, task_status: trio.TaskStatus[None]) -> None:
    async with background_trio_service(node):
        task_status.started()
        await trio.sleep_forever()
