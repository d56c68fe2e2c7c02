"""How long a group reduce takes and how many bytes it moves over modelled lines, without moving any.

The model. What the members of a butterfly say to each other after the last one is ready, in the order of
:mod:`shoal.learning.rounds`, each message one latency ``L`` (the longest between any two of them)::

    ready, plan | scatter S | held, freeze | gather G | progress, reveal, nonces, propose, accept, commit

so a reduce takes ``12 L + S + G`` (of two, who know each other's part sooner, ``10 L``), where in each bulk phase a
member's uplink carries all that it sends and its downlink all that it receives, and the slowest one decides. Slices are
those of the real planner (:func:`shoal.learning.reduce.topology.plan`), told the lines as members of a run have
measured them after a round.

Not in the model: computing, lost packets, slow start, two reduces that share a line (a peer does one at a time), and
the queue of a relay. ``tests/sim/test_field_links.py`` holds it to the full protocol in virtual time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import attrs

from ..learning.reduce import topology
from ..learning.reduce.codecs import resolve
from ..learning.reduce.rates import MAX_RATE, Rates
from ..learning.reduce.slices import Slice
from ..learning.rounds.decisions import candidates
from ..learning.rounds.messages import quorum
from ..transport.identity import PeerId

#: Bytes of one message of a round beside what it carries, with frame, seal and answer: 325 to 375 in rounds of 2, 4 and
#: 16 peers in the full protocol.
MESSAGE = 350

#: Bytes of one message of the leader, and for each member on top of that: plans and records name them all. Fitted to
#: the same rounds, within 3 %.
LEADER_MESSAGE, NAMED = 480, 128

#: Messages of a member to the leader (ready, held, progress, accept), and of the leader to each (plan, freeze, propose,
#: commit).
CONTROL = 4

#: Latencies before the bulk of contributions (ready, plan), and between the phases (scatter's own, held, freeze).
BEFORE, BETWEEN = 2, 3


@attrs.frozen
class Line:
    """What connects one peer: bytes per second each way; ``latency``: seconds one way to another peer with the same
    (between unlike ones the mean of the two)."""

    up: float = math.inf
    down: float = math.inf
    latency: float = 0.0


@attrs.frozen
class Links:
    """Lines of all peers: ``usual``, but for those in ``unlike``, as (number, line)."""

    usual: Line = Line(up=12.5e6, down=12.5e6, latency=0.04)
    unlike: tuple[tuple[int, Line], ...] = ()

    def line(self, number: int) -> Line:
        return dict(self.unlike).get(number, self.usual)


@attrs.frozen
class Cost:
    """One butterfly.

    ``scatter``, ``gather``: seconds of the bulk phases; ``latency``: of one message; ``after``: latencies that follow
    the freeze. ``sent``: bytes of each taker, in their order. ``slices``: who combines what. ``late``: givers that are
    left out as their lines are far too slow. ``reason``: of the planner.
    """

    scatter: float
    gather: float
    latency: float
    after: int
    sent: tuple[int, ...]
    slices: tuple[Slice, ...]
    late: tuple[PeerId, ...]
    reason: str

    @property
    def seconds(self) -> float:
        """From the last one's being ready to the commit at the last one."""
        return (BEFORE + BETWEEN + self.after) * self.latency + self.scatter + self.gather

    @property
    def freeze(self) -> float:
        """From the last one's being ready to when all owners combine."""
        return (BEFORE + BETWEEN) * self.latency + self.scatter


def cost(
    givers: tuple[PeerId, ...], takers: tuple[PeerId, ...], lines: tuple[Line, ...], length: int, codec: str, round: int
) -> Cost:
    """Of a reduce of ``length`` elements that ``givers`` contribute to and ``takers``, all of them, receive.

    Both in canonical order; ``lines``: of the takers. ``round``: of which the leader follows.
    """
    bulk, count = _bulk(givers, takers, lines, length, codec), len(takers)
    if count == 1:
        return bulk
    leader = candidates(b"", round, takers)[0]
    sent = (
        bytes_ + CONTROL * ((LEADER_MESSAGE + NAMED * count) * (count - 1) if taker == leader else MESSAGE)
        for taker, bytes_ in zip(takers, bulk.sent, strict=True)
    )
    return attrs.evolve(bulk, sent=tuple(sent))


def gathering(
    takers: tuple[PeerId, ...], lines: tuple[Line, ...], payloads: Sequence[int], round: int
) -> tuple[float, list[int]]:
    """Seconds of a round that gathers ``payloads`` (bytes, with 64 of signature each), and the bytes of each taker.

    Ready, propose, accept, commit: a member sends two messages, the leader two to each, which hold all payloads.
    """
    count = len(takers)
    if count == 1:
        return 0.0, [0]
    leader, held = candidates(b"", round, takers)[0], sum(size + 64 for size in payloads)
    mean = held // max(1, len(payloads))
    of_leader = 2 * (LEADER_MESSAGE + NAMED * count + held) * (count - 1)
    sent = [of_leader if taker == leader else 2 * MESSAGE + mean for taker in takers]
    return 4 * longest([line.latency for line in lines]), sent


@functools.lru_cache(maxsize=4096)
def _bulk(
    givers: tuple[PeerId, ...], takers: tuple[PeerId, ...], lines: tuple[Line, ...], length: int, codec: str
) -> Cost:
    """Without the bytes of control messages."""
    coding, count = resolve(codec), len(takers)
    latency = longest([line.latency for line in lines])
    reports = {
        peer: Rates(up=_rate(line.up), down=_rate(line.down), rtt=round(2e6 * latency))
        for peer, line in zip(takers, lines, strict=True)
    }
    late, why = topology.laggards(givers, reports, quorum(count))
    givers = tuple(peer for peer in givers if peer not in late)
    planned = topology.plan(givers, takers, length, reports, coding)
    sizes = {piece.owner: coding.wire_size(piece.stop - piece.start) for piece in planned.slices}
    total, giving = sum(sizes.values()), set(givers)
    scatter = gather = 0.0
    sent = []
    for taker, line in zip(takers, lines, strict=True):
        own, owned = sizes.get(taker, 0), taker in sizes
        gives = total - own if taker in giving else 0
        spreads = own * (count - 1)
        scatter = max(scatter, gives / line.up, own * (len(givers) - (taker in giving)) / line.down)
        gather = max(gather, spreads / line.up, (total - own) / line.down)
        messages = (len(sizes) - owned if taker in giving else 0) + (count - 1 if owned else 0)
        sent.append(gives + spreads + MESSAGE * messages)
    after = 7 if count > 2 else 5
    return Cost(scatter, gather, latency, after, tuple(sent), planned.slices, late, planned.reason + why)


def longest(latencies: Sequence[float]) -> float:
    """Between any two of several peers: the mean of the two longest; none for one alone."""
    if len(latencies) < 2:
        return 0.0
    first, second = sorted(latencies)[-2:]
    return (first + second) / 2.0


def transfer(size: int, source: Line, target: Line) -> float:
    """Seconds in which ``target`` fetches ``size`` bytes from ``source``: a question, and the answer."""
    return source.latency + target.latency + size / min(source.up, target.down)


def _rate(rate: float) -> int:
    return int(min(max(rate, 1.0), float(MAX_RATE)))
