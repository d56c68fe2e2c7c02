"""Faults that a run is asked to have, for simulations and tests."""

from __future__ import annotations

import attrs
from torch import Tensor

from .state import bytes_view


@attrs.frozen
class Faults:
    """What goes wrong on this peer, by round."""

    #: Stop for ever at ``(round, phase)``, after saying so with an event.
    hold: tuple[tuple[int, str], ...] = ()
    #: Rounds in which our contribution is NaN.
    spoil: tuple[int, ...] = ()
    #: Rounds at whose beginning a bit of the weights turns over in memory.
    flip: tuple[int, ...] = ()


def with_a_bit_turned(weights: Tensor, key: bytes) -> Tensor:
    """``weights``, in place, with one bit turned over as in memory without error correction; ``key`` chooses where."""
    bytes_view(weights)[4 * (int.from_bytes(key[:4], "big") % weights.numel()) + 2] ^= 0x40
    return weights
