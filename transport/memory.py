"""A network in memory for virtual time: latency, bandwidth, loss, faults, and one event per send.

A :class:`MemoryWorld` holds machines by name; :meth:`MemoryWorld.network` gives one of them its :class:`Network`, with
addresses ``mem://name:port``. The model (of TCP, as its users see it):

- A send travels as one piece. It arrives when it has left the machine's uplink (shared by all its streams), then the
  route's bandwidth, and crossed the latency. Both are queues, first come first served.
- ``send_all`` returns when at most ``Route.buffer`` bytes wait to leave and at most ``Route.window`` bytes are on their
  way or unread: backpressure by the line and by the reader. The reader's progress is known to the sender at once.
- Loss shows as TCP shows it: the piece and all behind it come later, and the rate falls (Mathis et al. 1997).
- Connecting takes a round trip; a port nobody listens on refuses after one; a full backlog drops silently.
- A peer that closes with bytes unread, or is sent bytes after it closed, answers with a reset, behind what it had sent.
- *Killed* (SIGKILL): the kernel closes its sockets. What was sent still arrives. Its own tasks cannot be stopped from
  here, so their calls never return: cancel them. *Frozen* (SIGSTOP): the kernel still connects and receives up to the
  window; nothing is accepted, read or sent. *Partitioned*: pieces vanish silently and are sent again when TCP's timer
  next fires after healing.
- *Behind NAT* (:meth:`MemoryWorld.set_nat`): see :mod:`shoal.transport.memory_nat`.

No task and no timer belongs to an idle stream: who waits for bytes sleeps until they arrive. Bytes are passed by
reference: ``bytes``, and views of them, are never copied; what the sender could still change is copied once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from .address import Address
from .agenda import Agenda
from .errors import ConfigError, PeerUnreachable
from .memory_flow import Flow, Lane, Machine, Route
from .memory_nat import CONNECT_LIMIT, CONNECT_RETRY, REFUSED, TIMED_OUT, Kind, Knock, Nats, knock
from .memory_stream import BACKLOG, MemoryListener, MemoryStream
from .network import Listener, Network

__all__ = ["BACKLOG", "MemoryListener", "MemoryNetwork", "MemoryStream", "MemoryWorld", "Route", "Trace"]

FIRST_EPHEMERAL_PORT = 49152

#: ``trace(time, what, source machine, target machine, bytes)``, called for everything that happens.
Trace = Callable[[float, str, str, str, int], None]


class PlainServer(Protocol):
    """What the kernel of a dying process knows of an endpoint of the plain suite."""

    def kill(self) -> None: ...


class MemoryNetwork(Network):
    """The network as one process on one machine sees it."""

    def __init__(self, world: MemoryWorld, machine: Machine) -> None:
        self.world, self.name, self.machine = world, machine.name, machine
        # dicts, not sets: they are gone through in order of opening
        self.streams: dict[MemoryStream, None] = {}
        self.listeners: dict[int, MemoryListener] = {}
        #: Endpoints of the plain suite by port (:mod:`shoal.transport.memory_plain`).
        self.plain: dict[int, PlainServer] = {}
        #: Requests to connect that are on their way from a port that listens too.
        self.knocks: dict[tuple[int, Address], Knock] = {}
        self.frozen = self.killed = False
        #: Where this machine is addressed now, and how often that has changed.
        self.host, self.moves = world.host_of(machine.name), 0
        self._stopped = trio.lowlevel.ParkingLot()
        self._deferred: list[Callable[[], None]] = []
        self._next_port = FIRST_EPHEMERAL_PORT

    async def listen(self, bind: Address) -> MemoryListener:
        await trio.lowlevel.checkpoint()
        await self.running()
        if bind.kind != "mem" or bind.host != self.host:
            raise ConfigError(f"{bind} is not an address of this machine; listen at mem://{self.host}:PORT")
        port = bind.port or self._free_port()
        if port in self.listeners:
            raise ConfigError(f"{bind} is in use by another program; choose another port (0 picks a free one)")
        self.listeners[port] = MemoryListener(self, Address("mem", self.host, port))
        return self.listeners[port]

    async def dial(self, address: Address, *, shared_port: bool = False) -> MemoryStream:
        """Connect; takes one round trip. A request that is lost is repeated after 1, 2, 4, … seconds, as TCP does."""
        if address.kind != "mem":
            raise PeerUnreachable("cannot connect", attempts=((str(address), "not an address of this network"),))
        await self.running()
        if shared_port or self.world.nats:
            return await knock(self, address, self._origin(address) if shared_port else self._free_port())
        out, back = self.world.lanes(self.name, address)
        pause, give_up, moves = CONNECT_RETRY, trio.current_time() + CONNECT_LIMIT, self.moves
        self.world.note("dial", out, 0)
        while True:
            await trio.sleep(out.route.latency)
            if not self.world.lost(out):
                listener, reason = self.world.answer(address)
                await trio.sleep(back.route.latency)
                await self.running()
                if reason:
                    raise PeerUnreachable("cannot connect", attempts=((str(address), reason),))
                if listener is not None and not self.world.lost(back) and moves == self.moves:
                    local = Address("mem", self.host, self._free_port())
                    ours, theirs = self.world.join(self, local, address, listener.process, address, local)
                    listener.offer(trio.current_time() + out.route.latency, theirs)
                    return ours
            if trio.current_time() + pause > give_up:
                raise PeerUnreachable("cannot connect", attempts=((str(address), TIMED_OUT),))
            await trio.sleep(pause)
            await self.running()
            pause *= 2
            moves = self.moves

    def _origin(self, address: Address) -> int:
        """The port for a dial that shares our listener's, or a free one where the two are connected already."""
        for port in self.listeners:
            connected = (stream.local.port == port and stream.remote == address for stream in self.streams)
            if (port, address) not in self.knocks and not any(connected):
                return port
        return self._free_port()

    def _free_port(self) -> int:
        for _ in range(FIRST_EPHEMERAL_PORT, 65536):
            port = self._next_port
            self._next_port = port + 1 if port < 65535 else FIRST_EPHEMERAL_PORT
            if port not in self.listeners:
                return port
        raise ConfigError(f"no port is left on {self.name}; close some listeners")

    def reachable_addresses(self, listener: Listener) -> tuple[Address, ...]:
        return (listener.address,)

    async def running(self) -> None:
        """Return at once while the machine runs; wait while it is frozen; never return once it was killed."""
        while self.frozen or self.killed:
            await self._stopped.park()

    def when_running(self, act: Callable[[], None]) -> None:
        """What a task wants done to the outside: now, later if frozen, never if killed."""
        if self.frozen:
            self._deferred.append(act)
        elif not self.killed:
            act()

    def move(self, host: str) -> None:
        """This machine is addressed otherwise from now on; its listeners listen there."""
        self.host = host
        self.moves += 1
        for listener in self.listeners.values():
            listener.address = Address("mem", host, listener.address.port)

    def kill(self) -> None:
        """SIGKILL: the kernel closes everything."""
        self.killed, self.frozen = True, False
        self._deferred.clear()
        self.knocks.clear()
        for listener in list(self.listeners.values()):
            listener.hang_up()
        for stream in list(self.streams):
            stream.hang_up()
        for server in list(self.plain.values()):
            server.kill()
        self.plain.clear()

    def thaw(self) -> None:
        self.frozen = False
        self._stopped.unpark_all()
        deferred, self._deferred = self._deferred, []
        for act in deferred:
            act()


class MemoryWorld:
    """All machines of one memory network, the routes between them, and what goes wrong.

    Everything but :meth:`network` may only be called inside ``trio.run``. All randomness is ``random``'s.
    """

    def __init__(
        self,
        random: random.Random,
        *,
        default: Route | None = None,
        routes: Callable[[str, str], Route] | None = None,
        trace: Trace | None = None,
    ) -> None:
        """``default``: the route between machines for which no other is set (default: instant, lossless).

        ``routes``: gives the route from one machine to another instead, when the first byte is sent.
        """
        self.random, self.trace = random, trace
        self.default = Route() if default is None else default
        self.routes = routes
        self.agenda = Agenda()
        self._gone: dict[str, None] = {}
        #: Messages and bytes of the plain suite so far.
        self.messages = self.bytes = 0
        self.draw = random.random
        self._machines: dict[str, Machine] = {}
        self._processes: dict[str, MemoryNetwork] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._flows: dict[Flow, None] = {}
        self._group: dict[str, int] = {}
        self._cuts: dict[tuple[str, str], None] = {}
        self._closed = False
        self.nats = Nats(random)
        # machines whose address is not their name: machine → host and back; None: nobody's any more
        self._hosts: dict[str, str] = {}
        self._tenants: dict[str, str | None] = {}

    # setting up

    def network(self, name: str) -> MemoryNetwork:
        """The network of the process on machine ``name``; after a kill a new process, which knows of nothing."""
        process = self._processes.get(name)
        if process is None or process.killed:
            process = self._processes[name] = MemoryNetwork(self, self._machine(name))
        return process

    def set_route(self, one: str, other: str, route: Route, *, one_way: bool = False) -> None:
        """The route from ``one`` to ``other``, and back unless ``one_way``. Applies to what is sent from now on."""
        self.lane(one, other).route = route
        if not one_way:
            self.lane(other, one).route = route

    def set_uplink(self, name: str, bandwidth: float) -> None:
        """Bytes per second which all streams from ``name`` to other machines share."""
        self._machine(name).uplink = bandwidth

    def set_nat(self, name: str, kind: Kind, *, site: str = "", resets: bool = False) -> None:
        """Put machine ``name`` behind a router, as :mod:`shoal.transport.memory_nat` describes, or take it out.

        ``site``: the network behind one router (default: a network of its own); its outer host name is ``SITE-nat``.
        ``resets``: the router answers what it does not let pass. Connections that ``name`` had go silent.
        """
        self._event("nat", name, kind)
        self.nats.place(self._machine(name).name, kind, site or name, resets=resets)
        self._sever([name])

    def readdress(self, name: str, host: str) -> None:
        """Others see machine ``name`` under another address from now on: ``mem://host:port``.

        Behind a ``cone`` or ``symmetric`` NAT it is the router's outer address that changes, for its whole site (a line
        that was dialled anew). Connections go silent, nothing answers at the old address.
        """
        if host in self._machines or host in self._tenants:
            raise ValueError(f"{host!r} is or was the name of another machine")
        self._event("readdress", name, host)
        router = self.nats.of(name)
        if router is not None and router.kind != "blocked":
            self.nats.rename(router, host)
            self._sever(router.members, outside=True)
            return
        self._tenants[self.host_of(name)], self._tenants[host] = None, name
        self._hosts[name] = host
        self._sever([name])
        process = self._processes.get(name)
        if process is not None:
            process.move(host)

    # faults

    def kill(self, name: str) -> None:
        """SIGKILL the process on ``name``: its streams end for the others, dials are refused."""
        self._event("kill", name)
        self._processes[name].kill()

    def unplug(self, name: str) -> None:
        """The machine is off the network for good, without a word: nothing it sends arrives, nothing reaches it."""
        self._event("unplug", name)
        self._gone[name] = None
        self._rewire()

    def drop_machine(self, name: str) -> None:
        """Drop what is kept of a machine whose process was killed and which never comes back under this name."""
        self._processes.pop(name, None)
        self._machines.pop(name, None)

    def freeze(self, name: str) -> None:
        """SIGSTOP: bytes queue up to the window, nothing is read, sent or answered."""
        self._event("freeze", name)
        self._processes[name].frozen = not self._processes[name].killed

    def unfreeze(self, name: str) -> None:
        """SIGCONT: it goes on with what has arrived meanwhile; its deadlines have run on."""
        self._event("unfreeze", name)
        if self._processes[name].frozen:
            self._processes[name].thaw()

    def partition(self, *groups: Iterable[str]) -> None:
        """Nothing passes between the groups; machines in none of them form one more. Replaces an earlier partition."""
        self._group = {name: index for index, group in enumerate(groups, 1) for name in group}
        self._event("partition", *self._group)
        self._rewire()

    def cut(self, one: str, other: str, *, one_way: bool = False) -> None:
        """Nothing passes from ``one`` to ``other``, nor back unless ``one_way``."""
        self._cuts[one, other] = None
        if not one_way:
            self._cuts[other, one] = None
        self._event("cut", one, other)
        self._rewire()

    def heal(self) -> None:
        """End all partitions and cuts. Stalled streams go on when TCP next repeats, up to 120 s later."""
        self._group, self._cuts = {}, {}
        self._event("heal")
        self._rewire()

    def close(self) -> None:
        """End the world: all streams and listeners are closed under their users, dials fail."""
        self._closed = True
        for process in list(self._processes.values()):
            process.thaw()
            for listener in list(process.listeners.values()):
                listener.close()
            for stream in list(process.streams):
                stream.close()

    # watching

    def traffic(self) -> dict[tuple[str, str], int]:
        """Bytes handed to the network so far per ``(source, target)``."""
        return {pair: lane.sent for pair, lane in self._lanes.items() if lane.sent}

    def note(self, what: str, lane: Lane, size: int) -> None:
        """Tell the trace of an event. For the network's own parts."""
        if self.trace is not None:
            self.trace(trio.current_time(), what, lane.source.name, lane.target.name, size)

    def _event(self, what: str, *names: str) -> None:
        if self.trace is not None:
            self.trace(trio.current_time(), what, ",".join(names), "", 0)

    # for the network's own parts

    def lane(self, source: str, target: str) -> Lane:
        """The lane between two machines, known or not. A machine reaches itself at once and unhindered."""
        found = self._lanes.get((source, target))
        if found is None:
            route = Route() if source == target else self.routes(source, target) if self.routes else self.default
            # what a machine says to itself does not pass its uplink
            sender = Machine(source) if source == target else self._machine(source)
            found = self._lanes[source, target] = Lane(sender, self._machine(target), route)
        return found

    def passing_lane(self, source: str, target: str) -> Lane:
        """A lane for one link of the plain suite. Unless a route was set for these two, it is forgotten with the link:
        among thousands of machines, pairs that once spoke would fill the memory.
        """
        if self.routes is None or source == target or (source, target) in self._lanes:
            return self.lane(source, target)
        return Lane(self._machine(source), self._machine(target), self.routes(source, target))

    def target_of(self, to: Address) -> str:
        """The machine at an address."""
        return self.nats.machine(to.host) or self._tenants.get(to.host) or to.host

    def lanes(self, source: str, to: Address) -> tuple[Lane, Lane]:
        """The lanes from machine ``source`` to the machine at an address, and back."""
        target = self.target_of(to)
        return self.lane(source, target), self.lane(target, source)

    def host_of(self, name: str) -> str:
        """The host in the addresses of machine ``name``, as itself sees them."""
        return self._hosts.get(name, name)

    def process_at(self, address: Address) -> MemoryNetwork | None:
        """The process on the machine at an address, which is not a router's outer one."""
        tenant = self._tenants.get(address.host, address.host)
        return self._processes.get(tenant) if tenant is not None else None

    def join(
        self,
        near: MemoryNetwork,
        local: Address,
        remote: Address,
        far: MemoryNetwork,
        far_local: Address,
        far_remote: Address,
    ) -> tuple[MemoryStream, MemoryStream]:
        """The two ends of a new connection between two processes, with the addresses that each end sees."""
        out, back = self.lane(near.name, far.name), self.lane(far.name, near.name)
        there, here = Flow(self, out), Flow(self, back)
        there.reverse, here.reverse = here, there
        self.remember(there, here)
        self.note("connect", out, 0)
        return MemoryStream(near, there, here, local, remote), MemoryStream(far, here, there, far_local, far_remote)

    def separated(self, source: str, target: str) -> bool:
        if source == target:
            return False
        if self._gone and (source in self._gone or target in self._gone):
            return True
        return (source, target) in self._cuts or self._group.get(source, 0) != self._group.get(target, 0)

    def lost(self, lane: Lane) -> bool:
        """Whether one packet, sent now, vanishes."""
        if self.separated(lane.source.name, lane.target.name):
            return True
        return lane.route.loss > 0 and self.draw() < lane.route.loss

    def answer(self, address: Address) -> tuple[MemoryListener | None, str]:
        """What answers a connection request: a listener, silence (it has no room), or a refusal with its reason."""
        process = self.process_at(address)
        if process is None or self._closed:
            vacated = not self._closed and address.host in self._tenants
            return None, "" if vacated else "no route to host"
        listener = process.listeners.get(address.port)
        if listener is None:
            return None, REFUSED
        return (None, "") if listener.full else (listener, "")

    def carry(self, lane: Lane, size: int, earliest: float, deliver: Callable[..., None], *arguments: object) -> float:
        """Call ``deliver`` when ``size`` bytes that are sent now have crossed ``lane``, not before ``earliest``.

        Returns when. What is separated then, or now, is never delivered. For the plain suite.
        """
        now, route = trio.current_time(), lane.route
        self.note("send", lane, size)
        self.messages += 1
        self.bytes += size
        lane.sent += size
        left = lane.transmit(now, size) if route.bandwidth < math.inf or lane.source.uplink < math.inf else now
        late = route.retransmission(size, self.draw) if route.loss else 0.0
        if route.jitter:
            late += route.jitter * self.draw()
        arrival = max(left + route.latency + late, earliest)
        if not self.separated(lane.source.name, lane.target.name):
            self.agenda.at(arrival, self._deliver, lane, deliver, arguments)
        return arrival

    def _deliver(self, lane: Lane, deliver: Callable[..., None], arguments: tuple[object, ...]) -> None:
        if not self.separated(lane.source.name, lane.target.name):
            deliver(*arguments)

    def remember(self, *flows: Flow) -> None:
        self._flows.update(dict.fromkeys(flows))

    def forget(self, *flows: Flow) -> None:
        for flow in flows:
            self._flows.pop(flow, None)

    def _machine(self, name: str) -> Machine:
        return self._machines.setdefault(name, Machine(name))

    def _sever(self, names: Iterable[str], *, outside: bool = False) -> None:
        """All connections of these machines go silent for ever; with ``outside``, not those among themselves."""
        gone = dict.fromkeys(names)
        for flow in list(self._flows):
            source, target = flow.lane.source.name, flow.lane.target.name
            ends = (source in gone) + (target in gone)
            if source != target and (ends == 1 or (ends == 2 and not outside)):
                if not flow.stalled:
                    flow.stall()
                self.forget(flow)

    def _rewire(self) -> None:
        for flow in list(self._flows):
            separated = self.separated(flow.lane.source.name, flow.lane.target.name)
            if separated and not flow.stalled:
                flow.stall()
            elif flow.stalled and not separated:
                flow.resume()
