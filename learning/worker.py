"""Trains a task's model on one device, in slices short enough that the node stays responsive."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import attrs
import torch
import trio
from torch import Tensor, nn

from ..transport.errors import ConfigError, ProtocolMisuse
from ..transport.host import Host
from . import defaults, exact
from .directions import Direction, Move, Moved, descend, trainable_of
from .reduce.staging import Copy, Pair
from .shard import Shard
from .state import Layout, flatten, flatten_model, unflatten, unflatten_into, unite
from .task import Batch, Task, title

T = TypeVar("T")


@attrs.frozen
class TrainResult:
    """What a stretch of training did. ``loss_mean`` is weighted by samples; NaN when a loss was, or without steps."""

    steps: int
    samples: int
    loss_mean: float
    seconds: float


@attrs.frozen
class Part:
    """Part ``index`` of ``count`` of the data, in an order that all draw alike who say the same ``peer`` (32 bytes)."""

    peer: bytes
    index: int
    count: int


@attrs.define
class _Tally:
    """Sums over slices."""

    steps: int = 0
    samples: int = 0
    loss: float = 0.0


@attrs.frozen
class _Descent:
    """How steps are taken: the optimiser, and what is added to each parameter's gradient before."""

    optimizer: torch.optim.Optimizer
    drifts: list[tuple[nn.Parameter, Tensor]]


class Worker:
    """Owns a task's model, optimiser and stream of batches.

    All methods that touch the model run it through ``host.compute`` (a worker thread on real hosts, inline in virtual
    time) and hold a lock for the length of one slice, so weights may be read or loaded between two slices of a running
    :meth:`train`. Errors that the user's hooks raise pass through.

    Batches: ``task.batches(shard)`` is drawn to its end, then asked again with ``shard.epoch`` one higher. A new shard
    that names the same samples (:meth:`Shard.same_part`: only the round moved on) does not disturb the running epoch.
    """

    def __init__(
        self, host: Host, task: Task, shard: Shard, device: str | torch.device = "cpu", *, still: bool = False
    ) -> None:
        """Builds model and optimiser at once (blocking); initial weights are drawn from ``shard.seed``.

        ``still``: the model is moved by :meth:`descend` and :meth:`load` alone, and has to take little memory.
        """
        exact.flush_denormals()
        self.task = task
        self.device = torch.device(device)
        self._host = host
        self._shard = shard
        self._wanted = shard
        self._batches: Iterator[Batch] | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(shard.seed % (1 << 63))
            self.model = task.model().to(self.device)
        self.layout = Layout.of(self.model)
        #: The state itself, where the model is ``still``, and float32 on the CPU.
        self.vector = unite(self.layout, self.model) if still else None
        if not still:
            self.optimizer = task.optimizer(self.model)
        self._lock = trio.Lock()
        self._training = False
        #: Measured (or modelled) seconds of a step, smoothed; None before the first.
        self.step_seconds: float | None = None

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The task's. Of a ``still`` model it is made when somebody asks: torch loads 70 MB with its first one."""
        return self.task.optimizer(self.model)

    @property
    def shard(self) -> Shard:
        """The shard that the next batch comes from, with the epoch it has reached."""
        return self._shard if self._shard.same_part(self._wanted) else self._wanted

    def set_shard(self, shard: Shard) -> None:
        """Take batches from ``shard`` from the next slice on. Starts its first epoch unless it is the same part."""
        # Only noted here: the worker thread may be drawing from the old one at this moment.
        self._wanted = shard

    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult:
        """Take ``steps`` optimiser steps, or as many as begin within ``seconds``, or whichever ends first.

        ``rate``: steps of plain gradient descent with this learning rate instead of the task's optimiser, whose state
        stays as it is. ``drift``: flat float32 vector ``(layout.size,)`` that is added to every gradient. A loss that
        is NaN or infinite is reported in the result, not raised. Cancelled, it stops at the end of the running slice
        (about ``defaults.TRAIN_SLICE`` seconds, at least one step); the steps taken stay taken.
        """
        if steps is None and seconds is None:
            raise ProtocolMisuse("train() needs a number of steps or of seconds")
        if self._training:
            raise ProtocolMisuse("train() is already running on this worker")
        self._training = True
        tally, descent = _Tally(), self._descent(rate, drift)
        start = self._host.now()
        try:
            while True:
                left = math.inf if steps is None else steps - tally.steps
                time_left = math.inf if seconds is None else start + seconds - self._host.now()
                if left <= 0 or time_left <= 0:
                    break
                await self._train_slice(tally, min(left, self._slice_steps(time_left)), descent)
        finally:
            self._training = False
        mean = tally.loss / tally.samples if tally.samples else math.nan
        return TrainResult(tally.steps, tally.samples, mean, self._host.now() - start)

    async def gradient(self) -> tuple[Tensor, TrainResult]:
        """The gradient at one batch as a flat float32 CPU vector (0 for buffers); takes no step."""

        def work() -> tuple[Tensor, _Tally]:
            tally = _Tally()
            self._accumulate([self._backward(tally)], tally)
            gradient = self._flat_gradient()
            self.optimizer.zero_grad(set_to_none=True)
            return gradient, tally

        start = self._host.now()
        gradient, tally = await self._compute(self.task.step_seconds, work)
        return gradient, TrainResult(1, tally.samples, tally.loss / tally.samples, self._host.now() - start)

    async def apply(self, gradient: Tensor) -> None:
        """One step of the optimiser with this flat gradient, as :meth:`gradient` gives it; buffers are not touched."""

        def work() -> None:
            values = unflatten(self.layout, gradient)
            pairs: list[Pair] = []
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    pairs.append((parameter.grad, values[name]))
            Copy("deliver", pairs).run()
            self._take_step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)

        await self._compute(0.0, work)

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]:
        """For each direction z the losses at θ + side · ``eps`` · z, for each of ``sides``, each z on its own batch.

        In eval and inference mode; the model is as it was, bit for bit. ``part``: its first batches are used instead
        of this worker's next ones. The mean loss of the result is over all looks. Cancelled between two batches only.
        """
        losses: list[tuple[float, ...]] = []
        drawn = None if part is None else self._drawn(attrs.evolve(self._wanted, epoch=0, **attrs.asdict(part)))
        start, samples, total = self._host.now(), 0, 0.0
        for direction in directions:
            # A forward pass is a third of a step.
            modelled = self.task.step_seconds * len(sides) / 3
            found, count = await self._compute(modelled, self._look, direction, eps, sides, drawn)
            losses.append(found)
            samples += count
            total += count * sum(found) / max(1, len(found))
        mean = total / samples if samples else math.nan
        return losses, TrainResult(len(losses), samples, mean, self._host.now() - start)

    async def descend(self, moves: Sequence[Move]) -> None:
        """θ ← θ - Σ step · z over the trainable parameters, float32 all of them, exactly as everybody does it."""
        trainable = [(name, parameter.detach()) for name, parameter in trainable_of(self.model).items()]
        await self._compute(0.0, descend, trainable, moves)

    def reset_optimizer(self) -> None:
        """A fresh optimiser: NaN in the moments of the old one would poison every later step."""
        self.optimizer = self.task.optimizer(self.model)

    async def weights(self, out: Tensor | None = None) -> Tensor:
        """A copy of the state: float32 CPU vector ``(layout.size,)``, into ``out`` when given."""
        return await self._compute(0.0, flatten_model, self.layout, self.model, out)

    async def load(self, vector: Tensor) -> None:
        """Take the state from a vector as :meth:`weights` gives it. The optimiser's own state stays."""
        await self._compute(0.0, unflatten_into, self.layout, vector, self.model)

    async def fresh(self, peer: bytes) -> Tensor:
        """Initial weights drawn from the run's seed and ``peer``, as a vector; the model stays as it is."""

        def work() -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(
                    attrs.evolve(self._wanted, peer=peer, round=0, index=0, count=1, epoch=0).entropy("fresh") >> 1
                )
                return flatten_model(self.layout, self.task.model())

        return await self._compute(0.0, work)

    async def activations(
        self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int
    ) -> list[dict[str, Tensor]]:
        """See :meth:`shoal.learning.peer.Peer.activations`. Batches come from a stream of their own."""

        def work() -> list[dict[str, Tensor]]:
            own = flatten_model(self.layout, self.model)
            batches, seen = [], 0
            for batch in self.task.batches(self._wanted):
                batches.append(to_device(batch, self.device))
                seen += self.task.batch_size(batch)
                if seen >= samples:
                    break
            self.model.eval()
            try:
                with torch.no_grad():
                    return [self._outputs(vector, modules, batches) for vector in vectors]
            finally:
                self.model.train()
                unflatten_into(self.layout, own, self.model)

        return await self._compute(0.0, work)

    def _outputs(self, vector: Tensor, modules: Sequence[str], batches: list[Batch]) -> dict[str, Tensor]:
        unflatten_into(self.layout, vector, self.model)
        found: dict[str, list[Tensor]] = {name: [] for name in modules}

        def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, given, result: found[name].append(result.detach().flatten(0, -2).float().cpu())

        hooks = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
        try:
            for batch in batches:
                self.task.loss(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}

    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]:
        """The task's held-out metrics for the model as it is, or for ``vector`` (the model is put back afterwards)."""

        def work() -> dict[str, float]:
            own = None if vector is None else flatten_model(self.layout, self.model)
            if vector is not None:
                unflatten_into(self.layout, vector, self.model)
            self.model.eval()
            try:
                with torch.no_grad():
                    return {name: float(value) for name, value in self.task.evaluate(self.model).items()}
            finally:
                self.model.train()
                if own is not None:
                    unflatten_into(self.layout, own, self.model)

        return await self._compute(0.0, work)

    def _look(
        self, direction: Direction, eps: float, sides: Sequence[int], drawn: Iterator[Batch] | None
    ) -> tuple[tuple[float, ...], int]:
        batch = to_device(self._next_batch() if drawn is None else next(drawn), self.device)
        parameters, losses = trainable_of(self.model), []
        self.model.eval()
        try:
            with torch.inference_mode():
                for side in sides:
                    with Moved(parameters, direction, side * eps):
                        losses.append(float(self.task.loss(self.model, batch)))
        finally:
            self.model.train()
        return tuple(losses), self.task.batch_size(batch)

    def _drawn(self, shard: Shard) -> Iterator[Batch]:
        while True:
            yield from self.task.batches(shard)
            shard = attrs.evolve(shard, epoch=shard.epoch + 1)

    # --- slices -------------------------------------------------------------------------------------------------------

    def _slice_steps(self, time_left: float) -> int:
        if not self.step_seconds:
            return 1
        return max(1, int(min(defaults.TRAIN_SLICE, time_left) / self.step_seconds))

    async def _train_slice(self, tally: _Tally, steps: float, descent: _Descent) -> None:
        count = int(steps)
        start = self._host.now()
        await self._compute(count * self.task.step_seconds, self._steps, count, tally, descent)
        measured = (self._host.now() - start) / count
        # The first step pays for allocations and loading the data; a mean that started there would recover slowly.
        self.step_seconds = (
            measured if tally.steps <= 1 or not self.step_seconds else (0.5 * self.step_seconds + 0.5 * measured)
        )

    async def _compute(self, modelled: float, fn: Callable[..., T], *args: object) -> T:
        async with self._lock:
            return await self._host.compute(modelled, self._on_thread, fn, *args)

    @staticmethod
    def _on_thread(fn: Callable[..., T], *args: object) -> T:
        exact.flush_denormals()
        return fn(*args)

    def _descent(self, rate: float | None, drift: Tensor | None) -> _Descent:
        optimizer = self.optimizer if rate is None else torch.optim.SGD(self.model.parameters(), lr=rate)
        pairs: list[tuple[nn.Parameter, Tensor]] = []
        if drift is not None:
            values = unflatten(self.layout, drift)
            pairs = [(p, values[name].to(p)) for name, p in self.model.named_parameters() if p.requires_grad]
        return _Descent(optimizer, pairs)

    def _take_step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def _steps(self, count: int, tally: _Tally, descent: _Descent) -> None:
        self.model.train()
        losses: list[Tensor] = []
        for _ in range(count):
            descent.optimizer.zero_grad(set_to_none=True)
            losses.append(self._backward(tally))
            for parameter, drift in descent.drifts:
                if parameter.grad is not None:
                    parameter.grad.add_(drift)
            self._take_step(descent.optimizer)
        self._accumulate(losses, tally)

    def _backward(self, tally: _Tally) -> Tensor:
        """Gradients of one batch; returns loss × samples, still on the device: reading it would wait for the device."""
        batch = to_device(self._next_batch(), self.device)
        samples = self.task.batch_size(batch)
        loss = self.task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        tally.steps += 1
        tally.samples += samples
        return loss.detach() * samples

    @staticmethod
    def _accumulate(losses: list[Tensor], tally: _Tally) -> None:
        tally.loss += float(torch.stack(losses).double().sum())

    def _flat_gradient(self) -> Tensor:
        parameters = dict(self.model.named_parameters())
        zero = torch.zeros(())
        gradients = []
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            gradient = parameters[name].grad if name in parameters else None
            gradients.append(zero.expand(shape) if gradient is None else gradient)
        return flatten(self.layout, gradients)

    def _next_batch(self) -> Batch:
        if not self._shard.same_part(self._wanted):
            self._shard = self._wanted
            self._batches = None
        fresh = self._batches is None
        if self._batches is None:
            self._batches = iter(self.task.batches(self._shard))
        for batch in self._batches:
            return batch
        if fresh:
            raise ConfigError(f"task {title(self.task)}: batches() yielded nothing for {self._shard}")
        self._shard = attrs.evolve(self._shard, epoch=self._shard.epoch + 1)
        self._batches = None
        return self._next_batch()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with every tensor in its tuples, lists and dicts on ``device``."""
    match batch:
        case Tensor():
            return batch.to(device, non_blocking=True)
        case dict():
            return {key: to_device(value, device) for key, value in batch.items()}
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(to_device(value, device) for value in batch))
        case tuple() | list():
            return type(batch)(to_device(value, device) for value in batch)
        case _:
            return batch
