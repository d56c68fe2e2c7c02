"""How many peers there are, as one peer can tell, and whether somebody crowds the place of a key; pure functions.

Keys of peers are hashes: the peers of a swarm of n lie evenly in the key space, and the i-th closest to any place is
about i/n of the space away. Who wants to make a record disappear grinds keys until his peers are the k closest to it
(Sridhar et al. 2023, "Content Censorship in the InterPlanetary File System", arXiv 2307.12212): they take what is to
be stored and answer that they have nothing. Then the k closest stand much closer than k/n. Against that the region in
which k honest peers must live is searched as a whole, by lookups for keys beside the crowded place, which the ground
peers are not closest to (de Moura Netto et al. 2025, "SR-DHT-Store", arXiv 2505.01139).
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence

from . import defaults
from .keys import BITS, random_key

SPACE = 1 << BITS


def swarm_size(distances: Sequence[int]) -> float:
    """How many peers there are, from the rising ``distances`` of the closest ones to some place.

    The least-squares fit of ``d_i = i / (n + 1)``: n + 1 = Σ i² / Σ i·d_i, distances in parts of the space. With 20
    of them its error is about 25 %.
    """
    moment = sum(i * (distance / SPACE) for i, distance in enumerate(distances, 1))
    squares = sum(i * i for i in range(1, len(distances) + 1))
    return max(float(len(distances)), squares / moment - 1) if moment else float(len(distances))


class SizeEstimate:
    """The median of what the last lookups for places of our own choice say; others choose the places of records."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=defaults.SIZE_SAMPLES)
        self._noted = -float("inf")
        #: Peers in the swarm, None while too little is known.
        self.value: float | None = None

    def note(self, distances: Sequence[int], now: float) -> None:
        """The distances of the closest peers that a lookup found, rising."""
        if len(distances) >= defaults.SIZE_MIN_PEERS:
            self._samples.append(swarm_size(distances))
            self.value = statistics.median(self._samples)
            self._noted = now

    def renew(self, now: float) -> bool:
        """Forget the samples if the last is older than SIZE_FRESH; True when it is time for new ones.

        A swarm may have grown tenfold since: everything would look crowded.
        """
        if now - self._noted < defaults.SIZE_FRESH:
            return False
        self._samples.clear()
        self.value = None
        self._noted = now
        return True


def crowded(distances: Sequence[int], size: float | None, k: int) -> tuple[bool, str]:
    """Do more peers stand around a place than chance puts there? ``distances``: of those found closest to it, rising.

    Returns (decision, reason). At CROWDED times the expected distance of the k-th, chance alone does that once in some
    ten thousand places.
    """
    if size is None or size <= 2 * k:
        return False, "the swarm is too small to tell"
    if len(distances) < k:
        return False, f"only {len(distances)} peers found"
    expected = k / size
    found = distances[k - 1] / SPACE
    if found < defaults.CROWDED * expected:
        return True, f"its {k} closest peers stand {expected / found:.0f} times as close as in a swarm of {size:.0f}"
    return False, f"its {k} closest peers stand as in a swarm of {size:.0f}"


def hidden(distances: Sequence[int], size: float | None, k: int) -> tuple[bool, str]:
    """Are fewer peers around a place than there must be? ``distances``: of those known closest to it, rising.

    Returns (decision, reason). Whoever met only liars at first knows only those whom they named: their few accomplices.
    """
    if size is None or size <= 2 * k or not distances:
        return False, "the swarm is too small to tell"
    seen = swarm_size(distances[:k])
    if seen < defaults.HIDDEN * size:
        return True, f"the closest peers are those of a swarm of {seen:.0f}, while there are about {size:.0f}"
    return False, f"the closest peers are those of a swarm of {seen:.0f} of about {size:.0f}"


def region_bits(size: float, k: int) -> int:
    """Leading bits that the peers of a place's region share with it: about k to 2k honest peers live there."""
    return max(0, (int(size) // k).bit_length() - 1)


def region_targets(place: int, size: float, k: int, rng: random.Random) -> list[int]:
    """Places to look up so that together they find the region: one in each of its largest parts beside the crowd.

    The first is in the half of the region that differs from ``place`` in the first bit that the region leaves open, the
    next in half of the rest, …
    """
    bits = region_bits(size, k)
    return [random_key(place, bits + step, rng) for step in range(defaults.REGION_LOOKUPS)]


def in_region(distance: int, size: float, k: int) -> bool:
    """Does a peer at ``distance`` from a place belong to its region?"""
    return BITS - distance.bit_length() >= region_bits(size, k)
