"""A worker whose training is computed when it is over, together with that of all others that train then.

In virtual time a stretch of training is one sleep, as long as the slices of :class:`shoal.learning.worker.Worker` are
together; what comes of it is needed only afterwards. So whoever wakes first has everything computed that has been asked
for by then (:mod:`.field_batch`), of those too that still sleep: they find it when they wake. Who is cancelled
meanwhile takes only the steps of the slices that had begun, as a worker does.
"""

from __future__ import annotations

import math
from collections import deque

import attrs
import torch
import trio
from torch import Tensor

from ..learning import defaults
from ..learning.shard import Shard
from ..learning.task import Batch, Task
from ..learning.worker import TrainResult, Worker, to_device
from ..transport.errors import ProtocolMisuse
from ..transport.host import Host
from .field_batch import Batcher, Replica, alone, apply


@attrs.define(eq=False)
class _Stretch:
    """What was asked for: ``steps``. ``replica``: once it is computed."""

    worker: FieldWorker
    steps: int
    replica: Replica | None = None


class Gym:
    """Where the workers of a field train. ``batcher``: None: each by itself."""

    def __init__(self, task: Task, batched: bool) -> None:
        self.task = task
        self.batcher = Batcher(task) if batched else None
        self._asked: dict[_Stretch, None] = {}

    def ask(self, stretch: _Stretch) -> None:
        """It will be wanted."""
        self._asked[stretch] = None

    def forget(self, stretch: _Stretch) -> None:
        """It is no longer wanted."""
        self._asked.pop(stretch, None)

    def compute(self) -> None:
        """All that was asked for."""
        asked, self._asked = list(self._asked), {}
        for stretch in asked:
            stretch.replica = stretch.worker.replica(stretch.steps)
        replicas = [stretch.replica for stretch in asked if stretch.replica is not None and stretch.steps]
        if self.batcher is not None:
            self.batcher.train(replicas)


class FieldWorker(Worker):
    """See the module."""

    def __init__(self, host: Host, task: Task, shard: Shard, slowness: float, gym: Gym) -> None:
        super().__init__(host, task, shard)
        self._gym, self._slowness = gym, slowness
        #: Drawn, and not trained on after all.
        self._ahead: deque[Batch] = deque()

    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult:
        """As :meth:`Worker.train`. With a rate or a drift each peer is computed by itself."""
        if rate is not None or drift is not None:
            return await super().train(steps, seconds, rate=rate, drift=drift)
        if steps is None and seconds is None:
            raise ProtocolMisuse("train() needs a number of steps or of seconds")
        if self._training:
            raise ProtocolMisuse("train() is already running on this worker")
        began, step = self._host.now(), self.task.step_seconds * self._slowness
        stretch = _Stretch(self, self._steps_within(steps, seconds, step))
        self._training = True
        self._gym.ask(stretch)
        try:
            await self._sleep(stretch, began, step)
        finally:
            self._training = False
            self._gym.forget(stretch)
            tally = self._finish(stretch)
        mean = tally[1] / tally[0] if tally[0] else math.nan
        return TrainResult(stretch.steps, tally[0], mean, self._host.now() - began)

    async def _sleep(self, stretch: _Stretch, began: float, step: float) -> None:
        """Until it is over; cancelled, until the slice that has begun is, with so many steps."""
        try:
            await trio.sleep(stretch.steps * step)
        except trio.Cancelled:
            gone, done = self._host.now() - began, 0
            while done < stretch.steps and done * step <= gone:
                done += min(stretch.steps - done, self._slice(math.inf, step, done))
            self._cut(stretch, done)
            with trio.CancelScope(shield=True):
                await trio.sleep_until(began + done * step)
            raise

    def _slice(self, left: float, step: float, done: int) -> int:
        """Steps of the next slice: see :meth:`Worker._slice_steps`."""
        return max(1, int(min(defaults.TRAIN_SLICE, left) / step)) if done and step else 1

    def _steps_within(self, steps: int | None, seconds: float | None, step: float) -> int:
        if seconds is None:
            return max(0, steps or 0)
        if not step:
            raise ProtocolMisuse("a time budget for steps that take no time")
        done = 0
        while done * step < seconds and (steps is None or done < steps):
            done += self._slice(seconds - done * step, step, done)
        return done if steps is None else min(done, steps)

    def _cut(self, stretch: _Stretch, steps: int) -> None:
        """Only ``steps`` are taken; what was computed beyond is given up."""
        if steps == stretch.steps:
            return
        stretch.steps = steps
        if stretch.replica is not None:
            self._ahead.extendleft(reversed(stretch.replica.batches))
            stretch.replica = None
        self._gym.ask(stretch)

    def _finish(self, stretch: _Stretch) -> tuple[int, float]:
        """Samples, and the sum of losses."""
        if not stretch.steps:
            return 0, 0.0
        if stretch.replica is None:
            self._gym.ask(stretch)
            self._gym.compute()
        replica = stretch.replica
        assert replica is not None
        if replica.result is not None:
            apply(replica)
        elif not replica.losses:
            self._on_thread(alone, self.task, replica)
        return sum(replica.samples), float(torch.stack(replica.losses).double().sum())

    def replica(self, steps: int) -> Replica:
        """Ourselves, with the batches of so many steps."""
        batches = [to_device(self._next_batch(), self.device) for _ in range(steps)]
        samples = [self.task.batch_size(batch) for batch in batches]
        return Replica(self.model, self.optimizer, batches, samples)

    def _next_batch(self) -> Batch:
        if self._ahead:
            if self._shard.same_part(self._wanted):
                return self._ahead.popleft()
            self._ahead.clear()
        return super()._next_batch()
