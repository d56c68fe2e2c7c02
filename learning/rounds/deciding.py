"""What a voter does where a rule decides from inner products, sans-IO: tells its own, checks the leader's decision."""

from __future__ import annotations

from collections.abc import Mapping

from ...transport.identity import PeerId
from ..aggregate.aggregator import Aggregator
from .actions import Action, Check, Combine, Note, Send
from .ballots import Ballots
from .decisions import shares
from .messages import Ask, Decided, Fetch, Freeze, Plan, Products, Reject, Seal, members_hash
from .remembering import NOTHING, of
from .weighing import MEAN, Weighed, decided_fault


class Deciding(Ballots):
    """A base of :class:`.voter.Voter`, whose theory of operation tells the whole."""

    rule: Aggregator = MEAN
    scores: Mapping[PeerId, int] = NOTHING  # what it remembers of the voters
    due: float | None
    _refused_at: int

    def _reset_decision(self) -> None:
        """A new plan: nothing is decided."""
        self._products = b""  # our inner products, of the frozen members
        self._decision: Decided | None = None  # what the leader makes of all owners'
        self._learnt: Mapping[PeerId, int] = NOTHING  # what the rule remembers of the members after this round
        self._agreed = False  # to that, having computed it as well

    @property
    def decision(self) -> bytes:
        """The leader's coefficients for the present members, once we have them; empty where the rule has none."""
        return self._decision.data if self._decision is not None else b""

    @property
    def parts(self) -> tuple[bytes, ...]:
        """The inner products that the leader has told, see :class:`.messages.Decided`."""
        return self._decision.parts if self._decision is not None else ()

    def _check_full(self, now: float) -> list[Action]:
        raise NotImplementedError

    def measured(self, now: float, attempt: int, epoch: int, data: bytes) -> list[Action]:
        """We computed the inner products of the frozen members over our slices."""
        plan, frozen = self.plan, self.frozen
        if plan is None or frozen is None or (attempt, epoch) != (plan.attempt, plan.epoch):
            return []
        self._products = data
        return self._tell_products(plan, frozen)

    def weighed(self, now: float, attempt: int, epoch: int, found: Weighed) -> list[Action]:
        """We computed what the leader decided: ``found.wrong`` is None when it is the same."""
        plan, frozen, decision = self.plan, self.frozen, self._decision
        if plan is None or frozen is None or decision is None or (attempt, epoch) != (plan.attempt, plan.epoch):
            return []
        if found.wrong is not None:
            return self._dispute(found.wrong) if attempt == self.attempt else []
        if found.learnt:
            self._learnt = dict(zip(frozen.members, found.learnt, strict=True))
        self._agreed, self.phase = True, "gather"
        self.reason = f"combining {len(frozen.members)} contributions"
        return [*self._combine(plan, frozen, decision.data), *self._check_full(now)]

    def _my_slices(self, plan: Plan) -> tuple[int, ...]:
        return tuple(i for i, piece in enumerate(plan.slices) if piece.owner == self.me)

    def _current(self, message: Ask | Fetch | Seal | Decided) -> Plan | None:
        """The plan that it is about, if we follow it."""
        plan = self.plan
        return plan if plan is not None and (message.attempt, message.epoch) == (plan.attempt, plan.epoch) else None

    def _weighs(self, frozen: Freeze) -> bool:
        """Whether ``frozen`` members are combined by what their inner products say."""
        return self.rule.needs_gram and bool(frozen.members)

    def _combine(self, plan: Plan, frozen: Freeze, decision: bytes = b"") -> list[Action]:
        mine = self._my_slices(plan)
        if not mine:
            return []
        weights = shares(plan, frozen.members)[1]
        return [Combine(plan.attempt, plan.epoch, frozen.members, weights, mine, decision)]

    def _tell_products(self, plan: Plan, frozen: Freeze) -> list[Action]:
        if not self._products or self._decision is not None or plan.attempt != self.attempt:
            return []
        hashed = members_hash(frozen.members)
        return [Send(self.leader(), Products(self.key, plan.attempt, plan.epoch, hashed, self._products))]

    def _on_decided(self, now: float, sender: PeerId, message: Decided) -> list[Action]:
        plan, frozen = self._current(message), self.frozen
        if plan is None or frozen is None or self._decision is not None or sender != self.leader(message.attempt):
            return []
        if plan.attempt != self.attempt or not self._weighs(frozen) or message.members != members_hash(frozen.members):
            return []
        self._decision, self._moved = message, now
        self._phase_until = self.due = now + plan.phase(self.pace.gather)
        count = len(frozen.members)
        wrong = decided_fault(message, plan, self.me, self._products, count)
        if wrong is not None:
            return self._dispute(wrong)
        remembered = of(frozen.members, self.scores)
        return [Check(plan.attempt, plan.epoch, count, message.parts, message.data, remembered)]

    def _dispute(self, wrong: str) -> list[Action]:
        """The leader's decision is not ours: nothing of ours is combined with it."""
        self._refused_at, leader = self.attempt, self.leader()
        epoch = self.plan.epoch if self.plan is not None else 0
        self.reason = f"the decision of leader {leader.short} is refused: {wrong}"
        return [
            Note("combine", "refused", self.reason, leader),
            Send(leader, Reject(self.key, self.attempt, self.promised, self.reason[:200], epoch)),
        ]
