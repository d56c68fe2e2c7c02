"""FedAvg: some peers train, all take the mean of their weights (McMahan et al. 2017, arXiv 1602.05629, Alg. 1)."""

from __future__ import annotations

import attrs

from .. import exact
from ..peer import Peer
from .base import Strategy, not_negative, positive


@attrs.frozen
class FedAvg(Strategy):
    """``participants`` of a round, drawn anew for each (0: all); ``inner_steps`` K of gradient descent with learning
    rate ``rate`` η_l (0: of the task's own optimiser, whose state stays with its peer); ``outer_lr`` η_g.

    x ← x + η_g mean over S of (y_i - x). With η_g 1 that is the mean of the weights.
    """

    participants: int = attrs.field(default=0, validator=not_negative)
    inner_steps: int = attrs.field(default=20, validator=positive)
    rate: float = attrs.field(default=0.0, validator=not_negative)
    outer_lr: float = attrs.field(default=1.0, validator=positive)

    async def run(self, peer: Peer) -> None:
        async for round in peer.rounds():
            x = await peer.weights()
            sampled = not self.participants or peer.id in round.sample(self.participants)
            if sampled:
                await peer.train(self.inner_steps, rate=self.rate or None)
            move = x - await peer.weights()
            mean = await round.reduce(move, why="" if sampled else "not drawn for this round")
            await peer.load(exact.sub(x, exact.scale(mean, self.outer_lr)))
