"""Static and adaptive clipping (ARC: Allouah et al. 2024, arXiv 2405.14432), and vectors of length 1."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from .base import Before, Floats, count, majority, one_of, positive
from .geometry import inverse, norms


@attrs.frozen
class Clipping(Before):
    """x_i min(1, ``c`` / ‖x_i‖)."""

    name: ClassVar[str] = "clipping"

    c: float = attrs.field(default=2.0, validator=positive)

    def matrix(self, gram: Floats, seed: int) -> Floats:
        return clip(norms(gram), self.c)


@attrs.frozen
class ARC(Before):
    """Adaptive robust clipping: the k = ⌊2 (``f``/n) (n - f)⌋ longest are clipped to the length of the next one."""

    name: ClassVar[str] = "arc"

    f: int = attrs.field(validator=count)

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def matrix(self, gram: Floats, seed: int) -> Floats:
        lengths = norms(gram)
        n = len(lengths)
        k = 2 * self.f * (n - self.f) // n
        return clip(lengths, float(np.sort(lengths)[n - k - 1]))


@attrs.frozen
class Normalise(Before):
    """x_i / ‖x_i‖, and 0 for 0. ``normalise+mean`` is the simple rule that any cleverer one has to beat.

    With ``to=median`` all get the median length instead of 1: the result is as long as contributions are, so that what
    the run does with it (a learning rate, parameters that are added) keeps its meaning, and steps become smaller as
    the work does.
    """

    name: ClassVar[str] = "normalise"

    to: str = attrs.field(default="one", validator=one_of("one", "median"))

    def matrix(self, gram: Floats, seed: int) -> Floats:
        lengths = norms(gram)
        return np.diag(inverse(lengths) * (float(np.median(lengths)) if self.to == "median" else 1.0))


def clip(lengths: Floats, most: float) -> Floats:
    """The diagonal matrix of factors that leave no length above ``most``."""
    return np.diag(np.divide(most, lengths, out=np.ones_like(lengths), where=lengths > most))
