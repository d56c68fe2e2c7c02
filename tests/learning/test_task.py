"""Finding a task by name, and comparing models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.learning.shard import Shard
from shoal.learning.task import (
    BUILTIN,
    Batch,
    ParameterSpec,
    Task,
    compare_signatures,
    metric_name,
    resolve,
    score,
    signature,
    source_hash,
    state_tensors,
    title,
)
from shoal.transport.errors import ConfigError


class Line(Task):
    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def batches(self, shard: Shard) -> Iterator[Batch]:
        yield torch.zeros(4, 2)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = model(batch).square().mean()
        return value

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"error": 1.0}


MODULE = """
from shoal.learning.task import Task
import torch

class Good(Task):
    def model(self): return torch.nn.Linear(1, 1)
    def optimizer(self, model): return torch.optim.SGD(model.parameters(), lr=0.1)
    def batches(self, shard): return iter(())
    def loss(self, model, batch): return model(batch).mean()
    def evaluate(self, model): return {"loss": 0.0}

class Partial(Task):
    def model(self): return torch.nn.Linear(1, 1)

class Stranger:
    pass

thing = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "resolve_sample.py").write_text(MODULE)
    (tmp_path / "resolve_broken.py").write_text("def f(:\n")
    (tmp_path / "resolve_needy.py").write_text("import surely_not_installed_anywhere\n")
    return tmp_path


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_built_in_name_resolves_to_a_whole_task(name: str) -> None:
    task = resolve(name, allow_import=False)
    assert title(task) == name
    assert task.metric
    assert signature(task.model())


def test_an_unknown_name_is_refused_with_the_list_of_names() -> None:
    with pytest.raises(
        ConfigError, match="unknown task 'mnist': built-in tasks are digits, digits-finetune, stdlib"
    ) as e:
        resolve("mnist", allow_import=True)
    assert "module:Class" in str(e.value)


def test_the_network_never_names_code(folder: Path) -> None:
    with pytest.raises(ConfigError, match="never taken from the network.*--task resolve_sample:Good"):
        resolve("resolve_sample:Good", allow_import=False)
    assert "resolve_sample" not in sys.modules


def test_a_class_of_the_current_folder_resolves_when_the_user_names_it(folder: Path) -> None:
    task = resolve("resolve_sample:Good", allow_import=True)
    assert title(task) == "Good"
    assert len(source_hash(task)) == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resolve_absent:Good", "no module 'resolve_absent' here"),
        ("resolve_absent.sub:Good", "no module 'resolve_absent' here"),
        ("resolve_sample:Bad", "module resolve_sample has no class 'Bad'"),
        ("resolve_sample:thing", "thing is not a subclass"),
        ("resolve_sample:Stranger", "Stranger is not a subclass"),
        ("resolve_sample:Partial", "Partial lacks batches, evaluate, loss, optimizer"),
        ("resolve_broken:Good", r"resolve_broken.py:1: "),
        ("resolve_needy:Good", "needs 'surely_not_installed_anywhere'"),
        ("../evil:Good", "is not a module name"),
        (":Good", "is not a module name"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named_with_the_reason(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve(name, allow_import=True)
    assert name in str(error.value)


def test_batch_size_is_the_length_of_the_first_tensor_wherever_it_stands() -> None:
    task = Line()
    assert task.batch_size(torch.zeros(3, 2)) == 3
    assert task.batch_size(({"x": ["text", torch.zeros(5)]}, torch.zeros(7))) == 5
    with pytest.raises(ConfigError, match="override batch_size"):
        task.batch_size(["no", "tensor"])


def test_the_main_metric_is_the_declared_one_or_the_first() -> None:
    task = Line()
    assert metric_name(task, {"error": 1.0, "other": 2.0}) == "error"
    assert score(task, {"error": 1.0, "other": 2.0}) == 1.0
    digits = resolve("digits", allow_import=False)
    with pytest.raises(ConfigError, match="not the metric 'accuracy'"):
        score(digits, {"loss": 1.0})


def test_a_signature_lists_parameters_then_persistent_buffers_and_tied_ones_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    assert [spec.name for spec in signature(Net())] == [
        "a.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert signature(Net())[-1] == ParameterSpec("norm.num_batches_tracked", (), "int64")


def test_state_tensors_are_the_models_own_memory() -> None:
    model = nn.Linear(2, 1)
    dict(state_tensors(model))["bias"].fill_(5)
    assert float(model.bias.detach()[0]) == 5


def test_models_that_differ_are_told_apart_by_parameter_name_and_shape() -> None:
    ours = signature(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    assert compare_signatures(ours, signature(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))) is None
    message = compare_signatures(ours, signature(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2, bias=False))))
    assert message is not None
    assert "1.bias 2 float32 here, missing in the run" in message
    assert "0.weight is 8x4 float32 here, 9x4 float32 in the run" in message
    assert "1.weight is 2x8 float32 here, 2x9 float32 in the run" in message


def test_many_differences_are_counted_and_an_order_is_a_difference() -> None:
    wide = signature(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))))
    message = compare_signatures(wide, wide[:1])
    assert message is not None
    assert message.endswith("and 7 more")
    assert "another order" in str(compare_signatures(wide, wide[::-1]))


def test_a_source_hash_follows_the_source() -> None:
    class Other(Line):
        pass

    assert source_hash(Line()) == source_hash(Line())
    assert source_hash(Line()) != source_hash(Other())
