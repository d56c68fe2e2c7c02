"""Faults that a run is asked to have, for simulations and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
from torch import Tensor

from .state import bytes_view


class Disguise(Protocol):
    """What a liar sends instead of its work. One for each run."""

    def __call__(self, round: int, work: Tensor) -> Tensor:
        """Something of the shape of ``work``, float32 ``(n,)``; may hold NaN."""

    def saw(self, result: Tensor) -> None:
        """The result of the round, which is not to be changed."""


#: Disguises that a process has, by name: whoever starts liars puts them here (``sim/liar.py``). Nodes have none.
DISGUISES: dict[str, Callable[[], Disguise]] = {}

#: What a process does to slices that it owns, by name, likewise.
DISTORTIONS: dict[str, Callable[[Tensor], None]] = {}


@attrs.frozen
class Faults:
    """What goes wrong on this peer, by round."""

    #: Stop for ever at ``(round, phase)``, after saying so with an event.
    hold: tuple[tuple[int, str], ...] = ()
    #: Rounds in which our contribution is NaN.
    spoil: tuple[int, ...] = ()
    #: Rounds at whose beginning a bit of the weights turns over in memory.
    flip: tuple[int, ...] = ()
    #: Every contribution of ours is a lie.
    disguise: Disguise | None = None
    #: What we do to the slices that we combine, before we sign them.
    distort: Callable[[Tensor], None] | None = None


def with_a_bit_turned(weights: Tensor, key: bytes) -> Tensor:
    """``weights``, in place, with one bit turned over as in memory without error correction; ``key`` chooses where."""
    bytes_view(weights)[4 * (int.from_bytes(key[:4], "big") % weights.numel()) + 2] ^= 0x40
    return weights
