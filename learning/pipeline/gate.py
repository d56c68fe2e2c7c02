"""What other peers send to a stage: whose it may be, how much of it, and whether it is what it says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...transport.errors import DecodeError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from . import defaults
from .cargo import size_fault, unpack_batch, unpack_tensor
from .crew import Crew
from .flow import Load
from .messages import Push, Shape


class Gate:
    """For one stage of the run of ``crew``, between whose stages floats travel in ``codec``.

    Its methods raise :class:`RemoteRefused`, which the caller is told.
    """

    def __init__(self, crew: Crew, codec: str) -> None:
        self._crew, self._codec = crew, codec
        #: Bytes of what is being read.
        self._reading: dict[PeerId, int] = {}

    def known(self, peer: PeerId, run: bytes) -> None:
        """Only who takes part is heard."""
        if run != self._crew.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        if peer not in self._crew.beats:
            raise RemoteRefused("stranger", "say first which stage you hold")

    def holds(self, peer: PeerId, stage: int) -> None:
        """Only who holds ``stage`` is heard. It may not have come to us yet that it has loaded it."""
        if peer not in self._crew.holders(stage, loading=True):
            raise RemoteRefused("stranger", f"{peer.short} does not hold stage {stage}")

    def fed(self, load: Load) -> bool:
        """Whether the feeder of ``load`` is there, who alone can say that it counts."""
        return load.sender is None or load.key.feeder in self._crew.holders(0)

    def admit(self, peer: PeerId, push: Push, stage: int) -> None:
        """Whether ``peer`` may send this micro-batch to ``stage``, which is held here."""
        self.known(peer, push.run)
        if len(push.order) != self._crew.stages or push.order[push.at] != stage:
            raise RemoteRefused("other-stage", f"this peer holds stage {stage}")
        before, feeder = push.order[push.at - 1], push.key.feeder
        self.holds(peer, before)
        self.holds(feeder, 0)
        if push.at == 1 and feeder != peer:
            raise RemoteRefused("stranger", "a micro-batch that somebody else feeds")

    @contextmanager
    def room(self, peer: PeerId, shapes: Sequence[Shape], waiting: Iterable[Load]) -> Iterator[None]:
        """Memory for what ``peer`` sends, beside the loads that are ``waiting``, while the block runs."""
        size = sum(memory_of(shape) for shape in shapes)
        held: dict[PeerId, int] = dict(self._reading)
        for load in waiting:
            if load.sender is not None:
                held[load.sender] = held.get(load.sender, 0) + _bytes((load.input, *load.tensors))
        if held.get(peer, 0) + size > defaults.MAX_HELD_OF_ONE or sum(held.values()) + size > defaults.MAX_HELD:
            raise RemoteRefused("busy", "the micro-batches that wait here take all the memory that there is for them")
        self._reading[peer] = self._reading.get(peer, 0) + size
        try:
            yield
        finally:
            self._reading[peer] -= size
            if not self._reading[peer]:
                del self._reading[peer]

    async def micro_batch(self, call: Call[Push], waiting: Collection[Load]) -> list[Tensor]:
        """What is to be computed with, and the tensors of the batch."""
        push = call.request
        with self.room(call.peer, push.shapes, waiting):
            found = await self.read(call, push.shapes)
        given = found[0]
        if not given.is_floating_point() or push.samples > max(1, given.numel()):
            raise RemoteRefused("bad_request", f"{push.samples} samples of {given.numel()} values")
        try:
            unpack_batch(found[1:], push.nest)
        except DecodeError as error:
            raise RemoteRefused("bad_request", str(error)) from None
        return found

    async def read(self, call: Call[Any], shapes: Sequence[Shape]) -> list[Tensor]:
        """The tensors in the body of ``call``."""
        for shape in shapes:
            if shape.codec not in ("", self._codec):
                raise RemoteRefused("bad_request", f"a tensor in {shape.codec}, which this run does not use")
            if (wrong := size_fault(shape)) is not None:
                raise RemoteRefused("bad_request", wrong)
        total = sum(shape.size for shape in shapes)
        if total != call.body_left or total > defaults.MAX_BODY:
            raise RemoteRefused("bad_request", f"a body of {call.body_left} bytes for tensors of {total}")
        tensors = []
        for shape in shapes:
            data = bytearray(shape.size)
            await call.read_into(memoryview(data))
            try:
                tensors.append(unpack_tensor(shape, data))
            except DecodeError as error:
                raise RemoteRefused("bad_request", str(error)) from None
        return tensors


def memory_of(shape: Shape) -> int:
    """Bytes that a tensor takes while it is read and unpacked: as it travels, and its values where those are coded."""
    count = 1
    for dim in shape.dims:
        count *= dim
    return shape.size + (4 * count if shape.codec else 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
