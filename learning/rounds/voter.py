"""A voter of one round, sans-IO: promises, contributes, owns slices, accepts, and learns the commit.

Theory of operation. A voter follows one attempt at a time, led by ``candidates[attempt % n]``::

    training --begin--> ready --Plan--> scattering --Freeze--> gathering --all slices--> full
       |                  |                         (rules on inner products: Products, Decided first)
       +------------------+------- Propose: verify fingerprint, persist, Accept <---------+
                                   Commit (from anyone, proven by its certificate): done

A leader that is lost or silent is left by moving to the next attempt: a higher promise, sent with the
value accepted so far, so that the next leader must re-propose what may already be decided. Contributions
that owners hold stay valid over attempts and epochs; only ranges with a new owner travel again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from ...transport.identity import Identity, PeerId
from ..aggregate.aggregator import Aggregator
from .actions import (
    Action,
    Done,
    Measure,
    Note,
    Pace,
    Persist,
    Prepare,
    Pull,
    Push,
    Send,
    Verify,
)
from .circling import Circling, source
from .claims import Accuse, Missing
from .messages import (
    Accepted,
    Ask,
    Commit,
    CommitRecord,
    Convene,
    Decided,
    Fetch,
    Freeze,
    Plan,
    Progress,
    Propose,
    Reject,
    Seal,
    Waiting,
    members_hash,
    quorum,
    sign_accept,
    sign_held,
)  # fmt: skip
from .payloads import GATHER
from .planning import freeze_fault, plan_fault
from .remembering import NOTHING, disputed
from .weighing import MEAN, too_few

#: Refused records that are remembered: one for each attempt of a round that goes very badly.
MAX_REFUSED = 64


class Voter(Circling):
    """One peer's part in one instance. Every method takes ``now`` (seconds) and returns actions, in order."""

    def __init__(
        self,
        *,
        key: bytes,
        round: int,
        prev: bytes,
        voters: tuple[PeerId, ...],
        identity: Identity,
        pace: Pace,
        nonce: Callable[[int, int], bytes],
        check: Callable[[CommitRecord], str | None],
        max_length: int,
        algorithms: tuple[str, ...] = (),
        rule: Aggregator = MEAN,
        audits: bool = False,
        trial: tuple[PeerId, ...] = (),
        scores: Mapping[PeerId, int] = NOTHING,
        promised: int = 0,
        accepted: Accepted | None = None,
    ) -> None:
        super().__init__(
            key=key,
            round=round,
            prev=prev,
            voters=voters,
            identity=identity,
            pace=pace,
            promised=promised,
            accepted=accepted,
        )
        self._nonce, self._check, self._max_length = nonce, check, max_length
        self._algorithms, self.rule, self.audits, self.trial = algorithms, rule, audits, trial
        self.scores = scores
        self.due: float | None = None  # when the leader goes on without those who are late, as it says itself
        self.full = False
        #: Why we found no result with the fingerprint of a proposed record, by its digest: we would refuse it again.
        self.refused: dict[bytes, str] = {}
        self._refused_at = -1  # the attempt whose proposal, or decision, we refused
        self._holds: dict[tuple[int, int, str], dict[PeerId, None]] = {}
        self._sums = {}
        self.ring_broken = False
        self._pushed: dict[tuple[PeerId, int, int], None] = {}
        self._combined: dict[int, None] = {}
        self._early: dict[tuple[PeerId, int, int, int], bytes] = {}
        self._reported: tuple[PeerId, ...] | None = None
        self._receipts = {}
        self._reset_decision()
        self._reset_audits()
        self._reset_assessing()

    # -- what happens at this peer ------------------------------------------------------------------

    def withdraw(self, now: float, why: str) -> list[Action]:
        """We offered a contribution that we do not have after all; what owners hold of it is of no use to them."""
        plan, offer = self.plan, self.offer
        if self.decided or offer is None or not offer.contributes:
            return []
        self.offer = attrs.evolve(offer, contributes=False, why=why)
        if plan is None or plan.attempt != self.attempt:
            return self._ready(now, again=True)
        if self.frozen is not None or self.me not in plan.members:
            return []
        return [Send(self.leader(), Reject(self.key, plan.attempt, self.promised, why[:200], plan.epoch))]

    def slice_received(
        self, now: float, contributor: PeerId, start: int, stop: int, codec: str = "fp32"
    ) -> list[Action]:
        """We hold ``contributor``'s elements ``start..stop`` in full, in the code of ``codec``."""
        self._holds.setdefault((start, stop, codec), {})[contributor] = None
        return self._report_held(now, force=False)

    def push_failed(self, now: float, owner: PeerId, start: int, stop: int) -> list[Action]:
        """Our slice did not reach its owner; a later plan may send it again."""
        self._pushed.pop((owner, start, stop), None)
        return []

    def combined(self, now: float, attempt: int, epoch: int, indices: tuple[int, ...]) -> list[Action]:
        """We combined the slices we own."""
        if self.plan is None or self.frozen is None or (attempt, epoch) != (self.plan.attempt, self.plan.epoch):
            return []
        actions: list[Action] = []
        for index in indices:
            self._combined[index] = None
        for index in indices:
            actions += self._hand_out(self.plan, index)
        return actions + self._check_full(now)

    def combined_received(
        self, now: float, sender: PeerId, attempt: int, epoch: int, index: int, members: bytes, *, pulled: bool = False
    ) -> list[Action]:
        """Combined slice ``index`` of (attempt, epoch, hash of members) arrived in full."""
        plan, frozen = self.plan, self.frozen
        if plan is None or (attempt, epoch) > (plan.attempt, plan.epoch) or frozen is None:
            # The owner was told of the freeze before us.
            if sum(key[0] == sender for key in self._early) < 4 * len(self.voters):
                self._early[sender, attempt, epoch, index] = members
            return []
        if (attempt, epoch) != (plan.attempt, plan.epoch) or not 0 <= index < len(plan.slices):
            return []
        if members != members_hash(frozen.members) or not (pulled or source(plan, index, self.me) == sender):
            return []
        onward: list[Action] = []
        if plan.ring and not pulled and index not in self._combined:
            onward = self._hand_out(plan, index)
        self._combined[index] = None
        return [*onward, *self._look(plan, index), *self._check_full(now)]

    def verified(self, now: float, attempt: int, record: CommitRecord, wrong: str | None) -> list[Action]:
        """The driver compared our result with the record's fingerprint: ``wrong`` is None when equal."""
        if self.decided or attempt != self.promised or self._verifying != (attempt, record.digest):
            return []
        self._verifying = None
        if wrong is not None:
            self._refused_at = attempt
            if len(self.refused) < MAX_REFUSED:
                self.refused[record.digest] = wrong[:200]
            self.reason = f"cannot accept: {wrong}"
            return [
                Note("commit", "refused", wrong),
                Send(self.leader(attempt), Reject(self.key, attempt, self.promised, wrong[:200])),
            ]
        self._refused_at = -1
        self.accepted, self._holds_accepted = Accepted(attempt, record), True
        self._heard = now
        # Where something is combined this phase begins with the result.
        begins: list[Action] = []
        if record.kind == GATHER:
            self.phase, self.reason = "commit", "the record is sound, waiting for the commit"
            begins = [Note("commit", "begin")]
        return [
            *begins,
            Persist(self.promised, self.accepted),
            Send(self.leader(attempt), sign_accept(self._identity, self.key, attempt, record.digest)),
        ]

    def peer_lost(self, now: float, peer: PeerId, why: str) -> list[Action]:
        """No way to ``peer`` at the moment."""
        if peer == self.me or peer in self.lost:
            return []
        self.lost[peer] = why
        if self.decided:
            return []
        actions: list[Action] = []
        if self.plan is not None and self.frozen is None:
            actions += self._report_held(now, force=False)
        if self.offer is not None and peer == self.leader():
            return actions + self._advance(now, f"the leader {peer.short} is lost ({why})")
        if self.plan is not None and self.frozen is not None and not self.full and self._misses(self.plan, peer):
            actions.append(Send(self.leader(), self._progress(self.plan)))
        return actions

    # -- what peers say -----------------------------------------------------------------------------

    def receive(self, now: float, sender: PeerId, message: object) -> list[Action]:
        """Handle a message addressed to a voter."""
        if self.decided:
            return []
        if sender == self.leader() and not isinstance(message, Commit) and self._refused_at != self.attempt:
            # What a leader says whose proposal we refused is no reason to stay with it.
            self._heard = now
        match message:
            case Commit():
                return self._on_commit(message)
            case Waiting() if message.attempt == self.attempt and sender == self.leader():
                self.reason = message.reason
                if len(self.voters) - len(message.missing) < quorum(len(self.voters)):
                    self._moved = now  # nobody could begin: it waits for them as we do
                self.due = now + message.left / 1e3 if message.left else None
                return []
            case Convene():
                return self._on_convene(now, sender, message)
            case Plan():
                return self._on_plan(now, sender, message)
            case Freeze():
                return self._on_freeze(now, sender, message)
            case Decided():
                return self._on_decided(now, sender, message)
            case Accuse():
                return self._on_accuse(sender, message)
            case Missing():
                return self._show(sender, message)
            case Ask():
                return [Send(sender, self._progress(plan))] if (plan := self._current(message)) else []
            case Fetch():
                if (plan := self._current(message)) is None or sender != self.leader(message.attempt):
                    return []
                if not 0 <= message.index < len(plan.slices) or message.index in self._combined:
                    return []
                return [Pull(message.holder, message.attempt, message.epoch, message.index)]
            case Seal():
                known = self._current(message) and message.algorithm in self._algorithms
                if not known or not self.full or sender != self.leader(message.attempt):
                    return []
                return [Prepare(message.nonces, message.algorithm)]
            case Propose():
                return self._on_propose(now, sender, message)
            case Reject() if message.promised > self.attempt and not self._far(message.promised):
                return self._move(now, message.promised, f"{sender.short} is at attempt {message.promised}")
            case _:
                return []

    def tick(self, now: float) -> list[Action]:
        """Let time pass; call at :meth:`deadline`."""
        if self.decided or self.offer is None:
            return []
        actions: list[Action] = []
        if self._phase_until is not None and now >= self._phase_until:
            if self.frozen is None:
                self._phase_until = None
                actions += self._report_held(now, force=True)
            elif self.plan is not None and not self.full:
                self._phase_until = now + self.plan.phase(self.pace.gather)
                actions += [*self._tell_products(self.plan, self.frozen), self._tell_progress(self.plan)]
            else:
                self._phase_until = None
        if now >= self._heard + self._patience():
            return actions + self._advance(now, f"no word of leader {self.leader().short} in {self._patience():.0f} s")
        if now >= self._moved + self._stall():
            return actions + self._advance(now, f"no step of leader {self.leader().short} in {self._stall():.0f} s")
        if self.phase == "convene" and now >= self._resend:
            actions += self._ready(now, again=True)
        return actions

    def deadline(self) -> float | None:
        """When :meth:`tick` is due."""
        if self.decided or self.offer is None:
            return None
        times = [self._heard + self._patience(), self._moved + self._stall()]
        if self.phase == "convene":
            times.append(self._resend)
        if self._phase_until is not None:
            times.append(self._phase_until)
        return min(times)

    # -- inside -------------------------------------------------------------------------------------

    def _on_plan(self, now: float, sender: PeerId, plan: Plan) -> list[Action]:
        if plan.attempt < self.promised:
            return [Send(sender, Reject(self.key, plan.attempt, self.promised, "promised a later attempt"))]
        if sender != self.leader(plan.attempt) or self._far(plan.attempt):
            return []
        if self.plan is not None and (plan.attempt, plan.epoch) <= (self.plan.attempt, self.plan.epoch):
            return []
        sums = self.rule.is_mean and not self.audits
        wrong = plan_fault(plan, self.voters, self._max_length, self.me, self.offer, self.trial, sums)
        if liars := self._tainted(plan):
            wrong = f"owner {liars[0].short} lied in this round: {self.convicted[liars[0]]}"[:200]
        if wrong is not None:
            return [Send(sender, Reject(self.key, plan.attempt, self.promised, wrong, plan.epoch))]
        actions: list[Action] = []
        if plan.attempt > self.promised:
            self.promised = self.attempt = plan.attempt
            actions.append(Persist(self.promised, self.accepted))
        self.ring_broken |= self.plan is not None and bool(self.plan.ring)
        self.plan, self.frozen, self.full = plan, None, False
        self._combined, self._reported, self._verifying = {}, None, None
        self._reset_decision()
        self._reset_audits()
        self._reset_assessing()
        self._heard = self._moved = now
        self._phase_until = now + self.scatter_time()
        self.due = self._phase_until
        self.phase, self.reason = "scatter", plan.reason
        actions.append(Note("scatter", "begin", f"attempt {plan.attempt}, epoch {plan.epoch}: {plan.reason}"))
        if plan.ring:
            actions += self._circulate(plan)
        elif self.me in plan.members or self.me in plan.trial:
            for piece in plan.slices:
                item = (piece.owner, piece.start, piece.stop)
                if item not in self._pushed:
                    self._pushed[item] = None
                    actions.append(Push(*item))
        return actions + self._report_held(now, force=False)

    def _report_held(self, now: float, *, force: bool) -> list[Action]:
        plan = self.plan
        if plan is None or self.frozen is not None or plan.attempt != self.attempt:
            return []
        mine = self._my_slices(plan)
        if not mine:
            return []
        held = tuple(m for m in plan.members if self._has_all(m, plan, mine))
        pending = [m for m in plan.members if m not in held and m not in self.lost]
        if not pending:
            # Those on trial are waited for as members are, and never counted.
            pending = [t for t in plan.trial if not self._has_all(t, plan, mine) and t not in self.lost]
        if pending and not force and self._reported is None:
            return []
        if held == self._reported:
            return []
        self._reported = held
        return [Send(self.leader(), sign_held(self._identity, self.key, plan.attempt, plan.epoch, held))]

    def _on_freeze(self, now: float, sender: PeerId, message: Freeze) -> list[Action]:
        plan = self.plan
        if plan is None or self.frozen is not None or sender != self.leader(message.attempt):
            return []
        if (message.attempt, message.epoch) != (plan.attempt, plan.epoch) or plan.attempt != self.attempt:
            return []
        mine = self._my_slices(plan)
        wrong = freeze_fault(plan, message.members, mine, self._holds) or too_few(self.rule, len(message.members))
        if wrong is not None:
            return [Send(sender, Reject(self.key, plan.attempt, self.promised, wrong, plan.epoch))]
        self.frozen, self._moved = message, now
        self.phase, self.reason = "combine", f"combining {len(message.members)} contributions"
        self._phase_until = self.due = now + plan.phase(self.pace.gather)
        actions: list[Action] = [Note("combine", "begin", self.reason)]
        if self.me in plan.members and self.me not in message.members:
            actions.append(Note("gather", "left-out", "our slices did not reach all owners in time", self.me))
        if self._weighs(message):
            self.reason = f"comparing {len(message.members)} contributions"
            if mine:
                actions.append(Measure(plan.attempt, plan.epoch, message.members, mine))
        else:
            actions += self._combine(plan, message)
            self.phase = "gather"
        actions.append(Note("gather", "begin"))
        early, self._early = self._early, {}
        for (owner, attempt, epoch, index), members in early.items():
            actions += self.combined_received(now, owner, attempt, epoch, index, members)
        return actions

    def _misses(self, plan: Plan, owner: PeerId) -> bool:
        """Whether we still wait for something that ``owner`` may have been to bring."""
        missing = (p.owner for i, p in enumerate(plan.slices) if i not in self._combined)
        return any(plan.ring or each == owner for each in missing)

    def _progress(self, plan: Plan) -> Progress:
        nonce = self._nonce(plan.attempt, plan.epoch) if self.full else b""
        have = tuple(sorted(self._combined))
        opinion = self._opinion(plan) if self.full else b""
        return Progress(self.key, plan.attempt, plan.epoch, have, nonce, self._algorithms, opinion)

    def _tell_progress(self, plan: Plan) -> Send:
        return Send(self.leader(), self._progress(plan))

    def _check_full(self, now: float) -> list[Action]:
        plan, frozen = self.plan, self.frozen
        assert plan is not None and frozen is not None
        if self.full or len(self._combined) < len(plan.slices) or (self._weighs(frozen) and not self._agreed):
            return []
        if (due := self._examine(plan)) is not None or (due := self._assess(plan, frozen)) is not None:
            return due
        self.full = True
        self.phase, self.reason = "commit", "holding the result, waiting for the commit"
        self._phase_until = None
        if plan.attempt != self.attempt:
            return []
        return [Note("commit", "begin"), Send(self.leader(), self._progress(plan))]

    def _on_propose(self, now: float, sender: PeerId, message: Propose) -> list[Action]:
        if message.attempt < self.promised:
            return [Send(sender, Reject(self.key, message.attempt, self.promised, "promised a later attempt"))]
        if sender != self.leader(message.attempt) or self._far(message.attempt):
            return []
        wrong = self._check(message.record)
        if wrong is None and self.frozen is not None and self.frozen.members == message.record.members:
            wrong = disputed(message.record, self._learnt)
        if self.plan is not None and self.plan.attempt == message.attempt and (liars := self._tainted(self.plan)):
            wrong = f"owner {liars[0].short} lied: {self.convicted[liars[0]]}"
        if self.accepted is not None and message.attempt == self.accepted.attempt:
            # Never two values at one ballot: a later leader could not tell which of them may be decided.
            same = message.record.digest == self.accepted.record.digest
            wrong = wrong if same else "another value was accepted at this attempt"
        if wrong is not None:
            self.reason = f"cannot accept: {wrong}"
            return [
                Note("commit", "refused", wrong),
                Send(sender, Reject(self.key, message.attempt, self.promised, wrong[:200])),
            ]
        actions: list[Action] = []
        if message.attempt > self.promised:
            self.promised = self.attempt = message.attempt
            actions.append(Persist(self.promised, self.accepted))
        if self._refused_at != message.attempt:
            self._heard = now
        if self._verifying == (message.attempt, message.record.digest):
            return actions
        self._verifying = (message.attempt, message.record.digest)
        self._moved = now
        holders = tuple(h for h in message.holders if h in self.voters and h != self.me)
        return [*actions, Verify(message.attempt, message.record, holders)]

    def _on_commit(self, message: Commit) -> list[Action]:
        # The driver has verified the certificate before it hands a commit to us.
        self.decided = True
        self.phase, self.reason, self.due = "commit", "committed", None
        record, offer = message.record, self.offer
        if offer is not None and offer.contributes and record.samples and self.me not in record.members:
            return [Note("commit", "left-out", record.reason, self.me), Done(message)]
        return [Done(message)]
