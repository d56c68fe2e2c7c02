"""A node that lies, in a process of its own: ``python -m shoal.sim.liar ATTACK start …``, else as ``shoal start …``.

It does all that a node does, honestly, but for its contributions. It knows what an honest peer knows: its own work and
the results of earlier rounds, not what others send before it sends. Liars of one simulation draw the same numbers.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..learning.faults import DISGUISES
from ..node.cli import leave, main
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


if __name__ == "__main__":
    name = sys.argv[1]
    DISGUISES[name] = lambda: Lie(resolve(name))
    leave(main([*sys.argv[2:], "--fault", f"lie:{name}"]))
