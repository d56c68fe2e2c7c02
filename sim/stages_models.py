"""Small chains of stages to lose parts of: a regression onto a teacher, and a byte-level GPT on Python's own source."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..learning.tasks.stdlib import Block, corpus, rotary, windows_of

STAGES = 6
#: The order of half of the micro-batches in CheckFree+: S2, S1, ..., S_s, S_{s-1}.
SWAPPED = (1, 0, *range(2, STAGES - 2), STAGES - 1, STAGES - 2)


class Pipeline(nn.Module):
    """``enter``, the stages, ``leave``. The two ends are never lost: CheckFree+ has exact copies on the neighbours."""

    def __init__(self, enter: nn.Module, stages: Sequence[nn.Module], leave: nn.Module) -> None:
        super().__init__()
        self.enter, self.stages, self.leave = enter, nn.ModuleList(stages), leave

    def forward(self, x: Tensor, order: Sequence[int] = range(STAGES)) -> Tensor:
        x = self.enter(x)
        for index in order:
            x = self.stages[index](x)
        result: Tensor = self.leave(x)
        return result


class Problem(abc.ABC):
    """What is trained, and on what. ``rate``: of Adam, constant; ``looks``: iterations from one look to the next.
    ``milliseconds``: of an iteration, about, for estimates of how long a sweep takes."""

    iterations: ClassVar[int]
    batch: ClassVar[int]
    rate: ClassVar[float]
    looks: ClassVar[int]
    what: ClassVar[str]
    milliseconds: ClassVar[float]

    def pipeline(self, seed: int) -> Pipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            enter, leave = self.ends()
            return Pipeline(enter, [self.stage() for _ in range(STAGES)], leave)

    def fresh(self, seed: int) -> nn.Module:
        """A stage that knows nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.stage()

    @abc.abstractmethod
    def ends(self) -> tuple[nn.Module, nn.Module]: ...

    @abc.abstractmethod
    def stage(self) -> nn.Module:
        """A residual stage as it is at the very beginning, from torch's global generator."""

    @abc.abstractmethod
    def silence_(self, stage: nn.Module) -> None:
        """Make the stage hand on what it gets: its branches end in zeros, from which they can learn."""

    @abc.abstractmethod
    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless inputs and targets, the same for the same seed."""

    @abc.abstractmethod
    def held_out(self, seed: int) -> tuple[Tensor, Tensor]: ...

    @abc.abstractmethod
    def loss(self, found: Tensor, expected: Tensor) -> Tensor:
        """The mean over the samples."""


class Residual(nn.Module):
    """x + down(GELU(up(LayerNorm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + branch


class Teacher(Problem):
    """Outputs of another such chain, fresh, on normally distributed inputs."""

    width: ClassVar[int] = 32
    iterations: ClassVar[int] = 600
    batch: ClassVar[int] = 64
    rate: ClassVar[float] = 1e-3
    looks: ClassVar[int] = 10
    what: ClassVar[str] = "mean squared error to a teacher"
    milliseconds: ClassVar[float] = 3.5

    def ends(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()

    def stage(self) -> nn.Module:
        return Residual(self.width)

    def silence_(self, stage: nn.Module) -> None:
        assert isinstance(stage, Residual)
        nn.init.zeros_(stage.down.weight)
        nn.init.zeros_(stage.down.bias)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield self._samples(seed, self.batch, generator)

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        return self._samples(seed, 512, torch.Generator().manual_seed(2000 + seed))

    def loss(self, found: Tensor, expected: Tensor) -> Tensor:
        return F.mse_loss(found, expected)

    def _samples(self, seed: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.width, generator=generator)
        with torch.no_grad():
            return x, self._teacher(seed)(x)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - the problems are two, and stay
    def _teacher(self, seed: int) -> Pipeline:
        return self.pipeline(3000 + seed)


class Enter(nn.Module):
    """Bytes to vectors; each sees the three before it, as in the built-in task."""

    reach: ClassVar[int] = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.mix = nn.Linear(self.reach * width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        time = x.shape[1]
        padded = F.pad(x, (0, 0, self.reach - 1, 0))
        mixed: Tensor = self.mix(torch.cat([padded[:, i : i + time] for i in range(self.reach)], dim=-1))
        return x + mixed


class Layer(nn.Module):
    """A block of the built-in GPT as a stage."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = Block(width, heads)
        # The built-in task's begin at zero; here a stage that is drawn anew must differ from one that is silent.
        self.block.out.reset_parameters()
        self.block.down.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x, *_angles(x.shape[1], self.block.size))
        return result


@functools.cache
def _angles(time: int, size: int) -> tuple[Tensor, Tensor]:
    return rotary(time, size, torch.device("cpu"))


class ByteGpt(Problem):
    """A transformer of six blocks on the source text of Python's standard library; nats per byte."""

    width: ClassVar[int] = 48
    heads: ClassVar[int] = 3
    context: ClassVar[int] = 64
    iterations: ClassVar[int] = 300
    batch: ClassVar[int] = 4
    rate: ClassVar[float] = 2e-3
    looks: ClassVar[int] = 10
    what: ClassVar[str] = "nats per byte of Python's source"
    milliseconds: ClassVar[float] = 18.0

    def ends(self) -> tuple[nn.Module, nn.Module]:
        return Enter(self.width), nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, 256, bias=False))

    def stage(self) -> nn.Module:
        return Layer(self.width, self.heads)

    def silence_(self, stage: nn.Module) -> None:
        assert isinstance(stage, Layer)
        stage.block.silence_()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        text, draw = _text(), np.random.default_rng([seed, 1])
        reach = np.arange(self.context + 1)
        while True:
            starts = draw.integers(0, len(text) - self.context - 1, size=self.batch)
            yield self._split(torch.from_numpy(text[starts[:, None] + reach].astype(np.int64)))

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        return self._split(torch.from_numpy(windows_of(corpus().held_out, self.context).astype(np.int64))[::8])

    def loss(self, found: Tensor, expected: Tensor) -> Tensor:
        return F.cross_entropy(found.flatten(0, 1), expected.flatten())

    @staticmethod
    def _split(windows: Tensor) -> tuple[Tensor, Tensor]:
        return windows[:, :-1], windows[:, 1:]


@functools.cache
def _text() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.concatenate(corpus().train)


PROBLEMS: Mapping[str, Problem] = {"teacher": Teacher(), "gpt": ByteGpt()}
