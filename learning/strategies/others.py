"""What the others of a group have in the mean: for strategies in which a peer tells itself apart from its group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import exact
from ..peer import Round

#: The part of a mean that must be the others' for theirs to be told from ours.
LEAST = 1e-3


async def mean_of_others(round: Round, mine: Sequence[Tensor]) -> list[Tensor] | None:
    """The means of what the others of this round gave, for each of ``mine`` (fp32 vectors); None if nobody did.

    A group reduce gives the mean m over all that took part; with the share p of this peer in it the others' mean is
    (m - p · mine) / (1 - p). Who took part and with which weight nobody knows beforehand (one may have vanished, this
    one may have been too late), so each adds a vector that is 1 in its own place: the mean of these is all shares.
    """
    place = torch.zeros(len(round.group.peers))
    at = round.group.peers.index(round.group.me)
    place[at] = 1.0
    *means, shares = await round.reduce([*mine, place])
    own, whole = float(shares[at]), float(shares.sum())
    rest = whole - own
    if rest < LEAST:
        return None
    return [
        exact.scale_(exact.sub(mean, exact.scale(vector, own)), 1.0 / rest)
        for mean, vector in zip(means, mine, strict=True)
    ]
