"""What `shoal dht` asks of a running node, and what it is answered. Peers as text, keys as bytes, times in seconds."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class DhtGet:
    """Answered by :class:`DhtFound`."""

    namespace: str
    key: bytes


@attrs.frozen
class DhtPut:
    """Publish ``value`` as the node's own record ``name``, as its next version. Answered by :class:`DhtStored`."""

    name: bytes
    value: bytes


@attrs.frozen
class DhtProviders:
    """Answered by :class:`DhtProviderList`."""

    topic: bytes
    limit: int


@attrs.frozen
class DhtTable:
    """Answered by :class:`DhtTableInfo`."""


@attrs.frozen
class DhtWalk:
    """Look for the peers closest to ``target`` (32 bytes; empty: anywhere). Answered by :class:`DhtWalked`."""

    target: bytes
    paths: int


@attrs.frozen
class DhtRecord:
    """``expires_in``: seconds that are left of its life."""

    namespace: str
    key: bytes
    author: str
    seq: int
    expires_in: float
    value: bytes


@attrs.frozen
class DhtFound:
    """``record``: None when nobody who was asked holds one. ``queries``: what it took."""

    record: DhtRecord | None
    seconds: float
    queries: int


@attrs.frozen
class DhtStored:
    """``copies``: other peers that stored it."""

    record: DhtRecord
    copies: int
    seconds: float
    queries: int


@attrs.frozen
class DhtProvider:
    peer: str
    addresses: tuple[str, ...]


@attrs.frozen
class DhtProviderList:
    providers: tuple[DhtProvider, ...]
    seconds: float
    queries: int


@attrs.frozen
class DhtContact:
    """One contact. ``age``: since it was last heard. ``failures``: questions in a row that it did not answer."""

    peer: str
    address: str
    rtt_ms: float | None
    age: float
    failures: int
    networks: tuple[str, ...]


@attrs.frozen
class DhtBucket:
    """``depth``: leading bits that its peers' keys share with ours. ``refreshed``: since a lookup here; None: never."""

    depth: int
    contacts: tuple[DhtContact, ...]
    waiting: int
    refreshed: float | None


@attrs.frozen
class DhtTableInfo:
    """``lost``: contacts that did not answer and are tried again. ``records``, ``announcements``: held for others.

    ``swarm``: how many peers there seem to be, None while too little is known. ``counters``: since the node began.
    """

    peer: str
    key: bytes
    k: int
    buckets: tuple[DhtBucket, ...]
    lost: int
    records: int
    announcements: int
    swarm: float | None
    counters: tuple[tuple[str, int], ...]


@attrs.frozen
class DhtQuery:
    """See :class:`shoal.dht.kademlia.tracing.Query`."""

    peer: str
    began: float
    seconds: float
    hop: int
    bits: int
    named: int
    nearest: int | None
    failure: str


@attrs.frozen
class DhtWalked:
    """``closest``: the peers found and the bits of their distance, nearest first."""

    target: bytes
    paths: int
    queries: tuple[DhtQuery, ...]
    closest: tuple[tuple[str, int], ...]
    hops: int
    seconds: float


DHT_REQUESTS = (DhtGet, DhtPut, DhtProviders, DhtTable, DhtWalk)
DHT_MESSAGES: tuple[type[Any], ...] = (
    *DHT_REQUESTS, DhtFound, DhtStored, DhtProviderList, DhtTableInfo, DhtWalked,
)  # fmt: skip
DhtRequest = DhtGet | DhtPut | DhtProviders | DhtTable | DhtWalk
