"""Who may connect, and who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport import defaults
from shoal.transport.throttle import HalfOpen, Throttle, TokenBucket, source_of


def wide(number: int) -> str:
    """Address ``number`` of an attacker with very many, each in a /48 of its own."""
    return f"2001:{number >> 16:x}:{number & 0xFFFF:x}::1"


def test_a_bucket_holds_its_burst_and_refills_at_its_rate() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0, updated=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_stands_still_or_steps_back_gives_no_tokens() -> None:
    bucket = TokenBucket(rate=1.0, burst=1.0, updated=10.0)
    assert bucket.take(10.0)
    assert not bucket.take(10.0)
    assert not bucket.take(9.0)


def test_a_customers_whole_ipv6_network_is_one_source_and_mapped_ipv4_is_ipv4() -> None:
    assert source_of("2001:db8:1:2::1") == source_of("2001:db8:1:2:ffff::9")
    assert source_of("2001:db8:1:2::1")[0] != source_of("2001:db8:1:3::1")[0]
    assert source_of("2001:db8:1:2::1")[1] == source_of("2001:db8:1:3::1")[1]
    assert source_of("::ffff:192.0.2.7") == source_of("192.0.2.7") == ("192.0.2.7", "192.0.2.0/24")
    assert source_of("fe80::1%eth0")[0] == source_of("fe80::2%3")[0]
    assert source_of("n7") == ("n7", "n7")


def test_fifty_nodes_behind_one_address_found_a_swarm_at_once_and_none_is_refused() -> None:
    throttle = Throttle(0.0)
    refused = [throttle.admit("127.0.0.1", number * 1e-4)[1] for number in range(50 * 20)]
    assert set(refused) == {"within limits"}


def test_a_flood_from_one_address_gets_its_rate_and_touches_nobody_else() -> None:
    throttle = Throttle(0.0)
    seconds, attempts = 10.0, 100_000
    admitted = sum(throttle.admit("192.0.2.1", number * seconds / attempts)[0] for number in range(attempts))
    burst, rate = defaults.SOURCE_CONNECTIONS_BURST, defaults.SOURCE_CONNECTIONS
    assert burst + rate * seconds - 2 <= admitted <= burst + rate * seconds
    assert throttle.admit("192.0.2.1", seconds) == (False, "more than 50 connections per second from 192.0.2.1")
    assert throttle.admit("192.0.2.2", seconds) == (True, "within limits")


def test_sources_without_number_get_the_common_rate_together() -> None:
    throttle, seconds, attempts = Throttle(0.0), 10, 200_000
    admitted = sum(throttle.admit(wide(number), number * seconds / attempts)[0] for number in range(attempts))
    rate = defaults.STRANGER_CONNECTIONS + defaults.NEWCOMER_CONNECTIONS
    burst = defaults.STRANGER_CONNECTIONS_BURST + defaults.NEWCOMER_CONNECTIONS_BURST
    assert admitted <= burst + rate * seconds
    assert len(throttle) <= defaults.MAX_SOURCES


def test_a_newcomer_gets_in_while_one_provider_network_floods_from_every_source_it_has() -> None:
    throttle, now = Throttle(0.0), 0.0
    for number in range(100_000):
        now = number / 10_000
        throttle.admit(f"2001:db8:7:{number % 65536:x}::1", now)
    assert throttle.admit("2001:db8:7:1::1", now)[1] == "more than 500 connections per second from all strangers"
    assert throttle.admit("198.51.100.4", now) == (True, "its network is new to us")
    assert throttle.admit("198.51.100.4", now)[0] is False  # one connection, then it has been seen
    for other in range(99):
        assert throttle.admit(f"198.51.{other}.4", now)[0]


def test_who_was_of_use_keeps_its_way_in_whoever_floods() -> None:
    throttle, now = Throttle(0.0), 0.0
    throttle.vouch("198.51.100.4")
    for number in range(100_000):
        now = number / 20_000
        throttle.admit(wide(number), now)
    assert throttle.admit(wide(1), now)[0] is False
    assert [throttle.admit("198.51.100.4", now) for _ in range(3)] == [(True, "its address has been of use to us")] * 3


def test_who_comes_from_ever_new_addresses_gains_nothing_by_pushing_out_its_used_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(defaults, "MAX_SOURCES", 10)
    monkeypatch.setattr(defaults, "SOURCE_CONNECTIONS_BURST", 5.0)
    throttle = Throttle(0.0)
    for number in range(200):
        throttle.admit(f"10.{number}.0.1", 0.0)
    assert len(throttle) == 10
    assert sum(bucket.tokens for bucket in throttle._sources.values()) == 0.0
    assert not throttle.admit("10.199.0.1", 0.0)[0]


def test_the_refused_leave_nothing_behind() -> None:
    throttle = Throttle(0.0)
    for number in range(100_000):
        throttle.admit(wide(number), 0.0)
    remembered = len(throttle)
    for number in range(100_000, 200_000):
        throttle.admit(wide(number), 0.0)
    assert len(throttle) == remembered
    assert throttle.admit("198.51.100.4", 60.0)[0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0.0, 2.0)), max_size=200))
def test_whatever_comes_a_source_is_never_admitted_beyond_burst_and_rate(steps: list[tuple[int, float]]) -> None:
    throttle, now = Throttle(0.0), 0.0
    admitted: dict[int, int] = {}
    for source, passed in steps:
        now += passed
        if throttle.admit(f"10.0.{source}.1", now)[0]:
            admitted[source] = admitted.get(source, 0) + 1
    for count in admitted.values():
        assert count <= defaults.SOURCE_CONNECTIONS_BURST + defaults.SOURCE_CONNECTIONS * now


def test_a_crowd_of_half_open_connections_only_pushes_out_its_own() -> None:
    half_open = HalfOpen(limit=8)
    assert half_open.add(0, "198.51.100.4") is None
    victims = [half_open.add(number, "192.0.2.1") for number in range(1, 101)]
    assert victims[:7] == [None] * 7
    assert victims[7:] == list(range(1, 94))  # the crowd's own oldest, each time
    assert len(half_open) == 8


def test_with_one_connection_per_source_the_oldest_gives_way() -> None:
    half_open = HalfOpen(limit=3)
    assert [half_open.add(number, f"192.0.2.{number}") for number in range(4)] == [None, None, None, 0]


def test_what_is_over_is_forgotten_and_may_be_forgotten_twice() -> None:
    half_open = HalfOpen(limit=2)
    half_open.add(1, "n1")
    half_open.remove(1)
    half_open.remove(1)
    half_open.remove(7)
    assert len(half_open) == 0
    assert half_open.add(2, "n1") is None
    assert half_open.add(3, "n1") is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=100))
def test_half_open_connections_never_exceed_the_limit(steps: list[tuple[bool, int]]) -> None:
    half_open, alive = HalfOpen(limit=4), dict[int, int]()
    for number, (begin, source) in enumerate(steps):
        if begin or not alive:
            victim = half_open.add(number, f"n{source}")
            alive[number] = source
            if victim is not None:
                held = [list(alive.values()).count(s) for s in range(6)]
                assert list(alive.values()).count(alive[victim]) == max(held)
                del alive[victim]
        else:
            gone = next(iter(alive))
            half_open.remove(gone)
            del alive[gone]
        assert len(half_open) == len(alive) <= 4
