"""A swarm in virtual time: the same nodes as on real machines, on a memory network, under a mock clock.

What is replaced, and nothing else (``tests/sim/test_virtual_parts.py`` holds this list against the objects): the byte
streams (:class:`shoal.transport.memory.MemoryNetwork`), the two clocks, the random source and blocking calls
(:class:`shoal.sim.virtual.VirtualHost`). Everything from Noise to the strategies is the code that runs in production.
Same seed, same bits, same events, in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import attrs
import trio

from ..learning.events import Event
from ..learning.faults import Faults
from ..learning.run import Run
from ..learning.store import RunStore
from ..learning.task import Task, resolve
from ..node.node import Founding, Node, NodeConfig
from ..node.ticket import Ticket
from ..transport.address import Address
from ..transport.aead import NOMINAL_CIPHERS
from ..transport.errors import WaitExpired
from ..transport.identity import Identity
from ..transport.memory import MemoryWorld
from ..transport.memory_flow import Route
from .determinism import TraceHash, run_virtual, seeded
from .virtual import VirtualHost

PORT = 4001


@attrs.frozen
class Scenario:
    """A swarm to simulate: ``nodes`` of them, by number; node 0 founds the run that ``founding`` says.

    ``task``: a built-in one; or ``make_task``: gives every node a task object of its own. ``route``: latency, bandwidth
    and loss between any two. ``faults``: by node number. ``late``: numbers that :func:`simulate` does not start.
    ``slowness``: by node number, how many times as long its training takes; ``memory``: bytes that it says it has for a
    stage.
    ``evaluate_every``, ``time_budget``: as in :class:`shoal.node.node.NodeConfig`. ``limit``: virtual seconds that the
    run may take. Everything random is drawn from ``seed``, keys included; the run's own seed is ``founding.seed``.
    """

    nodes: int
    founding: Founding
    task: str = "digits"
    make_task: Callable[[], Task] | None = None
    seed: int = 0
    route: Route = attrs.field(factory=lambda: Route(latency=0.02))
    faults: dict[int, Faults] = attrs.field(factory=dict)
    late: tuple[int, ...] = ()
    slowness: dict[int, float] = attrs.field(factory=dict)
    memory: dict[int, int] = attrs.field(factory=dict)
    evaluate_every: int = 0
    time_budget: float | None = None
    limit: float = 3600.0


@attrs.define(eq=False)
class Member:
    """One life of one node. ``scope`` holds it; ``killed``: by :meth:`World.kill`; ``ended``: whatever the reason."""

    number: int
    name: str
    node: Node
    events: list[Event] = attrs.field(factory=list)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    killed: bool = False
    ended: bool = False

    @property
    def run(self) -> Run:
        """Its run. Only once it has one: see :attr:`shoal.node.node.Node.run_here`."""
        assert self.node.run_here is not None
        return self.node.run_here

    @property
    def peer(self) -> str:
        """Text form of its PeerId."""
        return self.node.identity.peer_id.text


class World:
    """Nodes by number: start, kill, freeze, part and restart them, and wait for what happens. See :func:`simulate`.

    ``members`` holds the latest life of each. ``trace`` hashes everything that happens on the network and every event
    of every node, with its time.
    """

    def __init__(self, scenario: Scenario, nursery: trio.Nursery) -> None:
        self.scenario, self.nursery = scenario, nursery
        self.trace = TraceHash()
        self.network = MemoryWorld(seeded(scenario.seed, "network"), default=scenario.route, trace=self.trace)
        self.members: dict[int, Member] = {}
        #: Called at once with every event of every member that lives. May kill it on the spot.
        self.hooks: list[Callable[[Member, Event], None]] = []
        self._lives: dict[int, int] = {}
        self._stored: dict[int, RunStore] = {}
        self._changed = trio.Event()

    # -- lives ---------------------------------------------------------------------------------------------------------

    def start(self, number: int) -> Member:
        """Start node ``number``, for the first time or again (:meth:`restart`).

        Node 0 founds the run, the others join through whoever lives. A node that lived before finds what a daemon keeps
        on disk: the state, a ticket, and what it knew of the swarm.
        """
        scenario, name, life = self.scenario, f"node{number}", self._lives.get(number, 0)
        self._lives[number] = life + 1
        founds = number == 0 and life == 0
        before = self.members.get(number)
        # A new process draws new numbers: the same nonces twice would break every promise of the handshake.
        host = VirtualHost(
            name, self.network, seed=scenario.seed, life=life, slowness=scenario.slowness.get(number, 1.0)
        )
        host.ciphers = NOMINAL_CIPHERS
        config = NodeConfig(
            bind=(Address("mem", name, PORT),),
            founding=scenario.founding if founds else None,
            ticket=None if founds else before.node.ticket() if before is not None else self.ticket(number),
            snapshot=None if before is None else before.node.dht.snapshot(),
            evaluate_every=scenario.evaluate_every,
            time_budget=scenario.time_budget,
            faults=scenario.faults.get(number, Faults()),
            memory=scenario.memory.get(number, 0),
        )
        task = scenario.make_task() if scenario.make_task is not None else resolve(scenario.task, allow_import=False)
        identity = Identity(hashlib.blake2b(f"{scenario.seed} {name}".encode(), digest_size=32).digest())
        node = Node(host, identity, config, task=task, on_event=lambda event: self._event(member, event))
        node.store = self._stored.get(number, node.store)
        member = self.members[number] = Member(number, name, node)
        self.nursery.start_soon(self._live, member)
        return member

    def restart(self, number: int) -> Member:
        """Start a node that was killed or has ended, with its key and what it had stored."""
        before = self.members[number]
        if not before.killed:
            assert before.ended, f"{before.name} still runs"
            self._stored[number] = before.node.store
        return self.start(number)

    def ticket(self, number: int = -1) -> Ticket | None:
        """A ticket through a live node other than ``number``; None when there is none."""
        for _, other in sorted(self.members.items()):
            if other.number != number and not other.killed and not other.ended:
                ticket = other.node.ticket()
                if ticket is not None:
                    return ticket
        return None

    async def _live(self, member: Member) -> None:
        with member.scope:
            await member.node.run()
        member.ended = True
        self._wake()

    # -- faults --------------------------------------------------------------------------------------------------------

    def kill(self, number: int) -> None:
        """SIGKILL, now: no goodbye, nothing more is sent or stored; what was sent is on its way."""
        member = self.members[number]
        member.killed = True
        self.network.kill(member.name)
        # The cancelled tasks clean up after themselves, which the dead do not: what they store then does not count.
        self._stored[number] = member.node.store.copy()
        member.scope.cancel()
        self._wake()

    def stop(self, number: int) -> None:
        """SIGTERM: the node says goodbye, saves its state and ends."""
        self.members[number].node.stop()

    def freeze(self, number: int) -> None:
        """SIGSTOP as others see it: nothing is read, sent or answered. Its own timers run, unlike a real one's."""
        self.network.freeze(self.members[number].name)

    def unfreeze(self, number: int) -> None:
        """SIGCONT."""
        self.network.unfreeze(self.members[number].name)

    def partition(self, *groups: tuple[int, ...]) -> None:
        """Nothing passes between the groups of nodes; nodes in none of them form one more. Ends with :meth:`heal`."""
        self.network.partition(*([f"node{number}" for number in group] for group in groups))

    def heal(self) -> None:
        """End the partition."""
        self.network.heal()

    # -- watching ------------------------------------------------------------------------------------------------------

    def _event(self, member: Member, event: Event) -> None:
        if member.killed:
            return
        member.events.append(event)
        what = f"event {event.round} {event.phase} {event.what} {event.detail}"
        self.trace(trio.current_time(), what, member.name, event.peer, 0)
        for hook in list(self.hooks):
            hook(member, event)
        self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def live(self) -> list[Member]:
        """Members that were not killed, by number."""
        return [member for _, member in sorted(self.members.items()) if not member.killed]

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        """Wait until ``condition`` holds; it is tried after every event and every virtual second.

        Raises :class:`WaitExpired` naming ``what`` and where every node is.
        """
        with trio.move_on_after(seconds):
            while not condition():
                with trio.move_on_after(1.0):
                    await self._changed.wait()
            return
        states = [
            f"{m.name}: " + (f"round {s.round}, {s.phase}: {s.reason}" if (s := m.node.status()) else "no run")
            for m in self.live()
        ]
        raise WaitExpired(f"{what} ({'; '.join(states)})", seconds)

    async def finished(self, seconds: float = 600.0) -> None:
        """Wait until every live member has had all its rounds, or has ended."""

        def done() -> bool:
            return all(m.ended or (m.node.run_here is not None and m.run.finished.is_set()) for m in self.live())

        await self.until(done, "end of the run", seconds)


def simulate(scenario: Scenario, script: Callable[[World], Awaitable[None]] | None = None) -> World:
    """Run ``scenario`` in virtual time and return its world, for looking at.

    Starts all nodes but the late ones, follows ``script``, and waits until every live node has had all its rounds.
    Raises :class:`WaitExpired` when that takes longer than ``scenario.limit``. Deterministic in ``scenario.seed``.
    """

    async def main() -> World:
        async with trio.open_nursery() as nursery:
            world = World(scenario, nursery)
            founder = world.start(0)
            await world.until(lambda: founder.node.signed is not None, "founding of the run")
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
