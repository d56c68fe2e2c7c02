"""Async DiLoCo: the reduce of a round hides behind the inner steps of the next (PCCL, arXiv 2505.14065)."""

from __future__ import annotations

import attrs

from ..peer import Peer
from .base import Strategy, fraction, positive
from .delayed import delayed_rounds
from .outer import Nesterov


@attrs.frozen
class AsyncDiLoCo(Strategy):
    """``inner_steps`` H, ``outer_lr``, ``momentum`` μ as in DiLoCo; the outer step is one round late.

    ``b ← μ b + Δ(t-1)``,  ``θ(t+1) = θ(t) - lr (Δ(t-1) + μ b)``: outer gradients are applied to weights that have moved
    on by one step since. A delay of one halves the outer step that is stable, hence the smaller defaults. PCCL has to
    send its shared state twice to let somebody join; here a joiner takes the result of the first round without giving.
    """

    inner_steps: int = attrs.field(default=20, validator=positive)
    outer_lr: float = attrs.field(default=0.5, validator=positive)
    momentum: float = attrs.field(default=0.3, validator=fraction)

    async def run(self, peer: Peer) -> None:
        await delayed_rounds(peer, self.inner_steps, peer.keep("outer", Nesterov(self.outer_lr, self.momentum)))
