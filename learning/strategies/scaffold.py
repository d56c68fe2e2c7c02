"""SCAFFOLD: control variates against the drift of unlike peers (Karimireddy et al. 2020, arXiv 1910.06378, Alg. 1)."""

from __future__ import annotations

import hashlib

import attrs
import torch
from torch import Tensor

from .. import exact
from ..peer import Peer, Round
from .base import Strategy, not_negative, positive


@attrs.frozen
class Scaffold(Strategy):
    """``participants`` of a round (0: all); ``inner_steps`` K; ``rate`` η_l of plain descent; ``outer_lr`` η_g.

    Peer i, if it is drawn into S, begins at y = x::

        K times  y ← y - η_l (g_i(y) - c_i + c);      c_i⁺ = c_i - c + (x - y) / (K η_l)      (option II)
        x ← x + η_g mean over S of (y - x);           c ← c + |S|/N mean over S of (c_i⁺ - c_i)

    c is what all peers share, c_i is its peer's own. What counts as S is who was committed: whoever was left out keeps
    its c_i, so that c stays the mean of all c_i. K is the number of steps that were taken.

    Peers come and go, which the paper has not: one that leaves takes its c_i along and leaves its part in c behind, a
    bias for good. So after the peers of a run have changed everybody takes part, and c is taken afresh as the mean of
    the c_i⁺, until a round has everybody in it. A payload is two vectors.
    """

    participants: int = attrs.field(default=0, validator=not_negative)
    inner_steps: int = attrs.field(default=20, validator=positive)
    rate: float = attrs.field(default=0.05, validator=positive)
    outer_lr: float = attrs.field(default=1.0, validator=positive)

    async def run(self, peer: Peer) -> None:
        shared, own = peer.keep("control", Control()), peer.own("control", Control())
        async for round in peer.rounds():
            x = await peer.weights()
            c, c_i = shared.variate(x), own.variate(x)
            count = len(round.group.peers)
            census = not torch.equal(shared.roster, roster_of(round))
            drawn = census or not self.participants or peer.id in round.sample(self.participants)
            steps = await peer.train(self.inner_steps, rate=self.rate, drift=c - c_i) if drawn else 0
            move = x - await peer.weights()
            after = c_i - c + move / (steps * self.rate) if steps else c_i
            news = after if census else after - c_i
            mean, mean_news = await round.reduce([move, news], why="" if steps else "not drawn for this round")
            if round.members:
                if census:
                    shared.value = mean_news.clone()
                    shared.roster = roster_of(round) if len(round.members) == count else NOBODY
                else:
                    shared.value = exact.add(c, exact.scale(mean_news, len(round.members) / count))
            if peer.id in round.members:
                own.value = after
            await peer.load(exact.sub(x, exact.scale(mean, self.outer_lr)))


#: No roster: the next round counts everybody.
NOBODY = torch.zeros(4)


def roster_of(round: Round) -> Tensor:
    """Four numbers that are equal for equal peers of a round: what a state of float32 vectors can hold."""
    digest = hashlib.blake2b(b"".join(round.group.peers), digest_size=8, person=b"shoal roster").digest()
    return torch.tensor([float(int.from_bytes(digest[at : at + 2], "big")) for at in range(0, 8, 2)])


class Control:
    """A control variate; ``roster``: of the last round in which everybody was counted."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.roster = NOBODY

    def variate(self, like: Tensor) -> Tensor:
        """The variate; zeros in the shape of ``like`` before there is one."""
        return torch.zeros_like(like) if self.value is None else self.value

    def vectors(self) -> dict[str, Tensor]:
        return {} if self.value is None else {"variate": self.value, "roster": self.roster}

    def restore(self, vectors: dict[str, Tensor]) -> None:
        self.value = vectors["variate"].clone() if "variate" in vectors else None
        self.roster = vectors["roster"].clone() if "roster" in vectors else NOBODY
