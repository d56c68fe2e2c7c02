"""Hosts, links and endpoints for tests, in both worlds: virtual time in memory, and TCP on the real clock."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from shoal.transport.address import Address
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.deadlines import LoopLag
from shoal.transport.endpoint import Endpoint
from shoal.transport.establish import establish
from shoal.transport.frames import MuxLimits
from shoal.transport.host import Host, RealHost
from shoal.transport.identity import Identity
from shoal.transport.link import Link
from shoal.transport.memory import MemoryWorld, Route
from shoal.transport.network import ByteStream, Network
from shoal.transport.secure import SecureChannel
from shoal.transport.stream import LinkStream
from shoal.transport.traversal import Traversal

T = TypeVar("T")


class VirtualHost(Host):
    """One machine in virtual time."""

    ciphers = NOMINAL_CIPHERS

    def __init__(self, network: Network, seed: str) -> None:
        self.network = network
        self.random = random.Random(seed)
        self._entropy = random.Random(seed + " entropy")

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return 1.7e9 + trio.current_time()

    def entropy(self, n: int) -> bytes:
        return self._entropy.randbytes(n)

    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        return fn(*args)


class World(ABC):
    """Where machines are made."""

    @abstractmethod
    def host(self, name: str) -> Host: ...

    @abstractmethod
    def bind(self, name: str) -> Address: ...


class Virtual(World):
    def __init__(self, route: Route | None = None) -> None:
        self.memory = MemoryWorld(random.Random(0), default=route or Route(latency=0.01))

    def host(self, name: str) -> Host:
        return VirtualHost(self.memory.network(name), name)

    def bind(self, name: str) -> Address:
        return Address("mem", name, 1)


class Real(World):
    def host(self, name: str) -> Host:
        return RealHost()

    def bind(self, name: str) -> Address:
        return Address("tcp", "127.0.0.1", 0)


class LinkPair:
    """Two ends of one running link. ``opened``: the streams that the other side of each has opened here."""

    def __init__(self, a: Link, b: Link, raw_a: ByteStream, raw_b: ByteStream) -> None:
        self.a = a
        self.b = b
        self.raw_a = raw_a
        self.raw_b = raw_b
        self.opened: dict[str, list[LinkStream]] = {"a": [], "b": []}
        self._news = {"a": trio.Event(), "b": trio.Event()}
        a.on_stream = self._taker("a")
        b.on_stream = self._taker("b")

    def _taker(self, side: str) -> Callable[[LinkStream], None]:
        def take(stream: LinkStream) -> None:
            self.opened[side].append(stream)
            self._news[side].set()
            self._news[side] = trio.Event()

        return take

    async def accept(self, side: str = "b") -> LinkStream:
        """The next stream that was opened towards ``side``."""
        while not self.opened[side]:
            await self._news[side].wait()
        return self.opened[side].pop(0)


async def connect_bytes(world: World) -> tuple[Host, Host, ByteStream, ByteStream]:
    """Two hosts, and a byte stream from the first to the second."""
    here, there = world.host("here"), world.host("there")
    accepted: list[ByteStream] = []
    async with await there.network.listen(world.bind("there")) as listener:

        async def accept() -> None:
            accepted.append(await listener.accept())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            raw = await here.network.dial(listener.address)
    return here, there, raw, accepted[0]


@asynccontextmanager
async def link_pair(world: World, limits: MuxLimits | None = None) -> AsyncIterator[LinkPair]:
    """A running link in ``world``."""
    here, there, raw_a, raw_b = await connect_bytes(world)
    links: dict[str, Link] = {}

    async def shake(side: str, host: Host, raw: ByteStream) -> None:
        channel = SecureChannel(
            initiator=side == "a",
            identity=Identity(host.entropy(32)),
            entropy=host.entropy,
            wall=host.wall(),
            ciphers=host.ciphers,
        )
        links[side] = await establish(host, raw, channel, LoopLag(), limits=limits)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake, "a", here, raw_a)
        nursery.start_soon(shake, "b", there, raw_b)
    pair = LinkPair(links["a"], links["b"], raw_a, raw_b)
    async with trio.open_nursery() as nursery:
        await nursery.start(pair.a.run)
        await nursery.start(pair.b.run)
        yield pair
        nursery.cancel_scope.cancel()


class Nodes:
    """Endpoints by name, each in a cancel scope of its own."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.scopes: dict[str, trio.CancelScope] = {}
        self.stopped: dict[str, trio.Event] = {}
        self._nursery = nursery

    def make(
        self,
        name: str,
        *,
        psk: bytes | None = None,
        max_links: int = 64,
        seed: bytes | None = None,
        traversal: Traversal | None = None,
    ) -> Endpoint:
        host = self.world.host(name)
        identity = Identity(seed or host.entropy(32))
        return Endpoint(host, identity, psk=psk, max_links=max_links, traversal=traversal)

    async def add(
        self,
        name: str,
        *,
        listen: bool = True,
        psk: bytes | None = None,
        max_links: int = 64,
        seed: bytes | None = None,
        traversal: Traversal | None = None,
    ) -> Endpoint:
        """A running endpoint."""
        endpoint = self.make(name, psk=psk, max_links=max_links, seed=seed, traversal=traversal)
        self.scopes[name] = trio.CancelScope()
        self.stopped[name] = trio.Event()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with self.scopes[name]:
                await endpoint.run([self.world.bind(name)] if listen else [], task_status=task_status)
            self.stopped[name].set()

        await self._nursery.start(run)
        return endpoint

    async def stop(self, name: str) -> None:
        self.scopes[name].cancel()
        await self.stopped[name].wait()


@asynccontextmanager
async def nodes(world: World) -> AsyncIterator[Nodes]:
    async with trio.open_nursery() as nursery:
        yield Nodes(world, nursery)
        nursery.cancel_scope.cancel()
