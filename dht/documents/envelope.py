"""Signed, hash-chained envelopes: how an author's changes of a document travel, and what proves that it cheated.

An author numbers its envelopes of one *incarnation* 0, 1, 2 …, and each names the one before by its hash. So whoever
holds two envelopes of one author that contradict each other (two at one counter, or one that names another
predecessor than the one its author signed) can show them to anybody: they are :class:`Evidence`.

What is signed is the hash of the header, and the header holds the hash of the update: evidence needs no updates and
stays small.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import attrs
import msgpack

from ...transport import defaults as transport
from ...transport.errors import DecodeError
from ...transport.identity import Identity, PeerId
from . import defaults

#: Incarnations are below this: they travel as 64-bit integers.
MAX_INCARNATION = 1 << 63

#: Counters are below this.
MAX_COUNTER = 1 << 31

#: What the first envelope of an incarnation names as its predecessor.
NOTHING = bytes(32)


def digest(*parts: bytes) -> bytes:
    """BLAKE2b-256 of ``parts`` behind one another. They have a fixed length or the last one has not."""
    return hashlib.blake2b(b"".join(parts), digest_size=32).digest()


def client_id(author: PeerId, document: bytes, incarnation: int) -> int:
    """The Yjs client under which ``author`` writes: 53 bits, the integers that JavaScript counts exactly (Yjs)."""
    hashed = digest(b"shoal document client v1\0", author.key, document, incarnation.to_bytes(8, "big"))
    return int.from_bytes(hashed[:8], "big") >> 11


@functools.lru_cache(maxsize=defaults.KNOWN_SIGNATURES)
def _verified(author: PeerId, hashed: bytes, signature: bytes) -> None:
    """Check a signature once (70 µs) however often the same envelope comes by. Failures are not remembered."""
    if not author.verify(b"shoal document envelope v1\0" + hashed, signature):
        raise DecodeError("wrong signature of a document envelope", peer=author.short)


@attrs.frozen
class Header:
    """An envelope without its update: all that is signed. Untrusted until :meth:`check` returns."""

    document: bytes
    author: PeerId
    incarnation: int
    counter: int
    previous: bytes
    snapshot: bool
    expires: float
    #: BLAKE2b-256 of the update.
    content: bytes
    signature: bytes

    @functools.cached_property
    def id(self) -> bytes:
        fields = (
            self.document,
            self.author.key,
            self.incarnation,
            self.counter,
            self.previous,
            self.snapshot,
            self.expires,
            self.content,
        )
        packed: bytes = msgpack.packb(fields, use_bin_type=True)
        return digest(b"shoal document header v1\0", packed)

    def check(self) -> None:
        """Raise :class:`DecodeError` unless sizes, numbers and the signature are right. Says nothing of time."""
        if len(self.document) != 32 or len(self.previous) != 32 or len(self.content) != 32:
            raise DecodeError("a hash in a document envelope is not 32 bytes", peer=self.author.short)
        if not 0 <= self.incarnation < MAX_INCARNATION:
            raise DecodeError(f"document envelope of incarnation {self.incarnation}", peer=self.author.short)
        if not 0 <= self.counter < MAX_COUNTER:
            raise DecodeError(f"document envelope numbered {self.counter}", peer=self.author.short)
        if self.counter == 0 and self.previous != NOTHING:
            raise DecodeError("the first document envelope names one before it", peer=self.author.short)
        _verified(self.author, self.id, self.signature)


@attrs.frozen
class Envelope:
    """One change of one author's part of a document. Untrusted until :meth:`check` returns.

    ``expires``: Unix seconds. ``snapshot``: the update holds all that its author has to say; earlier envelopes of this
    author are replaced by it. ``update``: a Yjs v1 update, exactly as pycrdt gave it.
    """

    #: :attr:`DocumentSpec.id`, 32 bytes.
    document: bytes
    author: PeerId
    incarnation: int
    counter: int
    #: The id of envelope ``counter - 1`` of the same incarnation; :data:`NOTHING` for the first.
    previous: bytes
    snapshot: bool
    expires: float
    update: bytes
    signature: bytes

    @classmethod
    def sign(
        cls,
        identity: Identity,
        document: bytes,
        update: bytes,
        *,
        incarnation: int,
        counter: int,
        previous: bytes,
        expires: float,
        snapshot: bool = False,
    ) -> Envelope:
        unsigned = cls(
            document, identity.peer_id, incarnation, counter, previous, snapshot, float(expires), update, b""
        )
        return attrs.evolve(unsigned, signature=identity.sign(b"shoal document envelope v1\0" + unsigned.id))

    @functools.cached_property
    def id(self) -> bytes:
        """BLAKE2b-256 of what is signed."""
        return self.header.id

    @property
    def header(self) -> Header:
        return Header(
            self.document,
            self.author,
            self.incarnation,
            self.counter,
            self.previous,
            self.snapshot,
            self.expires,
            digest(self.update),
            self.signature,
        )

    @property
    def place(self) -> tuple[int, int]:
        """Orders the envelopes of one author."""
        return self.incarnation, self.counter

    def check(self) -> None:
        """Raise :class:`DecodeError` unless bounds and the signature hold."""
        if len(self.update) > defaults.MAX_UPDATE:
            raise DecodeError(
                f"document update of {len(self.update)} bytes, at most {defaults.MAX_UPDATE} allowed",
                peer=self.author.short,
            )
        self.header.check()

    def check_times(self, wall: float) -> None:
        """Raise :class:`DecodeError` when it has expired at ``wall`` (Unix seconds), or wants to live too long."""
        if self.expires < wall - transport.CLOCK_SKEW:
            raise DecodeError("document envelope has expired", peer=self.author.short)
        if self.expires > wall + defaults.MAX_LIFETIME + transport.CLOCK_SKEW:
            raise DecodeError(
                f"document envelope wants to live longer than {defaults.MAX_LIFETIME:.0f} s", peer=self.author.short
            )


@attrs.frozen
class Evidence:
    """Two headers of one author that no honest peer signs both. Untrusted until :meth:`check` returns.

    Either both have one counter and differ, or the second names another predecessor than the first, which stands right
    before it.
    """

    first: Header
    second: Header

    @classmethod
    def of(cls, one: Header, other: Header) -> Evidence:
        """In an order of its own: the lower counter first, then the smaller id."""
        first, second = sorted((one, other), key=lambda header: (header.counter, header.id))
        return cls(first, second)

    @property
    def author(self) -> PeerId:
        return self.first.author

    @property
    def incarnation(self) -> int:
        return self.first.incarnation

    @property
    def point(self) -> int:
        """The first counter at which there is more than one truth."""
        return self.first.counter

    @property
    def expires(self) -> float:
        """Unix seconds: from then on nobody holds either envelope, and the proof can go."""
        return max(self.first.expires, self.second.expires)

    def check(self) -> None:
        """Raise :class:`DecodeError` unless it proves its author's fault."""
        first, second = self.first, self.second

        def same(header: Header) -> tuple[Any, ...]:
            return header.document, header.author, header.incarnation

        if same(first) != same(second):
            raise DecodeError("evidence from two documents, authors or incarnations")
        if first.counter == second.counter:
            if first.id == second.id:
                raise DecodeError("evidence of one envelope twice")
        elif second.counter != first.counter + 1 or second.previous == first.id:
            raise DecodeError("evidence of two envelopes that do not contradict each other")
        first.check()
        second.check()
