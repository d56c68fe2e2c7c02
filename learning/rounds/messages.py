"""What peers say to each other in a round. Every message names the instance (``key``) it belongs to.

One instance is one round of one roster after one commit: its key is a hash over all three, so a message
of another branch, another roster or another round can never be taken for one of ours. ``attempt`` is the
ballot of single-decree Paxos; ``epoch`` counts the freezes within one attempt.
"""

from __future__ import annotations

import hashlib
from typing import Any

import attrs
from cattrs.gen import make_dict_unstructure_fn, override

from ...transport.errors import ConfigError
from ...transport.identity import Identity, PeerId
from ...transport.wire import converter, pack
from ..reduce.codecs import resolve
from ..reduce.rates import NOTHING, Rates
from ..reduce.slices import Slice
from .bounded import Bounded
from .claims import Accuse, Denied, Missing, Proof, Receipts
from .payloads import Payload

#: Samples, and weight in the mean, of one contribution at most: sums over a roster and over all rounds of a run stay
#: below 2^63.
MAX_SAMPLES = 1 << 40

#: Characters of a layout: words for the first tensors, a count, a digest of all; see reduce/tensors.py.
MAX_LAYOUT = 120


def check_codec(name: str) -> None:
    """Raises ValueError for a codec that we do not know: what is coded so is of no use here."""
    try:
        resolve(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def check_layout(layout: str) -> None:
    """Raises ValueError for one that is longer than ours ever are."""
    if len(layout) > MAX_LAYOUT:
        raise ValueError(f"a layout of {len(layout)} characters")


def _omit(kind: type, *names: str) -> None:
    """Have fields that hold their default left out of the bytes, as before there were such fields."""
    brief: dict[str, Any] = {name: override(omit_if_default=True) for name in names}
    converter.register_unstructure_hook(kind, make_dict_unstructure_fn(kind, converter, **brief))


@attrs.frozen
class OnTrial(Bounded):
    """A peer on trial: ``left`` more rounds in which its work is fit, then it is a voter (docs/byzantine.md)."""

    peer: PeerId
    left: int


@attrs.frozen
class CommitRecord(Bounded):
    """What a round agreed on. Its digest chains the rounds: ``prev`` is the digest of the one before.

    ``kind``: ``genesis`` (the founder's first record), ``enrol`` (roster change without training),
    ``reduce`` (a round), ``gather`` (a round in which nothing is combined), ``branch`` (survivors of a lost majority go
    on). ``members`` contributed, in
    PeerId order, with ``samples`` each and ``weights`` in the mean. ``roster``: the voters of the next
    round. ``state``: digest of the state after the round before (empty in gossip groups). ``fingerprint``:
    keyed MAC of the result, key derived from ``nonces``. ``total``: samples committed since genesis.

    ``trial``: who is on trial in the next round, in PeerId order, none of them a voter. ``opinions``: what members of
    this one say of the work of those who were on trial in it (:class:`.trials.Opinion`). ``scores``: what the rule of
    the run remembers of each of the ``roster`` (:mod:`.remembering`). ``payloads``: what each member of a ``gather``
    gave. All empty in most rounds, and then they are not in the bytes of the record: it is as it was before there were
    such things.
    """

    run: bytes
    round: int
    kind: str
    prev: bytes
    members: tuple[PeerId, ...]
    samples: tuple[int, ...]
    weights: tuple[int, ...]
    roster: tuple[PeerId, ...]
    total: int
    branch: int
    state: bytes
    nonces: tuple[bytes, ...]
    algorithm: str
    fingerprint: bytes
    reason: str
    trial: tuple[OnTrial, ...] = ()
    opinions: tuple[bytes, ...] = ()
    scores: tuple[int, ...] = ()
    payloads: tuple[Payload, ...] = ()

    @property
    def digest(self) -> bytes:
        return hashlib.blake2b(pack(self), digest_size=32, person=b"shoal commit v1").digest()


_omit(CommitRecord, "trial", "opinions", "scores", "payloads")


@attrs.frozen
class Signed:
    """One voter's signature."""

    peer: PeerId
    signature: bytes


@attrs.frozen
class Certificate(Bounded):
    """Signed accepts of one ballot. Valid when they come from a quorum of the instance's voters."""

    key: bytes
    attempt: int
    accepts: tuple[Signed, ...]


@attrs.frozen
class Accepted(Bounded):
    """The value a voter last accepted, and at which ballot."""

    attempt: int
    record: CommitRecord


@attrs.frozen
class Ready(Bounded):
    """A voter is done training and promises to follow no ballot below ``attempt`` (Paxos phase 1b).

    ``contributes`` is False when it has nothing to give this round; ``why`` then says why not. ``holds``: whether the
    sender still holds the result of ``accepted`` (a restarted peer does not). ``rates``: what it measured on its lines.
    ``codec``: how its contribution is coded, and the result, if most say so. ``layout``: which tensors the vector is
    made of, in words that are equal where they are; empty where it is of none in particular. ``payload``: what it gives
    instead of a vector, whose length is 0 then (:mod:`.payloads`).
    """

    key: bytes
    round: int
    attempt: int
    contributes: bool
    samples: int
    weight: int
    length: int
    accepted: Accepted | None
    holds: bool
    why: str
    rates: Rates = NOTHING
    codec: str = "fp32"
    layout: str = ""
    payload: Payload | None = None

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        if max(self.samples, self.weight) > MAX_SAMPLES:
            raise ValueError(f"{max(self.samples, self.weight)} samples in one round")
        check_codec(self.codec)
        check_layout(self.layout)
        if self.payload is not None and self.length:
            raise ValueError("a payload beside a vector")


_omit(Ready, "payload")


@attrs.frozen
class Waiting(Bounded):
    """The leader is alive and waits for ``missing``; ``reason`` is for people.

    ``left``: milliseconds until it goes on without them; 0: that is not settled yet.
    """

    key: bytes
    attempt: int
    missing: tuple[PeerId, ...]
    reason: str
    left: int = 0


@attrs.frozen
class Convene(Bounded):
    """A candidate asks idle voters to come to its ballot."""

    key: bytes
    round: int
    attempt: int


@attrs.frozen
class Plan(Bounded):
    """Who contributes (``members``, PeerId order, with weights), who receives, and who owns what.

    ``within``: milliseconds after which a phase of bulk is over for those that are late; 0: each keeps its own pace.
    ``codec``: how contributions and combined slices travel; slices begin at multiples of its block. ``layout``: that of
    all members' vectors. ``trial``: who sends its work to the owners to be judged, and is no member. ``ring``: in which
    order sums of contributions, and then combined slices, go round (:mod:`.circling`); empty for a butterfly.
    """

    key: bytes
    attempt: int
    epoch: int
    members: tuple[PeerId, ...]
    samples: tuple[int, ...]
    weights: tuple[int, ...]
    receivers: tuple[PeerId, ...]
    slices: tuple[Slice, ...]
    length: int
    reason: str
    within: int = 0
    codec: str = "fp32"
    layout: str = ""
    trial: tuple[PeerId, ...] = ()
    ring: tuple[PeerId, ...] = ()

    def __attrs_post_init__(self) -> None:
        Bounded.__attrs_post_init__(self)
        check_codec(self.codec)
        check_layout(self.layout)

    @property
    def form(self) -> str:
        """In which form owners hold contributions: their codec, or sums of a ring, which are of one plan alone."""
        return f"ring {self.attempt}.{self.epoch}" if self.ring else self.codec

    def phase(self, otherwise: float) -> float:
        """Seconds that a phase of bulk may take; ``otherwise`` where the plan does not say."""
        return self.within / 1e3 or otherwise


_omit(Plan, "ring")


@attrs.frozen
class Held(Bounded):
    """An owner names the members whose part of its slices it holds in full. Signed: owners may be audited."""

    key: bytes
    attempt: int
    epoch: int
    holds: tuple[PeerId, ...]
    signature: bytes


@attrs.frozen
class Freeze(Bounded):
    """``members`` is the set whose contributions the owners combine, exactly, in this order."""

    key: bytes
    attempt: int
    epoch: int
    members: tuple[PeerId, ...]


@attrs.frozen
class Products(Bounded):
    """An owner's inner products of all pairs of frozen members, over its slices: see :mod:`..aggregate.products`.

    ``members``: the hash of the frozen members, in whose order ``data`` is.
    """

    key: bytes
    attempt: int
    epoch: int
    members: bytes
    data: bytes


@attrs.frozen
class Decided(Bounded):
    """What a rule on the Gram matrix decides, for all receivers to check, and for owners to combine with.

    ``parts``: the products of all owners, in the order of their slices, or where that is too much their sum alone.
    ``data``: the coefficients, see :attr:`..aggregate.aggregator.Decision.data`.
    """

    key: bytes
    attempt: int
    epoch: int
    members: bytes
    parts: tuple[bytes, ...]
    data: bytes


@attrs.frozen
class Ask(Bounded):
    """The leader asks which combined slices a receiver holds."""

    key: bytes
    attempt: int
    epoch: int


@attrs.frozen
class Progress(Bounded):
    """Which combined slices (indices into the plan's) the sender holds; with all of them, its ``nonce``.

    ``algorithms``: the fingerprints that are fast on the sender's machine, best first. ``opinion``: with the nonce, of
    those on trial (:class:`.trials.Opinion`); empty where nobody is.
    """

    key: bytes
    attempt: int
    epoch: int
    have: tuple[int, ...]
    nonce: bytes
    algorithms: tuple[str, ...]
    opinion: bytes = b""


@attrs.frozen
class Fetch(Bounded):
    """The leader tells a receiver to get combined slice ``index`` from ``holder``."""

    key: bytes
    attempt: int
    epoch: int
    index: int
    holder: PeerId


@attrs.frozen
class Seal(Bounded):
    """Whoever may hold the result holds it: all compute its fingerprint, under a key from ``nonces``, at the same time.

    A member that misses this begins when it is asked to accept.
    """

    key: bytes
    attempt: int
    epoch: int
    nonces: tuple[bytes, ...]
    algorithm: str


@attrs.frozen
class Propose(Bounded):
    """Paxos phase 2a. ``holders`` have the result whose fingerprint the record names."""

    key: bytes
    attempt: int
    record: CommitRecord
    holders: tuple[PeerId, ...]


@attrs.frozen
class Accept(Bounded):
    """Paxos phase 2b: a signed accept of the record with ``digest`` at this ballot."""

    key: bytes
    attempt: int
    digest: bytes
    signature: bytes


@attrs.frozen
class Reject(Bounded):
    """The sender promised a higher ballot, or the proposal contradicts what it holds (``reason``). ``epoch``: of the
    plan that is refused, if one is."""

    key: bytes
    attempt: int
    promised: int
    reason: str
    epoch: int = 0


_omit(Reject, "epoch")


@attrs.frozen
class Commit(Bounded):
    """A record and the proof that it was agreed."""

    key: bytes
    record: CommitRecord
    certificate: Certificate


Message = (
    Ready
    | Waiting
    | Convene
    | Plan
    | Held
    | Freeze
    | Products
    | Decided
    | Ask
    | Progress
    | Fetch
    | Seal
    | Propose
    | Accept
    | Reject
    | Commit
    | Accuse
    | Proof
    | Missing
    | Receipts
    | Denied
)
MESSAGES: tuple[type, ...] = (
    Ready,
    Waiting,
    Convene,
    Plan,
    Held,
    Freeze,
    Products,
    Decided,
    Ask,
    Progress,
    Fetch,
    Seal,
    Propose,
    Accept,
    Reject,
    Commit,
    Accuse,
    Proof,
    Missing,
    Receipts,
    Denied,
)

#: What a voter says to a leader. A Reject is for the leader's own voter too: it may name a later attempt.
TO_LEADER = (Ready, Held, Products, Progress, Accept, Reject, Receipts, Denied)

#: What a peer that knows the commit answers with it: the sender does not know it yet. Also what a leader says that was
#: left and has not noticed: nobody would answer it anything else any more.
ANSWERED = (Ready, Convene, Waiting, Plan, Ask, Propose)

_ACCEPT = b"shoal accept v1\0"
_HELD = b"shoal held v1\0"


def instance_key(run: bytes, round: int, prev: bytes, voters: tuple[PeerId, ...]) -> bytes:
    """The 32-byte name of one instance."""
    h = hashlib.blake2b(digest_size=32, person=b"shoal instance 1")
    h.update(run + round.to_bytes(8, "big") + prev)
    for voter in voters:
        h.update(voter.key)
    return h.digest()


def members_hash(members: tuple[PeerId, ...]) -> bytes:
    """16 bytes that name a frozen set of members."""
    return hashlib.blake2b(b"".join(member.key for member in members), digest_size=16).digest()


def accept_bytes(key: bytes, attempt: int, digest: bytes) -> bytes:
    """The bytes an accept signs."""
    return _ACCEPT + key + attempt.to_bytes(8, "big") + digest


def sign_accept(identity: Identity, key: bytes, attempt: int, digest: bytes) -> Accept:
    return Accept(key, attempt, digest, identity.sign(accept_bytes(key, attempt, digest)))


def sign_held(identity: Identity, key: bytes, attempt: int, epoch: int, holds: tuple[PeerId, ...]) -> Held:
    return Held(key, attempt, epoch, holds, identity.sign(held_bytes(key, attempt, epoch, holds)))


def held_bytes(key: bytes, attempt: int, epoch: int, holds: tuple[PeerId, ...]) -> bytes:
    """The bytes a Held report signs."""
    return _HELD + key + attempt.to_bytes(8, "big") + epoch.to_bytes(8, "big") + members_hash(holds)


def quorum(voters: int) -> int:
    """The smallest majority of ``voters``."""
    return voters // 2 + 1


def verify_certificate(
    record: CommitRecord, certificate: Certificate, voters: tuple[PeerId, ...], needed: int
) -> str | None:
    """None when at least ``needed`` distinct ``voters`` signed ``record``; else what is wrong."""
    digest, allowed, seen = record.digest, set(voters), set()
    for accept in certificate.accepts[: len(voters)]:
        if accept.peer not in allowed:
            return f"an accept by {accept.peer.short}, who is no voter"
        if not accept.peer.verify(accept_bytes(certificate.key, certificate.attempt, digest), accept.signature):
            return f"a wrong signature in the name of {accept.peer.short}"
        seen.add(accept.peer)
    if len(seen) < needed:
        return f"{len(seen)} accepts, {needed} needed"
    return None
