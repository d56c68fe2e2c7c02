"""Messages for rounds that have not begun here: bounded, of each peer and of all, and not kept for long."""

from __future__ import annotations

from shoal.learning import defaults
from shoal.learning.rounds.early import Early
from shoal.learning.rounds.messages import Convene, Waiting
from shoal.transport.identity import Identity
from shoal.transport.wire import pack

ALICE, BOB = (Identity(bytes([n]) * 32).peer_id for n in (1, 2))


def convene(key: bytes, attempt: int = 0) -> Convene:
    return Convene(key, 1, attempt)


def test_messages_are_handed_on_in_order_to_the_round_that_they_name_once() -> None:
    early = Early()
    for attempt in range(3):
        early.keep(1.0, ALICE, convene(b"a", attempt))
        early.keep(1.0, BOB, convene(b"b", attempt))
    assert [(letter.sender, letter.message.attempt) for letter in early.take(2.0, b"a")] == [
        (ALICE, 0),
        (ALICE, 1),
        (ALICE, 2),
    ]
    assert early.take(2.0, b"a") == []
    assert len(early.take(2.0, b"b")) == 3
    assert len(early) == 0


def test_what_is_too_old_is_forgotten() -> None:
    early = Early()
    early.keep(1.0, ALICE, convene(b"a"))
    assert early.take(1.0 + defaults.EARLY_MESSAGE, b"a") == []
    early.keep(10.0, ALICE, convene(b"a"))
    early.keep(10.0 + defaults.EARLY_MESSAGE, BOB, convene(b"b"))
    assert len(early) == 1


def test_who_says_too_much_pushes_out_only_what_it_said_itself() -> None:
    early = Early()
    early.keep(1.0, BOB, convene(b"b"))
    for attempt in range(1000):
        early.keep(1.0, ALICE, convene(b"a", attempt))
    kept = [letter.message.attempt for letter in early.take(1.0, b"a")]
    assert kept == list(range(1000 - defaults.MAX_EARLY_OF_PEER, 1000))
    assert len(early.take(1.0, b"b")) == 1


def test_a_crowd_pushes_out_the_oldest() -> None:
    early = Early()
    for number in range(defaults.MAX_EARLY_MESSAGES + 10):
        peer = Identity(number.to_bytes(32, "big")).peer_id
        early.keep(1.0, peer, convene(b"%d" % number))
    assert len(early) == defaults.MAX_EARLY_MESSAGES
    assert early.take(1.0, b"9") == []
    assert len(early.take(1.0, b"10")) == 1


def test_large_messages_are_bounded_by_their_bytes() -> None:
    early = Early()
    large = Waiting(b"a", 0, (ALICE,) * 400, "so many", 0)
    for _ in range(5):
        early.keep(1.0, ALICE, large)
        early.keep(1.0, BOB, convene(b"b"))
    assert len(early.take(1.0, b"a")) == defaults.MAX_EARLY_BYTES // len(pack(large)) == 4
    assert len(early.take(1.0, b"b")) == 5
    early.keep(1.0, ALICE, Waiting(b"a", 0, (ALICE,) * 2000, "too many", 0))
    assert len(early) == 0
