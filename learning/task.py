"""What a run trains: the five hooks of a task, how a task is found by name, and how two models are compared."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ..transport.errors import ConfigError
from . import defaults
from .shard import Shard
from .spec import ParameterSpec
from .tasks import BUILTIN as BUILTIN
from .tasks import check_name

#: What ``batches`` yields and ``loss`` takes: a tensor, or tuples, lists and dicts of them, nested as the task likes.
Batch: TypeAlias = Any


class Task(ABC):
    """A model and the data it learns from. Subclass it, name it on the command line: ``shoal start my_task:Digits``.

    The constructor takes no arguments and is cheap; data is loaded by the hooks on first use. Hooks run in a worker
    thread, never two at a time for one task object.
    """

    #: Name in reports; the class' name when empty.
    name: ClassVar[str] = ""
    #: Which of ``evaluate``'s values counts; the first one when empty.
    metric: ClassVar[str] = ""
    #: Whether a greater metric is better.
    higher_is_better: ClassVar[bool] = True
    #: Modelled compute of one training step in virtual time, seconds.
    step_seconds: ClassVar[float] = defaults.STEP_SECONDS
    #: Parameters that suit this task, by strategy; what the founder sets on the command line goes before.
    recommended: ClassVar[Mapping[str, Mapping[str, float]]] = {}

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model on the CPU. Its initial values need not agree between peers: the founder's are the run's."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of this peer's own (inner) steps. Its state is never shared."""

    @abstractmethod
    def batches(self, shard: Shard) -> Iterator[Batch]:
        """This peer's part of the data. Finite (one epoch; asked again with ``shard.epoch`` one higher) or endless."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to descend, averaged over the batch; ``batch`` is on the model's device."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out quality by name. The model is in eval mode and gradients are off."""

    def stages(self, n: int) -> list[nn.Module]:
        """A new model in ``n`` parts, to be held by different peers: each takes what the one before gave, one tensor.

        Together they are :meth:`model`, built from the same random numbers in the same order. Parts that are built
        alike have the same names for their parameters. By default an ``nn.Sequential`` is cut between its layers.
        """
        from .pipeline.cutting import cut_sequential  # which knows tasks

        model = self.model()
        try:
            if isinstance(model, nn.Sequential):
                return cut_sequential(model, n)
            why = f"its model is a {type(model).__name__}, no nn.Sequential: override stages()"
        except ValueError as error:
            why = f"its model has {error}"
        raise ConfigError(f"task {title(self)} cannot be cut into {n} stages: {why}")

    def silence(self, stage: nn.Module) -> None:
        """Make ``stage``, one of :meth:`stages`, hand on what it gets, in such a way that it can learn from there.

        What ``--recovery skip`` puts in the place of a lost stage. A residual stage does it with zeros where its
        branches end. Raises :class:`ConfigError` for a stage that cannot.
        """
        raise ConfigError(f"task {title(self)} has no stage that can be skipped: override silence()")

    def batch_size(self, batch: Batch) -> int:
        """Samples in ``batch``: by default the length of the first tensor found in it. The weight in a mean."""
        first = _first_tensor(batch)
        if first is None or first.dim() == 0:
            raise ConfigError(f"task {title(self)}: cannot tell how many samples a batch holds; override batch_size()")
        return int(first.shape[0])


def title(task: Task) -> str:
    """The task's name in reports."""
    return task.name or type(task).__name__


def score(task: Task, values: Mapping[str, float]) -> float:
    """The value of the task's main metric among ``evaluate``'s. Raises :class:`ConfigError` when it is not there."""
    name = metric_name(task, values)
    if name not in values:
        raise ConfigError(f"task {title(task)}: evaluate() returned {sorted(values)}, not the metric {name!r}")
    return float(values[name])


def metric_name(task: Task, values: Mapping[str, float]) -> str:
    """The name of the task's main metric: the declared one, else the first of ``values``."""
    return task.metric or next(iter(values), "")


def _first_tensor(batch: Batch) -> Tensor | None:
    match batch:
        case Tensor():
            return batch
        case dict():
            return next((t for t in map(_first_tensor, batch.values()) if t is not None), None)
        case tuple() | list():
            return next((t for t in map(_first_tensor, batch) if t is not None), None)
        case _:
            return None


# --- finding a task ---------------------------------------------------------------------------------------------------


def resolve(name: str, *, allow_import: bool) -> Task:
    """The task called ``name``: a built-in, or ``module:Class`` if ``allow_import``.

    ``allow_import`` is True only for what the user typed on this machine (the current folder is importable then), never
    for a name that came over the network. Raises :class:`ConfigError` that says what is wrong with ``name``. What the
    user's module or constructor raises by itself passes through.
    """
    if ":" not in name:
        check_name(name)
        module_name, class_name = BUILTIN[name]
        built_in: type[Task] = getattr(importlib.import_module(module_name, __package__), class_name)
        return built_in()
    if not allow_import:
        raise ConfigError(
            f"the run names the task {name!r}, which is code; code is never taken from the network. "
            f"If you have it and trust it, say so: --task {name}"
        )
    module_name, _, class_name = name.partition(":")
    found = getattr(_import(name, module_name), class_name, None)
    if found is None:
        raise ConfigError(f"task {name!r}: module {module_name} has no class {class_name!r}")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task {name!r}: {class_name} is not a subclass of shoal.Task")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"task {name!r}: {class_name} lacks {', '.join(missing)}")
    return found()


def _import(name: str, module_name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not module_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"task {name!r}: {module_name!r} is not a module name; expected module:Class")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"task {name!r}: no module {error.name!r} here ({folder}) or installed") from None
        raise ConfigError(f"task {name!r}: importing {module_name} needs {error.name!r}, which is not here") from error
    except SyntaxError as error:
        raise ConfigError(f"task {name!r}: {error.filename}:{error.lineno}: {error.msg}") from error


def source_hash(task: Task) -> bytes:
    """32 bytes over the source text of the task's class; of its qualified name where there is no source (a prompt)."""
    kind = type(task)
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        text = f"{kind.__module__}:{kind.__qualname__}"
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"shoal task").digest()


# --- comparing models -------------------------------------------------------------------------------------------------


Signature: TypeAlias = tuple[ParameterSpec, ...]


def state_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Everything that makes up the model's state: parameters in ``named_parameters`` order, then persistent buffers.

    A tied parameter appears once, under its first name. Tensors are the model's own, not copies.
    """
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return [*((name, parameter.detach()) for name, parameter in model.named_parameters()), *buffers]


def signature(model: nn.Module) -> Signature:
    """Names, shapes and dtypes of :func:`state_tensors`, in that order."""
    return tuple(
        ParameterSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state_tensors(model)
    )


def compare_signatures(ours: Sequence[ParameterSpec], theirs: Sequence[ParameterSpec]) -> str | None:
    """None when equal, else a sentence that names the first differences and counts the rest."""
    if tuple(ours) == tuple(theirs):
        return None
    mine = {spec.name: spec for spec in ours}
    run = {spec.name: spec for spec in theirs}
    differences = [f"{spec} here, missing in the run" for name, spec in mine.items() if name not in run]
    differences += [f"{spec} in the run, missing here" for name, spec in run.items() if name not in mine]
    differences += [
        f"{name} is {str(spec).removeprefix(name + ' ')} here, {str(run[name]).removeprefix(name + ' ')} in the run"
        for name, spec in mine.items()
        if name in run and run[name] != spec
    ]
    if not differences:
        differences = ["the same parameters in another order"]
    shown = "; ".join(differences[: defaults.SHOWN_DIFFERENCES])
    more = len(differences) - defaults.SHOWN_DIFFERENCES
    return f"the model differs from the run's: {shown}" + (f"; and {more} more" if more > 0 else "")
