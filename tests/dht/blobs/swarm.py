"""Peers with blobs in virtual time, some of them honest."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from shoal.dht.blobs.ends import MemorySink, MemorySource, Sink
from shoal.dht.blobs.fetch import Fetched
from shoal.dht.blobs.node import Blobs
from shoal.dht.blobs.store import Store
from shoal.dht.blobs.tree import Tree, build_tree
from shoal.dht.kademlia.node import Dht
from shoal.sim.virtual import VirtualHost
from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.endpoint import Endpoint
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import MemoryWorld
from shoal.transport.memory_flow import Route


@attrs.define(eq=False)
class Node:
    name: str
    blobs: Blobs
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def peer(self) -> PeerId:
        return self.blobs.endpoint.peer_id


class Swarm:
    """``nodes[0]`` fetches; everybody knows everybody."""

    def __init__(self, nursery: trio.Nursery, latency: float = 0.02) -> None:
        self.world = MemoryWorld(random.Random(1), default=Route(latency=latency))
        self.nursery = nursery
        self.nodes: list[Node] = []
        self.told: list[tuple[str, PeerId, str]] = []

    async def add(self, store: Store | None = None, *, announce: bool = False) -> Node:
        name = f"n{len(self.nodes)}"
        host = VirtualHost(name, self.world, seed=5)
        host.ciphers = NOMINAL_CIPHERS
        endpoint = Endpoint(host, Identity(host.entropy(32)))
        dht = Dht(endpoint)
        node = Node(name, Blobs(endpoint, dht, store or Store(None)))
        self.nodes.append(node)

        async def live(task_status: trio.TaskStatus[None]) -> None:
            with node.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(endpoint.run, [Address("mem", name, 1)])
                    nursery.start_soon(dht.run)
                    if announce:
                        nursery.start_soon(node.blobs.run)
                    task_status.started()

        await self.nursery.start(live)
        for other in self.nodes[:-1]:
            if not other.scope.cancel_called:
                await dht.bootstrap([Address("mem", other.name, 1)])
        return node

    def kill(self, node: Node) -> None:
        self.world.kill(node.name)
        node.scope.cancel()

    async def fetch(
        self, tree: Tree, peers: Sequence[Node], *, search: bool = False, patience: float = 5.0
    ) -> tuple[Fetched, list[bytearray]]:
        """Fetch to memory; what is returned was compared with nothing yet."""
        buffers: list[bytearray] = []

        async def sink(found: Tree) -> Sink:
            buffers.extend(bytearray(part.size) for part in found.outline.parts)
            return MemorySink(found, [memoryview(buffer) for buffer in buffers])

        done = await self.nodes[0].blobs.fetch(
            tree.id,
            sink,
            peers=[node.peer for node in peers],
            search=search,
            patience=patience,
            tell=lambda what, peer, detail: self.told.append((what, peer, detail)),
        )
        return done, buffers


@asynccontextmanager
async def swarm(latency: float = 0.02) -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery, latency)
        nursery.cancel_scope.cancel()


def content(mib: float, seed: int = 1, *, extra: int = 3) -> tuple[Tree, list[bytes]]:
    """A blob of one large part and some small ones."""
    rng = random.Random(seed)
    parts = [rng.randbytes(8), rng.randbytes(int(mib * (1 << 20))), *(rng.randbytes(40 * n) for n in range(extra))]
    return build_tree([(f"part {n}", "U8", data) for n, data in enumerate(parts)]), parts


def offer(node: Node, tree: Tree, parts: Sequence[bytes]) -> None:
    node.blobs.offer(MemorySource(tree, parts))


Answer = Callable[..., object]
