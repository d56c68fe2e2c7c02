"""Outer steps that are one round late, so that a reduce hides behind the training of the next round."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..peer import Kept, Peer


class OuterStep(Kept, Protocol):
    """An outer optimiser of flat fp32 vectors, replicated."""

    def step(self, start: Tensor, gradient: Tensor) -> Tensor: ...


async def delayed_rounds(peer: Peer, inner_steps: int, outer: OuterStep) -> None:
    """In round t train H steps from θ(t), while the moves Δ_i(t-1) of the round before are reduced. Then::

        Δ_i(t) = θ(t) - θ_i        what this peer reduces during the next round
        θ(t+1) = outer.step(θ(t), mean of Δ_i(t-1)),   θ_i ← θ(t+1)

    All peers hold the same θ after each round. In its first round a peer (also one that joins late or comes back) has
    nothing to give and takes what the others reduce; what is trained in the last round of a finite run is lost.
    """
    theta, before = await peer.weights(), None
    async for round in peer.rounds():
        given = torch.zeros_like(theta) if before is None else before
        pending = round.reduce_async(given, why="nothing trained before this round" if before is None else "")
        await peer.train(inner_steps)
        before = theta - await peer.weights()
        theta = outer.step(theta, await pending)
        await peer.load(theta)
