"""One peer of the DHT: finds peers, signed records and providers, and keeps what others entrust to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import attrs
import trio

from ...transport.address import Address, SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, Overloaded, PeerUnreachable, ProtocolMisuse, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Method
from ...transport.wire import pack, unpack
from . import defaults, messages
from .joining import reach
from .keys import digest, node_key, record_key, to_bytes, topic_key
from .lookup import Lookup
from .records import VALIDATORS, Announcement, SignedRecord, Validator
from .service import Counters, Service
from .store import Place, Store
from .table import RoutingTable
from .walk import Reply, Walker

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


@attrs.frozen
class Snapshot:
    """What survives a restart. Another ``version`` is refused."""

    version: int
    bootstrap: tuple[Address, ...]
    contacts: tuple[SignedPeerRecord, ...]
    own: tuple[SignedRecord, ...]
    store: bytes


class Dht:
    """The DHT of one endpoint. It answers others from construction on (unless ``serve`` is False);
    :meth:`run` keeps the table fresh and what we published alive.

    A peer that does not serve finds everything, but nobody lists it: no lookup leads to it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        serve: bool = True,
        validators: Mapping[str, Validator] = VALIDATORS,
        k: int = defaults.K,
    ) -> None:
        self.endpoint = endpoint
        self.host = endpoint.host
        self.table = RoutingTable(endpoint.peer_id, k=k)
        self.store = Store(self.table.key)
        self.counters = Counters()
        self._serve = serve
        self._validators = validators
        self._walker = Walker(endpoint, self.table, self.counters)
        self._bootstrap: dict[Address, None] = {}
        self._own: dict[Place, tuple[SignedRecord, Published]] = {}
        self._provided: dict[bytes, tuple[float, Published]] = {}
        self._issued = 0
        self._rejoin_due = 0.0
        self._wake = trio.Event()
        if serve:
            Service(endpoint, self.table, self.store, validators, self.counters, self._walker.heard)

    # -- joining ---------------------------------------------------------------------------------------------

    async def bootstrap(self, addresses: Sequence[Address] = (), peers: Sequence[SignedPeerRecord] = ()) -> int:
        """Get to know the swarm through ``addresses`` (whose peers are unknown), ``peers``, and a restored snapshot.

        Returns the number of peers in the table. Raises :class:`PeerUnreachable` with every attempt's reason when
        addresses or peers were given and nobody answered. All are remembered: :meth:`run` tries them again.
        Cancelling leaves what was found so far.
        """
        self._bootstrap.update(dict.fromkeys(addresses))
        given: list[PeerId] = []
        for record in peers:
            peer = record.open(-float("inf")).peer
            if peer != self.endpoint.peer_id:
                self._walker.remember(peer, record)
                given.append(peer)
        attempts = await reach(self.endpoint, self._walker, self._ping, self._foreign_addresses(), given)
        # A restored table: stop as soon as enough of it answers to find the rest by a lookup.
        remembered = [peer for peer in self._walker.lost if peer not in given]
        while remembered and len(self.table) < self.table.k:
            batch, remembered = remembered[: defaults.ALPHA_MAX], remembered[defaults.ALPHA_MAX :]
            again = [peer for peer in batch if peer in self._walker.lost]
            attempts += await reach(self.endpoint, self._walker, self._ping, [], again)
        if len(self.table):
            await self._find_neighbours()
        elif attempts and (addresses or peers):
            raise PeerUnreachable(
                "nobody there to join through",
                attempts=tuple((name, reason) for name, reason, _ in attempts),
                lasting=_is_lasting([(name, lasting) for name, _, lasting in attempts]),
            )
        self._wake.set()
        return len(self.table)

    def _foreign_addresses(self) -> list[Address]:
        """The bootstrap addresses that are not our own: a founder may be started with its own ticket."""
        own = self.endpoint.addresses()
        return [address for address in self._bootstrap if address not in own]

    async def _ping(self, peer: PeerId) -> None:
        pong = await self._walker.ask(peer, messages.PING, messages.Ping(self._serve))
        if pong.record.open(self.host.wall()).peer == peer:
            self._walker.learn(pong.record)
            self._walker.heard(peer)

    # -- peers -----------------------------------------------------------------------------------------------

    async def _find(
        self,
        target: int,
        *,
        paths: int = 1,
        wanted: PeerId | None = None,
        k: int | None = None,
        settled: int | None = None,
    ) -> Lookup:
        """Find the ``k`` (default: the table's) peers closest to ``target``.

        Learns the contact of ``wanted`` and ends when somebody has it.
        """
        request = messages.Find(to_bytes(target), self._serve)

        async def ask(peer: PeerId) -> Reply:
            closer = (await self._walker.ask(peer, messages.FIND, request)).closer
            if wanted is None:
                return Reply(closer)
            found = False
            for record in closer[: self.table.k]:
                opened = record.open(-float("inf"))
                if opened.peer == wanted and opened.expires > self.host.wall():
                    self._walker.learn(record)
                    found = True
            return Reply(closer, enough=found)

        return await self._walker.walk(target, ask, paths=paths, k=k, settled=settled)

    async def _find_neighbours(self) -> None:
        """Find the k peers closest to us: the near buckets are complete then."""
        closest = (await self._find(self.table.key)).closest
        everybody = len(closest) < self.table.k
        self.table.refreshed_near(None if everybody else node_key(closest[-1]), self.host.now())

    async def find_peer(self, peer: PeerId) -> SignedPeerRecord | None:
        """A valid contact of ``peer``: of its live link, else by a lookup. None when nobody asked knows it."""
        if peer == self.endpoint.peer_id:
            return self.endpoint.record()
        if self.endpoint.link(peer) is None:
            await self._find(node_key(peer), wanted=peer)
        record = self.endpoint.contact(peer)
        if record is None or record.open(-float("inf")).expires <= self.host.wall():
            return None
        return record

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

    async def _store_at_closest(self, place: int, method: Method[Q, R], request: Q) -> int:
        """Find the peers closest to ``place`` on disjoint paths and ask them to store; at least one must."""
        if not len(self.table):
            return 0
        # That a peer is there shows when it stores: only the very closest are asked before, who is near.
        lookup = await self._find(place, paths=defaults.WRITE_PATHS, settled=defaults.WRITE_SETTLED)
        k = self.table.k
        stored, errors = await self._walker.ask_closest(lookup.ranked(2 * k), k, method, request)
        if not stored:
            for error in errors.values():
                if isinstance(error, RemoteRefused):
                    raise error
            attempts = tuple((peer.short, error.message) for peer, error in errors.items())
            raise PeerUnreachable("none of the known peers stored it", attempts=attempts)
        return stored

    async def get(self, namespace: str, key: bytes) -> SignedRecord | None:
        """The newest valid record that was found, or None.

        A record under its own hash is settled by one holder, any other by READ_QUORUM of them. Holders that
        showed an older one are given the newest. Raises :class:`ProtocolMisuse` for a namespace we do not know.
        """
        if namespace not in self._validators:
            raise ProtocolMisuse(f"unknown namespace {namespace!r}")
        held = self.store.get(namespace, key, self.host.wall())
        found: list[tuple[PeerId, SignedRecord]] = [] if held is None else [(self.endpoint.peer_id, held)]
        if held is not None and digest(held.value) == key:
            return held
        request = messages.GetRecord(namespace, key, self._serve)

        async def ask(peer: PeerId) -> Reply:
            answer = await self._walker.ask(peer, messages.GET, request)
            record = answer.record
            if record is None:
                return Reply(answer.closer)
            if (record.namespace, record.key) != (namespace, key):
                raise DecodeError("answered with another record", peer=peer.short)
            record.check(self.host.wall(), self._validators)
            if record.expires > self.host.wall():
                found.append((peer, record))
            missing = 0 if digest(record.value) == key else defaults.READ_QUORUM - len(found)
            return Reply(answer.closer, enough=missing <= 0, missing=missing if found else None)

        await self._walker.walk(record_key(namespace, key), ask)
        if not found:
            return None
        newest = found[0][1]
        for _, record in found:
            if record.newer_than(newest):
                newest = record
        behind = [peer for peer, record in found if newest.newer_than(record) and peer != self.endpoint.peer_id]
        if behind:
            await self._walker.ask_all(behind, messages.PUT, messages.PutRecord(newest, self._serve))
        return newest

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

        async def ask(peer: PeerId) -> Reply:
            answer = await self._walker.ask(peer, messages.PROVIDERS, request)
            if len(answer.announcements) > request.limit:
                raise DecodeError(f"{len(answer.announcements)} providers for {request.limit}", peer=peer.short)
            for announcement in answer.announcements:
                if announcement.topic != topic:
                    raise DecodeError("answered with providers of another topic", peer=peer.short)
                announcement.check(wall)
            live = [a for a in answer.announcements if a.expires > wall and not a.withdrawn]
            take([a for a in live if a.provider != self.endpoint.peer_id])
            return Reply(answer.closer, enough=len(found) >= limit)

        if len(found) < limit:
            await self._walker.walk(topic_key(topic), ask)
        newest = sorted(found.values(), key=lambda a: (-a.issued, a.provider))[:limit]
        for announcement in newest:
            self._walker.learn(announcement.contact)
        return [announcement.contact for announcement in newest]

    # -- keeping it alive ------------------------------------------------------------------------------------

    def _renewed(self, published: Published, interval: float) -> None:
        """Next turn after ``interval`` seconds less up to a fifth, so that peers do not act in step."""
        published.due = self.host.now() + interval * self.host.random.uniform(0.8, 1.0)
        published.among = len(self.table)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ping silent contacts, refresh buckets, renew and hand on records, look for lost peers; until cancelled."""
        task_status.started()
        while True:
            self._wake = trio.Event()
            with trio.move_on_after(defaults.TICK * self.host.random.uniform(0.8, 1.2)):
                await self._wake.wait()
            self.store.expire(self.host.wall())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._check_liveness)
                nursery.start_soon(self._refresh)
                nursery.start_soon(self._renew)
                nursery.start_soon(self._replicate)
                nursery.start_soon(self._rejoin)

    async def _check_liveness(self) -> None:
        wall = self.host.wall()
        due = {contact.peer: None for contact in self.table.stale(self.host.now())}
        # A record that runs out soon would no longer be passed on; the pong carries a fresh one.
        due.update({c.peer: None for c in self.table if c.expires - wall < 2 * defaults.LIVENESS_INTERVAL})
        limit = trio.CapacityLimiter(defaults.ALPHA_MAX)

        async def ping(peer: PeerId) -> None:
            async with limit:
                try:
                    await self._ping(peer)
                except (RemoteError, Overloaded):
                    # The walker has noted the failure in the table.
                    return

        async with trio.open_nursery() as nursery:
            for peer in due:
                nursery.start_soon(ping, peer)

    async def _refresh(self) -> None:
        now = self.host.now
        if not len(self.table):
            return
        if self.table.neighbours_due(now()):
            await self._find_neighbours()
        for key in self.table.refresh_due(now(), self.host.random):
            await self._find(key, k=defaults.REFRESH_WIDTH)

    async def _renew(self) -> None:
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

    async def _replicate(self) -> None:
        """Hand records on that nobody renewed here, straight to the closest contacts: our own neighbourhood we know."""
        for record in self.store.to_replicate(self.host.wall()):
            closest = self.table.closest(record.place, self.table.k)
            if closest and (
                len(closest) < self.table.k or self.table.key ^ record.place < closest[-1].key ^ record.place
            ):
                request = messages.PutRecord(record, self._serve)
                await self._walker.ask_all([contact.peer for contact in closest], messages.PUT, request)

    async def _rejoin(self) -> None:
        """Try lost contacts, and bootstrap addresses when few are left: heals partitions and long absences."""
        now, alone = self.host.now(), not len(self.table)
        if now < self._rejoin_due and not alone:
            return
        self._rejoin_due = now + defaults.REJOIN_INTERVAL
        before = len(self.table)
        lost = list(self._walker.lost)[: defaults.ALPHA_MAX if alone else defaults.REJOIN_BATCH]
        addresses = self._foreign_addresses() if before < defaults.ALPHA else []
        await reach(self.endpoint, self._walker, self._ping, addresses, lost)
        for peer in lost:
            record = self._walker.lost.get(peer)
            if record is not None:
                # Others have their turn first; a contact that has been gone for a day is given up.
                gone = self.host.wall() - record.open(-float("inf")).expires
                if gone > defaults.RECORD_LIFETIME:
                    del self._walker.lost[peer]
                else:
                    self._walker.remember(peer, record)
        if len(self.table) > before:
            await self._find_neighbours()

    # -- restarts --------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Contacts, bootstrap addresses, our own records and what we hold for others, for :meth:`restore`."""
        contacts = [c.record for c in self.table.closest(self.table.key, defaults.SNAPSHOT_CONTACTS)]
        contacts += [record for record in self._walker.lost.values() if record not in contacts]
        own = tuple(record for record, _ in self._own.values())
        contacts = contacts[: defaults.SNAPSHOT_CONTACTS]
        return pack(Snapshot(1, tuple(self._bootstrap), tuple(contacts), own, self.store.save()))

    def restore(self, data: bytes) -> None:
        """Take back a :meth:`snapshot`; call before :meth:`bootstrap`, which then needs no address.

        Raises :class:`DecodeError` for a damaged one; nothing is taken then.
        """
        snapshot = unpack(Snapshot, data, limit=defaults.MAX_SNAPSHOT)
        if snapshot.version != 1:
            raise DecodeError(f"snapshot of version {snapshot.version}, expected 1")
        contacts = [(record.open(-float("inf")).peer, record) for record in snapshot.contacts]
        wall = self.host.wall()
        self.store.load(snapshot.store, wall)
        self._bootstrap.update(dict.fromkeys(snapshot.bootstrap))
        for peer, record in contacts:
            self._walker.remember(peer, record)
        for own in snapshot.own:
            if own.expires > wall and own.author == self.endpoint.peer_id:
                self._own[own.namespace, own.key] = (own, Published(self.host.now()))


def _is_lasting(failures: Sequence[tuple[str, bool]]) -> bool:
    """Would all of it fail again? Somebody there has said so, as ``(address or name, whether it would)`` tell.

    What answers at a loopback address of somebody else's ticket says little: it is another program of this machine.
    """
    here = ("tcp://127.", "tcp://[::1]")
    remote = [failure for failure in failures if not failure[0].startswith(here)]
    return any(lasting for _, lasting in remote or failures)
