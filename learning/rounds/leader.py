"""The leader of one attempt of a round, sans-IO: fixes members, freezes, heals, proposes, commits.

Theory of operation::

    convene --may_begin--> scatter --all owners Held--> gather --all receivers full--> propose --quorum--> done
       |                      ^  |                        |
       |                      |  +-- an owner is lost ----+   epoch + 1: its ranges go to the other owners
       +-- a promise holds an accepted value: propose that value again, nothing else

A lost contributor costs nothing before the freeze (it falls out of the intersection of what owners hold)
and nothing after it (it stays in). A lost owner costs its ranges; if a live receiver holds its combined
slice, the others fetch it there. The leader is replaced like anybody: see :mod:`.voter`.
"""

from __future__ import annotations

from collections.abc import Collection

import attrs

from ...transport.identity import Identity, PeerId
from ..reduce.slices import reassign, split
from .actions import Action, Fingerprint, Note, Pace, Promise, Send
from .decisions import (
    contributors,
    may_abandon,
    may_begin,
    next_roster,
    proposal_of,
    roster_room,
    short,
    worth_proposing,
)
from .messages import (
    Accept,
    Accepted,
    Ask,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Fetch,
    Freeze,
    Held,
    Plan,
    Progress,
    Propose,
    Ready,
    Reject,
    Signed,
    Waiting,
    accept_bytes,
    held_bytes,
    quorum,
)
from .terms import Terms, accepts_needed


class Leader:
    """Leads one attempt. Every method takes ``now`` (seconds) and returns actions, in order."""

    def __init__(
        self,
        *,
        key: bytes,
        round: int,
        voters: tuple[PeerId, ...],
        attempt: int,
        identity: Identity,
        pace: Pace,
        terms: Terms,
        now: float,
        lost: dict[PeerId, str],
        refused: Collection[bytes] = (),
    ) -> None:
        """``refused``: digests of records that our own voter refused, now and later."""
        self.key, self.round, self.voters, self.attempt = key, round, voters, attempt
        self.me, self._identity, self.pace, self._terms = identity.peer_id, identity, pace, terms
        self.needed = 1 if terms.gossip else quorum(len(voters))
        self.lost: dict[PeerId, str] = dict(lost)
        self._unwanted = refused
        self.phase = "convene"
        self.plan: Plan | None = None
        self.record: CommitRecord | None = None
        self.certificate: Certificate | None = None
        self._ready: dict[PeerId, Ready] = {}
        self._grace_until: float | None = None
        self._ticked = now
        self._holders: tuple[PeerId, ...] = ()
        self._held: dict[PeerId, tuple[PeerId, ...]] = {}
        self._frozen: tuple[PeerId, ...] = ()
        self._progress: dict[PeerId, Progress] = {}
        self._asked: dict[PeerId, None] = {}
        self._fetching: dict[tuple[PeerId, int], list[PeerId]] = {}
        self._late: dict[PeerId, None] = {}  # left out of the mean by a deadline, not for being lost
        self._overdue = 0  # deadlines of the present gather that have passed
        self._accepts: dict[PeerId, Accept] = {}
        self._refusals: dict[PeerId, str] = {}
        self._until: float | None = None
        self._word: float = now + pace.suspect / 4
        self._reason = ""

    # -- what peers say -----------------------------------------------------------------------------

    def receive(self, now: float, sender: PeerId, message: object) -> list[Action]:
        """Handle a message addressed to the leader of this attempt."""
        if sender not in self.voters or self.phase in ("done", "aborted"):
            return []
        self.lost.pop(sender, None)
        match message:
            case Ready():
                return self._on_ready(now, sender, message)
            case Held():
                return self._on_held(now, sender, message)
            case Progress():
                return self._on_progress(now, sender, message)
            case Accept():
                return self._on_accept(now, sender, message)
            case Reject() if message.attempt == self.attempt:
                return self._on_reject(now, sender, message)
            case _:
                return []

    def peer_alive(self, peer: PeerId) -> None:
        """``peer`` can be reached again: it is told of this attempt with the next word to those who wait."""
        self.lost.pop(peer, None)

    def peer_lost(self, now: float, peer: PeerId, why: str) -> list[Action]:
        """No way to ``peer`` at the moment."""
        if peer in self.lost or self.phase in ("done", "aborted"):
            return []
        self.lost[peer] = why
        match self.phase:
            case "convene":
                return self._maybe_begin(now)
            case "scatter":
                if self._owns(peer):
                    return self._replan(now, (peer,), f"owner {peer.short} is lost")
                return self._maybe_freeze(now)
            case "gather":
                if self._owns(peer):
                    return self._ask(now, f"owner {peer.short} is lost")
                return self._maybe_propose(now)
            case "propose":
                return self._maybe_commit(now)
            case _:
                return []

    def fingerprint(self, now: float, attempt: int, epoch: int, value: bytes, algorithm: str) -> list[Action]:
        """Our result's fingerprint under the revealed nonces: now there is a value to propose."""
        if self.phase != "seal" or self.plan is None or (attempt, epoch) != (self.plan.attempt, self.plan.epoch):
            return []
        assert self.record is not None
        self.record = attrs.evolve(self.record, fingerprint=value, algorithm=algorithm)
        full = tuple(sorted(p for p, progress in self._progress.items() if progress.nonce))
        return self._propose(now, full)

    def tick(self, now: float) -> list[Action]:
        """Let time pass; call at :meth:`deadline`."""
        if self.phase in ("done", "aborted"):
            return []
        self._ticked = now
        actions: list[Action] = []
        if now >= self._word:
            actions += self._say_waiting(now)
        if self.phase == "convene":
            return actions + self._maybe_begin(now)
        if self._until is None or now < self._until:
            return actions
        match self.phase:
            case "scatter":
                assert self.plan is not None
                owners = dict.fromkeys(piece.owner for piece in self.plan.slices)
                silent = tuple(o for o in owners if o not in self._held)
                if silent:
                    return actions + self._replan(now, silent, f"owners silent: {short(silent)}")
                self._until = None
            case "gather":
                self._until = now + self.pace.gather
                self._overdue += 1
                return actions + self._maybe_propose(now, late=True)
            case "propose":
                return actions + self._maybe_commit(now, late=True)
        return actions

    def deadline(self) -> float | None:
        """When :meth:`tick` is due."""
        if self.phase in ("done", "aborted"):
            return None
        times = [self._word]
        if self.phase == "convene" and self._grace_until is not None and self._grace_until > self._ticked:
            # Once only: what is still missing then comes with a message, and the loop must not spin until it does.
            times.append(self._grace_until)
        if self._until is not None:
            times.append(self._until)
        return min(times)

    # -- convene ------------------------------------------------------------------------------------

    def _on_ready(self, now: float, sender: PeerId, message: Ready) -> list[Action]:
        if message.attempt != self.attempt:
            return []
        new = sender not in self._ready
        self._ready[sender] = message
        if self.phase == "propose" and new:
            assert self.record is not None
            holders = tuple(self._accepts) or (self.me,)
            return [Send(sender, Propose(self.key, self.attempt, self.record, holders))]
        if self.phase != "convene":
            return []
        actions = self._maybe_begin(now)
        if self.phase == "convene" and new:
            actions.append(self._waiting(now, sender))
            if self.attempt > 0 and len(self._ready) == 1:
                actions += self._call_in()
        return actions

    def _maybe_begin(self, now: float) -> list[Action]:
        promises = {peer: ready.accepted for peer, ready in self._ready.items()}
        needed = 0 if self._terms.gossip else self.needed
        earlier = proposal_of(worth_proposing(promises, self._unwanted, needed))
        if self._grace_until is None and len(self._ready) >= self.needed:
            self._grace_until = now + self.pace.grace
        again = ""
        holders: tuple[PeerId, ...] = ()
        if isinstance(earlier, Accepted):
            if len(self._ready) < self.needed:
                return []
            digest = earlier.record.digest
            holders = tuple(
                p
                for p, a in promises.items()
                if isinstance(a, Accepted) and a.record.digest == digest and self._ready[p].holds
            )
            if not holders:
                go, self._reason = may_abandon(
                    self.voters, self._ready, self.lost, self._terms.strict, now, self._grace_until
                )
                if not go:
                    return []
                if self.attempt <= earlier.attempt:
                    # One ballot never carries two values.
                    return self._abort(now, self._reason)
                again = self._reason + "; "
        if isinstance(earlier, Accepted) and not again:
            # The value may already be decided: propose it again, whoever accepted it holds the result.
            self.record = earlier.record
            note = Note(
                "commit", "repropose", f"attempt {self.attempt} proposes the value of attempt {earlier.attempt}"
            )
            return [note, *self._propose(now, holders)]
        go, reason = may_begin(self.voters, self._ready, self.lost, self.needed, now, self._grace_until)
        self._reason = reason = again + reason
        if not go:
            return []
        members, length, without = contributors(self._ready)
        reason += without
        receivers = tuple(sorted({*self._ready, self.me}))
        owners = members or receivers
        plan = Plan(
            key=self.key,
            attempt=self.attempt,
            epoch=0,
            members=members,
            samples=tuple(self._ready[m].samples for m in members),
            weights=tuple(self._ready[m].weight for m in members),
            receivers=receivers,
            slices=split(0, length, owners, [self._terms.speed(o) for o in owners]),
            length=length,
            reason=reason,
        )
        return [Note("convene", "members", reason), *self._publish(now, plan)]

    def _publish(self, now: float, plan: Plan) -> list[Action]:
        self.plan, self.phase = plan, "scatter"
        self._held, self._progress, self._frozen, self._asked, self._fetching = {}, {}, (), {}, {}
        self._overdue = 0
        self._until = now + self.pace.scatter * 1.5  # owners give up on contributors first
        return [Send(receiver, plan) for receiver in plan.receivers if receiver not in self.lost]

    # -- scatter ------------------------------------------------------------------------------------

    def _owns(self, peer: PeerId) -> bool:
        return self.plan is not None and any(piece.owner == peer for piece in self.plan.slices)

    def _on_held(self, now: float, sender: PeerId, message: Held) -> list[Action]:
        plan = self.plan
        if self.phase != "scatter" or plan is None or (message.attempt, message.epoch) != (plan.attempt, plan.epoch):
            return []
        if not sender.verify(held_bytes(self.key, message.attempt, message.epoch, message.holds), message.signature):
            return []
        self._held[sender] = message.holds
        return self._maybe_freeze(now)

    def _maybe_freeze(self, now: float) -> list[Action]:
        plan = self.plan
        assert plan is not None
        owners = dict.fromkeys(piece.owner for piece in plan.slices)
        if any(owner not in self._held for owner in owners):
            return []
        frozen = tuple(m for m in plan.members if all(m in self._held[o] for o in owners))
        if plan.members and not frozen:
            return self._abort(now, "no contribution reached all owners")
        self._frozen, self.phase = frozen, "gather"
        self._until = now + self.pace.gather * 1.5
        message = Freeze(self.key, plan.attempt, plan.epoch, frozen)
        left = [m for m in plan.members if m not in frozen]
        self._late.update(dict.fromkeys(left))
        actions: list[Action] = [Note("scatter", "dropped", "not held by all owners", peer) for peer in left]
        return actions + [Send(r, message) for r in plan.receivers if r not in self.lost]

    def _replan(self, now: float, gone: tuple[PeerId, ...], why: str) -> list[Action]:
        """Next epoch, without ``gone`` as owners and contributors."""
        plan = self.plan
        assert plan is not None
        # After the first epoch members only ever shrink: what was frozen without somebody stays without.
        self._late.update(dict.fromkeys(gone))
        base = self._frozen or plan.members
        members = tuple(m for m in base if m not in gone)
        owners = dict.fromkeys(piece.owner for piece in plan.slices)
        heirs = tuple(o for o in owners if o not in gone and o not in self.lost and (o in members or not members))
        dead = tuple(o for o in owners if o not in heirs)
        if not heirs or (plan.members and not members):
            return self._abort(now, f"{why}; no owner is left")
        weights = dict(zip(plan.members, plan.weights, strict=True))
        samples = dict(zip(plan.members, plan.samples, strict=True))
        reason = f"{why}: its slices go to {short(heirs)}"
        after = attrs.evolve(
            plan,
            epoch=plan.epoch + 1,
            members=members,
            samples=tuple(samples[m] for m in members),
            weights=tuple(weights[m] for m in members),
            receivers=tuple(r for r in plan.receivers if r not in self.lost),
            slices=reassign(plan.slices, dead, heirs),
            reason=reason,
        )
        return [Note("scatter", "epoch", reason), *self._publish(now, after)]

    # -- gather -------------------------------------------------------------------------------------

    def _ask(self, now: float, why: str) -> list[Action]:
        plan = self.plan
        assert plan is not None
        self._asked = {r: None for r in plan.receivers if r not in self.lost}
        self._until = now + self.pace.gather
        message = Ask(self.key, plan.attempt, plan.epoch)
        actions: list[Action] = [Note("gather", "ask", why)]
        for receiver in self._asked:
            if receiver not in self._progress or not self._progress[receiver].nonce:
                # Plan or freeze may not have reached it. What it knows it ignores.
                actions += [
                    Send(receiver, plan),
                    Send(receiver, Freeze(self.key, plan.attempt, plan.epoch, self._frozen)),
                ]
            actions.append(Send(receiver, message))
        return actions

    def _on_progress(self, now: float, sender: PeerId, message: Progress) -> list[Action]:
        plan = self.plan
        if self.phase != "gather" or plan is None or (message.attempt, message.epoch) != (plan.attempt, plan.epoch):
            return []
        if sender not in plan.receivers:
            return []
        before = self._progress.get(sender)
        if before is not None and len(before.have) > len(message.have):
            return []
        self._progress[sender] = message
        self._asked.pop(sender, None)
        actions = self._heal(now)
        return actions if self.phase != "gather" else actions + self._maybe_propose(now)

    def _heal(self, now: float, *, patient: bool = True) -> list[Action]:
        """Get missing combined slices of lost owners to those who lack them, or give up on this epoch.

        Not ``patient`` (a second deadline has passed): whoever has not answered counts as lost, and so does an owner
        from whom nobody got its slice in all this time.
        """
        plan = self.plan
        assert plan is not None
        silent = [peer for peer in self._asked if peer not in self.lost]
        if silent and patient:
            return []
        live = [r for r in plan.receivers if r not in self.lost and r not in silent]
        actions: list[Action] = []
        orphans: dict[PeerId, None] = {}
        for index, piece in enumerate(plan.slices):
            holders = [r for r in live if r in self._progress and index in self._progress[r].have]
            holders.sort(key=lambda holder, owner=piece.owner: holder == owner)  # type: ignore[misc]
            lacking = [r for r in live if r in self._progress and index not in self._progress[r].have]
            if not patient and lacking and holders == [piece.owner]:
                orphans[piece.owner] = None
                continue
            owner_gone = piece.owner in self.lost or piece.owner in silent
            if owner_gone and not holders and any(r in self._progress for r in live):
                if all(r in self._progress for r in live):
                    orphans[piece.owner] = None
                continue
            for receiver in lacking:
                # A live owner is still sending, unless the receiver's own deadline said otherwise already.
                tried = self._fetching.setdefault((receiver, index), [])
                fresh = [h for h in holders if h not in tried]
                if fresh and (owner_gone or piece.owner in holders):
                    tried.append(fresh[0])
                    actions.append(Send(receiver, Fetch(self.key, plan.attempt, plan.epoch, index, fresh[0])))
        if orphans:
            gone = tuple(orphans)
            return self._replan(now, gone, f"combined slice of {short(gone)} is held by nobody")
        return actions

    def _maybe_propose(self, now: float, *, late: bool = False) -> list[Action]:
        plan = self.plan
        assert plan is not None
        full = [r for r in plan.receivers if r in self._progress and self._progress[r].nonce]
        pending = [r for r in plan.receivers if r not in full and r not in self.lost]
        enough = len(full) >= self.needed and self.me in full
        # Whom a deadline has left out of the mean is not waited for a second time: the commit finds it.
        if not late and (not enough or any(r not in self._late for r in pending)) and pending:
            return []
        if not enough:
            if self._overdue > 1 and (healed := self._heal(now, patient=False)):
                return healed
            lost_owner = any(piece.owner in self.lost for piece in plan.slices)
            return self._ask(now, "the result is incomplete") if pending and (late or lost_owner) else []
        present = {v: None for v in self.voters if v not in self.lost}
        room = roster_room(len(full), self._terms.roster_limit)
        roster, why = next_roster(self.voters, present, self._terms.leaving(), self._terms.wishes(), room)
        samples = dict(zip(plan.members, plan.samples, strict=True))
        weights = dict(zip(plan.members, plan.weights, strict=True))
        members, nonces = self._frozen, tuple(self._progress[r].nonce for r in sorted(full))
        kept = tuple(samples[m] for m in members), tuple(weights[m] for m in members)
        self.record = self._terms.draft(members, *kept, roster, nonces, f"{plan.reason}; roster {why}")
        self.phase, self._until = "seal", None
        offers = tuple(self._progress[r].algorithms for r in sorted(full))
        return [Fingerprint(plan.attempt, plan.epoch, nonces, offers)]

    # -- commit -------------------------------------------------------------------------------------

    def _propose(self, now: float, holders: tuple[PeerId, ...]) -> list[Action]:
        assert self.record is not None
        self.phase, self._until = "propose", now + self.pace.gather
        self._holders = holders
        message = Propose(self.key, self.attempt, self.record, holders)
        return [Promise(self.attempt), *(Send(voter, message) for voter in self.voters if voter not in self.lost)]

    def _on_accept(self, now: float, sender: PeerId, message: Accept) -> list[Action]:
        if self.phase != "propose" or self.record is None or message.attempt != self.attempt:
            return []
        digest = self.record.digest
        if message.digest != digest:
            return []
        if not sender.verify(accept_bytes(self.key, self.attempt, digest), message.signature):
            return []
        self._accepts[sender] = message
        return self._maybe_commit(now)

    def _maybe_commit(self, now: float, *, late: bool = False) -> list[Action]:
        assert self.record is not None
        needed = accepts_needed(len(self.voters), self._terms.gossip)
        if len(self._accepts) < needed:
            if late:
                if all(holder in self.lost for holder in (*self._holders, *self._accepts)):
                    # Nobody can check the value any more; the next attempt may give it up.
                    return self._abort(now, "nobody that can be reached holds the proposed result")
                self._until = now + self.pace.gather
                message = Propose(self.key, self.attempt, self.record, tuple(self._accepts) or (self.me,))
                return [Send(v, message) for v in self.voters if v not in self.lost and v not in self._accepts]
            return []
        expected = self.plan.receivers if self.plan is not None else tuple(self._ready)
        pending = [v for v in expected if v not in self.lost and v not in self._accepts and v not in self._refusals]
        if pending and not late:
            self._until = min(self._until or now + self.pace.accept, now + self.pace.accept)
            return []
        accepts = tuple(Signed(peer, self._accepts[peer].signature) for peer in sorted(self._accepts))
        self.certificate = Certificate(self.key, self.attempt, accepts)
        self.phase, self._until = "done", None
        commit = Commit(self.key, self.record, self.certificate)
        others = [v for v in (*self.voters, *self.record.roster) if v != self.me]
        # Ourselves last: whoever acts on our commit finds it already on its way to the others.
        return [Send(peer, commit) for peer in (*dict.fromkeys(others), self.me)]

    def _on_reject(self, now: float, sender: PeerId, message: Reject) -> list[Action]:
        if message.promised > self.attempt:
            # Our own voter sees the same message and moves on; nothing more to lead here.
            return []
        self._refusals[sender] = message.reason
        note = Note(self.phase if self.phase != "propose" else "commit", "refused", message.reason, sender)
        if self.phase == "propose":
            if len(self.voters) - len(self._refusals) < accepts_needed(len(self.voters), self._terms.gossip):
                return [note, *self._abort(now, f"too many refuse the proposal: {message.reason[:100]}")]
            return [note, *self._maybe_commit(now)]
        if self._owns(sender) and self.phase in ("scatter", "gather"):
            return [note, *self._replan(now, (sender,), f"{sender.short} refuses: {message.reason}")]
        return [note]

    def follow(self, now: float, attempt: int) -> list[Action]:
        """Our own voter is at ``attempt``. Past ours, we lead no more: whoever still listens here is sent there.

        Without this the few that follow us and the few that left would wait for each other for ever.
        """
        if attempt <= self.attempt or self.phase in ("done", "aborted"):
            return []
        return self._abort(now, f"attempt {attempt} has begun", attempt)

    def _abort(self, now: float, why: str, attempt: int | None = None) -> list[Action]:
        self.phase, self._until = "aborted", None
        convene = Convene(self.key, self.round, self.attempt + 1 if attempt is None else attempt)
        note = Note("convene", "abort", why)
        return [note, *(Send(voter, convene) for voter in self.voters if voter not in self.lost)]

    # -- word to those who wait ---------------------------------------------------------------------

    def _waiting(self, now: float, to: PeerId) -> Action:
        missing = tuple(v for v in self.voters if v not in self._ready)
        reason = self._reason or "convening"
        return Send(to, Waiting(self.key, self.attempt, missing, f"{reason} (leader {self.me.short}, {self.phase})"))

    def _say_waiting(self, now: float) -> list[Action]:
        self._word = now + self.pace.suspect / 4
        if self.plan is not None and self.phase in ("scatter", "gather"):
            live = [r for r in self.plan.receivers if r not in self.lost]
            if len(live) < self.needed:
                # This plan leads nowhere, whoever comes back. Silent, we are left for an attempt that can begin anew.
                return []
        actions: list[Action] = [self._waiting(now, peer) for peer in self._ready if peer not in self.lost]
        if self.phase == "convene" and self.attempt > 0 and self._ready:
            # Who has committed already answers this with the commit.
            actions += self._call_in()
        return actions

    def _call_in(self) -> list[Action]:
        convene = Convene(self.key, self.round, self.attempt)
        return [Send(v, convene) for v in self.voters if v not in self.lost and v not in self._ready]
