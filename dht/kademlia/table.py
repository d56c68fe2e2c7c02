"""The routing table: k-buckets of live contacts by XOR distance, sans-IO.

Contacts enter when they were heard (an answer, or a request over an authenticated link). A full bucket
keeps its contacts as long as they live: newcomers wait in its replacement cache and move up when a
contact fails (Kademlia section 2.2 and 4.1: old contacts live longest). So a flood of new peers displaces nobody.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable, Iterator

import attrs

from ...transport.address import Address, SignedPeerRecord
from ...transport.identity import PeerId
from . import defaults
from .keys import BITS, bucket_index, node_key, random_key


def networks_of(addresses: Iterable[Address]) -> tuple[str, ...]:
    """The /24 or /48 networks of ``addresses``, without duplicates.

    Loopback, private, link-local and in-memory addresses count for nothing: a LAN and a swarm on one
    machine are diverse enough for their purpose, and nobody can rent them.
    """
    networks: dict[str, None] = {}
    for address in addresses:
        if address.kind != "tcp":
            continue
        ip = ipaddress.ip_address(address.host)
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        if ip.is_global:
            networks[str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))] = None
    return tuple(networks)


@attrs.define(eq=False)
class Contact:
    """A peer we have heard. ``expires``: wall time of its record; other times ``now``; ``rtt`` seconds or None."""

    peer: PeerId
    record: SignedPeerRecord
    expires: float
    networks: tuple[str, ...]
    last_seen: float
    rtt: float | None = None
    failures: int = 0
    key: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.key = node_key(self.peer)


@attrs.define(eq=False)
class Bucket:
    """``contacts`` and ``waiting`` newcomers, from longest to most recently heard; ``refreshed``: last lookup here."""

    refreshed: float
    contacts: dict[PeerId, Contact] = attrs.field(factory=dict)
    waiting: dict[PeerId, Contact] = attrs.field(factory=dict)

    def room_for(self, contact: Contact) -> bool:
        """True when ``contact`` keeps the limit per network (its own old entry does not count against it)."""
        for network in contact.networks:
            held = sum(network in c.networks for c in self.contacts.values() if c.peer != contact.peer)
            if held >= defaults.MAX_PER_NETWORK:
                return False
        return True


def smoothed(rtt: float | None, sample: float | None) -> float | None:
    """An eighth of each new sample, as TCP smooths round-trip times (RFC 6298)."""
    if rtt is None or sample is None:
        return sample if rtt is None else rtt
    return rtt + (sample - rtt) / 8


class RoutingTable:
    """Contacts of the peer ``own``. Never holds ``own`` itself, nor one peer twice."""

    def __init__(self, own: PeerId, *, k: int = defaults.K) -> None:
        self.own = own
        self.key = node_key(own)
        self.k = k
        self._buckets: dict[int, Bucket] = {}
        self._neighbours_refreshed = -float("inf")

    def __len__(self) -> int:
        return sum(len(bucket.contacts) for bucket in self._buckets.values())

    def __contains__(self, peer: PeerId) -> bool:
        return self.get(peer) is not None

    def __iter__(self) -> Iterator[Contact]:
        for index in sorted(self._buckets):
            yield from self._buckets[index].contacts.values()

    def buckets(self) -> list[tuple[int, Bucket]]:
        """``(index, bucket)`` of every bucket that was ever used, far to near."""
        return sorted(self._buckets.items())

    def get(self, peer: PeerId) -> Contact | None:
        """The contact in a bucket (one that only waits is not in the table)."""
        if peer == self.own:
            return None
        bucket = self._buckets.get(bucket_index(self.key, node_key(peer)))
        return None if bucket is None else bucket.contacts.get(peer)

    def seen(self, contact: Contact, now: float) -> tuple[bool, str]:
        """``contact.peer`` was heard at ``now``: add, renew, or let it wait. Returns (is in the table, reason)."""
        if contact.peer == self.own:
            return False, "ourselves"
        index = bucket_index(self.key, contact.key)
        bucket = self._buckets.setdefault(index, Bucket(refreshed=-float("inf")))
        old = bucket.contacts.pop(contact.peer, None) or bucket.waiting.pop(contact.peer, None)
        contact.last_seen, contact.failures = now, 0
        if old is not None:
            contact.rtt = smoothed(old.rtt, contact.rtt)
        if not bucket.room_for(contact):
            if old is not None:
                self._promote(bucket)
            return False, f"{defaults.MAX_PER_NETWORK} peers of {'/'.join(contact.networks)} are in bucket {index}"
        if len(bucket.contacts) < self.k:
            bucket.contacts[contact.peer] = contact
            return True, "renewed" if old is not None else "added"
        bucket.waiting[contact.peer] = contact
        if len(bucket.waiting) > defaults.REPLACEMENTS:
            del bucket.waiting[next(iter(bucket.waiting))]
        return False, f"bucket {index} is full of live peers"

    def touch(self, contact: Contact, now: float, rtt: float | None) -> None:
        """``contact``, which is in the table, was heard again under the same record: :meth:`seen` at less cost."""
        contacts = self._buckets[bucket_index(self.key, contact.key)].contacts
        contacts[contact.peer] = contacts.pop(contact.peer)
        contact.last_seen, contact.failures = now, 0
        contact.rtt = smoothed(contact.rtt, rtt)

    def failed(self, peer: PeerId) -> Contact | None:
        """``peer`` did not answer. Returns the contact when that made it leave the table."""
        if peer == self.own:
            return None
        bucket = self._buckets.get(bucket_index(self.key, node_key(peer)))
        if bucket is None:
            return None
        bucket.waiting.pop(peer, None)
        contact = bucket.contacts.get(peer)
        if contact is None:
            return None
        contact.failures += 1
        if contact.failures < defaults.MAX_FAILURES and not bucket.waiting:
            return None
        del bucket.contacts[peer]
        self._promote(bucket)
        return contact

    def _promote(self, bucket: Bucket) -> None:
        """Fill a place with the most recently heard newcomer that keeps the limit per network."""
        if len(bucket.contacts) >= self.k:
            return
        for peer in reversed(bucket.waiting):
            if bucket.room_for(bucket.waiting[peer]):
                contact = bucket.waiting.pop(peer)
                # In front: it was heard longer ago than the contacts that kept their places.
                bucket.contacts = {peer: contact, **bucket.contacts}
                return

    def closest(self, key: int, n: int, *, healthy: bool = False) -> list[Contact]:
        """Up to ``n`` contacts by rising distance to ``key``; ``healthy``: without those whose last query failed.

        Bucket ``i`` of ``key`` is nearest, then all nearer-to-us buckets together (they share exactly i bits
        with ``key``), then bucket i-1, i-2, …: whole groups in order, so only few contacts are sorted.
        """
        split = BITS if key == self.key else bucket_index(self.key, key)
        found: list[Contact] = []
        groups: list[list[int]] = [[split], [i for i in self._buckets if i > split]]
        groups += [[i] for i in sorted(self._buckets, reverse=True) if i < split]
        for group in groups:
            part = [
                contact
                for index in group
                if index in self._buckets
                for contact in self._buckets[index].contacts.values()
                if not (healthy and contact.failures)
            ]
            part.sort(key=lambda contact: contact.key ^ key)
            found += part
            if len(found) >= n:
                break
        return found[:n]

    def bucket(self, index: int) -> Bucket:
        """Bucket ``index``: an empty one where we know nobody."""
        return self._buckets.get(index) or Bucket(refreshed=-float("inf"))

    def stale(self, now: float) -> list[Contact]:
        """Contacts due for a ping: failed once, or silent for LIVENESS_INTERVAL. Longest silent first."""
        due = [c for c in self if c.failures or now - c.last_seen >= defaults.LIVENESS_INTERVAL]
        return sorted(due, key=lambda contact: contact.last_seen)

    def refreshed(self, key: int, now: float) -> None:
        """A lookup for ``key`` took place: its bucket needs none for REFRESH_INTERVAL."""
        if key != self.key:
            index = bucket_index(self.key, key)
            self._buckets.setdefault(index, Bucket(refreshed=now)).refreshed = now

    def refreshed_near(self, farthest: int | None, now: float) -> None:
        """A lookup for our own key found everybody up to the node key ``farthest`` (None: everybody there is).

        The buckets nearer to us than that hold all their peers; a lookup in each would find the same ones. The far
        half is looked at all the same: where liars named everybody so far, it is the way out.
        """
        split = -1 if farthest is None else bucket_index(self.key, farthest)
        self._neighbours_refreshed = now
        for index in range(max(split, 0) + 1, self._deepest() + 1):
            self._buckets.setdefault(index, Bucket(refreshed=now)).refreshed = now

    def neighbours_due(self, now: float) -> bool:
        """True when no lookup for our own key took place for REFRESH_INTERVAL."""
        return now - self._neighbours_refreshed >= defaults.REFRESH_INTERVAL

    def _deepest(self) -> int:
        """The bucket of our nearest neighbour, -1 when we know nobody."""
        return max((index for index, bucket in self._buckets.items() if bucket.contacts), default=-1)

    def refresh_due(self, now: float, rng: random.Random) -> list[int]:
        """One random key for each bucket that is due, far to near, up to our nearest neighbour's bucket.

        Nearer buckets are empty because nobody lives there. A bucket that was never refreshed is due while it holds
        fewer than REFRESH_ENOUGH contacts; the far half of the space always is, see :meth:`refreshed_near`.
        """
        due = []
        for index in range(self._deepest() + 1):
            bucket = self._buckets.get(index)
            new = bucket is not None and bucket.refreshed == -float("inf") and index > 0
            if bucket is not None and new and len(bucket.contacts) >= min(defaults.REFRESH_ENOUGH, self.k):
                bucket.refreshed = now
            if bucket is None or now - bucket.refreshed >= defaults.REFRESH_INTERVAL:
                due.append(random_key(self.key, index, rng))
        return due
