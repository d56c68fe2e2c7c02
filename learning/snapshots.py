"""The settled states that a peer keeps in memory: for joiners, for saving, for exporting."""

from __future__ import annotations

import attrs
import trio
from torch import Tensor

from ..dht.blobs.ends import MemorySource, Source
from ..dht.blobs.node import Blobs
from ..dht.blobs.tree import build_tree
from . import defaults
from .store import Head
from .sync import state_parts


@attrs.define
class Snapshot:
    """A final state: fp32 CPU vectors by name, never written to again. ``digest`` is set when ``ready``.

    ``own``: what its peer keeps for itself, which is no part of the state.
    """

    round: int
    vectors: dict[str, Tensor]
    head: Head
    own: dict[str, Tensor] = attrs.field(factory=dict)
    digest: bytes = b""
    ready: trio.Event = attrs.field(factory=trio.Event)

    def source(self) -> Source:
        """The state as a blob, which shares its memory. Blocking: it is hashed."""
        parts = state_parts(self.round, self.vectors)
        return MemorySource(build_tree(parts), [data for _, _, data in parts])


class Snapshots:
    """The last states, served as blobs; and those before them as long as somebody loads them, within bounds.

    Whoever loads a state needs longer for it than a round takes, often: what it has begun with must not vanish.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs, self._host = blobs, blobs.host
        self.last: list[Snapshot] = []
        self._held: list[tuple[Snapshot, float]] = []

    async def settle(self, snapshot: Snapshot) -> None:
        """Give ``snapshot``, which :meth:`keep` has taken, its digest, and serve it."""
        source = await self._host.run_blocking(snapshot.source)
        self._blobs.offer(source)
        snapshot.digest = source.tree.id
        snapshot.ready.set()

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
