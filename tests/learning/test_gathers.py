"""Rounds that gather a few bytes: real voters and leaders around a table, and what none of them can be told."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.learning.events import Event
from shoal.learning.exchange import Exchange
from shoal.learning.rounds.actions import Action, Done, Persist, Promise, Send, Verify
from shoal.learning.rounds.messages import ANSWERED, CommitRecord, Propose, Ready, Reject
from shoal.learning.rounds.payloads import GATHER, MAX_PAYLOAD, Payload, payloads_fault, said
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.errors import ConfigError, DecodeError
from shoal.transport.identity import PeerId
from shoal.transport.wire import pack, unpack

from ..sim.tiny import Pull
from .model.seats import Seat, Shape


class Circle:
    """Peers of one round; messages are handed over in any order that ``chance`` has."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.shape = Shape(count, real=True, kind=GATHER)
        self.seats = [Seat(self.shape, place) for place in range(count)]
        self.chance, self.now = random.Random(seed), 0.0
        self.post: list[tuple[PeerId, PeerId, object]] = []
        self.bend: Callable[[PeerId, PeerId, object], object | None] = lambda sender, to, message: message
        self.said = {seat.me: b"%d of %d" % (seat.place, seat.life) for seat in self.seats}

    def seat(self, peer: PeerId) -> Seat:
        return self.seats[self.shape.index[peer]]

    def begin(self, seat: Seat, data: bytes | None = None) -> None:
        view, mine = seat.view, self.shape.identities[seat.place]
        payload = Payload.sign(mine, view.key, self.said[seat.me] if data is None else data)
        offer = Ready(view.key, view.round, 0, True, 5, 1, 0, None, False, "", payload=payload)
        seat.begun = True
        self.do(seat, seat.voter.begin(self.now, offer))

    def do(self, seat: Seat, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    message = self.bend(seat.me, action.to, action.message)
                    if message is not None:
                        self.post.append((seat.me, action.to, message))
                case Persist():
                    seat.stored = (action.promised, action.accepted)
                case Promise():
                    self.do(seat, seat.voter.promise(action.attempt))
                case Verify():
                    self.do(seat, seat.voter.verified(self.now, action.attempt, action.record, None))
                case Done():
                    seat.commit = action.commit
                case _:
                    pass
        if seat.leader is not None:
            more = seat.leader.follow(self.now, seat.voter.attempt)
            if more:
                self.do(seat, more)

    def hear(self, sender: PeerId, to: PeerId, message: object) -> None:
        seat = self.seat(to)
        if not seat.alive:
            return
        if seat.commit is not None:
            if isinstance(message, ANSWERED) and sender != to:
                self.post.append((to, sender, seat.commit))
            return
        if isinstance(message, Ready) and seat.voter.leader(message.attempt) == to:
            known = seat.first - 1 if seat.leader is None else seat.leader.attempt
            if known < message.attempt:
                seat.clock = self.now
                seat.lead(message.attempt)
        if seat.leader is not None:
            self.do(seat, seat.leader.receive(self.now, sender, message))
        self.do(seat, seat.voter.receive(self.now, sender, message))

    def crash(self, seat: Seat) -> None:
        seat.crash()
        for other in self.seats:
            if other is not seat and other.alive and other.commit is None:
                self.do(other, other.voter.peer_lost(self.now, seat.me, "it crashed"))
                if other.leader is not None:
                    self.do(other, other.leader.peer_lost(self.now, seat.me, "it crashed"))

    def back(self, seat: Seat) -> None:
        seat.wake()
        for other in self.seats:
            other.voter.peer_alive(self.now, seat.me)
            if other.leader is not None:
                other.leader.peer_alive(seat.me)

    def run(self, steps: int = 4000) -> None:
        for _ in range(steps):
            if all(seat.commit is not None or not seat.alive or not seat.begun for seat in self.seats):
                return
            if self.post:
                self.hear(*self.post.pop(self.chance.randrange(len(self.post))))
                continue
            self.now += 0.5
            for seat in self.seats:
                if seat.alive and seat.commit is None:
                    self.do(seat, seat.voter.tick(self.now))
                    if seat.leader is not None:
                        self.do(seat, seat.leader.tick(self.now))

    def record(self) -> CommitRecord:
        """What was agreed on, by all that know."""
        found = {seat.commit.record.digest: seat.commit.record for seat in self.seats if seat.commit is not None}
        (record,) = found.values()
        return record


def test_a_round_gives_everybody_what_everybody_gave_in_one_exchange() -> None:
    circle = Circle(4)
    kinds: dict[str, int] = {}

    def count(sender: PeerId, to: PeerId, message: object) -> object:
        if sender != to:
            kinds[type(message).__name__] = kinds.get(type(message).__name__, 0) + 1
        return message

    circle.bend = count
    for seat in circle.seats:
        circle.begin(seat)
    circle.run()
    record = circle.record()
    assert record.kind == GATHER and not record.fingerprint and record.total == 20
    assert said(record) == {peer.key: data for peer, data in circle.said.items()}
    assert record.members == tuple(sorted(circle.said)) == record.roster
    # Nothing but word, proposal, accepts and commit, and word that it waits.
    assert {name: n for name, n in kinds.items() if name != "Waiting"} == {
        "Ready": 3,
        "Propose": 3,
        "Accept": 3,
        "Commit": 3,
    }


def altered(record: CommitRecord, victim: PeerId, other: PeerId, how: str) -> CommitRecord:
    at, payloads = record.members.index(victim), list(record.payloads)
    match how:
        case "altered":
            payloads[at] = Payload(b"forged", payloads[at].signature)
        case "taken from another":
            payloads[at] = payloads[record.members.index(other)]
        case "of another round":
            payloads[at] = Payload.sign(Shape(4, real=True).identities[0], b"k" * 32, b"0 of 0")
        case "missing":
            del payloads[at]
        case "result":
            return attrs.evolve(record, fingerprint=b"f" * 16)
        case _:
            return attrs.evolve(record, kind="reduce")
    return attrs.evolve(record, payloads=tuple(payloads))


@pytest.mark.parametrize("how", ["altered", "taken from another", "of another round", "missing", "result", "kind"])
def test_a_leader_that_lies_about_payloads_is_refused_by_all_and_left(how: str) -> None:
    circle = Circle(4)
    liar = circle.seats[0].view.order[0]
    others = [peer for peer in circle.shape.peers if peer != liar]
    refusals: list[str] = []

    def lie(sender: PeerId, to: PeerId, message: object) -> object | None:
        if isinstance(message, Propose) and sender == liar and message.attempt == 0:
            return attrs.evolve(message, record=altered(message.record, others[0], others[1], how))
        if isinstance(message, Reject) and to == liar:
            refusals.append(message.reason)
        return message

    circle.bend = lie
    for seat in circle.seats:
        circle.begin(seat)
    circle.run()
    assert len(refusals) >= 3 and said(circle.record()) == {p.key: data for p, data in circle.said.items()}
    assert all(seat.commit is not None and seat.commit.certificate.attempt > 0 for seat in circle.seats)


def test_a_word_that_is_not_its_givers_is_left_out() -> None:
    circle = Circle(4)
    victim = circle.seats[0].view.order[1]

    def forge(sender: PeerId, to: PeerId, message: object) -> object:
        if isinstance(message, Ready) and sender == victim and message.payload is not None:
            return attrs.evolve(message, payload=Payload(b"other", message.payload.signature))
        return message

    circle.bend = forge
    for seat in circle.seats:
        circle.begin(seat)
    circle.run()
    assert victim not in circle.record().members and len(circle.record().members) == 3


@pytest.mark.parametrize("strategy", ["diloco", "noloco", "spsa"])
def test_nobody_agrees_to_a_record_of_another_kind_than_the_rounds_of_the_run(strategy: str) -> None:
    """Neither before it has begun, when it could not tell otherwise what a round is about, nor afterwards."""
    answers: list[tuple[bool, str, str | None]] = []

    async def script(world: World) -> None:
        def see(member: Member, event: Event) -> None:
            if event.phase not in ("train", "convene") or event.what != "begin":
                return
            membership = member.run.membership
            draft = membership.terms().draft((), (), (), membership.placed.voters, (), "")
            for kind in ("reduce", GATHER, "enrol"):
                wrong = membership.check(attrs.evolve(draft, kind=kind))
                answers.append((kind == membership.kind, kind, wrong))

        world.hooks.append(see)

    args = (("grads", 2.0),) if strategy == "spsa" else (("inner_steps", 2.0),)
    simulate(
        Scenario(2, Founding(strategy=strategy, strategy_args=args, min_peers=2, rounds=2), make_task=Pull), script
    )
    assert len(answers) >= 12
    for same, kind, wrong in answers:
        assert (wrong is None) == same, (kind, wrong)
        assert same or (wrong is not None and f"of kind {kind!r}" in wrong)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000), st.data())
def test_whatever_dies_and_comes_back_there_is_one_record_of_true_words(
    count: int, seed: int, data: st.DataObject
) -> None:
    circle = Circle(count, seed)
    for seat in circle.seats:
        if data.draw(st.booleans() | st.just(True)):
            circle.begin(seat)
    for _ in range(data.draw(st.integers(0, 3))):
        circle.run(data.draw(st.integers(0, 40)))
        seat = data.draw(st.sampled_from(circle.seats))
        if seat.alive and seat.commit is None:
            circle.crash(seat)
            circle.run(data.draw(st.integers(0, 60)))
            circle.back(seat)
            circle.begin(seat, b"%d of %d" % (seat.place, seat.life))
    for seat in circle.seats:
        if not seat.begun and seat.alive:
            circle.begin(seat)
    circle.run(20_000)
    record = circle.record()
    assert all(seat.commit is not None for seat in circle.seats)
    assert payloads_fault(record, circle.seats[0].view.key, GATHER) is None
    for peer, words in said(record).items():
        place = circle.shape.index.get(PeerId(peer), -1)
        assert words.startswith(b"%d of " % place)


def test_payloads_are_bounded_before_anything_is_done_with_them() -> None:
    key, mine = b"k" * 32, Shape(1, real=True).identities[0]
    longest = Payload.sign(mine, key, b"x" * MAX_PAYLOAD)
    assert unpack(Payload, pack(longest)) == longest and longest.of(mine.peer_id, key)
    with pytest.raises(ValueError, match="1025 bytes"):
        Payload.sign(mine, key, b"x" * (MAX_PAYLOAD + 1))
    for name, value in (("data", b"x" * 1025), ("signature", b"s" * 63)):
        bent = unpack(Payload, pack(longest))
        object.__setattr__(bent, name, value)
        with pytest.raises(DecodeError, match="a payload of"):
            unpack(Payload, pack(bent))
    with pytest.raises(ValueError, match="beside a vector"):
        Ready(key, 1, 0, True, 1, 1, 8, None, False, "", payload=longest)


def test_what_is_not_said_costs_no_byte_on_the_wire() -> None:
    ready = Ready(b"k" * 32, 1, 0, True, 1, 1, 8, None, False, "")
    assert b"payload" not in pack(ready)


# -- through the interface of a strategy ------------------------------------------------------------------


def test_a_round_takes_one_exchange_and_no_more_bytes_than_there_may_be() -> None:
    told: list[str] = []

    async def script(world: World) -> None:
        member = world.members[0]
        await world.until(lambda: member.node.run_here is not None and member.run.phase == "train", "training")
        exchange = member.run.exchange
        assert isinstance(exchange, Exchange)
        with pytest.raises(ConfigError) as caught:
            await exchange.gather(b"x" * (MAX_PAYLOAD + 1))
        told.append(str(caught.value))
        while exchange._contribution is None:
            await trio.sleep(0.01)
        with pytest.raises(ConfigError) as caught:
            await exchange.gather(b"again")
        told.append(str(caught.value))

    founding = Founding(strategy="spsa", strategy_args=(("grads", 2.0),), min_peers=2, rounds=3)
    world = simulate(Scenario(2, founding, make_task=Pull), script)
    assert len({m.run.digest() for m in world.live()}) == 1
    assert "1025 bytes: at most 1024" in told[0] and "takes no payload" in told[1]


def kinds(member: Member) -> set[str]:
    return {event.phase for event in member.events if event.what == "begin"}


def test_the_phases_of_such_a_round_are_told_to_people() -> None:
    founding = Founding(strategy="spsa", strategy_args=(("grads", 2.0),), min_peers=2, rounds=2)
    world = simulate(Scenario(2, founding, make_task=Pull))
    assert all(kinds(member) == {"train", "convene", "commit"} for member in world.live())
