"""What the peers of a run with stages can do and what stages ask for, as the planner wants it: from what they say.

Nobody has to believe what others say of themselves. Speeds and lines count as far as they are within
``defaults.MAX_RATIO`` times what is usual; what travels between two stages, as far as both say so; what nobody has
measured yet limits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import attrs

from ...transport.identity import PeerId
from ..state import Layout
from . import defaults
from .messages import Beat, Shape
from .planner import Able, StageCost


class Crew(Protocol):
    """What is asked of a :class:`.crew.Crew`."""

    stages: int

    def peers(self) -> list[PeerId]: ...
    def holders(self, stage: int) -> Collection[PeerId]: ...
    def beat(self, peer: PeerId) -> Beat: ...


@attrs.frozen
class Usual:
    """What is usual. ``rates``: samples a second of a peer at each stage, empty when one of them has no measured one.
    ``line``: bytes a second, 0: not known. ``traffic``: bytes that a sample makes a holder of each stage send, its
    activations on and their gradient back (and as many come in)."""

    rates: tuple[float, ...] = ()
    line: float = 0.0
    traffic: tuple[float, ...] = ()


#: Nothing is measured yet.
UNKNOWN = Usual()


def usual(crew: Crew) -> Usual:
    """The lower medians of what is said and known."""
    said = [[crew.beat(peer) for peer in crew.holders(stage)] for stage in range(crew.stages)]
    rates = [_median(beat.rate for beat in beats) / 1000 for beats in said]
    # What travels between two stages is what both say: whoever holds one alone cannot make it look like a wall.
    outs = [_median(beat.out for beat in beats) for beats in said[:-1]]
    into = [_median(beat.into for beat in beats) for beats in said[1:]]
    between = [0.0, *map(min, outs, into), 0.0]
    traffic = tuple(before + after for before, after in pairwise(between))
    return Usual(tuple(rates) if all(rates) else (), _median(crew.beat(p).line for p in crew.peers()), traffic)


def able(crew: Crew, peer: PeerId, known: Usual) -> Able:
    """A peer as it says, as far as that is believed: its speed is in times that of a usual peer at its stage."""
    beat, speed = crew.beat(peer), 1.0
    if beat.state == "ready" and beat.rate and known.rates:
        speed = _within(beat.rate / 1000 / known.rates[beat.stage], 1.0)
    line = _within(beat.line, known.line) if beat.line and known.line else math.inf
    return Able(peer, speed, beat.memory or math.inf, line)


def costs(layouts: Sequence[Layout], known: Usual) -> list[StageCost]:
    """Before anything is measured computing is taken to follow the parameters, as memory does (weights, gradients, two
    moments), and lines are left out of account: nobody knows then how many samples a second there will be."""
    sizes = [float(layout.size) for layout in layouts]
    if not known.rates:
        return [StageCost(max(1.0, size), 16.0 * size, 0.0) for size in sizes]
    return [StageCost(1 / r, 16.0 * s, t) for r, s, t in zip(known.rates, sizes, known.traffic, strict=True)]


def _median(said: Iterable[float]) -> float:
    """The lower one of those that are not 0; 0: there is none."""
    numbers = sorted(each for each in said if each)
    return float(numbers[(len(numbers) - 1) // 2]) if numbers else 0.0


def _within(value: float, middle: float) -> float:
    return min(max(value, middle / defaults.MAX_RATIO), middle * defaults.MAX_RATIO)


def worth_saying(said: int, now: int) -> int:
    """What to say of a speed: what was said before, until it has changed by ``defaults.RATE_CHANGE`` of that."""
    return min(now, 1 << 62) if abs(now - said) > defaults.RATE_CHANGE * said else said


def bytes_of_sample(shape: Shape, samples: int) -> int:
    """What one of ``samples`` takes of a tensor that travels. Whoever fed them could call all of them one sample, and
    make every boundary on their way look wide: there are at least as many as rows."""
    return shape.size // max(1, samples, *shape.dims[:1])
