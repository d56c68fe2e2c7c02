"""Models that are trained already, and data that they were not trained on.

``digits-finetune``: the model of ``digits``, pre-trained on other scans of the same digits. Those are grey: half the
contrast, brighter paper. It reads them well, and the run's own images less so. ``stdlib-finetune``: a model of Python's
source text on C++ headers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...transport.errors import ConfigError
from ..shard import frozen_random
from .digits import Digits, load
from .stdlib import HELD_OUT, Corpus, StdlibSmall, corpus_of

#: What the pre-training saw of an image x in -1..1: CONTRAST x + PAPER.
CONTRAST, PAPER = 0.5, 0.8
#: Its steps, of 64 images: some seconds of CPU.
STEPS = 600


@functools.cache
def headers() -> Corpus:
    """C++ headers that come with torch: as different from Python's source as text on every machine can be."""
    root = Path(torch.__file__).parent / "include" / "c10"
    files = sorted(root.rglob("*.h"), key=lambda path: path.relative_to(root).as_posix())
    if len(files) < 2 * HELD_OUT:
        raise ConfigError(f"torch's headers at {root} are not there to train on; use another task")
    return corpus_of(files)


class StdlibFinetune(StdlibSmall):
    """The model of ``stdlib-small`` on another language. Found its run with the export of one: ``--from FILE``."""

    name: ClassVar[str] = "stdlib-finetune"
    batch: ClassVar[int] = 16
    recommended: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "spsa": {"grads": 16, "lr": 0.04},
        "diloco": {"inner_steps": 10, "outer_lr": 1.0, "momentum": 0.0},
    }

    def corpus(self) -> Corpus:
        return headers()


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
