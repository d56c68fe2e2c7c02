"""Local training without any exchange: the baseline that every report contains."""

from __future__ import annotations

from typing import ClassVar

import attrs

from ..peer import Peer
from .base import Strategy, positive


@attrs.frozen
class Local(Strategy):
    """``inner_steps`` per round; rounds only count."""

    replicated: ClassVar[bool] = False
    group: ClassVar[int] = 1

    inner_steps: int = attrs.field(default=20, validator=positive)

    async def run(self, peer: Peer) -> None:
        async for round in peer.rounds():
            await peer.train(self.inner_steps)
            await round.skip()
