"""A trainer in a process of its own does what one in this process does, bit for bit, and says how it ended."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
import trio

from shoal.learning.apart import Apart, TrainingFailed
from shoal.learning.directions import Direction, Move
from shoal.learning.shard import Shard
from shoal.learning.task import Task, resolve
from shoal.learning.worker import Part, Worker
from shoal.transport.errors import ConfigError
from shoal.transport.host import RealHost

pytestmark = pytest.mark.process

SHARD = Shard(3, bytes(range(32)), 0, 1, 4)

TASK = """
import time, torch
from torch import nn
from shoal import Task

class Odd(Task):
    def model(self):
        return nn.Linear(2, 1)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)
    def batches(self, shard):
        for number in range(1000):
            if number == 500:
                raise RuntimeError("the cable came loose")
            yield torch.ones(4, 2)
    def loss(self, model, batch):
        print("hooks may print")
        time.sleep(0.01)
        return model(batch).square().mean()
    def evaluate(self, model):
        return {"nan": float("nan"), "bias": float(model.bias)}
"""


def apart(task: Task, name: str, script: Callable[[Apart], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(100):
            async with Apart.open(task, name, SHARD, "cpu") as trainer:
                await script(trainer)

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        while isinstance(group, BaseExceptionGroup):
            group = group.exceptions[0]  # type: ignore[assignment]
        raise group from None


def test_a_process_of_its_own_trains_to_the_same_bits() -> None:
    task = resolve("digits", allow_import=False)

    async def script(trainer: Apart) -> None:
        worker = Worker(RealHost(), task, SHARD)
        assert torch.equal(await trainer.weights(), await worker.weights())
        assert torch.equal(await trainer.fresh(SHARD.peer), await worker.fresh(SHARD.peer))
        assert torch.equal(await trainer.weights(), await worker.weights())
        with pytest.raises(ConfigError, match="without --train-apart"):
            await trainer.activations([], [], 1)
        other = attrs_evolved(SHARD)
        for each in (trainer, worker):
            each.set_shard(other)
        one, two = await trainer.train(7), await worker.train(7)
        assert (one.steps, one.samples, one.loss_mean) == (two.steps, two.samples, two.loss_mean)
        assert torch.equal(await trainer.weights(), await worker.weights())
        drift = torch.linspace(-1, 1, worker.layout.size)
        for _ in range(2):
            await trainer.train(3, rate=0.05, drift=drift)
            await worker.train(3, rate=0.05, drift=drift)
            drift = drift.neg()
        out = torch.empty(worker.layout.size)
        assert torch.equal(await trainer.weights(out), await worker.weights()) and torch.equal(
            out, await worker.weights()
        )
        (gradient, _), (expected, _) = await trainer.gradient(), await worker.gradient()
        assert torch.equal(gradient, expected)
        for each in (trainer, worker):
            await each.apply(gradient)
            await each.load(0.5 * await each.weights())
            each.reset_optimizer()
            await each.train(2)
        assert torch.equal(await trainer.weights(), await worker.weights())
        directions = [Direction(bytes(range(16))), Direction(bytes(16), "normal")]
        part = Part(bytes(32), 1, 3)
        for more in ((), (part,)):
            (losses, one), (found, two) = [await t.probe(directions, 1e-3, (1, -1), *more) for t in (trainer, worker)]
            assert losses == found and (one.steps, one.samples) == (two.steps, two.samples)
        moves = [Move(direction, 0.01) for direction in directions]
        for each in (trainer, worker):
            await each.descend(moves)
        assert torch.equal(await trainer.weights(), await worker.weights())
        assert torch.equal(await trainer.fresh(bytes(32)), await worker.fresh(bytes(32)))
        zero = torch.zeros(worker.layout.size)
        assert await trainer.evaluate() == await worker.evaluate()
        assert await trainer.evaluate(zero) == await worker.evaluate(zero)

    apart(task, "digits", script)


def attrs_evolved(shard: Shard) -> Shard:
    return Shard(shard.seed, shard.peer, 5, 2, 4)


def test_weights_are_read_and_training_is_cancelled_between_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = own_task(tmp_path, monkeypatch)

    async def script(trainer: Apart) -> None:
        before = await trainer.weights()
        with trio.move_on_after(1.0) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trainer.train, 400)
                while torch.equal(await trainer.weights(), before):
                    await trio.sleep(0.02)
        assert scope.cancelled_caught
        stopped = await trainer.weights()
        await trio.sleep(0.2)
        assert torch.equal(await trainer.weights(), stopped)
        values = await trainer.evaluate()
        assert math.isnan(values["nan"]) and math.isfinite(values["bias"])
        assert (await trainer.train(2)).steps == 2

    apart(task, "odd_task:Odd", script)


def own_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    (folder / "odd_task.py").write_text(TASK)
    monkeypatch.chdir(folder)
    return resolve("odd_task:Odd", allow_import=True)


def test_what_a_hook_raises_comes_back_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = own_task(tmp_path, monkeypatch)

    async def script(trainer: Apart) -> None:
        with pytest.raises(TrainingFailed, match="RuntimeError: the cable came loose") as caught:
            await trainer.train(600)
        assert "in batches" in str(caught.value)
        # It is still there.
        assert (await trainer.weights()).numel() == 3

    apart(task, "odd_task:Odd", script)


def test_a_task_that_the_process_cannot_find_is_named() -> None:
    async def script(trainer: Apart) -> None:
        await trainer.weights()

    with pytest.raises(ConfigError, match="nowhere"):
        apart(resolve("digits", allow_import=False), "nowhere:Digits", script)


def test_the_death_of_the_process_is_told_at_once_and_names_the_signal() -> None:
    async def script(trainer: Apart) -> None:
        await trainer.weights()
        os.kill(trainer.pid, signal.SIGKILL)
        await trainer.train(100000)

    with pytest.raises(TrainingFailed, match="the training process ended \\(SIGKILL\\)"):
        apart(resolve("digits", allow_import=False), "digits", script)


def test_the_process_ends_with_its_node() -> None:
    pids: list[int] = []

    async def script(trainer: Apart) -> None:
        await trainer.weights()
        pids.append(trainer.pid)

    apart(resolve("digits", allow_import=False), "digits", script)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
