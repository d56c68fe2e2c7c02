"""Nodes of the DHT that do harm, all of one mind: they drop, lie about neighbours, and crowd the places of keys."""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, insort
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ..dht.kademlia import messages
from ..dht.kademlia.keys import BITS, from_bytes, node_key, record_key, topic_key
from ..transport.address import SignedPeerRecord
from ..transport.identity import Identity
from ..transport.rpc import Call, Method

if TYPE_CHECKING:
    from .crowd import CrowdNode

#: What an adversary does. ``drop``: answers pings, so that it stays in the tables, and nothing else. ``lie``: names its
#: accomplices that are closest to what is asked, says that it stores and forgets, knows of no record. ``eclipse``: as
#: ``lie``, with a key ground to be among the closest to a victim's record.
KINDS = ("drop", "lie", "eclipse")


@attrs.define(eq=False)
class Gang:
    """The adversaries of a world: what each knows, all know."""

    members: list[CrowdNode] = attrs.field(factory=list)
    _keys: list[tuple[int, CrowdNode]] = attrs.field(factory=list)

    def corrupt(self, node: CrowdNode, kind: str) -> None:
        """Turn ``node``, which has not started, into an adversary."""
        self.members.append(node)
        insort(self._keys, (node.key, node), key=itemgetter(0))
        serve = node.endpoint.serve_at_once
        if kind == "drop":
            silent: tuple[Method[Any, Any], ...] = (
                messages.FIND, messages.GET, messages.PUT, messages.PROVIDERS, messages.ANNOUNCE,
            )  # fmt: skip
            for method in silent:
                node.endpoint.serve(method, _never)
            return

        def find(call: Call[messages.Find]) -> messages.Closer:
            return messages.Closer(self.closest(from_bytes(call.request.target)))

        def get(call: Call[messages.GetRecord]) -> messages.FoundRecord:
            return messages.FoundRecord(None, self.closest(record_key(call.request.namespace, call.request.key)))

        def providers(call: Call[messages.GetProviders]) -> messages.FoundProviders:
            return messages.FoundProviders((), self.closest(topic_key(call.request.topic)))

        serve(messages.FIND, find)
        serve(messages.GET, get)
        serve(messages.PROVIDERS, providers)
        serve(messages.PUT, _forget)
        serve(messages.ANNOUNCE, _forget)

    def closest(self, place: int, count: int = 20) -> tuple[SignedPeerRecord, ...]:
        """The records of the ``count`` accomplices closest to ``place``."""
        first, last, shared = 0, len(self._keys), 0
        while last - first > count and shared < BITS:
            # those that share one bit more with the place, as long as there are enough of them
            shared += 1
            start = place >> (BITS - shared) << (BITS - shared)
            left = bisect_left(self._keys, start, first, last, key=itemgetter(0))
            right = bisect_left(self._keys, start + (1 << (BITS - shared)), left, last, key=itemgetter(0))
            if right - left < count:
                break
            first, last = left, right
        near = heapq.nsmallest(count, self._keys[first:last], key=lambda item: item[0] ^ place)
        return tuple(member.endpoint.record() for _, member in near if member.running)


def _forget(call: Call[messages.PutRecord] | Call[messages.PutProvider]) -> messages.Stored:
    return messages.Stored()


async def _never(call: Call[Any]) -> messages.Stored:
    await trio.sleep_forever()
    raise AssertionError("sleep_forever returned")


def grind(seed: str, place: int, size: int, count: int) -> list[Identity]:
    """``count`` identities whose keys are closer to ``place`` than the closest peer of a swarm of ``size`` is likely
    to be.

    About ``size`` keys are tried for each: seconds for an attacker.
    """
    found: list[Identity] = []
    limit, number = (1 << 256) // size, 0
    while len(found) < count:
        identity = Identity(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=32).digest())
        number += 1
        if node_key(identity.peer_id) ^ place < limit:
            found.append(identity)
    return found
