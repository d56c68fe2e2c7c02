"""The meeting of two threads: a node that asks for steps, a loop that takes them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
import trio
from torch import nn

from shoal.learning.state import flatten_model
from shoal.node.own_loop import OwnLoop
from shoal.transport.errors import ConfigError, ProtocolMisuse

pytestmark = pytest.mark.real


CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"))


def a_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


class User:
    """A user's loop on a thread of its own: ``work`` is its body."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    async def ended(self) -> None:
        with trio.fail_after(10):
            await trio.to_thread.run_sync(self._thread.join, abandon_on_cancel=True)
        assert not self._thread.is_alive()


async def test_train_waits_for_exactly_the_steps_asked_for() -> None:
    loop = OwnLoop(a_model(), samples=4)
    taken: list[int] = []

    def work() -> None:
        assert loop.wait_for_grant()
        while loop.step(loss=2.0):
            taken.append(len(taken))

    user = User(work)
    with trio.fail_after(10):
        result = await loop.train(steps=5)
    assert (result.steps, result.samples, result.loss_mean) == (5, 20, 2.0)
    with trio.fail_after(10):
        assert (await loop.train(steps=3)).steps == 3
    loop.close()
    await user.ended()
    assert user.error is None
    assert len(taken) == 7  # the eighth step returned False: the run was over


async def test_a_time_budget_ends_training_at_the_next_step() -> None:
    loop = OwnLoop(a_model())

    def work() -> None:
        loop.wait_for_grant()
        while loop.step(samples=2):
            threading.Event().wait(0.01)

    user = User(work)
    with trio.fail_after(10):
        result = await loop.train(seconds=0.2)
    assert 1 <= result.steps < 40
    assert result.samples == 2 * result.steps
    loop.close()
    await user.ended()


@pytest.mark.parametrize("device", ["cpu", CUDA])
async def test_weights_are_read_and_loaded_on_the_loops_thread_between_steps(device: str) -> None:
    model = a_model().to(device)
    threads: list[str] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        threads.append(threading.current_thread().name)
        assert not model.training
        return {"norm": float(sum(p.square().sum() for p in model.parameters()))}

    loop = OwnLoop(model, evaluate=evaluate)

    def work() -> None:
        threading.current_thread().name = "the loop"
        loop.wait_for_grant()
        with torch.no_grad():
            model.weight.fill_(1.0)
        loop.step()

    user = User(work)
    with trio.fail_after(10):
        zeros = torch.zeros(loop.layout.size)
        await loop.load(zeros)
        assert torch.equal(await loop.weights(), zeros)
        await loop.train(steps=1)
        assert (await loop.weights()).tolist() == [1.0, 1.0, 0.0]
        assert (await loop.evaluate(zeros))["norm"] == 0.0
        assert (await loop.evaluate())["norm"] == 2.0  # the model was put back
    assert threads == ["the loop", "the loop"]
    assert model.weight.device.type == device
    loop.close()
    await user.ended()


async def test_an_error_of_the_users_evaluation_reaches_the_node() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        raise RuntimeError("no data")

    loop = OwnLoop(a_model(), evaluate=evaluate)
    user = User(lambda: loop.serve_until_closed())
    with trio.fail_after(10), pytest.raises(RuntimeError, match="no data"):
        await loop.evaluate()
    loop.close()
    await user.ended()


async def test_what_ended_the_node_is_raised_in_step() -> None:
    loop = OwnLoop(a_model())

    def work() -> None:
        loop.wait_for_grant()
        while loop.step():
            pass

    user = User(work)
    with trio.fail_after(10):
        await loop.train(steps=2)
    loop.close(ConfigError("the disk is full"))
    await user.ended()
    assert isinstance(user.error, ConfigError)


async def test_a_cancelled_training_stops_the_loop_at_its_next_step() -> None:
    loop = OwnLoop(a_model())
    steps = 0

    def work() -> None:
        nonlocal steps
        loop.wait_for_grant()
        while loop.step():
            steps += 1
            threading.Event().wait(0.01)

    user = User(work)
    with trio.move_on_after(0.2):
        await loop.train(steps=10**9)
    with trio.fail_after(10):
        await loop.weights()  # the loop stands in step() now
    stopped_at = steps
    await trio.sleep(0.1)
    assert steps == stopped_at
    loop.close()
    await user.ended()


async def test_a_step_before_the_run_began_is_refused() -> None:
    with pytest.raises(ConfigError, match="inside `with swarm:`"):
        OwnLoop(a_model()).step()


async def test_strategies_that_exchange_gradients_are_refused() -> None:
    loop = OwnLoop(a_model())
    with pytest.raises(ConfigError, match="use diloco"):
        await loop.gradient()
    with pytest.raises(ConfigError, match="use diloco"):
        await loop.apply(flatten_model(loop.layout, loop.model))


async def test_a_loops_own_weights_can_be_had_until_it_trains_and_its_data_not_at_all() -> None:
    loop = OwnLoop(a_model())
    before = flatten_model(loop.layout, loop.model)
    with torch.no_grad():
        loop.model.weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(await loop.fresh(bytes(32)), before)
    with pytest.raises(ConfigError, match="use gossip"):
        await loop.activations([before], [], 1)
    with trio.move_on_after(0.01):
        await loop.train(steps=1)
    with pytest.raises(ProtocolMisuse):
        await loop.fresh(bytes(32))


async def test_a_loop_that_reports_no_loss_has_a_finite_one() -> None:
    loop = OwnLoop(a_model())

    def work() -> None:
        loop.wait_for_grant()
        loop.step()

    user = User(work)
    with trio.fail_after(10):
        assert math.isfinite((await loop.train(steps=1)).loss_mean)
    loop.close()
    await user.ended()
