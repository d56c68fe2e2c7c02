"""Links without encryption, for swarms of thousands of nodes in one process; they exist in the memory network only.

A :class:`PlainEndpoint` takes the place of :class:`~shoal.transport.endpoint.Endpoint` above it: contacts, calls,
handlers, limits, deadlines and errors are the real ones. Below it there is no handshake, no record and no mux: a call
is one event at the peer and its answer one event back (:mod:`shoal.transport.agenda`), each after the time that the
lane between the machines takes for its bytes. A link costs some hundred bytes and no task.

It cannot be negotiated: nothing on a wire names it. A :class:`PlainEndpoint` refuses any network but the memory
network and opens no listener there, so whoever dials it with a handshake is refused, and it finds only its like.

What it leaves out: streams and bodies (a call that needs one raises), pipes, NAT traversal, bandwidth measurement. What
a partition swallows is not sent again after it: the calls of that time expire, and the link with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import trio

from . import deadlines, defaults
from .address import Address, SignedPeerRecord
from .callmux import IncomingCall
from .endpoint import Endpoint
from .errors import ConfigError, LinkClosed, PeerUnreachable, ProtocolMisuse, RemoteError
from .frames import GoodbyeCode, Priority
from .host import Host
from .identity import Identity, PeerId
from .link import Link
from .memory import MemoryNetwork
from .memory_flow import Lane
from .memory_nat import CONNECT_LIMIT, CONNECT_RETRY, REFUSED, TIMED_OUT
from .stream import LinkStream, link_lost
from .waiter import Waiter

#: Bytes that a call and an answer take beside their contents: frame, record and TCP/IP headers (docs/links.md).
CALL_OVERHEAD = 95

#: Bytes of a handshake (Noise XX with certificates) and of the two hellos after it, without the peer records.
HANDSHAKE_BYTES = 900


class PlainCall(IncomingCall):
    """One call: the asker waits for ``answer``, ``link`` is its end, ``open`` until the other end has answered."""

    __slots__ = ("answer", "asker", "link", "lost")

    def __init__(self, link: PlainLink) -> None:
        super().__init__(0)
        self.link = link
        self.asker = Waiter()
        self.answer: bytes | None = None
        self.lost: RemoteError | None = None


class PlainLink:
    """One end of a link in memory; what it shows is what :class:`~shoal.transport.link.Link` shows to calls."""

    __slots__ = (
        "asked", "close_reason", "closed_idle", "endpoint", "goodbye_code", "heard", "initiator", "lane",
        "last_arrival", "last_used", "observed", "opened_at", "other", "peer", "remote", "rtt", "serving", "useful",
    )  # fmt: skip

    cipher = "plain"
    way = "direct"
    bandwidth: float | None = None
    lag = 0.0
    interrupted = troubled = False
    held = 0
    bytes_sent = bytes_received = 0
    #: The other end, None once both have ended: the two must not keep each other alive.
    other: PlainLink | None

    def __init__(self, endpoint: PlainEndpoint, peer: PeerId, remote: Address, lane: Lane, *, initiator: bool) -> None:
        now = trio.current_time()
        self.endpoint, self.peer, self.remote, self.lane, self.initiator = endpoint, peer, remote, lane, initiator
        self.rtt = 0.0
        self.opened_at = self.last_used = self.heard = self.last_arrival = now
        self.useful = self.closed_idle = False
        self.close_reason: RemoteError | None = None
        self.goodbye_code: int | None = None
        self.observed: Address | None = None
        #: Calls of ours without an answer, and of the peer's.
        self.asked: dict[PlainCall, None] = {}
        self.serving: dict[PlainCall, None] = {}

    @property
    def alive(self) -> bool:
        return self.close_reason is None

    @property
    def idle(self) -> bool:
        return not self.asked and not self.serving

    # Calls, as linkcalls has them

    @property
    def can_call(self) -> bool:
        return self.alive and len(self.asked) < defaults.MAX_LINK_CALLS

    async def wait_can_call(self) -> None:
        while self.alive and not self.can_call:
            await self.endpoint.slots.park()
        if not self.alive:
            raise self._closed_error()

    async def ask(self, request: bytes) -> bytes:
        call = PlainCall(self)
        self.asked[call] = None
        self.endpoint._used(self)
        began = trio.current_time()
        self._send(len(request), PlainLink._called, call, request)
        try:
            while call.answer is None:
                if call.lost is not None:
                    raise link_lost(call.lost, self.peer)
                await call.asker.wait()
        finally:
            self.asked.pop(call, None)
            if self.endpoint.slots:
                self.endpoint.slots.unpark_all()
            if call.answer is None and call.lost is None:
                self._send(0, PlainLink._cancelled, call)
                if self.heard < began and self.alive:
                    # Given up, and not a sign of life since: a keepalive would have ended the link by now.
                    self.end(LinkClosed("it does not answer", peer=self.peer.short))
        if call.answer is None:
            raise AssertionError("unreachable: lost calls raise")
        return call.answer

    async def wait_can_answer(self) -> None:
        await trio.lowlevel.checkpoint()

    def answer(self, call: IncomingCall, data: bytes) -> None:
        assert isinstance(call, PlainCall)
        if call.open:
            call.open = False
            self.serving.pop(call, None)
            if self.alive:
                self._send(len(data), PlainLink._answered, call, data)

    def try_open_stream(self, protocol: str, priority: Priority = Priority.CONTROL) -> LinkStream | None:
        raise ProtocolMisuse(f"a link of the plain suite carries small calls only, no stream for {protocol}")

    def _closed_error(self) -> RemoteError:
        return link_lost(self.close_reason or LinkClosed("closed", peer=self.peer.short), self.peer)

    # What arrives

    def _send(self, size: int, deliver: Callable[..., None], *arguments: object) -> None:
        """Have the other end do ``deliver`` when ``size`` bytes have arrived there; never, if they do not."""
        network, other = self.endpoint.network, self.other
        if network.killed or other is None:
            return
        if network.frozen:
            network.when_running(lambda: self._send(size, deliver, *arguments))
            return
        self.last_arrival = network.world.carry(
            self.lane, size + CALL_OVERHEAD, self.last_arrival, other._receive, deliver, *arguments
        )

    def _receive(self, deliver: Callable[..., None], *arguments: object) -> None:
        network = self.endpoint.network
        if network.frozen:
            network.when_running(lambda: self._receive(deliver, *arguments))
        elif not network.killed:
            self.heard = trio.current_time()
            deliver(self, *arguments)

    def _called(self, call: PlainCall, request: bytes) -> None:
        if not self.alive:
            self._send(0, PlainLink._reset)
        else:
            self.serving[call] = None
            self.endpoint._on_call(cast(Link, self), call, memoryview(request))

    def _cancelled(self, call: PlainCall) -> None:
        if call.open:
            call.open = False
            self.serving.pop(call, None)
            if call.on_broken is not None:
                call.on_broken()

    def _answered(self, call: PlainCall, data: bytes) -> None:
        if call in self.asked:
            call.answer = data
            call.asker.wake()

    def _reset(self) -> None:
        self.end(LinkClosed("the connection broke without a goodbye", peer=self.peer.short))

    def _parted(self, code: int, reason: str) -> None:
        self.goodbye_code = code
        self.end(LinkClosed(f"it said goodbye: {reason}", peer=self.peer.short, goodbye=True))

    # Its end

    def say_goodbye(self, reason: str, code: int) -> None:
        if self.alive:
            self._send(len(reason), PlainLink._parted, code, reason)
            self.closed_idle = code == GoodbyeCode.IDLE
            self.end(LinkClosed(f"closed by us: {reason}", peer=self.peer.short))

    def hang_up(self) -> None:
        """The process has died: its kernel closes the connection."""
        if self.alive and self.other is not None:
            world = self.endpoint.network.world
            world.carry(self.lane, CALL_OVERHEAD, self.last_arrival, self.other._reset)
            self.close_reason = LinkClosed("this process was killed", peer=self.peer.short)

    def end(self, reason: RemoteError) -> None:
        if self.alive:
            self.close_reason = reason
            other = self.other
            if other is not None and not other.alive:
                other.other = self.other = None
            asked, serving = list(self.asked), list(self.serving)
            self.asked.clear()
            self.serving.clear()
            for call in asked:
                call.lost = reason
                call.asker.wake()
            for call in serving:
                call.open = False
                if call.on_broken is not None:
                    call.on_broken()
            self.endpoint._ended(self)


class _Attempt:
    """One attempt to reach a peer by ``addresses`` in turn, shared by all who wait for it."""

    __slots__ = ("addresses", "began", "done", "expected", "failures", "link")

    def __init__(self, expected: PeerId | None, addresses: tuple[Address, ...]) -> None:
        self.expected, self.addresses = expected, addresses
        self.failures: list[tuple[str, str]] = []
        self.link: PlainLink | None = None
        self.began = trio.current_time()
        self.done = trio.Event()


class PlainEndpoint(Endpoint):
    """An endpoint whose links are :class:`PlainLink`. Raises :class:`ConfigError` outside the memory network."""

    def __init__(self, host: Host, identity: Identity, *, max_links: int = defaults.MAX_LINKS) -> None:
        if not isinstance(host.network, MemoryNetwork):
            raise ConfigError("the plain suite is for the memory network of simulations only: it encrypts nothing")
        super().__init__(host, identity, max_links=max_links)
        self.network = host.network
        #: Who waits for a call of any link to end, as that link has as many as are allowed.
        self.slots = trio.lowlevel.ParkingLot()
        self._plain: dict[PeerId, PlainLink] = {}  # least recently used first
        self._attempts: dict[PeerId, _Attempt] = {}
        self._max_links = max_links
        self._bound: tuple[Address, ...] = ()

    # Life

    async def run(
        self, bind: Sequence[Address] = (), *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer at every address of ``bind`` until cancelled, then say goodbye on all links."""
        if self._nursery is not None:
            raise ProtocolMisuse("an endpoint runs once")
        await self.network.running()
        for address in bind:
            if address.kind != "mem" or address.host != self.network.host:
                raise ConfigError(f"{address} is not an address of this machine: mem://{self.network.host}:PORT")
            self.network.plain[address.port] = self
        self._bound = tuple(bind)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for address in self._bound:
                self.network.plain.pop(address.port, None)
            self._bound = ()
            for link in list(self._plain.values()):
                link.say_goodbye("the node stops", GoodbyeCode.LEAVING)

    def kill(self) -> None:
        """SIGKILL: see :meth:`MemoryWorld.kill`."""
        for link in list(self._plain.values()):
            link.hang_up()
        self._plain.clear()

    def own_addresses(self) -> tuple[Address, ...]:
        return self._bound

    def listening(self) -> tuple[Address, ...]:
        return self._bound

    # Links

    @property
    def max_links(self) -> int:
        return self._max_links

    def links(self) -> list[Link]:
        return [cast(Link, link) for link in self._plain.values()]

    def link(self, peer: PeerId) -> Link | None:
        return cast("Link | None", self._plain.get(peer))

    def _ended(self, link: PlainLink) -> None:
        if self._plain.get(link.peer) is link:
            del self._plain[link.peer]
        for hook in self.on_link_lost:
            hook(cast(Link, link))

    def _adopt(self, link: PlainLink) -> None:
        older = self._plain.get(link.peer)
        if older is not None:
            older.say_goodbye("another link to the same peer took over", GoodbyeCode.IDLE)
        self._plain[link.peer] = link
        if len(self._plain) > self._max_links:
            fresh = trio.current_time() - defaults.IDLE_GRACE  # one just made gets to be used
            for spare in list(self._plain.values()):
                if spare.idle and spare.last_used < fresh:
                    spare.say_goodbye("its slot is needed", GoodbyeCode.IDLE)
                    self._count("links_closed_idle")
                    break
        for hook in self.on_link:
            hook(cast(Link, link))

    def _used(self, link: PlainLink) -> None:
        if self._plain.get(link.peer) is link:
            del self._plain[link.peer]
            self._plain[link.peer] = link
            link.last_used = trio.current_time()

    # Connecting

    async def connect(self, peer: PeerId, addresses: Sequence[Address] = (), *, timeout: float | None = None) -> Link:
        if peer == self.peer_id:
            raise ProtocolMisuse("a node does not call itself")
        await trio.lowlevel.checkpoint_if_cancelled()
        live = self._plain.get(peer)
        if live is not None:
            return cast(Link, live)
        if self._nursery is None:
            raise LinkClosed("this node does not run", peer=peer.short)
        attempt = self._attempts.get(peer)
        if attempt is None:
            known = self._contacts.get(peer, self.host.wall())
            ways = tuple(dict.fromkeys((*addresses, *(known[1].addresses if known is not None else ()))))
            attempt = self._attempts[peer] = _Attempt(peer, ways)
            self._try(attempt, 0)
        return await self._wait(attempt, timeout)

    async def identify(self, address: Address) -> Link:
        await trio.lowlevel.checkpoint()
        attempt = _Attempt(None, (address,))
        self._try(attempt, 0)
        return await self._wait(attempt, None)

    async def _wait(self, attempt: _Attempt, timeout: float | None) -> Link:
        seconds = deadlines.connect(0.0) if timeout is None else timeout
        with trio.move_on_after(seconds):
            await attempt.done.wait()
        if attempt.link is not None:
            return cast(Link, attempt.link)
        peer = attempt.expected.short if attempt.expected is not None else ""
        failures = tuple(attempt.failures)
        if not attempt.done.is_set():
            failures += ((str(attempt.addresses[min(len(failures), len(attempt.addresses) - 1)]), TIMED_OUT),)
            self._attempts = {p: a for p, a in self._attempts.items() if a is not attempt}
        what = "no way to it succeeded" if attempt.addresses else "no address of it is known"
        raise PeerUnreachable(what, peer=peer, attempts=failures)

    def _try(self, attempt: _Attempt, index: int, *, tries: int = 0) -> None:
        """Knock at address number ``index``: three round trips to the link, for connection, handshake and hello."""
        if index >= len(attempt.addresses):
            self._finish(attempt)
            return
        address = attempt.addresses[index]
        if address.kind != "mem":
            attempt.failures.append((str(address), "not an address of this network"))
            self._try(attempt, index + 1)
            return
        world = self.network.world
        target = world.target_of(address)
        out, back = world.passing_lane(self.network.name, target), world.passing_lane(target, self.network.name)
        world.note("dial", out, 0)
        now = trio.current_time()
        if world.lost(out) or world.lost(back):
            pause = CONNECT_RETRY * 2**tries
            if now + pause - attempt.began < CONNECT_LIMIT:
                world.agenda.at(now + pause, lambda: self._again(attempt, index, tries + 1))
            else:
                attempt.failures.append((str(address), TIMED_OUT))
                self._try(attempt, index + 1)
            return
        size = HANDSHAKE_BYTES + len(self.record().record)
        trip = out.route.latency + back.route.latency
        world.carry(out, size, now + 2 * trip + out.route.latency, self._knock, attempt, index, out, back)

    def _again(self, attempt: _Attempt, index: int, tries: int) -> None:
        if self._wanted(attempt):
            self._try(attempt, index, tries=tries)

    def _wanted(self, attempt: _Attempt) -> bool:
        """Somebody may still wait for it."""
        return attempt.expected is None or self._attempts.get(attempt.expected) is attempt

    def _knock(self, attempt: _Attempt, index: int, out: Lane, back: Lane) -> None:
        """At the machine that was dialled, when our part of the handshake has arrived."""
        world, address = self.network.world, attempt.addresses[index]
        if self.network.killed:
            return
        process = world.process_at(address)
        if process is not None and process.frozen:
            process.when_running(lambda: self._knock(attempt, index, out, back))
            return
        there = process.plain.get(address.port) if process is not None and not process.killed else None
        if not isinstance(there, PlainEndpoint) or there._nursery is None:
            world.carry(back, CALL_OVERHEAD, -1.0, self._refused, attempt, index, REFUSED)
            return
        if attempt.expected is not None and there.peer_id != attempt.expected:
            world.carry(back, CALL_OVERHEAD, -1.0, self._refused, attempt, index, "another peer answers there")
            return
        if there.peer_id == self.peer_id:
            world.carry(back, CALL_OVERHEAD, -1.0, self._refused, attempt, index, "that address is this node itself")
            return
        ours = PlainLink(self, there.peer_id, address, out, initiator=True)
        own = self._bound[0] if self._bound else Address("mem", self.network.host, 1)
        theirs = PlainLink(there, self.peer_id, own, back, initiator=False)
        ours.other, theirs.other = theirs, ours
        ours.rtt = theirs.rtt = out.route.latency + back.route.latency
        there.learn(self.record())
        there._adopt(theirs)
        record = there.record()
        size = HANDSHAKE_BYTES + len(record.record)
        ours.last_arrival = theirs.last_arrival = world.carry(back, size, -1.0, self._greeted, attempt, ours, record)

    def _refused(self, attempt: _Attempt, index: int, reason: str) -> None:
        attempt.failures.append((str(attempt.addresses[index]), reason))
        if self._wanted(attempt):
            self._try(attempt, index + 1)

    def _greeted(self, attempt: _Attempt, link: PlainLink, record: SignedPeerRecord) -> None:
        if self.network.killed or self._nursery is None:
            if link.other is not None:
                link.other._reset()
            return
        if not link.alive:
            self._finish(attempt)
            return
        self.learn(record)
        self._adopt(link)
        attempt.link = link
        self._finish(attempt)

    def _finish(self, attempt: _Attempt) -> None:
        if attempt.expected is not None and self._attempts.get(attempt.expected) is attempt:
            del self._attempts[attempt.expected]
        attempt.done.set()
