"""A swarm of real endpoints and DHTs in virtual time, over the network in memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

import pytest
import trio

from shoal.dht.kademlia.node import Dht
from shoal.dht.kademlia.records import VALIDATORS, Validator
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import Host
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryWorld
from shoal.transport.memory_flow import Route
from shoal.transport.network import Network

T = TypeVar("T")


class VirtualHost(Host):
    """The world of one node in virtual time. ``skew``: seconds its wall clock is ahead."""

    def __init__(self, network: Network, seed: str, skew: float = 0.0) -> None:
        self.network = network
        self.random = random.Random(seed)
        self._entropy = random.Random(seed + " entropy")
        self.skew = skew

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return 1.7e9 + trio.current_time() + self.skew

    def entropy(self, n: int) -> bytes:
        return self._entropy.randbytes(n)

    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        return fn(*args)


class SwarmNode:
    """One node of a :class:`Swarm`."""

    def __init__(self, name: str, host: VirtualHost, serve: bool, validators: Mapping[str, Validator]) -> None:
        self.name = name
        self.host = host
        self.address = Address("mem", name, 1)
        self.identity = Identity(host.entropy(32))
        self.endpoint = Endpoint(host, self.identity)
        self.dht = Dht(self.endpoint, serve=serve, validators=validators)
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.endpoint.run, [self.address])
                await nursery.start(self.dht.run)
                task_status.started()
        self.stopped.set()


class Swarm:
    """Nodes in one memory world, in the caller's nursery."""

    def __init__(self, nursery: trio.Nursery, seed: int, latency: float) -> None:
        self.world = MemoryWorld(random.Random(seed), default=Route(latency=latency))
        self.nodes: dict[str, SwarmNode] = {}
        self._nursery = nursery
        self._seed = seed

    async def add(
        self,
        name: str,
        via: SwarmNode | None = None,
        *,
        serve: bool = True,
        skew: float = 0.0,
        validators: Mapping[str, Validator] = VALIDATORS,
    ) -> SwarmNode:
        host = VirtualHost(self.world.network(name), f"{self._seed} {name}", skew)
        node = self.nodes[name] = SwarmNode(name, host, serve, validators)
        await self._nursery.start(partial(node.run))
        if via is not None:
            await node.dht.bootstrap([via.address])
        return node

    async def grow(self, count: int) -> list[SwarmNode]:
        """``count`` nodes, each joining through a random earlier one."""
        rng = random.Random(self._seed)
        for number in range(count):
            via = rng.choice(list(self.nodes.values())) if self.nodes else None
            await self.add(f"n{number}", via)
        return list(self.nodes.values())

    def kill(self, name: str) -> None:
        """As SIGKILL does: nothing is said to anybody."""
        self.world.kill(name)
        self.nodes.pop(name).scope.cancel()

    async def leave(self, name: str) -> None:
        """Says goodbye and goes."""
        node = self.nodes.pop(name)
        node.scope.cancel()
        await node.stopped.wait()


SwarmFactory = Callable[..., AbstractAsyncContextManager[Swarm]]


@pytest.fixture
def open_swarm() -> SwarmFactory:
    """``async with open_swarm(seed=0, latency=0.01) as swarm``."""

    @asynccontextmanager
    async def open_(seed: int = 0, latency: float = 0.01) -> AsyncIterator[Swarm]:
        async with trio.open_nursery() as nursery:
            yield Swarm(nursery, seed, latency)
            nursery.cancel_scope.cancel()

    return open_
