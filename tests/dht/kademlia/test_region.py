"""How many peers there are, and whether a place is crowded or hidden: chance rarely says so, attackers always."""

from __future__ import annotations

import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.kademlia import defaults
from shoal.dht.kademlia.keys import BITS, bucket_index
from shoal.dht.kademlia.region import (
    SizeEstimate,
    crowded,
    hidden,
    in_region,
    region_bits,
    region_targets,
    swarm_size,
)

K = defaults.K


def closest(rng: random.Random, place: int, size: int, count: int = K) -> list[int]:
    return sorted(rng.getrandbits(BITS) ^ place for _ in range(size))[:count]


def test_the_size_is_estimated_from_the_closest_within_a_quarter() -> None:
    rng = random.Random(1)
    for size in (100, 1000, 5000):
        found = [swarm_size(closest(rng, rng.getrandbits(BITS), size)) / size for _ in range(60)]
        assert 0.93 < statistics.median(found) < 1.12
        assert statistics.pstdev(found) < 0.3


def test_a_few_wrong_samples_move_the_estimate_little() -> None:
    rng, estimate = random.Random(2), SizeEstimate()
    assert estimate.value is None
    estimate.note([1, 2], 0.0)  # too few to say anything
    assert estimate.value is None
    for _ in range(11):
        estimate.note(closest(rng, 0, 2000), 0.0)
    for _ in range(4):
        estimate.note([number << 100 for number in range(1, K + 1)], 0.0)
    assert estimate.value is not None
    assert 1400 < estimate.value < 3000


def test_an_old_estimate_is_forgotten_before_it_is_held_against_anybody() -> None:
    rng, estimate = random.Random(6), SizeEstimate()
    for _ in range(10):
        estimate.note(closest(rng, 0, 100), 5.0)
    assert not estimate.renew(5.0 + defaults.SIZE_FRESH - 1)
    assert estimate.renew(5.0 + defaults.SIZE_FRESH)
    assert estimate.value is None
    assert not estimate.renew(6.0 + defaults.SIZE_FRESH)  # somebody is at it
    estimate.note(closest(rng, 0, 2000), 70.0)
    assert estimate.value is not None
    assert estimate.value > 1000


def test_chance_crowds_no_place_and_hides_nobody() -> None:
    rng = random.Random(3)
    wrong = 0
    for _ in range(300):
        distances = closest(rng, rng.getrandbits(BITS), 1000)
        wrong += crowded(distances, 1000.0, K)[0] + hidden(distances, 1000.0, K)[0]
    assert wrong <= 1


def test_peers_ground_around_a_place_are_noticed() -> None:
    rng = random.Random(4)
    for _ in range(50):
        honest = closest(rng, 0, 1000)
        ground = [rng.randrange((1 << BITS) // 1000) for _ in range(24)]
        decision, reason = crowded(sorted(honest + ground)[:K], 1000.0, K)
        assert decision
        assert "times as close" in reason


def test_a_world_of_few_accomplices_is_noticed() -> None:
    rng = random.Random(5)
    for _ in range(50):
        assert hidden(closest(rng, 0, 150), 1000.0, K)[0]


def test_small_swarms_are_left_alone() -> None:
    assert not crowded([1] * K, 30.0, K)[0]
    assert not crowded([1] * K, None, K)[0]
    assert not crowded([1] * 5, 1000.0, K)[0]
    assert not hidden([], 1000.0, K)[0]
    assert not hidden([1 << 255], 30.0, K)[0]


@given(st.integers(0, (1 << BITS) - 1), st.integers(45, 10**6), st.integers(0, 1 << 30))
def test_region_lookups_go_beside_the_crowd_within_the_region(place: int, size: int, seed: int) -> None:
    bits = region_bits(size, K)
    targets = region_targets(place, size, K, random.Random(seed))
    assert len(targets) == defaults.REGION_LOOKUPS
    assert [bucket_index(place, target) for target in targets] == [bits + n for n in range(len(targets))]
    assert all(in_region(target ^ place, size, K) for target in targets)
    # The region holds k to 2k honest peers, and a bit more.
    assert K <= size / (1 << bits) < 2 * K + 1


def test_a_region_leaves_out_what_is_far() -> None:
    assert in_region(0, 1000, K)
    assert not in_region((1 << BITS) - 1, 1000, K)
