"""A node that lies, in a process of its own: ``python -m shoal.sim.liar ATTACK start …``, else as ``shoal start …``.

It does all that a node does, honestly, but for its contributions; with ``lying_owner`` and ``lying_digest`` but for
what it combines, or its fingerprints. It knows what an honest peer knows: its own work and the results of earlier
rounds, not what others send before it sends. Liars of one simulation draw the same numbers.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..learning.faults import DISGUISES, DISTORTIONS
from ..learning.rounds.results import Results
from ..node.cli import leave, main
from .attack_names import LYING_DIGEST, LYING_OWNER
from .attacks import Attack, Knowledge, resolve


class Lie:
    """See :class:`shoal.learning.faults.Disguise`."""

    def __init__(self, attack: Attack) -> None:
        self._attack = attack
        self._before: Tensor | None = None

    def __call__(self, round: int, work: Tensor) -> Tensor:
        """The attack's row."""
        own = work[None]
        random = torch.Generator().manual_seed(round)
        before = self._before if self._before is not None and self._before.shape == work.shape else None
        known = Knowledge(own=own, honest=own, before=before, random=random, relabelled=-own)
        return self._attack.craft(known)[0].contiguous()

    def saw(self, result: Tensor) -> None:
        """Keep it for the next round."""
        self._before = result.clone()


def add_to_slices(result: Tensor) -> None:
    """What a lying owner makes of a combined slice: ten times as far, in the other direction."""
    result *= -10.0


def lie_about_digests() -> None:
    """From now on all fingerprints that this process computes of results are wrong."""
    real = Results._fingerprint

    async def fingerprint(self: Results, result: Tensor, algorithm: str, nonces: tuple[bytes, ...]) -> bytes:
        value = await real(self, result, algorithm, nonces)
        return bytes([value[0] ^ 1]) + value[1:]

    Results._fingerprint = fingerprint  # type: ignore[method-assign]


if __name__ == "__main__":
    name = sys.argv[1]
    if name == LYING_OWNER:
        DISTORTIONS[name] = add_to_slices
        leave(main([*sys.argv[2:], "--fault", f"distort:{name}"]))
    elif name == LYING_DIGEST:
        lie_about_digests()
        leave(main(sys.argv[2:]))
    DISGUISES[name] = lambda: Lie(resolve(name))
    leave(main([*sys.argv[2:], "--fault", f"lie:{name}"]))
