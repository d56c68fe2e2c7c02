"""What is published in the DHT and read from it: signed records and provider announcements, stored and renewed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import trio

from ...transport.address import SignedPeerRecord
from ...transport.errors import DecodeError, Overloaded, PeerUnreachable, ProtocolMisuse, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Method
from . import defaults, messages
from .keys import digest, node_key, record_key, to_bytes, topic_key
from .lookup import Lookup
from .lookup_run import Reply
from .records import Announcement, SignedRecord, Validator
from .region import SPACE, crowded, in_region, region_targets
from .store import Place, Store
from .walk import Walker

log = logging.getLogger(__name__)

Q = TypeVar("Q")
R = TypeVar("R")


@attrs.define(eq=False)
class Published:
    """Something of ours that is renewed: when next (``now`` seconds), and how many contacts we had the last time."""

    due: float
    among: int = 0

    def is_due(self, now: float, contacts: int) -> bool:
        """Also when the swarm we see has doubled: the peers now closest have not heard of it."""
        return now >= self.due or contacts >= 2 * max(1, self.among)


class Values:
    """Stores at, and reads from, the peers that ``walker`` finds; keeps what we published alive."""

    def __init__(self, walker: Walker, store: Store, validators: Mapping[str, Validator], *, serve: bool) -> None:
        self._walker, self.store, self._validators, self._serve = walker, store, validators, serve
        self.endpoint, self.host, self.table = walker.endpoint, walker.host, walker.table
        self._own: dict[Place, tuple[SignedRecord, Published]] = {}
        self._provided: dict[bytes, tuple[float, Published]] = {}
        self._issued = 0

    def own(self) -> list[tuple[SignedRecord, Published]]:
        """Our own records, which are published again until they expire."""
        return list(self._own.values())

    def restore(self, record: SignedRecord) -> None:
        """Publish one of our own records again, as it was in an earlier life."""
        self._own[record.namespace, record.key] = (record, Published(self.host.now()))

    # -- records ---------------------------------------------------------------------------------------------

    async def put(self, record: SignedRecord) -> int:
        """Store ``record`` at the k peers closest to it, and here. Returns how many other peers stored it.

        Our own records are published again until they expire. Alone: kept here, returns 0. Raises
        :class:`ProtocolMisuse` for a record that breaks the rules, :class:`RemoteRefused` (``stale``) when a newer
        one is known, another :class:`RemoteError` when nobody stored it.
        """
        wall = self.host.wall()
        try:
            record.check(wall, self._validators)
        except DecodeError as error:
            raise ProtocolMisuse(f"cannot publish: {error.message}") from None
        verdict = self.store.put(record, wall)
        if verdict.code == "stale":
            raise RemoteRefused(verdict.code, verdict.reason)
        published = Published(self.host.now())
        if record.author == self.endpoint.peer_id:
            self._own[record.namespace, record.key] = (record, published)
        return await self._publish(record, published)

    async def _publish(self, record: SignedRecord, published: Published) -> int:
        self._renewed(published, defaults.REPLICATE_INTERVAL)
        return await self._store_at_closest(record.place, messages.PUT, messages.PutRecord(record, self._serve))

    async def _store_at_closest(self, place: int, method: Method[Any, messages.Stored], request: Any) -> int:
        """Find the peers closest to ``place`` on disjoint paths and ask them to store; at least one must.

        Where more peers crowd the place than chance puts there, those of its whole region are asked as well.
        """
        if not len(self.table):
            return 0
        # That a peer is there shows when it stores: only the very closest are asked before who is near, and those of
        # them that are near enough to hold it are asked both at once.
        k = self.table.k
        holders: dict[PeerId, None] = {}
        refused: dict[PeerId, RemoteError] = {}
        find, both = messages.Find(to_bytes(place), self._serve), attrs.evolve(request, closer=True)
        reach = self._reach(place)

        async def ask(peer: PeerId, _: Lookup) -> Reply:
            if node_key(peer) ^ place <= reach:
                try:
                    closer = (await self._walker.ask(peer, method, both)).closer
                    holders[peer] = None
                    return Reply(closer)
                except RemoteRefused as error:
                    refused[peer] = error
            return Reply((await self._walker.ask(peer, messages.FIND, find)).closer)

        few = self._few_peers()
        lookup = await self._walker.walk(
            place,
            ask,
            paths=1 if few else defaults.CAREFUL_PATHS,
            settled=defaults.WRITE_SETTLED_FEW if few else defaults.WRITE_SETTLED,
        )
        done = [peer for peer in lookup.ranked(k) if peer in holders or peer in refused]
        left = [peer for peer in lookup.ranked(2 * k) if peer not in holders and peer not in refused]
        stored, errors = await self._walker.ask_all(left, method, request, n=k - len(done))
        stored, errors = stored + len(holders), {**refused, **errors}
        if await self._is_crowded(lookup):
            region = [peer for peer in await self._region(place) if peer not in lookup.ranked(k)]
            more, refusals = await self._walker.ask_all(region, method, request)
            stored, errors = stored + more, {**errors, **refusals}
        if not stored:
            for error in errors.values():
                if isinstance(error, RemoteRefused):
                    raise error
            attempts = tuple((peer.short, error.message) for peer, error in errors.items())
            raise PeerUnreachable("none of the known peers stored it", attempts=attempts)
        return stored

    def _few_peers(self) -> bool:
        """Where there are hardly more peers than k, all paths meet the same, and most of those who store are known."""
        size, k = self._walker.size.value, self.table.k
        return size is not None and size <= 2 * k and len(self.table) <= 2 * k

    def _reach(self, place: int) -> int:
        """Within that distance a peer is probably one of the k closest to ``place``; -1 while that is not known."""
        size, k = self._walker.size.value, self.table.k
        known = self.table.closest(place, k)
        if size is None or len(known) < k:
            return -1
        # Twice what is expected, as the size is an estimate: a copy too far away does no harm, and it expires.
        return min(known[-1].key ^ place, int(2 * k / size * SPACE))

    def _holders_within(self) -> int:
        """How far from a place the last of the k closest to it is expected; -1 while that is not known."""
        size = self._walker.size.value
        return -1 if size is None else int(min(1.0, self.table.k / size) * SPACE)

    async def _is_crowded(self, lookup: Lookup) -> bool:
        distances = [node_key(peer) ^ lookup.target for peer in lookup.ranked(self.table.k)]
        if not crowded(distances, self._walker.size.value, self.table.k)[0]:
            return False
        await self._walker.measure()
        decision, reason = crowded(distances, self._walker.size.value, self.table.k)
        if decision:
            self._walker.counters.crowded += 1
            log.info("the place %064x is crowded: %s", lookup.target, reason)
        return decision

    async def _region(self, place: int) -> list[PeerId]:
        """The peers of the region of ``place`` beside those that crowd it, closest first."""
        size, k = self._walker.size.value, self.table.k
        if size is None:
            return []
        found: dict[PeerId, int] = {}
        for target in region_targets(place, size, k, self.host.random):
            for peer in (await self._walker.find(target, paths=defaults.CAREFUL_PATHS)).closest:
                distance = node_key(peer) ^ place
                if in_region(distance, size, k):
                    found[peer] = distance
        return sorted(found, key=lambda peer: found[peer])

    async def get(self, namespace: str, key: bytes, *, paths: int = 1, thorough: bool = True) -> SignedRecord | None:
        """The newest valid record that was found, or None.

        A record under its own hash is settled by one holder, any other by READ_QUORUM of them. Holders that
        showed an older one are given the newest. ``paths``: disjoint paths of the lookup. ``thorough``: what is not
        found is looked for again on disjoint paths, and in the whole region where the place is crowded: few liars can
        hide it from one lookup. Raises :class:`ProtocolMisuse` for a namespace we do not know.
        """
        if namespace not in self._validators:
            raise ProtocolMisuse(f"unknown namespace {namespace!r}")
        held = self.store.get(namespace, key, self.host.wall())
        found: dict[PeerId, SignedRecord] = {} if held is None else {self.endpoint.peer_id: held}
        if held is not None and digest(held.value) == key:
            return held
        place, settled = record_key(namespace, key), self._holders_within()
        brief = messages.GetRecord(namespace, key, self._serve, closer=False)
        whole = attrs.evolve(brief, closer=True)
        unnamed = False

        async def ask(peer: PeerId, lookup: Lookup) -> Reply:
            nonlocal unnamed
            # Names cost both sides a tenth of a lookup: of no use while the next holders are known already.
            known = lookup.knows(defaults.HOLDER_NAMES, settled)
            answer = await self._walker.ask(peer, messages.GET, brief if known else whole)
            record = answer.record
            if record is None:
                return Reply(answer.closer)
            unnamed |= known
            if (record.namespace, record.key) != (namespace, key):
                raise DecodeError("answered with another record", peer=peer.short)
            if not record.in_time(self.host.wall()):  # not the holder's fault
                return Reply(answer.closer)
            if record not in found.values():  # the same bytes as another holder's were checked a moment ago
                record.check(self.host.wall(), self._validators)
            if record.expires > self.host.wall():
                found[peer] = record
            missing = 0 if digest(record.value) == key else defaults.READ_QUORUM - len(found)
            return Reply(answer.closer, enough=missing <= 0, missing=missing if found else None)

        lookup = await self._walker.walk(place, ask, paths=paths)
        if unnamed and len(found) < defaults.READ_QUORUM and not any(digest(r.value) == key for r in found.values()):
            settled = -1  # those that seemed to be holders are not
            lookup = await self._walker.walk(place, ask, paths=paths)
        if not found and thorough:
            if len(lookup.closest) >= self.table.k:
                lookup = await self._walker.walk(place, ask, paths=defaults.CAREFUL_PATHS)
            if not found and await self._is_crowded(lookup):
                await self._ask_in_turn(await self._region(place), partial(ask, lookup=lookup))
        if not found:
            return None
        newest = next(iter(found.values()))
        for record in found.values():
            if record.newer_than(newest):
                newest = record
        behind = [peer for peer, record in found.items() if newest.newer_than(record) and peer != self.endpoint.peer_id]
        if behind:
            await self._walker.ask_all(behind, messages.PUT, messages.PutRecord(newest, self._serve))
        return newest

    async def _ask_in_turn(self, peers: Sequence[PeerId], ask: Callable[[PeerId], Awaitable[Reply]]) -> None:
        """Put a question to ``peers``, ALPHA_MAX at a time, until a reply is enough."""
        queue = list(reversed(peers))

        async def worker() -> None:
            while queue:
                try:
                    if (await ask(queue.pop())).enough:
                        queue.clear()
                        nursery.cancel_scope.cancel()
                except (RemoteError, Overloaded):
                    continue

        async with trio.open_nursery() as nursery:
            for _ in range(min(defaults.ALPHA_MAX, len(peers))):
                nursery.start_soon(worker)

    # -- providers -------------------------------------------------------------------------------------------

    async def provide(self, topic: bytes, *, ttl: float | None = None) -> int:
        """Announce ourselves as a provider of ``topic`` (a run, a blob) for ``ttl`` seconds, and again until
        :meth:`unprovide`. Returns how many other peers stored it; 0 when alone (announced once others come).

        Raises :class:`ProtocolMisuse` for a topic or lifetime out of bounds, :class:`RemoteError` when peers are
        known and none stored it; it is announced again even then.
        """
        ttl = defaults.PROVIDE_LIFETIME if ttl is None else ttl
        if not 0 < len(topic) <= defaults.MAX_KEY:
            raise ProtocolMisuse(f"a topic is 1 to {defaults.MAX_KEY} bytes, not {len(topic)}")
        if not 0 < ttl <= defaults.MAX_PROVIDE_LIFETIME:
            raise ProtocolMisuse(f"an announcement lives up to {defaults.MAX_PROVIDE_LIFETIME:.0f} s, not {ttl}")
        published = Published(self.host.now())
        self._provided[topic] = (ttl, published)
        return await self._provide(topic, ttl, published)

    async def _provide(self, topic: bytes, ttl: float, published: Published) -> int:
        self._renewed(published, ttl * defaults.RENEW_FRACTION)
        return await self._announce(topic, ttl, withdrawn=False)

    async def unprovide(self, topic: bytes) -> None:
        """Withdraw our announcement of ``topic``. Holders that cannot be reached list it until it expires."""
        provided = self._provided.pop(topic, None)
        if provided is None:
            return
        try:
            await self._announce(topic, provided[0], withdrawn=True)
        except RemoteError:
            # Nobody reachable holds it: it expires.
            return

    async def _announce(self, topic: bytes, ttl: float, *, withdrawn: bool) -> int:
        wall = self.host.wall()
        self._issued = max(self._issued + 1, int(wall * 1000))
        announcement = Announcement.sign(
            self.endpoint.identity,
            topic,
            self.endpoint.record(),
            issued=self._issued,
            expires=wall + ttl,
            withdrawn=withdrawn,
        )
        self.store.announce(announcement, wall)
        request = messages.PutProvider(announcement, self._serve)
        return await self._store_at_closest(topic_key(topic), messages.ANNOUNCE, request)

    async def providers(self, topic: bytes, *, limit: int = 20) -> list[SignedPeerRecord]:
        """Verified contacts of up to ``limit`` other peers that provide ``topic``, newest announcement first.

        The endpoint learns them: they can be called by their PeerId at once.
        """
        found: dict[PeerId, Announcement] = {}

        def take(announcements: Sequence[Announcement]) -> None:
            for announcement in announcements:
                held = found.get(announcement.provider)
                if held is None or held.issued < announcement.issued:
                    found[announcement.provider] = announcement

        wall = self.host.wall()
        take(self.store.providers(topic, wall))
        found.pop(self.endpoint.peer_id, None)
        request = messages.GetProviders(topic, min(limit + 1, defaults.MAX_PROVIDERS_ANSWER), self._serve)

        async def ask(peer: PeerId, _: Lookup) -> Reply:
            answer = await self._walker.ask(peer, messages.PROVIDERS, request)
            if len(answer.announcements) > request.limit:
                raise DecodeError(f"{len(answer.announcements)} providers for {request.limit}", peer=peer.short)
            live = []
            for announcement in answer.announcements:
                if announcement.topic != topic:
                    raise DecodeError("answered with providers of another topic", peer=peer.short)
                if announcement.in_time(wall):  # otherwise not the holder's fault
                    announcement.check(wall)
                    live += [announcement] if announcement.expires > wall and not announcement.withdrawn else []
            take([a for a in live if a.provider != self.endpoint.peer_id])
            return Reply(answer.closer, enough=len(found) >= limit)

        if len(found) < limit:
            await self._walker.walk(topic_key(topic), ask)
        wall = self.host.wall()  # a lookup may have taken a minute
        newest = [a for a in sorted(found.values(), key=lambda a: (-a.issued, a.provider)) if a.in_time(wall)][:limit]
        for announcement in newest:
            self._walker.learn(announcement.contact)
        return [announcement.contact for announcement in newest]

    def _renewed(self, published: Published, interval: float) -> None:
        """Next turn after ``interval`` seconds less up to a fifth, so that peers do not act in step."""
        published.due = self.host.now() + interval * self.host.random.uniform(0.8, 1.0)
        published.among = len(self.table)

    async def renew(self) -> None:
        """Publish again what is due."""
        wall, contacts = self.host.wall(), len(self.table)
        for place, (record, _) in list(self._own.items()):
            if record.expires <= wall:
                del self._own[place]
        jobs: list[Callable[[], Awaitable[int]]] = []
        for record, published in self._own.values():
            if contacts and published.is_due(self.host.now(), contacts):
                jobs.append(partial(self._publish, record, published))
        for topic, (ttl, published) in self._provided.items():
            if contacts and published.is_due(self.host.now(), contacts):
                jobs.append(partial(self._provide, topic, ttl, published))
        for job in jobs:
            try:
                await job()
            except RemoteError:
                # Nobody took it now; it comes up again when it is due.
                continue
