"""A rule with what stands before it: what a run names, what owners and members call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import attrs
import numpy as np
from torch import Tensor

from ...transport.errors import ProtocolMisuse
from .. import defaults
from .base import Before, CoordinateRule, Floats, GramRule, Remembering
from .linear import linear_combination, mixed
from .mean import Mean


@attrs.frozen(eq=False)
class Decision:
    """What the Gram matrix decides: ``matrix`` (q, p), float64, and ``quality`` (n,), 0 … 1, where the rule has one.
    ``scores`` (n,), -1 … 1: what is remembered of each after this round, where something is.

    One row: the result is that combination of the p rows. More: a coordinate-wise rule is applied to q combinations.
    Coefficients come from linear algebra, whose bits differ between machines: one member computes them, the others take
    its :attr:`data`, compare with their own (:meth:`differs`), and combine with the same bits.
    """

    matrix: Floats
    quality: Floats | None = None
    scores: Floats | None = None

    @property
    def data(self) -> bytes:
        """The matrix, row by row, little-endian float64."""
        return self.matrix.astype("<f8").tobytes()

    @classmethod
    def read(cls, data: bytes | memoryview, p: int) -> Self:
        """From :attr:`data`. ``ValueError`` for what is no matrix of p columns and 1 … p rows of numbers that float32
        holds."""
        size = memoryview(data).nbytes
        if p < 1 or size % (8 * p) or not 0 < size // (8 * p) <= p:
            raise ValueError(f"{size} bytes are no coefficients for {p} rows")
        matrix = np.frombuffer(data, dtype="<f8").astype(np.float64).reshape(-1, p)
        if not (np.abs(matrix) <= np.finfo(np.float32).max).all():
            raise ValueError("a coefficient is no finite float32")
        return cls(matrix)

    def differs(self, own: Decision, gram: Floats) -> str | None:
        """Why this is not what ``own``, computed from the same ``gram`` (p, p), says; None when it is within 1e-6.

        What counts is how far the resulting rows lie apart, relative to their length (to the largest of any row's, for
        rows that vanish); coefficients need not be unique where vectors depend on each other. Coefficients far larger
        than one's own, which would cancel and leave rounding errors, are refused too.
        """
        if self.matrix.shape != own.matrix.shape:
            return f"{self.matrix.shape[0]} rows of {self.matrix.shape[1]} coefficients, not {own.matrix.shape}"
        bound = defaults.COEFFICIENT_GROWTH * max(1.0, float(np.abs(own.matrix).max()))
        if float(np.abs(self.matrix).max()) > bound:
            return f"a coefficient beyond {bound:.3g}"
        apart = self.matrix - own.matrix
        lengths = np.sqrt(np.maximum(np.einsum("qi,ij,qj->q", own.matrix, gram, own.matrix), 0.0))
        distance = np.sqrt(np.maximum(np.einsum("qi,ij,qj->q", apart, gram, apart), 0.0))
        # Rounding alone in the products moves a distance by 1e-8 of the longest vector that takes part.
        slack = np.sqrt(np.finfo(np.float64).eps * len(gram)) * (np.abs(apart) @ np.sqrt(np.diag(gram)))
        worst = int(np.argmax(distance - defaults.COEFFICIENT_TOLERANCE * lengths - slack))
        if distance[worst] > defaults.COEFFICIENT_TOLERANCE * lengths[worst] + slack[worst]:
            return f"row {worst} is off by {distance[worst]:.3g}, its length is {lengths[worst]:.3g}"
        return None


@attrs.frozen
class Aggregator:
    """``memory``, if any, ``before`` in this order, then ``rule``. ``str`` gives the text that ``resolve`` takes.

    Owners of slices: :func:`~.linear.partial_gram` of the members' slices (with ``needs_reference``, the last result's
    slice as one more row behind them), summed over all owners; :meth:`decide`; :meth:`combine`. Without ``needs_gram``
    there is nothing to decide.
    """

    before: tuple[Before, ...]
    rule: CoordinateRule | GramRule
    memory: Remembering | None = None

    def __str__(self) -> str:
        stages = (*self.before, self.rule) if self.memory is None else (self.memory, *self.before, self.rule)
        return "+".join(str(stage) for stage in stages)

    @property
    def needs_gram(self) -> bool:
        return self.memory is not None or bool(self.before) or isinstance(self.rule, GramRule)

    @property
    def needs_reference(self) -> bool:
        """Whether the last result, where there is one, stands behind the contributions as one more row."""
        return isinstance(self.rule, GramRule) and self.rule.reference

    def pivot_of(self, p: int) -> int | None:
        """Of p rows the one whose inner products, with all squares, are all that :meth:`decide` looks at; None: it
        looks at more."""
        if self.before or self.memory is not None or not isinstance(self.rule, GramRule):
            return None
        return self.rule.pivot_of(p)

    @property
    def is_mean(self) -> bool:
        """Whether this is the mean and nothing else: the one rule to which weights matter."""
        return not self.needs_gram and isinstance(self.rule, Mean)

    def check(self, n: int) -> None:
        """Raises :class:`~shoal.transport.errors.ConfigError` when ``n`` contributions are too few."""
        if self.memory is not None:
            self.memory.check(n)
            n = self.memory.fewest(n)
        for stage in self.before:
            stage.check(n)
            n = stage.rows(n)
        self.rule.check(n)

    def decide(self, gram: Floats, n: int, seed: int = 0, scores: Floats | None = None) -> Decision:
        """From the Gram matrix (n, n) of n contributions, (n+1, n+1) with the last result; ``seed`` is the round's.
        ``scores`` (n,): what is remembered of their authors; None: nothing.

        A pure function; float64, some ms for n = 32. Raises :class:`~shoal.transport.errors.ConfigError` as
        :meth:`check`. The quality of rows that mix contributions is shared out by their part in them.
        """
        self.check(n)
        if len(gram) != n and not (self.needs_reference and len(gram) == n + 1):
            raise ProtocolMisuse(f"{self}: inner products of {len(gram)} rows, for {n} contributions")
        matrix, rows, last = np.eye(len(gram)), n, len(gram) - n
        quality: Floats | None = None
        learnt: Floats | None = None
        if self.memory is not None:
            scores = np.zeros(n) if scores is None else scores
            chosen, learnt = self.memory.matrix(gram[:n, :n], scores), self.memory.learn(gram[:n, :n], scores)
            quality = (chosen != 0).any(axis=0).astype(np.float64)
            matrix, rows = _beside(chosen, last), len(chosen)
        for stage in self.before:
            step = stage.matrix(_carried(gram, matrix)[:rows, :rows], seed)
            matrix, rows = _beside(step, last) @ matrix, len(step)
        if isinstance(self.rule, CoordinateRule):
            coefficients = self.rule.linear(rows)
            return Decision(
                _bounded(matrix if coefficients is None else coefficients[None, :] @ matrix), quality, learnt
            )
        mixes = bool(self.before) or self.memory is not None
        verdict = self.rule.decide(_carried(gram, matrix) if mixes else gram, rows)
        if verdict.quality is not None and mixes:
            parts = np.abs(matrix[:rows, :n])
            total = parts.sum(axis=0)
            quality = np.divide(verdict.quality @ parts, total, out=np.zeros(n), where=total > 0)
        elif verdict.quality is not None:
            quality = verdict.quality
        return Decision(_bounded(verdict.coefficients[None, :] @ matrix), quality, learnt)

    def combine(
        self,
        slices: Sequence[Tensor],
        decision: Decision | None,
        out: Tensor,
        weights: Sequence[float] | None = None,
    ) -> bool:
        """The result of one slice to ``out`` (d,), which is none of the ``slices`` (d,).

        ``slices`` in PeerId order, as for the Gram matrix; ``decision`` None where :attr:`needs_gram` is False. The
        same bits on every machine for the same decision, however the vectors are cut. False when a value is not finite,
        for rules without a decision (a Gram matrix shows it); ``out`` is anything then. Blocks: large slices belong on
        a thread.
        """
        p = len(slices)
        if decision is None:
            if self.needs_gram or isinstance(self.rule, GramRule):
                raise ProtocolMisuse(f"{self} needs a decision to combine")
            return self.rule.combine(slices, weights, out)
        if not self.needs_gram or decision.matrix.shape[1] != p or decision.matrix.shape[0] not in self._rows(p):
            raise ProtocolMisuse(f"{self}: a decision {decision.matrix.shape} for {p} rows")
        if isinstance(self.rule, GramRule) or self.rule.linear(p) is not None:
            linear_combination(slices, decision.matrix[0], out)
        else:
            for where, rows in mixed(slices, decision.matrix):
                self.rule.combine(rows, None, out[where])
        return True

    def _rows(self, n: int) -> set[int]:
        """How many rows the decision over ``n`` may have."""
        if isinstance(self.rule, GramRule) or self.rule.linear(n) is not None:
            return {1}
        counts = {n} if self.memory is None else set(range(self.memory.fewest(n), n + 1))
        for stage in self.before:
            counts = {stage.rows(count) for count in counts}
        return counts


#: The largest coefficient: float32 holds it.
_MOST = 1e37


def _bounded(matrix: Floats) -> Floats:
    """Coefficients that :meth:`Decision.read` takes. Rules that bring rows to a length have larger ones only for rows
    shorter than 1e-37 of it, which no honest member sends: without a bound one such row would end every round."""
    bounded: Floats = np.clip(matrix, -_MOST, _MOST)
    return bounded


def _beside(step: Floats, last: int) -> Floats:
    """``step`` (q, n) for the contributions; the last result, where it is there (``last`` 1), passes by."""
    q, n = step.shape
    whole = np.zeros((q + last, n + last))
    whole[:q, :n] = step
    whole[q:, n:] = np.eye(last)
    return whole


def _carried(gram: Floats, matrix: Floats) -> Floats:
    """The Gram matrix of rows that ``matrix`` makes: A K Aᵀ, symmetric to the bit."""
    whole = matrix @ gram @ matrix.T
    carried: Floats = (whole + whole.T) / 2.0
    return carried
