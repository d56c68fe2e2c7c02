"""The settled states that a peer holds: for joiners, for saving, for exporting.

As a rule a state is a copy of the model: training goes on while it is digested, saved and loaded by others. Where
the model moves only at the end of a round (strategies with a ledger, whose memory is that of inference), the last state
is the model itself and there is no copy: before the model moves, :meth:`Snapshots.moving` waits for whoever reads it,
and puts a state that somebody wants to load away, into a file without a name.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio
from torch import Tensor

from ..dht.blobs.bits import Bits
from ..dht.blobs.ends import MemorySource, Source
from ..dht.blobs.node import Blobs
from ..dht.blobs.tree import Buffer, Tree, build_tree
from ..transport.errors import ConfigError
from ..transport.host import Host
from . import defaults
from .store import Head, RunStore
from .sync import state_parts

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class Snapshot:
    """A final state: fp32 CPU vectors by name. ``digest`` is set when ``ready``.

    ``own``: what its peer keeps for itself, which is no part of the state. ``live``: ``weights`` is the model itself;
    the vectors of any other are never written to again. ``closed``: nobody may begin to read a live one any more;
    ``moved``: the model has left it.
    """

    round: int
    vectors: dict[str, Tensor]
    head: Head
    own: dict[str, Tensor] = attrs.field(factory=dict)
    live: bool = False
    digest: bytes = b""
    ready: trio.Event = attrs.field(factory=trio.Event)
    closed: bool = False
    moved: bool = False
    readers: int = 0
    free: trio.Event = attrs.field(factory=trio.Event)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Nothing writes to it meanwhile. Raises :class:`ConfigError` when it is ``closed``."""
        if self.closed:
            raise ConfigError(f"the model has just left the state after round {self.round}")
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1
            event, self.free = self.free, trio.Event()
            event.set()


class _LiveSource(Source):
    """A state in the model's own memory, of which chunks are copied; later where it was put away, if it was."""

    def __init__(self, tree: Tree, parts: list[Buffer]) -> None:
        self.tree = tree
        self._parts: list[memoryview] | None = [memoryview(part) for part in parts]
        self._away: Source | None = None

    async def bits(self) -> Bits | None:
        return None

    async def read(self, index: int) -> Buffer | None:
        if self._parts is not None:
            place = self.tree.place(index)
            return bytes(self._parts[place.part][place.offset : place.offset + place.size])
        return None if self._away is None else await self._away.read(index)

    def copied(self, host: Host, folder: Path | None) -> Source:
        """A copy, in ``folder`` or in memory. Blocking. Raises OSError when the disk refuses."""
        assert self._parts is not None
        if folder is None:
            return MemorySource(self.tree, [bytes(part) for part in self._parts])
        return _FileSource(host, self.tree, self._parts, folder)

    def move(self, away: Source | None) -> None:
        """The model goes on; what is asked for from now on stands in ``away``."""
        self._parts, self._away = None, away


class _FileSource(Source):
    """A blob in a file that has no name, and is gone with this."""

    def __init__(self, host: Host, tree: Tree, parts: list[memoryview], folder: Path) -> None:
        self.tree, self._host = tree, host
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._begins, at = [], 0
            for part in parts:
                self._begins.append(at)
                at += len(part)
                while len(part):
                    part = part[file.write(part) :]
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)

    async def bits(self) -> Bits | None:
        return None

    async def read(self, index: int) -> Buffer | None:
        place = self.tree.place(index)
        at = self._begins[place.part] + place.offset
        return await self._host.run_blocking(os.pread, self._fd, place.size, at)


class Snapshots:
    """The last states, served as blobs; and those before them as long as somebody loads them, within bounds.

    Whoever loads a state needs longer for it than a round takes, often: what it has begun with must not vanish.
    ``folder``: where live states are put away; None: in memory.
    """

    def __init__(self, blobs: Blobs, folder: Path | None = None) -> None:
        self._blobs, self._host, self._folder = blobs, blobs.host, folder
        self.last: list[Snapshot] = []
        self._held: list[tuple[Snapshot, float]] = []
        self._asked = -defaults.HOLD_MAX
        self._settled, self._saving = trio.Event(), trio.Lock()

    async def settle(self, snapshot: Snapshot) -> None:
        """Give ``snapshot``, which :meth:`keep` has taken, its digest, and serve it."""
        source = await self._host.run_blocking(self._source_of, snapshot)
        self._blobs.offer(source)
        snapshot.digest = source.tree.id
        snapshot.ready.set()

    @staticmethod
    def _source_of(snapshot: Snapshot) -> Source:
        """The state as a blob, which shares its memory. Blocking: it is hashed."""
        parts = state_parts(snapshot.round, snapshot.vectors)
        buffers = [data for _, _, data in parts]
        return (_LiveSource if snapshot.live else MemorySource)(build_tree(parts), buffers)

    def keep(self, snapshot: Snapshot) -> None:
        """``snapshot`` is the last one now."""
        now = self._host.now()
        kept = [*self.last, snapshot]
        self.last = kept[-defaults.SNAPSHOTS :]
        older = [*self._held, *((old, now) for old in kept[: -defaults.SNAPSHOTS])]
        wanted = [(old, since) for old, since in older if self._loaded(old) and now - since < defaults.HOLD_MAX]
        # Of too many the newest: whoever loads one of them has not come far.
        self._held = wanted[-defaults.HELD_SNAPSHOTS :]
        used = [old.digest for old in self.held()]
        for old, _ in older:
            if old.digest not in used:
                self._blobs.withdraw(old.digest)
        event, self._settled = self._settled, trio.Event()
        event.set()

    def asked(self) -> None:
        """Somebody has been told of the last state, and may want to load it."""
        self._asked = self._host.now()

    async def moving(self) -> None:
        """The model is about to move. Returns when nobody reads there any more; at once, where states are copies.

        Cancelled, the state may be ``closed``, and the model has to stay.
        """
        last = self.last[-1] if self.last else None
        if last is None or not last.live or last.moved:
            return
        await last.ready.wait()
        last.closed = True
        while last.readers:
            await last.free.wait()
        source, away = self._blobs.offered(last.digest), None
        if isinstance(source, _LiveSource):
            if self._loaded(last) or self._host.now() - self._asked < defaults.HOLD_IDLE:
                try:
                    away = await self._host.run_blocking(source.copied, self._host, self._folder)
                except OSError as error:
                    log.warning("the state after round %d is given to nobody any more: %s", last.round, error)
            source.move(away)
            if away is None:
                self._blobs.withdraw(last.digest)
        last.moved = True

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Snapshot]:
        """The last state, with its digest, to which nothing is written meanwhile; if the model has just left it, the
        next one. Raises :class:`ConfigError` before there is one."""
        if not self.last:
            raise ConfigError("there is no state yet")
        while self.last[-1].closed:
            await self._settled.wait()
        with (snapshot := self.last[-1]).read():
            await snapshot.ready.wait()
            yield snapshot

    async def save(self, store: RunStore) -> None:
        """Write the last state to ``store``, unless it is closed or there is none; one save at a time."""
        async with self._saving:
            if not self.last or (snapshot := self.last[-1]).closed:
                return
            with snapshot.read():
                await self._host.run_blocking(store.save_state, snapshot.vectors, snapshot.head, snapshot.own)

    def weights(self) -> Tensor:
        """A copy of the last state's weights. Raises :class:`ConfigError` when there is none yet, or it is closed."""
        if not self.last:
            raise ConfigError("there is no state yet")
        with self.last[-1].read():
            return self.last[-1].vectors["weights"].clone()

    @property
    def size(self) -> int:
        """Bytes of the last state."""
        return sum(4 * vector.numel() for vector in self.last[-1].vectors.values()) if self.last else 0

    def held(self) -> tuple[Snapshot, ...]:
        """All that are served, the oldest first."""
        return (*(old for old, _ in self._held), *self.last)

    def _loaded(self, snapshot: Snapshot) -> bool:
        idle = self._blobs.idle(snapshot.digest)
        return idle is not None and idle < defaults.HOLD_IDLE
