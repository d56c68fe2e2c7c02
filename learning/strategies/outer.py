"""Outer optimisers: replicated arithmetic on flat fp32 vectors, bit-identical on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import exact


class Nesterov:
    """SGD with Nesterov momentum as in ``torch.optim.SGD(nesterov=True)``, without dampening:

    ``b ← μ b + Δ``,  ``θ ← θ − lr (Δ + μ b)``   (DiLoCo, arXiv 2311.08105, Algorithm 1 line 14)
    """

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.buffer: Tensor | None = None

    def step(self, start: Tensor, gradient: Tensor) -> Tensor:
        """θ(t) from θ(t-1) ``start`` and the outer gradient Δ(t), all fp32 of one shape; inputs stay as they are."""
        if self.buffer is None:
            self.buffer = torch.zeros_like(start)
        exact.add_(exact.scale_(self.buffer, self.momentum), gradient)
        step = exact.add_(exact.scale(self.buffer, self.momentum), gradient)
        return exact.sub(start, exact.scale_(step, self.lr))

    def vectors(self) -> dict[str, Tensor]:
        """State to replicate: empty before the first step."""
        return {} if self.buffer is None else {"momentum": self.buffer}

    def restore(self, vectors: dict[str, Tensor]) -> None:
        """Take over replicated state."""
        self.buffer = vectors["momentum"].clone() if "momentum" in vectors else None
