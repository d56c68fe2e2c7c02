"""Matching of the hidden units of two models by what they do on the same data (DIMAT, Saadati et al., CVPR 2024).

Hidden units have no order: a network whose units are permuted, rows of one layer and columns of the next, computes the
same. The mean of two networks that learned the same in another order is therefore neither. Here a model's units are
brought into the order of another's: for each hidden layer the assignment with the largest sum of correlations

    C_ij = cov(x_i, y_j) / (std(x_i) std(y_j) + 1e-7)        over the same samples, x of the one, y of the other

(``scipy.optimize.linear_sum_assignment``). x and y are what the layer gives before its nonlinearity: there no unit is
dead, so that the assignment is one even where a ReLU gives nothing but zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..transport.errors import ConfigError
from .state import Layout

#: Added to products of standard deviations.
EPSILON = 1e-7

#: What may stand between two layers: it treats each unit alike, and by itself.
BY_UNIT = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout,
)  # fmt: skip


@attrs.frozen
class Layer:
    """A linear layer: its module's name, and where its weights (out, in) and bias (None: none) stand in the vector."""

    name: str
    outputs: int
    inputs: int
    weight: int
    bias: int | None


def layers_of(model: nn.Module, layout: Layout) -> tuple[Layer, ...]:
    """The linear layers of a plain chain. Raises :class:`ConfigError` for any other model, naming what is wrong."""
    if not isinstance(model, nn.Sequential):
        raise ConfigError(
            f"units can be matched in an nn.Sequential of linear layers, and the model is a {type(model).__name__}; "
            "the strategy gossip corrects the average of any model"
        )
    at = dict(zip(layout.names, layout.offsets, strict=True))
    found: list[Layer] = []
    for name, module in model._modules.items():  # also one that stands in it twice
        if isinstance(module, nn.Linear):
            if f"{name}.weight" not in at or any(layer.weight == at[f"{name}.weight"] for layer in found):
                raise ConfigError(f"units of layer {name} cannot be matched: it shares its weights")
            bias = None if module.bias is None else at[f"{name}.bias"]
            found.append(Layer(name, module.out_features, module.in_features, at[f"{name}.weight"], bias))
        elif not (isinstance(module, BY_UNIT) or (isinstance(module, nn.Flatten) and not found)):
            raise ConfigError(
                f"units can be matched in a chain of linear layers and activations, and layer {name} is a "
                f"{type(module).__name__}; the strategy gossip corrects the average of any model"
            )
    if sum(layer.outputs * layer.inputs + layer.outputs * (layer.bias is not None) for layer in found) != layout.size:
        raise ConfigError("units cannot be matched: the model holds tensors beside its linear layers")
    return tuple(found)


def correlation(mine: Tensor, theirs: Tensor) -> NDArray[np.float64]:
    """C, (units, units), of two matrices (samples, units) over the same samples. What is not finite (a model that
    diverged, a single sample) correlates with nothing."""
    x, y = (given - given.mean(0) for given in (mine, theirs))
    scale = x.norm(dim=0)[:, None] * y.norm(dim=0)[None, :]
    # Both are sums over the samples, which cancels n - 1.
    found = x.T @ y / (scale + EPSILON * max(len(x) - 1, 1))
    result: NDArray[np.float64] = np.nan_to_num(found.double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    return result


def assign(similarity: NDArray[np.float64]) -> Tensor:
    """For each of our units (row) the unit of theirs (column) that takes its place; int64."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    assert bool((rows == np.arange(len(similarity))).all())
    return torch.from_numpy(columns.astype(np.int64))


def match(layers: Sequence[Layer], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The permutation of each hidden layer, from what its module gave in our model and in theirs on equal samples."""
    return tuple(assign(correlation(mine[layer.name], theirs[layer.name])) for layer in layers[:-1])


def permute(layers: Sequence[Layer], vector: Tensor, permutations: Sequence[Tensor]) -> Tensor:
    """The same function with its hidden units in another order, as a new vector.

    Unit i of hidden layer l becomes what unit ``permutations[l][i]`` was: rows and bias of that layer, columns of the
    next.
    """
    result = vector.clone()
    before: Tensor | None = None
    for layer, order in zip(layers, [*permutations, None], strict=True):
        end = layer.weight + layer.outputs * layer.inputs
        weight = vector[layer.weight : end].view(layer.outputs, layer.inputs)
        if before is not None:
            weight = weight[:, before]
        if order is not None:
            weight = weight[order]
            if layer.bias is not None:
                result[layer.bias : layer.bias + layer.outputs] = vector[layer.bias : layer.bias + layer.outputs][order]
        result[layer.weight : end] = weight.flatten()
        before = order
    return result
