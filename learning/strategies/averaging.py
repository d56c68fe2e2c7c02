"""Gossip averaging, also of models that began apart: corrected for the variance that their mean loses (2404.04616)."""

from __future__ import annotations

from typing import ClassVar

import attrs

from ..averaging import Averaging, variances
from ..peer import Peer
from .base import Strategy, positive, share, switch
from .others import mean_of_others


@attrs.frozen
class Gossip(Strategy):
    """Train ``inner_steps`` H, then average with a small group; see :mod:`shoal.learning.averaging`.

    ``own``: share c of a peer's own model in the average (0.5: as much as all others together; in a pair the plain
    mean). ``correct`` 1: keep the variance of every tensor; 0: plain averaging. ``target``: share of the own variance
    in the one to keep: 0 that of the others (the authors' preset), 1 the own, between them both ("conservative").
    ``strangers`` 1: each peer begins with fresh weights of its own instead of the run's; one that comes later, or comes
    back, goes on from the state of the run.
    """

    replicated: ClassVar[bool] = False
    group: ClassVar[int] = 2

    inner_steps: int = attrs.field(default=20, validator=positive)
    own: float = attrs.field(default=0.5, validator=share)
    correct: int = attrs.field(default=1, validator=switch)
    target: float = attrs.field(default=0.0, validator=share)
    strangers: int = attrs.field(default=0, validator=switch)

    async def run(self, peer: Peer) -> None:
        rule = Averaging(self.own, self.target, bool(self.correct))
        async for round in peer.rounds():
            if self.strangers and round.index == 1:
                await peer.load(await peer.fresh())
            await peer.train(self.inner_steps)
            own = await peer.weights()
            spread = variances(peer.layout, own)
            others = await mean_of_others(round, [own, spread])
            if others is not None:
                await peer.load(rule.combine(peer.layout, own, others[0], spread, others[1]))
