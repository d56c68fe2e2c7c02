"""Who pulls, over time, where the model goes: a stage with a memory. Ours; no paper has it as far as we know."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from .base import Floats, Remembering, count, majority
from .geometry import inverse, norms


@attrs.frozen
class Descent(Remembering):
    """All of the median length, without up to ``f`` members whose work has pointed against the result's direction.

    With u_i = x_i / ‖x_i‖ and m the median length, r = Σ min(‖x_j‖ / m, 1) u_j over those that were chosen, normalised:
    s_i ← s_i + (⟨u_i, r⟩ - s_i) / ``rounds``. Members with s_i < 0 are left out, of more than f the lowest.

    Why: a member whose loss L_i falls while the model moves by -η r has Σ_t η ⟨∇L_i, r⟩ ≈ L_i(start) - L_i(end) > 0,
    whatever its data are: its work agrees with the movement over time, though not in each round. In a single round, and
    where peers have different data, honest work and work against everybody look alike to any rule without a memory. A
    liar that is to stay must help as much as it harms; what it can do in one round is up to the length, which is that
    of others, and to the stages behind.
    """

    name: ClassVar[str] = "descent"

    f: int = attrs.field(validator=count)
    rounds: int = attrs.field(default=100)

    @rounds.validator
    def _rounds(self, attribute: object, value: int) -> None:
        if not 1 <= value <= 100_000:
            raise ValueError(f"rounds must be 1 to 100000, got {value}")

    def check(self, n: int) -> None:
        majority(self, n, self.f)

    def fewest(self, n: int) -> int:
        return n - self.f

    def matrix(self, gram: Floats, scores: Floats) -> Floats:
        lengths = norms(gram)
        return np.diag(inverse(lengths) * float(np.median(lengths)))[self._chosen(scores)]

    def learn(self, gram: Floats, scores: Floats) -> Floats:
        lengths = norms(gram)
        scale = inverse(lengths)
        # By length, up to the median: who has little left to learn has little to say of where the model goes.
        pull = np.minimum(lengths, float(np.median(lengths))) * self._chosen(scores)
        cosines = scale[:, None] * gram * scale
        length = np.sqrt(max(float(pull @ cosines @ pull), 0.0))
        if not length > 0:
            return scores  # no direction: nothing to learn from
        learnt: Floats = np.clip(scores + (cosines @ pull / length - scores) / self.rounds, -1.0, 1.0)
        return learnt

    def _chosen(self, scores: Floats) -> NDArray[np.bool_]:
        lowest = np.argsort(scores, kind="stable")[: self.f]
        kept = np.ones(len(scores), dtype=bool)
        kept[lowest] = scores[lowest] >= 0
        return kept
