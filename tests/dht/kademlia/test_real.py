"""The same DHT over kernel TCP on this machine."""

from __future__ import annotations

import pytest
import trio

from shoal.dht.kademlia.keys import digest
from shoal.dht.kademlia.node import Dht
from shoal.dht.kademlia.records import SignedRecord
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity


@pytest.mark.real
async def test_records_and_providers_are_found_over_tcp_and_encryption() -> None:
    async with trio.open_nursery() as nursery:
        nodes: list[Dht] = []
        for _ in range(6):
            host = RealHost()
            endpoint = Endpoint(host, Identity(host.entropy(32)))
            await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            dht = Dht(endpoint)
            await nursery.start(dht.run)
            if nodes:
                assert await dht.bootstrap(nodes[0].endpoint.addresses()[:1]) == len(nodes)
            nodes.append(dht)
        author = nodes[2]
        expires = author.host.wall() + 600
        spec = SignedRecord.sign(author.endpoint.identity, "run", digest(b"spec"), b"spec", seq=0, expires=expires)
        assert await author.put(spec) == 5
        assert await author.provide(spec.key) == 5
        for node in nodes:
            assert await node.get("run", spec.key) == spec
        found = await nodes[5].providers(spec.key)
        assert [record.open(expires).peer for record in found] == [author.endpoint.peer_id]
        nursery.cancel_scope.cancel()
