"""What members of a scope say to each other about documents, as typed RPC methods.

Envelopes travel as they were signed. Everything that is a list is bounded where it is served (``defaults``); a refusal
is typed: ``rate``, ``misbehaved``, ``too-large``, ``unknown-scope``, ``full``, ``busy``.
"""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId
from ...transport.rpc import Method
from .envelope import Envelope, Evidence
from .replica import Range


class _Named:
    """A message that names an envelope or a document: hashes are 32 bytes, numbers are not negative."""

    __slots__ = ()

    def __attrs_post_init__(self) -> None:
        for name in ("id", "document"):
            value = getattr(self, name, bytes(32))
            if len(value) != 32:
                raise ValueError(f"{name} of {len(value)} bytes, 32 expected")
        for name in ("incarnation", "counter", "first", "next"):
            if not 0 <= getattr(self, name, 0) < 1 << 63:
                raise ValueError(f"{name} is out of range")


@attrs.frozen
class Advert(_Named):
    """The name of one envelope: where it stands, and its hash."""

    document: bytes
    author: PeerId
    incarnation: int
    counter: int
    id: bytes


@attrs.frozen
class Sent:
    """An envelope on its way. ``hop``: how many have passed it on, the author included; negative: it is caught up
    on.
    """

    envelope: Envelope
    hop: int


@attrs.frozen
class PushEnvelopes:
    """New envelopes, unasked for. Answered when those that are kept are on disk."""

    scope: bytes
    envelopes: tuple[Sent, ...]


@attrs.frozen
class Pushed:
    """One code per envelope: ``kept``, ``duplicate``, ``gap`` … or why it was refused."""

    codes: tuple[str, ...]


@attrs.frozen
class TellEnvelopes:
    """Have these: who lacks them may fetch them."""

    scope: bytes
    adverts: tuple[Advert, ...]


@attrs.frozen
class Told:
    """Heard."""


@attrs.frozen
class FetchEnvelopes:
    """Send these, by name."""

    scope: bytes
    adverts: tuple[Advert, ...]


@attrs.frozen
class Fetched:
    """Those that are here, as many as fit; ``more`` when some did not."""

    envelopes: tuple[Envelope, ...]
    more: bool


@attrs.frozen
class FollowPeer:
    """The caller follows, or no longer does (``leave``). ``feed``: push new envelopes to it."""

    scope: bytes
    feed: bool
    leave: bool


@attrs.frozen
class Followed:
    """It is so."""


# --- anti-entropy: see reconcile.py -----------------------------------------------------------------------------------


@attrs.frozen
class Node(_Named):
    """The digest of what is held of ``document`` from authors whose hash begins with ``prefix`` (of half bytes)."""

    document: bytes
    prefix: bytes
    digest: bytes


@attrs.frozen
class Branches:
    """Below a node that differs: the digest for each half byte that follows the prefix."""

    document: bytes
    prefix: bytes
    digests: tuple[bytes, ...]


@attrs.frozen
class Leaves:
    """Below a node that differs: all that is held."""

    document: bytes
    prefix: bytes
    held: tuple[Range, ...]


@attrs.frozen
class Compare:
    """Which of these differ from what you hold?"""

    scope: bytes
    nodes: tuple[Node, ...]


@attrs.frozen
class Compared:
    """Those that differ, taken apart; as many as fit. What is not named is equal, or to be asked for again
    (``more``).
    """

    branches: tuple[Branches, ...]
    leaves: tuple[Leaves, ...]
    more: bool


@attrs.frozen
class Want(_Named):
    """The envelopes with counters ``first`` … ``next`` - 1 of one incarnation of an author."""

    document: bytes
    author: PeerId
    incarnation: int
    first: int
    next: int


@attrs.frozen
class FetchRanges:
    """Send these, in order."""

    scope: bytes
    wants: tuple[Want, ...]


@attrs.frozen
class Accused(_Named):
    """Of whom there is proof, and in which document."""

    document: bytes
    author: PeerId


@attrs.frozen
class FetchEvidence:
    """Send the proofs against these."""

    scope: bytes
    accused: tuple[Accused, ...]


@attrs.frozen
class Proofs:
    """Of those that were asked for, what is here."""

    evidence: tuple[Evidence, ...]


@attrs.frozen
class PushEvidence:
    """Proofs against authors, unasked for."""

    scope: bytes
    evidence: tuple[Evidence, ...]


PUSH = Method("documents.push", PushEnvelopes, Pushed)
TELL = Method("documents.tell", TellEnvelopes, Told)
FETCH = Method("documents.fetch", FetchEnvelopes, Fetched)
FOLLOW = Method("documents.follow", FollowPeer, Followed)
COMPARE = Method("documents.compare", Compare, Compared)
RANGES = Method("documents.ranges", FetchRanges, Fetched)
EVIDENCE = Method("documents.evidence", FetchEvidence, Proofs)
ACCUSE = Method("documents.accuse", PushEvidence, Pushed)
