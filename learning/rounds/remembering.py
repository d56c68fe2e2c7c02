"""What a run remembers of its voters from round to round, where its rule does: pure functions over records.

The numbers belong to the agreement: each record holds those of its roster, every voter computes them from the same
inner products and refuses a record that says otherwise. So whoever joins, or comes back, has them with the head of the
chain, and no two members ever choose from different memories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ...transport.identity import PeerId
from ..aggregate.aggregator import Aggregator
from ..aggregate.base import Floats
from .messages import CommitRecord

#: Scores of -1 … 1 travel as whole numbers 0 … 2 SCALE.
SCALE = 1_000_000
#: What is remembered of somebody who is new.
NEW = SCALE
#: By how much one's own number may differ: float64 sums in another order round to the next one.
APART = 1

NOTHING: Mapping[PeerId, int] = MappingProxyType({})


def known(record: CommitRecord) -> Mapping[PeerId, int]:
    """What is remembered in the round after ``record``."""
    return dict(zip(record.roster, record.scores, strict=False))


def written(scores: Floats | None) -> tuple[int, ...]:
    """Scores (n,) as they travel; none of a rule that remembers nothing."""
    return () if scores is None else tuple(np.rint((np.clip(scores, -1.0, 1.0) + 1.0) * SCALE).astype(int).tolist())


def read(numbers: Sequence[int]) -> Floats:
    """The inverse of :func:`written`."""
    scores: Floats = np.asarray(numbers, dtype=np.float64) / SCALE - 1.0
    return scores


def of(members: Sequence[PeerId], remembered: Mapping[PeerId, int]) -> tuple[int, ...]:
    """Of ``members``, in their order."""
    return tuple(remembered.get(member, NEW) for member in members)


def carried(roster: Sequence[PeerId], remembered: Mapping[PeerId, int]) -> tuple[int, ...]:
    """For a record with this ``roster``: its numbers, or none where all of them are new."""
    numbers = of(roster, remembered)
    return numbers if any(number != NEW for number in numbers) else ()


def fault(record: CommitRecord, before: Mapping[PeerId, int], rule: Aggregator) -> str | None:
    """Why the numbers in ``record`` do not follow from those ``before``, as far as can be seen without the inner
    products of its members. None where they do, or may."""
    if not record.scores:
        changed = [peer for peer in record.roster if before.get(peer, NEW) != NEW and peer not in record.members]
        return f"it has forgotten what is known of {changed[0].short}" if changed else None
    if rule.memory is None:
        return f"it remembers what the run's rule, {rule}, does not"
    if len(record.scores) != len(record.roster) or max(record.scores) > 2 * SCALE:
        return "what it remembers is not of its roster"
    for peer, number in zip(record.roster, record.scores, strict=True):
        if peer not in record.members and number != before.get(peer, NEW):
            return f"it remembers something new of {peer.short}, which did not contribute"
    return None


def disputed(record: CommitRecord, learnt: Mapping[PeerId, int]) -> str | None:
    """Why ``record`` is not what we ``learnt`` of its members from their inner products; None where it is."""
    numbers = known(record)
    for peer in record.roster:
        if peer in learnt and abs(numbers.get(peer, NEW) - learnt[peer]) > APART:
            return f"it remembers {numbers.get(peer, NEW)} of {peer.short}, not {learnt[peer]}"
    return None
