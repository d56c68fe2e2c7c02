"""The ledger of a run whose state follows from what was said in its rounds, and how it is replayed.

Commit records form a chain of digests, and those of ``gather`` rounds hold what every member gave. So a peer that has
the state after some round needs only the records since, a kilobyte each, to reach the present one: it asks holders of
the state for them, checks by their digests that they lead from its own record to the one that is proven, does what they
say, and takes the result only if it is bit for bit the state that the holders agree on. Whoever never was in the run
begins at the run's first record with the weights that the seed of the run gives. Otherwise, or when it is more work
than a download, the state is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import trio
from torch import Tensor

from ..transport.errors import DecodeError, RemoteError
from ..transport.identity import PeerId
from ..transport.rpc import Call, Method
from ..transport.wire import pack
from . import defaults
from .directions import trainable_of
from .rounds.messages import CommitRecord
from .rounds.payloads import GATHER, said
from .sync import describe_load, load_state, state_digest

if TYPE_CHECKING:
    from .run import Run


@attrs.frozen
class AskLedger:
    """Records of run ``run``: the one with digest ``at``, the one before it, and so on, back to the child of ``base``.
    At most ``count``."""

    run: bytes
    at: bytes
    base: bytes
    count: int


@attrs.frozen
class LedgerPage:
    """Records, the newest first; none when the one asked for is not known here."""

    records: tuple[CommitRecord, ...]


LEDGER = Method("run.ledger", AskLedger, LedgerPage)


class Ledger:
    """The last records of a chain, by digest: of our own head, and those in the document of commits.

    ``limit``: how many of each; the oldest go first. Whoever uses one knows its digest from the one after it.
    """

    def __init__(self, limit: int = defaults.LEDGER_RECORDS) -> None:
        self._limit = limit
        self._records: dict[bytes, CommitRecord] = {}
        self._size = 0
        #: What members wrote down in the document of commits: perhaps of before we began, perhaps of nowhere.
        self.noted: dict[bytes, CommitRecord] = {}

    def add(self, record: CommitRecord) -> None:
        """``record`` is where we are now."""
        digest = record.digest
        if digest not in self._records:
            self._records[digest] = record
            self._size += _size(record)
        while len(self._records) > self._limit or self._size > defaults.LEDGER_MEMORY:
            self._size -= _size(self._records.pop(next(iter(self._records))))

    def note(self, records: Mapping[bytes, CommitRecord]) -> None:
        """Records by their digests, from the document; those with the highest rounds are kept."""
        both = sorted({**self.noted, **records}.items(), key=lambda item: item[1].round)
        self.noted = dict(both[-self._limit :])

    def back(self, at: bytes, base: bytes, count: int) -> tuple[CommitRecord, ...]:
        """See :class:`AskLedger`; as much as fits into a message."""
        found: list[CommitRecord] = []
        size = 0
        while len(found) < min(count, defaults.LEDGER_PAGE) and at != base:
            record = self._records.get(at) or self.noted.get(at)
            if record is None:
                break
            size += len(pack(record))
            if found and size > defaults.LEDGER_BYTES:
                break
            found.append(record)
            at = record.prev
        return tuple(found)


def _size(record: CommitRecord) -> int:
    """Bytes of memory, roughly."""
    return 1000 + 400 * (len(record.members) + len(record.roster)) + sum(len(each.data) for each in record.payloads)


def worth_it(rounds: int, gradients: int, elements: int, size: int) -> tuple[bool, str]:
    """Whether to replay ``rounds`` with so many ``gradients`` in all rather than to load a state of ``size`` bytes.

    ``elements``: trainable ones.
    """
    seconds = gradients * elements * defaults.REPLAY_ELEMENT
    if rounds > defaults.REPLAY_ROUNDS:
        return False, f"{rounds} rounds are too many to replay"
    if seconds > max(defaults.REPLAY_SECONDS, size / defaults.REPLAY_RATE):
        return False, f"to replay {gradients} gradients would take {seconds:.0f} s"
    return True, f"{rounds} rounds are replayed"


class Replayer:
    """Keeps and serves the ledger of ``run``, and catches up by it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        run.endpoint.serve(LEDGER, self._on_ask)

    async def _on_ask(self, call: Call[AskLedger]) -> LedgerPage:
        ask = call.request
        return LedgerPage(self._run.ledger.back(ask.at, ask.base, ask.count) if ask.run == self._run.run_id else ())

    async def obtain(
        self, ours: CommitRecord | None, goal: CommitRecord, digest: bytes, holders: Sequence[PeerId], why: str
    ) -> dict[str, Tensor] | None:
        """The state after ``goal``, bit for bit that of ``digest``: replayed from the state after ``ours``, the record
        where we are, or loaded from ``holders``, which agree as ``why`` says. None if neither succeeds now."""
        run = self._run
        vectors = None if ours is None or not run.strategy.ledger else await self._replayed(ours, goal, digest, holders)
        if vectors is not None:
            return vectors
        try:
            vectors, done = await load_state(
                run.blobs, digest, goal.round, run.layout.size, holders, run.membership.tell_of_holder
            )
        except RemoteError as error:
            run.emit("run", "state-failed", detail=str(error))
            return None
        run.emit("run", "loaded", detail=f"round {goal.round} {describe_load(done, digest)}; {why}")
        return vectors

    async def _state(self, ours: CommitRecord) -> dict[str, Tensor] | None:
        """A copy of the state after ``ours``, if we have it."""
        run = self._run
        if run.snapshots:
            last = run.snapshots[-1]
            if last.head.record != ours or last.closed:
                return None
            return {k: v.clone() for k, v in last.vectors.items()}
        # What was saved, or the beginning: nothing has been trained yet.
        return {"weights": await run.trainer.weights(), **{k: v.clone() for k, v in run.restored.items()}}

    async def _replayed(
        self, before: CommitRecord, goal: CommitRecord, digest: bytes, holders: Sequence[PeerId]
    ) -> dict[str, Tensor] | None:
        run, vectors = self._run, await self._state(before)
        if vectors is None:
            return None
        if not 0 <= goal.round - before.round <= defaults.REPLAY_ROUNDS:
            self._failed(f"from round {before.round} to {goal.round} is too far")
            return None
        records = await self._records(before, goal, holders)
        if records is None:
            return None
        trainable = trainable_of(run.trainer.model)
        elements, size = sum(p.numel() for p in trainable.values()), 4 * run.layout.size
        gradients = sum(len(payload.data) for record in records for payload in record.payloads)
        worth, why = worth_it(len(records), gradients, elements, size)
        if not worth:
            self._failed(why)
            return None
        start = run.host.now()

        def work() -> bytes:
            replay(run, tuple(trainable), vectors, before, records)
            return state_digest(goal.round, vectors)

        if await run.host.run_blocking(work) != digest:
            self._failed("what follows from the ledger is not the state of the others")
            return None
        said_bytes = sum(len(pack(record)) for record in records)
        seconds = run.host.now() - start
        what = f"rounds {before.round + 1} to {goal.round} in {seconds:.2f} s"
        sizes = f"{gradients} B of payload in {said_bytes} B of records"
        run.emit("run", "replayed", detail=f"{what}, {sizes}, digest {digest.hex()[:16]}")
        return vectors

    def _failed(self, why: str) -> None:
        """Say why; the state is loaded then."""
        self._run.emit("run", "not-replayed", detail=f"the state is loaded: {why}")

    async def _records(
        self, before: CommitRecord, goal: CommitRecord, holders: Sequence[PeerId]
    ) -> list[CommitRecord] | None:
        """The records after ``before`` up to ``goal``, oldest first; each is the one that the next one names."""
        found, why = [goal], "nobody has the records"
        if goal.digest == before.digest:
            return []
        for holder in holders:
            with trio.move_on_after(defaults.LEDGER_WAIT) as waited:
                try:
                    await self._fetch(found, before, holder)
                except (RemoteError, DecodeError) as error:
                    why = str(error)
            if waited.cancelled_caught:
                why = f"{holder.short} gave {len(found) - 1} records within {defaults.LEDGER_WAIT:.0f} s"
            if found[-1].prev == before.digest:
                return found[::-1]
        self._failed(f"the records do not lead back to round {before.round}: {why}")
        return None

    async def _fetch(self, found: list[CommitRecord], before: CommitRecord, holder: PeerId) -> None:
        """Add to ``found`` the records between its last one and ``before``, as far as we or ``holder`` have them.

        Raises :class:`RemoteError` when it gives others, or so much that loading the state is less.
        """
        run, base, size = self._run, before.digest, sum(map(_size, found))
        while found[-1].prev != base and found[-1].round >= before.round:
            more = run.ledger.back(found[-1].prev, base, defaults.LEDGER_PAGE)
            if not more:
                ask = AskLedger(run.run_id, found[-1].prev, base, defaults.LEDGER_PAGE)
                page = await run.endpoint.call(holder, LEDGER, ask, timeout=defaults.ASK_HEADS)
                more = page.records[: defaults.LEDGER_PAGE]
            if not more:
                return
            for record in more:
                if record.digest != found[-1].prev or record.run != run.run_id:
                    raise RemoteError(f"{holder.short} gives another record than the one that was asked for")
                found.append(record)
                size += _size(record)
                if record.prev == base:
                    return
            if len(found) > 2 * defaults.REPLAY_ROUNDS or size > defaults.LEDGER_MEMORY:
                raise RemoteError(f"{len(found)} records, and more, are too many to replay")


def replay(
    run: Run,
    trainable: Sequence[str],
    vectors: dict[str, Tensor],
    before: CommitRecord,
    records: Sequence[CommitRecord],
) -> None:
    """Bring ``vectors`` in place from the state after ``before`` to that after the last of ``records``. Blocking."""
    for record in records:
        if record.kind == GATHER:
            # The voters of a round are the roster of the record before it.
            voters = tuple(peer.key for peer in before.roster)
            given: Mapping[bytes, bytes] = said(record)
            run.strategy.replay(run.run_id, run.layout, trainable, vectors, record.round, voters, given)
        before = record
