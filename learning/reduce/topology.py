"""The planner: from what the peers have measured to who owns how much, in which schedule, how long, and why.

A pure function of its arguments: whoever has the same reports gets the same plan. The rules, with their reasons, stand
in ``docs/topology.md``; the optimum itself is computed in :mod:`sizing`, orders of a ring in :mod:`ring`.

Reports are claims of peers. A line is believed to be at most :data:`TRUST` times as fast as the median one and as slow,
a path has its :data:`PATH_FLOOR`, and nobody owns more than :data:`MOST` equal shares.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median

import attrs

from ...transport.identity import PeerId
from . import ring
from .codecs import FP32, Codec
from .rates import NOTHING, Rates
from .sizing import Lines, Sizes, optimal, predict
from .slices import Slice, split

#: A line counts as at most so many times the median line: what a liar gains, and what a datacentre is not used for.
TRUST = 32.0

#: Equal shares that one owner may have at most: it combines alone what it owns, and its loss costs that much.
MOST = 8.0

#: A path counts as an n-th of this part of its sender's line at least, n being the peers: what the sender says of it
#: may shrink the share of the peer at its other end no further.
PATH_FLOOR = 1.0 / 16.0

#: Of what has come over a peer's line, slow senders to it must have brought this part together for the line to be why.
SHARED = 0.75

#: A member whose line is so many times slower than the median one is not waited for: it would hold up all others that
#: much. Twice as far as lines of one kind differ (a mobile one and a good home line), half of TRUST.
LAGGARD = 16.0

#: Sized slices, or a ring, must save this part of the time: equal slices need no trust in anybody.
WORTH = 0.05
#: A ring must save this part: any loss in it costs the whole round, in a butterfly only what the lost one held.
RING_WORTH = 0.25

#: Bytes of the vector below which nothing is sized: latency and messages take longer than its bytes.
SIZED_FROM = 1 << 20

#: Round trips of the control messages of a butterfly beside its two phases: ready and plan; held and freeze; progress
#: and propose; accept and commit.
CONTROL_ROUND_TRIPS = 4.0


@attrs.frozen
class Topology:
    """A decision. ``order`` is the ring's, empty for a butterfly; ``shares`` and ``slices`` are the butterfly's.

    ``seconds``: expected from plan to commit, None when nothing was measured; ``compared``: the same for each schedule
    that was looked at. ``phase``: expected seconds of the longer bulk phase; ``rtt``: seconds, the longest that counts.
    """

    schedule: str
    order: tuple[PeerId, ...]
    shares: tuple[tuple[PeerId, float], ...]
    slices: tuple[Slice, ...]
    seconds: float | None
    reason: str
    compared: tuple[tuple[str, float], ...] = ()
    phase: float | None = None
    rtt: float = 0.0


@attrs.frozen
class Mesh:
    """What the reports come down to, in bytes per second. ``paths``: only those that limit more than the lines do.
    ``said``: all that are said to be slow, also where a slow line at their end explains it: nothing sends over them in
    vain in a ring, and where lines are what is slow no ring is better than a butterfly.

    ``inf``: no limit known. ``known``: peers whose uplink was reported; the others are taken to have the median one.
    ``rtt``: seconds, the longest that anybody reports, the upper quarter of reports left out.
    """

    peers: tuple[PeerId, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    paths: Mapping[tuple[int, int], float]
    known: int
    rtt: float
    said: Mapping[tuple[int, int], float] = attrs.field(factory=dict)

    @classmethod
    def of(cls, peers: Sequence[PeerId], reports: Mapping[PeerId, Rates]) -> Mesh | None:
        """None when less than half of ``peers`` have measured their uplinks: a few say little about the others."""
        found = [reports.get(peer, NOTHING) for peer in peers]
        measured = sorted(report.up for report in found if report.up)
        if 2 * len(measured) < len(peers):
            return None
        usual = float(median(measured))
        up = tuple(min(max(float(report.up or usual), usual / TRUST), usual * TRUST) for report in found)
        index = {peer: i for i, peer in enumerate(peers)}
        said: dict[tuple[int, int], float] = {}
        for i, report in enumerate(found):
            for path in report.paths:
                j = index.get(path.peer)
                if j is not None and j != i:
                    said[i, j] = max(float(path.rate), up[i] * PATH_FLOOR / len(peers))
        down = []
        for j, report in enumerate(found):
            slow = [rate for (_, at), rate in said.items() if at == j]
            if 2 * len(slow) >= len(peers) > 2 and sum(slow) >= SHARED * found[j].down:
                # Slow for most of those who send to it: that is its own line, which they shared, unless much more than
                # they brought has come over it.
                down.append(max(float(report.down), sum(slow), usual / TRUST))
            else:
                down.append(math.inf)
        paths = {(i, j): rate for (i, j), rate in said.items() if down[j] == math.inf and rate < up[i]}
        trips = sorted(report.rtt for report in found if report.rtt)
        rtt = trips[(3 * len(trips) - 1) // 4] / 1e6 if trips else 0.0
        return cls(tuple(peers), up, tuple(down), paths, len(measured), rtt, said)

    def lines(
        self, size: int, givers: Collection[PeerId], takers: Collection[PeerId], owners: Collection[PeerId]
    ) -> Lines:
        """For :mod:`sizing`: rates in vectors of ``size`` bytes."""
        into, out = [math.inf] * len(self.peers), [math.inf] * len(self.peers)
        for (i, j), rate in self.paths.items():
            if self.peers[i] in givers:
                into[j] = min(into[j], rate)
            if self.peers[j] in takers:
                out[i] = min(out[i], rate)
        most = min(1.0, MOST / len(owners))
        return Lines(
            up=tuple(rate / size for rate in self.up),
            down=tuple(rate / size for rate in self.down),
            into=tuple(rate / size for rate in into),
            out=tuple(rate / size for rate in out),
            gives=tuple(peer in givers for peer in self.peers),
            takes=tuple(peer in takers for peer in self.peers),
            most=tuple(most if peer in owners else 0.0 for peer in self.peers),
        )

    def _path(self, i: int, j: int) -> float:
        return min(self.paths.get((i, j), math.inf), self.said.get((i, j), math.inf))

    def matrix(self, size: int) -> tuple[tuple[float, ...], ...]:
        """Vectors of ``size`` bytes per second from each to each when nothing else is sent."""
        count = range(len(self.peers))
        return tuple(tuple(min(self.up[i], self.down[j], self._path(i, j)) / size for j in count) for i in count)


def plan(
    members: Sequence[PeerId],
    receivers: Sequence[PeerId],
    length: int,
    reports: Mapping[PeerId, Rates],
    codec: Codec = FP32,
    schedules: Collection[str] = ("butterfly",),
    guests: Collection[PeerId] = (),
    judged: Collection[PeerId] = (),
) -> Topology:
    """Decide for a vector of ``length`` elements that ``members`` contribute to and ``receivers`` get.

    ``codec``: how it travels.

    ``reports``: by peer; those of strangers do not count. ``schedules``: those that can be executed.
    ``guests``: peers that get the result as well and own nothing; of them ``judged`` send as members do.
    """
    owners = tuple(members) or tuple(receivers)
    peers = tuple(sorted({*members, *receivers, *guests}))
    size, block = codec.wire_size(length), codec.block
    equal = [1.0 / len(owners) if peer in set(owners) else 0.0 for peer in peers]
    mesh = Mesh.of(peers, reports)
    if mesh is None:
        return _butterfly(
            owners,
            peers,
            Sizes(tuple(equal), 0.0, 0.0),
            length,
            None,
            "equal slices: too few uplinks are measured",
            block=block,
        )
    lines = mesh.lines(size, {*members, *judged}, {*receivers, *guests}, set(owners))
    control = CONTROL_ROUND_TRIPS * mesh.rtt
    even = predict(lines, equal)
    if size < SIZED_FROM or len(peers) < 3:
        why = "two peers send the same whoever owns what" if size >= SIZED_FROM else f"{size} bytes are too few to size"
        return _butterfly(owners, peers, even, length, mesh, f"equal slices: {why}", block=block)
    best = optimal(lines)
    compared = [("equal", even.seconds + control), ("sized", best.seconds + control)]
    sized = best.seconds < (1.0 - WORTH) * even.seconds
    chosen = best if sized else even
    expected = chosen.seconds + control
    measured = f"{mesh.known} of {len(peers)} uplinks measured, {_span(mesh.up)}"
    reason = f"slices sized for {expected:.2f} s instead of {even.seconds + control:.2f}" if sized else "equal slices"
    # Only paths make a ring better than a butterfly: every line sends the same in both.
    if "ring" in schedules and mesh.paths and set(members) == set(peers):
        order, seconds, why = best_ring(mesh.matrix(size), mesh.rtt / 2.0)
        seconds += control
        compared.append((f"ring, {why}", seconds))
        if seconds < (1.0 - RING_WORTH) * expected:
            named = tuple(peers[i] for i in order)
            told = f"ring ({why}) for {seconds:.2f} s instead of {expected:.2f} ({measured})"
            shares = tuple(zip(peers, equal, strict=True))
            slices = split(0, length, owners, block=block)
            return Topology("ring", named, shares, slices, seconds, told, tuple(compared), seconds, mesh.rtt)
    slow = f", slow paths: {len(mesh.paths)}" if mesh.paths else ""
    return _butterfly(owners, peers, chosen, length, mesh, f"{reason} ({measured}{slow})", compared, block)


def laggards(members: Sequence[PeerId], reports: Mapping[PeerId, Rates], needed: int) -> tuple[tuple[PeerId, ...], str]:
    """Members whose own uplink, as they say themselves, is :data:`LAGGARD` times slower than the median of all, slowest
    first, as many as can be spared if ``needed`` shall contribute; and the reason for people, empty if there are none.
    """
    up = {member: reports[member].up for member in members if member in reports and reports[member].up}
    if len(up) < 3:
        return (), ""
    usual = median(up.values())
    slow = sorted((member for member in up if up[member] * LAGGARD < usual), key=lambda member: (up[member], member))
    slow = slow[: max(0, len(members) - needed)]
    if not slow:
        return (), ""
    named = ", ".join(f"{member.short} ({up[member] / 1e6:.2g} MB/s)" for member in slow[:4])
    return tuple(slow), f"; left out, as their lines are too slow: {named}; the median is {usual / 1e6:.3g} MB/s"


def best_ring(rate: ring.Matrix, latency: float) -> tuple[ring.Order, float, str]:
    """The better one of the two orders by its predicted seconds, and its name. ``latency``: seconds, of every path."""
    count = len(rate)
    late = [[latency] * count for _ in range(count)]
    cost = [[0.0 if i == j else latency + 1.0 / (count * rate[i][j]) for j in range(count)] for i in range(count)]
    orders = (("max-min", ring.widest(rate)), ("shortest tour", ring.shortest(cost)))
    return min(
        ((order, ring.seconds(order, rate, late), name) for name, order in orders), key=lambda item: (item[1], item[2])
    )


def _butterfly(
    owners: Sequence[PeerId],
    peers: Sequence[PeerId],
    sizes: Sizes,
    length: int,
    mesh: Mesh | None,
    reason: str,
    compared: Sequence[tuple[str, float]] = (),
    block: int = 1,
) -> Topology:
    by_peer = dict(zip(peers, sizes.shares, strict=True))
    return Topology(
        schedule="butterfly",
        order=(),
        shares=tuple(by_peer.items()),
        slices=split(0, length, owners, [by_peer[owner] for owner in owners], block),
        seconds=sizes.seconds + CONTROL_ROUND_TRIPS * mesh.rtt if mesh is not None else None,
        reason=reason,
        compared=tuple(compared),
        phase=max(sizes.scatter, sizes.gather) if mesh is not None else None,
        rtt=mesh.rtt if mesh is not None else 0.0,
    )


def _span(rates: Sequence[float]) -> str:
    low, high = min(rates) / 1e6, max(rates) / 1e6
    return f"{low:.3g} MB/s" if high < 1.1 * low else f"{low:.3g} to {high:.3g} MB/s"


def bound(size: int, up: Sequence[float]) -> Sizes:
    """The optimum for a vector of ``size`` bytes over uplinks in bytes per second alone, nothing capped."""
    count = len(up)
    free, everybody = (math.inf,) * count, (True,) * count
    rates = tuple(rate / size for rate in up)
    return optimal(Lines(rates, free, free, free, everybody, everybody, (1.0,) * count))
