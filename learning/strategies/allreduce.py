"""Synchronous data parallelism: the mean gradient of one batch per peer, every step (the reference for all others)."""

from __future__ import annotations

import attrs

from ..peer import Peer
from .base import Strategy


@attrs.frozen
class AllReduce(Strategy):
    """One round per step. The task's optimiser is replicated: all apply the same mean gradient to the same state."""

    async def run(self, peer: Peer) -> None:
        peer.keep("optimizer", peer.optimizer_state())
        async for round in peer.rounds():
            gradient = await peer.gradient()
            mean = await round.reduce(gradient)
            await peer.apply(mean)
