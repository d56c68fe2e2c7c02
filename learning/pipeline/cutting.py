"""A task's model in stages: the cut itself, and what a stage needs of a batch without knowing the task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...transport.errors import ConfigError
from ..shard import Shard
from ..task import Batch, Task, state_tensors, title


def stages_of(task: Task, n: int) -> list[nn.Module]:
    """``task.stages(n)``, checked: ``n`` modules, each with parameters, none shared between two. Blocking.

    Raises :class:`ConfigError` that says what is wrong.
    """
    found = list(task.stages(n))
    if len(found) != n:
        raise ConfigError(f"task {title(task)}: stages({n}) returned {len(found)} modules")
    seen: dict[int, int] = {}
    for stage, module in enumerate(found):
        parameters = list(module.parameters())
        if not parameters:
            raise ConfigError(f"task {title(task)}: stage {stage} of {n} has no parameters: ask for fewer stages")
        for parameter in parameters:
            if seen.setdefault(id(parameter), stage) != stage:
                raise ConfigError(
                    f"task {title(task)}: stages {seen[id(parameter)]} and {stage} share a parameter, and each peer "
                    "would train its own copy: untie them"
                )
    return found


def cut_sequential(model: nn.Sequential, n: int) -> list[nn.Module]:
    """``n`` contiguous pieces of ``model``: the largest has as few parameters as can be. What has none (activations)
    stays with the layer before it. Raises ValueError for fewer layers with parameters."""
    groups: list[list[nn.Module]] = []
    for layer in model:
        if not groups or any(True for _ in layer.parameters()):
            groups.append([])
        groups[-1].append(layer)
    if len(groups) > 1 and not any(True for layer in groups[0] for _ in layer.parameters()):
        groups[:2] = [groups[0] + groups[1]]  # what stands before the first layer with parameters goes with it
    if len(groups) < n:
        raise ValueError(f"{len(groups)} layers with parameters")
    sizes = [sum(p.numel() for layer in group for p in layer.parameters()) for group in groups]
    bounds = _balanced(sizes, n)
    return [nn.Sequential(*itertools.chain(*groups[a:b])) for a, b in itertools.pairwise(bounds)]


def _balanced(sizes: Sequence[int], n: int) -> list[int]:
    """Where to cut ``sizes`` into ``n`` runs such that the largest sum is smallest, the last piece as short as can be:
    dynamic programming over prefixes."""
    count = len(sizes)
    total = [0, *itertools.accumulate(sizes)]
    best = [[float("inf")] * (count + 1) for _ in range(n + 1)]
    cut = [[0] * (count + 1) for _ in range(n + 1)]
    best[0][0] = 0.0
    for pieces in range(1, n + 1):
        for end in range(pieces, count + 1):
            for start in range(pieces - 1, end):
                worst = max(best[pieces - 1][start], float(total[end] - total[start]))
                if worst <= best[pieces][end]:
                    best[pieces][end], cut[pieces][end] = worst, start
    bounds = [count]
    for pieces in range(n, 0, -1):
        bounds.append(cut[pieces][bounds[-1]])
    return bounds[::-1]


class _Called(Exception):
    def __init__(self, given: object) -> None:
        super().__init__()
        self.given = given


class _Probe(nn.Module):
    """Stands for the model to see what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))  # tasks ask for the device of the first parameter

    def forward(self, *given: object, **named: object) -> Tensor:
        raise _Called(given[0] if len(given) == 1 and not named else None)


class _Answer(nn.Module):
    """Stands for the model where its output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), device=output.device))
        self.output: Tensor | None = output

    def forward(self, *given: object, **named: object) -> Tensor:
        if self.output is None:
            raise _Called(None)
        output, self.output = self.output, None
        return output


def input_of(task: Task, batch: Batch) -> Tensor:
    """What ``task.loss`` calls the model with. Raises :class:`ConfigError` where that is not one tensor."""
    try:
        task.loss(_Probe(), batch)
    except _Called as call:
        if isinstance(call.given, Tensor):
            return call.given
        raise ConfigError(
            f"task {title(task)}: loss() calls the model with something else than one tensor, which a model in stages "
            "cannot take"
        ) from None
    raise ConfigError(f"task {title(task)}: loss() does not call the model, so it cannot be trained in stages")


def loss_of(task: Task, batch: Batch, output: Tensor) -> Tensor:
    """``task.loss`` where the model's output is known. Raises :class:`ConfigError` when it calls the model twice."""
    try:
        return task.loss(_Answer(output), batch)
    except _Called:
        raise ConfigError(
            f"task {title(task)}: loss() calls the model more than once, which a model in stages cannot do"
        ) from None


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """``batch`` in ``parts`` micro-batches along the first dimension of all its tensors, whose sizes differ by one at
    most; fewer where there are fewer samples. Raises :class:`ConfigError` for tensors of unequal length."""
    tensors: list[Tensor] = []
    _walk(batch, tensors.append)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(lengths) != 1 or not min(lengths):
        raise ConfigError(
            "a batch whose tensors differ in length, or have none, cannot be cut into micro-batches: "
            f"found {sorted(lengths)}"
        )
    count = min(lengths.pop(), parts)
    pieces = {id(tensor): tensor.tensor_split(count) for tensor in tensors}
    return [_rebuilt(batch, pieces, index) for index in range(count)]


def _walk(batch: Batch, visit: Callable[[Tensor], None]) -> None:
    match batch:
        case Tensor():
            visit(batch)
        case dict():
            for value in batch.values():
                _walk(value, visit)
        case tuple() | list():
            for value in batch:
                _walk(value, visit)


def _rebuilt(batch: Batch, pieces: dict[int, tuple[Tensor, ...]], index: int) -> Batch:
    match batch:
        case Tensor():
            return pieces[id(batch)][index]
        case dict():
            return {key: _rebuilt(value, pieces, index) for key, value in batch.items()}
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(_rebuilt(value, pieces, index) for value in batch))
        case tuple() | list():
            return type(batch)(_rebuilt(value, pieces, index) for value in batch)
        case _:
            return batch


def whole_names(task: Task, n: int) -> list[dict[str, str]]:
    """For each stage the names of its tensors in the whole model, by their names in the stage. Blocking.

    Found by value: both are built from the same random numbers, and a stage's tensors stand in the whole model in the
    same order. Raises :class:`ConfigError` where the stages do not hold the model's initial values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = state_tensors(task.model())
        torch.manual_seed(0)
        cut = stages_of(task, n)
    free = dict(whole)
    names: list[dict[str, str]] = []
    for stage, module in enumerate(cut):
        found: dict[str, str] = {}
        for name, tensor in state_tensors(module):
            match = next((k for k, t in free.items() if t.shape == tensor.shape and torch.equal(t, tensor)), None)
            if match is None:
                raise ConfigError(f"task {title(task)}: {name} of stage {stage} is no tensor of the whole model")
            del free[match]
            found[name] = match
        names.append(found)
    if free:
        raise ConfigError(f"task {title(task)}: no stage holds {', '.join(free)}")
    return names


class StageTask(Task):
    """One stage of ``whole`` as a task: its model and optimiser; the data are the whole's."""

    name: ClassVar[str] = "stage"

    def __init__(self, whole: Task, stages: int, stage: int) -> None:
        self.whole, self.count, self.stage = whole, stages, stage

    def model(self) -> nn.Module:
        return stages_of(self.whole, self.count)[self.stage]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.whole.optimizer(model)

    def batches(self, shard: Shard) -> Iterator[Batch]:
        return self.whole.batches(shard)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise ConfigError("a stage alone has no loss")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise ConfigError("a stage alone cannot be evaluated")
