"""The blobs of one node: serves those it holds within limits, fetches others, and lets the DHT know which it has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import trio

from ...transport import deadlines
from ...transport.endpoint import Endpoint
from ...transport.errors import ProtocolMisuse, RemoteError, RemoteRefused, WaitExpired
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ..kademlia.node import Dht
from . import defaults
from .ends import Sink, Source, StoreSink, StoreSource
from .fetch import Download, Fetched, OpenSink, Tell
from .messages import (
    BUSY,
    CHUNKS,
    INFO,
    LEAVES,
    MISSING,
    UNKNOWN,
    AskBlob,
    AskChunks,
    AskLeaves,
    BlobInfo,
    Leaves,
    Sent,
)
from .store import Store
from .tree import HASH_BYTES, Outline, Tree, page_count

log = logging.getLogger(__name__)


@attrs.define
class Counters:
    """What happened so far. ``liars``: peers that sent what was not the blob's; ``refused``: requests, as busy."""

    served: int = 0
    served_bytes: int = 0
    refused: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    liars: int = 0


class Blobs:
    """See the module. It serves from construction on; :meth:`run` announces what is in the store.

    ``store``: what is kept; sources in memory are added by :meth:`offer`.
    """

    def __init__(self, endpoint: Endpoint, dht: Dht, store: Store) -> None:
        self.endpoint, self.dht, self.store = endpoint, dht, store
        self.host = endpoint.host
        self.counters = Counters()
        self._offers: dict[bytes, Source] = {}
        #: When a blob was last asked for by somebody, by our clock, and the requests being answered.
        self._asked: dict[bytes, float] = {}
        self._serving: dict[bytes, int] = {}
        self._reads: dict[PeerId, int] = {}
        self._announced: dict[bytes, None] = {}
        self._wake = trio.Event()
        endpoint.serve(INFO, self._on_info)
        endpoint.serve(LEAVES, self._on_leaves)
        endpoint.serve(CHUNKS, self._on_chunks)

    # -- what is served ----------------------------------------------------------------------------------------------

    def offer(self, source: Source) -> None:
        """Serve a blob from memory, until :meth:`withdraw`. It is not announced: tell others who holds it."""
        self._offers[source.tree.id] = source

    def withdraw(self, blob: bytes) -> None:
        """Serve it no more; requests that are being answered are finished."""
        self._offers.pop(blob, None)
        self._asked.pop(blob, None)

    def idle(self, blob: bytes) -> float | None:
        """Seconds since an offered blob was last asked for, 0 while it is being sent; None: never asked for."""
        if self._serving.get(blob):
            return 0.0
        at = self._asked.get(blob)
        return None if at is None else self.host.now() - at

    def offered(self, blob: bytes) -> Source | None:
        return self._offers.get(blob)

    def _source(self, blob: bytes) -> Source:
        source = self._offers.get(blob)
        if source is not None:
            self._asked[blob] = self.host.now()
            return source
        tree = self.store.tree(blob) if len(blob) == HASH_BYTES else None
        if tree is None:
            raise RemoteRefused(UNKNOWN, f"blob {blob.hex()[:16]} is not held here")
        return StoreSource(self.host, self.store, tree)

    async def _on_info(self, call: Call[AskBlob]) -> BlobInfo:
        source = self._source(call.request.blob)
        bits = await source.bits()
        outline = source.tree.outline if call.request.outline else None
        return BlobInfo(outline, bits is None, b"" if bits is None else bits.encode())

    async def _on_leaves(self, call: Call[AskLeaves]) -> Leaves:
        source = self._source(call.request.blob)
        if not 0 <= call.request.page < page_count(source.tree.outline):
            raise RemoteRefused(MISSING, f"no page {call.request.page}")
        return Leaves(source.tree.page(call.request.page))

    async def _on_chunks(self, call: Call[AskChunks]) -> Sent:
        blob, chunks = call.request.blob, call.request.chunks
        source = self._source(blob)
        if not 0 < len(chunks) <= defaults.MAX_ASK_CHUNKS or not all(0 <= c < len(source.tree) for c in chunks):
            raise RemoteRefused(MISSING, f"no such {len(chunks)} chunks of a blob of {len(source.tree)}")
        with self._slot(call.peer, blob):
            for index in chunks:
                data = await source.read(index)
                if data is None:
                    raise RemoteRefused(MISSING, f"chunk {index} is not here")
                await self._send(call, memoryview(data))
        self.counters.served += 1
        return Sent()

    async def _send(self, call: Call[AskChunks], data: memoryview) -> None:
        link = call.link
        for at in range(0, len(data), defaults.SEND_PIECE):
            piece = data[at : at + defaults.SEND_PIECE]
            seconds = deadlines.bulk_phase(defaults.GIVE_UP, len(piece), link.rtt, link.bandwidth, link.lag)
            with trio.move_on_after(seconds) as scope:
                await call.write(piece)
            if scope.cancelled_caught:
                raise WaitExpired("reading of a chunk that was asked for", seconds, peer=call.peer.short)
            self.counters.served_bytes += len(piece)

    @contextmanager
    def _slot(self, peer: PeerId, blob: bytes) -> Iterator[None]:
        """One of the requests for chunks that are answered at once. Raises :class:`RemoteRefused` without one."""
        total, own = sum(self._reads.values()), self._reads.get(peer, 0)
        fair = own < defaults.FAIR_READS and total < defaults.READS + defaults.MAX_FAIR_READS
        if own >= defaults.READS_PER_PEER or (total >= defaults.READS and not fair):
            self.counters.refused += 1
            raise RemoteRefused(BUSY, f"{own} of your requests for chunks and {total} in all are being answered")
        self._reads[peer] = own + 1
        self._serving[blob] = self._serving.get(blob, 0) + 1
        try:
            yield
        finally:
            self._reads[peer] -= 1
            self._serving[blob] -= 1
            if not self._reads[peer]:
                del self._reads[peer]
            if not self._serving[blob]:
                del self._serving[blob]
            if blob in self._offers:
                self._asked[blob] = self.host.now()

    # -- fetching ----------------------------------------------------------------------------------------------------

    async def holders(self, blob: bytes) -> tuple[PeerId, ...]:
        """Peers that announced ``blob`` in the DHT."""
        return tuple(record.open(-float("inf")).peer for record in await self.dht.providers(blob))

    async def fetch(
        self,
        blob: bytes,
        open_sink: OpenSink,
        *,
        peers: Sequence[PeerId] = (),
        search: bool = True,
        accept: Callable[[Outline], str | None] = lambda outline: None,
        tell: Tell = lambda what, peer, detail: None,
        tree: Tree | None = None,
        patience: float = defaults.PATIENCE,
    ) -> Fetched:
        """Fetch ``blob`` from ``peers`` and, with ``search``, whoever announced it. See :class:`.fetch.Download`."""
        if len(blob) != HASH_BYTES:
            raise ProtocolMisuse(f"the id of a blob is {HASH_BYTES} bytes, not {len(blob)}")

        async def find() -> tuple[PeerId, ...]:
            return await self.holders(blob)

        done = await Download(
            self.endpoint,
            blob,
            open_sink,
            peers=peers,
            find=find if search else None,
            accept=accept,
            tell=tell,
            tree=tree,
            patience=patience,
        ).run()
        self.counters.fetched += 1
        self.counters.fetched_bytes += sum(size for _, size in done.received)
        self.counters.liars += len(done.liars)
        return done

    async def fetch_to_store(
        self,
        blob: bytes,
        *,
        peers: Sequence[PeerId] = (),
        search: bool = True,
        tag: str = "",
        note: bytes = b"",
        pinned: bool = False,
        accept: Callable[[Outline], str | None] = lambda outline: None,
        tell: Tell = lambda what, peer, detail: None,
        patience: float = defaults.PATIENCE,
    ) -> Fetched:
        """Fetch ``blob`` into the store, going on where an earlier try ended. Raises also as :meth:`.Store.begin`.

        Cancelled, what has come stays in the store, partial.
        """
        run = self.host.run_blocking
        held: list[bytes] = []

        async def open_sink(tree: Tree) -> Sink:
            await run(lambda: self.store.begin(tree, tag=tag, note=note, pinned=pinned))
            await run(self.store.hold, blob)
            held.append(blob)
            bits = await run(self.store.bits, blob)
            assert bits is not None
            return StoreSink(self.host, self.store, tree, bits)

        try:
            tree = await run(self.store.tree, blob)
            return await self.fetch(
                blob, open_sink, peers=peers, search=search, accept=accept, tell=tell, tree=tree, patience=patience
            )
        finally:
            for name in held:
                self.store.release(name)
            self._wake.set()

    # -- announcing --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Announce what the store holds, whole and large parts, and withdraw what it holds no more; until cancelled."""
        while True:
            self._wake = trio.Event()
            await self._announce()
            with trio.move_on_after(defaults.ANNOUNCE_EVERY):
                await self._wake.wait()

    async def _announce(self) -> None:
        entries = await self.host.run_blocking(self.store.entries)
        worth = [e.id for e in entries if e.complete or e.had >= defaults.ANNOUNCE_CHUNKS]
        wanted = dict.fromkeys(worth[-defaults.MAX_ANNOUNCED :])
        for blob in [blob for blob in self._announced if blob not in wanted]:
            del self._announced[blob]
            await self.dht.unprovide(blob)
        for blob in wanted:
            if blob in self._announced:
                continue
            self._announced[blob] = None
            try:
                await self.dht.provide(blob)
            except RemoteError as error:
                # It is in the DHT's care now, which tries again.
                log.debug("blob %s could not be announced: %s", blob.hex()[:16], error)
