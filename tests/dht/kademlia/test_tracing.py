"""A lookup tells of each of its queries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from shoal.dht.kademlia.keys import node_key

OpenSwarm = Callable[..., AbstractAsyncContextManager[Any]]


async def test_each_query_is_told_with_what_became_of_it(open_swarm: OpenSwarm) -> None:
    async with open_swarm() as swarm:
        founder = await swarm.add("founder")
        for number in range(6):
            await (await swarm.add(f"n{number}")).dht.bootstrap([founder.address])
        await trio.sleep(60)
        gone = swarm.nodes["n0"]
        gone.scope.cancel()
        await gone.stopped.wait()
        target = node_key(swarm.nodes["n5"].identity.peer_id)
        lookup, queries, seconds = await founder.dht.trace(target, paths=2)
        assert seconds > 0
        assert {query.peer for query in queries if not query.failure} == set(lookup.closest)
        failed = [query for query in queries if query.failure]
        assert [query.peer for query in failed] == [gone.identity.peer_id]
        assert failed[0].named == 0
        assert all(query.hop == 1 for query in queries)  # it knows everybody itself
        (nearest,) = [query for query in queries if query.bits == 0]
        assert nearest.peer == swarm.nodes["n5"].identity.peer_id
        assert all(0 <= query.began <= query.began + query.seconds <= seconds for query in queries)
        assert founder.dht.lost <= 1
