"""One exchange of anti-entropy over the network: compare, fetch what is missing, send what the other side lacks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import attrs

from ...transport.errors import LocalError, RemoteError, RemoteProtocolError
from ...transport.identity import PeerId
from . import defaults
from .conduct import Fault
from .messages import (
    ACCUSE,
    COMPARE,
    EVIDENCE,
    PUSH,
    RANGES,
    Accused,
    Compare,
    FetchEvidence,
    FetchRanges,
    PushEnvelopes,
    PushEvidence,
    Sent,
    Want,
)
from .reconcile import Comparison
from .scope import Scope, not_stored, some

log = logging.getLogger(__name__)


@attrs.frozen
class Exchanged:
    """What one exchange was. ``equal``: both sides held the same; ``unfinished``: something is left for the next
    one.
    """

    questions: int = 0
    received: int = 0
    sent: int = 0
    unfinished: bool = False

    @property
    def equal(self) -> bool:
        return not (self.received or self.sent or self.unfinished)


async def reconcile(scope: Scope, peer: PeerId, until: float = math.inf) -> Exchanged:
    """Come to hold, on both sides, what either of us holds of the documents of ``scope``; in bounded steps.

    From ``until`` on nothing more is asked, and it is unfinished.
    Raises :class:`RemoteError` when the peer fails; what has come by then is kept.
    """
    comparison = Comparison({id: document.tree() for id, document in scope.documents.items()})
    questions = 0
    now = scope.host.now
    while now() < until and (nodes := comparison.ask()):
        questions += 1
        compared = await scope.endpoint.call(
            peer, COMPARE, Compare(scope.name, nodes), timeout=defaults.ANSWER_DEADLINE
        )
        try:
            comparison.take(nodes, compared)
        except RemoteProtocolError as error:
            scope.blame(peer, Fault.NONSENSE, error.message)
            raise
    found = comparison.found
    # Proofs first: what comes after the point they prove need not travel.
    await _fetch_evidence(scope, peer, [doubt for doubt in found.doubts if doubt.author not in scope.banned])
    await _send_evidence(scope, peer, found.proofs)
    received = await _fetch(scope, peer, found.wants, until)
    sent = await _send(scope, peer, found.offers, until)
    return Exchanged(questions, received, sent, comparison.unfinished or now() >= until)


async def _fetch(scope: Scope, peer: PeerId, wants: Sequence[Want], until: float) -> int:
    received = 0
    left = _missing(scope, wants)
    while left and scope.host.now() < until:
        asked = left[: defaults.MAX_FETCH]
        fetched = await scope.endpoint.call(
            peer, RANGES, FetchRanges(scope.name, tuple(asked)), timeout=defaults.ANSWER_DEADLINE
        )
        wanted = {(want.document, want.author): want for want in asked}
        for envelope in fetched.envelopes:
            want = wanted.get((envelope.document, envelope.author))
            if want is None or envelope.incarnation < want.incarnation:
                scope.blame(peer, Fault.NONSENSE, "it sent envelopes that were not asked for")
                raise RemoteProtocolError("it sent envelopes that were not asked for", peer=peer.short)
        codes = await scope.take(peer, [Sent(envelope, -1) for envelope in fetched.envelopes])
        received += sum(code == "kept" for code in codes)
        if "limit" in codes:
            break
        now_left = _missing(scope, asked)
        # What was asked for and brought nothing is not asked for again in this exchange.
        going_on = [want for want in now_left if want not in asked] if fetched.more else []
        left = going_on + left[len(asked) :]
    return received


def _missing(scope: Scope, wants: Sequence[Want]) -> list[Want]:
    """What of ``wants`` we still lack."""
    left = []
    for want in wants:
        document = scope.documents.get(want.document)
        if document is None or want.author in scope.banned:
            continue
        if not scope.takes(scope.endpoint.peer_id, want.document, want.author):
            continue
        held = document.replica.range_of(want.author)
        first = want.first
        if held is not None:
            if held.frozen and held.incarnation == want.incarnation:
                continue
            if held.incarnation > want.incarnation:
                continue
            if held.incarnation == want.incarnation and want.next > held.next:
                first = max(first, held.next)
        left.append(attrs.evolve(want, first=first))
    return left


async def _send(scope: Scope, peer: PeerId, offers: Sequence[Want], until: float) -> int:
    sent = 0
    pending: list[Sent] = []
    for offer in offers:
        if not scope.takes(peer, offer.document, offer.author):
            continue
        document = scope.documents[offer.document]
        envelopes = document.replica.envelopes(offer.author, offer.incarnation, offer.first, offer.next)
        pending += [Sent(envelope, -1) for envelope in envelopes]
        while len(pending) >= defaults.MAX_SENT:
            done = await _send_some(scope, peer, pending)
            if not done or scope.host.now() >= until:
                return sent + done
            sent += done
    while pending and scope.host.now() < until:
        done = await _send_some(scope, peer, pending)
        if not done:
            break
        sent += done
    return sent


async def _send_some(scope: Scope, peer: PeerId, pending: list[Sent]) -> int:
    """Send the first of ``pending``; returns how many, 0 when the peer takes no more now."""
    batch = some(pending)
    del pending[: len(batch)]
    pushed = await scope.endpoint.call(
        peer, PUSH, PushEnvelopes(scope.name, tuple(batch)), timeout=defaults.ANSWER_DEADLINE
    )
    for item, code in zip(batch, pushed.codes, strict=False):
        if code in ("unwelcome", "expired", "full", "banned"):
            scope.pass_over(peer, item.envelope.document, item.envelope.author)
    return 0 if "limit" in pushed.codes else len(batch)


async def _fetch_evidence(scope: Scope, peer: PeerId, doubts: Sequence[Accused]) -> None:
    for at in range(0, len(doubts), defaults.MAX_PROOFS):
        asked = tuple(doubts[at : at + defaults.MAX_PROOFS])
        proofs = await scope.endpoint.call(
            peer, EVIDENCE, FetchEvidence(scope.name, asked), timeout=defaults.ANSWER_DEADLINE
        )
        await scope.accused(peer, proofs.evidence[: defaults.MAX_PROOFS])


async def _send_evidence(scope: Scope, peer: PeerId, proofs: Sequence[Accused]) -> None:
    held = [scope.documents[proof.document].replica.evidence(proof.author) for proof in proofs]
    evidence = tuple(proof for proof in held if proof is not None)
    for at in range(0, len(evidence), defaults.MAX_PROOFS):
        await scope.endpoint.call(
            peer,
            ACCUSE,
            PushEvidence(scope.name, evidence[at : at + defaults.MAX_PROOFS]),
            timeout=defaults.ANSWER_DEADLINE,
        )


async def try_reconcile(scope: Scope, peer: PeerId, until: float) -> Exchanged | None:
    """As :func:`reconcile`; None when the peer failed, which is then replaced as a partner."""
    try:
        return await reconcile(scope, peer, until)
    except RemoteError as error:
        scope.failed(peer, error)
    except LocalError as error:
        not_stored(error)
    return None
