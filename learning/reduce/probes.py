"""What our line carries, found out before the first round: bulk for three members, who throw it away.

All that is known of lines comes from bulk that goes anyway (:mod:`linemeter`); before the first round none has, and its
slices would be equal. So a peer that has never sent any sends some while it trains, once: to the three members that
follow it in the order of their keys (so each receives from three), until the meter knows the rate, at most
:data:`defaults.PROBE_TIME` seconds and :data:`defaults.PROBE_BYTES` bytes, and never when bulk goes anyway.

It measures our line together with those three paths: where all of them are slower, or their own lines are, too little
comes out, until rounds show more (the meter takes the upper quartile).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs
import trio

from ...transport.address import scope_of
from ...transport.endpoint import Endpoint
from ...transport.errors import Overloaded, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.link import Link
from ...transport.mux import Priority
from ...transport.rpc import Call, Method
from .. import defaults
from .topology import SIZED_FROM


@attrs.frozen
class Probe:
    """The body is to be thrown away."""


@attrs.frozen
class Probed:
    """All of it came."""


PROBE = Method("line.probe", Probe, Probed, Priority.BULK)

_ZEROS = memoryview(bytes(defaults.PROBE_BODY))


@attrs.define
class _Taken:
    """What a peer has sent us: ``size`` bytes since ``since``."""

    since: float
    size: int = 0


class Probes:
    """Measures the line of ``endpoint`` when nobody knows it, and takes what other members send for that.

    ``tell``: told in words what came out.
    """

    def __init__(
        self, endpoint: Endpoint, nursery: trio.Nursery, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self._endpoint, self._nursery, self._tell = endpoint, nursery, tell
        self._members: frozenset[PeerId] = frozenset()
        self._taken: dict[PeerId, _Taken] = {}
        self._next = -math.inf
        self._left = 0
        endpoint.serve(PROBE, self._take)

    # Our own line

    def consider(self, members: Sequence[PeerId], size: int, free: Callable[[], bool]) -> tuple[bool, str]:
        """Begin to measure our line if nobody knows it. Does not wait. Returns (whether it begins, the reason).

        ``members``: of the round, ourselves among them or not. ``size``: bytes of the vector. ``free``: False as soon
        as the line is needed for something else, which ends it.
        """
        me, now = self._endpoint.peer_id, self._endpoint.host.now()
        self._members = frozenset(members)
        others = sorted(peer for peer in self._members if peer != me)
        if size < SIZED_FROM or len(others) < 2:
            return False, "slices would be equal all the same"
        if self._endpoint.line.up.rate(now) is not None:
            return False, "it is measured already"
        if now < self._next:
            return False, "it was tried a while ago"
        if self._endpoint.line.busy(now):
            return False, "bulk goes anyway"
        self._next = now + defaults.PROBE_EVERY
        behind = [peer for peer in others if peer > me] + [peer for peer in others if peer < me]
        self._nursery.start_soon(self._measure, behind[: defaults.PROBE_PEERS], free)
        return True, "nothing has been sent yet"

    async def _measure(self, peers: Sequence[PeerId], free: Callable[[], bool]) -> None:
        """Send bulk to ``peers`` until the rate is known, or for as long as it may take."""
        endpoint, now = self._endpoint, self._endpoint.host.now
        links = await self._linked(peers)
        if not links or not free() or endpoint.line.busy(now()):
            self._next = now()  # another time
            return
        if all(scope_of(link.remote) == "loopback" for link in links):
            return  # what passes on one machine says how busy its processors are
        began, self._left = now(), defaults.PROBE_BYTES
        with trio.move_on_after(defaults.PROBE_TIME):
            async with trio.open_nursery() as nursery:
                for link in links:
                    for _ in range(3):  # the next bodies are under way before the answer to the last one has come
                        nursery.start_soon(self._send, link.peer, free)
        rate = endpoint.line.up.rate(now())
        if rate is not None:
            self._tell(f"our line carries {8e-6 * rate:.3g} Mbit/s, measured in {now() - began:.1f} s")

    async def _linked(self, peers: Sequence[PeerId]) -> list[Link]:
        """The links to ``peers``, once all are there or :data:`defaults.PROBE_WAIT` seconds are over."""
        links: list[Link] = []
        with trio.move_on_after(defaults.PROBE_WAIT):
            while True:
                links = [link for peer in peers if (link := self._endpoint.link(peer)) is not None]
                if len(links) == len(peers):
                    break
                await trio.sleep(defaults.PROBE_WAIT / 20)
        return links

    async def _send(self, peer: PeerId, free: Callable[[], bool]) -> None:
        size, now = defaults.PROBE_FIRST, self._endpoint.host.now
        while free() and self._left >= size and self._endpoint.line.up.rate(now()) is None:
            self._left -= size
            began = now()
            try:
                await self._endpoint.call(peer, PROBE, Probe(), body=[_ZEROS[:size]])
            except (RemoteError, Overloaded):
                return  # the others go on
            if now() - began < defaults.PROBE_QUICK:
                size = min(2 * size, defaults.PROBE_BODY)

    # Those of others

    async def _take(self, call: Call[Probe]) -> Probed:
        peer, now = call.peer, self._endpoint.host.now()
        if peer not in self._members:
            raise RemoteRefused("stranger", "only members of a run measure their lines with us")
        taken = self._taken.get(peer)
        if taken is None or now - taken.since >= defaults.PROBE_EVERY:
            self._taken = {member: held for member, held in self._taken.items() if member in self._members}
            taken = self._taken[peer] = _Taken(now)
        taken.size += call.body_left
        if call.body_left > defaults.PROBE_BODY or taken.size > defaults.PROBE_BYTES:
            raise RemoteRefused("quota", f"more than {defaults.PROBE_BYTES >> 20} MiB to measure a line")
        sink = memoryview(bytearray(min(call.body_left, defaults.PROBE_FIRST)))
        while call.body_left:
            await call.read_into(sink[: min(len(sink), call.body_left)])
        return Probed()
