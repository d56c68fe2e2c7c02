r"""The leader of one attempt of a round, sans-IO: fixes members, freezes, heals, proposes, commits.

Theory of operation::

    convene --may_begin--> scatter --all owners Held--> gather --all receivers full--> propose --quorum--> done
       |  \-- nothing to combine, only payloads ---------------------------------------^
       |                      ^  |                        |
       |                      |  +-- an owner is lost ----+   epoch + 1: its ranges go to the other owners
       +-- a promise holds an accepted value: propose that value again, nothing else

A lost contributor costs nothing before the freeze (it falls out of the intersection of what owners hold)
and nothing after it (it stays in). A lost owner costs its ranges; if a live receiver holds its combined
slice, the others fetch it there. The leader is replaced like anybody: see :mod:`.voter`.

Rules on inner products have one phase more, ``weigh``, between scatter and gather: all owners send Products, the leader
decides and tells all receivers. An owner lost there costs its ranges, as in scatter. Where fewer contribute than a rule
needs, the attempt is given up; one that is not the first ends the round without contributions instead.
"""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId
from ..digest import choose_fingerprint
from .actions import Action, Fingerprint, Note, Send, Weigh
from .challenges import Challenges
from .claims import Denied, Receipts
from .decisions import (
    contributors,
    holders_of,
    may_abandon,
    may_begin,
    never_decided,
    proposal_of,
    shares,
    short,
    waits_for_guests,
)  # fmt: skip
from .judging import Judging
from .messages import (
    Accept,
    Ask,
    Decided,
    Fetch,
    Freeze,
    Held,
    Message,
    Plan,
    Products,
    Progress,
    Propose,
    Ready,
    Reject,
    Seal,
    held_bytes,
    members_hash,
)  # fmt: skip
from .planning import first_plan, freeze, left_out, mending, next_plan, overdue, without_result
from .remembering import NOTHING, carried, of
from .weighing import Weighed, heaviest, owners_of, part_fault, parts_to_tell, too_few


class Leader(Judging):
    """Leads one attempt. Every method takes ``now`` (seconds) and returns actions, in order."""

    # -- what peers say -----------------------------------------------------------------------------

    def receive(self, now: float, sender: PeerId, message: object) -> list[Action]:
        """Handle a message addressed to the leader of this attempt."""
        # Who is lost is not for a message to say: it may have been under way since before its sender was.
        if sender in self.convicted or self.phase in ("done", "aborted"):
            return []
        if sender not in self.voters and not (sender in self.guests and isinstance(message, Ready | Progress)):
            return []
        match message:
            case Ready() if sender in self.guests:
                return self._on_guest(now, sender, message)
            case Ready():
                return self._on_ready(now, sender, message)
            case Held():
                return self._on_held(now, sender, message)
            case Receipts() | Denied():
                return self._on_claim(now, sender, message)
            case Products():
                return self._on_products(now, sender, message)
            case Progress():
                return self._on_progress(now, sender, message)
            case Accept():
                return self._on_accept(now, sender, message)
            case Reject() if message.attempt == self.attempt:
                return self._on_reject(now, sender, message)
            case _:
                return []

    def peer_lost(self, now: float, peer: PeerId, why: str) -> list[Action]:
        """No way to ``peer`` at the moment."""
        if peer in (self.me, *self.lost) or self.phase in ("done", "aborted"):
            return []
        self.lost[peer] = why
        match self.phase:
            case "convene":
                return self._maybe_begin(now)
            case "scatter":
                if self._owns(peer):
                    return self._replan(now, (peer,), f"owner {peer.short} is lost")
                return self._maybe_freeze(now)
            case "weigh" if self._owns(peer):
                return self._replan(now, (peer,), f"owner {peer.short} is lost")
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
            case "scatter" | "weigh":
                assert self.plan is not None
                said = self._held if self.phase == "scatter" else self._products
                silent = tuple(o for o in owners_of(self.plan) if o not in said)
                if silent:
                    self._late.update(dict.fromkeys(silent, self.phase))
                    return actions + self._replan(now, silent, f"owners silent: {short(silent)}")
                self._until = None
                if self._challenges is not None and self.phase == "scatter":
                    self._challenges.over = True
                    return actions + self._maybe_freeze(now)
            case "gather":
                assert self.plan is not None
                self._asked = {}  # whoever says nothing is not waited for
                self._until = now + self.plan.phase(self.pace.gather)
                slow = overdue(self.plan, self._progress, [r for r in self.plan.receivers if r not in self._apart])
                if slow and self._overdue and len(slow) < len({piece.owner for piece in self.plan.slices}):
                    # Asked about before, and still held by its owner alone.
                    self._late.update(dict.fromkeys(slow, "gather"))
                    return actions + self._replan(now, slow, f"late: {short(slow)}")
                self._overdue = True
                actions += self._heal(now)
                return actions + self._maybe_propose(now, late=True) if self.phase == "gather" else actions
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
            return [Send(sender, Propose(self.key, self.attempt, self.record, tuple(self._accepts) or (self.me,)))]
        if self.phase in ("scatter", "weigh", "gather") and not new:
            # It has no plan of ours: that was lost, or the peer restarted and holds nothing of what it said before.
            self._held.pop(sender, None)
            self._progress.pop(sender, None)
            return self._brief(sender)
        if self.phase != "convene":
            return []
        actions = self._maybe_begin(now)
        if self.phase == "convene" and new:
            actions.append(self._waiting(now, sender))
            if self.attempt > 0 and len(self._ready) == 1:
                actions += self._call_in()
        return actions

    def _on_guest(self, now: float, sender: PeerId, message: Ready) -> list[Action]:
        """Somebody on trial is ready. It promises nothing, so that it may be at any attempt."""
        new, self._guests[sender] = sender not in self._guests, message
        if self.phase in ("scatter", "weigh", "gather"):
            self._progress.pop(sender, None)
            return self._brief(sender)
        if self.phase != "convene":
            return []
        actions = self._maybe_begin(now)
        return [*actions, self._waiting(now, sender)] if self.phase == "convene" and new else actions

    def _maybe_begin(self, now: float) -> list[Action]:
        promises = {peer: ready.accepted for peer, ready in self._ready.items()}
        earlier = proposal_of(promises)
        if self._grace_until is None and len(self._ready) >= self.needed:
            self._grace_until = now + self.pace.grace
            self._word = min(self._word, now + self.pace.grace / 8)
        until, again = self._grace_until, ""
        go, reason = may_begin(self.voters, self._ready, self.lost, self.needed, now, until)
        if earlier is not None:
            if len(self._ready) < self.needed:
                return []
            holders, wrong = holders_of(earlier, self._ready), self._unfit(earlier.record)
            if wrong is not None and never_decided(self.voters, promises, self.needed):
                again = f"an earlier proposal is given up: {wrong}; "
            elif wrong is not None and not go:
                # Most would refuse it again; those who have not promised yet may show that it binds nobody.
                return []
            elif not holders:
                give_up, self._reason = may_abandon(self.voters, self._ready, self.lost, self._terms.strict, now, until)
                if not give_up:
                    return []
                again = self._reason + "; "
                # Somebody out of reach may have ended the round with it.
                self._branch = earlier.record.branch + (not self._terms.strict)
            if not again:
                # The value may already be decided: propose it again, whoever accepted it holds the result.
                self.record = earlier.record
                what = f"attempt {self.attempt}: the value of attempt {earlier.attempt} again"
                return [Note("commit", "repropose", what), *self._propose(now, holders)]
            if self.attempt <= earlier.attempt:
                # One ballot never carries two values.
                return self._abort(now, again)
        if go:
            go, reason = waits_for_guests(self.guests, self._guests, self.lost, now, until, reason)
        self._reason = reason = again + reason
        if not go:
            return []
        members, (length, _, _), without = contributors(self._ready)
        if not length:
            return self._collect(now, members, reason + without)
        guests = {peer: ready for peer, ready in self._guests.items() if peer not in self.lost}
        plan = first_plan(
            self.key, self.attempt, self._ready, self.me, self.needed, reason, self.rule, guests, self._rings
        )
        few = too_few(self.rule, len(plan.members))
        if few is not None:
            self._reason = again + few
            if until is not None and now < until:
                return []  # the lost may come back
            plan = without_result(plan, f"{few}; {plan.reason}")
        return [Note("convene", "members", plan.reason), *self._publish(now, plan)]

    def _publish(self, now: float, plan: Plan) -> list[Action]:
        if self.plan is not None and self.plan.ring:
            self._refusals.clear()  # that was the ring
        self.plan, self.phase = plan, "scatter"
        self._held, self._progress, self._frozen, self._asked, self._fetching = {}, {}, (), {}, {}
        self._products, self._decided, self._learnt = {}, None, NOTHING
        self._overdue = False
        self._challenges = Challenges(self.key, plan) if self.audits else None
        # Owners give up on contributors first.
        self._until = now + plan.phase(self.pace.scatter) * 1.5 + self.spare
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
        if plan.ring and message.holds != plan.members:
            return self._replan(now, (), f"the ring does not close at {sender.short}")
        self._held[sender] = message.holds
        return self._maybe_freeze(now)

    def _maybe_freeze(self, now: float) -> list[Action]:
        plan = self.plan
        assert plan is not None
        owners = dict.fromkeys(piece.owner for piece in plan.slices)
        if any(owner not in self._held for owner in owners):
            return []
        if self._challenges is not None and (challenged := self._challenge(now, self._challenges)) is not None:
            return challenged
        frozen, slow, why = freeze(plan, self._held)
        if slow:
            self._late.update(dict.fromkeys(slow, "scatter"))
            return self._replan(now, slow, why)
        if plan.members and not frozen:
            return self._abort(now, "no contribution reached all owners")
        if (few := too_few(self.rule, len(frozen))) is not None:
            return self._give_up(now, (), f"{few}, and no more reached all owners")
        self._frozen, self.phase = frozen, "weigh" if self.rule.needs_gram and frozen else "gather"
        self._until = now + plan.phase(self.pace.gather) * 1.5
        message = Freeze(self.key, plan.attempt, plan.epoch, frozen)
        left = [m for m in plan.members if m not in frozen]
        self._late.update(dict.fromkeys(left, "scatter"))
        actions: list[Action] = [Note("scatter", "dropped", "not held by all owners", peer) for peer in left]
        return actions + [Send(r, message) for r in plan.receivers if r not in self.lost]

    def _replan(self, now: float, gone: tuple[PeerId, ...], why: str) -> list[Action]:
        """Next epoch, without ``gone`` as owners and contributors."""
        assert self.plan is not None
        after = next_plan(self.plan, gone, self.lost, self._frozen, why)
        if after is None:
            return self._abort(now, f"{why}; no owner is left")
        if (few := too_few(self.rule, len(after.members))) is not None:
            return self._give_up(now, gone, f"{why}; {few}")
        return [Note("scatter", "epoch", after.reason), *self._publish(now, after)]

    def _give_up(self, now: float, gone: tuple[PeerId, ...], why: str) -> list[Action]:
        """What is there cannot be combined by the run's rule. Begun anew once; it may be no better then."""
        assert self.plan is not None
        without = without_result(self.plan, why)
        after = next_plan(without, gone, self.lost, (), why) if self.attempt else None
        if after is None:
            return self._abort(now, why)
        after = attrs.evolve(after, reason=without.reason)
        return [Note("scatter", "epoch", after.reason), *self._publish(now, after)]

    # -- weigh --------------------------------------------------------------------------------------

    def _on_products(self, now: float, sender: PeerId, message: Products) -> list[Action]:
        plan, count = self.plan, len(self._frozen)
        if self.phase != "weigh" or plan is None or (message.attempt, message.epoch) != (plan.attempt, plan.epoch):
            return []
        if not self._owns(sender) or sender in self._products or message.members != members_hash(self._frozen):
            return []
        wrong = part_fault(plan, sender, message.data, count)
        if wrong is not None:
            return self._refuse_products(now, sender, wrong)
        self._products[sender] = message.data
        owners = owners_of(plan)
        if any(owner not in self._products for owner in owners):
            return []
        self._until = None  # it is we who are computing
        parts = parts_to_tell([self._products[owner] for owner in owners], count)
        return [Weigh(plan.attempt, plan.epoch, count, parts, of(self._frozen, self._scores))]

    def _refuse_products(self, now: float, owner: PeerId, wrong: str) -> list[Action]:
        why = f"the inner products of {owner.short} are refused: {wrong}"
        return [Note("combine", "refused", why, owner), *self._replan(now, (owner,), why)]

    def weighed(self, now: float, action: Weigh, found: Weighed) -> list[Action]:
        """What ``action`` asked for."""
        plan = self.plan
        if self.phase != "weigh" or plan is None or (action.attempt, action.epoch) != (plan.attempt, plan.epoch):
            return []
        if found.wrong is not None and self.attempt:
            return self._give_up(now, (), f"{self.rule} decides nothing: {found.wrong}")
        if found.wrong is not None:
            return self._refuse_products(now, heaviest(self._products, action.members), f"in the sum, {found.wrong}")
        self.phase, self._until = "gather", now + plan.phase(self.pace.gather) * 1.5
        hashed = members_hash(self._frozen)
        self._decided = Decided(self.key, plan.attempt, plan.epoch, hashed, action.parts, found.data)
        self._learnt = dict(zip(self._frozen, found.learnt, strict=True)) if found.learnt else NOTHING
        return [Send(r, self._decided) for r in plan.receivers if r not in self.lost]

    # -- gather -------------------------------------------------------------------------------------

    def _ask(self, now: float, why: str) -> list[Action]:
        plan = self.plan
        assert plan is not None
        self._asked = {r: None for r in plan.receivers if r not in self._apart}
        self._until = now + plan.phase(self.pace.gather)
        message = Ask(self.key, plan.attempt, plan.epoch)
        actions: list[Action] = [Note("gather", "ask", why)]
        for receiver in self._asked:
            if receiver not in self._progress or not self._progress[receiver].nonce:
                actions += self._brief(receiver)
            actions.append(Send(receiver, message))
        return actions

    def _brief(self, receiver: PeerId) -> list[Action]:
        """Plan or freeze may not have reached ``receiver``. What it knows it ignores."""
        if (plan := self.plan) is None or receiver not in plan.receivers or receiver in self.lost:
            return []
        told: list[Message] = [plan]
        if self.phase in ("weigh", "gather"):
            told.append(Freeze(self.key, plan.attempt, plan.epoch, self._frozen))
        if self._decided is not None:
            told.append(self._decided)
        return [Send(receiver, message) for message in told]

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

    def _heal(self, now: float) -> list[Action]:
        """Get missing combined slices of lost owners to those who lack them, or give up on this epoch."""
        plan = self.plan
        assert plan is not None
        if any(peer not in self.lost for peer in self._asked):
            return []
        fetches, orphans = mending(plan, self._progress, self._apart, self._fetching)
        if orphans:
            return self._replan(now, orphans, f"combined slice of {short(orphans)} is held by nobody")
        return [
            Send(receiver, Fetch(self.key, plan.attempt, plan.epoch, index, holder))
            for receiver, index, holder in fetches
        ]

    def _maybe_propose(self, now: float, *, late: bool = False) -> list[Action]:
        plan = self.plan
        assert plan is not None
        done = [r for r in plan.receivers if r in self._progress and self._progress[r].nonce]
        full = [r for r in done if r not in self.guests]
        pending = [r for r in plan.receivers if r not in done and r not in self.lost]
        if self._looking:
            return []  # a look ends in time, and then this is asked again
        enough = len(full) >= self.needed and self.me in full
        # Who was late in scatter is late here as well; it gets the result from the others.
        if not late and any(not enough or r not in self._late for r in pending):
            return []
        if not enough:
            lost_owner = any(piece.owner in self.lost for piece in plan.slices)
            return self._ask(now, "the result is incomplete") if pending and (late or lost_owner) else []
        members, nonces = self._frozen, tuple(self._progress[r].nonce for r in sorted(full))
        roster, trial, opinions, why = self._next(len(full))
        why = f"{plan.reason}{left_out(members, self._late)}; roster {why}"
        record = self._terms.draft(members, *shares(plan, members), roster, nonces, why)
        branch = record.branch if self._branch is None else self._branch
        scores = carried(roster, {**self._scores, **self._learnt})
        self.record = attrs.evolve(record, branch=branch, trial=trial, opinions=opinions, scores=scores)
        self.phase, self._until = "seal", None
        algorithm, _ = choose_fingerprint([self._progress[r].algorithms for r in sorted(full)])
        message = Seal(self.key, plan.attempt, plan.epoch, nonces, algorithm)
        others: list[Action] = [Send(r, message) for r in done if r != self.me]
        return [*others, Fingerprint(plan.attempt, plan.epoch, nonces, algorithm)]

    # -- commit -------------------------------------------------------------------------------------

    def _on_reject(self, now: float, sender: PeerId, message: Reject) -> list[Action]:
        if message.promised > self.attempt:
            # Our own voter sees the same message and moves on; nothing more to lead here.
            return []
        self._refusals[sender] = message.reason
        note = Note(self.phase if self.phase != "propose" else "commit", "refused", message.reason, sender)
        if self.phase == "propose":
            against = sum(peer not in self._accepts for peer in self._refusals)
            if len(self.voters) - against < self.needed:
                return [note, *self._abort(now, f"too many refuse: {message.reason}")]
            return [note, *self._maybe_commit(now)]
        against, exchanging = len(self._refusals), self.phase in ("scatter", "weigh", "gather")
        if self.rule.needs_gram and exchanging and len(self.voters) - against < self.needed:
            # It is we who are wrong, or taken to be.
            return [note, *self._abort(now, f"too many refuse: {message.reason}")]
        if self.phase == "scatter" and self.plan is not None and self.plan.ring:
            return [note, *self._replan(now, (), f"no ring, as {sender.short} refuses: {message.reason}"[:200])]
        if exchanging and self.plan is not None and message.epoch < self.plan.epoch:
            return [note]  # of the plan before; this one it has not seen
        gives = self.phase == "scatter" and self.plan is not None and sender in self.plan.members
        if gives or (self._owns(sender) and exchanging):
            return [note, *self._replan(now, (sender,), f"{sender.short} refuses: {message.reason}")]
        return [note]

    # -- word to those who wait ---------------------------------------------------------------------
