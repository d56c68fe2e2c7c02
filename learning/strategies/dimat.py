"""DIMAT: pairs average once each has put the other's hidden units into its own order (Saadati et al., CVPR 2024)."""

from __future__ import annotations

from typing import ClassVar

import attrs

from ...transport.errors import ConfigError
from ..averaging import mix
from ..matching import layers_of, match, permute
from ..peer import Peer
from .base import Strategy, positive, switch
from .others import mean_of_others

#: Samples that a run may make its peers look at in each round.
MAX_SAMPLES = 1 << 16


@attrs.frozen
class Dimat(Strategy):
    """Train ``inner_steps``, then θ_i ← Σ_j π_ij P_ij θ_j over a pair, where π is ½ everywhere (doubly stochastic).

    P_ij puts the hidden units of j where they do, on about ``samples`` of i's own samples, what i's units do; see
    :mod:`shoal.learning.matching`. For models that are an ``nn.Sequential`` of linear layers, and groups of two: the
    mean of more does not tell one model from another. ``strangers`` as in :class:`.averaging.Gossip`.
    """

    replicated: ClassVar[bool] = False
    group: ClassVar[int] = 2

    inner_steps: int = attrs.field(default=20, validator=positive)
    samples: int = attrs.field(default=256, validator=[positive, attrs.validators.le(MAX_SAMPLES)])
    strangers: int = attrs.field(default=0, validator=switch)

    async def run(self, peer: Peer) -> None:
        layers = layers_of(peer.model, peer.layout)
        names = [layer.name for layer in layers]
        async for round in peer.rounds():
            if len(round.group.peers) > 2:
                raise ConfigError(f"dimat merges pairs, and this group has {len(round.group.peers)} peers: --group 2")
            if self.strangers and round.index == 1:
                await peer.load(await peer.fresh())
            await peer.train(self.inner_steps)
            own = await peer.weights()  # θ_i
            others = await mean_of_others(round, [own])
            if others is None:
                continue
            (other,) = others  # θ_j
            mine, theirs = await peer.activations([own, other], names, self.samples)
            ordered = permute(layers, other, match(layers, mine, theirs))  # P_ij θ_j
            await peer.load(mix(own, ordered, 0.5))
