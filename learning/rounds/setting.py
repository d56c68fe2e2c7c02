"""What one round is about on one peer, and what its driver may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
from torch import Tensor

from ...transport.identity import PeerId
from ..aggregate.aggregator import Aggregator
from ..standing import Verdict
from .actions import Note, Pace
from .lies import Lie
from .messages import Accepted, CommitRecord, OnTrial
from .remembering import NOTHING
from .terms import Terms
from .weighing import MEAN


@attrs.frozen
class Setting:
    """What an instance is about and what it may use.

    ``save``: store (promised, accepted) durably; blocking. ``stored``: what an earlier life saved, None: nothing.
    ``rule``: what contributions are combined by.

    ``audit``: slices at which each peer looks in a round, in the mean; 0: nothing is signed. ``audited``: told whom a
    look was at, the verdict and why. ``slandered``: told who accused somebody falsely. ``proven``: told of a proof
    against an owner of a round of ``run``. ``expelled``: who lied in earlier rounds, and in what. ``heeded``: whether
    accusations of a peer are looked into. ``distort``: fault injection, what an owner that lies does to its slices.
    ``trial``: who is on trial in this round, in PeerId order. ``scores``: what the rule remembers of the voters.
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
    run: bytes = b""
    audit: float = 0.0
    audited: Callable[[PeerId, Verdict, str], None] = lambda peer, verdict, why: None
    slandered: Callable[[PeerId], None] = lambda peer: None
    proven: Callable[[Lie], None] = lambda lie: None
    expelled: Callable[[], Mapping[PeerId, str]] = dict
    heeded: Callable[[PeerId], bool] = lambda peer: True
    distort: Callable[[Tensor], None] | None = None
    trial: tuple[OnTrial, ...] = ()
    scores: Mapping[PeerId, int] = NOTHING
