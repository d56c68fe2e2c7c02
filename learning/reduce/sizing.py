"""How large a slice each owner gets, so that a butterfly ends as early as its lines allow: the exact optimum.

The model. One vector of size 1; peer ``i`` owns the share ``s_i``; shares sum to 1. Two phases with a barrier (the
freeze) between them::

    scatter, Ts:   a contributor sends 1 - s_i;  owner i receives s_i from each other contributor
    gather,  Tg:   owner i sends s_i to each other receiver;  a receiver takes 1 - s_i

A line of ``up`` vectors per second gives ``1 - s_i <= up_i Ts`` and ``m_i s_i <= up_i Tg`` (``m_i`` other receivers),
and so on: for given phases each share lies between two bounds that are linear in ``Ts`` or ``Tg``, and the phases are
possible when no lower bound is above its upper one and the sums of both enclose 1. That makes ``Ts + Tg`` a linear
programme, whose least ``Tg`` for a given ``Ts`` is a convex function of ``Ts``. The inner one is found exactly, by
Newton's steps on piecewise linear sums, which from the left never overshoot and end after a few kinks; the outer one by
golden section.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

#: Golden sections: each leaves 0.618 of the interval, so 1e-10 of it remains.
_SECTIONS = 48
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
#: Sums of shares closer to 1 than this are 1.
_EXACT = 1e-12


@attrs.frozen
class Lines:
    """One group. All tuples have one entry per peer; rates are in vectors per second, ``inf``: no limit known.

    ``up``, ``down``: what a peer sends and receives at most, to and from all others together. ``into``: the slowest
    path from a contributor to it; ``out``: the slowest from it to a receiver. ``gives``: it contributes; ``takes``: it
    receives the result. ``most``: the largest share that it may own.
    """

    up: tuple[float, ...]
    down: tuple[float, ...]
    into: tuple[float, ...]
    out: tuple[float, ...]
    gives: tuple[bool, ...]
    takes: tuple[bool, ...]
    most: tuple[float, ...]

    @property
    def senders(self) -> tuple[int, ...]:
        """Other contributors, for each peer."""
        all_of_them = sum(self.gives)
        return tuple(all_of_them - gives for gives in self.gives)

    @property
    def receivers(self) -> tuple[int, ...]:
        """Other receivers, for each peer."""
        all_of_them = sum(self.takes)
        return tuple(all_of_them - takes for takes in self.takes)


@attrs.frozen
class Sizes:
    """Shares of the peers in the order of the lines, and the seconds that the two phases take with them."""

    shares: tuple[float, ...]
    scatter: float
    gather: float

    @property
    def seconds(self) -> float:
        return self.scatter + self.gather


def predict(lines: Lines, shares: Sequence[float]) -> Sizes:
    """The phases with given shares (sum 1)."""
    scatter = gather = 0.0
    for i, (share, senders, receivers) in enumerate(zip(shares, lines.senders, lines.receivers, strict=True)):
        rest = max(0.0, 1.0 - share)
        if lines.gives[i]:
            scatter = max(scatter, rest / lines.up[i])
        if lines.takes[i]:
            gather = max(gather, rest / lines.down[i])
        if senders:
            scatter = max(scatter, senders * share / lines.down[i], share / lines.into[i])
        if receivers:
            gather = max(gather, receivers * share / lines.up[i], share / lines.out[i])
    return Sizes(tuple(shares), scatter, gather)


def optimal(lines: Lines) -> Sizes:
    """The shares with the least ``scatter + gather``; of several such, the most equal ones.

    Takes O(peers) for each of some hundred steps: 1 ms for 8 peers, 10 for 64. Raises :class:`ValueError` when
    :attr:`Lines.most` leaves part of the vector without an owner, or a rate is not above zero.
    """
    if sum(lines.most) < 1.0 - _EXACT:
        raise ValueError("the largest shares allowed do not cover the vector")
    if any(not rate > 0.0 for rates in (lines.up, lines.down, lines.into, lines.out) for rate in rates):
        raise ValueError("a rate that is not above zero")
    count = len(lines.up)
    # What a phase lets a share grow by, and what a line lets the lower bound fall by, per second.
    rise_s = [
        min(down / n, into) if n else math.inf
        for down, into, n in zip(lines.down, lines.into, lines.senders, strict=True)
    ]
    rise_g = [
        min(up / m, out) if m else math.inf for up, out, m in zip(lines.up, lines.out, lines.receivers, strict=True)
    ]
    fall_s = [up if gives else math.inf for up, gives in zip(lines.up, lines.gives, strict=True)]
    fall_g = [down if takes else math.inf for down, takes in zip(lines.down, lines.takes, strict=True)]

    def bounds(scatter: float) -> tuple[list[float], list[float]]:
        lows = [max(0.0, 1.0 - fall * scatter) for fall in fall_s]
        highs = [min(most, rise * scatter) for most, rise in zip(lines.most, rise_s, strict=True)]
        return lows, highs

    def gather(scatter: float) -> float:
        return _least(*bounds(scatter), fall_g, rise_g)

    least = _least([0.0] * count, list(lines.most), fall_s, rise_s)
    left = least * (1.0 + 1e-9)
    right = left + gather(left)
    best = min((left + gather(left), left), (right + gather(right), right))
    a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_a, at_b = a + gather(a), b + gather(b)
    for _ in range(_SECTIONS):
        if at_a <= at_b:
            right, b, at_b = b, a, at_a
            a = right - _GOLDEN * (right - left)
            at_a = a + gather(a)
        else:
            left, a, at_a = a, b, at_b
            b = left + _GOLDEN * (right - left)
            at_b = b + gather(b)
        best = min(best, (at_a, a), (at_b, b))
    scatter = best[1]
    lows, highs = bounds(scatter * (1.0 + 1e-9))
    later = gather(scatter) * (1.0 + 1e-9)
    lows = [max(low, 1.0 - fall * later) for low, fall in zip(lows, fall_g, strict=True)]
    highs = [min(high, rise * later) for high, rise in zip(highs, rise_g, strict=True)]
    return predict(lines, _even(lows, highs))


def _least(lows: list[float], highs: list[float], fall: Sequence[float], rise: Sequence[float]) -> float:
    """The shortest phase ``t`` in which shares fit between ``max(lows, 1 - fall t)`` and ``min(highs, rise t)``.

    ``inf`` when none does.
    """
    if sum(lows) > 1.0 + 1e-9 or sum(highs) < 1.0 - 1e-9:
        return math.inf
    t = 1e-300  # not 0: what has no limit is done at once
    for low, high, down, up in zip(lows, highs, fall, rise, strict=True):
        if low > high + 1e-9:
            return math.inf
        # Three ways in which a lower bound may lie above its upper one.
        t = max(t, low / up, (1.0 - high) / down, 1.0 / (down + up))
    while True:
        total, slope = 0.0, 0.0
        for low, down in zip(lows, fall, strict=True):
            needed = 1.0 - down * t
            if needed > low:
                total, slope = total + needed, slope + down
            else:
                total += low
        if total <= 1.0 + _EXACT or slope <= 0.0:
            break
        t += (total - 1.0) / slope
    while True:
        total, slope = 0.0, 0.0
        for high, up in zip(highs, rise, strict=True):
            room = up * t
            if room < high * (1.0 - _EXACT):
                total, slope = total + room, slope + up
            else:
                total += high
        if total >= 1.0 - _EXACT or slope <= 0.0:
            return t
        t += (1.0 - total) / slope


def _even(lows: list[float], highs: list[float]) -> tuple[float, ...]:
    """Shares between the bounds that sum to 1 and are as equal as they can be: one level, cut off at the bounds."""
    left, right = 0.0, 1.0
    for _ in range(60):
        level = (left + right) / 2.0
        if sum(max(low, min(high, level)) for low, high in zip(lows, highs, strict=True)) < 1.0:
            left = level
        else:
            right = level
    shares = [max(low, min(high, right)) for low, high in zip(lows, highs, strict=True)]
    total = sum(shares)
    return tuple(share / total for share in shares)
