"""What one round is about on one peer, and what its driver may use."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ...transport.identity import PeerId
from ..aggregate.aggregator import Aggregator
from .actions import Note, Pace
from .messages import Accepted, CommitRecord
from .terms import Terms
from .weighing import MEAN


@attrs.frozen
class Setting:
    """What an instance is about and what it may use.

    ``save``: store (promised, accepted) durably; blocking. ``stored``: what an earlier life saved, None: nothing.
    ``rule``: what contributions are combined by.
    """

    key: bytes
    round: int
    prev: bytes
    voters: tuple[PeerId, ...]
    terms: Terms
    pace: Pace
    check: Callable[[CommitRecord], str | None]
    max_length: int
    save: Callable[[int, Accepted | None], None]
    stored: tuple[int, Accepted | None] | None
    note: Callable[[Note], None]
    hold: Callable[[str], bool]
    rule: Aggregator = MEAN
