"""Who meets whom: groups that all peers compute alike, each peer in exactly one."""

from __future__ import annotations

import hashlib
import random

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.learning import topologies
from shoal.learning.rounds import decisions
from shoal.transport.errors import ConfigError
from shoal.transport.identity import PeerId

NAMES = ("all", "random", "grid", "ring", "full", "regular:4", "regular:3", "barabasi-albert:2")
GRAPHS = NAMES[3:]


def peers(count: int) -> tuple[PeerId, ...]:
    return tuple(PeerId(hashlib.blake2b(b"%d" % n, digest_size=32).digest()) for n in range(count))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), st.integers(1, 30), st.integers(-9, 9), st.integers(1, 40), st.integers(0, 6))
def test_every_peer_is_in_exactly_one_group_and_all_compute_the_same(
    name: str, count: int, seed: int, round: int, size: int
) -> None:
    everybody = peers(count)
    found, reason = topologies.groups(name, seed, round, everybody, size)
    assert sorted(peer for group in found for peer in group) == sorted(everybody)
    assert all(list(group) == sorted(group) for group in found)
    assert reason
    # Whoever asks, in whatever order it holds the view.
    shuffled = list(everybody)
    random.Random(seed).shuffle(shuffled)
    for peer in shuffled:
        group, _ = topologies.group_of(name, seed, round, peer, shuffled, size)
        assert peer in group
        assert group in found


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(GRAPHS), st.integers(2, 30), st.integers(0, 9), st.integers(1, 40))
def test_pairs_are_a_maximal_matching_of_the_edges(name: str, count: int, seed: int, round: int) -> None:
    everybody = peers(count)
    edges = topologies.neighbours(name, seed, everybody)
    found, _ = topologies.groups(name, seed, round, everybody, 2)
    alone = {group[0] for group in found if len(group) == 1}
    for group in found:
        assert len(group) <= 2
        if len(group) == 2:
            assert group[1] in edges[group[0]]
            assert group[0] in edges[group[1]]
    assert not any(other in alone for peer in alone for other in edges[peer])


@pytest.mark.parametrize("name", GRAPHS)
def test_along_a_graph_news_gets_everywhere(name: str) -> None:
    edges = topologies.neighbours(name, 3, peers(21))
    graph = networkx.Graph([(peer, other) for peer, others in edges.items() for other in others])
    assert networkx.is_connected(graph)
    degrees = sorted(len(others) for others in edges.values())
    if name == "ring":
        assert degrees == [2] * 21
    if name == "regular:4":
        assert degrees == [4] * 21
    if name == "regular:3":  # 21 peers of 3 edges: some have one less
        assert degrees == [2] * 3 + [3] * 18


@pytest.mark.parametrize(("side", "axes"), [(10, 2), (3, 3), (2, 4)])
def test_a_full_grid_has_the_mean_of_all_after_a_round_along_each_axis(side: int, axes: int) -> None:
    everybody = peers(side**axes)
    values = {peer: torch.tensor(float(n), dtype=torch.float64) for n, peer in enumerate(everybody)}
    mean = sum(values.values()) / len(values)
    for round in range(5, 5 + axes):
        found, _ = topologies.groups("grid", 1, round, everybody, side)
        assert {len(group) for group in found} == {side}
        for group in found:
            values.update(dict.fromkeys(group, sum(values[peer] for peer in group) / side))
    assert all(torch.isclose(value, mean) for value in values.values())
    if side == 10:
        assert topologies.groups("grid", 1, 5, everybody, 0) == topologies.groups("grid", 1, 5, everybody, 10)


def test_random_groups_are_those_that_runs_have_always_had() -> None:
    everybody = peers(9)
    for peer in everybody:
        group, _ = topologies.group_of("random", 4, 7, peer, everybody, 2)
        assert group == decisions.group_of(4, 7, peer, everybody, 2)[0]


@pytest.mark.parametrize("name", ["rings", "", "regular", "regular:0", "regular:65", "regular:x", "barabasi-albert:-1"])
def test_what_names_no_topology_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown topology|takes edges per peer"):
        topologies.groups(name, 0, 1, peers(3), 2)


def test_a_strategy_whose_peers_are_all_alike_or_alone_has_no_topology() -> None:
    topologies.check_strategy("", "diloco", replicated=True, group=0)
    topologies.check_strategy("ring", "noloco", replicated=False, group=2)
    with pytest.raises(ConfigError, match="strategy diloco does its rounds with all peers"):
        topologies.check_strategy("ring", "diloco", replicated=True, group=0)
    with pytest.raises(ConfigError, match="local exchanges nothing"):
        topologies.check_strategy("ring", "local", replicated=False, group=1)


@pytest.mark.parametrize("degree", [5, 11, 14, 16])
def test_a_regular_graph_is_there_however_dense(degree: int) -> None:
    """networkx draws edges of dense ones until they fit: for minutes, on the event loop of every peer."""
    for count in range(degree + 1, degree + 9):
        edges = topologies.neighbours(f"regular:{degree}", 3, peers(count))
        degrees = sorted(len(others) for others in edges.values())
        if degree * count % 2 == 0:
            assert degrees == [degree] * count
        else:
            assert degrees[-1] == degree and sum(degrees) >= degree * (count - 1) - 1
            assert topologies.groups(f"regular:{degree}", 3, 1, peers(count), 2)
