"""The store of a node as its tasks see it: in order, many at once in one transaction, and acknowledged when durable."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs
import trio

from ...transport.host import Host
from ...transport.identity import PeerId
from .envelope import Envelope, Evidence
from .store import DocumentStore, Loaded


@attrs.define(eq=False)
class _Job:
    """One thing to write. ``envelopes``: to be appended, together with those of the jobs beside it."""

    work: Callable[[], None] | None
    envelopes: tuple[Envelope, ...] = ()
    done: bool = False
    error: Exception | None = None


def _work(store: DocumentStore, jobs: list[_Job]) -> None:
    """Carry out ``jobs`` in order; neighbouring envelopes become one transaction. For a thread of its own."""
    at = 0
    while at < len(jobs):
        end = at + 1
        if jobs[at].work is None:
            while end < len(jobs) and jobs[end].work is None:
                end += 1
        batch = jobs[at:end]
        try:
            if batch[0].work is not None:
                batch[0].work()
            else:
                store.append([envelope for job in batch for envelope in job.envelopes])
        except Exception as error:  # noqa: BLE001  # boundary: whoever waits for these gets it; the next are tried
            for job in batch:
                job.error = error
        for job in batch:
            job.done = True
        at = end


class Keeper:
    """Around one :class:`DocumentStore`. Every method returns once its change is on disk, and raises what the store
    does.

    Cancelled while it waits its turn, a change is still written, by whoever is next or at :meth:`flush`.
    """

    def __init__(self, host: Host, store: DocumentStore) -> None:
        self._host, self.store = host, store
        self._queue: list[_Job] = []
        self._lock = trio.Lock()

    async def append(self, envelopes: Iterable[Envelope], own: PeerId | None = None) -> None:
        """Keep envelopes that count now. ``own``: they are written by this node itself."""
        kept = tuple(envelopes)
        if own is None:
            await self._do(_Job(None, kept))
        else:
            await self._do(_Job(lambda: self.store.append(kept, own)))

    async def accuse(self, evidence: Evidence) -> None:
        await self._do(_Job(lambda: self.store.accuse(evidence)))

    async def remove(self, document: bytes, authors: Iterable[PeerId]) -> None:
        gone = tuple(authors)
        await self._do(_Job(lambda: self.store.remove(document, gone)))

    async def tidy(self) -> None:
        await self._do(_Job(self.store.tidy))

    async def load(self, document: bytes, own: PeerId) -> Loaded:
        found: list[Loaded] = []
        await self._do(_Job(lambda: found.append(self.store.load(document, own))))
        return found[0]

    async def reserve(self, document: bytes, author: PeerId, wall: float) -> int:
        """An incarnation that was never used before."""
        found: list[int] = []
        await self._do(_Job(lambda: found.append(self.store.reserve(document, author, wall))))
        return found[0]

    async def flush(self) -> None:
        """Write what is left."""
        await self._do(_Job(lambda: None))

    async def _do(self, job: _Job) -> None:
        self._queue.append(job)
        async with self._lock:
            if not job.done:
                jobs, self._queue = self._queue, []
                # Taken off the queue, they have to be carried out: the disk bounds how long this takes.
                with trio.CancelScope(shield=True):
                    await self._host.run_blocking(_work, self.store, jobs)
        if job.error is not None:
            raise job.error
