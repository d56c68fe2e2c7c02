"""An open document as the application sees it: read, write, and wait for changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import trio

from ...transport.endpoint import Endpoint
from ...transport.errors import ConfigError
from ...transport.identity import PeerId
from .envelope import Envelope
from .keeper import Keeper
from .policy import DocumentSpec
from .reconcile import Tree
from .replica import Replica

if TYPE_CHECKING:
    import pycrdt


@attrs.frozen
class DocumentInfo:
    """What is held of a document. ``size``: bytes of updates."""

    name: str
    id: bytes
    authors: int
    envelopes: int
    size: int
    frozen: tuple[PeerId, ...]


class Document:
    """One document of :class:`shoal.dht.documents.service.Documents`, which makes it."""

    def __init__(
        self,
        endpoint: Endpoint,
        keeper: Keeper,
        replica: Replica,
        written: Callable[[Document, Envelope], None],
    ) -> None:
        self.spec: DocumentSpec = replica.spec
        self.replica = replica
        self._endpoint, self._keeper, self._written = endpoint, keeper, written
        self._writing = trio.Lock()
        self._version = 0
        self._touched: dict[PeerId, int] = {}  # author → version of its last change, newest last
        self._more = trio.Event()
        self._tree: tuple[bytes, Tree] | None = None

    @property
    def id(self) -> bytes:
        return self.spec.id

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> dict[PeerId, dict[str, Any]]:
        """Every author's root types by name, as plain Python. Not to be changed."""
        return self.replica.read()

    def own(self) -> dict[str, Any]:
        """What we wrote ourselves."""
        return self.replica.read().get(self._endpoint.peer_id, {})

    def subscribe(self) -> Subscription:
        """Changes from now on."""
        return Subscription(self)

    def info(self) -> DocumentInfo:
        ranges = self.replica.summary()
        envelopes = sum(held.next - held.first for held in ranges)
        frozen = tuple(held.author for held in ranges if held.frozen)
        return DocumentInfo(self.spec.name, self.id, len(ranges), envelopes, self.replica.size, frozen)

    def tree(self) -> Tree:
        """What we hold, hashed; made anew when it has changed."""
        digest = self.replica.digest()
        if self._tree is None or self._tree[0] != digest:
            self._tree = digest, Tree(self.replica.summary())
        return self._tree[1]

    # -- writing ------------------------------------------------------------------------------------------------------

    async def write(self, change: Callable[[pycrdt.Doc[Any]], None]) -> Envelope | None:
        """Let ``change`` alter our own part of the document; returns once that is on disk, and on its way to others.

        None: nothing changed. Raises what ``change`` raises, what the store raises when the disk fails (then nothing
        has changed), and :class:`ConfigError` when the policy does not let us write. A cancellation comes before the
        envelope is signed or after everything is done.
        """
        return await self._sign(lambda: self.replica.write(change, self._endpoint.identity, self._endpoint.host.wall()))

    async def renew(self) -> Envelope | None:
        """Sign what we wrote once more when half of its time is over; None while it is not."""
        if not self.replica.renewal_due(self._endpoint.peer_id, self._endpoint.host.wall()):
            return None
        return await self._sign(lambda: self.replica.renew(self._endpoint.identity, self._endpoint.host.wall()))

    async def _sign(self, draw_up: Callable[[], Envelope | None]) -> Envelope | None:
        signed: Envelope | None = None
        async with self._writing:
            with trio.CancelScope(shield=True):
                signed = await self._sign_now(draw_up)
        return signed

    async def _sign_now(self, draw_up: Callable[[], Envelope | None]) -> Envelope | None:
        """Draw up, store, take in, send out. Not to be cancelled in between: a signed counter is used once."""
        me, host = self._endpoint.peer_id, self._endpoint.host
        if self.replica.must_begin(me):
            self.replica.begin(me, await self._keeper.reserve(self.id, me, host.wall()))
        draft = draw_up()
        if draft is None:
            return None
        try:
            await self._keeper.append([draft], own=me)
        except BaseException:
            self.replica.discard(draft)
            raise
        verdict = self.replica.offer(draft, host.wall(), host.now())
        if not verdict.kept:
            # While it was written to disk, somebody proved that another node writes with our key.
            raise ConfigError(f"our change of the document {self.spec.name!r} does not count: {verdict.reason}")
        self.touch(me)
        self._written(self, draft)
        return draft

    # -- for the service ----------------------------------------------------------------------------------------------

    def touch(self, author: PeerId) -> None:
        """What ``author`` wrote has changed."""
        self._version += 1
        self._touched.pop(author, None)
        self._touched[author] = self._version
        event, self._more = self._more, trio.Event()
        event.set()


class Subscription:
    """Who changed a document since one last asked. Holds no queue: a slow reader is told of each author once."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._seen = document._version

    async def changed(self) -> tuple[PeerId, ...]:
        """Wait for a change; the authors whose part has changed since the last call, in the order of their last
        changes.

        Cancelled, it has told nothing: the next call returns what this one would have.
        """
        document = self._document
        await trio.lowlevel.checkpoint_if_cancelled()
        while document._version == self._seen:
            await document._more.wait()
        authors = [author for author, version in document._touched.items() if version > self._seen]
        self._seen = document._version
        return tuple(authors)
