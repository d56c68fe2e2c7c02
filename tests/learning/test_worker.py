"""The worker trains in short slices, reports what it did, and stops when it is told to."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import attrs
import pytest
import torch
import trio
from torch import Tensor, nn

from shoal.learning import defaults
from shoal.learning.shard import Shard
from shoal.learning.task import Batch, Task
from shoal.learning.worker import TrainResult, Worker, _Descent, _Tally, to_device
from shoal.transport.errors import ConfigError, ProtocolMisuse
from shoal.transport.host import Host, RealHost
from shoal.transport.memory import MemoryWorld

T = TypeVar("T")
SHARD = Shard(seed=5, peer=bytes(32), round=0, index=0, count=2)


class VirtualHost(Host):
    """A host whose compute takes exactly its modelled time on trio's clock."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.network = MemoryWorld(random.Random(0)).network("a")

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return trio.current_time()

    def entropy(self, n: int) -> bytes:
        return self.random.randbytes(n)

    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        await trio.lowlevel.checkpoint()
        return fn(*args)

    async def compute(self, modelled: float, fn: Callable[..., T], *args: object) -> T:
        result = await self.run_blocking(fn, *args)
        await trio.sleep(modelled)
        return result


class Line(Task):
    """Fits y = w x on three samples a peer; remembers which batches it was asked for."""

    step_seconds = 0.01

    def __init__(self) -> None:
        self.asked: list[Shard] = []
        self.threads: set[int] = set()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05)

    def batches(self, shard: Shard) -> Iterator[Batch]:
        self.asked.append(shard)
        x = torch.rand(6, 1, generator=shard.generator("x")) + shard.index
        yield x[:2], 3 * x[:2]
        yield x[2:], 3 * x[2:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert model.training
        self.threads.add(threading.get_ident())
        error: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return error

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"error": float((model(torch.ones(1, 1)) - 3).abs())}


def worker(task: Task | None = None) -> Worker:
    return Worker(VirtualHost(), task or Line(), SHARD)


async def test_steps_samples_and_modelled_time_are_counted() -> None:
    ours = worker()
    result = await ours.train(steps=5)
    assert (result.steps, result.samples) == (5, 2 + 4 + 2 + 4 + 2)
    assert result.seconds == pytest.approx(0.05)
    assert math.isfinite(result.loss_mean)


async def test_the_mean_loss_is_weighted_by_samples() -> None:
    task = Line()
    ours = worker(task)
    batches = list(task.batches(SHARD))
    start = await ours.weights()
    losses = []
    for batch in batches:
        losses.append(float(task.loss(ours.model, batch).detach()))
        await ours.load(start)
        await ours.train(steps=1)
    await ours.load(start)
    again = worker(Line())
    await again.load(start)
    one = await again.train(steps=1)
    assert one.loss_mean == pytest.approx(losses[0])
    both = await worker().train(steps=2)
    second = await again.train(steps=1)
    assert both.loss_mean == pytest.approx((2 * one.loss_mean + 4 * second.loss_mean) / 6)


async def test_a_time_budget_is_kept_to_within_a_slice() -> None:
    result = await worker().train(seconds=1.0)
    assert 1.0 <= result.seconds <= 1.0 + defaults.TRAIN_SLICE
    assert 95 <= result.steps <= 106
    capped = await worker().train(steps=3, seconds=1.0)
    assert capped.steps == 3


async def test_slices_last_about_the_slice_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = worker()
    await ours.train(steps=1)
    counts: list[int] = []
    steps = ours._steps

    def counted(count: int, tally: _Tally, descent: _Descent) -> None:
        counts.append(count)
        steps(count, tally, descent)

    monkeypatch.setattr(ours, "_steps", counted)
    await ours.train(steps=12)
    assert counts in ([5, 5, 2], [4, 4, 4])


async def test_nothing_to_do_takes_no_step_and_no_limit_is_misuse() -> None:
    ours = worker()
    none = await ours.train(steps=0)
    assert (none.steps, none.samples) == (0, 0)
    assert math.isnan(none.loss_mean)
    with pytest.raises(ProtocolMisuse, match="steps or of seconds"):
        await ours.train()


async def test_the_same_seed_trains_to_the_same_bits() -> None:
    one, two = worker(), worker()
    torch.manual_seed(99)
    assert torch.equal(await one.weights(), await two.weights())
    await one.train(steps=7)
    for _ in range(7):
        await two.train(steps=1)
    assert torch.equal(await one.weights(), await two.weights())


async def test_building_a_worker_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    worker()
    assert torch.equal(torch.rand(3), expected)


async def test_an_epoch_that_ends_is_asked_for_again_with_a_new_order() -> None:
    task = Line()
    await worker(task).train(steps=5)
    assert [shard.epoch for shard in task.asked] == [0, 1, 2]


async def test_a_new_round_goes_on_with_the_epoch_and_a_new_roster_starts_afresh() -> None:
    task = Line()
    ours = worker(task)
    await ours.train(steps=1)
    ours.set_shard(attrs.evolve(SHARD, round=1))
    await ours.train(steps=1)
    assert task.asked == [SHARD]
    other = attrs.evolve(SHARD, round=2, count=3, index=2)
    ours.set_shard(other)
    assert ours.shard == other
    await ours.train(steps=1)
    assert task.asked == [SHARD, other]


async def test_a_task_without_batches_is_named() -> None:
    class Empty(Line):
        def batches(self, shard: Shard) -> Iterator[Batch]:
            return iter(())

    with pytest.raises(ConfigError, match="task Empty: batches\\(\\) yielded nothing"):
        await worker(Empty()).train(steps=1)


async def test_a_loss_that_is_nan_is_reported_not_raised() -> None:
    class Broken(Line):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().loss(model, batch) * float("nan")

    result = await worker(Broken()).train(steps=3)
    assert result.steps == 3
    assert math.isnan(result.loss_mean)


async def test_an_error_of_the_users_hook_passes_through_and_the_worker_stays_usable() -> None:
    class Fails(Line):
        broken = True

        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            if self.broken:
                raise ZeroDivisionError("user code")
            return super().loss(model, batch)

    task = Fails()
    ours = worker(task)
    with pytest.raises(ZeroDivisionError):
        await ours.train(steps=1)
    task.broken = False
    assert (await ours.train(steps=1)).steps == 1


async def test_weights_are_a_copy_and_load_restores_them_with_buffers() -> None:
    ours = worker()
    before = await ours.weights()
    kept = before.clone()
    await ours.train(steps=4)
    after = await ours.weights()
    assert torch.equal(before, kept)
    assert not torch.equal(before, after)
    await ours.load(before)
    assert torch.equal(await ours.weights(), before)
    out = torch.empty_like(before)
    assert await ours.weights(out) is out


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
    ],
)
async def test_weights_and_gradients_go_to_the_device_and_back(device: str) -> None:
    one, two = Worker(VirtualHost(), Line(), SHARD, device), worker()
    before = await one.weights()
    assert before.device.type == "cpu" and torch.equal(before, await two.weights())
    gradient, _ = await one.gradient()
    await one.apply(gradient)
    expected, _ = await two.gradient()
    assert gradient.device.type == "cpu"
    torch.testing.assert_close(gradient, expected)
    await two.apply(gradient)
    torch.testing.assert_close(await one.weights(), await two.weights())
    await one.load(before)
    assert torch.equal(await one.weights(), before)
    assert all(parameter.device.type == device for parameter in one.model.parameters())


async def test_evaluation_does_not_disturb_the_model() -> None:
    ours = worker()
    await ours.train(steps=4)
    before = await ours.weights()
    own = await ours.evaluate()
    other = await ours.evaluate(torch.zeros_like(before))
    assert other == {"error": 3.0}
    assert own != other
    assert torch.equal(await ours.weights(), before)
    assert await ours.evaluate() == own


async def test_a_gradient_applied_is_a_step_taken() -> None:
    one, two = worker(), worker()
    gradient, result = await one.gradient()
    assert (result.steps, result.samples) == (1, 2)
    assert gradient.shape == (one.layout.size,)
    await one.apply(gradient)
    await two.train(steps=1)
    assert torch.equal(await one.weights(), await two.weights())


async def test_weights_can_be_read_while_training_runs_but_training_twice_is_misuse() -> None:
    ours = worker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.train, 100)
        await trio.sleep(0.1)
        assert torch.isfinite(await ours.weights()).all()
        with pytest.raises(ProtocolMisuse, match="already running"):
            await ours.train(steps=1)


async def test_cancelled_training_stops_within_a_slice_and_can_go_on() -> None:
    ours = worker()
    await ours.train(steps=10)
    start = trio.current_time()
    with trio.move_on_after(1.02):
        await ours.train(steps=100_000)
    assert trio.current_time() - start <= 1.02 + defaults.TRAIN_SLICE
    assert (await ours.train(steps=1)).steps == 1


@pytest.mark.real
async def test_on_a_real_host_training_runs_in_a_thread_and_the_loop_stays_responsive() -> None:
    class Slow(Line):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            threading.Event().wait(0.004)
            return super().loss(model, batch)

    task = Slow()
    ours = Worker(RealHost(), task, SHARD)
    ticks = 0
    results: list[TrainResult] = []

    async def train() -> None:
        results.append(await ours.train(seconds=1.6))  # four times what 15 turns take on a machine that is free

    async with trio.open_nursery() as nursery:
        nursery.start_soon(train)
        while not results:
            await trio.sleep(0.01)
            ticks += 1
    assert threading.get_ident() not in task.threads
    assert ticks >= 15
    assert results[0].steps >= 20
    assert 1.6 <= results[0].seconds < 4.0


@pytest.mark.real
async def test_on_a_real_host_cancellation_waits_for_one_slice_only() -> None:
    ours = Worker(RealHost(), Line(), SHARD)
    await ours.train(steps=50)
    with trio.move_on_after(0.2):
        await ours.train(steps=10_000_000)
    assert (await ours.train(steps=1)).steps == 1


def test_batches_of_any_nesting_move_to_the_device() -> None:
    device = torch.device("meta")
    moved = to_device({"x": [torch.zeros(1), (torch.zeros(2), "text")]}, device)
    assert moved["x"][0].device.type == "meta"
    assert moved["x"][1][0].device.type == "meta"
    assert moved["x"][1][1] == "text"
    assert type(moved["x"][1]) is tuple


async def test_fresh_weights_are_a_peers_own_and_the_same_whenever_asked() -> None:
    ours = worker()
    before, state = await ours.weights(), torch.get_rng_state()
    one, again, other = await ours.fresh(b"a" * 32), await ours.fresh(b"a" * 32), await ours.fresh(b"b" * 32)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, before)
    assert torch.equal(await ours.weights(), before) and torch.equal(torch.get_rng_state(), state)
    ours.set_shard(attrs.evolve(SHARD, round=7, index=1))
    assert torch.equal(await ours.fresh(b"a" * 32), one)


class Quiet(Line):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        error: Tensor = (model(batch[0]) - batch[1]).square().mean()
        return error


async def test_activations_are_those_of_each_state_on_the_same_samples_and_change_nothing() -> None:
    ours, beside = worker(Quiet()), worker(Quiet())
    await ours.train(steps=1)
    await beside.train(steps=1)
    before = await ours.weights()
    other = await ours.fresh(b"a" * 32)
    mine, theirs, again = await ours.activations([before, other, before], ["0", "2"], 5)
    assert mine["0"].shape == (6, 4) and mine["2"].shape == (6, 1)  # whole batches, until there are enough
    assert torch.equal(mine["0"], again["0"]) and not torch.equal(mine["0"], theirs["0"])
    assert torch.equal(await ours.weights(), before) and ours.model.training
    await ours.train(steps=3)
    await beside.train(steps=3)
    assert torch.equal(await ours.weights(), await beside.weights())
