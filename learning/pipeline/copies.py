"""Checkpoints of stages at peers that hold other stages: what is left when nobody holds a stage any more.

Every stage has guards, which keep the newest state of it as a blob on their disks: the first and the last stage (that
hold the embeddings) are guarded by their neighbours, which renew it after every round (CheckFree+); all by the stage
two further on, every few rounds. A state is a blob whose id its holders sign together with the round that it is the
state after; the commit of that round comes with it, signed by its voters. So whoever keeps a copy can show whose it is,
also after a restart and when all who held the stage are gone; and who takes the stage over fetches it from all who have
it, chunk by chunk, each checked against that id.

Copies are on disk at the ends too, where they are renewed after every round. Measured (two cores, load 15, medians): to
check, write and flush one takes 53 ms for 0.4 MB and 0.48 s for 64 MB; in memory it was 1 ms and 0.30 s. It is done in
worker threads beside training, which does not wait for it, and a keeper that is too slow leaves rounds out; so there is
no second way in memory, whose copies would be gone when the keeper is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import attrs
import trio
from torch import Tensor

from ...dht.blobs.node import Blobs
from ...dht.blobs.store import Entry
from ...transport import deadlines
from ...transport.errors import ConfigError, DecodeError, Overloaded, RemoteError, RemoteRefused
from ...transport.identity import Identity, PeerId
from ...transport.rpc import Call
from ...transport.wire import pack, unpack
from .. import exact
from ..checkpoint_index import COPY, CheckpointNote
from ..checkpoints import Checkpoints
from ..rounds.messages import Signed
from ..run import Run
from ..spec import RunSpec
from ..sync import HeadInfo, check_head, load_state, state_fault
from . import defaults
from .crew import Crew
from .messages import KEPT, AskKept, Kept
from .parts import part_fault

log = logging.getLogger(__name__)

_STATE = b"shoal stage state 1"


@attrs.frozen(eq=False)
class Copy:
    """``weights`` of a stage, flat fp32, after ``rounds`` rounds of the whole; ``age``: seconds since that was its
    newest state; ``holders``: peers that have it."""

    weights: Tensor
    rounds: int
    age: float
    holders: int


def guarded_by(stage: int, stages: int) -> dict[int, bool]:
    """The stages that the holders of ``stage`` keep copies of, each with whether of every round."""
    ends = {0: stage == 1, stages - 1: stage == stages - 2}
    # Of three stages the only one that two neighbours leave keeps both.
    others = range(stages) if stages == 3 else [(stage - 2) % stages]
    found = {**dict.fromkeys(others, False), **{end: True for end, beside in ends.items() if beside}}
    return {other: always for other, always in found.items() if other != stage}


def state_bytes(head: HeadInfo) -> bytes:
    """What a holder signs: ``head.digest`` is the state of the run after the round ``head.settled``."""
    return _STATE + head.spec.run_id + head.settled.to_bytes(8, "big") + head.digest


def sign_state(identity: Identity, head: HeadInfo) -> Signed:
    return Signed(identity.peer_id, identity.sign(state_bytes(head)))


def kept_fault(kept: Kept, run: bytes, whole: RunSpec, stage: int, *, gossip: bool) -> str | None:
    """Why this is no state of ``stage`` of the run ``run`` that its holders signed; None when it is one. ``gossip``:
    whether replicas differ."""
    head = kept.head
    try:
        of = head.spec.open().part
    except DecodeError as error:
        return str(error)
    if of is None or (wrong := part_fault(run, whole, head.spec, stage, of.generation)) is not None:
        return "it is of no stage" if of is None else wrong
    if len(head.digest) != 32 or (head.settled != head.record.round and not gossip):
        return "it is not the state after that round"
    if (wrong := check_head(head, head.spec.run_id, gossip)) is not None:
        return wrong
    # Who was taken into the roster by that commit has loaded its state; nobody else can have it.
    allowed, signers = {*head.voters, *head.record.roster}, dict.fromkeys(each.peer for each in kept.signed)
    if not signers or len(signers) != len(kept.signed) or not allowed.issuperset(signers):
        return "it is signed by none of its holders"
    told = state_bytes(head)
    if not all(each.peer.verify(told, each.signature) for each in kept.signed):
        return "a signature is not that of its holder"
    return None


@attrs.frozen(eq=False)
class _Mine:
    """A copy on this disk. ``when``: Unix seconds at which it was the newest state."""

    kept: Kept
    when: float


class Copies:
    """Keeps copies of stages that are held elsewhere, and finds those that others keep.

    ``sizes``: elements of all stages' models; ``steps``: of a round; ``gossip``: whether replicas of a stage differ.
    ``tell``: sentences for people. It serves what is on disk from construction on.
    """

    def __init__(
        self, crew: Crew, sizes: tuple[int, ...], blobs: Blobs, *, steps: int, gossip: bool, tell: Callable[[str], None]
    ) -> None:
        self._crew, self._sizes, self._host, self._blobs = crew, sizes, crew.host, blobs
        self._steps, self._gossip, self._tell = steps, gossip, tell
        #: Of the stage that is held here.
        self.run: Run | None = None
        self._mine: dict[int, _Mine] = {}
        self._next: dict[int, float] = {}
        self._said: dict[int, str] = {}
        crew.endpoint.serve(KEPT, self._on_kept)

    async def restore(self) -> None:
        """Find what was kept before a restart."""
        await self._host.run_blocking(self._restore)

    def _restore(self) -> None:
        for entry in self._blobs.store.entries():
            stage, mine = self._read(entry)
            known = self._mine.get(stage)
            if mine is not None and (known is None or self._order(known.kept) < self._order(mine.kept)):
                self._mine[stage] = mine
        self._tidy()

    def _read(self, entry: Entry) -> tuple[int, _Mine | None]:
        if entry.tag == COPY and entry.complete:
            try:
                note = unpack(CheckpointNote, entry.note)
                kept = unpack(Kept, note.proof)
                of = kept.head.spec.open().part
            except DecodeError as error:
                log.warning("the copy %s on disk is of no use: %s", entry.id.hex()[:16], error)
                return -1, None
            if of is not None and of.whole == self._crew.run_id and kept.head.digest == entry.id:
                return of.stage, _Mine(kept, note.when)
        return -1, None

    def _tidy(self) -> None:
        """Let go of copies that newer ones have followed, and of what is left of those that never came whole."""
        wanted = [mine.kept.head.digest for mine in self._mine.values()]
        for entry in self._blobs.store.entries():
            if entry.tag == COPY and entry.id not in wanted:
                if entry.pinned:
                    self._blobs.store.pin(entry.id, False)
                self._blobs.store.remove(entry.id)

    # -- what is here -------------------------------------------------------------------------------------------------

    async def _on_kept(self, call: Call[AskKept]) -> Kept:
        ask = call.request
        if ask.run != self._crew.run_id:
            raise RemoteRefused("unknown-run", "this peer takes no part in that run")
        if call.peer not in self._crew.beats:
            raise RemoteRefused("stranger", "say first which stage you hold")
        found = self._here(ask.stage)
        if found is None:
            raise RemoteRefused("not-held", f"no state of stage {ask.stage} is kept here")
        return found

    def _here(self, stage: int) -> Kept | None:
        """The newest state of ``stage`` that is here: of the run that trains it, or a copy."""
        run = self.run
        if run is not None and run.spec.part is not None and run.spec.part.stage == stage:
            settled = [snapshot for snapshot in run.snapshots if snapshot.digest]
            if not settled:
                return None
            last = settled[-1]
            proof = last.head
            head = HeadInfo(run.signed, proof.record, proof.certificate, proof.voters, (), last.round, last.digest, ())
            return Kept(head, (sign_state(self._crew.endpoint.identity, head),), 0.0)
        mine = self._mine.get(stage)
        entry = None if mine is None else self._blobs.store.entry(mine.kept.head.digest)
        if mine is None or entry is None or not entry.complete:
            return None
        return attrs.evolve(mine.kept, age=max(0.0, self._host.wall() - mine.when))

    def _order(self, kept: Kept) -> tuple[int, int]:
        of = kept.head.spec.open().part
        return (0 if of is None else of.generation), kept.head.settled

    def _rounds(self, kept: Kept) -> int:
        """Rounds of the whole: a later generation of a stage counts anew."""
        of = kept.head.spec.open().part
        return (0 if of is None else of.step // self._steps) + kept.head.settled

    # -- what others have ---------------------------------------------------------------------------------------------

    async def _ask(self, stage: int, peers: Iterable[PeerId]) -> list[tuple[Kept, list[PeerId]]]:
        """Proven states of ``stage``, and who has each: the newest first, of those the one that most have signed."""
        told: dict[PeerId, Kept] = {}

        async def ask(peer: PeerId) -> None:
            timeout = deadlines.silence(defaults.ASK_KEPT, 0.0)
            try:
                request = AskKept(self._crew.run_id, stage)
                kept = await self._crew.endpoint.call(peer, KEPT, request, timeout=timeout)
            except (RemoteError, Overloaded) as error:
                log.debug("no state of stage %d from %s: %s", stage, peer.short, error)
                return
            wrong = kept_fault(kept, self._crew.run_id, self._crew.spec, stage, gossip=self._gossip)
            if wrong is None:
                told[peer] = kept
            else:
                log.warning("%s names a state of stage %d, which is not believed: %s", peer.short, stage, wrong)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                if peer != self._crew.me:
                    nursery.start_soon(ask, peer)
                elif (here := self._here(stage)) is not None:
                    told[peer] = here
        return self._ranked(told)

    def _ranked(self, told: Mapping[PeerId, Kept]) -> list[tuple[Kept, list[PeerId]]]:
        groups: dict[bytes, list[PeerId]] = {}
        for peer in sorted(told):
            groups.setdefault(state_bytes(told[peer].head), []).append(peer)
        found = []
        for peers in groups.values():
            signed = {each.peer: each for peer in peers for each in told[peer].signed}
            age = min(told[peer].age for peer in peers)
            found.append((attrs.evolve(told[peers[0]], signed=tuple(signed.values()), age=age), peers))
        return sorted(found, key=lambda each: (self._order(each[0]), len(each[0].signed), each[0].head.digest))[::-1]

    async def newest(self, stage: int) -> Copy | None:
        """The newest state of ``stage`` that anybody keeps and that comes whole, checked against its id."""
        for kept, peers in await self._ask(stage, self._crew.peers()):
            try:
                weights = await self._load(kept, peers, self._sizes[stage])
            except (RemoteError, ConfigError, Overloaded) as error:
                log.warning("the state of stage %d after round %d: %s", stage, self._rounds(kept), error)
                continue
            return Copy(weights, self._rounds(kept), kept.age, len(peers))
        return None

    async def _load(self, kept: Kept, peers: list[PeerId], size: int) -> Tensor:
        head, own = kept.head, None
        if self._crew.me in peers:
            try:
                own = await self._host.run_blocking(Checkpoints(self._blobs.store).load, head.digest, head.spec.open())
            except ConfigError as error:
                log.info("the copy that was kept here is not whole any more: %s", error)
        if own is not None and own[0] == head.settled and exact.check_finite(own[1]["weights"]) is None:
            return own[1]["weights"]
        others = [peer for peer in peers if peer != self._crew.me]
        found, _ = await load_state(self._blobs, head.digest, head.settled, size, others, lambda what, peer, why: None)
        return found["weights"]

    # -- keeping ------------------------------------------------------------------------------------------------------

    async def keep(self, stage: int) -> None:
        """While ``stage`` is held here: renew the copies of what it guards when it is time. Until cancelled."""
        guarded = guarded_by(stage, self._crew.stages)
        for other, mine in self._mine.items():
            if other not in guarded:
                # Others keep newer ones: it stays as long as there is room.
                await self._host.run_blocking(self._pin, mine.kept.head.digest, False)
        while True:
            for other, always in guarded.items():
                if self._due(other, always):
                    await self._renew(other)
            await trio.sleep(defaults.LOOK_EVERY)

    def _due(self, stage: int, always: bool) -> bool:
        part, mine = self._crew.part(stage), self._mine.get(stage)
        holders = self._crew.holders(stage)
        if part is None or not holders or self._host.now() < self._next.get(stage, 0.0):
            return False
        if mine is None or self._order(mine.kept)[0] < part[0]:
            return True
        behind = max(self._crew.beat(peer).rounds for peer in holders) - self._rounds(mine.kept)
        return behind >= (1 if always else defaults.GUARD_EVERY)

    async def _renew(self, stage: int) -> None:
        mine, wall = self._mine.get(stage), self._host.wall()
        self._next[stage] = self._host.now() + defaults.GUARD_AGAIN
        found = await self._ask(stage, [peer for peer in self._crew.keepers(stage) if peer != self._crew.me])
        if not found or (mine is not None and self._order(found[0][0]) <= self._order(mine.kept)):
            return
        kept, holders = found[0]
        digest = kept.head.digest
        note = CheckpointNote(kept.head.spec.run_id, kept.head.settled, wall, pack(kept))
        try:
            await self._blobs.fetch_to_store(
                digest,
                peers=holders,
                search=False,
                tag=COPY,
                note=pack(note),
                accept=lambda outline: state_fault(outline, self._sizes[stage]),
                patience=defaults.KEPT_PATIENCE,
            )
            await self._host.run_blocking(self._pin, digest, True)
        except (Overloaded, ConfigError) as error:
            self._say(stage, f"the state of stage {stage} is not kept here for others: {error}")
            return
        except RemoteError as error:
            log.info("the state of stage %d did not come: %s", stage, error)
            return
        self._say(stage, "")
        self._mine[stage], self._next[stage] = _Mine(kept, wall), 0.0
        await self._host.run_blocking(self._tidy)

    def _pin(self, digest: bytes, pinned: bool) -> None:
        entry = self._blobs.store.entry(digest)
        # One that is here for another reason, as a checkpoint of our own, has its own fate.
        if entry is not None and entry.tag == COPY:
            self._blobs.store.pin(digest, pinned)

    def _say(self, stage: int, text: str) -> None:
        if text and text != self._said.get(stage):
            self._tell(text)
        self._said[stage] = text
