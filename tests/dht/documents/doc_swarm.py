"""Nodes with documents in virtual time, over the network in memory: for tests of what travels."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pycrdt
import trio

from shoal.dht.documents.document import Document
from shoal.dht.documents.policy import DocumentSpec, Members
from shoal.dht.documents.service import Documents
from shoal.dht.documents.store import DocumentStore
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import MemoryWorld
from shoal.transport.memory_flow import Route

from ..kademlia.conftest import VirtualHost

SCOPE = b"a run"
SPEC = DocumentSpec("facts", SCOPE, Members("of the test"))


def put(**values: Any) -> Callable[[pycrdt.Doc[Any]], None]:
    """A change: these keys of the map ``entry``."""

    def change(doc: pycrdt.Doc[Any]) -> None:
        doc.get("entry", type=pycrdt.Map).update(values)

    return change


class DocNode:
    """One node; ``document`` is :data:`SPEC`, open."""

    def __init__(self, swarm: DocSwarm, name: str, life: int, every: float) -> None:
        self.swarm, self.name = swarm, name
        self.host = VirtualHost(swarm.world.network(name), f"{swarm.seed} {name} {life}")
        self.address = Address("mem", name, 1)
        self.identity = Identity(random.Random(f"{swarm.seed} {name}").randbytes(32))
        self.endpoint = Endpoint(self.host, self.identity)
        self.store = swarm.stores.setdefault(name, DocumentStore(None))
        self.documents = Documents(self.endpoint, self.store, reconcile_every=every)
        self.document: Document
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.endpoint.run, [self.address])
                self.documents.join(SCOPE, self.swarm.members)
                self.document = await self.open(SPEC)
                self.swarm.introduce(self)
                await nursery.start(self.documents.run)
                task_status.started()
        self.stopped.set()

    async def open(self, spec: DocumentSpec) -> Document:
        return await self.documents.open(spec, self.swarm.is_member)

    def value(self, author: DocNode, key: str, document: Document | None = None) -> Any:
        """What this node reads of what ``author`` put under ``key``."""
        return (document or self.document).read().get(author.peer, {}).get("entry", {}).get(key)


class DocSwarm:
    """``nodes`` by name; all of them are members, and ``strangers`` are not."""

    def __init__(self, nursery: trio.Nursery, seed: int, latency: float) -> None:
        self.seed = seed
        self.world = MemoryWorld(random.Random(seed), default=Route(latency=latency))
        self.nodes: dict[str, DocNode] = {}
        self.known: dict[PeerId, None] = {}
        self.stores: dict[str, DocumentStore] = {}
        self._nursery, self._lives = nursery, 0

    def members(self) -> tuple[PeerId, ...]:
        return tuple(self.known)

    def is_member(self, peer: PeerId) -> bool:
        return peer in self.known

    async def add(self, name: str, *, member: bool = True, every: float = 20.0) -> DocNode:
        self._lives += 1
        node = self.nodes[name] = DocNode(self, name, self._lives, every)
        if member:
            self.known[node.peer] = None
        await self._nursery.start(partial(node.run))
        return node

    async def grow(self, count: int, *, every: float = 20.0) -> list[DocNode]:
        return [await self.add(f"n{number}", every=every) for number in range(count)]

    def introduce(self, node: DocNode) -> None:
        """Everybody has everybody's contact."""
        for other in self.nodes.values():
            if other is not node and other.endpoint.addresses():
                other.endpoint.learn(node.endpoint.record())
                node.endpoint.learn(other.endpoint.record())

    def kill(self, name: str) -> None:
        self.world.kill(name)
        self.nodes.pop(name).scope.cancel()

    async def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> float:
        """Wait until ``condition`` holds, looking every tenth of a virtual second; how long that took."""
        start = trio.current_time()
        with trio.fail_after(seconds):
            while not condition():
                await trio.sleep(0.1)
        return trio.current_time() - start

    def agree(self, nodes: Iterable[DocNode] | None = None) -> bool:
        """Whether all of ``nodes`` hold the same."""
        return len({node.document.replica.digest() for node in nodes or self.nodes.values()}) == 1


@asynccontextmanager
async def doc_swarm(seed: int = 0, latency: float = 0.01) -> AsyncIterator[DocSwarm]:
    async with trio.open_nursery() as nursery:
        yield DocSwarm(nursery, seed, latency)
        nursery.cancel_scope.cancel()
