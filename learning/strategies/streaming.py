"""Streaming DiLoCo: one fragment of the model at a time, reduced while training goes on (arXiv 2501.18512, Alg. 2)."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ...transport.errors import ConfigError
from .. import exact
from ..peer import Peer
from ..state import Layout
from .base import Strategy, fraction, positive
from .outer import Nesterov


@attrs.frozen
class StreamingDiLoCo(Strategy):
    """``inner_steps`` H between two exchanges of a fragment; ``fragments`` P, staggered by H / P steps; ``overlap`` τ:
    steps that go on while a fragment is under way; ``mixing`` α; ``bits``: 4 for outer gradients in E3M0 as in the
    paper, 0 for the codec of the run.

    A round is the exchange of one fragment p = (t - 1) mod P, after H / P steps::

        Δ_p = θ̃_p - θ_p        τ steps before the end of the round
        θ̃_p ← Nesterov(θ̃_p, mean of Δ_p);   θ_p ← α θ_p + (1 - α) θ̃_p        at its end

    θ̃ is what all peers share; each goes on from weights of its own. With P 1, τ 0, α 0 this is DiLoCo, bit for bit;
    with α 1 nobody takes anything over. The paper: H 30 or 100, strided fragments of 3 layers, τ 1 (up to 5), α 0.5,
    outer_lr 0.4. Layers with a stride of P make a fragment, so that each spans the depth of the model.
    """

    inner_steps: int = attrs.field(default=30, validator=positive)
    fragments: int = attrs.field(default=3, validator=positive)
    overlap: int = attrs.field(default=1)
    mixing: float = attrs.field(default=0.5)
    outer_lr: float = attrs.field(default=0.7, validator=positive)
    momentum: float = attrs.field(default=0.5, validator=fraction)
    bits: int = attrs.field(default=0)

    def __attrs_post_init__(self) -> None:
        every, rest = divmod(self.inner_steps, self.fragments)
        if rest:
            raise ValueError(
                f"inner_steps {self.inner_steps} must be a multiple of fragments {self.fragments}: "
                f"a fragment is exchanged every inner_steps / fragments steps"
            )
        if not 0 <= self.overlap < every:
            raise ValueError(
                f"overlap {self.overlap} must be in 0..{every - 1}: a fragment has arrived before the next one goes, "
                f"inner_steps / fragments = {every} steps later"
            )
        if not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing must be in 0..1, got {self.mixing}")
        if self.bits not in (0, 4):
            raise ValueError(f"bits must be 4 (E3M0), or 0 for the codec of the run, got {self.bits}")

    @property
    def round_steps(self) -> int:
        return self.inner_steps // self.fragments

    async def run(self, peer: Peer) -> None:
        parts = fragments_of(peer.layout, self.fragments)
        outers = [peer.keep(f"outer{p}", Nesterov(self.outer_lr, self.momentum)) for p in range(len(parts))]
        shared = await peer.weights()  # θ̃
        every = self.round_steps
        codec = "e3m0" if self.bits == 4 else None
        async for round in peer.rounds():
            p = (round.index - 1) % self.fragments
            part, outer = parts[p], outers[p]
            await peer.train(every - self.overlap)
            start = part.take(shared)
            pending = round.reduce_async(start - part.take(await peer.weights()), codec=codec)
            if self.overlap:
                await peer.train(self.overlap)
            after = outer.step(start, await pending)
            shared = part.put(shared.clone(), after)
            peer.agree(shared)
            weights = await peer.weights()
            await peer.load(part.put(weights, self._mixed(part.take(weights), after)))

    def _mixed(self, own: Tensor, shared: Tensor) -> Tensor:
        if self.mixing in (0, 1):
            return own if self.mixing else shared  # exactly, whatever the other one is
        return exact.add_(exact.scale(own, self.mixing), exact.scale(shared, 1 - self.mixing))


@attrs.frozen
class Fragment:
    """Part of a flat vector: ``spans`` of it, as (start, stop)."""

    spans: tuple[tuple[int, int], ...]

    def take(self, vector: Tensor) -> Tensor:
        """The part of ``vector``, as a new vector."""
        return torch.cat([vector[start:stop] for start, stop in self.spans])

    def put(self, vector: Tensor, values: Tensor) -> Tensor:
        """Writes ``values`` into its place in ``vector``, which is returned."""
        at = 0
        for start, stop in self.spans:
            vector[start:stop] = values[at : at + stop - start]
            at += stop - start
        return vector


def fragments_of(layout: Layout, count: int) -> list[Fragment]:
    """``count`` fragments of whole layers (a layer: the tensors of one module), layer i in fragment i mod ``count``.

    Raises :class:`ConfigError` for a model of fewer layers.
    """
    layers: dict[str, list[tuple[int, int]]] = {}
    for index, name in enumerate(layout.names):
        stop = layout.offsets[index + 1] if index + 1 < len(layout.offsets) else layout.size
        layers.setdefault(name.rpartition(".")[0], []).append((layout.offsets[index], stop))
    if len(layers) < count:
        raise ConfigError(
            f"strategy streaming: a model of {len(layers)} layers cannot be cut in {count} fragments; --set fragments=N"
        )
    spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for index, layer in enumerate(layers.values()):
        spans[index % count].extend(layer)
    return [Fragment(tuple(sorted(part))) for part in spans]
