"""A lost stage comes back from its neighbours: CheckFree and CheckFree+ (Blagoev, Ersoy, Chen, arXiv 2506.15461).

When stage i of a chain is lost with all its replicas, and no checkpoint is kept, its neighbours stand in (Alg. 1):

    W_i = (ω_{i-1} W_{i-1} + ω_{i+1} W_{i+1}) / (ω_{i-1} + ω_{i+1})          :func:`average`
    ω_j = ‖∇W_j‖, the last gradient norm of stage j                          :func:`gradient_norm`, :func:`weights_of`
    η_i = 1.1 η_i, with fresh moments of the optimiser                       :class:`RateScale`

The first and the last stage have one neighbour. CheckFree+ runs half of the micro-batches with the first two stages in
swapped order, and the last two, so that a neighbour has learned to do the work: a copy of it takes the place
(:func:`copy`). Layers before the first and after the last stage (embedding, head) are replicated on the neighbours bit
for bit, and come back by ``keep``.

The paper leaves open whether ω is squared; its code takes the norm itself, after clipping, and adds 1e-4. ``exponent``
has both. Line 3 of Alg. 1 has ω_{i-1} twice below the fraction; the second is ω_{i+1}, as above. The averages are made
by :mod:`shoal.learning.exact`: whoever computes them, on whatever machine, has the same bits, which replicas of a stage
must have. Two neighbouring stages lost at once cannot come back by this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from ...transport.errors import ProtocolMisuse, RemoteError
from .. import exact

#: Added to a gradient norm, so that no weight is zero (reference code).
FLOOR = 1e-4
#: By what the learning rate of a recovered stage is multiplied (Alg. 1; configurations of the reference: 1.1 and 1.2).
RATE_SCALE = 1.1

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]


class TensorsLost(RemoteError):
    """Nobody who is left holds these tensors of a lost stage; ``names`` says which."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"no neighbour of the lost stage holds what could stand for {', '.join(names)}")
        self.names = names


def gradient_norm(gradients: Iterable[Tensor | None]) -> float:
    """``|‖g‖₂| + 1e-4`` over all ``gradients`` of a stage, of any shapes; None counts as zero.

    Summed in float64 after clipping and after all replicas' gradients are one, so replicas agree up to rounding only:
    one of them says its norm, and all who average take that number.
    """
    total = 0.0
    for gradient in gradients:
        if gradient is not None:
            total += float(gradient.detach().double().square().sum())
    return abs(math.sqrt(total)) + FLOOR


def weights_of(before: float, after: float, exponent: float = 1.0) -> tuple[float, float]:
    """``(ω_{i-1}, ω_{i+1})`` with ω = norm ** ``exponent``, normalised to the sum 1.

    ``exponent``: 1 as in the code; 2 as the paper may be read; 0 for the plain mean. Raises :class:`ProtocolMisuse` for
    norms that are not finite, negative, or both zero.
    """
    largest = max(before, after)
    if not (math.isfinite(before) and math.isfinite(after) and min(before, after) >= 0 and largest > 0):
        raise ProtocolMisuse(
            f"gradient norms {before} and {after} give no weights: finite, not negative, not both zero"
        )
    left, right = (before / largest) ** exponent, (after / largest) ** exponent
    return left / (left + right), right / (left + right)


def average(
    before: Tensors,
    after: Tensors,
    weights: tuple[float, float],
    *,
    own: Mapping[str, Shape],
    keep: Tensors | None = None,
    local: Collection[str] = (),
    fresh: Tensors | None = None,
) -> dict[str, Tensor]:
    """The tensors of a lost stage, from those of the stages ``before`` and ``after`` it, by their names within a stage.

    ``own``: name and shape of each tensor that the lost stage had. Each is new memory, and is, in this order:

    * its copy in ``keep``, bit for bit;
    * the weighted mean (float32, rounded to the dtype of ``before``), if both have it in this shape and floating;
    * the copy of the one that has it in this shape, ``before`` first;
    * its value in ``fresh``.

    Names in ``local`` belong to their place in the chain (positions, anything that depends on the layer's number): they
    are never taken from a neighbour. Raises :class:`TensorsLost` naming what is left, and :class:`ProtocolMisuse` for
    weights without a mean, and for copies in ``keep`` and ``fresh`` of another shape.
    """
    exact.factors(weights)

    def mean(name: str, shape: Shape) -> Tensor | None:
        one, other = (_fitting(tensors, name, shape) for tensors in (before, after))
        if one is None or other is None or not (one.is_floating_point() and other.is_floating_point()):
            return _first((one, other))
        parts = [tensor.detach().to("cpu", torch.float32).reshape(-1).contiguous() for tensor in (one, other)]
        return exact.weighted_mean(parts, weights).view(shape).to(one.device, one.dtype)

    return _assembled(own, keep or {}, mean, local, fresh or {})


def copy(
    neighbour: Tensors,
    *,
    own: Mapping[str, Shape],
    keep: Tensors | None = None,
    local: Collection[str] = (),
    fresh: Tensors | None = None,
) -> dict[str, Tensor]:
    """The tensors of a lost first or last stage: those of its only ``neighbour``, bit for bit.

    CheckFree+ with swapped order: the first is a copy of the second, the last one of the last but one. Everything else
    as in :func:`average`.
    """
    return _assembled(own, keep or {}, lambda name, shape: _fitting(neighbour, name, shape), local, fresh or {})


def _assembled(
    own: Mapping[str, Shape],
    keep: Tensors,
    take: Callable[[str, Shape], Tensor | None],
    local: Collection[str],
    fresh: Tensors,
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    lost = []
    for name, shape in own.items():
        shape = tuple(shape)
        for source, what in ((keep, "copy"), (fresh, "fresh value")):
            if name in source and tuple(source[name].shape) != shape:
                raise ProtocolMisuse(f"the {what} of {name} is {tuple(source[name].shape)}, and the stage has {shape}")
        found = _first((keep.get(name), None if name in local else take(name, shape), fresh.get(name)))
        if found is None:
            lost.append(name)
        else:
            result[name] = found.detach().clone()
    if lost:
        raise TensorsLost(tuple(lost))
    return result


def _fitting(tensors: Tensors, name: str, shape: Shape) -> Tensor | None:
    found = tensors.get(name)
    return found if found is not None and tuple(found.shape) == shape else None


def _first(candidates: Iterable[Tensor | None]) -> Tensor | None:
    return next((tensor for tensor in candidates if tensor is not None), None)


class RateScale:
    """The learning rate of a recovered stage: ``scale`` times as high as its optimiser and scheduler would have it.

    Not the rate in ``param_groups`` is scaled, which schedulers and optimisers with a warm-up write anew at each step,
    but the update: p += (factor - 1) (p_after - p_before). For optimisers whose update is the rate times something
    (SGD, Adam, AdamW with its decay) that is the same up to rounding.

    ``compound``: a stage that is recovered k times learns at ``scale`` ** k (Alg. 1 as written), else at ``scale`` (its
    code). ``factor`` is what it has come to, 1 before the first recovery; whoever hands a stage on hands it on too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        scale: float = RATE_SCALE,
        compound: bool = False,
        factor: float = 1.0,
    ) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self._scale = scale
        self._compound = compound

    def recovered(self) -> None:
        """The stage was just recovered: raise the rate, and forget the moments of what is gone."""
        self.factor = self.factor * self._scale if self._compound else self._scale
        self.optimizer.state.clear()

    def step(self) -> None:
        """A step of the optimiser, with the update scaled."""
        if self.factor == 1.0:
            self.optimizer.step()
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in parameters]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                # One rounding per operation, so that replicas of the stage stay alike.
                parameter.add_(parameter.sub(old).mul_(self.factor - 1.0))
