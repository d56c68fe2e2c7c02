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

No task and no timer belongs to an idle stream: who waits for bytes sleeps until they arrive. Bytes are passed by
reference: ``bytes``, and views of them, are never copied; what the sender could still change is copied once.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable

import trio

from .address import Address
from .errors import ConfigError, PeerUnreachable
from .memory_flow import EOF, RESET, Flow, Lane, Machine, Route, Sleeper
from .network import ByteStream, Listener, Network

#: Seconds until an unanswered connection request is repeated (then doubling), and until the kernel gives up (Linux).
CONNECT_RETRY, CONNECT_LIMIT = 1.0, 127.0
#: Connections waiting to be accepted.
BACKLOG = 1024
FIRST_EPHEMERAL_PORT = 49152

#: ``trace(time, what, source machine, target machine, bytes)``, called for everything that happens.
Trace = Callable[[float, str, str, str, int], None]


def _immutable(data: bytes | bytearray | memoryview) -> bytes | memoryview:
    """``data`` itself where nobody can change it, else a copy."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, memoryview) and isinstance(data.obj, bytes):
        return data.cast("B") if data.format != "B" else data
    return bytes(data)


class MemoryStream(ByteStream):
    """One end of a connection. Its flows outlive it: what was sent still arrives after ``aclose``."""

    def __init__(self, process: MemoryNetwork, out: Flow, into: Flow, local: Address, remote: Address) -> None:
        self.local, self.remote = local, remote
        self._process, self._out, self._in = process, out, into
        self._sending = self._receiving = self._closed = self._ended = False
        process.streams[self] = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As :class:`trio.abc.SendStream`. A cancelled call has sent everything all the same."""
        await self._send(_immutable(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._send(None)

    async def _send(self, data: bytes | memoryview | None) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._process.running()
            self._check_writable(sending=data is not None)
            if data:
                self._out.push(data, len(data))
            waited = False
            while not self._closed and (ready := self._out.ready_at()) > trio.current_time():
                await self._out.writer.sleep(ready)
                waited = True
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            await self._process.running()
            self._check_writable(sending=data is not None)
        finally:
            self._sending = False

    def _check_writable(self, *, sending: bool) -> None:
        if self._closed or (self._out.eof and sending):
            raise trio.ClosedResourceError("this stream was already closed")
        if self._out.broken() and sending:
            raise trio.BrokenResourceError(f"{self.remote} reset the connection")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As :class:`trio.abc.ReceiveStream`; without a limit one whole piece as it was sent, not copied."""
        if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
            raise (ValueError if isinstance(max_bytes, int) else TypeError)("max_bytes must be a positive integer")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            if self._closed or self._ended or self._in.ready() is not None:
                await trio.lowlevel.checkpoint()  # else it waits below
            while True:
                await self._process.running()
                if self._closed:
                    raise trio.ClosedResourceError("this stream was already closed")
                if self._ended:
                    return b""
                piece = self._in.ready()
                if piece is None:
                    await self._in.reader.sleep(self._in.pieces[0].arrival if self._in.pieces else math.inf)
                elif piece.data is EOF:
                    self._in.pieces.popleft()
                    self._ended = True
                elif piece.data is RESET:
                    raise trio.BrokenResourceError(f"{self.remote} reset the connection")
                else:
                    return self._in.take(piece, max_bytes)
        finally:
            self._receiving = False

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            await self._process.running()
            if self._closed:
                raise trio.ClosedResourceError("this stream was already closed")
            self._push_eof()
        finally:
            self._sending = False

    def _push_eof(self) -> None:
        if not self._out.eof:
            self._out.eof = True
            self._out.push(EOF, 0)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once. A frozen machine's peers learn of it when it goes on."""
        if not self._closed:
            self._closed = True
            self._in.reader.wake()
            self._out.writer.wake()
            self._process.when_running(self.hang_up)

    def abort(self) -> None:
        """Close with a reset, whatever was read or not."""
        self._closed = True
        self._out.push_reset(-math.inf)
        self.hang_up()

    def hang_up(self) -> None:
        """The kernel's part of closing."""
        if self in self._process.streams:
            del self._process.streams[self]
            self._push_eof()
            self._in.close_reader()
            if self._out.closed:
                self._process.world.forget(self._in, self._out)


class MemoryListener(Listener):
    """Connections waiting to be accepted at one port."""

    def __init__(self, process: MemoryNetwork, address: Address) -> None:
        self.address = address
        self.process = process
        self._waiting: deque[tuple[float, MemoryStream]] = deque()
        self._accepting = False
        self._arrived = Sleeper()
        self.closed = False

    @property
    def full(self) -> bool:
        return len(self._waiting) >= BACKLOG

    def offer(self, at: float, stream: MemoryStream) -> None:
        """A connection that is complete at the time ``at``."""
        self._waiting.append((at, stream))
        self._arrived.wake()

    async def accept(self) -> MemoryStream:
        """The next connection, for one task at a time. Cancellation loses none."""
        if self._accepting:
            raise trio.BusyResourceError("another task is accepting here")
        self._accepting = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                await self.process.running()
                if self.closed:
                    raise trio.ClosedResourceError("this listener was already closed")
                if self._waiting and self._waiting[0][0] <= trio.current_time():
                    return self._waiting.popleft()[1]
                await self._arrived.sleep(self._waiting[0][0] if self._waiting else math.inf)
        finally:
            self._accepting = False

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Refuse from now on; connections not accepted are reset."""
        if not self.closed:
            self.closed = True
            self._arrived.wake()
            self.process.when_running(self.hang_up)

    def hang_up(self) -> None:
        self.process.listeners.pop(self.address.port, None)
        for _, stream in self._waiting:
            stream.abort()
        self._waiting.clear()


class MemoryNetwork(Network):
    """The network as one process on one machine sees it."""

    def __init__(self, world: MemoryWorld, machine: Machine) -> None:
        self.world, self.name, self.machine = world, machine.name, machine
        # dicts, not sets: they are gone through in order of opening
        self.streams: dict[MemoryStream, None] = {}
        self.listeners: dict[int, MemoryListener] = {}
        self.frozen = self.killed = False
        self._stopped = trio.lowlevel.ParkingLot()
        self._deferred: list[Callable[[], None]] = []
        self._next_port = FIRST_EPHEMERAL_PORT

    async def listen(self, bind: Address) -> MemoryListener:
        await trio.lowlevel.checkpoint()
        await self.running()
        if bind.kind != "mem" or bind.host != self.name:
            raise ConfigError(f"{bind} is not an address of this machine; listen at mem://{self.name}:PORT")
        port = bind.port or self._free_port()
        if port in self.listeners:
            raise ConfigError(f"{bind} is in use by another program; choose another port (0 picks a free one)")
        self.listeners[port] = MemoryListener(self, Address("mem", self.name, port))
        return self.listeners[port]

    async def dial(self, address: Address, *, shared_port: bool = False) -> MemoryStream:
        """Connect; takes one round trip. A request that is lost is repeated after 1, 2, 4, … seconds, as TCP does."""
        if address.kind != "mem":
            raise PeerUnreachable("cannot connect", attempts=((str(address), "not an address of this network"),))
        await self.running()
        out, back = self.world.lane(self.name, address.host), self.world.lane(address.host, self.name)
        pause, give_up = CONNECT_RETRY, trio.current_time() + CONNECT_LIMIT
        self.world.note("dial", out, 0)
        while True:
            await trio.sleep(out.route.latency)
            if not self.world.lost(out):
                listener, reason = self.world.answer(address)
                await trio.sleep(back.route.latency)
                await self.running()
                if reason:
                    raise PeerUnreachable("cannot connect", attempts=((str(address), reason),))
                if listener is not None and not self.world.lost(back):
                    return self._connect(listener, out, back)
            if trio.current_time() + pause > give_up:
                reason = "timed out (no answer at all: host down, or a firewall drops it)"
                raise PeerUnreachable("cannot connect", attempts=((str(address), reason),))
            await trio.sleep(pause)
            await self.running()
            pause *= 2

    def _connect(self, listener: MemoryListener, out: Lane, back: Lane) -> MemoryStream:
        there, here = Flow(self.world, out), Flow(self.world, back)
        there.reverse, here.reverse = here, there
        self.world.remember(there, here)
        local = Address("mem", self.name, self._free_port())
        ours = MemoryStream(self, there, here, local, listener.address)
        theirs = MemoryStream(listener.process, here, there, listener.address, local)
        if listener.closed:
            theirs.abort()  # closed since it answered
        else:
            listener.offer(trio.current_time() + out.route.latency, theirs)
        self.world.note("connect", out, 0)
        return ours

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

    def kill(self) -> None:
        """SIGKILL: the kernel closes everything."""
        self.killed, self.frozen = True, False
        self._deferred.clear()
        for listener in list(self.listeners.values()):
            listener.hang_up()
        for stream in list(self.streams):
            stream.hang_up()

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

    def __init__(self, random: random.Random, *, default: Route | None = None, trace: Trace | None = None) -> None:
        """``default``: the route between machines for which no other is set (default: instant, lossless)."""
        self.random, self.trace = random, trace
        self.default = Route() if default is None else default
        self.draw = random.random
        self._machines: dict[str, Machine] = {}
        self._processes: dict[str, MemoryNetwork] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._flows: dict[Flow, None] = {}
        self._group: dict[str, int] = {}
        self._cuts: dict[tuple[str, str], None] = {}
        self._closed = False

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

    # faults

    def kill(self, name: str) -> None:
        """SIGKILL the process on ``name``: its streams end for the others, dials are refused."""
        self._event("kill", name)
        self._processes[name].kill()

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
            route = Route() if source == target else self.default
            # what a machine says to itself does not pass its uplink
            sender = Machine(source) if source == target else self._machine(source)
            found = self._lanes[source, target] = Lane(sender, self._machine(target), route)
        return found

    def separated(self, source: str, target: str) -> bool:
        if source == target:
            return False
        return (source, target) in self._cuts or self._group.get(source, 0) != self._group.get(target, 0)

    def lost(self, lane: Lane) -> bool:
        """Whether one packet, sent now, vanishes."""
        if self.separated(lane.source.name, lane.target.name):
            return True
        return lane.route.loss > 0 and self.draw() < lane.route.loss

    def answer(self, address: Address) -> tuple[MemoryListener | None, str]:
        """What answers a connection request: a listener, silence (it has no room), or a refusal with its reason."""
        process = self._processes.get(address.host)
        if process is None or self._closed:
            return None, "no route to host"
        listener = process.listeners.get(address.port)
        if listener is None:
            return None, "connection refused (nobody listens there)"
        return (None, "") if listener.full else (listener, "")

    def remember(self, *flows: Flow) -> None:
        self._flows.update(dict.fromkeys(flows))

    def forget(self, *flows: Flow) -> None:
        for flow in flows:
            self._flows.pop(flow, None)

    def _machine(self, name: str) -> Machine:
        return self._machines.setdefault(name, Machine(name))

    def _rewire(self) -> None:
        for flow in list(self._flows):
            separated = self.separated(flow.lane.source.name, flow.lane.target.name)
            if separated and not flow.stalled:
                flow.stall()
            elif flow.stalled and not separated:
                flow.resume()
