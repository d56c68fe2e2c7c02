"""A model's state as a flat vector, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.learning.state import (
    Layout,
    bytes_view,
    flatten,
    flatten_model,
    numpy_view,
    unflatten,
    unflatten_into,
    unite,
)
from shoal.learning.task import ParameterSpec, signature
from shoal.transport.errors import ConfigError, ProtocolMisuse


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_buffer("mask", torch.tensor([True, False]))
    return model


def test_a_state_survives_the_round_trip_bit_for_bit() -> None:
    one, two = net(1), net(2)
    one(torch.randn(8, 3))
    layout = Layout.of(one)
    vector = flatten_model(layout, one)
    assert vector.shape == (layout.size,)
    unflatten_into(layout, vector, two)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        assert value.dtype == two.state_dict()[name].dtype


def test_a_flat_state_is_a_copy() -> None:
    model = net(1)
    layout = Layout.of(model)
    out = torch.empty(layout.size)
    vector = flatten_model(layout, model, out)
    assert vector is out
    before = vector.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(vector, before)


def test_a_layout_follows_the_signature_and_encodes_injectively() -> None:
    layout = Layout.of(net(1))
    assert layout.signature == signature(net(1))
    assert Layout.of_signature(layout.signature) == layout
    other = Layout.of(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    assert other.encode() != layout.encode()


def test_an_element_is_named_by_its_parameter() -> None:
    layout = Layout.of_signature(
        (
            ParameterSpec("a", (2, 2), "float32"),
            ParameterSpec("none", (0,), "float32"),
            ParameterSpec("b", (), "float32"),
        )
    )
    assert [layout.name_at(i) for i in range(5)] == ["a", "a", "a", "a", "b"]
    with pytest.raises(ProtocolMisuse):
        layout.name_at(5)


def test_a_mean_of_counters_is_rounded_and_hostile_values_are_clamped() -> None:
    layout = Layout.of_signature(
        (
            ParameterSpec("count", (4,), "int64"),
            ParameterSpec("small", (2,), "uint8"),
            ParameterSpec("on", (3,), "bool"),
        )
    )
    vector = torch.tensor([2.4, 2.6, 1e30, -1e30, 300.0, -5.0, 0.49, 0.5, 1.0])
    state = unflatten(layout, vector)
    assert state["count"].tolist() == [2, 3, 1 << 24, -(1 << 24)]
    assert state["small"].tolist() == [255, 0]
    assert state["on"].tolist() == [False, True, True]


def test_integers_that_float32_cannot_hold_are_refused_by_name() -> None:
    model = nn.Module()
    model.register_buffer("steps", torch.tensor([1 << 24]))
    layout = Layout.of(model)
    assert flatten_model(layout, model).tolist() == [float(1 << 24)]
    model.register_buffer("steps", torch.tensor([(1 << 24) + 1]))
    with pytest.raises(ConfigError, match="buffer steps holds integers beyond 2"):
        flatten_model(layout, model)


def test_a_complex_parameter_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="parameter z 2 complex64"):
        Layout.of_signature((ParameterSpec("z", (2,), "complex64"),))


def test_half_precision_parameters_round_trip() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    layout = Layout.of(model)
    vector = flatten_model(layout, model)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    unflatten_into(layout, vector, model)
    assert torch.equal(model.weight.detach(), before)


def test_vectors_and_models_of_another_layout_are_refused() -> None:
    layout = Layout.of(net(1))
    with pytest.raises(ProtocolMisuse, match="float32 CPU vector"):
        unflatten_into(layout, torch.zeros(layout.size + 1), net(1))
    with pytest.raises(ProtocolMisuse, match="float32 CPU vector"):
        unflatten(layout, torch.zeros(layout.size, dtype=torch.float64))
    with pytest.raises(ProtocolMisuse, match="does not have the layout's parameters"):
        unflatten_into(layout, torch.zeros(layout.size), nn.Linear(3, 4))
    with pytest.raises(ProtocolMisuse, match="shapes"):
        flatten(layout, [torch.zeros(3)])


def test_views_share_memory_and_refuse_to_copy() -> None:
    tensor = torch.arange(4, dtype=torch.float32)
    view = bytes_view(tensor)
    assert len(view) == 16
    assert not view.readonly
    view[0:4] = b"\0\0\x80\x3f"
    assert tensor.tolist() == [1.0, 1.0, 2.0, 3.0]
    assert numpy_view(tensor).ctypes.data == tensor.data_ptr()
    assert len(bytes_view(torch.zeros(3, 0))) == 0
    assert len(bytes_view(torch.zeros(3, dtype=torch.bfloat16))) == 6
    for make in (bytes_view, numpy_view):
        with pytest.raises(ProtocolMisuse, match="contiguous"):
            make(torch.zeros(4, 4).t()[1:])


def test_a_model_in_one_vector_is_the_same_model_and_the_vector_its_state() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())  # no contiguous one
    x, layout = torch.randn(5, 3), Layout.of(model)
    before, seen = flatten_model(layout, model), model(x)
    vector = unite(layout, model)
    assert vector is not None and torch.equal(vector, before) and torch.equal(flatten_model(layout, model), before)
    torch.testing.assert_close(model(x), seen)
    with torch.no_grad():
        model[0].bias += 1.0
    assert torch.equal(vector, flatten_model(layout, model)) and not torch.equal(vector, before)
    unflatten_into(layout, before, model)
    assert torch.equal(vector, before)


@pytest.mark.parametrize("model", [nn.Linear(3, 4).bfloat16(), nn.BatchNorm1d(4)])
def test_a_model_of_other_dtypes_stays_as_it_is(model: nn.Module) -> None:
    own = [tensor.data_ptr() for tensor in model.parameters()]
    assert unite(Layout.of(model), model) is None
    assert [tensor.data_ptr() for tensor in model.parameters()] == own
