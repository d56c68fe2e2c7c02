"""CO2: a reduce that is one round late, with a penalty on staleness and a clipped outer momentum (arXiv 2401.16265)."""

from __future__ import annotations

import attrs
from torch import Tensor

from .. import exact
from ..peer import Peer
from .base import Strategy, fraction, not_negative, positive
from .delayed import delayed_rounds


@attrs.frozen
class CO2(Strategy):
    """``m ← β m + Δ(t-1) / Λ``,  ``m ← clip(m, ±φ)``,  ``θ(t+1) = θ(t) - α m``

    ``inner_steps`` τ; ``outer_lr`` α; ``momentum`` β; ``penalty`` Λ; ``clip`` φ, per element, 0 for none. Λ is a
    constant here as in the authors' code (their default 1 does nothing). That code computes the clipped momentum and
    drops it (``torch.clamp`` without an underscore), so that its results are without clipping; here it clips.
    """

    inner_steps: int = attrs.field(default=20, validator=positive)
    outer_lr: float = attrs.field(default=0.7, validator=positive)
    momentum: float = attrs.field(default=0.3, validator=fraction)
    penalty: float = attrs.field(default=1.0, validator=positive)
    clip: float = attrs.field(default=1.0, validator=not_negative)

    async def run(self, peer: Peer) -> None:
        await delayed_rounds(peer, self.inner_steps, peer.keep("outer", ClippedMomentum(self)))


class ClippedMomentum:
    """m, which all peers share."""

    def __init__(self, rule: CO2) -> None:
        self.rule = rule
        self.momentum: Tensor | None = None

    def step(self, start: Tensor, gradient: Tensor) -> Tensor:
        """θ(t+1) from θ(t) ``start`` and Δ(t-1), all fp32 of one shape; inputs stay as they are."""
        rule = self.rule
        move = exact.scale(gradient, 1 / rule.penalty)
        self.momentum = move if self.momentum is None else exact.add_(exact.scale_(self.momentum, rule.momentum), move)
        if rule.clip:
            self.momentum.clamp_(-rule.clip, rule.clip)
        return exact.sub(start, exact.scale(self.momentum, rule.outer_lr))

    def vectors(self) -> dict[str, Tensor]:
        return {} if self.momentum is None else {"momentum": self.momentum}

    def restore(self, vectors: dict[str, Tensor]) -> None:
        self.momentum = vectors["momentum"].clone() if "momentum" in vectors else None
