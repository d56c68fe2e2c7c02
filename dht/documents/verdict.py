"""What became of an envelope that was offered, and what is held of an author."""

from __future__ import annotations

import enum

import attrs

from ...transport.identity import PeerId
from .envelope import Evidence


class Code(enum.StrEnum):
    """What became of an envelope that was offered."""

    KEPT = "kept"
    #: Held already: the same bytes again are nobody's fault.
    DUPLICATE = "duplicate"
    #: Earlier envelopes of its author are missing: reconcile, then offer it again.
    GAP = "gap"
    #: A snapshot or a newer incarnation of its author has replaced it.
    STALE = "stale"
    #: Its time is over, or its end too far away. Clocks differ: nobody's fault.
    EXPIRED = "expired"
    #: Its author contradicted itself before this counter: nothing that follows counts.
    FROZEN = "frozen"
    #: A bound is reached, of the document or of its author.
    FULL = "full"
    #: Too many of its author at once: offer it again later.
    RATE = "rate"
    #: The policy does not let its author write, as far as we know. Views of who is a member differ: nobody's fault.
    UNWELCOME = "unwelcome"
    #: Wrong signature, size or shape: an honest peer does not pass it on. The sender's fault.
    INVALID = "invalid"
    #: Signed, in its place, and not a change that an honest author makes. The author's fault.
    GARBAGE = "garbage"
    #: It contradicts an envelope we hold: see ``evidence``. The author's fault; whoever passed it on did us a service.
    FORK = "fork"


class Blame(enum.StrEnum):
    """Against whom a refusal counts."""

    NOBODY = "nobody"
    SENDER = "sender"
    AUTHOR = "author"


@attrs.frozen
class Verdict:
    """Whether an envelope was kept, why, whose fault it is if not, and the proof when there is one."""

    kept: bool
    code: Code
    reason: str
    blame: Blame = Blame.NOBODY
    evidence: Evidence | None = None


@attrs.frozen
class Range:
    """What is held of one author: envelopes ``first`` to ``next`` - 1 of its highest incarnation.

    ``head``: id of the last one. Two peers whose heads differ at the same ``next`` hold a fork between them.
    ``frozen``: the author contradicted itself, so nothing of this incarnation counts (``first``, ``next`` and ``head``
    are zero), and :meth:`Replica.evidence` says why.
    """

    author: PeerId
    incarnation: int
    first: int
    next: int
    head: bytes
    frozen: bool
