"""The documents of a run on one node: fed from the run's events and reports, read by people and by the run's peers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from ..dht.documents.document import Document
from ..dht.documents.envelope import Evidence
from ..dht.documents.service import Documents
from ..dht.documents.store import DocumentStore
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from ..transport.wire import pack
from . import defaults
from .events import Event, RoundReport
from .rundocs_content import (
    FORKS,
    LIES,
    Ban,
    BanReader,
    CommitNote,
    Point,
    ban_entry,
    read_commits,
    read_ledger,
    read_metrics,
    run_documents,
    spec_entry,
    thin,
    writers,
)

if TYPE_CHECKING:
    import pycrdt

    from .rounds.lies import Lie
    from .run import Run

log = logging.getLogger(__name__)


def _set(doc: pycrdt.Doc[Any], root: str, values: Mapping[str, Any], gone: tuple[str, ...] = ()) -> None:
    """Write what is new into a map at the root, and take ``gone`` out."""
    import pycrdt

    entries = doc.get(root, type=pycrdt.Map)
    for key in gone:
        entries.pop(key, None)
    for key, value in values.items():
        if key not in entries or entries[key] != value:
            entries[key] = value


class RunDocuments:
    """Spec, roster, commits, metrics and bans of ``run`` (see :mod:`.rundocs_content`), until cancelled.

    ``path``: the database, None for memory. ``version``: of this program, for the roster. ``note``: told what people
    should know. :meth:`event` is to be called with every event of the run.
    """

    def __init__(
        self, run: Run, *, path: Path | None = None, version: str = "", note: Callable[[str], None] = log.warning
    ) -> None:
        self.run_here, self.endpoint, self.host, self.me = run, run.endpoint, run.host, run.me
        self.path, self._version, self._note = path, version, note
        self.documents: Documents | None = None
        self.specs = run_documents(run.run_id, run.spec.founder)
        self._open: dict[str, Document] = {}
        self._bans = BanReader([spec.id for spec in self.specs.values()], run.run_id, run.spec.aggregator)
        #: Whose words count: ``True`` where we have seen it take part ourselves.
        self._former: dict[PeerId, bool] = {run.spec.founder: True}
        self._vouched: dict[PeerId, int] = {}  # member → how many it has named whom we have not seen
        self._points: dict[int, Point] = {}
        self._notes: dict[str, CommitNote] = {}
        self._failing: dict[str, None] = {}  # documents whose last write was refused
        self._state = "training"
        self._left = False
        self._saying = trio.Lock()
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Raises :class:`ConfigError` when the database cannot be used."""
        store = await self.host.run_blocking(DocumentStore, self.path)
        try:
            self.documents = Documents(self.endpoint, store)
            scope = self.run_here.run_id
            self.documents.join(scope, self._members)
            self.documents.on_evidence(scope, self._proven)
            for name, spec in self.specs.items():
                self._open[name] = await self.documents.open(spec, self._is_member)
            async with trio.open_nursery() as self._nursery:
                # What was known before counts from the first moment on.
                await self._apply_bans()
                self._vouch()
                await self._nursery.start(self.documents.run)
                self._nursery.start_soon(self._follow_bans)
                self._nursery.start_soon(self._follow_commits)
                self._nursery.start_soon(self._prove_again)
                self.run_here.liars.on_proof = self._lied
                for lie in self.run_here.liars.proofs.values():
                    self._lied(lie)
                self._nursery.start_soon(self._speak)
                task_status.started()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self.host.run_blocking(store.close)

    def document(self, name: str) -> Document:
        """An open document by its name. Raises :class:`ConfigError`."""
        if name not in self._open:
            raise ConfigError(f"this run has no document {name!r} here; it has {', '.join(self.specs)}")
        return self._open[name]

    def opened(self) -> dict[str, Document]:
        """All documents that are open, by name."""
        return dict(self._open)

    def bans(self) -> list[Ban]:
        """Who is banned, with the proof."""
        return self._bans.read(self._open["bans"].read()) if "bans" in self._open else []

    async def leave(self) -> None:
        """Write down what is left to say, that we go among it, and see that somebody hears it.

        Bounded by :data:`defaults.LAST_WORD`. Only the first call says anything.
        """
        if self.documents is None or self._nursery is None or self._left:
            return
        self._left = True
        if self._state != "finished":
            self._state = "left"
        with trio.move_on_after(defaults.LAST_WORD):
            if self._may_speak():
                await self._say()
            await self.documents.drained()

    # -- what the run tells -------------------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """One event of the run. Does not wait."""
        if event.what == "finished" and event.phase == "run":
            self._state = "finished"
            self._nudge()
        elif (event.phase, event.what) == ("commit", "done") and self.run_here.reports:
            self._committed(self.run_here.reports[-1])
        elif (event.phase, event.what) == ("run", "member"):
            self._nudge()

    def _committed(self, report: RoundReport) -> None:
        self._points[report.round] = Point(
            report.round, self.host.wall(), _finite(report.loss), _finite(report.metric), report.samples
        )
        if len(self._points) > defaults.POINTS_KEPT:
            del self._points[next(iter(self._points))]
        head = self.run_here.membership.head
        record = head.record
        if record.round != report.round or not record.members:
            return
        data = pack(record) if record.payloads else b""
        order = writers(record.digest, record.members)[:2]
        if self.me not in order:
            return
        note = CommitNote(
            writer=self.me,
            round=record.round,
            branch=record.branch,
            at=self.host.wall(),
            digest=record.digest.hex()[:16],
            members=record.members[: defaults.COMMIT_MEMBERS],
            count=len(record.members),
            samples=sum(record.samples),
            total=record.total,
            certificate=hashlib.blake2b(pack(head.certificate), digest_size=8).hexdigest(),
            record=data if len(data) <= defaults.NOTE_RECORD else b"",
        )
        if order[0] == self.me:
            self._keep(note)
            # In a run with small groups every group has a commit of its own: those can wait for the next beat.
            if not self.run_here.gossip:
                self._nudge()
        elif self._nursery is not None and not self.run_here.gossip:
            self._nursery.start_soon(self._write_second, note)

    async def _write_second(self, note: CommitNote) -> None:
        """The first in line may have died of it."""
        await trio.sleep(defaults.COMMIT_SECOND + self._beat())
        if all(known.key != note.key for known in read_commits(self._open["commits"].read())):
            self._keep(note)

    def _keep(self, note: CommitNote) -> None:
        """To be written down; no more than the document keeps wait for it."""
        self._notes[note.key] = note
        if len(self._notes) > defaults.COMMITS_KEPT:
            del self._notes[next(iter(self._notes))]

    # -- who takes part -----------------------------------------------------------------------------------------------

    def _members(self) -> tuple[PeerId, ...]:
        membership = getattr(self.run_here, "membership", None)
        members: tuple[PeerId, ...] = () if membership is None else membership.members()
        for peer in members:
            self._remember(peer, seen=True)
        return members

    def _remember(self, peer: PeerId, *, seen: bool) -> bool:
        """False when it was known before, or there is no room."""
        if peer in self._former:
            self._former[peer] |= seen
            return False
        if len(self._former) >= defaults.MAX_REMEMBERED:
            return False
        self._former[peer] = seen
        return True

    def _is_member(self, peer: PeerId) -> bool:
        """Whose words count: members, those who were, and those whom a member names in a commit."""
        return peer in self._former or peer in self._members()

    def _may_speak(self) -> bool:
        return self.me in self._members() and self.documents is not None

    def _vouch(self) -> None:
        """Who came late learns from commits who took part before.

        Only of members that it has seen take part, and of a few from each: whoever is named may write, and name others.
        """
        content = self._open["commits"].read()
        # Filtered first: what two wrote of one commit counts once.
        for note in read_commits({writer: part for writer, part in content.items() if self._former.get(writer, False)}):
            for peer in note.members:
                named = self._vouched.get(note.writer, 0)
                if named < defaults.MAX_VOUCHED and self._remember(peer, seen=False):
                    self._vouched[note.writer] = named + 1

    async def _follow_commits(self) -> None:
        changes = self._open["commits"].subscribe()
        while True:
            self._vouch()
            if self.run_here.strategy.ledger:
                ledger = self.run_here.ledger
                ledger.note(read_ledger(self._open["commits"].read(), ledger.noted))
            await trio.sleep(defaults.LOOK_EVERY)
            await changes.changed()

    # -- what we say --------------------------------------------------------------------------------------------------

    def _beat(self) -> float:
        """Seconds between two words of ours."""
        return min(defaults.MAX_BEAT, max(defaults.BEAT_MIN, defaults.BEAT_EACH * len(self._members())))

    def _nudge(self) -> None:
        event, self._wake = self._wake, trio.Event()
        event.set()

    async def _speak(self) -> None:
        """Commits are written soon, everything else with the next beat."""
        assert self.documents is not None
        beat = self.host.now()
        while True:
            wake, now = self._wake, self.host.now()
            if self._may_speak():
                due = now >= beat
                await self._say(everything=due)
                if due:
                    beat = now + self._beat() * (0.9 + 0.2 * self.documents.random.random())
            await trio.sleep(defaults.SPEAK_EVERY)
            with trio.move_on_after(max(0.0, beat - self.host.now()) if self._may_speak() else defaults.BEAT_MIN):
                await wake.wait()

    async def _say(self, *, everything: bool = True) -> None:
        """Write what is new in our documents. What cannot be written now is kept for the next time."""
        async with self._saying:
            await self._try("commits", self._say_commits)
            if everything:
                await self._try("spec", self._say_spec)
                await self._try("roster", self._say_roster)
                await self._try("metrics", self._say_metrics)

    async def _try(self, name: str, say: Callable[[], Awaitable[None]]) -> None:
        try:
            await say()
        except ConfigError as error:
            # The disk is full, or others would not take it: the run goes on without, and so do the other documents.
            if name not in self._failing:
                log.warning("the run's document %s could not be written, and is tried again: %s", name, error)
            self._failing[name] = None
        else:
            self._failing.pop(name, None)

    async def _say_commits(self) -> None:
        if notes := dict(self._notes):
            await self._open["commits"].write(lambda doc: self._commits(doc, notes))
            self._notes = {key: note for key, note in self._notes.items() if key not in notes}

    async def _say_roster(self) -> None:
        await self._open["roster"].write(self._roster)

    async def _say_metrics(self) -> None:
        if points := dict(self._points):
            await self._open["metrics"].write(lambda doc: self._metrics(doc, points))
            self._points = {round: point for round, point in self._points.items() if round not in points}

    async def _say_spec(self) -> None:
        if self.me == self.run_here.spec.founder and "run" not in self._open["spec"].own():
            await self._open["spec"].write(lambda doc: _set(doc, "run", spec_entry(self.run_here.signed)))

    def _roster(self, doc: pycrdt.Doc[Any]) -> None:
        wall = self.host.wall()
        joined = self._open["roster"].own().get("entry", {}).get("joined", wall)
        entry = {
            "joined": joined,
            "seen": wall,
            "beat": self._beat(),
            "round": self.run_here.round,
            "version": self._version,
            "state": self._state,
        }
        _set(doc, "entry", entry)

    def _commits(self, doc: pycrdt.Doc[Any], notes: dict[str, CommitNote]) -> None:
        own = self._open["commits"].own()
        # What is not readable (an older program wrote it) goes too.
        rounds = {note.key: note.round for note in (*read_commits({self.me: own}), *notes.values())}
        kept = sorted(rounds, key=lambda key: (rounds[key], key))[-defaults.COMMITS_KEPT :]
        new = {key: note.entry() for key, note in notes.items() if key in kept}
        _set(doc, "commits", new, tuple(key for key in own.get("commits", {}) if key not in kept))

    def _metrics(self, doc: pycrdt.Doc[Any], points: dict[int, Point]) -> None:
        own = self._open["metrics"].own()
        history = read_metrics({self.me: own})
        rounds = sorted({**{point.round: None for known in history for point in known.points}, **points})
        while gone := dict.fromkeys(thin(rounds)):
            rounds = [round for round in rounds if round not in gone]
        kept = {str(round): None for round in rounds}
        _set(doc, "about", {"metric": self.run_here.status().metric_name})
        new = {str(round): points[round].entry() for round in sorted(points) if str(round) in kept}
        _set(doc, "points", new, tuple(key for key in own.get("points", {}) if key not in kept))

    # -- bans ---------------------------------------------------------------------------------------------------------

    def _proven(self, document: Document, evidence: Evidence) -> None:
        """A proof against an author of one of our documents."""
        if evidence.author == self.me:
            self._note(
                "another node uses this node's key, or its data directory was copied or restored: the others have "
                "proof of it and take no words of this node any more. Stop the other one, or delete the key here to "
                "become a new peer"
            )
        elif self._nursery is not None:
            why = "signed two histories of one document"
            self._nursery.start_soon(self._write_ban, evidence.author, why, FORKS, evidence)

    async def _prove_again(self) -> None:
        """What was proven before this node was restarted."""
        for document in self._open.values():
            for held in document.replica.summary():
                evidence = document.replica.evidence(held.author) if held.frozen else None
                if evidence is not None:
                    self._proven(document, evidence)

    def _lied(self, lie: Lie) -> None:
        """A proof that an owner lied in a round, made here."""
        if self._nursery is not None:
            self._nursery.start_soon(self._write_ban, lie.owner, lie.reason, LIES, lie)

    async def _write_ban(self, author: PeerId, why: str, root: str, proof: Evidence | Lie) -> None:
        assert self.documents is not None
        await self.documents.ban(self.run_here.run_id, author, why)
        self.run_here.emit("run", "banned", author, why)
        await trio.sleep(defaults.BAN_JITTER * self.documents.random.random())
        while not self._may_speak():
            wake = self._wake
            with trio.move_on_after(defaults.BEAT_MIN):
                await wake.wait()
        if any(ban.peer == author for ban in self.bans()):
            return
        try:
            await self._open["bans"].write(lambda doc: _set(doc, root, {author.text: ban_entry(proof)}))
        except ConfigError as error:
            log.warning("the ban of %s could not be written: %s", author.short, error)

    async def _follow_bans(self) -> None:
        changes = self._open["bans"].subscribe()
        while True:
            await self._apply_bans()
            await trio.sleep(defaults.LOOK_EVERY)
            await changes.changed()

    async def _apply_bans(self) -> None:
        """Refuse whom anybody has proof against. The proof is checked; who wrote it down does not matter."""
        assert self.documents is not None
        known = self.documents.banned(self.run_here.run_id)
        for ban in self.bans():
            if ban.peer != self.me and ban.peer not in known:
                await self.documents.ban(self.run_here.run_id, ban.peer, ban.reason)
                self.run_here.emit("run", "banned", ban.peer, ban.reason)
            if ban.lied:
                self.run_here.liars.expel(ban.peer, ban.reason)


def _finite(value: float | None) -> float | None:
    return value if value is not None and value == value and abs(value) < float("inf") else None
