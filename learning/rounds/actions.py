"""What the sans-IO cores of a round ask their driver to do."""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId
from .messages import Accepted, Commit, CommitRecord, Message


@attrs.frozen
class Send:
    """Deliver ``message`` to ``to``, in order with earlier ones; ``to`` may be ourselves."""

    to: PeerId
    message: Message


@attrs.frozen
class Push:
    """Send our contribution's elements ``start..stop`` to their owner (ourselves: just keep them)."""

    owner: PeerId
    start: int
    stop: int


@attrs.frozen
class Circulate:
    """Add our contribution to the sum of slice ``index`` that came round the ring, if we are not the first, and pass it
    on to ``to`` (ourselves: the slice is ours, say when both are here)."""

    to: PeerId
    attempt: int
    epoch: int
    index: int


@attrs.frozen
class Combine:
    """Combine exactly ``members`` with ``weights``, in this order, for the slices ``indices`` that we own.

    ``decision``: the coefficients that the leader has sent, for rules that have any.
    """

    attempt: int
    epoch: int
    members: tuple[PeerId, ...]
    weights: tuple[int, ...]
    indices: tuple[int, ...]
    decision: bytes = b""


@attrs.frozen
class Measure:
    """Compute the inner products of ``members``, in this order, over the slices ``indices`` that we own."""

    attempt: int
    epoch: int
    members: tuple[PeerId, ...]
    indices: tuple[int, ...]


@attrs.frozen
class Weigh:
    """Decide from the owners' inner products ``parts`` of so many members (leader). ``scores``: what the run remembers
    of each of them, see :mod:`.remembering`."""

    attempt: int
    epoch: int
    members: int
    parts: tuple[bytes, ...]
    scores: tuple[int, ...] = ()


@attrs.frozen
class Check:
    """Compare what the leader decided, ``decision``, with what we decide from the same ``parts`` and ``scores``."""

    attempt: int
    epoch: int
    members: int
    parts: tuple[bytes, ...]
    decision: bytes
    scores: tuple[int, ...] = ()


@attrs.frozen
class Assess:
    """Compare the work of ``trial``, held in full, with our combined slices ``indices``."""

    attempt: int
    epoch: int
    trial: tuple[PeerId, ...]
    indices: tuple[int, ...]


@attrs.frozen
class Share:
    """Send combined slice ``index`` to ``receiver``."""

    receiver: PeerId
    attempt: int
    epoch: int
    index: int


@attrs.frozen
class Pull:
    """Get combined slice ``index`` from ``holder``."""

    holder: PeerId
    attempt: int
    epoch: int
    index: int


@attrs.frozen
class Examine:
    """The result is here: look at what its owners have signed, and at some of what they combined."""

    attempt: int
    epoch: int


@attrs.frozen
class Look:
    """Look at part ``number`` of slice ``index``, where ``accuser`` says that its owner lied."""

    attempt: int
    epoch: int
    index: int
    number: int
    accuser: PeerId


@attrs.frozen
class Fingerprint:
    """Compute the result's fingerprint with ``algorithm`` under a key from ``nonces`` (leader)."""

    attempt: int
    epoch: int
    nonces: tuple[bytes, ...]
    algorithm: str


@attrs.frozen
class Prepare:
    """Begin to compute what a proposal will be compared with: our result's fingerprint."""

    nonces: tuple[bytes, ...]
    algorithm: str


@attrs.frozen
class Verify:
    """Check that our result has the record's fingerprint; get the result from ``holders`` first if need be."""

    attempt: int
    record: CommitRecord
    holders: tuple[PeerId, ...]


@attrs.frozen
class Persist:
    """Store promise and accept durably before any later action of the same batch is carried out."""

    promised: int
    accepted: Accepted | None


@attrs.frozen
class Promise:
    """Our voter promises ``attempt``, durably, before any later action of the same batch is carried out.

    A leader that crashes after a proposal can then never come back and propose something else at the same ballot.
    """

    attempt: int


@attrs.frozen
class Done:
    """The round is decided."""

    commit: Commit


@attrs.frozen
class Note:
    """Something worth an event: ``phase`` of the round, ``what`` in a word, ``detail`` for people."""

    phase: str
    what: str
    detail: str = ""
    peer: PeerId | None = None


Action = (
    Send
    | Push
    | Circulate
    | Combine
    | Measure
    | Weigh
    | Check
    | Assess
    | Share
    | Pull
    | Examine
    | Look
    | Fingerprint
    | Prepare
    | Verify
    | Persist
    | Promise
    | Done
    | Note
)


@attrs.frozen
class Pace:
    """The waits of one round, seconds; computed by the driver from measured links (transport/deadlines.py).

    ``grace``: stragglers are waited for this long after a quorum is ready. ``suspect``: silence after which
    a leader is suspected. ``scatter``, ``gather``: a phase of bulk transfers. ``accept``: the wait for the
    last accepts once a quorum has accepted.
    """

    grace: float
    suspect: float
    scatter: float
    gather: float
    accept: float
