"""Evaluation of a model in stages: a look goes from stage to stage where they are, and the last one's output back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import trio
from torch import Tensor, nn

from ...transport import deadlines
from ...transport.errors import ConfigError, DecodeError, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call, exchange
from ...transport.wire import pack, unpack
from ..rounds.methods import Ack
from . import defaults
from .cargo import pack_tensor, size_fault, unpack_tensor
from .messages import LOOK, Look, Shape

if TYPE_CHECKING:
    from .trainer import StageTrainer

#: Bytes in front of the answer to a look: the length of its shape; and of that, at most.
_LENGTH, _MAX_SHAPE = 4, 1024


class Looker:
    """Looks through the stages for ``trainer``, and answers looks at its own."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer, self._crew, self._endpoint = trainer, trainer.crew, trainer.endpoint
        self._served = 0
        self._endpoint.serve(LOOK, self._on_look)

    async def evaluate(self) -> dict[str, float]:
        """What the task's hook makes of the whole model.

        It runs once for each call of the model that it makes, up to the first whose result is not there yet: between
        two of them the event loop asks the other stages, with threads and in virtual time alike.
        """
        known: list[Tensor] = []

        def work() -> dict[str, float] | Tensor:
            with torch.no_grad():
                try:
                    values = self._trainer.whole.evaluate(_Replay(known))
                except _Wanted as wanted:
                    return wanted.given
            return {name: float(value) for name, value in values.items()}

        while len(known) <= defaults.MAX_LOOKS:
            found = await self._crew.host.run_blocking(work)
            if isinstance(found, dict):
                return found
            known.append(await self._look(tuple(range(self._crew.stages)), 0, found))
        raise ConfigError(f"evaluate() of this task calls the model more than {defaults.MAX_LOOKS} times")

    async def _look(self, order: tuple[int, ...], at: int, given: Tensor) -> Tensor:
        """The output of the model from the stage ``order[at]`` on, which is ours."""
        output = await self._trainer.infer(given)
        if at + 1 == len(order):
            return output
        shape, data = pack_tensor(output)
        request = Look(self._crew.run_id, order, at + 1, shape)
        avoid: dict[PeerId, None] = {}
        while True:
            target = self._crew.pick(order[at + 1], avoid)
            if target is None:
                await self._crew.changed.wait()
                continue
            avoid[target] = None
            try:
                return await self._ask(target, request, data, deadlines.planned_phase(defaults.LOOK_FLOOR, 0.0, 0.0))
            except RemoteError:
                await trio.sleep(defaults.RETRY)

    async def _ask(self, target: PeerId, request: Look, data: memoryview, timeout: float) -> Tensor:
        link = await self._endpoint.connect(target)
        async with exchange(link, LOOK, request, body=[data], timeout=timeout) as reply:
            head = bytearray(_LENGTH)
            await reply.read_into(memoryview(head))
            size = int.from_bytes(head, "big")
            if size > _MAX_SHAPE:
                raise DecodeError("an answer without a shape", peer=target.short)
            text = bytearray(size)
            await reply.read_into(memoryview(text))
            told = unpack(Shape, bytes(text))
            if (wrong := size_fault(told)) is not None or told.size > defaults.MAX_BODY or told.codec:
                raise DecodeError(wrong or "an output that is too large, or coded", peer=target.short)
            body = bytearray(told.size)
            await reply.read_into(memoryview(body))
            await reply.result()
        return unpack_tensor(told, body)

    async def _on_look(self, call: Call[Look]) -> Ack:
        look = call.request
        self._trainer.gate.known(call.peer, look.run)
        if len(look.order) != self._crew.stages or look.order[look.at] != self._trainer.stage:
            raise RemoteRefused("other-stage", f"this peer holds stage {self._trainer.stage}")
        self._trainer.gate.holds(call.peer, look.order[look.at - 1])
        if self._served >= defaults.MAX_SERVED:
            raise RemoteRefused("busy", "this peer looks for too many others already")
        self._served += 1
        try:
            with self._trainer.gate.room(call.peer, [look.shape], self._trainer.flow.loads.values()):
                (given,) = await self._trainer.gate.read(call, [look.shape])
                found = await self._look(look.order, look.at, given)
        finally:
            self._served -= 1
        shape, data = pack_tensor(found)
        head = pack(shape)
        await call.write(len(head).to_bytes(_LENGTH, "big") + head)
        await call.write(data)
        return Ack()


class _Wanted(Exception):
    """The model was called with ``given``, and nobody knows the result yet."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given


class _Replay(nn.Module):
    """A model whose first outputs are ``known``."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._known, self._at = known, 0
        # Tasks ask for the device of the first parameter.
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        if self._at == len(self._known):
            raise _Wanted(given.detach().clone())
        self._at += 1
        return self._known[self._at - 1]
