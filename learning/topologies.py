"""Who meets whom in a gossip round: groups as a pure function of the run's seed, the round and the peers.

Everybody who knows the same peers computes the same groups without a word (:class:`.gossip.Gossip`)::

    all                 one group
    random              a shared-seed shuffle, cut in groups (:func:`.rounds.decisions.random_groups`)
    grid                peers on a grid of d axes with ``size`` places each; a round joins the lines along one axis, the
                        next round those along the next (Ryabinin et al. 2021, arXiv 2103.03239). With exactly
                        ``size ** d`` peers the mean of all is exact after d rounds
    ring, full, regular:DEGREE, barabasi-albert:EDGES
                        a fixed graph, drawn from the seed; a round is a random maximal matching of its edges: pairs

Who is left over is alone for that round.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TypeAlias

from ..transport.errors import ConfigError
from ..transport.identity import PeerId

#: Topologies without a parameter, and what those with one are called with.
PLAIN = ("all", "random", "grid", "ring", "full")
WITH_DEGREE = {"regular": "regular:4", "barabasi-albert": "barabasi-albert:2"}

#: Edges per peer that may be asked for.
MAX_DEGREE = 16

Groups: TypeAlias = tuple[tuple[PeerId, ...], ...]


def check(topology: str) -> None:
    """Raises :class:`ConfigError` for what names no topology; needs neither torch nor networkx."""
    kind, colon, degree = topology.partition(":")
    if topology in PLAIN:
        return
    if kind not in WITH_DEGREE:
        known = ", ".join((*PLAIN, *WITH_DEGREE.values()))
        raise ConfigError(f"unknown topology {topology[:64]!r}: there are {known}")
    if not (colon and degree.isascii() and degree.isdigit() and 1 <= int(degree[:4]) <= MAX_DEGREE):
        raise ConfigError(f"topology {topology[:64]!r}: {kind} takes edges per peer, 1 to {MAX_DEGREE}, for instance "
                          f"{WITH_DEGREE[kind]}")  # fmt: skip


def check_strategy(topology: str, strategy: str, replicated: bool, group: int) -> None:
    """Raises :class:`ConfigError` when a run of ``strategy`` can have no ``topology``. Empty: none was asked for.

    ``replicated``, ``group``: of the strategy, see :class:`.strategies.base.Strategy`.
    """
    if not topology:
        return
    check(topology)
    if replicated:
        raise ConfigError(
            f"strategy {strategy} does its rounds with all peers, whose states are the same: a topology ({topology}) "
            "is for strategies that gossip, such as noloco and gossip"
        )
    if group == 1:
        raise ConfigError(f"strategy {strategy} exchanges nothing, along no topology ({topology})")


def groups(topology: str, seed: int, round: int, peers: Sequence[PeerId], size: int) -> tuple[Groups, str]:
    """The groups of ``round`` (1 for the first): each in canonical order, together all of ``peers``; and the reason.

    ``size``: peers in a group of ``random``, places along an axis of ``grid`` (0: all, and a square); else unused.
    Raises :class:`ConfigError` for what names no topology.
    """
    order = tuple(sorted(peers))
    if not order:
        return (), "nobody is here"
    if topology == "all":
        return (order,), "all together"
    if topology == "random":
        from .rounds.decisions import random_groups

        found = random_groups(seed, round, order, size or len(order))
        return found, f"{len(found)} random groups"
    if topology == "grid":
        return _lines(_shuffled(seed, order), round, size)
    check(topology)
    places = _shuffled(seed, order)
    pairs = _matching(topology, seed, round, len(places))
    left = dict.fromkeys(places)
    met: list[tuple[PeerId, ...]] = []
    for one, other in pairs:
        met.append(tuple(sorted((places[one], places[other]))))
        left.pop(places[one])
        left.pop(places[other])
    return (*met, *((peer,) for peer in left)), f"{len(met)} pairs along edges of {topology}"


def group_of(
    topology: str, seed: int, round: int, peer: PeerId, peers: Sequence[PeerId], size: int
) -> tuple[tuple[PeerId, ...], str]:
    """The group of ``peer`` among :func:`groups`, and the reason."""
    found, why = groups(topology, seed, round, peers, size)
    for number, group in enumerate(found):
        if peer in group:
            return group, f"group {number + 1} of {len(found)}, {why}"
    raise ValueError(f"{peer.short} is none of the peers")


def neighbours(topology: str, seed: int, peers: Sequence[PeerId]) -> dict[PeerId, tuple[PeerId, ...]]:
    """Whom each of ``peers`` can ever meet in a graph topology, in canonical order. For looking at."""
    check(topology)
    places = _shuffled(seed, sorted(peers))
    if topology == "full":
        edges: tuple[tuple[int, int], ...] = tuple((i, j) for j in range(len(places)) for i in range(j))
    else:
        edges = _edges(topology, seed, len(places))
    found: dict[PeerId, list[PeerId]] = {peer: [] for peer in sorted(peers)}
    for one, other in edges:
        found[places[one]].append(places[other])
        found[places[other]].append(places[one])
    return {peer: tuple(sorted(others)) for peer, others in found.items()}


def _shuffled(seed: int, peers: Sequence[PeerId]) -> tuple[PeerId, ...]:
    """The place of each in the grid or graph: nobody's key gives it the one it would like, but by trying many."""
    label = seed.to_bytes(16, "big", signed=True)
    return tuple(
        sorted(peers, key=lambda p: hashlib.blake2b(label + p.key, digest_size=16, person=b"shoal place").digest())
    )


def _lines(places: tuple[PeerId, ...], round: int, size: int) -> tuple[Groups, str]:
    count = len(places)
    side = size
    if side < 2:
        side = 1
        while side * side < count:
            side += 1
    side = max(side, 2)
    axes = 1
    while side**axes < count:
        axes += 1
    axis = (round - 1) % axes
    stride = side**axis
    lines: dict[int, list[PeerId]] = {}
    for place, peer in enumerate(places):
        # All coordinates but the one along the axis.
        lines.setdefault(place - (place // stride % side) * stride, []).append(peer)
    found = tuple(tuple(sorted(line)) for line in lines.values())
    return found, f"lines along axis {axis + 1} of {axes}, {side} places each"


@functools.lru_cache(maxsize=256)
def _matching(topology: str, seed: int, round: int, count: int) -> tuple[tuple[int, int], ...]:
    """A maximal matching: edges in random order, each taken whose ends are both free."""
    label = seed.to_bytes(16, "big", signed=True) + round.to_bytes(8, "big")

    def drawn(*ends: int) -> bytes:
        data = label + b"".join(end.to_bytes(4, "big") for end in ends)
        return hashlib.blake2b(data, digest_size=16, person=b"shoal matching").digest()

    if topology == "full":
        # In the complete graph that is a shuffle, cut in pairs: no need to draw n² edges.
        order = sorted(range(count), key=drawn)
        return tuple(zip(order[0::2], order[1::2], strict=False))
    free = [True] * count
    found = []
    for one, other in sorted(_edges(topology, seed, count), key=lambda edge: drawn(*edge)):
        if free[one] and free[other]:
            free[one] = free[other] = False
            found.append((one, other))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _edges(topology: str, seed: int, count: int) -> tuple[tuple[int, int], ...]:
    """Of the graph over places ``0..count-1``, the smaller end first, sorted."""
    import networkx

    kind, _, text = topology.partition(":")
    degree = int(text or 0)
    drawn = hashlib.blake2b(f"{seed} {topology} {count}".encode(), digest_size=4, person=b"shoal graph").digest()
    number = int.from_bytes(drawn, "big")
    if kind == "ring":
        graph = networkx.cycle_graph(count) if count > 2 else networkx.path_graph(count)
    elif degree >= count:
        graph = networkx.complete_graph(count)
    elif kind == "regular":
        # There is none where both are odd: with one place more, which stays empty, all but a few have the degree.
        places = count + (degree * count) % 2
        # networkx draws edges until they fit, for minutes and more where most of all edges are to be in the graph.
        others = places - 1 - degree
        graph = networkx.random_regular_graph(min(degree, others), places, seed=number)
        if others < degree:
            graph = networkx.complement(graph)
    else:
        graph = networkx.barabasi_albert_graph(count, degree, seed=number)
    edges = {(min(one, other), max(one, other)) for one, other in graph.edges if max(one, other) < count}
    return tuple(sorted(edges))
