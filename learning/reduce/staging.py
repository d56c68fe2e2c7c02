"""Copies between tensors on any device and flat memory of the host, a bucket at a time, two of them under way.

Theory of operation. A copy is a sequence of pairs (tensor, host), cut into buckets of at most :data:`defaults.BUCKET`
bytes that lie on one device each. On the CPU a bucket is copied when its turn comes. On a CUDA device it goes through a
pinned buffer on a stream of its own (one per device and direction), so that it runs beside the user's kernels::

    fetch:    side stream: device -> pinned | mark |   host waits for the mark: pinned -> host, cast
    deliver:  host -> pinned, cast |   side stream: pinned -> device | mark |   host waits for the mark

The next bucket is started before the last is waited for. Casts happen on the host: its rounding is the same everywhere,
and a bfloat16 travels as two bytes. A copy has ended only when the host has seen its last mark, so that whoever uses
the tensors afterwards, on whatever stream, needs no synchronisation.

Streams and marks hide behind :class:`Streams`; with :class:`NoStreams` the very same staging runs without any device.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from .. import defaults

Direction: TypeAlias = Literal["fetch", "deliver"]

#: Where parts of a bucket begin in a pinned buffer: a multiple of the largest element, so that any dtype can be viewed.
_ALIGN = 16


class Streams(ABC):
    """A queue of copies of its own, on one device and in one direction."""

    @abstractmethod
    def follow(self) -> None:
        """What is queued here from now on comes after what the calling thread has queued on the device so far."""

    @abstractmethod
    def side(self) -> AbstractContextManager[object]:
        """Within it, copies go to this queue."""

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """A mark behind what was queued so far; calling what is returned waits (blocking) until it is reached."""


class NoStreams(Streams):
    """For memory that needs none: everything is done by the time it is queued."""

    def follow(self) -> None:
        pass

    def side(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Callable[[], None]:
        return _nothing


class CudaStreams(Streams):
    """A CUDA stream; marks are events that block the waiting thread instead of spinning."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def side(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Callable[[], None]:
        # Spinning would take the core from the event loop, which moves the bytes of the bucket before.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize


def _nothing() -> None:
    pass


@attrs.frozen(eq=False)
class Buffer:
    """:data:`defaults.BUCKET` bytes for staging. ``pooled``: pinned, to be used again."""

    memory: Tensor
    pooled: bool


class Pool:
    """Buffers for staging: at most ``limit`` pinned ones, kept for the next copy.

    Pinned memory is taken from the system for good and dear to allocate, so it is bounded; who comes when all are out
    gets ordinary memory, which is slower and still right. Used from several threads.
    """

    def __init__(self, limit: int, allocate: Callable[[int], Tensor]) -> None:
        """``allocate``: a pinned uint8 tensor of so many bytes."""
        self._limit, self._allocate = limit, allocate
        self._lock = threading.Lock()
        self._free: list[Buffer] = []
        self._pinned = 0

    def take(self) -> Buffer:
        """A buffer; :meth:`give` it back."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._pinned >= self._limit:
                return Buffer(torch.empty(defaults.BUCKET, dtype=torch.uint8), pooled=False)
            self._pinned += 1
        return Buffer(self._allocate(defaults.BUCKET), pooled=True)

    def give(self, buffer: Buffer) -> None:
        """Nobody uses ``buffer`` any more."""
        if buffer.pooled:
            with self._lock:
                self._free.append(buffer)


@attrs.frozen
class Part:
    """Elements that are copied in one go: ``device`` and ``host`` are 1-D, contiguous and equally long."""

    device: Tensor
    host: Tensor


class Lane(Streams):
    """One direction of copies to or from one device. ``depth``: buckets that are under way at the same time."""

    depth: int

    @abstractmethod
    def start(self, parts: Sequence[Part]) -> Callable[[], None]:
        """Begin to copy a bucket; what is returned ends it. Blocking."""


class DirectLane(NoStreams, Lane):
    """The tensors are in the host's memory: nothing is staged."""

    depth = 1

    def __init__(self, direction: Direction) -> None:
        self._fetches = direction == "fetch"

    def start(self, parts: Sequence[Part]) -> Callable[[], None]:
        def finish() -> None:
            for part in parts:
                target, source = (part.host, part.device) if self._fetches else (part.device, part.host)
                target.copy_(source)

        return finish


class StagedLane(Lane):
    """Through buffers of ``pool``, on ``streams``."""

    depth = 2

    def __init__(self, direction: Direction, streams: Streams, pool: Pool) -> None:
        self._fetches = direction == "fetch"
        self._streams, self._pool = streams, pool

    def follow(self) -> None:
        self._streams.follow()

    def side(self) -> AbstractContextManager[object]:
        return self._streams.side()

    def mark(self) -> Callable[[], None]:
        return self._streams.mark()

    def start(self, parts: Sequence[Part]) -> Callable[[], None]:
        buffer = self._pool.take()
        slots: list[Tensor] = []
        at = 0
        for part in parts:
            size = part.device.numel() * part.device.element_size()
            slots.append(buffer.memory[at : at + size].view(part.device.dtype))
            at += _aligned(size)
        if not self._fetches:
            for part, slot in zip(parts, slots, strict=True):
                slot.copy_(part.host)
        with self._streams.side():
            for part, slot in zip(parts, slots, strict=True):
                target, source = (slot, part.device) if self._fetches else (part.device, slot)
                target.copy_(source, non_blocking=True)
        reached = self._streams.mark()

        def finish() -> None:
            reached()
            if self._fetches:
                for part, slot in zip(parts, slots, strict=True):
                    part.host.copy_(slot)
            self._pool.give(buffer)

        return finish


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


_pool = Pool(defaults.PINNED_BUFFERS, lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
_streams: dict[tuple[torch.device, Direction], CudaStreams] = {}
_streams_lock = threading.Lock()


def lane(device: torch.device, direction: Direction) -> Lane:
    """How tensors on ``device`` are copied."""
    if device.type != "cuda":
        # Other accelerators copy without staging: slower, and right.
        return DirectLane(direction)
    with _streams_lock:
        key = (device, direction)
        if key not in _streams:
            _streams[key] = CudaStreams(device)
        return StagedLane(direction, _streams[key], _pool)


Pair: TypeAlias = tuple[Tensor, Tensor]
LaneFor: TypeAlias = Callable[[torch.device, Direction], Lane]


class Copy:
    """A copy of ``pairs`` (tensor on any device, contiguous host tensor of as many elements), in their order.

    Made on the thread that queued the tensors' latest kernels: the copy comes after them. Iterating does the work
    (blocking, on any thread) and yields, after every bucket, how many elements have arrived. Of a fetch the tensors may
    have any strides; a tensor that is delivered to and is not contiguous is written in the end.
    """

    def __init__(self, direction: Direction, pairs: Sequence[Pair], lane_for: LaneFor = lane) -> None:
        self._direction: Direction = direction
        self._pairs = [(tensor.detach(), host.detach().view(-1)) for tensor, host in pairs]
        self._indirect: list[Pair] = []
        self._lanes: dict[torch.device, Lane] = {}
        for tensor, _ in self._pairs:
            if tensor.device not in self._lanes:
                self._lanes[tensor.device] = lane_for(tensor.device, direction)
        for used in self._lanes.values():
            used.follow()

    def __iter__(self) -> Generator[int, None, None]:
        waiting: deque[tuple[int, Callable[[], None]]] = deque()
        depth, arrived = 1, 0
        try:
            for device, parts in self._buckets():
                used = self._lanes[device]
                depth = max(depth, used.depth)
                arrived += sum(part.host.numel() for part in parts)
                waiting.append((arrived, used.start(parts)))
                if len(waiting) >= depth:
                    yield _finish(waiting)
            while waiting:
                yield _finish(waiting)
            for tensor, contiguous in self._indirect:
                used = self._lanes[tensor.device]
                with used.side():
                    tensor.copy_(contiguous.view(tensor.shape))
                used.mark()()
        finally:
            # Given up halfway: what was begun is waited for, since a device may still write to the buffers.
            while waiting:
                _finish(waiting)

    def run(self) -> None:
        """All of it. Blocking."""
        deque(self, maxlen=0)

    def _buckets(self) -> Iterator[tuple[torch.device, list[Part]]]:
        parts: list[Part] = []
        room, device = defaults.BUCKET, torch.device("cpu")
        for tensor, host in self._pairs:
            flat = self._flat(tensor)
            if parts and tensor.device != device:
                yield device, parts
                parts, room = [], defaults.BUCKET
            device, at, width = tensor.device, 0, flat.element_size()
            while at < flat.numel():
                stop = min(flat.numel(), at + room // width)
                if stop > at:
                    parts.append(Part(flat[at:stop], host[at:stop]))
                    room -= _aligned((stop - at) * width)
                    at = stop
                if room < _ALIGN:
                    yield device, parts
                    parts, room = [], defaults.BUCKET
        if parts:
            yield device, parts

    def _flat(self, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous():
            return tensor.view(-1)
        # On the side stream: after what the tensor's stream was doing, and before the bucket.
        with self._lanes[tensor.device].side():
            if self._direction == "fetch":
                return tensor.reshape(-1)
            contiguous = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            self._indirect.append((tensor, contiguous))
            return contiguous


def _finish(waiting: deque[tuple[int, Callable[[], None]]]) -> int:
    arrived, finish = waiting.popleft()
    finish()
    return arrived
