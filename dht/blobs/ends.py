"""Where chunks come from when they are served, and where they go when they are fetched: memory, or the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ...transport.errors import ProtocolMisuse
from ...transport.host import Host
from . import defaults
from .bits import Bits
from .store import Store
from .tree import Buffer, Tree


class Source(ABC):
    """A blob, or part of one, that can be served."""

    tree: Tree

    @abstractmethod
    async def bits(self) -> Bits | None:
        """The chunks that are here; None for all of them."""

    @abstractmethod
    async def read(self, index: int) -> Buffer | None:
        """One chunk, not to be changed; None when it is not here."""


class MemorySource(Source):
    """A whole blob in buffers that never change again; nothing is copied. ``parts``: what ``tree`` was built of."""

    def __init__(self, tree: Tree, parts: Sequence[Buffer]) -> None:
        self.tree, self._parts = tree, [memoryview(part) for part in parts]

    async def bits(self) -> Bits | None:
        return None

    async def read(self, index: int) -> Buffer | None:
        place = self.tree.place(index)
        return self._parts[place.part][place.offset : place.offset + place.size]


class StoreSource(Source):
    """A blob of the store."""

    def __init__(self, host: Host, store: Store, tree: Tree) -> None:
        self.tree, self._host, self._store = tree, host, store

    async def bits(self) -> Bits | None:
        bits = await self._host.run_blocking(self._store.bits, self.tree.id)
        return Bits(len(self.tree)) if bits is None else None if bits.complete else bits

    async def read(self, index: int) -> Buffer | None:
        return await self._host.run_blocking(self._store.read, self.tree.id, index)


class Sink(ABC):
    """Where a blob that is fetched is put together."""

    tree: Tree
    #: The chunks that are here already.
    have: Bits

    def buffer(self, index: int) -> memoryview | None:
        """Where a chunk is to be in the end, if it may be read straight to there before it was checked."""
        return None

    @abstractmethod
    async def keep(self, index: int, data: memoryview) -> bool:
        """Check a chunk and keep it; False when it is not the blob's. ``data`` may be what :meth:`buffer` gave."""

    async def finish(self) -> None:
        """On return everything that was kept is safe."""
        return


class MemorySink(Sink):
    """Writable buffers of the sizes of the tree's parts."""

    def __init__(self, tree: Tree, parts: Sequence[memoryview]) -> None:
        if [len(part) for part in parts] != [part.size for part in tree.outline.parts]:
            raise ProtocolMisuse("buffers of other sizes than the blob's parts")
        self.tree, self._parts, self.have = tree, parts, Bits(len(tree))

    def buffer(self, index: int) -> memoryview:
        place = self.tree.place(index)
        return self._parts[place.part][place.offset : place.offset + place.size]

    async def keep(self, index: int, data: memoryview) -> bool:
        # Here and now: it takes 0.3 ms, and the way to a thread and back not much less.
        if not self.tree.verify(index, data):
            return False
        final = self.buffer(index)
        if data.obj is not final.obj:
            final[:] = data
        self.have.add(index)
        return True


class StoreSink(Sink):
    """A blob of the store, which :meth:`.Store.begin` has made room for."""

    def __init__(self, host: Host, store: Store, tree: Tree, have: Bits) -> None:
        self.tree, self.have = tree, have
        self._host, self._store = host, store
        self._fresh, self._flushed = 0, host.now()

    async def keep(self, index: int, data: memoryview) -> bool:
        if not await self._host.run_blocking(self._store.write, self.tree.id, index, data):
            return False
        self.have.add(index)
        self._fresh += len(data)
        now = self._host.now()
        if self._fresh >= defaults.FLUSH_BYTES or now - self._flushed >= defaults.FLUSH_EVERY:
            self._fresh, self._flushed = 0, now
            await self._host.run_blocking(self._store.flush, self.tree.id)
        return True

    async def finish(self) -> None:
        await self._host.run_blocking(self._store.flush, self.tree.id)
