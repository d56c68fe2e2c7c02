"""What a rule is: coordinate-wise, or on the Gram matrix; what may stand before it; and what they decide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...transport.errors import ConfigError

#: Float64, of the shape that the docstring beside it says.
Floats = NDArray[np.float64]


@attrs.frozen(eq=False)
class Verdict:
    """``coefficients`` (p,): the result is Σ c_i x_i. ``quality`` (p,): how far the rule took each row seriously, 0 …
    1."""

    coefficients: Floats
    quality: Floats | None = None


class Stage(ABC):
    """One part of an aggregator. Subclasses are frozen attrs classes; their fields are the parameters of its text."""

    name: ClassVar[str]

    def check(self, n: int) -> None:
        """Raises :class:`ConfigError` when ``n`` rows are too few for the parameters."""
        if n < 1:
            raise ConfigError(f"{self.name} needs at least one vector")

    @classmethod
    def configure(cls, values: Mapping[str, int | float | bool | str]) -> Self:
        """From parameters of the right types. Raises :class:`ConfigError` naming one that is unusable."""
        try:
            return cls(**values)
        except ValueError as error:
            raise ConfigError(f"{cls.name}: {error}") from None

    def __str__(self) -> str:
        parts = []
        for field in attrs.fields(type(self)):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                parts.append(f"{field.name}={text}")
        return f"{self.name}:{','.join(parts)}" if parts else self.name


class CoordinateRule(Stage):
    """Acts on each coordinate by itself: a slice of the result needs the same slice of the contributions, no more.

    One IEEE float32 operation after the other in one order: the same bits on every machine, however the vectors are
    cut.
    """

    def linear(self, n: int) -> Floats | None:
        """The coefficients (n,), for a rule that is linear; then the Gram matrix is enough for all that precedes it."""
        return None

    @abstractmethod
    def combine(self, rows: Sequence[Tensor], weights: Sequence[float] | None, out: Tensor) -> bool:
        """``rows``: at least one, (d,), float32, contiguous, on the CPU; the result to ``out`` (d,), which is none of
        them. False when a value is not finite; ``out`` is anything then. ``weights`` are what contributors say of
        themselves: only the mean, which trusts them anyway, listens.
        """


class GramRule(Stage):
    """Takes its decision from inner products alone; the result is a linear combination of the rows."""

    @property
    def reference(self) -> bool:
        """Whether the last result stands among the rows, as the last one."""
        return False

    def pivot_of(self, p: int) -> int | None:
        """The place of the one row of ``gram`` (p, p) which, with the diagonal, is all that :meth:`decide` looks at;
        None: it looks at more."""
        return None

    @abstractmethod
    def decide(self, gram: Floats, n: int) -> Verdict:
        """``gram`` (n, n): ⟨x_i, x_j⟩, symmetric, finite. With ``reference`` it may be (n+1, n+1): the last row and
        column are those of the last result. The coefficients are as many as ``gram`` has rows, the quality (n,).
        """


class Before(Stage):
    """A pre-aggregator: q rows that are linear combinations of the n."""

    def rows(self, n: int) -> int:
        """q."""
        return n

    @abstractmethod
    def matrix(self, gram: Floats, seed: int) -> Floats:
        """A (q, n): row i of the outcome is Σ_j A_ij x_j. ``gram`` (n, n) as for a rule; ``seed`` is the round's."""


class Remembering(Stage):
    """Stands first, and chooses rows by what it remembers of their authors from earlier rounds.

    What it remembers is a number in [-1, 1] for each, 0 for who is new. It has no state itself: whoever calls it keeps
    the numbers from one round to the next (in a run all members keep the same: :mod:`..rounds.remembering`).
    """

    @abstractmethod
    def fewest(self, n: int) -> int:
        """Of n rows at least so many are chosen."""

    @abstractmethod
    def matrix(self, gram: Floats, scores: Floats) -> Floats:
        """(q, n), one nonzero in each row at most: the rows that the next stage gets, by what is remembered (n,).
        ``gram`` (n, n) as for a rule."""

    @abstractmethod
    def learn(self, gram: Floats, scores: Floats) -> Floats:
        """What is remembered (n,) after this round, of ``scores`` (n,) before it."""


def tolerance(stage: Stage, n: int, f: int, least: int, why: str) -> None:
    """Raises :class:`ConfigError` unless ``n`` is at least ``least``."""
    if n < least:
        raise ConfigError(
            f"{stage.name}: f = {f} of {n} vectors cannot be tolerated: {why}, so at least {least} vectors"
        )


def majority(stage: Stage, n: int, f: int) -> None:
    """Of ``n`` rows more than half are honest: n > 2 f."""
    tolerance(stage, n, f, 2 * f + 1, "n > 2 f")


def count(instance: object, attribute: attrs.Attribute[Any], value: int) -> None:
    """Attrs validator: a number of members."""
    if not 0 <= value <= 1 << 16:
        raise ValueError(f"{attribute.name} must be 0 or more, got {value}")


def positive(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: above zero."""
    if not value > 0:
        raise ValueError(f"{attribute.name} must be above 0, got {value}")


def not_negative(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    """Attrs validator: zero or above."""
    if not value >= 0:
        raise ValueError(f"{attribute.name} must be 0 or above, got {value}")


def one_of(*known: str) -> Any:
    """Attrs validator: one of these words."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: str) -> None:
        if value not in known:
            raise ValueError(f"{attribute.name} is one of {', '.join(known)}, got {value!r}")

    return check
