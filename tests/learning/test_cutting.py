"""Stages compute what the whole model does, and batches travel: exactly, or with a reason why not."""

from __future__ import annotations

import itertools
import json
import math
from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.learning.pipeline import defaults
from shoal.learning.pipeline.cargo import pack_batch, pack_tensor, size_fault, unpack_batch, unpack_tensor
from shoal.learning.pipeline.cutting import (
    cut_sequential,
    input_of,
    loss_of,
    split_batch,
    stages_of,
    whole_names,
)
from shoal.learning.pipeline.messages import Shape
from shoal.learning.shard import Shard
from shoal.learning.task import Task, resolve, state_tensors
from shoal.transport.errors import ConfigError, DecodeError

CUTS = [("stdlib-small", 2), ("stdlib-small", 3), ("stdlib-small", 4), ("digits", 2), ("digits", 3)]
cuts = pytest.mark.parametrize(("name", "n"), CUTS)


def built(task: Task, n: int) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(7)
    whole = task.model()
    torch.manual_seed(7)
    return whole, stages_of(task, n)


def batch_of(task: Task) -> Any:
    return next(task.batches(Shard(3, b"\1" * 32, 0, 0, 1)))


# --- the cut ----------------------------------------------------------------------------------------------------------


@cuts
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_loss_and_gradients_through_stages_are_the_whole_models(name: str, n: int, micro: int) -> None:
    """In micro-batches: their sums over samples, divided by all samples in the end."""
    task = resolve(name, allow_import=False)
    whole, stages = built(task, n)
    batch = batch_of(task)
    expected = task.loss(whole, batch)
    expected.backward()  # type: ignore[no-untyped-call]
    count, total = 0, 0.0
    for part in split_batch(batch, micro):
        samples = task.batch_size(part)
        passed: list[tuple[Tensor, Tensor]] = []
        given = input_of(task, part)
        for stage in stages[:-1]:
            leaf = given.detach().requires_grad_(given.is_floating_point() and bool(passed))
            output = stage(leaf)
            passed.append((leaf, output))
            given = output
        leaf = given.detach().requires_grad_()
        loss = loss_of(task, part, stages[-1](leaf)) * samples
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = leaf.grad
        for leaf, output in reversed(passed):
            torch.autograd.backward(output, gradient)
            gradient = leaf.grad
        count, total = count + samples, total + float(loss.detach())
    assert count == task.batch_size(batch)
    assert total / count == pytest.approx(float(expected.detach()), abs=1e-5)
    ours = [p.grad for stage in stages for p in stage.parameters()]
    theirs = [p.grad for p in whole.parameters()]
    assert len(ours) == len(theirs)
    names = whole_names(task, n)
    by_name = dict(whole.named_parameters())
    for stage, known in zip(stages, names, strict=True):
        for own, parameter in stage.named_parameters():
            want, got = by_name[known[own]].grad, parameter.grad
            assert want is not None and got is not None
            torch.testing.assert_close(got / count, want, atol=1e-5, rtol=1e-5)


@cuts
def test_stages_are_the_model_of_the_same_random_numbers_to_the_bit(name: str, n: int) -> None:
    task = resolve(name, allow_import=False)
    whole, stages = built(task, n)
    tensors = dict(state_tensors(whole))
    for stage, names in zip(stages, whole_names(task, n), strict=True):
        for own, tensor in state_tensors(stage):
            assert torch.equal(tensor, tensors.pop(names[own]))
    assert not tensors
    given = input_of(task, batch_of(task))
    assert torch.equal(nn.Sequential(*stages)(given), whole(given))


def test_names_in_the_whole_model_follow_its_order() -> None:
    assert whole_names(resolve("digits", allow_import=False), 3) == [
        {"0.weight": "0.weight", "0.bias": "0.bias"},
        {"0.weight": "2.weight", "0.bias": "2.bias"},
        {"0.weight": "4.weight", "0.bias": "4.bias"},
    ]
    stdlib = whole_names(resolve("stdlib-small", allow_import=False), 4)
    assert [sorted({own.split(".")[0] for own in names.values()}) for names in stdlib] == [
        ["embed", "mix"],
        ["blocks"],
        ["blocks"],
        ["head", "norm"],
    ]


def test_stages_with_parameters_that_the_model_has_not_are_named() -> None:
    task = Toy(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"0\.weight of stage 0 is no tensor of the whole model"):
        whole_names(Toy(task.net, [nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(3, 2))]), 2)
    with pytest.raises(ConfigError, match=r"no stage holds 1\.weight, 1\.bias"):
        whole_names(Toy(task.net, [nn.Sequential(task.net[0])]), 1)


class Toy(Task):
    """``net`` is the model; ``cut``: what stages returns."""

    name = "toy"

    def __init__(self, net: nn.Module, cut: list[nn.Module] | None = None) -> None:
        self.net, self.cut = net, cut

    def model(self) -> nn.Module:
        return self.net

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError

    def batches(self, shard: Shard) -> Any:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(batch).sum()
        return found

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise NotImplementedError

    def stages(self, n: int) -> list[nn.Module]:
        return super().stages(n) if self.cut is None else self.cut


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers of so many parameters; an activation for 0."""
    return nn.Sequential(*(nn.Linear(size, 1, bias=False) if size else nn.ReLU() for size in sizes))


def sizes_of(pieces: list[nn.Module]) -> list[int]:
    return [sum(p.numel() for p in piece.parameters()) for piece in pieces]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_no_other_cut_has_a_smaller_largest_piece(sizes: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(sizes)))
    pieces = cut_sequential(layers(*sizes), n)
    assert len(pieces) == n
    assert list(itertools.chain(*([p.numel() for p in piece.parameters()] for piece in pieces))) == sizes
    best = min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *places, len(sizes))))
        for places in itertools.combinations(range(1, len(sizes)), n - 1)
    )
    assert max(sizes_of(pieces)) == best


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [
        ((0, 3), 1, [[0, 3]]),
        ((0, 3, 4), 2, [[0, 3], [4]]),
        ((0, 0, 3, 4, 5), 3, [[0, 0, 3], [4], [5]]),
        ((0, 3, 0, 4, 0), 2, [[0, 3, 0], [4, 0]]),
        ((3, 0, 0, 4), 2, [[3, 0, 0], [4]]),
    ],
)
def test_layers_without_parameters_stay_with_those_that_have_them(
    sizes: tuple[int, ...], n: int, expected: list[list[int]]
) -> None:
    model = layers(*sizes)
    pieces = cut_sequential(model, n)
    assert [[sum(p.numel() for p in layer.parameters()) for layer in piece.children()] for piece in pieces] == expected
    assert [id(layer) for piece in pieces for layer in piece.children()] == [id(layer) for layer in model]


def test_it_is_said_why_a_task_cannot_be_cut_so() -> None:
    with pytest.raises(ValueError, match="2 layers with parameters"):
        cut_sequential(layers(0, 3, 0, 4), 3)
    with pytest.raises(ConfigError, match="task toy cannot be cut into 3 stages: its model has 2 layers"):
        stages_of(Toy(layers(0, 3, 0, 4)), 3)
    with pytest.raises(ConfigError, match="its model is a Linear, no nn.Sequential: override stages"):
        stages_of(Toy(nn.Linear(2, 2)), 2)
    with pytest.raises(ConfigError, match=r"stages\(3\) returned 1 modules"):
        stages_of(Toy(layers(1), [layers(1)]), 3)
    with pytest.raises(ConfigError, match="stage 1 of 2 has no parameters: ask for fewer stages"):
        stages_of(Toy(layers(1), [layers(1), nn.ReLU()]), 2)
    tied = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="stages 0 and 1 share a parameter"):
        stages_of(Toy(nn.Sequential(tied, nn.ReLU(), tied)), 2)
    with pytest.raises(ConfigError, match="cannot be cut into 5 stages: from 2 to 4"):
        stages_of(resolve("stdlib-small", allow_import=False), 5)


class Odd(Toy):
    def __init__(self, loss: Any) -> None:
        super().__init__(layers(1))
        self._loss = loss

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = self._loss(model, batch)
        return found


def test_losses_that_a_model_in_stages_cannot_have_are_refused() -> None:
    batch = torch.ones(2, 1)
    for call in (lambda m, b: m(b, b), lambda m, b: m([b]), lambda m, b: m(x=b)):
        with pytest.raises(ConfigError, match="something else than one tensor"):
            input_of(Odd(call), batch)
    with pytest.raises(ConfigError, match="does not call the model"):
        input_of(Odd(lambda m, b: b.sum()), batch)
    with pytest.raises(ConfigError, match="more than once"):
        loss_of(Odd(lambda m, b: m(b).sum() + m(b).sum()), batch, batch)


# --- micro-batches ----------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@given(st.integers(1, 40), st.integers(1, 12))
def test_micro_batches_are_the_batch_in_order_and_differ_by_one_sample_at_most(length: int, parts: int) -> None:
    x = torch.arange(length)
    batch = {"pair": Pair(x, x * 2), "list": [x, (x.reshape(-1, 1), "word")]}
    pieces = split_batch(batch, parts)
    assert len(pieces) == min(length, parts)
    lengths = [len(piece["pair"].x) for piece in pieces]
    assert max(lengths) - min(lengths) <= 1
    assert torch.equal(torch.cat([piece["pair"].y for piece in pieces]), x * 2)
    assert torch.equal(torch.cat([piece["list"][1][0] for piece in pieces]), x.reshape(-1, 1))
    assert all(type(piece["pair"]) is Pair and piece["list"][1][1] == "word" for piece in pieces)


@pytest.mark.parametrize("batch", [(torch.ones(2), torch.ones(3)), [torch.ones(())], [], "text", torch.ones(0, 2)])
def test_a_batch_without_one_length_cannot_be_split(batch: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be cut into micro-batches"):
        split_batch(batch, 2)


# --- on the way -------------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
tensors = st.builds(
    lambda dtype, dims, seed: (
        (torch.randn(dims, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)
    ),
    st.sampled_from(FLOATS + WHOLE),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 99),
)  # fmt: skip
batches = st.recursive(
    tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


@given(batches)
def test_nested_batches_arrive_as_they_were(batch: Any) -> None:
    found, nest = pack_batch(batch, None)
    sent = [pack_tensor(tensor, "int8" if not tensor.is_floating_point() else "fp32") for tensor in found]
    assert all(size_fault(shape) is None for shape, _ in sent)
    assert same(unpack_batch([unpack_tensor(shape, bytearray(data)) for shape, data in sent], nest), batch)


def test_of_what_the_model_was_called_with_only_the_shape_travels() -> None:
    x, y = torch.randn(3, 4), torch.arange(3)
    found, nest = pack_batch({"x": x, "y": [y, x.clone()]}, x)
    assert len(found) == 2
    back = unpack_batch(found, nest)
    assert torch.equal(back["x"], torch.zeros(3, 4))
    assert back["x"].dtype == torch.float32
    assert torch.equal(back["y"][1], x)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("dims", [(), (0, 3), (5,), (2, 3, 7)])
def test_activations_travel_in_a_codec(codec: str, dims: tuple[int, ...]) -> None:
    tensor = torch.randn(dims, generator=torch.Generator().manual_seed(1))
    shape, data = pack_tensor(tensor, codec)
    assert len(data) == shape.size
    back = unpack_tensor(shape, bytearray(data))
    assert back.shape == tensor.shape
    torch.testing.assert_close(back, tensor, atol={"fp32": 0, "int8": 0.03}.get(codec, 1e-3), rtol=1e-2)


def test_what_cannot_travel_is_said() -> None:
    with pytest.raises(ConfigError, match="dtype complex64 cannot travel"):
        pack_tensor(torch.zeros(1, dtype=torch.complex64))
    x = torch.zeros(1, dtype=torch.complex64)
    with pytest.raises(ConfigError, match="dtype complex64"):
        pack_batch([x], x)
    one = torch.ones(1)
    for batch in ({1: one}, [one, None], [one, 3], Pair(one, one)):
        with pytest.raises(ConfigError, match="cannot travel between stages"):
            pack_batch(batch, None)
    deep: Any = one
    for _ in range(defaults.MAX_DEPTH):
        deep = [deep]
    found, nest = pack_batch(deep, None)
    assert same(unpack_batch(found, nest), deep)
    with pytest.raises(ConfigError, match="nested deeper"):
        pack_batch([deep], None)
    with pytest.raises(ConfigError, match="a batch of 16 tensors"):
        pack_batch([torch.ones(1) for _ in range(defaults.MAX_TENSORS)], None)
    with pytest.raises(ConfigError, match="cannot travel"):
        pack_batch({"x" * defaults.MAX_NEST: one}, None)


BIG = defaults.MAX_ELEMENTS


@pytest.mark.parametrize(
    "nest",
    [
        "", "nonsense", "1.0", "-1", "2", "true", "null", '"0"', "NaN", "9" * 4000, "[" * 4000, "[" * 5000,
        "{}", '{"tuple":0}', '{"tuple":[0],"more":1}', '{"list":[0]}', '{"dict":[["a"]]}', '{"dict":[[1,0]]}',
        '{"dict":{"a":0}}', '{"dict":[["a",0]],"tuple":[]}', '{"gone":[1]}', '{"gone":[1],"as":"complex64"}',
        '{"gone":[true],"as":"int64"}', '{"gone":[-1],"as":"int64"}', '{"gone":[1.5],"as":"int64"}',
        '{"gone":[1],"as":"int64","x":0}', '{"gone":[1,1,1,1,1,1,1,1,1],"as":"int64"}',
        f'{{"gone":[{BIG + 1}],"as":"int64"}}', f'{{"gone":[{BIG},{BIG},{BIG}],"as":"int64"}}',
        f'{{"gone":[0,{BIG},{BIG},{BIG}],"as":"int64"}}', "[[[[[[[[[0]]]]]]]]]",
    ],
)  # fmt: skip
def test_nestings_that_describe_no_batch_are_refused(nest: str) -> None:
    with pytest.raises(DecodeError):
        unpack_batch([torch.ones(1), torch.ones(1)], nest)


hostile = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["float32", "int64", BIG, BIG - 1, 0, 1]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["tuple", "dict", "gone", "as", "x"]), inner, max_size=3)
    | st.builds(lambda dims, kind: {"gone": dims, "as": kind}, st.lists(inner, max_size=9), st.just("int8") | inner),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300)
@given(hostile)
def test_whatever_is_nested_only_a_decode_error_comes_of_it(value: Any) -> None:
    try:
        unpack_batch([torch.ones(2)], json.dumps(value))
    except DecodeError:
        pass


@given(st.text(max_size=40))
def test_whatever_text_comes_only_a_decode_error_comes_of_it(nest: str) -> None:
    try:
        unpack_batch([torch.ones(2)], nest)
    except DecodeError:
        pass


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (Shape((2,), "complex64", "", 16), bytes(16)),
        (Shape((2,), "object", "", 16), bytes(16)),
        (Shape((2,), "float32", "", 7), bytes(7)),
        (Shape((2,), "float32", "", 8), bytes(7)),
        (Shape((2,), "float32", "zip", 8), bytes(8)),
        (Shape((2,), "int64", "bf16", 4), bytes(4)),
        (Shape((2,), "float32", "bf16", 8), bytes(8)),
        (Shape((3,), "bool", "", 3), b"\0\1\2"),
        (Shape((0,), "float32", "", 4), bytes(4)),
        (Shape((4,), "float32", "int8", 8), b"\xff" * 8),
    ],
)
def test_tensors_that_cannot_be_are_refused(shape: Shape, data: bytes) -> None:
    with pytest.raises(DecodeError):
        unpack_tensor(shape, bytearray(data))


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from(["float32", "float16", "bool", "int8", "str"]),
    st.sampled_from(["", "fp32", "bf16", "int8", "e3m0", "top", "topk:0.01", "top1/0", "sign"])
    | st.text(max_size=12).filter(str.isprintable),
    st.binary(max_size=40),
)
def test_whatever_bytes_come_as_a_tensor_only_a_decode_error_comes_of_it(
    dims: list[int], dtype: str, codec: str, data: bytes
) -> None:
    shape = Shape(tuple(dims), dtype, codec, len(data))
    try:
        found = unpack_tensor(shape, bytearray(data))
    except DecodeError:
        return
    assert found.shape == tuple(dims)
    assert found.numel() == math.prod(dims)
