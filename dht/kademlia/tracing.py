"""A lookup that tells of each of its queries: for people who look inside."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ...transport.address import SignedPeerRecord
from ...transport.errors import Overloaded, RemoteError
from ...transport.identity import PeerId
from . import messages
from .keys import node_key, to_bytes
from .lookup import Lookup
from .lookup_run import Reply
from .walk import Walker


@attrs.frozen
class Query:
    """One question of a lookup. Times in seconds, ``began`` from the lookup's beginning.

    ``hop``: 1 for our own contacts, one more than the first who named it for the others. ``bits``: of its distance to
    the target: 256 for the far half of the key space, fewer the nearer. ``named``: how many peers it named;
    ``nearest``: bits of the nearest of them, None when it named nobody. ``failure``: why it gave no answer, empty when
    it did.
    """

    peer: PeerId
    began: float
    seconds: float
    hop: int
    bits: int
    named: int
    nearest: int | None
    failure: str


async def trace(walker: Walker, target: int, *, paths: int, serving: bool) -> tuple[Lookup, list[Query], float]:
    """Find the peers closest to ``target``. Returns the finished lookup, its queries as they ended, and its seconds.

    Queries that were in flight when it ended are not told of. Cancelling cancels the lookup.
    """
    now, start = walker.host.now, walker.host.now()
    queries: list[Query] = []
    hops: dict[PeerId, int] = {}
    request = messages.Find(to_bytes(target), serving)

    def note(peer: PeerId, began: float, closer: Sequence[SignedPeerRecord], failure: str) -> None:
        hop = hops.setdefault(peer, 1)
        others = [record.claimed for record in closer if record.claimed is not None]
        for other in others:
            hops.setdefault(other, hop + 1)
        nearest = min(((node_key(other) ^ target).bit_length() for other in others), default=None)
        bits = (node_key(peer) ^ target).bit_length()
        queries.append(Query(peer, began - start, now() - began, hop, bits, len(others), nearest, failure))

    async def ask(peer: PeerId, _: Lookup) -> Reply:
        began = now()
        try:
            closer = (await walker.ask(peer, messages.FIND, request)).closer
        except (RemoteError, Overloaded) as error:
            note(peer, began, (), str(error))
            raise
        note(peer, began, closer, "")
        return Reply(closer)

    # Ours are the first hop, whoever else names them.
    hops.update((contact.peer, 1) for contact in walker.table.closest(target, walker.table.k))
    lookup = await walker.walk(target, ask, paths=paths)
    return lookup, queries, now() - start
