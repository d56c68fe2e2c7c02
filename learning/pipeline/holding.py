"""The weights of the stage that is held here, as they are now, as others ask for them: to average, and at the end."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ...transport import deadlines
from ...transport.errors import RemoteError, RemoteProtocolError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call, exchange
from ..state import bytes_view
from . import defaults
from .crew import Crew
from .messages import STAGE, AskStage, StageState

if TYPE_CHECKING:
    from .trainer import StageTrainer

log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Held:
    """Weights of a stage, flat fp32, and where they stand: see :class:`StageState`."""

    state: StageState
    weights: Tensor


class Holding:
    """Answers for the weights of the stage held here. ``sizes``: elements of all stages' models."""

    def __init__(self, crew: Crew, sizes: tuple[int, ...]) -> None:
        self._crew, self._sizes, self._endpoint = crew, sizes, crew.endpoint
        self.trainer: StageTrainer | None = None
        self._served = 0
        self._endpoint.serve(STAGE, self._on_ask)

    async def _on_ask(self, call: Call[AskStage]) -> StageState:
        ask = call.request
        if ask.run != self._crew.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        if call.peer not in self._crew.beats:
            raise RemoteRefused("stranger", "say first which stage you hold")
        if self._served >= defaults.MAX_SERVED:
            raise RemoteRefused("busy", "too many peers load weights from here already")
        self._served += 1
        try:
            held = await self.own(ask.stage)
            if held is None:
                raise RemoteRefused("not-held", f"stage {ask.stage} is not held here")
            await call.write(bytes_view(held.weights))
            return held.state
        finally:
            self._served -= 1

    async def own(self, stage: int) -> Held | None:
        """The weights of the stage held here, if it is ``stage``."""
        trainer = self.trainer
        if trainer is None or trainer.stage != stage:
            return None
        weights = await trainer.weights()
        digest = await self._crew.host.run_blocking(_digest, weights)
        own = self._crew.own
        state = StageState(stage, weights.numel(), trainer.norm, own.rounds, trainer.flow.step, digest)
        return Held(state, weights)

    async def fetch(self, peer: PeerId, stage: int) -> Held:
        """Raises :class:`RemoteError`, also for what does not match its digest or is not finite."""
        if peer == self._crew.me:
            held = await self.own(stage)
            if held is None:
                raise RemoteRefused("not-held", f"stage {stage} is not here")
            return held
        size = self._sizes[stage]
        weights = torch.empty(size, dtype=torch.float32)
        link = await self._endpoint.connect(peer)
        timeout = deadlines.bulk_phase(defaults.STATE_FLOOR, 4 * size, 0.0, None)
        async with exchange(link, STAGE, AskStage(self._crew.run_id, stage), timeout=timeout) as reply:
            await reply.read_into(bytes_view(weights))
            state = await reply.result()
        digest = await self._crew.host.run_blocking(_digest, weights)
        if state.stage != stage or state.size != size or state.digest != digest:
            raise RemoteProtocolError("sent other weights than it says", peer=peer.short)
        if not bool(torch.isfinite(weights).all()) or not 0.0 <= state.norm < float("inf"):
            raise RemoteProtocolError("sent weights that are not finite", peer=peer.short)
        return Held(state, weights)

    async def fetch_any(self, stage: int) -> Held | None:
        """The stage from one of its holders; None when none of them gives it."""
        for peer in self._crew.keepers(stage):
            try:
                return await self.fetch(peer, stage)
            except RemoteError as error:
                log.info("stage %d from %s: %s", stage, peer.short, error)
        return None


def _digest(weights: Tensor) -> bytes:
    return hashlib.sha256(bytes_view(weights)).digest()
