"""SPSA with shared seeds: one byte per gradient on the wire (Just One Byte, arXiv 2306.10015; MeZO, arXiv 2305.17333).

    z = z(run, round, peer, sample);   g = (L(θ + ε z) - L(θ - ε z)) / 2ε;   θ ← θ - lr/√n Σ g z    (or lr/n)

Everybody can draw everybody's z, so that a gradient is a number, and a number is a byte (:mod:`..onebyte`). Memory is
that of inference: see :mod:`..directions`. What was said in a round stands in its record, and (θ, records since) give
the state: whoever was away replays them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from ..directions import Direction, Kind, Move, descend, seed_of
from ..onebyte import decode, encode
from ..peer import Peer
from ..rounds.payloads import MAX_PAYLOAD
from ..state import Layout, flatten, unflatten
from ..worker import Part
from .base import Strategy, positive


def _flag(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value not in (0, 1):
        raise ValueError(f"{attribute.name} must be 0 or 1, got {value}")


@attrs.frozen
class SPSA(Strategy):
    """``grads``: gradients of each team in a round, each on a batch of its own; ``eps`` ε; ``lr``.

    ``root``: divide the sum by √n as Just One Byte does, instead of by n. ``normal``: z is Gaussian instead of ±1.

    DistZO2 (arXiv 2507.03211): with ``pairs``, two peers are a team, each evaluates one side of the same z on the same
    data, and they exchange losses (float32, 4 bytes) instead of gradients: half the time, eight times the bytes
    (perturbation parallelism). With ``shared``, all teams use the same z on data of their own, whose g are averaged
    (data parallelism). Both together are its 2-D scheme. By default every peer has directions of its own, whose
    variance is lower: (d - 1 + n) / n of the gradient's norm instead of d.
    """

    ledger: ClassVar[bool] = True

    grads: int = attrs.field(default=8, validator=positive)
    eps: float = attrs.field(default=1e-3, validator=positive)
    lr: float = attrs.field(default=0.01, validator=positive)
    root: int = attrs.field(default=0, validator=_flag)
    pairs: int = attrs.field(default=0, validator=_flag)
    shared: int = attrs.field(default=0, validator=_flag)
    normal: int = attrs.field(default=0, validator=_flag)

    def __attrs_post_init__(self) -> None:
        size = 4 if self.pairs else 1
        if self.grads * size > MAX_PAYLOAD:
            raise ValueError(f"grads must be at most {MAX_PAYLOAD // size}, got {self.grads}")

    async def run(self, peer: Peer) -> None:
        master = peer.keep("master", Master(peer.layout))
        async for round in peer.rounds():
            teams = self.teams(round.group.peers)
            at, team = next((i, team) for i, team in enumerate(teams) if peer.id in team)
            directions = [self.direction(peer.run, round.index, team, k) for k in range(self.grads)]
            sides = (1, -1) if len(team) == 1 else (1,) if peer.id == team[0] else (-1,)
            data = None if len(team) == 1 else Part(team[0], at, len(teams))
            losses = await peer.probe(directions, self.eps, sides, data)
            said = await round.gather(self.payload(losses))
            moves = self.moves(peer.run, round.index, round.group.peers, said)
            if master.needed:
                await peer.load(master.descend(await peer.weights(), peer.trainable, moves))
            else:
                await peer.descend(moves)

    def teams(self, voters: Sequence[bytes]) -> list[tuple[bytes, ...]]:
        """Who evaluates the same gradients: everybody alone, or two by two, in canonical order."""
        size = 2 if self.pairs else 1
        return [tuple(voters[start : start + size]) for start in range(0, len(voters), size)]

    def direction(self, run: bytes, round: int, team: tuple[bytes, ...], sample: int) -> Direction:
        kind: Kind = "normal" if self.normal else "signs"
        return Direction(seed_of(run, round, b"" if self.shared else team[0], sample), kind)

    def payload(self, losses: Sequence[tuple[float, ...]]) -> bytes:
        """What goes on the wire: a byte for each gradient, or the losses of one side."""
        if any(len(each) == 1 for each in losses):
            return struct.pack(f"<{len(losses)}f", *(loss for (loss,) in losses))
        return bytes(encode((plus - minus) / (2 * self.eps)) for plus, minus in losses)

    def gradients(self, team: tuple[bytes, ...], said: Mapping[bytes, bytes]) -> list[float] | None:
        """The gradients of a team from what was said in the round; None if they are not there."""
        given = [said[peer] for peer in team if peer in said]
        if len(given) < len(team):
            return None
        if len(team) == 1:
            return [decode(byte) for byte in given[0]] if len(given[0]) == self.grads else None
        if any(len(each) != 4 * self.grads for each in given):
            return None
        plus, minus = (struct.unpack(f"<{self.grads}f", each) for each in given)
        found = [(p - m) / (2 * self.eps) for p, m in zip(plus, minus, strict=True)]
        # As bounded as a byte is: nobody moves the model as far as it likes.
        return [max(decode(255), min(decode(127), g)) if math.isfinite(g) else 0.0 for g in found]

    def moves(self, run: bytes, round: int, voters: Sequence[bytes], said: Mapping[bytes, bytes]) -> list[Move]:
        """What a round does to θ: team by team, gradient by gradient, the same list for everybody."""
        found = [(team, g) for team in self.teams(voters) if (g := self.gradients(team, said)) is not None]
        n = len(found) * self.grads
        if not n:
            return []
        if self.shared:
            means = [math.fsum(g[k] for _, g in found) / len(found) for k in range(self.grads)]
            found, n = [((), means)], self.grads
        scale = self.lr / (math.sqrt(n) if self.root else n)
        return [
            Move(self.direction(run, round, team, k), scale * g) for team, gs in found for k, g in enumerate(gs) if g
        ]

    def replay(
        self,
        run: bytes,
        layout: Layout,
        trainable: Sequence[str],
        vectors: dict[str, Tensor],
        round: int,
        voters: Sequence[bytes],
        said: Mapping[bytes, bytes],
    ) -> None:
        moves = self.moves(run, round, voters, said)
        master = Master(layout)
        if master.needed:
            master.restore({"weights": vectors["master.weights"]} if "master.weights" in vectors else {})
            vectors["weights"] = master.descend(vectors["weights"], trainable, moves)
            vectors |= {f"master.{name}": vector for name, vector in master.vectors().items()}
        else:
            descend(layout.parts(vectors["weights"], trainable), moves)


class Master:
    """θ in float32 where the model is coarser: steps far below the resolution of bfloat16 would be lost, or drift.

    Replicated, and part of the state; a float32 model needs none.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.needed = any(dtype in ("bfloat16", "float16", "float64") for dtype in layout.dtypes)
        self._weights: Tensor | None = None

    def descend(self, weights: Tensor, trainable: Sequence[str], moves: Sequence[Move]) -> Tensor:
        """Move the master; returns it as the model can hold it. ``weights``: where it begins, if it has not yet."""
        if self._weights is None:
            self._weights = weights.clone()
        descend(self._layout.parts(self._weights, trainable), moves)
        return flatten(self._layout, list(unflatten(self._layout, self._weights).values()), torch.empty_like(weights))

    def vectors(self) -> dict[str, Tensor]:
        return {} if self._weights is None else {"weights": self._weights}

    def restore(self, vectors: dict[str, Tensor]) -> None:
        self._weights = vectors["weights"].clone() if "weights" in vectors else None
