"""``digits-finetune``: the model of ``digits``, pre-trained on other scans of the same digits, to be adapted.

The scans that it was trained on are grey: half the contrast, brighter paper. It reads them well, and the run's own
images less so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..shard import frozen_random
from .digits import Digits, load

#: What the pre-training saw of an image x in -1..1: CONTRAST x + PAPER.
CONTRAST, PAPER = 0.5, 0.8
#: Its steps, of 64 images: some seconds of CPU.
STEPS = 600


@functools.cache
def pretrained() -> Mapping[str, Tensor]:
    """The state of the pre-trained model: always the same on one machine, and nearly so on all."""
    data, task, order = load(), Digits(), frozen_random(0, "digits pre-training")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.model()
    optimizer = task.optimizer(model)
    with torch.enable_grad():
        for _ in range(STEPS):
            piece = torch.from_numpy(order.randint(len(data.train_x), size=64))
            loss = task.loss(model, (CONTRAST * data.train_x[piece] + PAPER, data.train_y[piece]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


class DigitsFinetune(Digits):
    """Ten classes; metric: accuracy on the held-out images, which is 0.85 before any step."""

    name: ClassVar[str] = "digits-finetune"
    recommended: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "spsa": {"grads": 8, "lr": 0.02},
        "diloco": {"inner_steps": 5, "outer_lr": 0.7, "momentum": 0.0},
    }
    batch: ClassVar[int] = 256

    def model(self) -> nn.Module:
        model = super().model()
        model.load_state_dict(pretrained())
        return model
