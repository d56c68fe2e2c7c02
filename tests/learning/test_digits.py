"""The digits task: its data, its split over peers, and that a swarm learns it where lone peers cannot."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.shard import Shard
from shoal.learning.state import Layout, flatten_model, unflatten_into
from shoal.learning.tasks import digits
from shoal.learning.tasks.digits import Digits


def test_the_table_is_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    expected = load_digits()
    table = digits.read_table()
    assert np.array_equal(table[:, :64], expected.data)
    assert np.array_equal(table[:, 64], expected.target)


def test_the_held_out_images_are_fixed_stratified_and_not_trained_on() -> None:
    data = digits.load()
    assert (len(data.train_y), len(data.test_y)) == (1438, 359)
    assert data.train_x.shape[1] == 64
    assert data.train_x.dtype == torch.float32
    held = torch.bincount(data.test_y, minlength=10) / torch.bincount(torch.cat([data.train_y, data.test_y]))
    assert torch.all((held - 0.2).abs() < 0.01)
    assert data.test_y[:8].tolist() == [0, 4, 6, 8, 6, 0, 2, 2]


def test_peers_hold_disjoint_parts_and_together_everything() -> None:
    task = Digits()
    labels = torch.cat([y for i in range(8) for _, y in task.batches(Shard(3, bytes([i]) * 32, 0, i, 8))])
    assert torch.equal(torch.bincount(labels), torch.bincount(digits.load().train_y))


def test_an_epoch_is_finite_and_the_next_one_has_another_order() -> None:
    task = Digits()
    shard = Shard(3, bytes(32), 0, 0, 2)
    first = [y for _, y in task.batches(shard)]
    again = [y for _, y in task.batches(shard)]
    later = [y for _, y in task.batches(attrs.evolve(shard, epoch=1))]
    assert all(len(y) == 32 for y in first[:-1])
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(later))
    assert torch.equal(torch.cat(first).sort().values, torch.cat(later).sort().values)


def test_a_single_machine_learns_the_digits_in_seconds() -> None:
    model = trained(Shard(0, bytes(32), 0, 0, 1), 600)
    assert accuracy(model) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_eight_peers_with_diloco_learn_what_lone_peers_cannot(seed: int) -> None:
    swarm = diloco(seed, peers=8, inner_steps=20, rounds=30, outer_lr=0.7, momentum=0.6)
    lone = np.mean([accuracy(trained(Shard(seed, bytes([i]) * 32, 0, i, 8), 600)) for i in range(8)])
    assert swarm >= 0.95
    assert swarm >= lone + 0.1


def stream(task: Digits, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from task.batches(shard)
        shard = attrs.evolve(shard, epoch=shard.epoch + 1)


def train(task: Digits, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[object], n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()  # type: ignore[arg-type, no-untyped-call]
        optimizer.step()


def trained(shard: Shard, steps: int) -> nn.Module:
    torch.manual_seed(shard.seed)
    task = Digits()
    model = task.model()
    train(task, model, task.optimizer(model), stream(task, shard), steps)
    return model


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return Digits().evaluate(model)["accuracy"]


def diloco(seed: int, *, peers: int, inner_steps: int, rounds: int, outer_lr: float, momentum: float) -> float:
    """DiLoCo (arXiv 2311.08105) in a plain loop; accuracy of the shared model."""
    torch.manual_seed(seed)
    task = Digits()
    models = [task.model() for _ in range(peers)]
    optimizers = [task.optimizer(model) for model in models]
    batches = [stream(task, Shard(seed, bytes([i]) * 32, 0, i, peers)) for i in range(peers)]
    layout = Layout.of(models[0])
    theta = flatten_model(layout, models[0])
    velocity = torch.zeros_like(theta)
    for _ in range(rounds):
        deltas = []
        for model, optimizer, data in zip(models, optimizers, batches, strict=True):
            unflatten_into(layout, theta, model)
            train(task, model, optimizer, data, inner_steps)
            deltas.append(exact.sub(theta, flatten_model(layout, model)))
        mean = exact.weighted_mean(deltas, [1.0] * peers)
        velocity = exact.add(exact.scale(velocity, momentum), mean)
        theta = exact.sub(theta, exact.scale(exact.add(mean, exact.scale(velocity, momentum)), outer_lr))
    unflatten_into(layout, theta, models[0])
    return accuracy(models[0])
