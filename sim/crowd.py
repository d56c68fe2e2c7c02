"""Thousands of DHT nodes in one process and virtual time: joining, churn, adversaries, lookups, and what they cost.

Every node runs the real code of a ``shoal relay``'s DHT: endpoint, contacts, calls with strict messages and deadlines,
routing table, lookups, records with signatures, upkeep. Replaced are the two clocks, randomness, the network, and
(unless ``encrypted``) what lies below calls: see :mod:`shoal.transport.memory_plain`. Same seed, same events.

Swarms that train are the business of :mod:`.world`.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import attrs
import trio

from ..dht.kademlia.keys import node_key
from ..dht.kademlia.node import Dht
from ..transport.address import Address
from ..transport.aead import NOMINAL_CIPHERS
from ..transport.endpoint import Endpoint
from ..transport.errors import PeerUnreachable
from ..transport.identity import Identity
from ..transport.memory import MemoryWorld
from ..transport.memory_plain import PlainEndpoint
from . import defaults
from .churn import Sessions
from .determinism import TraceHash, run_virtual, seeded
from .liars import Gang
from .places import Places
from .virtual import VirtualHost

T = TypeVar("T")

#: Takes a sentence about what is going on.
Progress: TypeAlias = Callable[[str], None]

PORT = 4001


@attrs.frozen
class CrowdScenario:
    """``nodes``: of them at once. ``session``: their mean session in seconds, None: all stay. ``adversaries``: part of
    the nodes. ``loss``: of segments. ``encrypted``: real links, for hundreds of nodes rather than thousands.
    ``traced``: hash every message as well as every result, which costs a tenth of the time.
    """

    nodes: int
    seed: int = 0
    session: float | None = None
    adversaries: float = 0.0
    loss: float = 0.0
    encrypted: bool = False
    traced: bool = False


class CrowdNode:
    """One node, from its birth to its end: it never comes back."""

    def __init__(self, number: int, name: str, host: VirtualHost, identity: Identity, *, encrypted: bool) -> None:
        self.number, self.name, self.host, self.identity = number, name, host, identity
        self.address = Address("mem", name, PORT)
        self.key = node_key(identity.peer_id)
        self.endpoint = Endpoint(host, identity) if encrypted else PlainEndpoint(host, identity)
        self.dht = Dht(self.endpoint)
        #: It answers others.
        self.running = False
        self.has_joined = trio.Event()
        self.honest = True
        #: Virtual seconds from its start to the end of its bootstrap.
        self.join_time = 0.0
        self.scope = trio.CancelScope()

    @property
    def joined(self) -> bool:
        """It has looked for its neighbours, and is there."""
        return self.running and self.has_joined.is_set()

    async def run(self, via: list[Address]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.endpoint.run, [self.address])
                self.running = True
                began = trio.current_time()
                nursery.start_soon(self.dht.run)
                try:
                    await self.dht.bootstrap(via)
                except PeerUnreachable:
                    pass  # whoever it was to join through has gone; run() tries again
                self.join_time = trio.current_time() - began
                self.has_joined.set()
                await trio.sleep_forever()


class Crowd:
    """The world: nodes by number, and what was counted. ``rng`` is for whatever the script decides."""

    def __init__(self, scenario: CrowdScenario, nursery: trio.Nursery) -> None:
        self.scenario, self.nursery = scenario, nursery
        self.trace = TraceHash()
        self.rng = seeded(scenario.seed, "crowd")
        self.places = Places(seeded(scenario.seed, "places"), loss=scenario.loss, jitter=0.1)
        self.network = MemoryWorld(
            seeded(scenario.seed, "network"),
            routes=self.places.route,
            trace=self.trace if scenario.traced else None,
        )
        self.network.agenda.tick = defaults.CROWD_TICK
        self.gang = Gang()
        #: Present, by number; honest ones that have joined, as a list to draw from.
        self.nodes: dict[int, CrowdNode] = {}
        self.born = self.departed = 0
        self._sessions = Sessions(scenario.session, seeded(scenario.seed, "churn")) if scenario.session else None

    # -- births and deaths ---------------------------------------------------------------------------------------------

    def create(self, identity: Identity | None = None) -> CrowdNode:
        """A node that has not started, with its place on the map."""
        seed, number = self.scenario.seed, self.born
        self.born += 1
        name = f"n{number}"
        self.places.add(name)
        self.network.set_uplink(name, self.places.uplink())
        host = VirtualHost(name, self.network, seed=seed)
        host.ciphers = NOMINAL_CIPHERS
        if identity is None:
            identity = Identity(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=32).digest())
        return CrowdNode(number, name, host, identity, encrypted=self.scenario.encrypted)

    def start(self, node: CrowdNode) -> None:
        """Let ``node`` join through some of those present, as a ticket names them; they may be anybody."""
        present = [other for other in self._draw(2 * defaults.CONTACTS) if other.running][: defaults.CONTACTS]
        self.nodes[node.number] = node
        self.note("join", node)
        self.nursery.start_soon(node.run, [other.address for other in present])

    def _draw(self, count: int) -> list[CrowdNode]:
        numbers = list(self.nodes)
        return [self.nodes[number] for number in self.rng.sample(numbers, min(count, len(numbers)))]

    def draw_honest(self, fits: Callable[[CrowdNode], bool] = lambda node: True) -> CrowdNode:
        """An honest node that has joined and ``fits``; where none does, any honest one that has joined."""
        for _ in range(20):
            (node,) = self._draw(1)
            if node.honest and node.joined and fits(node):
                return node
        honest = [node for node in self.nodes.values() if node.honest and node.joined]
        fitting = [node for node in honest if fits(node)]
        return self.rng.choice(fitting or honest)

    def depart(self, node: CrowdNode) -> None:
        """It ends without a goodbye: some are just silent from now on, of the others the kernel closes connections."""
        if self.nodes.pop(node.number, None) is None:
            return
        self.note("depart", node)
        self.departed += 1
        node.running = False
        if self.rng.random() < defaults.SILENT_DEPARTURES:
            self.network.unplug(node.name)
        self.network.kill(node.name)
        node.scope.cancel()
        self.network.drop_machine(node.name)
        if self.departed % defaults.COLLECT_EVERY == 0:
            gc.collect()

    async def populate(self, identities: dict[int, tuple[Identity | None, str]], progress: Progress) -> None:
        """Start all nodes, slowly at first; ``identities``: by number, those of adversaries, with their kind.

        Returns when all have joined and tables have settled.
        """
        for number in range(self.scenario.nodes):
            identity, kind = identities.get(number, (None, ""))
            node = self.create(identity)
            if kind:
                node.honest = False
                self.gang.corrupt(node, kind)
            self.start(node)
            rate = min(defaults.JOIN_RATE, max(2.0, defaults.JOIN_FRACTION * len(self.nodes)))
            await trio.sleep(1 / rate)
            progress(f"{len(self.nodes):,} of {self.scenario.nodes:,} nodes have started")
        for node in list(self.nodes.values()):
            await node.has_joined.wait()
        await trio.sleep(defaults.SETTLE)

    async def churn(self) -> None:
        """From now on nodes leave when their sessions end, and as many arrive; until cancelled."""
        if self._sessions is None:
            return
        for node in list(self.nodes.values()):
            if node.honest:
                self.nursery.start_soon(self._live, node, self._sessions.rest())
        await trio.sleep_forever()

    async def _live(self, node: CrowdNode, session: float) -> None:
        while True:
            await trio.sleep(session)
            self.depart(node)
            assert self._sessions is not None
            node, session = self.create(), self._sessions.length()
            self.start(node)

    # -- watching ------------------------------------------------------------------------------------------------------

    def note(self, what: str, node: CrowdNode, detail: int = 0) -> None:
        self.trace(trio.current_time(), what, node.name, "", detail)

    def truth(self, place: int, count: int, *, beside: CrowdNode | None = None) -> list[CrowdNode]:
        """The ``count`` honest nodes closest to ``place`` that have joined, without ``beside``."""
        present = [node for node in self.nodes.values() if node.honest and node.joined and node is not beside]
        present.sort(key=lambda node: node.key ^ place)
        return present[:count]

    def queries(self) -> int:
        """Questions asked so far by those present."""
        return sum(node.dht.counters.queries for node in self.nodes.values())


def run_crowd(scenario: CrowdScenario, script: Callable[[Crowd], Awaitable[T]]) -> T:
    """Run ``script`` in a new world, in virtual time, and return what it returns. Deterministic in the seed."""

    async def main() -> T:
        async with trio.open_nursery() as nursery:
            crowd = Crowd(scenario, nursery)
            result = await script(crowd)
            nursery.cancel_scope.cancel()
        return result

    with _uncollected():
        return run_virtual(main, seed=scenario.seed)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without cyclic garbage collection, where it was on: nodes leave no cycles behind while they run, and to look
    through millions of objects for some takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
