"""The lookup state machine against the reference, among honest, dead and lying peers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.keys import node_key
from shoal.dht.kademlia.lookup import Answered, Failed, Lookup, Slow, State
from shoal.dht.kademlia.reference import reference_lookup
from shoal.dht.kademlia.table import Contact, RoutingTable
from shoal.transport.address import SignedPeerRecord
from shoal.transport.errors import ProtocolMisuse
from shoal.transport.identity import PeerId

Query = Callable[[PeerId], Sequence[PeerId] | None]


def random_peer(rng: random.Random) -> PeerId:
    return PeerId(rng.randbytes(32))


def drive(lookup: Lookup, query: Query, rng: random.Random) -> list[PeerId]:
    """Answer the lookup's queries in random order; returns them in the order they were sent."""
    pending = list(lookup.start())
    queries = list(pending)
    while not lookup.done:
        assert pending, "the lookup waits for nobody"
        peer = pending.pop(rng.randrange(len(pending)))
        named = query(peer)
        due = lookup.receive(Failed(peer) if named is None else Answered(peer, tuple(named)))
        pending += due
        queries += due
    return queries


class Network:
    """``n`` peers with routing tables as Kademlia fills them; some dead, some lying."""

    def __init__(self, seed: int, n: int, *, k: int = 8, dead: float = 0.0, liars: float = 0.0) -> None:
        self.rng, self.k = random.Random(seed), k
        self.peers = [random_peer(self.rng) for _ in range(n)]
        self.tables: dict[PeerId, RoutingTable] = {}
        for peer in self.peers:
            table = self.tables[peer] = RoutingTable(peer, k=k)
            for other in self.rng.sample(self.peers, n):
                table.seen(Contact(other, SignedPeerRecord(b"", b""), 0.0, (), 0.0), 0.0)
        shuffled = self.rng.sample(self.peers, n)
        self.dead = dict.fromkeys(shuffled[: int(n * dead)])
        self.liars = dict.fromkeys(shuffled[int(n * dead) : int(n * (dead + liars))])
        self.honest = [peer for peer in self.peers if peer not in self.dead and peer not in self.liars]
        self.lie: Callable[[int], Sequence[PeerId]] = lambda target: ()

    def query(self, target: int) -> Query:
        def ask(peer: PeerId) -> Sequence[PeerId] | None:
            if peer in self.liars:
                return self.lie(target)
            if peer in self.dead or peer not in self.tables:
                return None
            return [c.peer for c in self.tables[peer].closest(target, self.k)]

        return ask

    def seeds(self, asker: PeerId, target: int) -> list[PeerId]:
        return [c.peer for c in self.tables[asker].closest(target, self.k)]

    def truth(self, target: int, asker: PeerId) -> list[PeerId]:
        live = [peer for peer in self.peers if peer not in self.dead and peer != asker]
        return sorted(live, key=lambda peer: node_key(peer) ^ target)[: self.k]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 0.8), st.integers(1, 12))
def test_one_query_at_a_time_it_is_exactly_the_reference_on_any_graph(seed: int, n: int, dead: float, k: int) -> None:
    rng = random.Random(seed)
    peers = [random_peer(rng) for _ in range(n)]
    # Nobody names as many as would discredit it if all of them were dead: the reference believes everybody.
    most = min(n, 2 * k, defaults.DISCREDIT_FAILURES - 1)
    graph = {p: rng.sample(peers, rng.randint(0, most)) for p in peers if rng.random() >= dead}
    target, seeds = rng.getrandbits(256), rng.sample(peers, min(n, k))
    lookup = Lookup(target, seeds, own=peers[0], k=k, alpha=1, alpha_max=1)
    queries = drive(lookup, graph.get, rng)
    expected, expected_queries = reference_lookup(target, seeds, graph.get, own=peers[0], k=k)
    assert list(lookup.closest) == expected
    assert queries == expected_queries


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80), st.floats(0, 0.25), st.integers(1, 4))
def test_in_parallel_and_on_disjoint_paths_it_finds_what_the_reference_finds(
    seed: int, n: int, dead: float, paths: int
) -> None:
    net = Network(seed, n, dead=dead)
    if not net.honest:
        return
    asker, target = net.rng.choice(net.honest), net.rng.getrandbits(256)
    lookup = Lookup(target, net.seeds(asker, target), own=asker, k=net.k, paths=paths)
    queries = drive(lookup, net.query(target), net.rng)
    expected, _ = reference_lookup(target, net.seeds(asker, target), net.query(target), own=asker, k=net.k)
    assert len(queries) == len(set(queries))
    assert asker not in queries
    # More queries in flight may only add peers that the reference did not hear of.
    assert [node_key(p) ^ target for p in lookup.closest] <= [node_key(p) ^ target for p in expected] or (
        len(lookup.closest) > len(expected)
    )
    if not net.dead:
        assert list(lookup.closest) == expected == net.truth(target, asker)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 50), st.integers(1, 8), st.integers(1, 4))
def test_on_any_graph_it_ends_with_the_k_closest_known_all_answered(seed: int, n: int, k: int, paths: int) -> None:
    rng = random.Random(seed)
    peers = [random_peer(rng) for _ in range(n)]
    graph = {p: rng.sample(peers, rng.randint(0, min(n, k))) for p in peers if rng.random() > 0.2}
    target = rng.getrandbits(256)
    lookup = Lookup(target, rng.sample(peers, min(n, k)), k=k, paths=paths)
    drive(lookup, graph.get, rng)
    states = lookup.states()
    live = sorted((p for p, s in states.items() if s is not State.FAILED), key=lambda p: node_key(p) ^ target)
    assert list(lookup.closest) == live[:k]
    assert all(states[p] is State.ANSWERED for p in live[:k])


def test_the_closest_live_peers_are_found_right_after_a_third_died() -> None:
    # Tables still name the dead, so peers beyond the 20 closest of before are named by nobody yet.
    for seed in range(12):
        net = Network(seed, 150, dead=0.33, k=20)
        asker, target = net.honest[0], net.rng.getrandbits(256)
        lookup = Lookup(target, net.seeds(asker, target), own=asker)
        drive(lookup, net.query(target), net.rng)
        assert list(lookup.closest[:10]) == net.truth(target, asker)[:10]


LIES: dict[str, Callable[[Network], Callable[[int], Sequence[PeerId]]]] = {
    "names nobody": lambda net: lambda target: (),
    "names peers that do not exist": lambda net: lambda target: [random_peer(net.rng) for _ in range(20)],
    "names a thousand peers": lambda net: lambda target: [random_peer(net.rng) for _ in range(1000)],
    "names only its friends": lambda net: lambda target: list(net.liars)[:20],
    "names dead peers close by": lambda net: (
        lambda target: sorted((random_peer(net.rng) for _ in range(60)), key=lambda p: node_key(p) ^ target)[:20]
    ),
    "names one peer twenty times": lambda net: lambda target: [net.peers[0]] * 20,
}


@pytest.mark.parametrize("lie", list(LIES))
def test_liars_do_not_keep_honest_peers_from_being_found(lie: str) -> None:
    found = queries = 0
    for seed in range(8):
        net = Network(seed, 120, liars=0.2, k=20)
        net.lie = LIES[lie](net)
        asker, target = net.honest[0], net.rng.getrandbits(256)
        lookup = Lookup(target, net.seeds(asker, target), own=asker, paths=defaults.CAREFUL_PATHS)
        queries += len(drive(lookup, net.query(target), net.rng))
        closest = net.truth(target, asker)
        honest = [p for p in closest if p not in net.liars]
        found += set(honest) <= set(lookup.closest)
    assert found == 8
    assert queries / 8 <= defaults.MAX_QUERIES / 2


def test_parallelism_rises_while_peers_fail_and_falls_with_progress() -> None:
    rng = random.Random(5)
    peers = [random_peer(rng) for _ in range(60)]
    dead = Lookup(0, peers, k=20)
    in_flight = len(dead.start())
    assert in_flight == defaults.ALPHA
    pending = [p for p, s in dead.states().items() if s is State.ASKED]
    peak = in_flight
    while not dead.done:
        pending += dead.receive(Failed(pending.pop(0)))
        peak = max(peak, len(pending))
    assert peak == defaults.ALPHA_MAX
    good = Lookup(0, sorted(peers, key=lambda p: -node_key(p))[:20], k=20)
    pending = list(good.start())
    closer = sorted(peers, key=node_key)[:20]
    assert len(good.receive(Answered(pending.pop(), tuple(closer)))) == 1


def test_a_lookup_with_nobody_to_ask_is_done_at_once() -> None:
    lookup = Lookup(1, [])
    assert lookup.start() == ()
    assert lookup.done
    assert lookup.closest == ()
    assert lookup.hops == 0


def test_an_answer_that_was_not_asked_for_is_misuse() -> None:
    rng = random.Random(1)
    peer = random_peer(rng)
    lookup = Lookup(1, [peer])
    lookup.start()
    with pytest.raises(ProtocolMisuse, match="no query in flight"):
        lookup.receive(Failed(random_peer(rng)))
    lookup.receive(Failed(peer))
    with pytest.raises(ProtocolMisuse, match="no query in flight"):
        lookup.receive(Answered(peer, ()))


def test_an_endless_chain_of_closer_liars_ends_at_the_query_limit() -> None:
    rng = random.Random(3)
    lookup = Lookup(0, [random_peer(rng)], k=20)
    queries = drive(lookup, lambda peer: [random_peer(rng) for _ in range(20)], rng)
    assert len(queries) <= defaults.MAX_QUERIES
    assert len(lookup.states()) <= defaults.MAX_CANDIDATES + 20


def test_each_peer_is_queried_on_one_path_only_and_writes_cost_little_more() -> None:
    single = several = 0
    for seed in range(5):
        net = Network(seed, 200, k=20)
        asker, target = net.honest[0], net.rng.getrandbits(256)
        for paths in (1, defaults.CAREFUL_PATHS):
            lookup = Lookup(target, net.seeds(asker, target), own=asker, paths=paths)
            queries = drive(lookup, net.query(target), net.rng)
            assert len(queries) == len(set(queries))
            assert list(lookup.closest) == net.truth(target, asker)
            if paths == 1:
                single += len(queries)
            else:
                several += len(queries)
    assert several <= 1.6 * single


def test_with_as_many_queries_in_flight_as_answers_are_missing_none_are_added() -> None:
    rng = random.Random(5)
    peers = [random_peer(rng) for _ in range(20)]
    lookup = Lookup(rng.getrandbits(256), peers, alpha=3)
    first = lookup.start()
    assert len(first) == 3
    lookup.expect(2)
    assert lookup.receive(Answered(first[0], ())) == ()  # two are in flight, two are missing
    replaced = lookup.receive(Failed(first[1]))
    assert len(replaced) == 1  # one that failed is made up for
    assert len(lookup.receive(Slow(first[2]))) == 1  # and one that is slow
    lookup.expect(1)
    assert lookup.receive(Answered(replaced[0], ())) == ()


@pytest.mark.parametrize("paths", [1, 3])
def test_a_settled_lookup_asks_fewer_and_ranks_almost_the_same_peers(paths: int) -> None:
    network = Network(7, 300, k=20, dead=0.1)
    full, short, agree, asked = 0, 0, 0, 0
    for _ in range(40):
        target = network.rng.getrandbits(256)
        seeds = [c.peer for c in network.tables[network.rng.choice(network.honest)].closest(target, 20)]
        whole = Lookup(target, seeds, k=20, paths=paths)
        full += len(drive(whole, network.query(target), random.Random(1)))
        settled = Lookup(target, seeds, k=20, paths=paths, settled=3)
        short += len(drive(settled, network.query(target), random.Random(1)))
        living = [peer for peer in settled.ranked(40) if peer not in network.dead][:20]
        agree += len([peer for peer in whole.closest if peer in living])
        asked += len(whole.closest)
        assert list(settled.ranked(40)) == sorted(settled.ranked(40), key=lambda peer: node_key(peer) ^ target)
    assert short < 0.75 * full
    assert agree >= 0.97 * asked


def test_a_peer_that_cannot_be_reached_is_ranked_no_more() -> None:
    rng = random.Random(6)
    peers = [random_peer(rng) for _ in range(4)]
    lookup = Lookup(rng.getrandbits(256), peers, k=4, settled=1)
    drive(lookup, lambda peer: (), rng)
    unasked = [peer for peer in lookup.ranked(4) if lookup.states()[peer] is State.NEW]
    assert unasked
    lookup.discard(unasked[0])
    assert unasked[0] not in lookup.ranked(4)
    assert lookup.closest[0] in lookup.ranked(4)


def far_and_near(rng: random.Random, near: int, far: int) -> tuple[list[PeerId], list[PeerId]]:
    """Peers in the target's half of the key space (target 0), and in the other."""
    peers = [random_peer(rng) for _ in range(8 * (near + far))]
    halves = [p for p in peers if not node_key(p) >> 255], [p for p in peers if node_key(p) >> 255]
    return halves[0][:near], halves[1][:far]


def test_a_slow_peer_gives_its_place_and_still_counts_when_it_answers() -> None:
    rng = random.Random(1)
    seeds = sorted((random_peer(rng) for _ in range(8)), key=node_key)
    lookup = Lookup(0, seeds, k=3, alpha=2, alpha_max=2)
    assert list(lookup.start()) == seeds[:2]
    assert list(lookup.receive(Slow(seeds[0]))) == [seeds[2]]
    with pytest.raises(ProtocolMisuse, match="slow before"):
        lookup.receive(Slow(seeds[0]))
    lookup.receive(Answered(seeds[1], ()))
    assert list(lookup.receive(Answered(seeds[2], ()))) == []  # the fourth is on its way
    lookup.receive(Answered(seeds[0], ()))
    assert lookup.closest[:3] == tuple(seeds[:3])


def test_a_peer_that_names_others_under_forged_records_counts_for_nothing() -> None:
    rng = random.Random(2)
    liar, honest, named = (random_peer(rng) for _ in range(3))
    lookup = Lookup(0, [liar, honest], k=3, alpha=1, alpha_max=1)
    (first,) = lookup.start()
    following = lookup.receive(Answered(first, (named,)))
    lookup.expose(first)
    for peer in following:
        lookup.receive(Answered(peer, ()))
    assert first not in lookup.closest


def test_one_path_begins_outside_where_the_closest_contacts_may_be_of_one_mind() -> None:
    rng = random.Random(3)
    near, far = far_and_near(rng, 20, 3)
    truth = min((random_peer(rng) for _ in range(500)), key=node_key)

    def ask(peer: PeerId) -> list[PeerId]:
        # The near ones are accomplices that name one another; only those elsewhere know who is closest.
        return near if peer in near else [truth]

    surrounded = Lookup(0, near, k=20, paths=8)
    drive(surrounded, ask, rng)
    assert truth not in surrounded.states()
    escaped = Lookup(0, near, k=20, paths=8, outside=far)
    drive(escaped, ask, rng)
    assert truth in escaped.closest


def test_far_from_the_target_the_quickest_of_a_bucket_are_asked_and_near_it_the_closest() -> None:
    rng = random.Random(4)
    _, far = far_and_near(rng, 0, 20)
    costs = {peer: rng.random() for peer in far}
    first = Lookup(0, far, k=20).start(costs)
    assert sorted(first, key=lambda peer: costs[peer]) == sorted(far, key=lambda peer: costs[peer])[: defaults.ALPHA]
    assert list(Lookup(0, far, k=20).start()) == sorted(far, key=node_key)[: defaults.ALPHA]
    # A bucket of a few is not far from the target.
    few = far[:4]
    assert list(Lookup(0, few, k=20).start(costs)) == sorted(few, key=node_key)[: defaults.ALPHA]
