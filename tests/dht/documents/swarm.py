"""Replicas of one document in one process, and what happens to them: writing, cheating, losing data, exchanging."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pycrdt

from shoal.dht.documents.envelope import NOTHING, Envelope
from shoal.dht.documents.policy import DocumentSpec, Members
from shoal.dht.documents.replica import Blame, Code, Replica, Verdict
from shoal.transport.identity import Identity, PeerId

from .updates import Author

WALL = 1.7e9
IDS = tuple(Identity(bytes([number]) * 32) for number in range(1, 9))
SPEC = DocumentSpec("metrics", b"run", Members("run"))


def put(key: str, value: Any, root: str = "m") -> Callable[[pycrdt.Doc[Any]], None]:
    """The change that sets ``key`` of the map ``root``."""

    def change(doc: pycrdt.Doc[Any]) -> None:
        doc.get(root, type=pycrdt.Map)[key] = value

    return change


def replica(spec: DocumentSpec = SPEC) -> Replica:
    return Replica(spec, lambda peer: True)


class Writer:
    """A replica and the identity that writes in it, as a node does: begin, write, (store), offer."""

    def __init__(self, identity: Identity, spec: DocumentSpec = SPEC, *, incarnation: int = 1) -> None:
        self.identity, self.spec = identity, spec
        self.incarnation = incarnation
        self.now = 0.0
        self.replica = replica(spec)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    def offer(self, envelope: Envelope, wall: float = WALL) -> Verdict:
        self.now += 1000  # rates are not what is tested
        return self.replica.offer(envelope, wall, self.now)

    def write(self, change: Callable[[pycrdt.Doc[Any]], None] | None, wall: float = WALL) -> Envelope | None:
        """None for ``change``: renew."""
        if self.replica.must_begin(self.peer):
            held = self.replica.range_of(self.peer)
            self.incarnation = max(self.incarnation, -1 if held is None else held.incarnation) + 1
            self.replica.begin(self.peer, self.incarnation)
        if change is None:
            draft = self.replica.renew(self.identity, wall)
        else:
            draft = self.replica.write(change, self.identity, wall)
        if draft is not None:
            verdict = self.offer(draft, wall)
            assert verdict.kept, verdict
        return draft

    def must_write(self, change: Callable[[pycrdt.Doc[Any]], None], wall: float = WALL) -> Envelope:
        envelope = self.write(change, wall)
        assert envelope is not None
        return envelope

    def lose_everything(self) -> None:
        """The disk is gone; the clock goes on."""
        self.incarnation += 10
        self.replica = replica(self.spec)


def signed(identity: Identity, update: bytes, counter: int, previous: bytes = NOTHING, **fields: Any) -> Envelope:
    fields = {"incarnation": 1, "expires": WALL + 86400, **fields}
    return Envelope.sign(identity, SPEC.id, update, counter=counter, previous=previous, **fields)


def exchange(one: Writer, other: Writer, wall: float = WALL) -> bool:
    """Both give each other what the other's summary lacks, as anti-entropy does. Returns whether anything changed."""
    before = one.replica.digest(), other.replica.digest()
    for source, target in ((one, other), (other, one)):
        for held in source.replica.summary():
            theirs = target.replica.range_of(held.author)
            if theirs is not None and (theirs.incarnation > held.incarnation or theirs == held):
                continue
            proof = source.replica.evidence(held.author)
            if proof is not None:
                verdict = target.replica.accuse(proof, wall)
                assert verdict.blame is not Blame.SENDER, verdict
                continue
            first = held.first
            if theirs is not None and theirs.incarnation == held.incarnation and not theirs.frozen:
                # From where the other one stops; at the same height the last one, if it is another.
                first = max(first, min(theirs.next, held.next - 1))
            for envelope in source.replica.envelopes(held.author, held.incarnation, first, held.next):
                verdict = target.offer(envelope, wall)
                assert verdict.blame is not Blame.SENDER, verdict
                assert verdict.code not in (Code.GAP, Code.RATE, Code.GARBAGE), verdict
    return before != (one.replica.digest(), other.replica.digest())


def heal(writers: Sequence[Writer], rng: random.Random, wall: float = WALL) -> int:
    """Exchange between random pairs until nothing changes any more; returns how many rounds it took."""
    for turn in range(100):
        pairs = [(a, b) for a in writers for b in writers if a is not b]
        rng.shuffle(pairs)
        if not sum(exchange(a, b, wall) for a, b in pairs):
            return turn
    raise AssertionError("the replicas never agree")


def assert_equal(writers: Sequence[Writer]) -> None:
    first = writers[0].replica
    for other in writers[1:]:
        assert other.replica.summary() == first.summary()
        assert other.replica.digest() == first.digest()
        assert other.replica.read() == first.read()


@attrs.define
class Story:
    """A random history. ``envelopes``: all that was ever signed, by honest and by dishonest hands."""

    rng: random.Random
    writers: list[Writer]
    #: Which of forks, garbage, lost disks and key copies may happen.
    evil: bool = True
    envelopes: list[Envelope] = attrs.Factory(list)
    partition: list[int] = attrs.Factory(list)

    def step(self) -> None:
        rng, writer = self.rng, self.rng.choice(self.writers)
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                self._keep(writer.write(self._change()))
            case 4:
                self._keep(writer.write(None) if writer.replica.range_of(writer.peer) else None)
            case 5 | 6 | 7:
                self._deliver()
            case 8:
                one, other = rng.sample(range(len(self.writers)), 2)
                if not self.partition or self.partition[one] == self.partition[other]:
                    exchange(self.writers[one], self.writers[other])
            case 9:
                self.partition = [rng.randrange(2) for _ in self.writers] if rng.random() < 0.6 else []
            case _ if self.evil:
                self._cheat(writer)

    def _change(self) -> Callable[[pycrdt.Doc[Any]], None]:
        rng = self.rng

        def change(doc: pycrdt.Doc[Any]) -> None:
            author = Author.__new__(Author)
            author.rng, author.doc, author.updates = rng, doc, []
            author.roots = [doc.get("m", type=pycrdt.Map), doc.get("a", type=pycrdt.Array)]
            for _ in range(rng.choice((1, 2, 4))):
                author._edit(rng.choice(author.roots), 0)

        return change

    def _keep(self, envelope: Envelope | None) -> None:
        if envelope is not None:
            self.envelopes.append(envelope)

    def _deliver(self) -> None:
        """Some of the envelopes, some twice, in any order, to anybody on any side."""
        if self.envelopes:
            target = self.rng.choice(self.writers)
            for envelope in self.rng.choices(self.envelopes, k=min(6, len(self.envelopes))):
                verdict = target.offer(envelope)
                assert verdict.blame is not Blame.SENDER or verdict.code is Code.GARBAGE, verdict

    def _cheat(self, writer: Writer) -> None:
        rng = self.rng
        own = writer.replica.envelopes(writer.peer, writer.incarnation, 0, 1 << 31)
        match rng.randrange(4):
            case 0:
                writer.lose_everything()
            case 1 if own:  # another one at a counter that is taken, which goes its own way, or not
                other = rng.choice(own)
                update = rng.choice((b"\0\0", other.update))
                fork = attrs.evolve(other, update=update, expires=other.expires - 1)
                self._sign(writer, fork, snapshot=rng.random() < 0.4 or other.snapshot)
            case 2 if own:  # a chain that does not hang together
                self._sign(writer, own[-1], counter=own[-1].counter + 1, previous=bytes(31) + b"\1", update=b"\0\0")
            case 3:  # signed, in its place, and no update at all
                place = {"counter": own[-1].counter + 1, "previous": own[-1].id} if own else {"counter": 0}
                base = own[-1] if own else signed(writer.identity, b"", 0, incarnation=writer.incarnation + 1)
                self._sign(writer, base, update=rng.choice((b"\1", b"\0\1\5\1\0\1")), **place)

    def _sign(self, writer: Writer, like: Envelope, **fields: Any) -> None:
        made = attrs.evolve(like, **fields)
        again = Envelope.sign(
            writer.identity,
            made.document,
            made.update,
            incarnation=made.incarnation,
            counter=made.counter,
            previous=made.previous,
            expires=made.expires,
            snapshot=made.snapshot,
        )
        self.envelopes.append(again)
        if self.rng.random() < 0.7:
            self.rng.choice(self.writers).offer(again)
