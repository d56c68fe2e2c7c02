"""Answers what `shoal dht` asks, from the DHT of a running node or relay."""

from __future__ import annotations

from typing import Any, assert_never

import attrs

from ..dht.kademlia import defaults as dht_defaults
from ..dht.kademlia.keys import from_bytes, node_key, to_bytes
from ..dht.kademlia.node import Dht
from ..dht.kademlia.records import SignedRecord, owned_key
from ..dht.kademlia.table import Contact
from ..transport.errors import ConfigError
from .dht_messages import (
    DhtBucket,
    DhtContact,
    DhtFound,
    DhtGet,
    DhtProvider,
    DhtProviderList,
    DhtProviders,
    DhtPut,
    DhtQuery,
    DhtRecord,
    DhtRequest,
    DhtStored,
    DhtTable,
    DhtTableInfo,
    DhtWalk,
    DhtWalked,
)


async def answer_dht(dht: Dht, request: DhtRequest) -> Any:
    """The answer to ``request``. Raises :class:`ConfigError` for one that breaks the rules, :class:`RemoteError`."""
    began, before = dht.host.now(), dht.counters.queries

    def cost() -> tuple[float, int]:
        return dht.host.now() - began, dht.counters.queries - before

    match request:
        case DhtGet(namespace=namespace, key=key):
            record = await dht.get(namespace, key)
            return DhtFound(None if record is None else _shown(record, dht.host.wall()), *cost())
        case DhtPut(name=name, value=value):
            stored, copies = await _put(dht, name, value)
            return DhtStored(_shown(stored, dht.host.wall()), copies, *cost())
        case DhtProviders(topic=topic, limit=limit):
            if not 0 < len(topic) <= dht_defaults.MAX_KEY or not 0 < limit <= dht_defaults.MAX_PROVIDERS_ANSWER:
                raise ConfigError(
                    f"a topic is 1 to {dht_defaults.MAX_KEY} bytes, and up to {dht_defaults.MAX_PROVIDERS_ANSWER} "
                    "providers are told"
                )
            contacts = [record.open(-float("inf")) for record in await dht.providers(topic, limit=limit)]
            shown = [DhtProvider(contact.peer.text, tuple(map(str, contact.addresses))) for contact in contacts]
            return DhtProviderList(tuple(shown), *cost())
        case DhtTable():
            return table_info(dht)
        case DhtWalk(target=target, paths=paths):
            return await _walk(dht, target, paths)
        case _:
            assert_never(request)


def _shown(record: SignedRecord, wall: float) -> DhtRecord:
    return DhtRecord(
        record.namespace, record.key, record.author.text, record.seq, record.expires - wall, record.value
    )  # fmt: skip


async def _put(dht: Dht, name: bytes, value: bytes) -> tuple[SignedRecord, int]:
    """Our own record ``name`` in its next version: what was published before, also in an earlier life, is asked for."""
    identity = dht.endpoint.identity
    key = owned_key(identity.peer_id, name)
    if not name or len(key) > dht_defaults.MAX_KEY:
        raise ConfigError(f"a name is 1 to {dht_defaults.MAX_KEY - len(identity.peer_id.key)} bytes, not {len(name)}")
    if len(value) > dht_defaults.MAX_VALUE:
        raise ConfigError(
            f"the value is {len(value)} bytes, and a record holds {dht_defaults.MAX_VALUE}: larger things are blobs"
        )
    held = await dht.get("owned", key)
    seq = 1 if held is None else held.seq + 1
    expires = dht.host.wall() + dht_defaults.RECORD_LIFETIME
    record = SignedRecord.sign(identity, "owned", key, value, seq=seq, expires=expires)
    return record, await dht.put(record)


def table_info(dht: Dht) -> DhtTableInfo:
    """A snapshot of the routing table and of what is held."""
    now = dht.host.now()

    def shown(contact: Contact) -> DhtContact:
        link = dht.endpoint.link(contact.peer)
        addresses = contact.record.open(-float("inf")).addresses if link is None else (link.remote,)
        return DhtContact(
            contact.peer.text,
            str(addresses[0]) if addresses else "",
            None if contact.rtt is None else contact.rtt * 1e3,
            now - contact.last_seen,
            contact.failures,
            contact.networks,
        )

    buckets = [
        DhtBucket(
            depth,
            tuple(shown(contact) for contact in bucket.contacts.values()),
            len(bucket.waiting),
            None if bucket.refreshed == -float("inf") else now - bucket.refreshed,
        )
        for depth, bucket in dht.table.buckets()
        if bucket.contacts or bucket.waiting
    ]
    return DhtTableInfo(
        peer=dht.endpoint.peer_id.text,
        key=to_bytes(dht.table.key),
        k=dht.table.k,
        buckets=tuple(buckets),
        lost=dht.lost,
        records=dht.store.record_count,
        announcements=dht.store.announcement_count,
        swarm=dht.swarm_size,
        counters=tuple(attrs.asdict(dht.counters).items()),
    )


async def _walk(dht: Dht, wanted: bytes, paths: int) -> DhtWalked:
    if not 1 <= paths <= dht_defaults.ALPHA_MAX:
        raise ConfigError(f"a lookup takes 1 to {dht_defaults.ALPHA_MAX} paths, not {paths}")
    try:
        target = from_bytes(wanted) if wanted else dht.host.random.getrandbits(256)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not len(dht.table):
        raise ConfigError("this node knows no other peers yet, so there is nobody to ask")
    lookup, queries, seconds = await dht.trace(target, paths=paths)
    shown = [
        DhtQuery(q.peer.text, q.began, q.seconds, q.hop, q.bits, q.named, q.nearest, q.failure) for q in queries
    ]  # fmt: skip
    closest = tuple((peer.text, (node_key(peer) ^ target).bit_length()) for peer in lookup.closest)
    return DhtWalked(to_bytes(target), paths, tuple(shown), closest, lookup.hops, seconds)
