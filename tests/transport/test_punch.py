"""The exchange before hole punching, and how long is knocked: told the time, without a network."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import deadlines, defaults
from shoal.transport.address import Address
from shoal.transport.errors import DecodeError, PeerUnreachable, RemoteProtocolError
from shoal.transport.identity import Identity
from shoal.transport.punch import Answers, Attempts, Going, Offer, PunchAnswer, candidates, targets
from shoal.transport.wire import pack

PEER = Identity(bytes(32)).peer_id
NONCE = bytes(16)


def tcp(host: str, port: int = 4001) -> Address:
    return Address("tcp", host, port)


OURS = (tcp("203.0.113.1"), tcp("192.168.1.5"))


def test_only_addresses_that_others_can_mean_are_offered() -> None:
    useless = [tcp(host) for host in ("127.0.0.1", "::1", "0.0.0.0", "224.0.0.1", "169.254.1.1", "fe80::1%eth0")]
    assert candidates([*useless, tcp("203.0.113.1", 0), *OURS, OURS[0]]) == OURS
    assert len(candidates(tcp(f"203.0.113.{i}") for i in range(1, 100))) == defaults.MAX_PUNCH_ADDRESSES


@pytest.mark.parametrize(
    ("theirs", "ours", "chosen", "reason"),
    [
        ([tcp("203.0.113.2"), OURS[0]], OURS, (tcp("203.0.113.2"),), ""),
        ([tcp("203.0.113.2"), tcp("2001:db8::2")], OURS, (tcp("203.0.113.2"),), ""),
        ([tcp("2001:db8::2")], OURS, (), "the peer offers IPv6 and we have IPv4"),
        ([tcp("203.0.113.2")], [tcp("127.0.0.1")], (), "no address of our own"),
        ([tcp("127.0.0.1")], OURS, (), "the peer offers no address"),
        ([OURS[1]], OURS, (), "our own addresses"),
        ([Address("mem", "a", 1)], OURS, (), "the peer offers mem and we have IPv4"),
    ],
)
def test_where_to_knock_or_why_nowhere(
    theirs: list[Address], ours: list[Address], chosen: tuple[Address, ...], reason: str
) -> None:
    found, why = targets(theirs, ours)
    assert found == chosen
    assert reason in why and bool(why) == (not found)


def test_an_exchange_makes_both_sides_knock_when_the_go_arrives() -> None:
    offer, answers = Offer(NONCE, OURS), Answers()
    theirs = (tcp("203.0.113.2"),)
    answer = answers.offered(PEER, offer.ask(10.0), theirs, 10.06)
    go, where = offer.answered(answer, 10.1)
    here = offer.gone(10.1)
    there = answers.go(PEER, go, 10.15)
    assert where == here.targets == theirs
    assert there.targets == OURS
    assert here.rtt == there.rtt == pytest.approx(0.1)
    assert [here.start, there.start] == pytest.approx([10.15, 10.15])
    assert [here.end, there.end] == pytest.approx([10.15 + deadlines.punch(0.1)] * 2)


def test_an_answer_to_another_offer_or_without_addresses_or_garbage_is_refused() -> None:
    offer = Offer(NONCE, OURS)
    offer.ask(0.0)
    with pytest.raises(RemoteProtocolError, match="another"):
        offer.answered(pack(PunchAnswer(bytes([1] * 16), OURS)), 1.0)
    with pytest.raises(PeerUnreachable, match="the peer offers no address"):
        offer.answered(pack(PunchAnswer(NONCE, ())), 1.0)
    with pytest.raises(DecodeError):
        offer.answered(b"\x93", 1.0)


def test_a_round_trip_of_minutes_is_not_believed() -> None:
    offer = Offer(NONCE, OURS)
    offer.ask(0.0)
    offer.answered(pack(PunchAnswer(NONCE, (tcp("203.0.113.2"),))), 500.0)
    assert offer.gone(500.0).rtt == defaults.MAX_PUNCH_RTT


@given(st.floats(0, defaults.MAX_PUNCH_RTT), st.lists(st.booleans(), min_size=500, max_size=500), st.integers(0, 1000))
def test_knocking_ends_whatever_is_answered_and_attempts_outlast_the_round_trip(
    rtt: float, refused: list[bool], seed: int
) -> None:
    end = deadlines.punch(rtt)
    attempts, now, made = Attempts(Going(OURS, rtt, 0.0, end), random.Random(seed)), 0.0, 0
    for each in refused:
        until = attempts.next(now)
        if until is None:
            break
        made += 1
        assert until == end or until - now >= max(2 * rtt, defaults.PUNCH_ATTEMPT)
        if each:
            pause = attempts.failed("refused")
            assert 0 <= pause < 0.05
            now += rtt + pause
        else:
            attempts.silent()
            now = until
    else:
        pytest.fail("it never ends")
    assert made <= defaults.MAX_PUNCH_REFUSALS + end / defaults.PUNCH_ATTEMPT + 1
    assert "refused" in attempts.summary or "no answer" in attempts.summary


def test_an_address_that_was_never_tried_says_so() -> None:
    assert Attempts(Going(OURS, 0.1, 0.0, 1.0), random.Random(0)).summary == "not tried"
