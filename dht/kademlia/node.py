"""One peer of the DHT: finds peers, signed records and providers, and keeps what others entrust to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

import attrs
import trio

from ...transport.address import Address, SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, Overloaded, PeerUnreachable, RemoteError
from ...transport.identity import PeerId
from ...transport.wire import pack, unpack
from . import defaults, messages
from .joining import reach
from .keys import node_key
from .lookup import Lookup
from .records import VALIDATORS, SignedRecord, Validator
from .region import crowded, hidden, region_targets
from .service import Counters, Service
from .store import Store
from .table import RoutingTable
from .tracing import Query, trace
from .values import Values
from .walk import Walker

log = logging.getLogger(__name__)

Q = TypeVar("Q")
R = TypeVar("R")


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
        self._walker = Walker(endpoint, self.table, self.counters, serve=serve)
        self.values = Values(self._walker, self.store, validators, serve=serve)
        self._bootstrap: dict[Address, None] = {}
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

    async def _find_neighbours(self) -> None:
        """Find the k peers closest to us: the near buckets are complete then.

        On disjoint paths: this lookup decides whom we know, and whom we name to others.
        """
        closest = (await self._walker.find(self.table.key, paths=defaults.CAREFUL_PATHS)).closest
        self._walker.size.note([node_key(peer) ^ self.table.key for peer in closest], self.host.now())
        everybody = len(closest) < self.table.k
        self.table.refreshed_near(None if everybody else node_key(closest[-1]), self.host.now())

    async def find_peer(self, peer: PeerId) -> SignedPeerRecord | None:
        """A valid contact of ``peer``: of its live link, else by a lookup. None when nobody asked knows it."""
        if peer == self.endpoint.peer_id:
            return self.endpoint.record()
        if self.endpoint.link(peer) is None:
            await self._walker.find(node_key(peer), wanted=peer)
        record = self.endpoint.contact(peer)
        if record is None or record.open(-float("inf")).expires <= self.host.wall():
            return None
        return record

    # -- records and providers -------------------------------------------------------------------------------

    async def put(self, record: SignedRecord) -> int:
        """See :meth:`.values.Values.put`."""
        return await self.values.put(record)

    async def get(self, namespace: str, key: bytes, *, paths: int = 1, thorough: bool = True) -> SignedRecord | None:
        """See :meth:`.values.Values.get`."""
        return await self.values.get(namespace, key, paths=paths, thorough=thorough)

    async def provide(self, topic: bytes, *, ttl: float | None = None) -> int:
        """See :meth:`.values.Values.provide`."""
        return await self.values.provide(topic, ttl=ttl)

    async def announce(self, topic: bytes, pause: float) -> None:
        """:meth:`provide`, every ``pause`` seconds until it worked."""
        while True:
            try:
                await self.provide(topic)
                return
            except RemoteError as error:
                log.debug("%s could not be announced: %s", topic.hex()[:8], error)
            await trio.sleep(pause)

    async def unprovide(self, topic: bytes) -> None:
        """See :meth:`.values.Values.unprovide`."""
        await self.values.unprovide(topic)

    async def providers(self, topic: bytes, *, limit: int = 20) -> list[SignedPeerRecord]:
        """See :meth:`.values.Values.providers`."""
        return await self.values.providers(topic, limit=limit)

    async def find(self, target: int, *, paths: int = 1, k: int | None = None) -> Lookup:
        """The lookup of the peers closest to ``target``, finished: see :meth:`.walk.Walker.find`."""
        return await self._walker.find(target, paths=paths, k=k)

    async def trace(self, target: int, *, paths: int = 1) -> tuple[Lookup, list[Query], float]:
        """As :meth:`find`, telling of each query and how long it all took: see :func:`.tracing.trace`."""
        return await trace(self._walker, target, paths=paths, serving=self._serve)

    @property
    def lost(self) -> int:
        """How many contacts left the table because they did not answer, and are tried again."""
        return len(self._walker.lost)

    @property
    def swarm_size(self) -> float | None:
        """How many peers there seem to be (:mod:`.region`); None while too little is known."""
        return self._walker.size.value

    # -- keeping it alive ------------------------------------------------------------------------------------

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
                nursery.start_soon(self.values.renew)
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
        keys = self.table.refresh_due(now(), self.host.random)
        for key in keys:
            lookup = await self._walker.find(key, k=defaults.REFRESH_WIDTH)
            self._walker.size.note([node_key(peer) ^ key for peer in lookup.closest], now())
        if keys:
            await self._look_around()

    async def _look_around(self) -> None:
        """Find our neighbours by other ways where those we know are too few, or too many, to be all of them."""
        size, k = self._walker.size.value, self.table.k
        if size is None:
            return
        distances = [contact.key ^ self.table.key for contact in self.table.closest(self.table.key, k)]
        if hidden(distances, size, k)[0]:
            await self._walker.find(self.table.key, paths=defaults.CAREFUL_PATHS)
        elif crowded(distances, size, k)[0]:
            for target in region_targets(self.table.key, size, k, self.host.random):
                await self._walker.find(target, paths=defaults.CAREFUL_PATHS)

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
        own = tuple(record for record, _ in self.values.own())
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
                self.values.restore(own)


def _is_lasting(failures: Sequence[tuple[str, bool]]) -> bool:
    """Would all of it fail again? Somebody there has said so, as ``(address or name, whether it would)`` tell.

    What answers at a loopback address of somebody else's ticket says little: it is another program of this machine.
    """
    here = ("tcp://127.", "tcp://[::1]")
    remote = [failure for failure in failures if not failure[0].startswith(here)]
    return any(lasting for _, lasting in remote or failures)
