"""Averaging of unlike models that keeps the variance of their weights (Tian, Al-Ars, Kitsak, Hofstee, 2404.04616).

The mean of n models that were initialised independently has 1/n of their variance in every layer: it has left the
regime in which it can be trained. The correction scales each tensor about its own mean back to a target variance.
For each tensor l of a model, with own weights w and those of the other members w_j, j = 1 … k:

    a_l   = c w_l + (1 - c) (1/k) Σ_j w_lj                      ``own`` c; 0: the paper's standard averager
    v_l   = s Var(w_l) + (1 - s) (1/k) Σ_j Var(w_lj)            ``target`` s; 0: others, 1: self, c: conservative
    out_l = mean(a_l) + (a_l - mean(a_l)) √(v_l / Var(a_l))     Var unbiased, as in ``torch.var``

Only means over the others appear, so a group reduce of weights and variances (one number for each tensor) is all that
it needs, in groups of any size over any graph. Once peers agree the factor is 1.

The authors' code adds 1e-4 to both variances, which is as much as the variance of a wide layer: over 16 models of
300 x 200 it restores 74 %. Here nothing is added. What has no spread that could be scaled is left as averaged: a tensor
of one element, one whose values are all the same (a bias that was not trained yet, a fresh LayerNorm), one whose
target is 0. "The same" is relative: a variance of at most ``RELATIVE`` of the mean square, which is float32's rounding.

Statistics of normalisation layers (``running_mean``, ``running_var``, ``num_batches_tracked``, anything of integers)
are averaged like everything else and never scaled: they describe activations. The mean of the running variances is what
fits the corrected weights, whose activations have about the mean variance of the parents'; with weights left
uncorrected it would be too large. No running variance can become negative, as all shares in the mean are positive.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from .state import Layout

#: A variance relative to the mean square of its values, and to the target, at which there is nothing to scale.
RELATIVE = 1e-12

#: Last parts of the names of buffers in which torch's normalisation layers keep statistics.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@attrs.frozen
class Segment:
    """A tensor whose variance is corrected: its name and where it stands in the flat vector."""

    name: str
    start: int
    stop: int


@attrs.frozen
class Averaging:
    """How a peer's own model and the mean of the others' become one; see the module for ``own`` and ``target``.

    ``correct`` False: the plain average a. Raises ValueError for shares outside 0 … 1.
    """

    own: float = 0.5
    target: float = 0.0
    correct: bool = True

    def __attrs_post_init__(self) -> None:
        for name, value in (("own", self.own), ("target", self.target)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share and must be in 0..1, got {value}")

    def combine(
        self,
        layout: Layout,
        own: Tensor,
        others: Tensor,
        own_variances: Tensor | None = None,
        others_variances: Tensor | None = None,
    ) -> Tensor:
        """The new weights of this peer, a new fp32 vector ``(layout.size,)``.

        ``own``, ``others``: its model and the mean of the others'. ``own_variances``, ``others_variances``:
        :func:`variances` of its model, and the mean of those of the others; each may be left out where its share in the
        target is 0. Raises ValueError when one is missing.
        """
        average = mix(own, others, self.own)
        if not self.correct:
            return average
        target = torch.zeros(len(corrected(layout)))
        for weight, found, whose in (
            (self.target, own_variances, "own variances"),
            (1 - self.target, others_variances, "variances of the others"),
        ):
            if weight > 0:
                if found is None:
                    raise ValueError(f"the target needs the {whose}")
                target += weight * found
        return restore_(layout, average, target)


def corrected(layout: Layout) -> tuple[Segment, ...]:
    """The tensors whose variance is corrected, in the layout's order: floating point, more than one element, and no
    statistics of a normalisation layer."""
    found = []
    for spec, start in zip(layout.signature, layout.offsets, strict=True):
        size = math.prod(spec.shape)
        if size > 1 and spec.dtype in _FLOATING and spec.name.rpartition(".")[2] not in STATISTICS:
            found.append(Segment(spec.name, start, start + size))
    return tuple(found)


def variances(layout: Layout, vectors: Tensor) -> Tensor:
    """The unbiased variance of each tensor of :func:`corrected`: (…, tensors) for ``vectors`` (…, size), fp32."""
    found = [_centred(vectors[..., segment.start : segment.stop])[2] for segment in corrected(layout)]
    return torch.cat(found, -1) if found else vectors.new_zeros(*vectors.shape[:-1], 0)


def mix(own: Tensor, others: Tensor, share: float | Tensor) -> Tensor:
    """``share · own + (1 - share) · others`` as a new tensor."""
    return own * share + others * (1 - share)


def restore_(layout: Layout, vectors: Tensor, target: Tensor) -> Tensor:
    """Scale each tensor of :func:`corrected` about its mean to the variance that ``target`` says, in place.

    ``vectors``: (…, size), fp32; ``target``: (…, tensors). One that is not above zero, or not finite (it came from
    others), leaves its tensor as it is to the bit, and so does a tensor without a spread to scale. Returns ``vectors``.
    """
    for index, segment in enumerate(corrected(layout)):
        part, wanted = vectors[..., segment.start : segment.stop], target[..., index, None]
        apart, mean, spread = _centred(part)
        least = RELATIVE * torch.maximum(wanted, spread + mean.square())
        # Comparisons with NaN are false.
        usable = wanted.isfinite() & (wanted > least) & (spread > least)
        if usable.all():
            torch.add(mean, apart.mul_((wanted / spread).sqrt()), out=part)
        else:
            part.copy_(torch.where(usable, apart.mul_((wanted / spread).sqrt()).add_(mean), part))
    return vectors


def _centred(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``part - mean``, mean and unbiased variance over the last dimension; several times as fast as torch.var."""
    mean = part.mean(-1, keepdim=True)
    apart = part - mean
    return apart, mean, torch.linalg.vector_norm(apart, dim=-1, keepdim=True).square() / (part.shape[-1] - 1)


_FLOATING = ("float16", "bfloat16", "float32", "float64")
