"""The documents of one scope on the network: takes envelopes in, carries out what the broadcast core decides."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import attrs
import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import LocalError, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from . import defaults
from .broadcast import Action, Broadcast, Fetch, Follow, Push, Settings, Tell
from .conduct import Conduct, Fault
from .document import Document
from .envelope import Envelope, Evidence
from .keeper import Keeper
from .messages import (
    ACCUSE,
    FETCH,
    FOLLOW,
    PUSH,
    TELL,
    Advert,
    FetchEnvelopes,
    FollowPeer,
    PushEnvelopes,
    PushEvidence,
    Sent,
    TellEnvelopes,
)
from .replica import Blame, Code, Verdict

log = logging.getLogger(__name__)

#: Who is told of a proof: the document and the proof.
OnEvidence: TypeAlias = Callable[[Document, Evidence], None]

#: What a refused envelope counts as against its sender; what is not here counts against nobody.
_FAULTS = {
    Code.STALE: Fault.STALE,
    Code.EXPIRED: Fault.STALE,
    Code.FULL: Fault.TOO_MUCH,
    Code.RATE: Fault.TOO_MUCH,
    Code.UNWELCOME: Fault.FOREIGN,
    Code.INVALID: Fault.INVALID,
    Code.GARBAGE: Fault.GARBAGE,
}

#: What is refused for reasons that time may change: it is no use to ask for it, or to offer it, again at once.
_NOT_NOW = (Code.UNWELCOME, Code.EXPIRED, Code.FULL)


def advert_of(envelope: Envelope) -> Advert:
    return Advert(envelope.document, envelope.author, envelope.incarnation, envelope.counter, envelope.id)


@attrs.define(eq=False)
class _Outbox:
    """What waits to be sent to one peer; one call to it at a time."""

    pushes: list[Sent] = attrs.field(factory=list)
    tells: dict[bytes, Advert] = attrs.field(factory=dict)
    proofs: list[Evidence] = attrs.field(factory=list)

    def __bool__(self) -> bool:
        return bool(self.pushes or self.tells or self.proofs)


class Scope:
    """See the module. ``members``: who takes part, as far as the application knows."""

    def __init__(
        self,
        endpoint: Endpoint,
        rng: random.Random,
        keeper: Keeper,
        conduct: Conduct,
        name: bytes,
        members: Callable[[], Sequence[PeerId]],
        settings: Settings,
    ) -> None:
        self.name, self.members = name, members
        self.endpoint, self.host, self.keeper, self.conduct = endpoint, endpoint.host, keeper, conduct
        self.documents: dict[bytes, Document] = {}
        self.broadcast = Broadcast(endpoint.peer_id, rng, self.holds, settings)
        #: Authors that are refused, and why.
        self.banned: dict[PeerId, str] = {}
        self.on_evidence: list[OnEvidence] = []
        #: Asked to catch up with a peer: set by the service.
        self.catch_up: Callable[[PeerId], None] = lambda peer: None
        self.nursery: trio.Nursery | None = None
        self._outboxes: dict[PeerId, _Outbox] = {}
        self._early: dict[PeerId, list[tuple[PeerId, Envelope]]] = {}
        self._passed_over: dict[tuple[PeerId, bytes, PeerId], float] = {}
        self._emptied = trio.Event()
        self._wake = trio.Event()
        self._asleep_until = 0.0
        self._known: tuple[PeerId, ...] = ()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow members, and do what the broadcast core has to do in time; until cancelled."""
        async with trio.open_nursery() as self.nursery:
            try:
                look = self.host.now()
                while True:
                    now = self.host.now()
                    if now >= look:
                        look = now + defaults.MEMBERS_EVERY
                        self._look_at_members(now)
                    self.perform(self.broadcast.tick(now))
                    self._wake = trio.Event()
                    # Not sooner than a millisecond: what is due at once has just been done.
                    self._asleep_until = max(now + 0.001, min(look, self.broadcast.due(now)))
                    with trio.move_on_after(self._asleep_until - now):
                        await self._wake.wait()
            finally:
                self.nursery = None

    def _look_at_members(self, now: float) -> None:
        reachable = tuple(
            peer
            for peer in self.members()
            if peer not in self.banned and (self.endpoint.link(peer) or self.endpoint.contact(peer))
        )
        if reachable != self._known:
            self._known = reachable
            self.perform(self.broadcast.set_members(reachable, now))

    async def drained(self) -> None:
        """Return when nothing waits to be sent any more."""
        while self._outboxes:
            await self._emptied.wait()

    @property
    def reachable(self) -> tuple[PeerId, ...]:
        """Members that we may call, ourselves perhaps among them."""
        return self._known

    # -- taking in ----------------------------------------------------------------------------------------------------

    def holds(self, advert: Advert) -> bool:
        """Whether an envelope, or what replaced it, is here, or is not wanted here."""
        document = self.documents.get(advert.document)
        if document is None or advert.author in self.banned:
            return True
        held = document.replica.range_of(advert.author)
        if held is None or held.incarnation != advert.incarnation:
            return held is not None and held.incarnation > advert.incarnation
        if advert.counter >= held.next or held.frozen:
            return held.frozen
        found = document.replica.envelopes(advert.author, advert.incarnation, advert.counter, advert.counter + 1)
        # Another one at the same counter is wanted: it is the proof of a fork.
        return not found or found[0].id == advert.id

    async def take(self, peer: PeerId, sent: Sequence[Sent]) -> tuple[str, ...]:
        """Take in what ``peer`` sent; returns a code for each, when those that were kept are on disk.

        Raises :class:`LocalError` when they cannot be written.
        """
        codes: list[str] = []
        kept: list[Envelope] = []
        for number, item in enumerate(sent):
            if number % 16 == 15:
                await trio.lowlevel.checkpoint()
            code = self._take_one(peer, item.envelope, item.hop)
            codes.append(code)
            if code == Code.KEPT:
                kept.append(item.envelope)
                kept += self._take_early(item.envelope.author)
        if kept:
            await self.keeper.append(kept)
        return tuple(codes)

    def _take_one(self, peer: PeerId, envelope: Envelope, hop: int) -> str:
        now = self.host.now()
        allowed, _ = self.conduct.may_send(peer, len(envelope.update), now)
        if not allowed:
            return "limit"
        document = self.documents.get(envelope.document)
        if document is None:
            return "unknown"
        advert = advert_of(envelope)
        if envelope.author in self.banned:
            self.conduct.count(peer, Fault.FOREIGN, now, f"an envelope of {envelope.author.short}, who is banned")
            self.broadcast.refused(advert)
            return "banned"
        copies = self.broadcast.pushed(peer, advert)
        if copies:
            if copies > 1 and hop >= 0:
                self.blame(peer, Fault.REPLAY, f"an envelope of {envelope.author.short} for the {copies}. time")
            return Code.DUPLICATE
        verdict = document.replica.offer(envelope, self.host.wall(), now)
        if verdict.kept:
            document.touch(envelope.author)
            actions = self.broadcast.kept(advert, len(envelope.update), min(hop, 64), now, (peer,), wide=hop >= 0)
            self.perform(actions, envelope)
        elif verdict.code is Code.GAP:
            self.broadcast.refused(advert)  # it is here already, and waits for those before it
            self._keep_early(peer, envelope)
        else:
            self.broadcast.refused(advert)
            self.broadcast.redundant += verdict.code is Code.DUPLICATE
            self._refused(peer, document, envelope, verdict)
        return verdict.code

    def _refused(self, peer: PeerId, document: Document, envelope: Envelope, verdict: Verdict) -> None:
        if verdict.code in _NOT_NOW:
            self.pass_over(self.endpoint.peer_id, document.id, envelope.author)
        fault = _FAULTS.get(verdict.code)
        if verdict.code is Code.FORK and envelope.author == peer:
            fault = Fault.FORK
        if fault is not None:
            self.blame(peer, fault, verdict.reason)
        if verdict.blame is Blame.AUTHOR and envelope.author != peer:
            self.blame(envelope.author, Fault.FORK if verdict.code is Code.FORK else Fault.GARBAGE, verdict.reason)
        if verdict.evidence is not None:
            self._proven(document, verdict.evidence, None)

    def blame(self, peer: PeerId, fault: Fault, detail: str) -> None:
        if self.conduct.count(peer, fault, self.host.now(), detail):
            self.perform(self.broadcast.silent(peer, self.host.now()))

    def pass_over(self, by: PeerId, document: bytes, author: PeerId) -> None:
        """``by`` (ourselves or a peer) does not take what ``author`` wrote, for a while."""
        self._passed_over[by, document, author] = self.host.now() + defaults.PASS_OVER
        if len(self._passed_over) > defaults.REMEMBERED:
            del self._passed_over[next(iter(self._passed_over))]

    def takes(self, by: PeerId, document: bytes, author: PeerId) -> bool:
        """Whether there is no reason to believe that ``by`` would refuse what ``author`` wrote."""
        return self._passed_over.get((by, document, author), 0.0) <= self.host.now()

    # -- envelopes that came before those they follow on --------------------------------------------------------------

    def _keep_early(self, peer: PeerId, envelope: Envelope) -> None:
        """Envelopes may overtake each other on their ways. Wait a moment for the missing ones, then ask for them."""
        waiting = self._early.get(envelope.author)
        if waiting is None:
            if len(self._early) >= defaults.MAX_EARLY or self.nursery is None:
                self.catch_up(peer)
                return
            waiting = self._early[envelope.author] = []
            self.nursery.start_soon(self._await_missing, envelope.author)
        if len(waiting) < defaults.MAX_EARLY:
            waiting.append((peer, envelope))

    def _take_early(self, author: PeerId) -> list[Envelope]:
        """Something of ``author`` was kept: perhaps what waited for it can be kept too."""
        waiting = self._early.get(author)
        if not waiting:
            return []
        kept = []
        waiting.sort(key=lambda item: item[1].place)
        left = []
        for peer, envelope in waiting:
            document = self.documents[envelope.document]
            verdict = document.replica.offer(envelope, self.host.wall(), self.host.now())
            if verdict.code is Code.GAP:
                left.append((peer, envelope))
            elif verdict.kept:
                kept.append(envelope)
                document.touch(author)
                advert, now = advert_of(envelope), self.host.now()
                # Others have overtaken us meanwhile: whoever lacks it is told.
                self.perform(self.broadcast.kept(advert, len(envelope.update), -1, now, (peer,), wide=False), envelope)
            elif verdict.code is not Code.DUPLICATE:
                self._refused(peer, document, envelope, verdict)
        waiting[:] = left
        return kept

    async def _await_missing(self, author: PeerId) -> None:
        await trio.sleep(defaults.EARLY_PATIENCE)
        waiting = self._early.pop(author, [])
        for peer in dict.fromkeys(peer for peer, _ in waiting):
            self.catch_up(peer)

    # -- proofs -------------------------------------------------------------------------------------------------------

    async def accused(self, peer: PeerId, evidence: Iterable[Evidence]) -> tuple[str, ...]:
        """Take in proofs that ``peer`` sent."""
        codes = []
        for proof in evidence:
            document = self.documents.get(proof.first.document)
            if document is None or proof.author in self.banned:
                codes.append("unknown" if document is None else "banned")
                continue
            if not self.conduct.may_send(peer, 2 * defaults.ENVELOPE_OVERHEAD, self.host.now())[0]:
                codes.append("limit")
                continue
            verdict = document.replica.accuse(proof, self.host.wall())
            codes.append(verdict.code)
            if verdict.kept:
                self._proven(document, proof, peer)
                if proof.author == peer:
                    self.blame(peer, Fault.FORK, verdict.reason)
            elif verdict.blame is Blame.SENDER:
                self.blame(peer, Fault.FALSE_PROOF, verdict.reason)
        return tuple(codes)

    def _proven(self, document: Document, proof: Evidence, peer: PeerId | None) -> None:
        """A proof, which our replica has taken in: keep it, pass it on, tell the application."""
        document.touch(proof.author)
        log.warning("%s contradicts itself in the document %s", proof.author.short, document.spec.name)
        if self.nursery is not None:
            self.nursery.start_soon(self._keep_proof, proof)
            for neighbour in self.broadcast.neighbours():
                if neighbour != peer:
                    outbox = self._outbox(neighbour)
                    outbox.proofs.append(proof)
                    del outbox.proofs[: -defaults.MAX_PROOFS]
        for hook in self.on_evidence:
            hook(document, proof)

    async def _keep_proof(self, proof: Evidence) -> None:
        try:
            await self.keeper.accuse(proof)
        except LocalError as error:
            not_stored(error)

    # -- sending ------------------------------------------------------------------------------------------------------

    def written(self, document: Document, envelope: Envelope) -> None:
        """We wrote this."""
        advert, size = advert_of(envelope), len(envelope.update)
        self.perform(self.broadcast.kept(advert, size, 0, self.host.now()), envelope)

    def perform(self, actions: Sequence[Action], envelope: Envelope | None = None) -> None:
        """Carry out what the core decided; ``envelope`` is the one that a :class:`Push` is about."""
        if self.nursery is None:
            return
        for action in actions:
            match action:
                case Push(peer, _, hop):
                    assert envelope is not None
                    outbox = self._outbox(peer)
                    outbox.pushes.append(Sent(envelope, hop))
                    del outbox.pushes[: -defaults.MAX_OUTBOX]
                case Tell(peer, adverts):
                    outbox = self._outbox(peer)
                    outbox.tells.update((advert.id, advert) for advert in adverts)
                    while len(outbox.tells) > defaults.MAX_OUTBOX:
                        del outbox.tells[next(iter(outbox.tells))]
                case Fetch(peer, adverts):
                    self.nursery.start_soon(self._fetch, peer, adverts)
                case Follow(peer, feed, leave):
                    self.nursery.start_soon(self._follow, peer, feed, leave)
        if self.broadcast.due(self.host.now()) < self._asleep_until:
            self._wake.set()

    def _outbox(self, peer: PeerId) -> _Outbox:
        outbox = self._outboxes.get(peer)
        if outbox is None:
            assert self.nursery is not None
            if not self._outboxes:
                self._emptied = trio.Event()
            outbox = self._outboxes[peer] = _Outbox()
            self.nursery.start_soon(self._deliver, peer, outbox)
        return outbox

    async def _deliver(self, peer: PeerId, outbox: _Outbox) -> None:
        try:
            while outbox:
                if outbox.pushes:
                    batch = some(outbox.pushes)
                    del outbox.pushes[: len(batch)]
                    await self.endpoint.call(
                        peer, PUSH, PushEnvelopes(self.name, tuple(batch)), timeout=defaults.ANSWER_DEADLINE
                    )
                elif outbox.proofs:
                    proofs, outbox.proofs = tuple(outbox.proofs), []
                    await self.endpoint.call(
                        peer, ACCUSE, PushEvidence(self.name, proofs), timeout=defaults.ANSWER_DEADLINE
                    )
                else:
                    adverts = tuple(outbox.tells.values())[: defaults.MAX_ADVERTS]
                    for advert in adverts:
                        del outbox.tells[advert.id]
                    await self.endpoint.call(
                        peer, TELL, TellEnvelopes(self.name, adverts), timeout=defaults.ANSWER_DEADLINE
                    )
        except RemoteError as error:
            self.failed(peer, error)
        finally:
            del self._outboxes[peer]
            if not self._outboxes:
                self._emptied.set()

    def failed(self, peer: PeerId, error: RemoteError) -> None:
        """A call to ``peer`` failed: another one takes its place, unless it is only busy."""
        log.debug("documents: %s: %s", peer.short, error)
        if isinstance(error, RemoteRefused) and error.code in ("rate", "busy"):
            return
        self.perform(self.broadcast.silent(peer, self.host.now()))

    async def _follow(self, peer: PeerId, feed: bool, leave: bool) -> None:
        try:
            await self.endpoint.call(peer, FOLLOW, FollowPeer(self.name, feed, leave), timeout=defaults.ANSWER_DEADLINE)
        except RemoteError as error:
            if not leave:
                # Also when it has enough followers: then it is no partner for us.
                log.debug("documents: %s is not followed: %s", peer.short, error)
                self.perform(self.broadcast.silent(peer, self.host.now()))

    async def _fetch(self, peer: PeerId, adverts: tuple[Advert, ...]) -> None:
        failed: RemoteError | None = None
        given: dict[bytes, None] = {}
        try:
            fetched = await self.endpoint.call(
                peer, FETCH, FetchEnvelopes(self.name, adverts), timeout=defaults.ANSWER_DEADLINE
            )
        except RemoteError as error:
            failed = error
        else:
            asked = {advert.id: None for advert in adverts}
            if any(envelope.id not in asked for envelope in fetched.envelopes):
                self.blame(peer, Fault.NONSENSE, "it sent envelopes that were not asked for")
            given = dict.fromkeys(envelope.id for envelope in fetched.envelopes)
            try:
                await self.take(peer, [Sent(envelope, -1) for envelope in fetched.envelopes if envelope.id in asked])
            except LocalError as error:
                not_stored(error)
            if fetched.more and fetched.envelopes:
                rest = tuple(advert for advert in adverts if not self.holds(advert))
                if len(rest) < len(adverts):
                    await self._fetch(peer, rest)
                    return
        missing = sum(advert.id not in given and not self.holds(advert) for advert in adverts)
        self.perform(self.broadcast.fetched(peer, adverts, self.host.now())[0])
        if failed is not None:
            self.failed(peer, failed)
        elif missing:
            self.blame(peer, Fault.EMPTY_PROMISE, f"{missing} of {len(adverts)} envelopes that it told us of")

    # -- bans ---------------------------------------------------------------------------------------------------------

    async def ban(self, author: PeerId, why: str) -> None:
        """Refuse ``author`` from now on, forget what it wrote, and have nothing to do with it in this scope."""
        if author in self.banned:
            return
        self.banned[author] = why
        self._early.pop(author, None)
        self.perform(self.broadcast.silent(author, self.host.now()))
        self._look_at_members(self.host.now())
        for document in self.documents.values():
            if document.replica.forget(author):
                document.touch(author)
                try:
                    await self.keeper.remove(document.id, [author])
                except LocalError as error:
                    not_stored(error)  # at the next start it is read again, and the ban with it


def not_stored(error: LocalError) -> None:
    """Our disk fails. What is in memory counts all the same, and after a restart peers have it."""
    log.warning("documents: something could not be written: %s", error)


def some(sent: Sequence[Sent]) -> list[Sent]:
    """The first ones, as many as fit in a message; at least one."""
    batch: list[Sent] = []
    size = 0
    for item in sent[: defaults.MAX_SENT]:
        size += len(item.envelope.update) + defaults.ENVELOPE_OVERHEAD
        if batch and size > defaults.MAX_SENT_BYTES:
            break
        batch.append(item)
    return batch
