"""The six questions peers ask one another, as typed RPC methods.

``serving`` in every request says that the caller answers such questions as well: only then do others list it.
"""

from __future__ import annotations

import attrs

from ...transport.address import SignedPeerRecord
from ...transport.rpc import Method
from .records import Announcement, SignedRecord


@attrs.frozen
class Ping:
    serving: bool


@attrs.frozen
class Pong:
    """The answering peer's own record, so that what others hold of it does not run out."""

    record: SignedPeerRecord


@attrs.frozen
class Find:
    """Who is closest to ``target`` (32 bytes)?"""

    target: bytes
    serving: bool


@attrs.frozen
class Closer:
    """Up to k peers closest to what was asked."""

    closer: tuple[SignedPeerRecord, ...]


@attrs.frozen
class GetRecord:
    """``closer``: a peer that has it names who is closest as well; one that has not always does."""

    namespace: str
    key: bytes
    serving: bool
    closer: bool = True


@attrs.frozen
class FoundRecord:
    record: SignedRecord | None
    closer: tuple[SignedPeerRecord, ...]


@attrs.frozen
class PutRecord:
    """``closer``: who is closest to it is asked as well."""

    record: SignedRecord
    serving: bool
    closer: bool = False


@attrs.frozen
class GetProviders:
    topic: bytes
    limit: int
    serving: bool


@attrs.frozen
class FoundProviders:
    announcements: tuple[Announcement, ...]
    closer: tuple[SignedPeerRecord, ...]


@attrs.frozen
class PutProvider:
    announcement: Announcement
    serving: bool
    closer: bool = False


@attrs.frozen
class Stored:
    """It is kept; a refusal travels as a typed refusal (``stale``, ``quota``, ``full``, ``invalid``, ``rate``)."""

    closer: tuple[SignedPeerRecord, ...] = ()


PING = Method("dht.ping", Ping, Pong)
FIND = Method("dht.find", Find, Closer)
GET = Method("dht.get", GetRecord, FoundRecord)
PUT = Method("dht.put", PutRecord, Stored)
PROVIDERS = Method("dht.providers", GetProviders, FoundProviders)
ANNOUNCE = Method("dht.announce", PutProvider, Stored)
