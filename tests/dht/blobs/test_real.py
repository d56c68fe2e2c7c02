"""The same over real sockets, encrypted, to a real disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from shoal.dht.blobs.ends import MemorySource
from shoal.dht.blobs.messages import CHUNKS, AskChunks, Sent
from shoal.dht.blobs.node import Blobs
from shoal.dht.blobs.store import Store
from shoal.dht.kademlia.node import Dht
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.rpc import Call

from .swarm import content


async def peer(nursery: trio.Nursery, store: Store) -> Blobs:
    host = RealHost()
    endpoint = Endpoint(host, Identity(host.entropy(32)))
    await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
    return Blobs(endpoint, Dht(endpoint), store)


@pytest.mark.real
async def test_a_blob_from_three_holders_of_whom_one_lies_ends_up_whole_on_disk(tmp_path: Path) -> None:
    tree, parts = content(24)
    async with trio.open_nursery() as nursery:
        fetcher = await peer(nursery, Store(tmp_path / "mine"))
        holders = [await peer(nursery, Store(None)) for _ in range(2)]
        keeper = await peer(nursery, Store(tmp_path / "theirs"))
        keeper.store.put(tree, parts)
        for holder in holders:
            holder.offer(MemorySource(tree, parts))

        async def lie(call: Call[AskChunks]) -> Sent:
            for index in call.request.chunks:
                await call.write(bytes(tree.chunk_size(index)))
            return Sent()

        holders[0].endpoint.serve(CHUNKS, lie)
        for holder in (*holders, keeper):
            await fetcher.endpoint.identify(holder.endpoint.addresses()[0])
        done = await fetcher.fetch_to_store(
            tree.id, peers=[each.endpoint.peer_id for each in (*holders, keeper)], patience=10.0
        )
        assert [liar for liar, _ in done.liars] == [holders[0].endpoint.peer_id]
        assert {who for who, _ in done.received} <= {holders[1].endpoint.peer_id, keeper.endpoint.peer_id}
        nursery.cancel_scope.cancel()
    fetcher.store.close()
    again = Store(tmp_path / "mine")
    entry = again.entry(tree.id)
    assert entry is not None and entry.complete
    out = bytearray(len(parts[1]))
    assert again.read_part(tree.id, 1, memoryview(out)) and out == parts[1]
    again.close()
    keeper.store.close()
