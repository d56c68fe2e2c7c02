"""The lookup in its simplest form, one query at a time: what :mod:`shoal.dht.kademlia.lookup` is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ...transport.identity import PeerId
from .keys import node_key


def reference_lookup(
    target: int, seeds: Iterable[PeerId], query: Callable[[PeerId], Sequence[PeerId] | None], *, own: PeerId, k: int
) -> tuple[list[PeerId], list[PeerId]]:
    """The ``k`` closest peers that answer, and the queries in order. ``query`` returns the named peers, or None."""

    def distance(peer: PeerId) -> int:
        return node_key(peer) ^ target

    known = {peer for peer in seeds if peer != own}
    answered: set[PeerId] = set()
    failed: set[PeerId] = set()
    queries: list[PeerId] = []
    while True:
        nearest = sorted(known - failed, key=distance)[:k]
        left = [peer for peer in nearest if peer not in answered]
        if not left:
            return nearest, queries
        peer = left[0]
        queries.append(peer)
        named = query(peer)
        if named is None:
            failed.add(peer)
        else:
            answered.add(peer)
            known |= {other for other in named if other != own}
