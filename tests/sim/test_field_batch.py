"""Replicas trained in one call have the bits that each has alone; where they would not, they are trained alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import pytest
import torch
from torch import Tensor, nn

from shoal.learning.shard import Shard
from shoal.learning.task import Task
from shoal.learning.tasks.digits import Digits, load
from shoal.sim import field_batch
from shoal.sim.determinism import deterministic
from shoal.sim.field import FieldCase, run_field
from shoal.sim.field_batch import Batcher, Replica, alone, apply


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    with deterministic(0):
        yield


def replicas(task: Task, count: int, steps: int, sizes: Sequence[int]) -> list[Replica]:
    """Of ``steps`` batches each, whose sizes differ from one to the next."""
    data, found = load(), []
    for number in range(count):
        torch.manual_seed(number)
        model = task.model()
        picked = [torch.randperm(1400)[: sizes[(7 * number + 3 * step) % len(sizes)]] for step in range(steps)]
        batches = [(data.train_x[index], data.train_y[index]) for index in picked]
        found.append(Replica(model, task.optimizer(model), batches, [len(index) for index in picked]))
    return found


def trained(task: Task, batcher: Batcher | None, count: int, steps: int, sizes: Sequence[int]) -> list[Replica]:
    """Twice, so that optimisers begin with what they keep."""
    found = replicas(task, count, steps, sizes)
    for _ in range(2):
        if batcher is None:
            for each in found:
                alone(task, each)
        else:
            batcher.train(found)
            for each in found:
                if each.result is not None:
                    apply(each)
                    each.result = None
    return found


def same(one: Replica, other: Replica) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    for ours, theirs in pairs:
        kept, others = one.optimizer.state[ours], other.optimizer.state[theirs]
        if not torch.equal(ours, theirs) or any(not torch.equal(kept[name], others[name]) for name in kept):
            return False
    return torch.equal(torch.stack(one.losses), torch.stack(other.losses))


class Descent(Digits):
    """With momentum and decay, and nothing that Adam has."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("task", [Digits(), Descent()])
@pytest.mark.parametrize("sizes", [(32,), (14, 15), tuple(range(1, 33))], ids=["even", "nearly", "any"])
def test_the_bits_are_those_of_each_alone(
    task: Digits, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(field_batch, "FIRST", 0)  # nothing is put right behind our back
    for count in (2, 9):
        batcher = Batcher(task)
        together, each = trained(task, batcher, count, 3, sizes), trained(task, None, count, 3, sizes)
        assert not batcher.off
        assert all(map(same, together, each))


class Odd(Digits):
    """Its loss looks at all samples at once in a way of its own, which padding disturbs."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) + model(batch[0]).square().mean()


class Reads(Digits):
    """Its loss reads numbers, which cannot be mapped over replicas."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        return loss * 2 if loss.item() > 1 else loss


class Whole(Digits):
    """Its optimiser makes one number of all of a tensor's."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(model.parameters())


@pytest.mark.parametrize("task", [Odd(), Reads(), Whole()])
def test_what_has_other_bits_in_a_stack_is_trained_alone(task: Digits) -> None:
    batcher = Batcher(task)
    assert all(map(same, trained(task, batcher, 3, 3, (14, 15)), trained(task, None, 3, 3, (14, 15))))
    assert batcher.off or isinstance(task, Odd)


@pytest.mark.parametrize(
    "case",
    [
        FieldCase("diloco", {"inner_steps": 4}, peers=5, rounds=3),
        FieldCase("noloco", {"inner_steps": 4}, peers=7, rounds=3, topology="ring", slowness={1: 3.0}),
        FieldCase("diloco", {"inner_steps": 4}, peers=4, rounds=3, slowness={2: 300.0}, alpha=None),
        FieldCase("diloco", peers=4, rounds=2, time_budget=0.07, slowness={0: 2.0}),
    ],
    ids=["together", "apart", "cut short", "by time"],
)
def test_a_field_is_the_same_with_and_without(case: FieldCase) -> None:
    plain = run_field(attrs.evolve(case, batched=False))
    assert plain.digest() == run_field(case).digest()


def test_a_shard_names_the_same_samples_for_all_of_them() -> None:
    task = Digits(alpha=None)
    sizes = {len(labels) for _, labels in task.batches(Shard(0, bytes(32), 1, 0, 100))}
    assert sizes <= {14, 15}
