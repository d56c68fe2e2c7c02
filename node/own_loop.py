"""Lets a user's own training loop be what trains in a run: the node asks for steps, the loop takes them.

Two threads meet here. The node's thread runs the event loop and calls the methods of a trainer (``train``,
``weights`` …). The user's thread calls :meth:`OwnLoop.step` after each step. The model belongs to the
user's thread alone: whatever the node wants to do with it (read the weights, load others, evaluate) waits
as a job until the loop stands in ``step()`` or in one of the other calls here, and is done there.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import attrs
import torch
import trio
from torch import Tensor, nn

from ..learning import exact
from ..learning.directions import Direction, Move
from ..learning.shard import Shard
from ..learning.state import Layout, flatten_model, unflatten_into
from ..learning.worker import Part, TrainResult
from ..transport.errors import ConfigError, ProtocolMisuse

T = TypeVar("T")

#: Evaluates the model on held-out data: metrics by name.
Evaluate = Callable[[nn.Module], dict[str, float]]


@attrs.define(eq=False)
class _Job:
    """Something the node wants done on the user's thread. ``given_up``: nobody waits for it any more."""

    work: Callable[[], Any]
    done: trio.Event
    token: trio.lowlevel.TrioToken
    result: Any = None
    error: BaseException | None = None
    given_up: bool = False


class OwnLoop:
    """A trainer (see :class:`shoal.learning.peer.Trainer`) whose steps are taken by somebody else's loop.

    ``samples``: in one step, unless :meth:`step` says otherwise; the weight of this peer in a mean by time budget.
    """

    def __init__(self, model: nn.Module, *, evaluate: Evaluate | None = None, samples: int = 1) -> None:
        if samples < 1:
            raise ConfigError(f"samples per step must be at least 1, got {samples}")
        self.model = model
        self.layout = Layout.of(model)
        #: What it came with, until the first steps: the run's state is loaded over it.
        self._initial: Tensor | None = flatten_model(self.layout, model)
        self._evaluate = evaluate
        self._samples = samples
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        #: Steps the loop may still take before it has to wait; infinite within a time budget.
        self._granted = 0.0
        self._begun = False
        self._steps = self._seen = 0
        self._loss = 0.0
        self._training: tuple[trio.Event, trio.lowlevel.TrioToken] | None = None
        self._closed = False
        self._failure: BaseException | None = None

    # -- the user's thread ---------------------------------------------------------------------------------------------

    def step(self, samples: int | None = None, loss: float | Tensor | None = None) -> bool:
        """Count one step; at the end of a round wait while weights are exchanged. True while the run goes on.

        Raises what ended the node, if it failed.
        """
        with self._changed:
            if self._closed:
                return self._goes_on()
            if not self._begun:
                raise ConfigError("step() before the run began: take steps inside `with swarm:`, which waits for it")
            self._steps += 1
            self._seen += self._samples if samples is None else samples
            if loss is not None:
                value = float(loss.detach() if isinstance(loss, Tensor) else loss)
                self._loss += value * (self._samples if samples is None else samples)
            self._granted -= 1
        self._serve(lambda: self._granted > 0)
        return self._goes_on()

    def wait_for_grant(self) -> bool:
        """Wait until the run wants the first step: the model then holds the run's weights. False if the run is over."""
        self._serve(lambda: self._granted > 0)
        self._begun = True
        return self._goes_on()

    def serve_until_closed(self) -> None:
        """Let the node finish what it does with the model; returns once :meth:`close` was called."""
        self._serve(lambda: False)

    def _goes_on(self) -> bool:
        if self._failure is not None:
            raise self._failure
        return not self._closed

    def _serve(self, enough: Callable[[], bool]) -> None:
        """Do the node's jobs until ``enough()`` or the end; tell the node when its steps are done."""
        while True:
            with self._changed:
                while not self._jobs:
                    if self._closed or enough():
                        return
                    self._tell_trained()
                    self._changed.wait()
                job = self._jobs.popleft()
            if not job.given_up:
                self._do(job)

    @staticmethod
    def _do(job: _Job) -> None:
        try:
            job.result = job.work()
        except BaseException as error:  # noqa: BLE001  # boundary: raised on the node's thread, which awaits the job
            job.error = error
        try:
            job.token.run_sync_soon(job.done.set)
        except trio.RunFinishedError:
            # The node ended meanwhile; nobody waits.
            pass

    def _tell_trained(self) -> None:
        if self._training is not None and self._granted <= 0:
            done, token = self._training
            self._training = None
            try:
                token.run_sync_soon(done.set)
            except trio.RunFinishedError:
                pass

    # -- the node's thread ---------------------------------------------------------------------------------------------

    def close(self, failure: BaseException | None = None) -> None:
        """The node has ended: the loop waits for nothing any more, and ``step`` returns False or raises ``failure``."""
        with self._changed:
            self._closed = True
            self._failure = failure
            self._jobs.clear()
            self._changed.notify_all()

    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult:
        """Wait until the loop has taken ``steps`` steps, or those it begins within ``seconds``.

        Raises :class:`ConfigError` for a ``rate`` or ``drift``: how the loop takes its steps is its own affair.
        The mean loss is 0 if the loop reports none. Cancelled, the loop stops at its next step; steps stay taken.
        """
        if rate is not None or drift is not None:
            raise ConfigError("this strategy takes the steps of training itself, which an own training loop does")
        self._initial = None
        done = trio.Event()
        began = trio.current_time()
        with self._changed:
            self._steps = self._seen = 0
            self._loss = 0.0
            self._granted = math.inf if steps is None else float(steps)
            self._training = (done, trio.lowlevel.current_trio_token())
            self._changed.notify_all()
        try:
            with trio.move_on_after(math.inf if seconds is None else seconds):
                await done.wait()
            self._withdraw()
            await done.wait()
        finally:
            self._withdraw()
        mean = self._loss / self._seen if self._seen else 0.0
        return TrainResult(self._steps, self._seen, mean, trio.current_time() - began)

    def _withdraw(self) -> None:
        with self._changed:
            self._granted = min(self._granted, 0.0)
            self._changed.notify_all()

    async def weights(self, out: Tensor | None = None) -> Tensor:
        """A copy of the state: float32 CPU vector, into ``out`` when given."""
        return await self._on_loop(lambda: flatten_model(self.layout, self.model, out))

    async def load(self, vector: Tensor) -> None:
        """Take the state from a vector; the optimiser's state stays with its owner."""
        await self._on_loop(lambda: unflatten_into(self.layout, vector, self.model))

    async def fresh(self, peer: bytes) -> Tensor:
        """The weights that the loop's model came with."""
        if self._initial is None:
            raise ProtocolMisuse("fresh weights are asked for before the first steps")
        return self._initial

    async def activations(
        self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int
    ) -> list[dict[str, Tensor]]:
        raise ConfigError(
            "this strategy compares activations, for which an own training loop gives no data; use gossip"
        )

    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]:
        """The user's held-out metrics for the model as it is, or for ``vector``; empty without an ``evaluate``."""

        def work() -> dict[str, float]:
            if self._evaluate is None:
                return {}
            own = None if vector is None else flatten_model(self.layout, self.model)
            if vector is not None:
                unflatten_into(self.layout, vector, self.model)
            training = self.model.training
            self.model.eval()
            try:
                with torch.no_grad():
                    return {name: float(value) for name, value in self._evaluate(self.model).items()}
            finally:
                self.model.train(training)
                if own is not None:
                    unflatten_into(self.layout, own, self.model)

        return await self._on_loop(work)

    async def gradient(self) -> tuple[Tensor, TrainResult]:
        raise ConfigError("this strategy exchanges gradients, which an own training loop keeps to itself; use diloco")

    async def apply(self, gradient: Tensor) -> None:
        raise ConfigError("this strategy exchanges gradients, which an own training loop keeps to itself; use diloco")

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]:
        raise ConfigError("this strategy measures losses, which an own training loop keeps to itself; use diloco")

    async def descend(self, moves: Sequence[Move]) -> None:
        raise ConfigError("this strategy measures losses, which an own training loop keeps to itself; use diloco")

    def set_shard(self, shard: Shard) -> None:
        """Nothing: the loop brings its own data."""

    def reset_optimizer(self) -> None:
        """Nothing: the optimiser belongs to the loop."""

    async def _on_loop(self, work: Callable[[], T]) -> T:
        def careful() -> T:
            exact.flush_denormals()
            return work()

        job = _Job(careful, trio.Event(), trio.lowlevel.current_trio_token())
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        try:
            await job.done.wait()
        finally:
            job.given_up = True
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result
