"""A swarm in virtual time: the same nodes as on real machines, on a memory network, under a mock clock.

What is replaced, and nothing else (a test holds this list against the objects): the byte streams
(:class:`shoal.transport.memory.MemoryNetwork`), the two clocks, the random source and blocking calls
(:class:`shoal.sim.virtual.VirtualHost`). Everything from Noise to the strategies is the code that runs in production.
Same seed, same bits, same events, in every process.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable

import attrs
import trio

from ..learning.events import Event
from ..learning.run import Faults, Run
from ..learning.task import Task, resolve
from ..node.node import Founding, Node, NodeConfig
from ..transport.address import Address
from ..transport.aead import NOMINAL_CIPHERS
from ..transport.identity import Identity
from ..transport.memory import MemoryWorld, Route
from .determinism import run_virtual
from .virtual import VirtualHost


@attrs.frozen
class Scenario:
    """A swarm to simulate. ``founding``: the run; ``task``: a built-in one, or an object per node from ``make_task``.

    ``route``: latency, bandwidth and loss between any two. ``faults``: per node number. ``limit``: virtual seconds.
    """

    nodes: int
    founding: Founding
    task: str = "digits"
    make_task: Callable[[], Task] | None = None
    seed: int = 0
    route: Route = attrs.field(factory=lambda: Route(latency=0.02))
    faults: dict[int, Faults] = attrs.field(factory=dict)
    late: tuple[int, ...] = ()
    evaluate_every: int = 0
    time_budget: float | None = None
    limit: float = 3600.0


@attrs.define
class Member:
    """One node of the world. ``killed`` by us; ``scope`` holds its whole life."""

    number: int
    name: str
    node: Node
    events: list[Event] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    killed: bool = False

    @property
    def run(self) -> Run:
        assert self.node.run_here is not None
        return self.node.run_here


class World:
    """Nodes by number; start, kill and freeze them, and wait for what happens. See :func:`simulate`."""

    def __init__(self, scenario: Scenario, nursery: trio.Nursery) -> None:
        self.scenario, self._nursery = scenario, nursery
        self.network = MemoryWorld(random.Random(f"network {scenario.seed}"), default=scenario.route)
        self.members: dict[int, Member] = {}
        self.trace = hashlib.blake2b(digest_size=16)
        #: Called with every event of every member, at once.
        self.hooks: list[Callable[[Member, Event], None]] = []
        self._stores: dict[int, Node] = {}
        self._changed = trio.Event()

    def start(self, number: int) -> Member:
        """Start node ``number``; node 0 founds the run, the others join through it (or whoever is left)."""
        scenario, name = self.scenario, f"node{number}"
        host = VirtualHost(name, self.network, seed=scenario.seed)
        host.ciphers = NOMINAL_CIPHERS
        identity = Identity(hashlib.blake2b(f"{scenario.seed} {name}".encode(), digest_size=32).digest())
        before = self._stores.get(number)
        config = NodeConfig(
            bind=(Address("mem", name, 4001),),
            founding=scenario.founding if number == 0 else None,
            ticket=None if number == 0 and before is None else self._ticket(number),
            evaluate_every=scenario.evaluate_every,
            time_budget=scenario.time_budget,
            faults=scenario.faults.get(number, Faults()),
        )
        task = scenario.make_task() if scenario.make_task is not None else resolve(scenario.task, allow_import=False)
        node = Node(host, identity, config, task=task, on_event=lambda event: self._event(member, event))
        if before is not None:
            node.store = before.store
        member = Member(number, name, node)
        self.members[number] = member
        self._stores[number] = node
        self._nursery.start_soon(self._live, member)
        return member

    def _ticket(self, number: int):  # type: ignore[no-untyped-def]
        for other in self.members.values():
            if other.number != number and not other.killed and other.node.signed is not None:
                return other.node.ticket()
        return None

    async def _live(self, member: Member) -> None:
        with member.scope:
            await member.node.run()
        self._wake()

    def _event(self, member: Member, event: Event) -> None:
        member.events.append(event)
        line = f"{trio.current_time():.9f} {member.number} {event.round} {event.phase} {event.what} {event.peer}\n"
        self.trace.update(line.encode())
        for hook in self.hooks:
            hook(member, event)
        self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def kill(self, number: int) -> None:
        """SIGKILL: no goodbye; what was sent is on its way, the links break."""
        member = self.members[number]
        member.killed = True
        self.network.kill(member.name)
        member.scope.cancel()
        self._wake()

    def live(self) -> list[Member]:
        """Members that were not killed, by number."""
        return [member for _, member in sorted(self.members.items()) if not member.killed]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        """Wait until ``condition`` holds, looking after every event. Raises :class:`TimeoutError` naming ``what``."""
        with trio.move_on_after(seconds):
            while not condition():
                with trio.move_on_after(1.0):
                    await self._changed.wait()
            return
        states = [
            f"node{m.number}: " + (f"{s.round} {s.phase} {s.reason}" if (s := m.node.status()) else "no run")
            for m in self.live()
        ]
        raise TimeoutError(f"not within {seconds:.0f} virtual s: {what}; " + "; ".join(states))

    async def finished(self, seconds: float = 600.0) -> None:
        """Wait until every live member has had all its rounds."""

        def done() -> bool:
            return all(m.node.run_here is not None and m.run.finished.is_set() for m in self.live())

        await self.until(done, "the run to finish", seconds)


def simulate(scenario: Scenario, script: Callable[[World], Awaitable[None]] | None = None) -> World:
    """Run ``scenario`` in virtual time and return its world: start all nodes but the late, follow ``script`` if any,
    and wait for the run to finish. Deterministic in ``scenario.seed``."""

    async def main() -> World:
        async with trio.open_nursery() as nursery:
            world = World(scenario, nursery)
            founder = world.start(0)
            await world.until(lambda: founder.node.signed is not None, "the run to be founded")
            for number in range(1, scenario.nodes):
                if number not in scenario.late:
                    world.start(number)
            if script is not None:
                await script(world)
            await world.finished(scenario.limit)
            for member in world.live():
                await member.run.snapshots[-1].ready.wait()
            nursery.cancel_scope.cancel()
        return world

    return run_virtual(main, seed=scenario.seed)
