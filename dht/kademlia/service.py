"""The serving half of a peer: answers what others ask of the table and the store, within limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import attrs

from ...transport.address import SignedPeerRecord
from ...transport.endpoint import Endpoint
from ...transport.errors import DecodeError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from . import defaults, messages
from .keys import from_bytes, record_key, topic_key
from .limits import RequestLimits
from .messages import (
    Closer,
    Find,
    FoundProviders,
    FoundRecord,
    GetProviders,
    GetRecord,
    Ping,
    Pong,
    PutProvider,
    PutRecord,
    Stored,
)
from .records import Validator
from .store import Store, Verdict
from .table import RoutingTable


@attrs.define
class Counters:
    """What a peer did since it began. ``queries`` = ``answers`` + ``failures`` + ``refusals`` + those in flight."""

    lookups: int = 0
    lookups_expired: int = 0
    queries: int = 0
    answers: int = 0
    failures: int = 0
    refusals: int = 0
    #: Answers that broke the rules: too many peers, wrong signatures, another key's record.
    lies: int = 0
    #: Places of records that more peers crowd than chance puts there.
    crowded: int = 0
    served: int = 0
    limited: int = 0
    #: Records and announcements that were offered to us and refused.
    rejected: int = 0


class _Request(Protocol):
    @property
    def serving(self) -> bool: ...


class Service:
    """Registers the DHT's methods at ``endpoint``. ``heard`` is told of callers that serve as well."""

    def __init__(
        self,
        endpoint: Endpoint,
        table: RoutingTable,
        store: Store,
        validators: Mapping[str, Validator],
        counters: Counters,
        heard: Callable[[PeerId], None],
    ) -> None:
        self._endpoint, self._table, self._store = endpoint, table, store
        self._validators, self._counters, self._heard = validators, counters, heard
        self._limits = RequestLimits(endpoint.host.now())
        endpoint.serve_at_once(messages.PING, self._ping)
        endpoint.serve_at_once(messages.FIND, self._find)
        endpoint.serve_at_once(messages.GET, self._get)
        endpoint.serve_at_once(messages.PUT, self._put)
        endpoint.serve_at_once(messages.PROVIDERS, self._providers)
        endpoint.serve_at_once(messages.ANNOUNCE, self._announce)

    def _admit(self, peer: PeerId, request: _Request) -> None:
        allowed, reason = self._limits.allow(peer, peer in self._table, self._endpoint.host.now())
        if not allowed:
            self._counters.limited += 1
            raise RemoteRefused("rate", reason)
        self._counters.served += 1
        if request.serving:
            self._heard(peer)

    def _closer(self, place: int, asker: PeerId, n: int | None = None) -> tuple[SignedPeerRecord, ...]:
        """The ``n`` (default: k) we know that are closest to ``place``: neither the asker nor whose record ran out."""
        wall = self._endpoint.host.wall()
        n = self._table.k if n is None else min(n, self._table.k)
        contacts = self._table.closest(place, n + 1, healthy=True)
        records = [c.record for c in contacts if c.peer != asker and c.expires > wall]
        return tuple(records[:n])

    def _refuse(self, code: str, reason: str) -> RemoteRefused:
        self._counters.rejected += 1
        return RemoteRefused(code, reason)

    def _ping(self, call: Call[Ping]) -> Pong:
        self._admit(call.peer, call.request)
        return Pong(self._endpoint.record())

    def _find(self, call: Call[Find]) -> Closer:
        self._admit(call.peer, call.request)
        try:
            target = from_bytes(call.request.target)
        except ValueError as error:
            raise self._refuse("invalid", str(error)) from None
        return Closer(self._closer(target, call.peer))

    def _get(self, call: Call[GetRecord]) -> FoundRecord:
        self._admit(call.peer, call.request)
        namespace, key = call.request.namespace, call.request.key
        if namespace not in self._validators:
            raise self._refuse("invalid", f"unknown namespace {namespace[: defaults.MAX_NAMESPACE]!r}")
        record = self._store.get(namespace, key, self._endpoint.host.wall())
        if record is not None and not call.request.closer:
            return FoundRecord(record, ())
        names = None if record is None else defaults.HOLDER_NAMES
        return FoundRecord(record, self._closer(record_key(namespace, key), call.peer, names))

    def _put(self, call: Call[PutRecord]) -> Stored:
        self._admit(call.peer, call.request)
        wall = self._endpoint.host.wall()
        try:
            call.request.record.check(wall, self._validators)
        except DecodeError as error:
            raise self._refuse("invalid", error.message) from None
        return self._stored(self._store.put(call.request.record, wall), call, call.request.record.place)

    def _providers(self, call: Call[GetProviders]) -> FoundProviders:
        self._admit(call.peer, call.request)
        wall = self._endpoint.host.wall()
        held = [a for a in self._store.providers(call.request.topic, wall) if a.in_time(wall)]
        limit = max(0, min(call.request.limit, defaults.MAX_PROVIDERS_ANSWER))
        if len(held) > limit:
            # A popular topic: spread the askers over all of its providers.
            held = self._endpoint.host.random.sample(held, limit)
        return FoundProviders(tuple(held), self._closer(topic_key(call.request.topic), call.peer))

    def _announce(self, call: Call[PutProvider]) -> Stored:
        self._admit(call.peer, call.request)
        wall = self._endpoint.host.wall()
        if call.request.announcement.provider != call.peer:
            raise self._refuse("invalid", "a provider announces itself")
        try:
            call.request.announcement.check(wall)
        except DecodeError as error:
            raise self._refuse("invalid", error.message) from None
        return self._stored(
            self._store.announce(call.request.announcement, wall), call, call.request.announcement.place
        )

    def _stored(self, verdict: Verdict, call: Call[PutRecord] | Call[PutProvider], place: int) -> Stored:
        if not verdict.kept:
            raise self._refuse(verdict.code, verdict.reason)
        return Stored(self._closer(place, call.peer) if call.request.closer else ())
