"""A task whose step takes a given time, and which writes down when each step begins. Set through the environment."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from shoal.learning.shard import Shard
from shoal.learning.task import Task

WIDTH, LAYERS = 1024, 3
#: Where the moments go (``time.monotonic()``, a line each), and milliseconds of a step.
LOG, STEP_MS = "SHOAL_BUSY_LOG", "SHOAL_BUSY_MS"


class Busy(Task):
    """Three layers of 1024: 3.1 M parameters, 12.6 MB. The batch is as large as makes a step take its time."""

    name: ClassVar[str] = "busy"

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        return nn.Sequential(*layers)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-4)

    def batches(self, shard: Shard) -> Iterator[Tensor]:
        batch = torch.randn(batch_for(float(os.environ[STEP_MS])), WIDTH)
        while True:
            yield batch

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        moments().append(time.monotonic())
        if len(moments()) >= 20:
            flush()
        return (model(batch) - batch).square().mean()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"nothing": 0.0}


@functools.cache
def moments() -> list[float]:
    return []


def flush() -> None:
    """Write down what has not been."""
    with Path(os.environ[LOG]).open("a") as file:
        file.write("".join(f"{moment!r}\n" for moment in moments()))
    moments().clear()


@functools.cache
def batch_for(step_ms: float) -> int:
    """Samples with which a step takes about ``step_ms`` on this machine when it does nothing else."""
    task, size = Busy(), 1
    model = task.model()
    optimizer = task.optimizer(model)
    while True:
        batch = torch.randn(size, WIDTH)
        took = []
        for _ in range(7):
            began = time.perf_counter()
            (model(batch) - batch).square().mean().backward()
            optimizer.step()
            took.append(time.perf_counter() - began)
        if 1e3 * min(took[2:]) >= step_ms or size >= 4096:
            return size
        size = max(size + 1, int(size * 1.3))
