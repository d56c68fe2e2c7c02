"""NoLoCo: no all-reduce; each round a random pair pulls together (arXiv 2506.10911, eqs. 1-2, sign as in the code)."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from .. import exact
from ..peer import Peer
from .base import Strategy, fraction, positive


@attrs.frozen
class NoLoCo(Strategy):
    """``alpha`` α: outer momentum; ``beta`` β: outer step; ``gamma`` γ: pull towards the group's mean of φ.

    Δ_i = θ_i - φ_i
    δ_i ← α δ_i + (β/n) Σ_j Δ_j - γ (φ_i - (1/n) Σ_j φ_j);   φ_i ← φ_i + δ_i;   θ_i ← φ_i

    The paper's eq. 1 has the opposite sign before β and diverges. Pairs agree in mean square only for
    0 < γ < 2 (1 - α²), which is checked at the start; the code uses γ = β.
    """

    replicated: ClassVar[bool] = False
    group: ClassVar[int] = 2

    inner_steps: int = attrs.field(default=20, validator=positive)
    alpha: float = attrs.field(default=0.5, validator=fraction)
    beta: float = attrs.field(default=0.7, validator=positive)
    gamma: float = attrs.field(default=0.7, validator=positive)

    def __attrs_post_init__(self) -> None:
        bound = 2 * (1 - self.alpha**2)
        if not self.gamma < bound:
            raise ValueError(
                f"gamma {self.gamma} is unstable with alpha {self.alpha}: it must be below 2 (1 - alpha²) = {bound:.3g}"
            )

    async def run(self, peer: Peer) -> None:
        outer = peer.keep("outer", Momentum())
        async for round in peer.rounds():
            phi = await peer.weights()  # φ_i(t)
            await peer.train(self.inner_steps)
            delta = await peer.weights() - phi  # Δ_i(t)
            mean_delta, mean_phi = await round.reduce([delta, phi])
            await peer.load(exact.add(phi, outer.step(self, phi, mean_delta, mean_phi)))


class Momentum:
    """δ_i, which stays with its peer."""

    def __init__(self) -> None:
        self.delta: Tensor | None = None

    def step(self, rule: NoLoCo, phi: Tensor, mean_delta: Tensor, mean_phi: Tensor) -> Tensor:
        if self.delta is None:
            self.delta = torch.zeros_like(phi)
        exact.add_(exact.scale_(self.delta, rule.alpha), exact.scale(mean_delta, rule.beta))
        return exact.sub_(self.delta, exact.scale(exact.sub(phi, mean_phi), rule.gamma))

    def vectors(self) -> dict[str, Tensor]:
        return {} if self.delta is None else {"delta": self.delta}

    def restore(self, vectors: dict[str, Tensor]) -> None:
        self.delta = vectors["delta"].clone() if "delta" in vectors else None
