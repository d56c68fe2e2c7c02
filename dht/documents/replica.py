"""One document as one node holds it: takes envelopes in any order, and comes to the same state everywhere (sans-IO)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import attrs

from ...transport.identity import Identity, PeerId
from . import defaults
from .envelope import Envelope, Evidence
from .policy import DocumentSpec

if TYPE_CHECKING:
    import pycrdt


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

    ``head``: id of the last one (32 zero bytes when none is held): two peers whose heads differ at the same ``next``
    hold a fork between them. ``frozen``: nothing from ``next`` on counts, and ``Replica.evidence(author)`` says why.
    """

    author: PeerId
    incarnation: int
    first: int
    next: int
    head: bytes
    frozen: bool


class Replica:
    """See the module. Not for use from two threads at once."""

    def __init__(
        self,
        spec: DocumentSpec,
        is_member: Callable[[PeerId], bool] = lambda peer: False,
        *,
        lifetime: float = defaults.LIFETIME,
    ) -> None:
        self.spec = spec

    # -- what others say ----------------------------------------------------------------------------------------

    def offer(self, envelope: Envelope, wall: float, now: float) -> Verdict:
        """Take ``envelope`` in if it counts. ``wall``: Unix seconds, for expiry; ``now``: monotonic, for rates.

        Never raises for what the envelope holds.
        """
        raise NotImplementedError

    def accuse(self, evidence: Evidence) -> Verdict:
        """Take in another peer's proof: from its point on, that incarnation of its author counts no more."""
        raise NotImplementedError

    def load(self, envelopes: Iterable[Envelope], evidence: Iterable[Evidence], wall: float) -> int:
        """Take in what our own store gave back, in its order; signatures are not checked again."""
        raise NotImplementedError

    # -- what we hold -------------------------------------------------------------------------------------------

    def summary(self) -> tuple[Range, ...]:
        """By author, ascending. Equal on all replicas that hold the same."""
        raise NotImplementedError

    def digest(self) -> bytes:
        """32 bytes that are equal when summaries are; cached."""
        raise NotImplementedError

    def range_of(self, author: PeerId) -> Range | None:
        raise NotImplementedError

    def envelopes(self, author: PeerId, incarnation: int, first: int, next: int) -> list[Envelope]:
        """The originals that we hold of counters ``first`` to ``next`` - 1, in order. Empty for another incarnation."""
        raise NotImplementedError

    def evidence(self, author: PeerId) -> Evidence | None:
        """Why ``author``'s range is frozen."""
        raise NotImplementedError

    def read(self) -> dict[PeerId, dict[str, Any]]:
        """Every author's root types by name, as plain Python (dict, list, str), for reading only. Sorted by author."""
        raise NotImplementedError

    def expire(self, wall: float) -> list[PeerId]:
        """Forget authors whose envelopes have expired; returns them (for ``DocumentStore.remove``)."""
        raise NotImplementedError

    def forget(self, author: PeerId) -> bool:
        """Drop all of ``author`` (who was banned)."""
        raise NotImplementedError

    # -- what we say: begin (once), then write → DocumentStore.append → offer -----------------------------------------

    def must_begin(self, author: PeerId) -> bool:
        """Whether ``author`` (ourselves) needs a fresh incarnation (``DocumentStore.reserve``, :meth:`begin`) to write."""
        raise NotImplementedError

    def begin(self, author: PeerId, incarnation: int) -> None:
        raise NotImplementedError

    def write(self, change: Callable[[pycrdt.Doc[Any]], None], identity: Identity, wall: float) -> Envelope | None:
        """Sign the change as the next envelope, or a snapshot when it is time for one. None: nothing changed.

        The replica is as before until the envelope, stored, is offered to it; until then there is no second write.
        """
        raise NotImplementedError

    def discard(self, draft: Envelope) -> None:
        """The draft could not be stored: never use its counter again (a fresh incarnation follows)."""
        raise NotImplementedError
