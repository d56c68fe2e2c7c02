"""Matching of hidden units: permuted neighbours, identical models, models that cannot be matched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.learning.averaging import mix
from shoal.learning.matching import assign, correlation, layers_of, match, permute
from shoal.learning.state import Layout, flatten_model, unflatten_into
from shoal.transport.errors import ConfigError


def net(act: type[nn.Module], seed: int, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(20, 30, bias=bias), act(), nn.Dropout(0.5), nn.Linear(30, 25), act(),
            nn.Linear(25, 4),
        ).eval()  # fmt: skip


class Pair:
    """Two models, and what their layers give on the same inputs."""

    def __init__(self, one: nn.Sequential, other: nn.Sequential) -> None:
        self.layout = Layout.of(one)
        self.layers = layers_of(one, self.layout)
        self.inputs = torch.randn(200, 20, generator=torch.Generator().manual_seed(9))
        self.model = one
        self.one, self.other = (flatten_model(self.layout, model) for model in (one, other))

    def outputs(self, vector: Tensor) -> Tensor:
        unflatten_into(self.layout, vector, self.model)
        with torch.no_grad():
            result: Tensor = self.model(self.inputs)
        return result

    def seen(self, vector: Tensor) -> dict[str, Tensor]:
        unflatten_into(self.layout, vector, self.model)
        found, h = {}, self.inputs
        with torch.no_grad():
            for name, module in self.model.named_children():
                h = module(h)
                found[name] = h
        return found

    def matched(self, other: Tensor) -> Tensor:
        return permute(self.layers, other, match(self.layers, self.seen(self.one), self.seen(other)))


def shuffles(pair: Pair, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randperm(layer.outputs, generator=random) for layer in pair.layers[:-1]]


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_a_neighbour_whose_units_are_permuted_leaves_the_merge_unchanged(act: type[nn.Module]) -> None:
    pair = Pair(net(act, 1), net(act, 2))
    merge = mix(pair.one, pair.matched(pair.other), 0.5)
    for seed in range(5):
        permuted = permute(pair.layers, pair.other, shuffles(pair, seed))
        assert not torch.equal(permuted, pair.other)
        torch.testing.assert_close(mix(pair.one, pair.matched(permuted), 0.5), merge, rtol=0, atol=1e-5)


def test_a_permuted_model_computes_the_same_and_is_put_back_in_order() -> None:
    pair = Pair(net(nn.ReLU, 1, bias=False), net(nn.ReLU, 2, bias=False))
    permuted = permute(pair.layers, pair.one, shuffles(pair, 3))
    torch.testing.assert_close(pair.outputs(permuted), pair.outputs(pair.one), rtol=0, atol=1e-5)
    assert torch.equal(pair.matched(permuted), pair.one)


def test_of_identical_models_every_unit_stays_in_its_place() -> None:
    pair = Pair(net(nn.Tanh, 1), net(nn.Tanh, 1))
    seen = pair.seen(pair.one)
    for order in match(pair.layers, seen, seen):
        assert torch.equal(order, torch.arange(len(order)))
    assert torch.equal(pair.matched(pair.other), pair.one)


def test_the_correlation_is_that_of_numpy_and_the_assignment_its_best() -> None:
    x, y = torch.randn(100, 7), torch.randn(100, 7)
    wanted = np.corrcoef(x.T.numpy(), y.T.numpy())[:7, 7:]
    found = correlation(x, y)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    order = assign(found)
    assert sorted(order.tolist()) == list(range(7))
    best = found[np.arange(7), order.numpy()].sum()
    random = np.random.default_rng(0)
    assert all(best >= found[np.arange(7), random.permutation(7)].sum() - 1e-9 for _ in range(500))


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 3e38])
def test_a_model_that_has_diverged_is_matched_somehow_and_ends_nothing(spoilt: float) -> None:
    x = torch.randn(50, 6)
    y = x.clone()
    y[:, 2] = spoilt
    order = assign(correlation(x, y))
    assert sorted(order.tolist()) == list(range(6))
    assert sorted(assign(correlation(x[:1], y[:1])).tolist()) == list(range(6))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Shared(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.Linear(2, 2)
        super().__init__(layer, nn.Tanh(), layer)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Other(), "the model is a Other; the strategy gossip corrects the average of any model"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "layer 1 is a BatchNorm1d"),
        (nn.Sequential(nn.Linear(2, 2), nn.Flatten()), "layer 1 is a Flatten"),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "layer 0 is a Conv2d"),
        (Shared(), "layer 2 cannot be matched: it shares its weights"),
    ],
)
def test_a_model_whose_units_cannot_be_matched_is_refused_and_told_why(model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layers_of(model, Layout.of(model))
    assert message in str(caught.value)


def test_tensors_beside_the_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("extra", torch.zeros(3))
    with pytest.raises(ConfigError, match="holds tensors beside its linear layers"):
        layers_of(model, Layout.of(model))
