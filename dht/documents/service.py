"""Documents on the network: opens them, serves and calls the peers of their scopes, keeps what counts on disk."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import attrs
import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import ConfigError, LocalError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from . import defaults, messages
from .broadcast import Settings
from .conduct import Conduct, Fault
from .document import Document, DocumentInfo, Subscription
from .envelope import Envelope
from .exchange import Exchanged, reconcile, try_reconcile
from .keeper import Keeper
from .messages import (
    Compare,
    Compared,
    Fetched,
    FetchEnvelopes,
    FetchEvidence,
    FetchRanges,
    Followed,
    FollowPeer,
    Proofs,
    Pushed,
    PushEnvelopes,
    PushEvidence,
    TellEnvelopes,
    Told,
)
from .policy import DocumentSpec
from .reconcile import answer
from .replica import Replica
from .scope import OnEvidence, Scope, not_stored
from .store import DocumentStore

log = logging.getLogger(__name__)

__all__ = ["Document", "DocumentInfo", "Documents", "Exchanged", "Subscription"]


@attrs.define
class Counters:
    """What a node did for documents since it began."""

    served: int = 0
    refused: int = 0
    exchanges: int = 0
    #: Exchanges that found nothing different.
    equal: int = 0
    failed: int = 0


class Documents:
    """All documents of one node. ``store``: where they are kept; the caller closes it after :meth:`run` has ended.

    ``settings``: how envelopes spread; ``reconcile_every``: seconds between two exchanges of anti-entropy, in the mean.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        store: DocumentStore,
        *,
        settings: Settings | None = None,
        reconcile_every: float = defaults.RECONCILE_EVERY,
    ) -> None:
        self.endpoint, self.host = endpoint, endpoint.host
        #: A generator of our own, so that what others draw from the host's does not depend on what documents do.
        self.random = random.Random(endpoint.host.entropy(16))
        self.counters = Counters()
        self.conduct = Conduct(self._fault)
        self.keeper = Keeper(self.host, store)
        self._settings = settings or Settings()
        self._every = reconcile_every
        self._scopes: dict[bytes, Scope] = {}
        self._nursery: trio.Nursery | None = None
        self._left = False
        self._exchanging: dict[tuple[bytes, PeerId], None] = {}
        endpoint.serve(messages.PUSH, self._on_push)
        endpoint.serve(messages.TELL, self._on_tell)
        endpoint.serve(messages.FETCH, self._on_fetch)
        endpoint.serve(messages.FOLLOW, self._on_follow)
        endpoint.serve(messages.COMPARE, self._on_compare)
        endpoint.serve(messages.RANGES, self._on_ranges)
        endpoint.serve(messages.EVIDENCE, self._on_evidence)
        endpoint.serve(messages.ACCUSE, self._on_accuse)

    # -- for the application ------------------------------------------------------------------------------------------

    def join(self, scope: bytes, members: Callable[[], Sequence[PeerId]]) -> None:
        """Take part in ``scope``: ``members`` names who does, at any time; their contacts are the endpoint's."""
        if scope in self._scopes:
            self._scopes[scope].members = members
            return
        entered = Scope(self.endpoint, self.random, self.keeper, self.conduct, scope, members, self._settings)
        entered.catch_up = lambda peer: self._start_exchange(entered, peer)
        self._scopes[scope] = entered
        if self._nursery is not None:
            self._start(entered)

    async def open(
        self,
        spec: DocumentSpec,
        is_member: Callable[[PeerId], bool] = lambda peer: False,
        *,
        lifetime: float = defaults.LIFETIME,
    ) -> Document:
        """The document ``spec``, with what is on disk of it. ``is_member``: who may write where the policy says
        members.

        Its scope must have been joined. Raises :class:`ConfigError` when too many are open, and what the store raises.
        """
        scope = self._scopes.get(spec.scope)
        if scope is None:
            raise ConfigError(f"the document {spec.name!r} belongs to a scope that was not joined")
        if spec.id in scope.documents:
            return scope.documents[spec.id]
        if sum(len(other.documents) for other in self._scopes.values()) >= defaults.MAX_OPEN:
            raise ConfigError(f"more than {defaults.MAX_OPEN} documents are open")
        replica = Replica(spec, lambda peer: peer not in scope.banned and is_member(peer), lifetime=lifetime)
        loaded = await self.keeper.load(spec.id, self.endpoint.peer_id)
        replica.load(loaded.envelopes, loaded.evidence, self.host.wall(), loaded.own)
        self._tell_notices()
        if spec.id in scope.documents:  # opened by another task meanwhile
            return scope.documents[spec.id]
        document = Document(self.endpoint, self.keeper, replica, scope.written)
        scope.documents[spec.id] = document
        return document

    def documents(self) -> list[Document]:
        """All that are open, by scope and name."""
        found = [document for scope in self._scopes.values() for document in scope.documents.values()]
        return sorted(found, key=lambda document: (document.spec.scope, document.spec.name, document.id))

    def faults(self) -> dict[PeerId, dict[Fault, int]]:
        """What peers did wrong, by peer."""
        return self.conduct.faults()

    def banned(self, scope: bytes) -> dict[PeerId, str]:
        """Who is refused in ``scope``, and why."""
        return dict(self._scopes[scope].banned)

    async def ban(self, scope: bytes, author: PeerId, why: str) -> None:
        """Refuse ``author`` in ``scope`` from now on, and forget what it wrote there. ``why``: for people."""
        await self._scopes[scope].ban(author, why)

    def on_evidence(self, scope: bytes, hook: OnEvidence) -> None:
        """Have ``hook`` told of every proof against an author. It must not wait."""
        self._scopes[scope].on_evidence.append(hook)

    async def reconcile(self, scope: bytes, peer: PeerId) -> Exchanged:
        """One exchange with ``peer`` now. Raises :class:`RemoteError`."""
        return await reconcile(self._scopes[scope], peer)

    async def drained(self) -> None:
        """Return when nothing waits to be sent any more. The caller bounds the wait."""
        for scope in list(self._scopes.values()):
            await scope.drained()

    def neighbours(self, scope: bytes) -> tuple[PeerId, ...]:
        """Whom we follow and who follows us in ``scope``."""
        return self._scopes[scope].broadcast.neighbours()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Spread and take in until cancelled; then write what is left."""
        self._left = False
        try:
            async with trio.open_nursery() as self._nursery:
                for scope in self._scopes.values():
                    self._start(scope)
                self._nursery.start_soon(self._expire)
                task_status.started()
                await trio.sleep_forever()
        finally:
            # The endpoint may outlive us, and peers go on telling it of documents until they know that we are gone.
            self._nursery, self._left = None, True
            with trio.CancelScope(shield=True):
                await self.keeper.flush()

    def _start(self, scope: Scope) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(scope.run)
        self._nursery.start_soon(self._reconcile_now_and_then, scope)

    async def _reconcile_now_and_then(self, scope: Scope) -> None:
        """Anti-entropy: soon after the first others are known, then every so often with a neighbour or with anybody."""
        rng = self.random
        met = False
        while True:
            pause = self._every if met else min(self._every, defaults.MEMBERS_EVERY)
            await trio.sleep(pause * (0.5 + rng.random()))
            others = [peer for peer in scope.reachable if peer != self.endpoint.peer_id]
            near = [peer for peer in scope.broadcast.neighbours() if peer not in scope.banned]
            chosen = others if not near or (others and rng.random() < defaults.RECONCILE_FAR) else near
            if chosen:
                met = True
                await self._exchange(scope, rng.choice(chosen), own=True)

    def _start_exchange(self, scope: Scope, peer: PeerId) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._exchange, scope, peer)

    async def _exchange(self, scope: Scope, peer: PeerId, *, own: bool = False) -> None:
        """``own``: our choice, which those that others bring about by what they send must not stand in the way of."""
        key, until = (scope.name, peer), self.host.now() + defaults.EXCHANGE_TIME
        if key in self._exchanging or (len(self._exchanging) >= defaults.MAX_RECONCILING and not own):
            return
        self._exchanging[key] = None
        try:
            for _ in range(defaults.MAX_EXCHANGES):
                exchanged = await try_reconcile(scope, peer, until)
                self.counters.exchanges += 1
                self.counters.failed += exchanged is None
                self.counters.equal += exchanged is not None and exchanged.equal
                if exchanged is None or not exchanged.unfinished or self.host.now() >= until:
                    return
        finally:
            del self._exchanging[key]

    async def _expire(self) -> None:
        while True:
            await trio.sleep(defaults.EXPIRE_EVERY * (0.75 + 0.5 * self.random.random()))
            for document in self.documents():
                try:
                    await self._expire_in(document)
                except LocalError as error:
                    not_stored(error)
            try:
                await self.keeper.tidy()
            except LocalError as error:
                not_stored(error)
            self._tell_notices()

    async def _expire_in(self, document: Document) -> None:
        gone = document.replica.expire(self.host.wall())
        for author in gone:
            document.touch(author)
        if gone:
            await self.keeper.remove(document.id, gone)
        await document.renew()

    def _tell_notices(self) -> None:
        """What the store found damaged; peers bring it back by anti-entropy."""
        notices = self.keeper.store.notices
        while notices:
            log.warning("documents: %s", notices.pop(0))

    def _fault(self, peer: PeerId, fault: Fault, detail: str) -> None:
        log.info("documents: %s: %s: %s", peer.short, fault, detail)

    # -- serving ------------------------------------------------------------------------------------------------------

    def _admit(self, peer: PeerId, scope: bytes, items: int, limit: int) -> Scope:
        """The scope that a call is about. Raises :class:`RemoteRefused`."""
        now = self.host.now()
        allowed, code, reason = self.conduct.admit(peer, now)
        if not allowed:
            self.counters.refused += 1
            raise RemoteRefused(code, reason)
        self.counters.served += 1
        if items > limit:
            self.conduct.count(peer, Fault.NONSENSE, now, f"{items} things in one call")
            raise RemoteRefused("too-large", f"{items} things in one call, at most {limit} allowed")
        found = None if self._left else self._scopes.get(scope)
        if found is None:
            raise RemoteRefused("unknown-scope", "this peer takes no part in that")
        if peer in found.banned:
            raise RemoteRefused("banned", found.banned[peer])
        return found

    async def _on_push(self, call: Call[PushEnvelopes]) -> Pushed:
        scope = self._admit(call.peer, call.request.scope, len(call.request.envelopes), defaults.MAX_SENT)
        try:
            return Pushed(await scope.take(call.peer, call.request.envelopes))
        except LocalError as error:
            # Our disk, not its fault; it need not know more. Where we have left meanwhile there is none any more.
            if not self._left:
                log.warning("documents: %s", error)
            raise RemoteRefused("busy", "what was sent cannot be kept at present") from None

    async def _on_tell(self, call: Call[TellEnvelopes]) -> Told:
        scope = self._admit(call.peer, call.request.scope, len(call.request.adverts), defaults.MAX_ADVERTS)
        scope.perform(scope.broadcast.advertised(call.peer, call.request.adverts, self.host.now()))
        return Told()

    async def _on_fetch(self, call: Call[FetchEnvelopes]) -> Fetched:
        scope = self._admit(call.peer, call.request.scope, len(call.request.adverts), defaults.MAX_FETCH)
        found: list[Envelope] = []
        for advert in call.request.adverts:
            document = scope.documents.get(advert.document)
            if document is not None:
                held = document.replica.envelopes(advert.author, advert.incarnation, advert.counter, advert.counter + 1)
                found += [envelope for envelope in held if envelope.id == advert.id]
        return self._give(call.peer, found)

    async def _on_ranges(self, call: Call[FetchRanges]) -> Fetched:
        scope = self._admit(call.peer, call.request.scope, len(call.request.wants), defaults.MAX_FETCH)
        found: list[Envelope] = []
        for want in call.request.wants:
            document = scope.documents.get(want.document)
            if document is not None:
                found += document.replica.envelopes(want.author, want.incarnation, want.first, want.next)
        return self._give(call.peer, found)

    def _give(self, peer: PeerId, envelopes: Sequence[Envelope]) -> Fetched:
        """As many as fit in a message and as the peer may have now."""
        now, size = self.host.now(), 0
        given: list[Envelope] = []
        for envelope in envelopes[: defaults.MAX_SENT]:
            size += len(envelope.update) + defaults.ENVELOPE_OVERHEAD
            if given and size > defaults.MAX_SENT_BYTES:
                break
            if not self.conduct.may_have(peer, now):
                raise RemoteRefused("rate", f"more than {defaults.PEER_BYTES:.0f} bytes per second")
            given.append(envelope)
        self.conduct.gave(peer, size, now)
        return Fetched(tuple(given), more=len(given) < len(envelopes))

    async def _on_follow(self, call: Call[FollowPeer]) -> Followed:
        scope = self._admit(call.peer, call.request.scope, 1, 1)
        if call.request.leave:
            scope.broadcast.unfollowed(call.peer)
            return Followed()
        accepted, reason = scope.broadcast.followed(call.peer, call.request.feed, self.host.now())
        if not accepted:
            raise RemoteRefused("full", reason)
        return Followed()

    async def _on_compare(self, call: Call[Compare]) -> Compared:
        scope = self._admit(call.peer, call.request.scope, len(call.request.nodes), defaults.MAX_NODES)
        trees = {id: document.tree() for id, document in scope.documents.items()}
        return answer(trees, call.request.nodes)

    async def _on_evidence(self, call: Call[FetchEvidence]) -> Proofs:
        scope = self._admit(call.peer, call.request.scope, len(call.request.accused), defaults.MAX_PROOFS)
        found = []
        for accused in call.request.accused:
            document = scope.documents.get(accused.document)
            proof = document.replica.evidence(accused.author) if document is not None else None
            if proof is not None:
                found.append(proof)
        return Proofs(tuple(found))

    async def _on_accuse(self, call: Call[PushEvidence]) -> Pushed:
        scope = self._admit(call.peer, call.request.scope, len(call.request.evidence), defaults.MAX_PROOFS)
        return Pushed(await scope.accused(call.peer, call.request.evidence))
