"""Signed records and provider announcements: what peers keep for one another, and who may say it.

A record has a key within a namespace, an author who signed it, a sequence number and an expiry; the newest
sequence number wins. A validator per namespace says which author may write which key; a namespace without a
validator is refused. An announcement says that its signer provides a topic (a run, a blob): nobody can
announce another peer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import attrs
import msgpack

from ...transport import defaults as transport
from ...transport.address import SignedPeerRecord
from ...transport.errors import DecodeError
from ...transport.identity import Identity, PeerId
from . import defaults
from .keys import digest, record_key, topic_key

#: Sequence numbers are below this: they travel as 64-bit integers.
MAX_SEQ = 1 << 63


class _Message:
    """What is signed: equal to another one by its hash, so that what is remembered does not keep the bytes."""

    __slots__ = ("_digest", "text")

    def __init__(self, text: bytes) -> None:
        self.text, self._digest = text, digest(text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Message) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)


@lru_cache(maxsize=16384)
def _verified(author: PeerId, message: _Message, signature: bytes) -> None:
    """Check a signature once (70 µs) however often the same bytes come by. Failures are not remembered."""
    if not author.verify(message.text, signature):
        raise DecodeError("wrong signature", peer=author.short)
    message.text = b""


@attrs.frozen
class SignedRecord:
    """A record and its author's signature. ``expires``: Unix seconds. Untrusted until :meth:`check` returns."""

    namespace: str
    key: bytes
    author: PeerId
    seq: int
    expires: float
    value: bytes
    signature: bytes

    @classmethod
    def sign(
        cls, identity: Identity, namespace: str, key: bytes, value: bytes, *, seq: int, expires: float
    ) -> SignedRecord:
        unsigned = cls(namespace, key, identity.peer_id, seq, float(expires), value, b"")
        return attrs.evolve(unsigned, signature=identity.sign(unsigned._message()))

    def _message(self) -> bytes:
        fields = (self.namespace, self.key, self.author.key, self.seq, self.expires, self.value)
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return b"shoal dht record v1\0" + packed

    @property
    def place(self) -> int:
        """The 256-bit key under which it is kept."""
        return record_key(self.namespace, self.key)

    def check(self, wall: float, validators: Mapping[str, Validator]) -> None:
        """Raise :class:`DecodeError` unless bounds, expiry, the namespace's validator and the signature hold."""
        if not 0 < len(self.namespace) <= defaults.MAX_NAMESPACE:
            raise DecodeError(f"namespace of {len(self.namespace)} characters", peer=self.author.short)
        if not 0 < len(self.key) <= defaults.MAX_KEY:
            raise DecodeError(f"record key of {len(self.key)} bytes", peer=self.author.short)
        if len(self.value) > defaults.MAX_VALUE:
            raise DecodeError(
                f"record value of {len(self.value)} bytes, at most {defaults.MAX_VALUE} allowed", peer=self.author.short
            )
        if not 0 <= self.seq < MAX_SEQ:
            raise DecodeError(f"record with sequence number {self.seq}", peer=self.author.short)
        _check_times(self.expires, wall, defaults.RECORD_LIFETIME, "record", self.author)
        validator = validators.get(self.namespace)
        if validator is None:
            raise DecodeError(f"unknown namespace {self.namespace!r}", peer=self.author.short)
        reason = validator(self)
        if reason is not None:
            raise DecodeError(f"record in {self.namespace!r} refused: {reason}", peer=self.author.short)
        _verified(self.author, _Message(self._message()), self.signature)

    def in_time(self, wall: float) -> bool:
        """Whether its times pass :meth:`check`. Who holds it looked at an earlier time, and at another clock."""
        return _in_time(self.expires, wall, defaults.RECORD_LIFETIME)

    def newer_than(self, other: SignedRecord) -> bool:
        """True when this one replaces ``other`` under the same key: by sequence number, then expiry, then bytes.

        The last step only makes all holders agree when an author signs two values under one number.
        """
        mine = (self.seq, self.expires, self.value, self.signature)
        return mine > (other.seq, other.expires, other.value, other.signature)


#: Says why a record is refused, or None. Called before the signature is checked, after the bounds are.
Validator = Callable[[SignedRecord], str | None]


def self_certifying(record: SignedRecord) -> str | None:
    """The key is BLAKE2b-256 of the value: anybody may publish it, nobody can change it."""
    if record.key != digest(record.value):
        return "the key is not the hash of the value"
    if record.seq != 0:
        return "a record that cannot change has sequence number 0"
    return None


def owned_key(author: PeerId, name: bytes = b"") -> bytes:
    """The key of ``author``'s own record ``name`` (up to 32 bytes)."""
    return author.key + name


def author_owned(record: SignedRecord) -> str | None:
    """The key begins with the author's public key: only that author writes it."""
    return None if record.key.startswith(record.author.key) else "the key does not belong to the author"


def run_record(record: SignedRecord) -> str | None:
    """Run specs under their hash, and records about its runs under their author's key."""
    return author_owned(record) if len(record.key) > 32 else self_certifying(record)


#: The namespaces every peer serves.
VALIDATORS: Mapping[str, Validator] = {"run": run_record, "owned": author_owned}


def _in_time(expires: float, wall: float, lifetime: float) -> bool:
    return wall - transport.CLOCK_SKEW <= expires <= wall + lifetime + transport.CLOCK_SKEW


def _check_times(expires: float, wall: float, lifetime: float, what: str, author: PeerId) -> None:
    if expires < wall - transport.CLOCK_SKEW:
        raise DecodeError(f"{what} has expired", peer=author.short)
    if expires > wall + lifetime + transport.CLOCK_SKEW:
        raise DecodeError(f"{what} wants to live longer than {lifetime:.0f} s", peer=author.short)


@attrs.frozen
class Announcement:
    """``provider``'s word that it provides ``topic`` until ``expires`` (Unix seconds), and how to reach it.

    ``issued`` orders announcements of one provider. ``withdrawn``: it no longer does; kept until ``expires`` so
    that an older announcement does not come back. Untrusted until :meth:`check` returns.
    """

    topic: bytes
    provider: PeerId
    issued: int
    expires: float
    withdrawn: bool
    contact: SignedPeerRecord
    signature: bytes

    @classmethod
    def sign(
        cls,
        identity: Identity,
        topic: bytes,
        contact: SignedPeerRecord,
        *,
        issued: int,
        expires: float,
        withdrawn: bool = False,
    ) -> Announcement:
        unsigned = cls(topic, identity.peer_id, issued, float(expires), withdrawn, contact, b"")
        return attrs.evolve(unsigned, signature=identity.sign(unsigned._message()))

    def _message(self) -> bytes:
        fields = (self.topic, self.provider.key, self.issued, self.expires, self.withdrawn, digest(self.contact.record))
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return b"shoal provider v1\0" + packed

    @property
    def place(self) -> int:
        return topic_key(self.topic)

    def check(self, wall: float) -> None:
        """Raise :class:`DecodeError` unless bounds, times, both signatures and the provider agree."""
        if not 0 < len(self.topic) <= defaults.MAX_KEY:
            raise DecodeError(f"topic of {len(self.topic)} bytes", peer=self.provider.short)
        if not 0 <= self.issued < MAX_SEQ:
            raise DecodeError(f"announcement numbered {self.issued}", peer=self.provider.short)
        _check_times(self.expires, wall, defaults.MAX_PROVIDE_LIFETIME, "announcement", self.provider)
        _verified(self.provider, _Message(self._message()), self.signature)
        if self.contact.open(wall).peer != self.provider:
            raise DecodeError("announcement with another peer's contact", peer=self.provider.short)

    def in_time(self, wall: float) -> bool:
        """Whether its times, and its contact's, pass :meth:`check`. Who holds it looked at an earlier time, and at
        another clock. Raises :class:`DecodeError` for a contact that nobody signed.
        """
        contact = self.contact.open(-float("inf")).expires
        return contact >= wall - transport.CLOCK_SKEW and _in_time(self.expires, wall, defaults.MAX_PROVIDE_LIFETIME)
