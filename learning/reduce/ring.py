"""Orders of a ring, best for its slowest path or for all of them together: exact for few peers, else by search.

A ring reduce goes ``2 (n-1)`` times from neighbour to neighbour with a part of ``1/n`` of the vector: its pace is that
of the slowest path in it (*max-min*), its latency the sum over all (*shortest tour*, an asymmetric travelling
salesman's).
Matrices are lists of rows, ``matrix[i][j]`` from ``i`` to ``j``; the diagonal is not looked at. An order is a tuple of
all indices that begins with 0; the last one is followed by the first. Everything is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Matrix = Sequence[Sequence[float]]
Order = tuple[int, ...]

#: Peers up to which orders are found by dynamic programming over subsets (Held and Karp 1962): 20 ms for 9 in Python.
EXACT = 9

#: Part of the cost of an order that a change must save: less may be rounding, and changes would follow for ever.
GAIN = 1e-9

#: Peers of one segment that is moved as a whole: as in Or's search.
_SEGMENT = 3


def shortest(cost: Matrix) -> Order:
    """The order with the least sum of costs; above :data:`EXACT` peers a good one: nearest neighbour, then search."""
    if len(cost) <= EXACT:
        return _subsets(cost, lambda sofar, step: sofar + step)
    starts = [_nearest(cost, start) for start in _spread(len(cost))]
    return min((_search(order, cost) for order in starts), key=lambda order: (total(order, cost), order))


def widest(rate: Matrix) -> Order:
    """The order whose slowest path is the fastest; above :data:`EXACT` peers a good one.

    The heuristic: of the present order, forbid all paths as slow as the slowest, and search for an order without
    forbidden ones; as long as there is one, the slowest path got faster.
    """
    count = len(rate)
    if count <= EXACT:
        worst = [[-value for value in row] for row in rate]
        return _subsets(worst, max)
    slowness = [[0.0 if i == j else 1.0 / rate[i][j] for j in range(count)] for i in range(count)]
    order = shortest(slowness)
    while True:
        limit = slowest(order, rate)
        scale = sum(max(row) for row in slowness)
        # One forbidden path is worse than any order without; among equals the shorter one.
        barred = [
            [0.0 if i == j else slowness[i][j] / scale + (rate[i][j] <= limit) for j in range(count)]
            for i in range(count)
        ]
        found = min(
            (_search(start, barred) for start in (order, *(_nearest(barred, s) for s in _spread(count)))),
            key=lambda o: (total(o, barred), o),
        )
        if slowest(found, rate) <= limit:
            return order
        order = found


def total(order: Order, cost: Matrix) -> float:
    """The sum over the ring."""
    return sum(cost[a][b] for a, b in edges(order))


def slowest(order: Order, rate: Matrix) -> float:
    """The least rate in the ring; ``inf`` for one peer alone."""
    return min((rate[a][b] for a, b in edges(order)), default=math.inf)


def edges(order: Order) -> list[tuple[int, int]]:
    """Who sends to whom."""
    return list(zip(order, (*order[1:], order[0]), strict=True)) if len(order) > 1 else []


def seconds(order: Order, rate: Matrix, latency: Matrix) -> float:
    """How long the ring takes for a vector of size 1 (rates in vectors per second), latencies in seconds.

    By the recurrence itself: a peer sends its parts one after the other, each once the one before it in the ring has
    sent it its part of the step before.
    """
    ring, count = edges(order), len(order)
    if not ring:
        return 0.0
    sent = [0.0] * count
    arrived = [0.0] * count
    for _ in range(2 * (count - 1)):
        sent = [
            max(free, arrived[i - 1]) + 1.0 / (count * rate[a][b])
            for i, ((a, b), free) in enumerate(zip(ring, sent, strict=True))
        ]
        arrived = [done + latency[a][b] for (a, b), done in zip(ring, sent, strict=True)]
    return max(arrived)


def _spread(count: int) -> list[int]:
    """A few different peers to begin at."""
    return sorted({0, count // 4, count // 2, 3 * count // 4})


def _subsets(cost: Matrix, join: Callable[[float, float], float]) -> Order:
    """Least ``join`` of the costs around the ring, over all orders: best ways from 0 through each set to each end."""
    count = len(cost)
    if count < 3:
        return tuple(range(count))
    best: dict[tuple[int, int], tuple[float, Order]] = {(1 << j, j): (cost[0][j], (0, j)) for j in range(1, count)}
    for members in range(2, 1 << count, 2):
        for last in range(1, count):
            if not members >> last & 1 or members == 1 << last:
                continue
            before = members ^ 1 << last
            best[members, last] = min(
                (join(best[before, k][0], cost[k][last]), (*best[before, k][1], last))
                for k in range(1, count)
                if before >> k & 1
            )
    every = (1 << count) - 2
    return min((join(best[every, k][0], cost[k][0]), best[every, k][1]) for k in range(1, count))[1]


def _nearest(cost: Matrix, start: int) -> Order:
    left = dict.fromkeys(i for i in range(len(cost)) if i != start)
    order = [start]
    while left:
        here = cost[order[-1]]
        order.append(min(left, key=lambda j: (here[j], j)))
        del left[order[-1]]
    return _from_zero(order)


def _from_zero(order: Sequence[int]) -> Order:
    at = list(order).index(0)
    return (*order[at:], *order[:at])


def _search(order: Order, cost: Matrix) -> Order:
    """Improve an order until neither moving a segment nor turning one round makes it cheaper."""
    ring, least = list(order), GAIN * total(order, cost)
    while _move(ring, cost, least) or _turn(ring, cost, least):
        pass
    return _from_zero(ring)


def _move(ring: list[int], cost: Matrix, least: float) -> bool:
    """Take out the segment of up to three peers, and put it elsewhere, that saves most. False when nothing saves more
    than ``least``."""
    count, best, change = len(ring), -least, None
    for i in range(count):
        for length in range(1, min(_SEGMENT, count - 2) + 1):
            before, first = ring[i - 1], ring[i]
            last, after = ring[(i + length - 1) % count], ring[(i + length) % count]
            saved = cost[before][first] + cost[last][after] - cost[before][after]
            away = cost[last]
            for step in range(length, count - 1):
                a, b = ring[(i + step) % count], ring[(i + step + 1) % count]
                delta = cost[a][first] + away[b] - cost[a][b] - saved
                if delta < best:
                    best, change = delta, (i, length, a)
    if change is None:
        return False
    i, length, a = change
    turned = ring[i:] + ring[:i]
    segment, rest = turned[:length], turned[length:]
    at = rest.index(a) + 1
    ring[:] = rest[:at] + segment + rest[at:]
    return True


def _turn(ring: list[int], cost: Matrix, least: float) -> bool:
    """Turn the stretch round, all its paths then being used the other way, that saves most, if more than ``least``."""
    count, best, change = len(ring), -least, None
    for i in range(count):
        before = ring[i - 1]
        there = back = 0.0
        for step in range(1, count - 1):
            a, b = ring[(i + step - 1) % count], ring[(i + step) % count]
            there, back = there + cost[a][b], back + cost[b][a]
            after = ring[(i + step + 1) % count]
            delta = cost[before][b] + back + cost[ring[i]][after] - cost[before][ring[i]] - there - cost[b][after]
            if delta < best:
                best, change = delta, (i, step)
    if change is None:
        return False
    i, step = change
    turned = ring[i:] + ring[:i]
    ring[:] = turned[: step + 1][::-1] + turned[step + 1 :]
    return True
