"""The routing table under every sequence of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.keys import bucket_index, node_key
from shoal.dht.kademlia.table import Contact, RoutingTable, networks_of
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.identity import PeerId

NO_RECORD = SignedPeerRecord(b"", b"")


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def contact(number: int, *addresses: str) -> Contact:
    networks = networks_of(Address.parse(address) for address in addresses)
    return Contact(peer(number), NO_RECORD, 1e9, networks, 0.0)


class TableMachine(RuleBasedStateMachine):
    """Any mix of peers heard, peers failing and time passing keeps the table's promises."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RoutingTable(peer(0), k=4)
        self.now = 0.0

    @rule(number=st.integers(0, 120), net=st.integers(1, 6), seconds=st.floats(0, 400))
    def hear(self, number: int, net: int, seconds: float) -> None:
        self.now += seconds
        there, reason = self.table.seen(contact(number, f"tcp://8.8.{net}.{number + 1}:1"), self.now)
        assert there == (peer(number) in self.table)
        assert reason

    @rule(number=st.integers(0, 120))
    def fail(self, number: int) -> None:
        was = self.table.get(peer(number))
        dropped = self.table.failed(peer(number))
        assert (dropped is not None) == (was is not None and peer(number) not in self.table)

    @rule(place=st.integers(0, 2**256 - 1), n=st.integers(1, 30))
    def closest_are_the_closest(self, place: int, n: int) -> None:
        expected = sorted(self.table, key=lambda c: c.key ^ place)[:n]
        assert self.table.closest(place, n) == expected

    @invariant()
    def buckets_hold_what_belongs_there(self) -> None:
        held: dict[PeerId, int] = {}
        for index, bucket in self.table.buckets():
            assert len(bucket.contacts) <= 4
            assert len(bucket.waiting) <= defaults.REPLACEMENTS
            networks: dict[str, int] = {}
            for c in [*bucket.contacts.values(), *bucket.waiting.values()]:
                assert bucket_index(self.table.key, c.key) == index
                assert c.peer != self.table.own
                held[c.peer] = held.get(c.peer, 0) + 1
            for c in bucket.contacts.values():
                assert c.failures < defaults.MAX_FAILURES
                for network in c.networks:
                    networks[network] = networks.get(network, 0) + 1
            assert all(count <= defaults.MAX_PER_NETWORK for count in networks.values())
            assert [c.last_seen for c in bucket.waiting.values()] == sorted(
                c.last_seen for c in bucket.waiting.values()
            )
        assert all(count == 1 for count in held.values())
        assert len(self.table) == len(list(self.table))


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_the_table_keeps_its_promises = TableMachine.TestCase


def in_bucket(index: int, count: int, own: PeerId) -> list[int]:
    numbers = (n for n in range(1, 10_000) if bucket_index(node_key(own), node_key(peer(n))) == index)
    return [next(numbers) for _ in range(count)]


def test_a_flood_of_newcomers_displaces_no_live_contact() -> None:
    table = RoutingTable(peer(0))
    first, *flood = in_bucket(0, 200, peer(0))
    old = [first, *flood[: defaults.K - 1]]
    for number in old:
        assert table.seen(contact(number), 0.0)[0]
    for number in flood[defaults.K :]:
        assert table.seen(contact(number), 1.0) == (False, "bucket 0 is full of live peers")
    assert sorted(c.peer for c in table) == sorted(peer(n) for n in old)


def test_a_contact_that_fails_is_replaced_by_the_newcomer_heard_last() -> None:
    table = RoutingTable(peer(0))
    numbers = in_bucket(0, defaults.K + 2, peer(0))
    for now, number in enumerate(numbers):
        table.seen(contact(number), float(now))
    dropped = table.failed(peer(numbers[0]))
    assert dropped is not None
    assert dropped.peer == peer(numbers[0])
    assert peer(numbers[-1]) in table
    assert peer(numbers[-2]) not in table


def test_without_a_replacement_one_failure_is_forgiven_and_told_to_nobody() -> None:
    table = RoutingTable(peer(0))
    table.seen(contact(1), 0.0)
    assert table.failed(peer(1)) is None
    assert peer(1) in table
    assert table.closest(0, 5, healthy=True) == []
    assert [c.peer for c in table.stale(0.0)] == [peer(1)]
    table.seen(contact(1), 1.0)
    assert len(table.closest(0, 5, healthy=True)) == 1
    table.failed(peer(1))
    assert table.failed(peer(1)) is not None
    assert peer(1) not in table


def test_one_rented_network_gets_two_places_in_a_bucket() -> None:
    table = RoutingTable(peer(0))
    numbers = in_bucket(0, 10, peer(0))
    answers = [table.seen(contact(n, f"tcp://9.9.9.{i + 1}:1"), 0.0)[0] for i, n in enumerate(numbers)]
    assert answers == [True, True] + [False] * 8


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:1",
        "tcp://192.168.1.7:1",
        "tcp://10.0.0.3:1",
        "mem://n1:1",
        "tcp://[::1]:1",
        "tcp://[fe80::1]:1",
    ],
)
def test_a_swarm_on_one_machine_or_lan_fills_its_buckets(address: str) -> None:
    table = RoutingTable(peer(0))
    assert all(table.seen(contact(n, address), 0.0)[0] for n in in_bucket(0, defaults.K, peer(0)))


def test_mapped_and_plain_addresses_are_one_network() -> None:
    addresses = [Address.parse("tcp://[::ffff:8.8.8.8]:1"), Address.parse("tcp://8.8.8.9:1")]
    assert networks_of(addresses) == ("8.8.8.0/24",)
    assert networks_of([Address.parse("tcp://[2a00:1450:4001:81a::200e]:1")]) == ("2a00:1450:4001::/48",)


def test_silent_contacts_are_pinged_longest_silent_first() -> None:
    table = RoutingTable(peer(0))
    for now in range(3):
        table.seen(contact(now + 1), float(now))
    assert table.stale(defaults.LIVENESS_INTERVAL - 1) == []
    assert [c.peer for c in table.stale(defaults.LIVENESS_INTERVAL + 1)] == [peer(1), peer(2)]


def test_buckets_are_refreshed_once_an_hour_up_to_the_nearest_neighbour() -> None:
    table, rng = RoutingTable(peer(0)), random.Random(1)
    assert table.refresh_due(0.0, rng) == []
    for number in range(1, 50):
        table.seen(contact(number), 0.0)
    due = table.refresh_due(0.0, rng)
    deepest = max(bucket_index(table.key, c.key) for c in table)
    held = [len(table.bucket(index).contacts) for index in range(deepest + 1)]
    poor = [index for index in range(deepest + 1) if index == 0 or held[index] < defaults.REFRESH_ENOUGH]
    assert 1 < len(poor) <= deepest  # those that have enough are left for the hour, but for the far half
    assert [bucket_index(table.key, key) for key in due] == poor
    for key in due:
        table.refreshed(key, 10.0)
    assert table.refresh_due(11.0, rng) == []
    assert len(table.refresh_due(10.0 + defaults.REFRESH_INTERVAL, rng)) == deepest + 1


def test_the_neighbourhood_is_looked_up_once_an_hour() -> None:
    table = RoutingTable(peer(0))
    table.seen(contact(1), 0.0)
    assert table.neighbours_due(5.0)
    table.refreshed_near(None, 5.0)
    assert not table.neighbours_due(5.0 + defaults.REFRESH_INTERVAL - 1)
    assert table.neighbours_due(5.0 + defaults.REFRESH_INTERVAL)


def test_a_lookup_for_our_own_key_spares_the_buckets_it_covered() -> None:
    table, rng = RoutingTable(peer(0)), random.Random(1)
    for number in range(1, 200):
        table.seen(contact(number), 0.0)
    farthest = table.closest(table.key, defaults.K)[-1].key
    for index in range(bucket_index(table.key, farthest) + 1):
        table.bucket(index).refreshed = 0.0
    table.refreshed_near(farthest, 1.0)
    later = defaults.REFRESH_INTERVAL
    due = [bucket_index(table.key, key) for key in table.refresh_due(later, rng)]
    assert due == list(range(bucket_index(table.key, farthest) + 1))
    table.refreshed_near(None, later)
    assert [bucket_index(table.key, key) for key in table.refresh_due(later + 1, rng)] == [0]  # liars may hide there


@given(st.lists(st.floats(0.001, 2), min_size=1, max_size=20))
def test_round_trip_times_are_smoothed_within_their_range(samples: list[float]) -> None:
    table = RoutingTable(peer(0))
    for sample in samples:
        heard = contact(1)
        heard.rtt = sample
        table.seen(heard, 0.0)
    held = table.get(peer(1))
    assert held is not None
    assert held.rtt is not None
    assert min(samples) - 1e-9 <= held.rtt <= max(samples) + 1e-9


def test_touching_a_contact_is_seeing_it_again() -> None:
    one, other = RoutingTable(peer(0)), RoutingTable(peer(0))
    for table in (one, other):
        for number in range(1, 30):
            table.seen(contact(number), 0.0)
    for number in (3, 7, 3):
        held = one.get(peer(number))
        assert held is not None
        held.failures = 1
        one.touch(held, 5.0, 0.2)
        again = contact(number)
        again.rtt = 0.2
        other.seen(again, 5.0)
    assert [(c.peer, c.last_seen, c.rtt, c.failures) for c in one] == [
        (c.peer, c.last_seen, c.rtt, c.failures) for c in other
    ]
