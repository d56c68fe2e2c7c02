"""Who owns which coordinates of the reduced vector: pure planning of slices, and of their loss.

A slice is a half-open range of coordinates with one owner. Slices of a plan are sorted, disjoint and
cover ``0..length``. An owner may hold several of them after others were lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import attrs

from ...transport.identity import PeerId

#: Slice bounds are multiples of this many elements (64 bytes of fp32: one cache line) except the last.
ALIGN = 16


@attrs.frozen
class Slice:
    """Coordinates ``start..stop`` (elements) and the peer that combines them."""

    start: int
    stop: int
    owner: PeerId

    @property
    def range(self) -> tuple[int, int]:
        return self.start, self.stop


def split(
    start: int, stop: int, owners: Sequence[PeerId], speeds: Sequence[float] | None = None, block: int = 1
) -> tuple[Slice, ...]:
    """Split ``start..stop`` among ``owners`` in proportion to ``speeds`` (any unit; equal when None).

    Bounds are ``start`` and multiples of :data:`ALIGN` and ``block`` beyond it. Owners whose share rounds to nothing
    get no slice. The same arguments give the same slices everywhere.
    """
    if not owners:
        raise ValueError("no owner for a slice")
    step = math.lcm(ALIGN, block)
    weights = [1.0] * len(owners) if speeds is None else [max(0.0, speed) for speed in speeds]
    total = sum(weights)
    if total <= 0.0:
        weights, total = [1.0] * len(owners), float(len(owners))
    slices, done, at = [], 0.0, start
    for owner, weight in zip(owners, weights, strict=True):
        done += weight
        end = stop if owner == owners[-1] else start + round((stop - start) * done / total / step) * step
        end = min(max(end, at), stop)
        if end > at:
            slices.append(Slice(at, end, owner))
        at = end
    if at < stop:
        # The last owner's share was nothing and it is listed twice, or rounding left a rest.
        slices.append(Slice(at, stop, owners[-1]))
    return tuple(slices)


def reassign(
    slices: Sequence[Slice], lost: Collection[PeerId], heirs: Sequence[PeerId], block: int = 1
) -> tuple[Slice, ...]:
    """Keep every surviving owner's slices and split those of the ``lost`` among ``heirs``.

    What was already scattered to a survivor stays valid: only the lost ranges travel again.
    """
    kept: list[Slice] = []
    for piece in slices:
        if piece.owner in lost:
            kept.extend(split(piece.start, piece.stop, heirs, block=block))
        else:
            kept.append(piece)
    return tuple(kept)


def covers(slices: Sequence[Slice], length: int) -> bool:
    """True when ``slices`` are sorted, disjoint, non-empty and cover ``0..length`` exactly."""
    at = 0
    for piece in slices:
        if piece.start != at or piece.stop <= piece.start:
            return False
        at = piece.stop
    return at == length
