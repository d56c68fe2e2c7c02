"""Many peers, some of them liars, that train one model on digits step by step: for sweeps over rules and attacks.

What the rules decide here, owners of slices decide in a swarm: the same code, on whole vectors. Everything else of a
swarm is left out, so that thousands of runs are minutes. A run is a pure function of its :class:`Case`.
"""

from __future__ import annotations

import functools
import math

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..learning import exact
from ..learning.aggregate import Aggregator, aggregate
from ..learning.aggregate import resolve as resolve_rule
from ..learning.aggregate.base import Floats
from ..learning.shard import dirichlet_split
from ..learning.tasks.digits import load
from ..transport.errors import ConfigError
from .attacks import Knowledge, Rule
from .attacks import resolve as resolve_attack

CLASSES = 10
_SIDE = 8
#: Of an image of digits, whose pixels are -1 … 1.
BACKGROUND = -1.0


@attrs.frozen
class Field:
    """What all runs of a sweep have in common.

    ``alpha``: Dirichlet concentration of the classes over the peers; None: the same mixture for all. ``hidden``: width
    of the two hidden layers, 0: softmax regression. ``momentum``: of each peer's own gradients (Karimireddy et al.
    2021). ``loss``: part of the contributions that do not arrive. ``noise``: standard deviation added to the images.
    ``shift``: augmented data, each image moved anew in each step by up to so many pixels along both axes.
    """

    peers: int = 15
    steps: int = 150
    batch: int = 32
    rate: float = 1.0
    hidden: int = 0
    alpha: float | None = None
    momentum: float = 0.0
    loss: float = 0.0
    noise: float = 0.0
    shift: int = 0

    @property
    def label(self) -> str:
        parts = ["IID" if self.alpha is None else f"Dirichlet {self.alpha:g}"]
        parts += [f"hidden {self.hidden}"] * bool(self.hidden) + [f"momentum {self.momentum:g}"] * bool(self.momentum)
        parts += [f"{self.loss:.0%} lost"] * bool(self.loss) + [f"noise {self.noise:g}"] * bool(self.noise)
        parts += [f"shifted by up to {self.shift}"] * bool(self.shift)
        return ", ".join(parts)


@attrs.frozen
class Case:
    """One run: ``rule`` and ``attack`` as text (``attack`` empty: none), ``liars`` of the peers, ``seed``."""

    field: Field
    rule: str
    attack: str
    liars: int
    seed: int


@attrs.frozen
class Outcome:
    """``accuracy`` on the held-out images at the end, 0 … 1. ``quality``: means over the run of what the rule said of
    honest peers and of liars, None where it says nothing. ``skipped``: steps whose contributions were too few."""

    accuracy: float
    quality: tuple[float, float] | None
    skipped: int


def run(case: Case) -> Outcome:
    """Train; deterministic. Raises :class:`ConfigError` for a rule that cannot stand so few peers."""
    exact.prepare_torch()
    field, rule = case.field, resolve_rule(case.rule)
    rule.check(field.peers)
    attack = resolve_attack(case.attack) if case.liars and case.attack else None
    if not 0 <= case.liars < field.peers:
        raise ConfigError(f"{case.liars} liars of {field.peers} peers")
    draw = np.random.default_rng([case.seed, 1])
    random = torch.Generator().manual_seed(case.seed)
    data, parts = load(), _parts(field, case.seed)
    images = (
        data.train_x
        if not field.noise
        else data.train_x
        + field.noise * torch.randn(data.train_x.shape, generator=torch.Generator().manual_seed(case.seed + 1))
    )
    moved = np.random.default_rng([case.seed, 2])
    model = _Model(field.hidden, case.seed)
    honest = field.peers - case.liars
    velocity = torch.zeros(field.peers, len(model.vector))
    before: Tensor | None = None
    scores = np.zeros(field.peers)  # what a rule with a memory remembers of each
    qualities, skipped = list[tuple[float, float]](), 0
    for step in range(field.steps):
        picked = torch.from_numpy(np.stack([draw.choice(part, field.batch) for part in parts]))
        labels = data.train_y[picked]
        flips = attack is not None and attack.name == "labelflip"
        if flips:
            labels[honest:] = CLASSES - 1 - labels[honest:]
        batches = images[picked]
        if field.shift:
            batches = shifted(batches, moved.integers(-field.shift, field.shift, (*picked.shape, 2), endpoint=True))
        rows = model.gradients(batches, labels)
        if not bool(torch.isfinite(rows).all()):
            break  # liars have driven the model to infinity: nothing is learnt from there
        if field.momentum:
            velocity = rows = field.momentum * velocity + (1 - field.momentum) * rows
        if attack is not None:
            known = Knowledge(
                own=rows[honest:], honest=rows[:honest], before=before, random=random,
                rule=_applied(rule, before, step, scores), relabelled=rows[honest:] if flips else None,
                scores=torch.from_numpy(scores[honest:]) if rule.memory is not None else None,
            )  # fmt: skip
            rows = torch.cat([rows[:honest], attack.craft(known)])
        arrived = draw.random(field.peers) >= field.loss
        # What is not finite is refused at the door: see rounds/traffic.py.
        kept = [i for i in range(field.peers) if arrived[i] and bool(torch.isfinite(rows[i]).all())]
        try:
            rule.check(len(kept))
        except ConfigError:
            skipped += 1
            continue
        result = aggregate(rows[kept], rule, reference=before, seed=step, scores=scores[kept])
        if result.scores is not None:
            scores[kept] = result.scores
        if result.quality is not None and case.liars:
            liar = np.array([i >= honest for i in kept])
            if liar.any() and not liar.all():
                qualities.append((float(result.quality[~liar].mean()), float(result.quality[liar].mean())))
        before = result.vector
        model.step(field.rate * before)
    quality: tuple[float, float] | None = None
    if qualities:
        honest_mean, liars_mean = np.mean(qualities, axis=0).tolist()
        quality = honest_mean, liars_mean
    return Outcome(model.accuracy(data.test_x, data.test_y), quality, skipped)


def shifted(images: Tensor, by: NDArray[np.int64]) -> Tensor:
    """``images`` (…, 64), each moved by its ``by`` (…, 2) pixels down and to the right; what comes in is background."""
    at = np.arange(_SIDE) - by[..., None]  # (…, 2, side): where rows and columns come from
    inside = (at >= 0) & (at < _SIDE)
    rows, columns = (torch.from_numpy(at[..., axis, :].clip(0, _SIDE - 1)) for axis in (0, 1))
    seen = torch.from_numpy(inside[..., 0, :, None] & inside[..., 1, None, :])
    found = images.gather(-1, (rows[..., :, None] * _SIDE + columns[..., None, :]).flatten(-2))
    return torch.where(seen.flatten(-2), found, BACKGROUND)


def _applied(rule: Aggregator, before: Tensor | None, seed: int, scores: Floats) -> Rule:
    def applied(rows: Tensor) -> Tensor:
        return aggregate(rows[: len(scores)], rule, reference=before, seed=seed, scores=scores).vector

    return applied


@functools.lru_cache(maxsize=64)
def _parts(field: Field, seed: int) -> tuple[np.ndarray, ...]:
    labels = load().train_y.numpy()
    if field.alpha is None:
        order = np.random.default_rng([seed, 0]).permutation(len(labels))
        return tuple(np.array_split(order, field.peers))
    return tuple(dirichlet_split(labels, field.peers, field.alpha, seed))


class _Model:
    """Softmax regression, or a network with two hidden layers, whose gradients for all peers are one pass."""

    def __init__(self, hidden: int, seed: int) -> None:
        self._sizes = (64, CLASSES) if not hidden else (64, hidden, hidden, CLASSES)
        random = torch.Generator().manual_seed(seed)
        parts = []
        for inner, outer in zip(self._sizes, self._sizes[1:], strict=False):
            scale = 0.0 if not hidden else math.sqrt(2.0 / inner)
            parts += [(scale * torch.randn(outer * inner, generator=random)), torch.zeros(outer)]
        self.vector = torch.cat(parts)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        layers, at = [], 0
        for inner, outer in zip(self._sizes, self._sizes[1:], strict=False):
            weight = self.vector[at : at + outer * inner].view(outer, inner)
            layers.append((weight, self.vector[at + outer * inner : at + outer * (inner + 1)]))
            at += outer * (inner + 1)
        return layers

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """``images`` (n, b, 64), ``labels`` (n, b): the gradients (n, d) of n peers' mean cross-entropies."""
        layers, inputs, h = self._layers(), [], images
        for index, (weight, bias) in enumerate(layers):
            inputs.append(h)
            h = h @ weight.T + bias
            if index < len(layers) - 1:
                h = torch.relu(h)
        delta = torch.softmax(h, -1)
        delta.scatter_add_(-1, labels[..., None], torch.full((*labels.shape, 1), -1.0))
        delta /= labels.shape[1]
        parts: list[Tensor] = []
        for (weight, _), h in zip(reversed(layers), reversed(inputs), strict=True):
            parts = [torch.einsum("nbo,nbi->noi", delta, h).flatten(1), delta.sum(1), *parts]
            delta = (delta @ weight) * (h > 0)
        return torch.cat(parts, 1)

    def step(self, update: Tensor) -> None:
        self.vector -= update

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        h = images
        layers = self._layers()
        for index, (weight, bias) in enumerate(layers):
            h = h @ weight.T + bias
            if index < len(layers) - 1:
                h = torch.relu(h)
        return float((h.argmax(-1) == labels).float().mean())
