"""DiLoCo: H local steps, then one outer Nesterov step on the mean of all moves (arXiv 2311.08105, Alg. 1)."""

from __future__ import annotations

import attrs

from ..peer import Peer
from .base import Strategy, fraction, positive
from .outer import Nesterov


@attrs.frozen
class DiLoCo(Strategy):
    """``inner_steps`` H of the task's own optimiser; ``outer_lr``; ``momentum`` μ of the outer step.

    The inner optimiser's state stays on its peer. The paper uses H 500, outer_lr 0.7, μ 0.9 for 88,000 steps; over a
    few dozen rounds μ 0.9 has no time to settle (.7/.5 beats .7/.9 at 24 rounds), hence the default.
    """

    inner_steps: int = attrs.field(default=20, validator=positive)
    outer_lr: float = attrs.field(default=0.7, validator=positive)
    momentum: float = attrs.field(default=0.5, validator=fraction)

    async def run(self, peer: Peer) -> None:
        outer = peer.keep("outer", Nesterov(self.outer_lr, self.momentum))
        async for round in peer.rounds():
            start = await peer.weights()  # θ(t-1)
            await peer.train(self.inner_steps)
            delta = start - await peer.weights()  # outer gradient Δ_i(t)
            mean = await round.reduce(delta)
            await peer.load(outer.step(start, mean))
