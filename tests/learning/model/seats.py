"""Peers of one round as values: real voters and leaders whose state can be copied, compared and set back.

What is real: :class:`Voter`, :class:`Leader`, every decision, every message, :meth:`Chain.check` and
:meth:`Chain.terms`, how an instance decides who hears what. What stands in for the rest of a process: the store (what
survives a crash is ``stored``), bulk transfers (instant, unless the way is severed), arithmetic (a result is the pair
of frozen members and their weights) and, unless asked for, signatures (a keyed hash instead of Ed25519).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs

from shoal.learning.aggregate import Aggregator
from shoal.learning.chain import Chain
from shoal.learning.membership import Placement
from shoal.learning.rounds import leader as leader_module
from shoal.learning.rounds import voter as voter_module
from shoal.learning.rounds.actions import Pace
from shoal.learning.rounds.decisions import candidates, resume_at
from shoal.learning.rounds.leader import Leader
from shoal.learning.rounds.messages import (
    Accepted,
    Certificate,
    Commit,
    CommitRecord,
    Plan,
    Ready,
    instance_key,
)
from shoal.learning.rounds.payloads import REDUCE
from shoal.learning.rounds.terms import Terms
from shoal.learning.rounds.voter import Voter
from shoal.learning.rounds.weighing import MEAN
from shoal.learning.store import Head
from shoal.transport.identity import Identity, PeerId

#: Whole numbers with distinct sums: clocks of different histories then meet again more often.
PACE = Pace(grace=3.0, suspect=8.0, scatter=4.0, gather=4.0, accept=1.0)
RUN = b"r" * 32

Value = tuple[tuple[PeerId, ...], tuple[int, ...]]


class PlainPeer(PeerId):
    """A peer whose signature is a hash: no other peer of the model forges, and Ed25519 would take most of the time."""

    __slots__ = ()

    def verify(self, message: bytes, signature: bytes) -> bool:
        return signature == _plain_signature(self, message)


def _plain_signature(peer: PeerId, message: bytes) -> bytes:
    return hashlib.blake2b(message, key=bytes(peer), digest_size=64).digest()


class PlainIdentity(Identity):
    """Signs as :class:`PlainPeer` expects it."""

    def __init__(self, name: bytes) -> None:
        self.peer_id = PlainPeer(name)

    def sign(self, message: bytes) -> bytes:
        return _plain_signature(self.peer_id, message)


@attrs.frozen
class Shape:
    """What does not change in a model: the peers, and what each believes the round to be.

    ``rosters``: for every peer the indices of those that it takes for voters (itself among them). ``length``: elements
    of the vector, 16 a slice, so that 1 gives one owner. ``strict``: the mode. ``real``: sign with Ed25519. ``idle``:
    peers that still train when it begins. ``rule``: what they combine by. ``kind``: of the rounds of the run.
    """

    count: int
    strict: bool = True
    length: int = 1
    rosters: tuple[tuple[int, ...], ...] = ()
    real: bool = False
    idle: tuple[int, ...] = ()
    rule: Aggregator = MEAN
    kind: str = REDUCE

    @functools.cached_property
    def identities(self) -> tuple[Identity, ...]:
        kind = Identity if self.real else PlainIdentity
        # In the order of their ids, so that indices read like names.
        return tuple(sorted((kind(bytes([65 + i]) * 32) for i in range(self.count)), key=lambda one: one.peer_id))

    @functools.cached_property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(identity.peer_id for identity in self.identities)

    @functools.cached_property
    def index(self) -> dict[PeerId, int]:
        return {peer: i for i, peer in enumerate(self.peers)}

    @functools.cached_property
    def views(self) -> tuple[View, ...]:
        """What each peer takes the round for. Peers with the same roster share one."""
        rosters = self.rosters or (tuple(range(self.count)),) * self.count
        made: dict[tuple[int, ...], View] = {}
        return tuple(made.setdefault(r, View(self, tuple(self.peers[i] for i in r))) for r in rosters)


class View:
    """A round as one roster sees it: its key, and the real chain's terms and check."""

    def __init__(self, shape: Shape, voters: tuple[PeerId, ...]) -> None:
        self.voters = voters
        record = CommitRecord(
            run=RUN, round=0, kind="genesis", prev=RUN, members=(), samples=(), weights=(), roster=voters, total=0,
            branch=0, state=b"", nonces=(), algorithm="", fingerprint=b"", reason="",
        )  # fmt: skip
        head = Head(record, Certificate(b"", 0, ()), ())
        self.prev, self.round = record.digest, 1
        self.key = instance_key(RUN, 1, self.prev, voters)
        self.order = candidates(self.prev, 1, voters)
        place = Placement(1, self.key, self.prev, voters, 0, len(voters), voters)
        chain = SimpleNamespace(
            run=SimpleNamespace(rule=shape.rule),
            head=head,
            kind=shape.kind,
            placed=place,
            wishes=lambda: (),
            leaving=lambda: (),
            own_digest=lambda: b"",
            _mode=lambda voters: "strict" if shape.strict else "available",
        )
        self.check: Callable[[CommitRecord], str | None] = functools.partial(Chain.check, chain)  # type: ignore[arg-type]
        terms = Chain.terms(chain)  # type: ignore[arg-type]
        # Without the text for people, which tells apart histories that are otherwise the same.
        self.terms: Terms = attrs.evolve(terms, draft=lambda *parts: terms.draft(*parts[:5], ""))


class Seat:
    """One peer. Everything but ``stored`` (and what outsiders know) is gone with a crash."""

    __slots__ = (
        "alive", "applied", "begun", "clock", "commit", "final", "first", "hashed", "leader", "life", "parts", "place",
        "shape", "stored", "sums", "values", "view", "voter",
    )  # fmt: skip

    def __init__(self, shape: Shape, place: int) -> None:
        self.shape, self.place, self.view = shape, place, shape.views[place]
        self.life, self.stored = 0, None
        self.hashed: int | None = None
        self.wake()

    stored: tuple[int, Accepted | None] | None
    voter: Voter
    leader: Leader | None

    @property
    def me(self) -> PeerId:
        return self.shape.peers[self.place]

    def wake(self) -> None:
        """A new process with what an earlier one stored."""
        shape, view, life = self.shape, self.view, self.life
        self.alive, self.begun, self.clock = True, False, 0.0
        self.commit: Commit | None = None
        self.applied: Value | None = None
        self.parts: dict[tuple[PeerId, int, int], None] = {}
        #: Whose contributions are in a sum that came round a ring.
        self.sums: dict[tuple[int, int, int], tuple[PeerId, ...]] = {}
        self.values: dict[tuple[int, int], dict[int, Value]] = {}
        self.final: dict[bytes, Value] = {}
        self.leader = None
        self.first, accepted = resume_at(self.stored, view.order, self.me)
        name = bytes([self.place, life])
        self.voter = voter_module.Voter(
            key=view.key,
            round=view.round,
            prev=view.prev,
            voters=view.voters,
            identity=shape.identities[self.place],
            pace=PACE,
            nonce=lambda attempt, epoch: name + bytes([attempt % 256, epoch % 256]),
            check=view.check,
            max_length=10_000,
            rule=shape.rule,
            promised=self.first,
            accepted=accepted,
        )
        if self.voter.leader(self.first) == self.me:
            self.lead(self.first)

    def lead(self, attempt: int) -> None:
        view = self.view
        self.leader = leader_module.Leader(
            key=view.key,
            round=view.round,
            voters=view.voters,
            attempt=attempt,
            identity=self.shape.identities[self.place],
            pace=PACE,
            terms=view.terms,
            now=self.clock,
            lost=self.voter.lost,
            rule=self.shape.rule,
        )

    def crash(self) -> None:
        self.alive, self.begun, self.leader = False, False, None
        self.life += 1
        self.commit = self.applied = None
        self.parts, self.sums, self.values, self.final = {}, {}, {}, {}

    def offer(self) -> Ready:
        return Ready(self.view.key, self.view.round, 0, True, 1, 1, self.shape.length, None, False, "")

    # -- time ---------------------------------------------------------------------------------------

    def timers(self) -> dict[str, float]:
        """What this peer waits for, and until when on its own clock."""
        found: dict[str, float] = {}
        if not self.alive or self.commit is not None:
            return found
        voter, leader = self.voter, self.leader
        if voter.offer is not None and not voter.decided:
            found["suspect"] = voter._heard + voter._patience()
            found["stall"] = voter._moved + voter._stall()
            if voter._phase_until is not None:
                found["phase"] = voter._phase_until
            if voter.phase == "convene":
                found["resend"] = voter._resend
        if leader is not None and leader.deadline() is not None:
            found["word"] = leader._word
            if leader._until is not None:
                found["until"] = leader._until
            grace = leader._grace_until
            if leader.phase == "convene" and grace is not None and grace > leader._ticked:
                found["grace"] = grace
        return found

    def due(self) -> float | None:
        """When the driver ticks, as an instance computes it."""
        if not self.alive or self.commit is not None:
            return None
        times = [self.voter.deadline(), self.leader.deadline() if self.leader else None]
        return min((t for t in times if t is not None), default=None)

    # -- copies -------------------------------------------------------------------------------------

    def copy(self) -> Seat:
        twin = object.__new__(Seat)
        for name in Seat.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.parts, twin.sums, twin.final = dict(self.parts), dict(self.sums), dict(self.final)
        twin.values = {key: dict(found) for key, found in self.values.items()}
        twin.voter = copied(self.voter)
        twin.leader = None if self.leader is None else copied(self.leader)
        twin.hashed = None
        return twin

    def fingerprint(self) -> int:
        """Equal for seats that will behave equally: times are relative to the seat's own clock, texts left out."""
        if self.hashed is None:
            life = self.life
            disk = None if self.stored is None else (self.stored[0], _frozen(self.stored[1]))
            if not self.alive:
                self.hashed = hash((life, disk))
            elif self.commit is not None:
                self.hashed = hash((life, disk, _frozen(self.commit), self.applied, tuple(self.final)))
            else:
                self.hashed = hash(
                    (
                        life,
                        disk,
                        self.begun,
                        self.first,
                        tuple(self.parts),
                        tuple(self.sums.items()),
                        _frozen(self.values),
                        tuple(self.final),
                        _core(self.voter, self.clock, _VOTER),
                        None if self.leader is None else _core(self.leader, self.clock, _LEADER),
                    )
                )
        return self.hashed


#: Of the cores: what never changes, what is a moment in time, and what only people read.
_CONSTANT = {
    "key", "round", "voters", "pace", "me", "order", "needed",
    "_identity", "_nonce", "_check", "_max_length", "_algorithms", "_terms", "rule", "scores", "_scores",
}  # fmt: skip
_TEXT = {"reason", "_reason", "due"}
_TIMES = {"_heard", "_moved", "_resend", "_phase_until", "_grace_until", "_until", "_word", "_ticked"}


def _fields(core: object) -> tuple[tuple[str, bool], ...]:
    return tuple((name, name in _TIMES) for name in core.__dict__ if name not in _CONSTANT | _TEXT)


_probe = Seat(Shape(1), 0)
assert _probe.leader is not None
_VOTER, _LEADER = _fields(_probe.voter), _fields(_probe.leader)


def _core(core: object, clock: float, fields: Iterable[tuple[str, bool]]) -> tuple[object, ...]:
    state = core.__dict__
    return tuple(
        (None if state[name] is None else max(-20.0, state[name] - clock)) if time else _frozen(state[name])
        for name, time in fields
    )


def _frozen(value: Any) -> object:
    """``value`` as something that can be hashed."""
    kind = type(value)
    if kind is dict or kind is MappingProxyType:
        if value and type(next(iter(value.values()))) is str:
            return tuple(value)  # reasons
        return tuple((key, _frozen(item)) for key, item in value.items())
    if kind is list:
        return tuple(value)
    return hash_of(value) if hasattr(kind, "__attrs_attrs__") else value


_hashes: dict[int, tuple[object, int]] = {}


def hash_of(message: Any) -> int:
    """The hash of a message, texts for people left out. Messages live as long as an exploration does."""
    known = _hashes.get(id(message))
    if known is not None and known[0] is message:
        return known[1]
    plain = attrs.evolve(message, reason="") if isinstance(message, Plan) else message
    found = hash((type(plain).__name__, plain))
    _hashes[id(message)] = (message, found)
    return found


def forget_hashes() -> None:
    """After an exploration: its messages are garbage."""
    _hashes.clear()


def copied(core: Any) -> Any:
    """A core of its own with the same state; frozen values are shared."""
    twin = object.__new__(type(core))
    state = dict(core.__dict__)
    for name, value in state.items():
        if type(value) is dict:
            state[name] = {
                key: (item.copy() if type(item) is dict or type(item) is list else item) for key, item in value.items()
            }
    twin.__dict__ = state
    return twin
