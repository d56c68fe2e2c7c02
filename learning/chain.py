"""Membership as a chain of commits: every round's voters are the roster that the commit before wrote down.

A peer outside asks members where the run is, wishes to join, is written into a roster by the leader of some round,
loads the state that this commit vouches for, and votes from the next round on. Peers that were left behind (frozen,
cut off, restarted) take the same way back. When a majority is lost, ``available`` runs go on as branches, and the
branch with fewer committed samples gives way when they meet.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from ..transport.errors import RemoteError, RemoteRefused
from ..transport.identity import PeerId
from ..transport.rpc import Call
from . import admission, defaults
from .admission import belongs, everybody
from .divergence import Divergence
from .membership import Membership, Placement, certify
from .peer import OutOfStep
from .proofs import Proofs
from .replay import Replayer
from .rounds import remembering
from .rounds.decisions import better, candidates, may_branch, short
from .rounds.instance import Instance
from .rounds.messages import (
    Certificate,
    Commit,
    CommitRecord,
    Signed,
    accept_bytes,
    instance_key,
    quorum,
    sign_accept,
    verify_certificate,
)
from .rounds.payloads import payloads_fault
from .rounds.terms import Terms, fill
from .store import Head
from .sync import BRANCH, AskBranch, BranchSigned, HeadInfo, agreed_digest
from .trust import SMALL

if TYPE_CHECKING:
    from .run import Run


class Chain(Membership):
    """See the module."""

    gossip = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._has_state = False
        self._admitted: trio.Event = trio.Event()
        self._branched: trio.Event = trio.Event()
        self._stalled_since: float | None = None
        self._former: dict[PeerId, None] = {}
        self._newcomers: dict[PeerId, None] = {}
        self._waited: dict[PeerId, float] = {}
        self._returned: dict[PeerId, None] = {}
        self._nudge = trio.Event()
        self.proofs, self.replayer = Proofs(run), Replayer(run)
        self.states = Divergence(self)
        run.hub.on_foreign_commit = self._on_foreign_commit
        self.endpoint.serve(BRANCH, self._on_branch)

    @property
    def round(self) -> int:
        return self.head.record.round

    def members(self) -> tuple[PeerId, ...]:
        return everybody(self.head.record)

    # -- entering -----------------------------------------------------------------------------------

    async def enter(self) -> None:
        await self._restore()
        first = True
        while True:
            infos = await self.ask(await self.known())
            info = self._best(infos)
            if self.states.doubt is not None and (info is None or not self._beats(info.record, self.head.record)):
                if await self.states.heal(self.states.doubt):
                    break
                await self._pause()
                continue
            ours = self._has_state and belongs(self.head.record, self.me)
            if info is None or (ours and not self._beats(info.record, self.head.record)):
                if ours:
                    break
                if self._has_state and self.me == self.spec.founder and not infos:
                    # Our roster no longer names us and nobody is there to ask.
                    self._set_reason("no member of the run can be reached; waiting for one")
                elif not infos:
                    self._set_reason(f"no member of the run can be reached yet{self.proofs.doubts()}; trying again")
                await self._pause()
                continue
            if belongs(info.record, self.me):
                if await self._load(info, infos):
                    break
                await self._pause(0.2)
                continue
            self._set_reason(f"waiting to be admitted by {short(info.record.roster)}")
            self._admitted = trio.Event()
            await self.wish(info.record.roster)
            if first:
                first = False
                self.run.emit("run", "wish", detail=self.reason)
            with trio.move_on_after(defaults.WISH_EVERY):
                await self._admitted.wait()
        self._set_reason("")
        self.run.emit("run", "member", detail=f"{len(self.head.record.roster)} in the roster, round {self.round}")

    async def _pause(self, seconds: float = defaults.WISH_EVERY) -> None:
        await trio.sleep(seconds)

    async def _restore(self) -> None:
        """What we know when we start: our saved state, or the founder's beginning."""
        if self._has_state:
            return
        saved = await self.host.run_blocking(self.run.store.load_state)
        if saved is not None:
            vectors, head = saved
            await self.proofs.restore()
            await self.run.adopt(vectors, head)
            self.run.emit("run", "restored", detail=f"the state after round {self.round}")
        elif self.me == self.spec.founder:
            self._has_state = await self.begin_from_origin()
        if self.me == self.spec.founder and self.head.record.kind == "genesis" and self.spec.min_peers > 1:
            await self._enrol()

    async def _enrol(self) -> None:
        """The founder alone waits for enough wishes, then writes the first roster."""
        while len(self.wishes()) + 1 < self.spec.min_peers:
            self._set_reason(f"{len(self.wishes()) + 1} of {self.spec.min_peers} peers are here")
            await trio.sleep(0.05)
        roster = tuple(sorted([self.me, *self.wishes()]))
        record = attrs.evolve(
            self.head.record,
            kind="enrol",
            prev=self.head.record.digest,
            roster=roster,
            reason=f"{len(roster)} peers enrolled",
        )
        self._move(certify(self.endpoint, record, (self.me,)))
        await self.run.settle()
        self._wishes.clear()
        commit = Commit(self.head.certificate.key, record, self.head.certificate)
        for peer in roster:
            if peer != self.me:
                self.run.post.send(peer, commit)

    def _best(self, infos: dict[PeerId, HeadInfo]) -> HeadInfo | None:
        best: HeadInfo | None = None
        for info in infos.values():
            if best is None or self._beats(info.record, best.record):
                best = info
        return best

    @staticmethod
    def _beats(a: CommitRecord, b: CommitRecord) -> bool:
        """Whether a's history wins over b's. A roster change without training counts by its round and kind."""
        if a.total == b.total and (a.branch, a.round) != (b.branch, b.round):
            return (a.branch, a.round) > (b.branch, b.round)
        if a.total == b.total and a.kind != b.kind and "genesis" in (a.kind, b.kind):
            return b.kind == "genesis"
        return better(a.total, a.digest, b.total, b.digest) and a.digest != b.digest

    async def _load(self, info: HeadInfo, infos: dict[PeerId, HeadInfo]) -> bool:
        """Load the state after ``info``'s commit from all its holders, bit for bit that of the digest they agree on."""
        head = info.head()
        digest, holders, why = agreed_digest(infos, head)
        if digest is None:
            self._set_reason(why)
            return False
        ours = None if self.states.doubt is not None or (self.spec.origin and not self._has_state) else self.head.record
        vectors = await self.replayer.obtain(ours, head.record, digest, holders, why)
        if vectors is None:
            return False
        await self.run.adopt(vectors, head)
        return True

    def adopt(self, head: Head) -> None:
        if self.states.doubt is not None:
            self.states.doubt = None
            self.run.emit(
                "run", "healed", detail=f"our state is that of the others again, after round {head.record.round}"
            )
        self._has_state = True
        self._move(head)

    def _move(self, head: Head) -> None:
        """``head`` is where we are now."""
        self.head = head
        if self.run.strategy.ledger:
            self.run.ledger.add(head.record)
        self.proofs.belong(head)

    async def ask(self, peers: tuple[PeerId, ...]) -> dict[PeerId, HeadInfo]:
        """Where the run is, of those peers that can prove it."""
        infos = await super().ask(peers)
        return await self.proofs.believable(
            infos, lambda head: not self._has_state or self._beats(head.record, self.head.record)
        )

    # -- rounds -------------------------------------------------------------------------------------

    async def place(self) -> Placement:
        record = self.head.record
        if not belongs(record, self.me):
            raise OutOfStep(f"round {record.round} left us out: {record.reason}")
        self.placed = admission.placement(self.run, record)
        return self.placed

    def terms(self) -> Terms:
        head = self.head.record
        base = attrs.evolve(head, round=head.round + 1, prev=head.digest, reason="")
        return Terms(
            # The state's digest may still be on its way; it is wanted only when the round is proposed.
            partial(fill, lambda: attrs.evolve(base, state=self.own_digest())),
            self.wishes,
            self.leaving,
            False,
            defaults.MAX_ROSTER,
            self._mode(len(head.roster)) == "strict",
            self.placed.admission,
        )

    def own_digest(self) -> bytes:
        """Of our state before the placed round; empty while it is being computed."""
        snapshot = self.run.snapshots[-1] if self.run.snapshots else None
        return snapshot.digest if snapshot is not None and snapshot.round == self.round else b""

    def check(self, record: CommitRecord) -> str | None:
        head, ours = self.head.record, self.own_digest()
        voters = set(self.placed.voters)
        if (record.run, record.round, record.prev) != (head.run, head.round + 1, head.digest):
            return "it does not follow our last commit"
        # In available mode every accepted value that was given up makes another branch (docs/agreement.md).
        redone = 0 if self._mode(len(voters)) == "strict" else defaults.MAX_REDONE
        if not head.branch <= record.branch <= head.branch + redone:
            return f"a record of branch {record.branch} after one of {head.branch}"
        if not len(record.members) == len(record.samples) == len(record.weights):
            return "members, samples and weights differ in number"
        if list(record.members) != sorted(set(record.members)) or any(m not in voters for m in record.members):
            return "members are not voters in order"
        if any(s < 0 for s in record.samples) or record.total != head.total + sum(record.samples):
            return "its samples do not add up"
        if not 1 <= len(record.roster) <= defaults.MAX_ROSTER or list(record.roster) != sorted(set(record.roster)):
            return "its roster is empty, too long or not in order"
        wrong = admission.fault(record, self.placed) or remembering.fault(record, self.placed.scores, self.run.rule)
        wrong = wrong or payloads_fault(record, self.placed.key or b"", self.kind)
        if wrong is not None:
            return wrong
        if record.state and ours and record.state != ours:
            self.states.suspect(record)
            return "the state before this round differs from ours"
        return None

    async def confirm(self, record: CommitRecord) -> None:
        wrong = await self.states.confirm(record)
        if wrong is not None:
            raise OutOfStep(f"our state before round {record.round} is not that of the others: {wrong}")

    def committed(self, commit: Commit, voters: tuple[PeerId, ...]) -> None:
        admission.tell(self.run, self.head.record, commit.record)
        self._move(Head(commit.record, commit.certificate, voters))
        self._stalled_since = None
        self._admit(self.head)
        for peer in everybody(commit.record):
            self._wishes.pop(peer, None)
            self._former.pop(peer, None)
        for peer in voters:
            if peer not in commit.record.roster and peer not in self._leaving:
                self._former[peer] = None
        while len(self._former) > defaults.MAX_FORMER:
            del self._former[next(iter(self._former))]
        self._leaving.clear()

    def loading(self) -> tuple[PeerId, ...]:
        return tuple(peer for peer in self.placed.watch if peer in self._newcomers)

    def _admit(self, head: Head) -> None:
        """Those that ``head`` takes in load the state now. Who did not make it last time is not waited for again."""
        now = self.host.now()
        self._waited = {peer: at for peer, at in self._waited.items() if now - at < defaults.JOIN_GRACE_AGAIN}
        known = {self.me, *self.placed.watch, *head.voters, *self._waited}
        new = [peer for peer in everybody(head.record) if peer not in known]
        # A pause between two such waits, lest a crowd of names that never make it makes every round a long one.
        rested = now - max(self._waited.values(), default=-math.inf) >= 2 * defaults.JOIN_GRACE
        self._newcomers = dict.fromkeys(new if rested else ())
        self._waited.update(dict.fromkeys(self._newcomers, now))

    def skipped(self, samples: int) -> None:
        raise OutOfStep("a replicated strategy cannot skip a round")

    def wished(self, peer: PeerId) -> None:
        """Nothing to do: whoever leads a round reads the wishes when it fixes the roster."""

    def left(self, peer: PeerId) -> None:
        self.run.hub.peer_changed(peer, "left the run")

    def _on_foreign_commit(self, sender: PeerId, commit: Commit) -> None:
        """A commit of a round we are not in: an admission, a branch, or word of how far behind we are."""
        record = commit.record
        if record.run != self.run.run_id or not belongs(record, self.me):
            return
        if record.kind == "branch" and record.prev == self.head.record.digest and self._has_state:
            # All of a branch have signed it, we too, unless we are on trial: nobody is taken into one.
            key, voters = instance_key(record.run, record.round, record.prev, record.roster), record.roster
            wrong = self._wrong_branch(record) or verify_certificate(record, commit.certificate, voters, len(voters))
            if wrong is None and commit.certificate.key == key:
                self._take_branch(Head(record, commit.certificate, voters))
            return
        # Not believed here, only a reason to ask: heads are proven when they are loaded.
        self._admitted.set()

    # -- lost majorities ----------------------------------------------------------------------------

    async def guard(self, instance: Instance) -> None:
        """See :class:`Membership`: returns once a branch was formed."""
        self._branched = trio.Event()
        self._stalled_since = None
        warned = ""
        while not self._branched.is_set():
            with trio.move_on_after(defaults.GUARD_EVERY):
                await self._branched.wait()
                break
            now, voters = self.host.now(), instance.voters
            alive = self._alive()
            if self._stalled_since is None or len(alive) >= quorum(len(voters)):
                self._stalled_since = now
            go, reason = may_branch(
                self._mode(len(voters)), len(voters), len(alive), now - self._stalled_since, self._lease()
            )
            stalled = len(alive) < quorum(len(voters))
            self.reason = reason if stalled else ""
            if stalled and not warned:
                warned = reason
                self.run.emit("run", "stalled", detail=reason)
            if go and candidates(self.head.record.digest, self.head.record.round, alive)[0] == self.me:
                await self._form_branch(tuple(sorted(alive)))
        self.reason = ""
        # Whoever waits for the new round reads it from here.
        await self.place()

    def _mode(self, voters: int) -> str:
        return "available" if voters <= SMALL else self.spec.mode

    def _branch_record(self, roster: tuple[PeerId, ...]) -> CommitRecord:
        """What ``roster`` would go on from, as a branch of where we are."""
        head = self.head.record
        return attrs.evolve(
            head,
            kind="branch",
            prev=head.digest,
            members=(),
            samples=(),
            weights=(),
            opinions=(),
            payloads=(),
            scores=remembering.carried(roster, remembering.known(head)),
            roster=roster,
            branch=head.branch + 1,
            nonces=(),
            algorithm="",
            fingerprint=b"",
            reason=f"branch of {len(roster)}: a majority of {len(head.roster)} was lost",
        )

    def _wrong_branch(self, record: CommitRecord) -> str | None:
        """What is wrong with a branch that somebody proposes, None when we may be part of it."""
        roster, ours = record.roster, self.head.record.roster
        if not belongs(record, self.me) or list(roster) != sorted(set(roster)) or any(p not in ours for p in roster):
            return "its roster is not part of ours, with us, in order"
        if self._mode(len(ours)) == "strict":
            return "a strict run has no branches"
        return None if record == self._branch_record(roster) else "it does not go on from where we are"

    async def _form_branch(self, roster: tuple[PeerId, ...]) -> None:
        record = self._branch_record(roster)
        key = instance_key(record.run, record.round, record.prev, roster)
        signed = [Signed(self.me, sign_accept(self.endpoint.identity, key, 0, record.digest).signature)]
        for peer in roster:
            if peer == self.me:
                continue
            try:
                answer = await self.endpoint.call(peer, BRANCH, AskBranch(record), timeout=defaults.ASK_HEADS)
            except RemoteError as error:
                self.run.emit("run", "branch-refused", peer, str(error))
                return
            if not peer.verify(accept_bytes(key, 0, record.digest), answer.signature):
                return
            signed.append(Signed(peer, answer.signature))
        certificate = Certificate(key, 0, tuple(sorted(signed, key=lambda s: s.peer)))
        for peer in everybody(record):
            if peer != self.me:
                self.run.post.send(peer, Commit(key, record, certificate))
        self._take_branch(Head(record, certificate, roster))

    async def _on_branch(self, call: Call[AskBranch]) -> BranchSigned:
        record, head = call.request.record, self.head.record
        stalled = self._stalled_since is not None and self.host.now() - self._stalled_since >= self._lease() / 2
        if record.prev != head.digest or record.round != head.round or record.total != head.total:
            raise RemoteRefused("other-head", "we are at another commit")
        wrong = self._wrong_branch(record)
        if wrong is not None or call.peer not in record.roster or self.me not in record.roster:
            raise RemoteRefused("bad-branch", wrong or "that is no branch for the two of us")
        if not stalled or len(self._alive()) >= quorum(len(head.roster)):
            raise RemoteRefused("not-stalled", "we see a majority, or have not waited long enough")
        key = instance_key(record.run, record.round, record.prev, record.roster)
        return BranchSigned(sign_accept(self.endpoint.identity, key, 0, record.digest).signature)

    def _alive(self) -> list[PeerId]:
        gone = self.run.presence.lost
        return [v for v in self.head.record.roster if v not in gone and v not in self._leaving]

    def _lease(self) -> float:
        """Nobody waits for those who said goodbye."""
        alive = self._alive()
        said = all(v in alive or v in self._leaving for v in self.head.record.roster)
        return 0.0 if said else defaults.LEASE

    def _take_branch(self, head: Head) -> None:
        for peer in self.head.record.roster:
            if peer not in head.record.roster:
                self._former[peer] = None
        self._move(head)
        for snapshot in self.run.snapshots[-1:]:
            if snapshot.round == head.record.round:
                snapshot.head = head
        self.run.emit("run", "branch", detail=head.record.reason)
        self._branched.set()

    # -- meeting others -----------------------------------------------------------------------------

    async def scout(self) -> None:
        """Every few seconds: do peers of this run outside our roster know a better history? Are we behind?"""
        turn = 0
        while True:
            with trio.move_on_after(defaults.SCOUT_EVERY * (0.75 + 0.5 * self.host.random.random())):
                await self._nudge.wait()
            self._nudge = trio.Event()
            turn += 1
            if not self._has_state or self.run.phase == "join":
                continue
            outside = dict.fromkeys(self._former)
            if turn % 3 == 0:
                outside.update(dict.fromkeys(await self.providers()))
            ask = [peer for peer in outside if peer not in self.head.record.roster and peer != self.me]
            ask += [peer for peer in self._returned if peer not in ask]
            self._returned.clear()
            if self._stuck():
                ask += [peer for peer in self._alive() if peer != self.me]
            infos = await self.ask(tuple(ask))
            info = self._best(infos)
            if info is None or not self._beats(info.record, self.head.record):
                continue
            if belongs(info.record, self.me) and self._follows(info):
                # A round ahead is a commit that is on its way to us.
                if self._stuck() or info.record.round > self.round + 1:
                    self.run.step_aside(f"the run is at round {info.record.round}, we are at {self.round}")
            else:
                self.run.step_aside(
                    f"another branch has {info.record.total} samples, ours {self.head.record.total}: loading its state"
                )

    def found(self, peer: PeerId) -> None:
        # It may be ahead of us, or on a branch of its own.
        self._returned[peer] = None
        self._nudge.set()

    def _follows(self, info: HeadInfo) -> bool:
        return info.record.branch == self.head.record.branch

    def _stuck(self) -> bool:
        waiting = self.run.waiting_since()
        return waiting is not None and self.host.now() - waiting > defaults.STUCK_AFTER

    async def leave(self) -> None:
        await self.wish(tuple(p for p in self.head.record.roster if p not in self.run.presence.lost), leave=True)

    def _set_reason(self, reason: str) -> None:
        if reason and reason != self.reason:
            self.run.emit("run", "waiting", detail=reason)
        self.reason = reason
