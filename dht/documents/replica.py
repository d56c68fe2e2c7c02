"""One document as one node holds it: takes envelopes in any order, and comes to the same state everywhere (sans-IO)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import attrs
import msgpack

from ...transport.defaults import CLOCK_SKEW
from ...transport.errors import ConfigError, DecodeError, ProtocolMisuse
from ...transport.identity import Identity, PeerId
from . import defaults
from .chain import Chain, changed, compact, fresh
from .envelope import NOTHING, Envelope, Evidence, Header, client_id, digest
from .guard import Guard
from .guard_decoder import GuardError
from .policy import DocumentSpec
from .rates import Rates
from .verdict import Blame, Code, Range, Verdict

__all__ = ["Blame", "Code", "Range", "Replica", "Verdict"]

if TYPE_CHECKING:
    import pycrdt


@attrs.define(eq=False)
class _Author:
    """What is known of one author, of its highest incarnation. Either a chain or evidence that there is none."""

    incarnation: int
    chain: Chain | None = None
    evidence: Evidence | None = None
    #: What it signed as its next envelope, and the guard refused: another one at that counter is a fork.
    garbage: Header | None = None
    range: Range | None = None


@attrs.define(eq=False)
class _Own:
    """The incarnation in which we write: envelopes up to ``next`` - 1 may have been seen by others."""

    author: PeerId
    incarnation: int
    next: int
    draft: Envelope | None = None
    #: What we said before, to be said again in the new incarnation.
    before: Chain | None = None


class Replica:
    """See the module. Not for use from two threads at once.

    What counts, whatever the order in which it comes:

    - of an author's incarnations the highest;
    - of its envelopes those from the last snapshot on, each following on the one before;
    - nothing of an incarnation of which two envelopes contradict each other.

    So a replica's state only ever rises (incarnation, then frozen, then snapshot, then counter), and two that have
    exchanged all they hold are equal.
    """

    def __init__(
        self,
        spec: DocumentSpec,
        is_member: Callable[[PeerId], bool] = lambda peer: False,
        *,
        lifetime: float = defaults.LIFETIME,
    ) -> None:
        if not 0 < lifetime <= defaults.MAX_LIFETIME:
            raise ConfigError(f"envelopes live up to {defaults.MAX_LIFETIME:.0f} s, not {lifetime:g} s")
        self.spec = spec
        self._is_member = is_member
        self._lifetime = lifetime
        self._authors: dict[PeerId, _Author] = {}
        self._rates = Rates()
        self._size = 0
        self._own: _Own | None = None
        self._summary: tuple[Range, ...] | None = None
        self._digest: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of all updates held."""
        return self._size

    # -- what others say ----------------------------------------------------------------------------------------

    def offer(self, envelope: Envelope, wall: float, now: float) -> Verdict:
        """Take ``envelope`` in if it counts. ``wall``: Unix seconds, for expiry; ``now``: monotonic, for rates.

        Never raises for what the envelope holds.
        """
        verdict = self._offer(envelope, wall, now)
        own = self._own
        if own is not None and envelope is own.draft:
            own.draft, own.next = None, envelope.counter + 1 if verdict.kept else -1
            own.before = None if verdict.kept else own.before
        return verdict

    def _offer(self, envelope: Envelope, wall: float, now: float) -> Verdict:
        if envelope.document != self.spec.id:
            return Verdict(False, Code.INVALID, "an envelope of another document", Blame.SENDER)
        author = envelope.author
        held = self._authors.get(author)
        if held is not None:
            known = self._known(held, envelope)
            if known is not None:
                return known
        allowed, reason = self.spec.may_write(author, self._is_member)
        if not allowed:
            return Verdict(False, Code.UNWELCOME, f"{author.short} may not write in {self.spec.name!r}: {reason}")
        try:
            envelope.check()
        except DecodeError as error:
            return Verdict(False, Code.INVALID, error.message, Blame.SENDER)
        try:
            envelope.check_times(wall)
        except DecodeError as error:
            return Verdict(False, Code.EXPIRED, error.message)
        own = self._own
        ours = own is not None and envelope is own.draft
        if own is not None and own.draft is not None and author == own.author and not ours:
            return Verdict(False, Code.RATE, "we are writing ourselves at the moment")
        evidence = self._contradiction(held, envelope)
        if evidence is not None:
            self._freeze(evidence)
            reason = f"{author.short} signed two histories of {self.spec.name!r}, from envelope {evidence.point} on"
            return Verdict(False, Code.FORK, reason, Blame.AUTHOR, evidence)
        return self._place(held, envelope, lambda: self._rates.allow(author, len(envelope.update), now, always=ours))

    def accuse(self, evidence: Evidence, wall: float | None = None) -> Verdict:
        """Take in a proof: that incarnation of its author counts no more. With ``wall``, expired ones are refused."""
        author, incarnation = evidence.author, evidence.incarnation
        held = self._authors.get(author)
        if evidence.first.document != self.spec.id:
            return Verdict(False, Code.INVALID, "evidence about another document", Blame.SENDER)
        if held is not None and held.incarnation > incarnation:
            return Verdict(False, Code.STALE, f"a newer incarnation of {author.short} is held")
        if held is not None and held.incarnation == incarnation and held.evidence is not None:
            return Verdict(False, Code.DUPLICATE, f"it is known that {author.short} contradicted itself")
        allowed, reason = self.spec.may_write(author, self._is_member)
        if not allowed:
            return Verdict(False, Code.UNWELCOME, f"{author.short} may not write in {self.spec.name!r}: {reason}")
        if held is None and len(self._authors) >= defaults.MAX_AUTHORS:
            return Verdict(False, Code.FULL, f"{defaults.MAX_AUTHORS} authors are held")
        try:
            evidence.check()
        except DecodeError as error:
            return Verdict(False, Code.INVALID, error.message, Blame.SENDER)
        if wall is not None and not self._lives(evidence.expires, wall):
            return Verdict(False, Code.EXPIRED, "what the evidence is about has expired, or never would")
        self._freeze(evidence)
        reason = f"{author.short} signed two histories of {self.spec.name!r}, from envelope {evidence.point} on"
        return Verdict(True, Code.KEPT, reason, Blame.AUTHOR, evidence)

    def load(
        self, envelopes: Iterable[Envelope], evidence: Iterable[Evidence], wall: float, own: PeerId | None = None
    ) -> int:
        """Take in what our own store gave back, in its order; returns how many envelopes are held then.

        ``own`` (``Loaded.own``): we go on with this author's chain instead of beginning anew. Signatures are not
        checked again: the store's checksums say that these are the bytes that were checked once.
        """
        for proof in evidence:
            held = self._authors.get(proof.author)
            if held is None or held.incarnation <= proof.incarnation:
                self._freeze(proof)
        for envelope in envelopes:
            held = self._authors.get(envelope.author)
            if envelope.expires < wall - CLOCK_SKEW or (held is not None and self._known(held, envelope) is not None):
                continue
            found = self._contradiction(held, envelope)
            if found is not None:
                self._freeze(found)
            else:
                self._place(held, envelope, lambda: (True, ""))
        for known in self._authors.values():
            if known.chain is not None:
                known.chain.rest()
        mine = self._authors.get(own) if own is not None else None
        if own is not None and mine is not None and mine.chain is not None:
            self._own = _Own(own, mine.incarnation, mine.chain.next)
        return sum(len(known.chain.envelopes) for known in self._authors.values() if known.chain is not None)

    def _known(self, held: _Author, envelope: Envelope) -> Verdict | None:
        """What there is to say of ``envelope`` without looking at its signature."""
        short = envelope.author.short
        if envelope.incarnation < held.incarnation:
            return Verdict(False, Code.STALE, f"a newer incarnation of {short} is held")
        if envelope.incarnation > held.incarnation:
            return None
        if held.evidence is not None:
            return Verdict(False, Code.FROZEN, f"{short} contradicted itself in this incarnation")
        if held.garbage is not None and held.garbage.id == envelope.id:
            return Verdict(False, Code.GARBAGE, "it was refused before", Blame.SENDER)
        assert held.chain is not None
        if envelope.counter < held.chain.first:
            return Verdict(False, Code.STALE, f"snapshot {held.chain.first} of {short} has replaced it")
        same = held.chain.at(envelope.counter)
        if same is not None and same.id == envelope.id:
            return Verdict(False, Code.DUPLICATE, "it is held already")
        return None

    def _contradiction(self, held: _Author | None, envelope: Envelope) -> Evidence | None:
        """The proof of its author's fault, if ``envelope`` (authentic) contradicts what we hold."""
        if held is None or held.incarnation != envelope.incarnation or held.chain is None:
            return None
        chain = held.chain
        other = chain.at(envelope.counter)
        if other is not None:
            return Evidence.of(other.header, envelope.header)
        if envelope.counter == chain.next and envelope.previous != chain.head:
            return Evidence.of(chain.envelopes[-1].header, envelope.header)
        if held.garbage is not None and held.garbage.counter == envelope.counter:
            return Evidence.of(held.garbage, envelope.header)
        return None

    def _place(self, held: _Author | None, envelope: Envelope, allow: Callable[[], tuple[bool, str]]) -> Verdict:
        """Keep an authentic envelope that contradicts nothing, if it has a place and fits."""
        short, size = envelope.author.short, len(envelope.update)
        chain = held.chain if held is not None and held.incarnation == envelope.incarnation else None
        begins = envelope.snapshot or envelope.counter == 0
        if not begins and (chain is None or envelope.counter > chain.next):
            since = 0 if chain is None else chain.next
            return Verdict(False, Code.GAP, f"envelopes {since} to {envelope.counter - 1} of {short} are missing")
        if held is None and len(self._authors) >= defaults.MAX_AUTHORS:
            return Verdict(False, Code.FULL, f"{defaults.MAX_AUTHORS} authors are held")
        replaced = held.chain.size if begins and held is not None and held.chain is not None else 0
        if self._size + size - replaced > defaults.MAX_DOCUMENT_BYTES:
            return Verdict(False, Code.FULL, f"{self._size} bytes of this document are held")
        if chain is not None and not begins and len(chain.envelopes) >= defaults.MAX_ENVELOPES:
            reason = f"{short} wrote {defaults.MAX_ENVELOPES} envelopes without a snapshot"
            return Verdict(False, Code.FULL, reason, Blame.AUTHOR)
        if chain is not None and not begins and chain.size + size > defaults.MAX_AUTHOR_BYTES:
            reason = f"{short} wrote {defaults.MAX_AUTHOR_BYTES} bytes without a snapshot"
            return Verdict(False, Code.FULL, reason, Blame.AUTHOR)
        allowed, reason = allow()
        if not allowed:
            return Verdict(False, Code.RATE, reason)
        try:
            if begins or chain is None:
                chain = Chain.begin(envelope)
            else:
                chain.append(envelope)
        except GuardError as error:
            if held is not None and chain is not None and envelope.counter == chain.next:
                held.garbage = envelope.header
            return Verdict(False, Code.GARBAGE, error.message, Blame.AUTHOR)
        if held is None:
            held = self._authors[envelope.author] = _Author(envelope.incarnation)
        held.incarnation, held.chain = envelope.incarnation, chain
        held.evidence = held.garbage = None
        self._size += size - replaced
        self._touch(held)
        return Verdict(True, Code.KEPT, "")

    def _freeze(self, evidence: Evidence) -> None:
        author = evidence.author
        held = self._authors.get(author)
        if held is None:
            held = self._authors[author] = _Author(evidence.incarnation)
        if held.chain is not None:
            self._size -= held.chain.size
            if self._own is not None and author == self._own.author:
                self._own.before = held.chain  # a copy of our key or of our disk wrote as well: we say it anew
        held.incarnation, held.chain, held.evidence, held.garbage = evidence.incarnation, None, evidence, None
        self._touch(held)

    def _touch(self, held: _Author) -> None:
        held.range = self._summary = self._digest = None

    # -- what we hold -------------------------------------------------------------------------------------------

    def summary(self) -> tuple[Range, ...]:
        """By author, ascending. Equal on all replicas that hold the same."""
        if self._summary is None:
            authors = sorted(self._authors.items(), key=lambda item: item[0].key)
            self._summary = tuple(self._range(author, held) for author, held in authors)
        return self._summary

    @staticmethod
    def _range(author: PeerId, held: _Author) -> Range:
        if held.range is None:
            chain = held.chain
            if chain is None:
                held.range = Range(author, held.incarnation, 0, 0, NOTHING, True)
            else:
                held.range = Range(author, held.incarnation, chain.first, chain.next, chain.head, False)
        return held.range

    def digest(self) -> bytes:
        """32 bytes that are equal when summaries are; cached."""
        if self._digest is None:
            fields = [(r.author.key, r.incarnation, r.first, r.next, r.head, r.frozen) for r in self.summary()]
            packed: bytes = msgpack.packb(fields, use_bin_type=True)
            self._digest = digest(b"shoal document summary v1\0", packed)
        return self._digest

    def range_of(self, author: PeerId) -> Range | None:
        held = self._authors.get(author)
        return None if held is None else self._range(author, held)

    def envelopes(self, author: PeerId, incarnation: int, first: int, next: int) -> list[Envelope]:
        """The originals that we hold of counters ``first`` to ``next`` - 1, in order. Empty for another incarnation."""
        held = self._authors.get(author)
        if held is None or held.chain is None or held.incarnation != incarnation:
            return []
        start = held.chain.first
        return held.chain.envelopes[max(0, first - start) : max(0, next - start)]

    def evidence(self, author: PeerId) -> Evidence | None:
        """Why ``author``'s range is frozen."""
        held = self._authors.get(author)
        return None if held is None else held.evidence

    def read(self) -> dict[PeerId, dict[str, Any]]:
        """Every author's root types by name, as plain Python (dict, list, str), for reading only. Sorted by author."""
        return {held.author: self.view(held.author) for held in self.summary() if not held.frozen}

    def view(self, author: PeerId) -> dict[str, Any]:
        """One author's root types by name, as plain Python, for reading only; empty when there is nothing."""
        held = self._authors.get(author)
        return {} if held is None or held.chain is None else held.chain.view()

    def expire(self, wall: float) -> list[PeerId]:
        """Forget authors of whose envelopes one has expired; returns them (for ``DocumentStore.remove``)."""
        gone = [author for author, held in self._authors.items() if not self._lives(self._expires(held), wall)]
        for author in gone:
            self.forget(author)

        return sorted(gone)

    @staticmethod
    def _lives(expires: float, wall: float) -> bool:
        return wall - CLOCK_SKEW <= expires <= wall + defaults.MAX_LIFETIME + CLOCK_SKEW

    @staticmethod
    def _expires(held: _Author) -> float:
        if held.chain is not None:
            return held.chain.expires
        assert held.evidence is not None
        return held.evidence.expires

    def forget(self, author: PeerId) -> bool:
        """Drop all of ``author`` (who was banned). Returns whether there was anything."""
        held = self._authors.pop(author, None)
        if held is None:
            return False
        if held.chain is not None:
            self._size -= held.chain.size
        self._touch(held)
        return True

    # -- what we say: begin (once), then write → DocumentStore.append → offer ---------------------------------------

    def must_begin(self, author: PeerId) -> bool:
        """Whether ``author`` (ourselves) needs a fresh incarnation (``DocumentStore.reserve``, :meth:`begin`) to write.

        It does whenever an envelope of ours could be out there that we do not hold: what it says at its counter must
        never be contradicted. And when the chain is worn: only in a new incarnation are deleted keys forgotten.
        """
        own = self._own
        if own is None or own.author != author:
            return True
        held = self._authors.get(author)
        if own.next == 0:
            return held is not None and held.incarnation >= own.incarnation
        if held is None or held.incarnation != own.incarnation or held.chain is None:
            return True
        return held.garbage is not None or held.chain.next != own.next or held.chain.worn

    def begin(self, author: PeerId, incarnation: int) -> None:
        """We write in ``incarnation``, which is on disk and was never used; the first envelope says all anew."""
        held = self._authors.get(author)
        if held is not None and held.incarnation >= incarnation:
            raise ProtocolMisuse(f"incarnation {incarnation} of {author.short} is not new")
        before = held.chain if held is not None else None
        if before is None and self._own is not None and self._own.author == author:
            before = self._own.before
        self._own = _Own(author, incarnation, 0, before=before)

    def write(self, change: Callable[[pycrdt.Doc[Any]], None], identity: Identity, wall: float) -> Envelope | None:
        """Sign the change as the next envelope, or a snapshot when it is time for one. None: nothing changed.

        ``change`` gets a pycrdt document with what we wrote so far: maps, arrays and texts under names of its choice,
        nested as it likes. The replica is as before until the envelope, stored, is offered to it; until then there is
        no second write. Raises what ``change`` raises, :class:`ConfigError` when the policy does not let us write or
        the document would get too large or holds what the guard refuses, and :class:`ProtocolMisuse`.
        """
        return self._write(change, identity, wall, renew=False)

    def renewal_due(self, author: PeerId, wall: float) -> bool:
        """Whether what ``author`` (ourselves) wrote has lived half of its time: write, or :meth:`renew`."""
        held = self._authors.get(author)
        return held is not None and held.chain is not None and held.chain.expires < wall + self._lifetime / 2

    def renew(self, identity: Identity, wall: float) -> Envelope | None:
        """Sign what we wrote once more, as a snapshot with a new expiry; None without any. Like :meth:`write`."""
        if self.range_of(identity.peer_id) is None:
            return None
        return self._write(lambda doc: None, identity, wall, renew=True)

    def _write(
        self, change: Callable[[pycrdt.Doc[Any]], None], identity: Identity, wall: float, *, renew: bool
    ) -> Envelope | None:
        author, own = identity.peer_id, self._own
        allowed, reason = self.spec.may_write(author, self._is_member)
        if not allowed:
            raise ConfigError(f"we may not write in the document {self.spec.name!r}: {reason}")
        if own is None or self.must_begin(author):
            raise ProtocolMisuse("a fresh incarnation has to begin before we write")
        if own.draft is not None:
            raise ProtocolMisuse("the envelope written before was neither offered nor discarded")
        chain = self._authors[author].chain if own.next else None
        doc = chain.doc() if chain is not None else fresh(author, self.spec.id, own.incarnation, own.before)
        update = changed(doc, change)
        if update is None and not renew:
            return None
        snapshot = None
        if chain is None or renew:
            update = snapshot = doc.get_update()
        elif update is not None:
            snapshot = compact(chain, doc, update, wall, self._lifetime)
        assert update is not None
        body = update if snapshot is None else snapshot
        try:
            guard = chain.replayed() if chain is not None and snapshot is None else None
            (guard or Guard(client_id(author, self.spec.id, own.incarnation))).admit(body)
        except GuardError as error:
            raise ConfigError(f"others would refuse this change of the document {self.spec.name!r}: {error}") from None
        own.draft = Envelope.sign(
            identity,
            self.spec.id,
            body,
            incarnation=own.incarnation,
            counter=own.next,
            previous=NOTHING if chain is None else chain.head,
            expires=max(wall + self._lifetime, 0.0 if chain is None else chain.envelopes[-1].expires),
            snapshot=snapshot is not None,
        )
        return own.draft

    def discard(self, draft: Envelope) -> None:
        """The draft could not be stored: never use its counter again (a fresh incarnation follows)."""
        own = self._own
        if own is None or own.draft is not draft:
            raise ProtocolMisuse("that is not the envelope written last")
        own.draft, own.next = None, -1
