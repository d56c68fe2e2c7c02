"""What a leader is told about the run around its round, and how many accepts decide one."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ...transport.identity import PeerId
from .messages import CommitRecord, quorum
from .payloads import REDUCE

#: Characters of a record's reason.
REASON_LENGTH = 400


@attrs.frozen
class Terms:
    """What a leader needs to know beyond the instance itself.

    ``draft`` builds the record of a round from members, samples, weights, roster, nonces and a reason (with
    an empty fingerprint); ``wishes`` and ``leaving`` are read when the roster is fixed. ``gossip``: the
    voters are a gossip group, which may go on with whoever is there. ``roster_limit``: peers in a roster. ``strict``:
    an accepted value is given up only when every voter agrees. ``admission``: rounds that a newcomer is on trial.
    """

    draft: Callable[
        [tuple[PeerId, ...], tuple[int, ...], tuple[int, ...], tuple[PeerId, ...], tuple[bytes, ...], str], CommitRecord
    ]
    wishes: Callable[[], tuple[PeerId, ...]]
    leaving: Callable[[], tuple[PeerId, ...]]
    gossip: bool
    roster_limit: int
    strict: bool = False
    admission: int = 0


def fill(
    base: Callable[[], CommitRecord],
    members: tuple[PeerId, ...],
    samples: tuple[int, ...],
    weights: tuple[int, ...],
    roster: tuple[PeerId, ...],
    nonces: tuple[bytes, ...],
    reason: str,
) -> CommitRecord:
    """A draft: ``base()`` knows where the round stands, its ``total`` is that of the commit before."""
    record = base()
    return attrs.evolve(
        record,
        kind=REDUCE,
        members=members,
        samples=samples,
        weights=weights,
        roster=roster,
        total=record.total + sum(samples),
        nonces=nonces,
        algorithm="",
        fingerprint=b"",
        trial=(),
        opinions=(),
        scores=(),
        payloads=(),
        reason=f"{record.reason}{reason}"[:REASON_LENGTH],
    )


def accepts_needed(voters: int, gossip: bool) -> int:
    """Accepts that decide a round: a majority of the voters; in a gossip group one, whoever is left there goes on."""
    return 1 if gossip else quorum(voters)
