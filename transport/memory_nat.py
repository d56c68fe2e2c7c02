"""Machines behind NAT in the memory network: what Linux does with MASQUERADE and a stateful firewall.

Kinds of router, each for all machines of one *site* (by default a machine's own):

- ``cone``: others see ``mem://SITE-nat:port``, with the port of the machine itself (unless another machine of the site
  already talks to the same address from that port). A request from outside passes if, and only if, the machine has
  itself asked for a connection to exactly the address and port it comes from, within :data:`HOLE_LIFETIME`.
- ``symmetric``: the same filter, and a fresh port for every address that is talked to (``--random-fully``).
- ``blocked``: the same filter, no translation: a public address behind a firewall.

What does not pass is dropped silently, or answered with a reset (``resets=True``), which also closes the asker's hole
as Linux does. Machines of one site reach each other directly by their own names, which mean nothing outside; nobody
reaches a router's outer address from within (no hairpin). Only requests to connect are filtered: a connection lives on.

A connection request is a :class:`Knock`. It meets a request in flight the other way (simultaneous open: one connection,
which both sides dialled), or a listener, or nobody.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Literal, get_args

import trio

from .address import Address
from .errors import PeerUnreachable
from .memory_flow import Sleeper

if TYPE_CHECKING:
    from .memory import MemoryNetwork
    from .memory_stream import MemoryStream

#: Seconds until an unanswered connection request is repeated (then doubling), and until the kernel gives up (Linux).
CONNECT_RETRY, CONNECT_LIMIT = 1.0, 127.0
#: Seconds for which a request keeps its hole open (nf_conntrack_tcp_timeout_syn_sent).
HOLE_LIFETIME = 120.0

TIMED_OUT = "timed out (no answer at all: host down, or a firewall drops it)"
REFUSED = "connection refused (nobody listens there)"
RESET_BY_PEER = "connection reset"

Kind = Literal["none", "cone", "symmetric", "blocked"]


class Router:
    """The NAT or firewall of one site: its outer name, its members in order, and the holes through it."""

    def __init__(self, site: str, kind: Kind, draw: random.Random, *, resets: bool) -> None:
        self.site, self.kind, self.resets = site, kind, resets
        self.host = f"{site}-nat"
        self.members: dict[str, None] = {}
        self._draw = draw
        # (as seen outside, remote) → (who has asked, until when it holds); and the way back
        self._holes: dict[tuple[Address, Address], tuple[Address, float]] = {}
        self._seen: dict[tuple[Address, Address], Address] = {}

    def leave(self, inner: Address, remote: Address, now: float) -> Address:
        """A request from ``inner`` to ``remote`` goes out: whom ``remote`` sees. Opens the hole, or keeps it open."""
        seen = self._seen.get((inner, remote))
        if seen is None or self._holes[seen, remote][1] <= now:
            self.close(inner, remote)
            seen = self._seen[inner, remote] = self._outer(inner, remote, now)
        self._holes[seen, remote] = inner, now + HOLE_LIFETIME
        return seen

    def _outer(self, inner: Address, remote: Address, now: float) -> Address:
        if self.kind == "blocked":
            return inner
        port = self._draw.randrange(1024, 65536) if self.kind == "symmetric" else inner.port
        while True:
            seen = Address("mem", self.host, port)
            found = self._holes.get((seen, remote))
            if found is None:
                return seen
            if found[1] <= now:
                self.close(found[0], remote)
                return seen
            port = self._draw.randrange(1024, 65536)

    def enter(self, to: Address, remote: Address, now: float) -> Address | None:
        """A request from ``remote`` to our outer address ``to`` comes in: to whom it passes."""
        found = self._holes.get((to, remote))
        return found[0] if found is not None and found[1] > now else None

    def close(self, inner: Address, remote: Address) -> None:
        """The hole is gone: its request was refused."""
        seen = self._seen.pop((inner, remote), None)
        if seen is not None:
            del self._holes[seen, remote]

    def clear(self) -> None:
        """Forget all holes."""
        self._holes.clear()
        self._seen.clear()


class Nats:
    """All routers of a world. False while there are none: then nothing here is asked."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._router: dict[str, Router] = {}
        self._sites: dict[str, Router] = {}
        self._outer: dict[str, Router] = {}

    def __bool__(self) -> bool:
        return bool(self._router)

    def place(self, machine: str, kind: Kind, site: str, *, resets: bool) -> None:
        """Put ``machine`` behind the router of ``site``, which becomes of that kind for all its machines."""
        if kind not in get_args(Kind):
            raise ValueError(f"unknown kind of NAT {kind!r}; choose one of {', '.join(get_args(Kind))}")
        before = self._router.pop(machine, None)
        if before is not None:
            del before.members[machine]  # its holes expire
        if kind == "none":
            return
        router = self._sites.get(site)
        if router is None:
            router = self._sites[site] = Router(site, kind, self._draw, resets=resets)
            self._outer[router.host] = router
        router.kind, router.resets = kind, resets
        router.members[machine] = None
        self._router[machine] = router

    def of(self, machine: str) -> Router | None:
        return self._router.get(machine)

    def rename(self, router: Router, host: str) -> None:
        """The router gets another outer address."""
        del self._outer[router.host]
        router.host = host
        router.clear()
        self._outer[host] = router

    def machine(self, host: str) -> str | None:
        """The machine at whose distance an outer address is: the first of its site."""
        router = self._outer.get(host)
        return next(iter(router.members), None) if router is not None else None

    def leave(self, sender: str, local: Address, to: Address, receiver: str, now: float) -> Address:
        """A request goes out from machine ``sender``: as whom it is seen where it goes."""
        router = self._router.get(sender)
        if router is None or (receiver in router.members and to.host != router.host):
            return local
        return router.leave(local, to, now)

    def enter(self, sender: str, seen: Address, to: Address, receiver: str, now: float) -> tuple[Address | None, str]:
        """A request arrives: the listening address it passes to; None: dropped, or refused with that reason."""
        outer = self._outer.get(to.host)
        ours = self._router.get(sender)
        if outer is None:
            theirs = self._router.get(receiver)
            if theirs is None or theirs is ours:
                return to, ""
            if theirs.kind != "blocked":
                return None, ""  # a name that means nothing outside its site
            outer = theirs
        if outer is ours:
            return None, ""  # no hairpin
        inner = outer.enter(to, seen, now)
        return inner, REFUSED if inner is None and outer.resets else ""

    def refused(self, sender: str, local: Address, to: Address) -> None:
        """A reset came back: the sender's router forgets the request."""
        router = self._router.get(sender)
        if router is not None:
            router.close(local, to)


class Knock:
    """A request to connect in flight, and the stream if one from the other side meets it."""

    def __init__(self) -> None:
        self.stream: MemoryStream | None = None
        self._ready = math.inf
        self._woken = Sleeper()

    def meet(self, stream: MemoryStream, ready: float) -> None:
        """The connection is made, and complete here at the time ``ready``."""
        self.stream, self._ready = stream, ready
        self._woken.wake()

    async def wait(self, until: float) -> bool:
        """Wait, and say whether the connection is made."""
        while self.stream is None:
            if trio.current_time() >= until:
                return False
            await self._woken.sleep(until)
        await trio.sleep_until(self._ready)
        return True


async def knock(process: MemoryNetwork, address: Address, port: int) -> MemoryStream:
    """Connect from ``port`` to ``address``, through the routers on the way. As :meth:`MemoryNetwork.dial`."""
    attempt, key, taken = Knock(), (port, address), False
    process.knocks[key] = attempt
    try:
        pause, give_up = CONNECT_RETRY, trio.current_time() + CONNECT_LIMIT
        process.world.note("dial", process.world.lanes(process.name, address)[0], 0)
        while True:
            reason = await _request(process, address, port, attempt)
            await process.running()
            if attempt.stream is None and not reason:
                if trio.current_time() + pause > give_up:
                    reason = TIMED_OUT
                else:
                    await attempt.wait(trio.current_time() + pause)
                    await process.running()
            if attempt.stream is not None:
                taken = True
                return attempt.stream
            if reason:
                raise PeerUnreachable("cannot connect", attempts=((str(address), reason),))
            pause *= 2
    finally:
        process.knocks.pop(key, None)
        if attempt.stream is not None and not taken:
            attempt.stream.abort()


async def _request(process: MemoryNetwork, address: Address, port: int, attempt: Knock) -> str:
    """Send one request and wait for its answer: the reason of a refusal, or nothing. May make ``attempt.stream``."""
    world, moves = process.world, process.moves
    out, back = world.lanes(process.name, address)
    local = Address("mem", process.host, port)
    seen = world.nats.leave(process.name, local, address, out.target.name, trio.current_time())
    if await attempt.wait(trio.current_time() + out.route.latency) or world.lost(out):
        return ""
    inner, reason = world.nats.enter(process.name, seen, address, out.target.name, trio.current_time())
    there = world.process_at(inner) if inner is not None else None
    listener, other = None, None
    if inner is not None:
        other = there.knocks.get((inner.port, seen)) if there is not None else None
        if other is attempt:
            other, reason = None, REFUSED  # met itself
        elif other is None:
            listener, reason = world.answer(inner)
    if await attempt.wait(trio.current_time() + back.route.latency):
        return ""
    await process.running()
    if reason:
        world.nats.refused(process.name, local, address)
        return reason
    if inner is None or there is None or (other is None and listener is None):
        return ""
    if world.lost(back) or moves != process.moves:
        return ""
    if other is not None and there.knocks.get((inner.port, seen)) is not other:
        return RESET_BY_PEER  # given up since
    ours, theirs = world.join(process, local, address, there, inner, seen)
    arrival = trio.current_time() + out.route.latency
    if other is not None:
        other.meet(theirs, arrival)
    elif listener is not None:
        listener.offer(arrival, theirs)
    attempt.meet(ours, trio.current_time())
    return ""
