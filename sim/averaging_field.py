"""Peers on a graph that average models which began apart, all in one pass: for sweeps over methods, graphs and data.

What is combined, and how, is :mod:`shoal.learning.averaging` and :mod:`shoal.learning.matching`, the code of the
strategies ``gossip`` and ``dimat``. Everything else of a swarm is left out, so that hundreds of runs are minutes. A run
is a pure function of its :class:`Case`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..learning import exact, topologies
from ..learning.averaging import corrected, mix, restore_, variances
from ..learning.matching import Layer, layers_of, match, permute
from ..learning.shard import dirichlet_split
from ..learning.state import Layout, flatten_model
from ..learning.tasks.digits import Digits, load
from .field import identity_of

#: Methods that correct variances, and the share of a peer's own variance in the target.
TARGETS = {
    "corrected": 0.0,
    "corrected:self": 1.0,
    "corrected:conservative": 0.5,
    "dimat, corrected": 0.0,
    "same init, corrected": 0.0,
}
MATCHED = ("dimat", "dimat, corrected")
#: Methods in which all begin from the same weights. FedAvg: each round the mean of all, by the sizes of their parts.
SAME = ("same init", "same init, corrected", "fedavg")
METHODS = ("plain", "corrected", "corrected:self", "corrected:conservative", *MATCHED, *SAME, "solo")
#: Methods without any graph.
GRAPHLESS = ("solo", "fedavg")
#: Whom a peer meets in an exchange: all its neighbours, or one of them, in a random matching of the graph.
FORMS = ("pairs", "neighbours")
GRAPHS = ("ring", "barabasi-albert:2", "regular:4", "full", "random")
#: What ``random`` is where all neighbours are met.
RANDOM_GRAPH = "regular:4"

#: Rounds from one look at the models to the next.
EVERY = 5

#: Own samples on which units are compared.
COMPARED = 256


@attrs.frozen
class Field:
    """What all runs of a sweep have in common.

    ``alpha``: Dirichlet concentration of the classes over the peers; None: the same mixture for all. ``model``:
    ``tanh``, five linear layers with 64 units, Xavier weights and SGD; ``digits``, that of the built-in task with its
    own optimiser. ``steps`` local steps of ``batch`` samples in each of ``rounds`` rounds; ``rate`` of SGD, which falls
    linearly to 0 with ``decay``. ``own``: share of the own model in the average; 0: as much as each of the others.
    """

    peers: int = 16
    rounds: int = 60
    steps: int = 5
    batch: int = 32
    rate: float = 0.05
    momentum: float = 0.0
    alpha: float | None = None
    model: str = "tanh"
    own: float = 0.0
    exchanges: int = 1
    decay: bool = True

    @property
    def label(self) -> str:
        data = "IID" if self.alpha is None else f"Dirichlet {self.alpha:g}"
        return f"{data}, {self.model}"


@attrs.frozen
class Case:
    """One run."""

    field: Field
    method: str
    graph: str
    form: str
    seed: int


@attrs.frozen
class Outcome:
    """After every ``EVERY``-th round and the last: mean over the peers of the accuracy of their models on the held-out
    images, 0 … 1, and the mean variance of their weight matrices, in parts of what it was in the beginning. ``worst``:
    accuracy of the worst of the peers, after the last round."""

    accuracy: tuple[float, ...]
    variance: tuple[float, ...]
    worst: float


def run(case: Case) -> Outcome:
    """Train; deterministic."""
    exact.prepare_torch()
    field = case.field
    models = Models(field, case.seed, same=case.method in SAME)
    draw = np.random.default_rng([case.seed, 1])
    meetings = meetings_of(case)
    data, parts = load(), _parts(field, case.seed)
    began = models.spread()
    accuracy, variance, worst = list[float](), list[float](), 0.0
    for round in range(field.rounds):
        models.slow_down(1 - round / field.rounds if field.decay else 1.0)
        for step in range(field.steps):
            picked = torch.from_numpy(np.stack([draw.choice(part, field.batch) for part in parts]))
            models.step(data.train_x[picked], data.train_y[picked])
            if (step + 1) % (field.steps // field.exchanges) or case.method in GRAPHLESS:
                continue
            seen = None
            if case.method in MATCHED:
                picked = torch.from_numpy(np.stack([draw.choice(part, COMPARED) for part in parts]))
                seen = data.train_x[picked]
            shares = torch.from_numpy(weights_of(next(meetings), field.own)).float()
            models.load(averaged(case, models, shares, seen))
        if case.method == "fedavg":
            sizes = [float(len(part)) for part in parts]
            models.load(exact.weighted_mean(list(models.vectors()), sizes).expand(field.peers, -1))
        if (round + 1) % EVERY == 0 or round + 1 == field.rounds:
            found = models.accuracies(data.test_x, data.test_y)
            accuracy.append(float(found.mean()))
            variance.append(models.spread() / began)
            worst = float(found.min())
    return Outcome(tuple(accuracy), tuple(variance), worst)


# -- who meets whom ----------------------------------------------------------------------------------------------------


def meetings_of(case: Case) -> Iterator[tuple[tuple[int, ...], ...]]:
    """For each exchange: whom each peer averages with. ``random`` is another graph in each of them."""
    peers = tuple(identity_of(case.seed, number) for number in range(case.field.peers))
    number = {peer: index for index, peer in enumerate(peers)}
    for exchange in itertools.count(1):
        topology, seed = case.graph, case.seed
        if case.form == "neighbours":
            if topology == "random":
                topology, seed = RANDOM_GRAPH, case.seed * 10_000 + exchange
            found = topologies.neighbours(topology, seed, peers)
        else:
            groups, _ = topologies.groups(topology, seed, exchange, peers, 2)
            found = {peer: tuple(other for other in group if other != peer) for group in groups for peer in group}
        yield tuple(tuple(number[other] for other in found[peer]) for peer in peers)


def weights_of(met: Sequence[Sequence[int]], own: float = 0.0) -> NDArray[np.float64]:
    """π, (peers, peers): the share of each peer's model in each peer's average.

    ``own`` 0: Metropolis' weights 1 / (1 + the larger number of neighbours), the rest is one's own: doubly stochastic
    on every graph, and everybody's share in the consensus the same. Else ``own`` is one's own, the rest equal.
    """
    result = np.zeros((len(met), len(met)))
    for peer, others in enumerate(met):
        for other in others:
            result[peer, other] = (1 - own) / len(others) if own else 1 / (1 + max(len(others), len(met[other])))
        result[peer, peer] = 1 - result[peer].sum()
    return result


# -- averaging ---------------------------------------------------------------------------------------------------------


def averaged(case: Case, models: Models, shares: Tensor, seen: Tensor | None) -> Tensor:
    """The states of all peers after an exchange; ``shares``: π; ``seen``: own samples of each, (peers, n, 64)."""
    vectors, layout = models.vectors(), models.layout
    own = shares.diagonal()[:, None]
    # Who is alone in this exchange has a share of 1, and others' of 0.
    theirs = (shares - torch.diag(own[:, 0])) / (1 - own).clamp(min=1e-6)
    if seen is None:
        result = shares @ vectors
    else:
        result = own * vectors
        for peer, share in enumerate(shares):
            met = [other for other in range(len(share)) if other != peer and share[other] > 0]
            if met:
                result[peer] += share[met] @ models.matched(vectors[peer], vectors[met], seen[peer])
    if case.method in TARGETS:
        spreads = variances(layout, vectors)
        target = mix(spreads, theirs @ spreads, TARGETS[case.method])
        restore_(layout, result, torch.where(own < 1, target, spreads))
    return result


# -- models ------------------------------------------------------------------------------------------------------------


class Models:
    """As many chains of linear layers as there are peers, trained in one pass, each on data of its own."""

    def __init__(self, field: Field, seed: int, *, same: bool) -> None:
        models = []
        for peer in range(field.peers):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * 1000 + (0 if same else peer))
                models.append(_model(field.model))
        self.layout = Layout.of(models[0])
        self.layers: tuple[Layer, ...] = layers_of(models[0], self.layout)
        self._act = torch.tanh if field.model == "tanh" else torch.relu
        self._parts = [
            (
                torch.empty(field.peers, layer.outputs, layer.inputs, requires_grad=True),
                torch.empty(field.peers, 1, layer.outputs, requires_grad=True),
            )
            for layer in self.layers
        ]
        self.load(torch.stack([flatten_model(self.layout, model) for model in models]))
        flat = [tensor for pair in self._parts for tensor in pair]
        self._rate = field.rate if field.model == "tanh" else Digits.learning_rate
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(flat, lr=self._rate, momentum=field.momentum)
            if field.model == "tanh"
            else torch.optim.AdamW(flat, lr=self._rate)
        )

    def slow_down(self, share: float) -> None:
        """Go on with this share of the rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share

    def vectors(self) -> Tensor:
        """A copy of all states, (peers, size)."""
        result = torch.empty(len(self._parts[0][0]), self.layout.size)
        for layer, pair in zip(self.layers, self._parts, strict=True):
            for part, view in zip(pair, self._views(layer, result), strict=True):
                view.copy_(part.detach())
        return result

    def load(self, vectors: Tensor) -> None:
        with torch.no_grad():
            for layer, pair in zip(self.layers, self._parts, strict=True):
                for part, view in zip(pair, self._views(layer, vectors), strict=True):
                    part.copy_(view)

    @staticmethod
    def _views(layer: Layer, vectors: Tensor) -> tuple[Tensor, Tensor]:
        assert layer.bias is not None
        end = layer.weight + layer.outputs * layer.inputs
        weight = vectors[:, layer.weight : end].view(-1, layer.outputs, layer.inputs)
        return weight, vectors[:, None, layer.bias : layer.bias + layer.outputs]

    def spread(self) -> float:
        """The mean variance of the weight matrices of all models."""
        layout, vectors = self.layout, self.vectors()
        matrices = [i for i, segment in enumerate(corrected(layout)) if segment.name.endswith("weight")]
        return float(variances(layout, vectors)[:, matrices].mean())

    def _forward(
        self, parts: Sequence[tuple[Tensor, Tensor]], images: Tensor, keep: list[Tensor] | None = None
    ) -> Tensor:
        h = images
        for index, (weight, bias) in enumerate(parts):
            h = torch.baddbmm(bias, h, weight.transpose(1, 2))
            if keep is not None:
                keep.append(h)
            if index < len(parts) - 1:
                h = self._act(h)
        return h

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of each on (peers, b, 64) and (peers, b)."""
        self._optimizer.zero_grad(set_to_none=True)
        logits = self._forward(self._parts, images)
        # The sum over peers of their mean losses: each one's gradient is its own.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def accuracies(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self._forward(self._parts, images.expand(len(self._parts[0][0]), -1, -1))
        return (logits.argmax(-1) == labels).float().mean(1)

    def matched(self, own: Tensor, theirs: Tensor, images: Tensor) -> Tensor:
        """``theirs`` (k, size) with their units in the order of ``own``, by activations on ``images``."""
        with torch.no_grad():
            seen: list[Tensor] = []
            both = torch.cat([own[None], theirs])
            self._forward([self._views(layer, both) for layer in self.layers], images.expand(len(both), -1, -1), seen)
        given = [{layer.name: h[i] for layer, h in zip(self.layers, seen, strict=True)} for i in range(1 + len(theirs))]
        return torch.stack(
            [
                permute(self.layers, vector, match(self.layers, given[0], other))
                for vector, other in zip(theirs, given[1:], strict=True)
            ]
        )


def _model(name: str) -> nn.Module:
    if name == "digits":
        return Digits().model()
    layers: list[nn.Module] = []
    for outputs in (64, 64, 64, 64, 10):
        linear = nn.Linear(64, outputs)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@functools.lru_cache(maxsize=64)
def _parts(field: Field, seed: int) -> tuple[NDArray[np.int64], ...]:
    labels = load().train_y.numpy()
    if field.alpha is None:
        order = np.random.default_rng([seed, 0]).permutation(len(labels))
        return tuple(np.array_split(order, field.peers))
    return tuple(dirichlet_split(labels, field.peers, field.alpha, seed))
