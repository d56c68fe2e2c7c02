"""What a voter does about owners that lie, sans-IO: examines a result before it counts it as held, accuses, looks."""

from __future__ import annotations

from collections.abc import Callable

from ...transport.identity import PeerId
from .actions import Action, Examine, Look, Note, Send
from .claims import Accuse, Missing, Proof, Receipt, Receipts
from .deciding import Deciding
from .messages import Plan


class Convicting(Deciding):
    """A base of :class:`.voter.Voter`, whose theory of operation tells the whole.

    Nobody is believed: who is accused is looked at by everybody, and convicted here for what was seen here. A result
    with a slice of somebody convicted is never held in full, and no proposal of it is accepted.
    """

    audits = False
    #: Whether we look where somebody accuses: not where it did so falsely again and again.
    heeds: Callable[[PeerId], bool] = staticmethod(lambda peer: True)
    full: bool
    _combined: dict[int, None]

    def _reset_audits(self) -> None:
        """A new plan: nothing is examined, nobody has accused anybody."""
        self._examining = self._examined = False
        self._accusers: dict[PeerId, Accuse] = {}

    _receipts: dict[tuple[PeerId, int, int, str], Receipt]

    def examined(self, now: float, attempt: int, epoch: int, unsigned: tuple[int, ...]) -> list[Action]:
        """We looked at the result; the slices ``unsigned`` are not what their owners have signed for this plan."""
        plan = self.plan
        if plan is None or (attempt, epoch) != (plan.attempt, plan.epoch) or not self._examining:
            return []
        self._examining = False
        if unsigned:
            for index in unsigned:
                self._combined.pop(index, None)
            return [self._tell_progress(plan)]
        self._examined = True
        return self._check_full(now)

    def doubt(self, now: float, attempt: int, epoch: int, index: int, number: int) -> list[Action]:
        """The owner of slice ``index`` does not show us what it combined: the leader is told where to look."""
        plan = self.plan
        if plan is None or (attempt, epoch) != (plan.attempt, plan.epoch) or self.decided:
            return []
        leader = self.leader(attempt)
        if leader in (self.me, plan.slices[index].owner):
            return []
        return [Send(leader, Accuse(self.key, attempt, epoch, index, number))]

    def accuse(
        self, now: float, attempt: int, epoch: int, index: int, number: int, why: str, proof: bytes
    ) -> list[Action]:
        """We found that the owner of slice ``index`` lied: all others get the ``proof``, or without one are told where
        to look."""
        plan = self.plan
        if plan is None or (attempt, epoch) != (plan.attempt, plan.epoch) or self.decided:
            return []
        owner = plan.slices[index].owner
        message = Proof(self.key, proof) if proof else Accuse(self.key, attempt, epoch, index, number)
        told: list[Action] = [Send(voter, message) for voter in self.voters if voter not in (self.me, owner)]
        return [*told, *self.convict(now, owner, why)]

    def convict(self, now: float, owner: PeerId, why: str) -> list[Action]:
        """We have seen that ``owner`` lied."""
        if owner in self.convicted or owner == self.me or self.decided:
            return []
        self.convicted[owner] = why
        note = Note("gather", "convicted", why, owner)
        if self.offer is not None and owner == self.leader():
            return [note, *self._advance(now, f"the leader {owner.short} lied: {why}")]
        if self.plan is not None and self._tainted(self.plan):
            self.full, self.reason = False, f"{owner.short} lied: {why}"
        return [note]

    def _tainted(self, plan: Plan) -> tuple[PeerId, ...]:
        """Owners of ``plan`` that we have convicted."""
        return tuple(dict.fromkeys(piece.owner for piece in plan.slices if piece.owner in self.convicted))

    def _on_accuse(self, sender: PeerId, message: Accuse) -> list[Action]:
        plan = self.plan
        if plan is None or (message.attempt, message.epoch) != (plan.attempt, plan.epoch) or not self.audits:
            return []
        if sender in self._accusers or not message.index < len(plan.slices):
            return []
        owner = plan.slices[message.index].owner
        if owner in (self.me, sender) or owner in self.convicted or not self.heeds(sender):
            return []
        self._accusers[sender] = message
        return self._look(plan, message.index)

    def _look(self, plan: Plan, index: int) -> list[Action]:
        """Look at accusations about slice ``index``, once that is here."""
        if index not in self._combined:
            return []
        return [
            Look(plan.attempt, plan.epoch, index, message.number, accuser)
            for accuser, message in self._accusers.items()
            if message.index == index
        ]

    def receipted(self, owner: PeerId, receipt: Receipt) -> list[Action]:
        """``owner`` has signed that it has a part of ours."""
        self._receipts[owner, receipt.start, receipt.stop, receipt.codec] = receipt
        return []

    def _show(self, sender: PeerId, message: Missing) -> list[Action]:
        """The leader wants to see what an owner has signed for."""
        plan = self.plan
        if plan is None or (message.attempt, message.epoch) != (plan.attempt, plan.epoch):
            return []
        if sender != self.leader(message.attempt):
            return []
        places = [(piece.start, piece.stop, plan.codec) for piece in plan.slices if piece.owner == message.owner]
        found = [self._receipts.get((message.owner, *place)) for place in places]
        shown = tuple(receipt for receipt in found if receipt is not None)
        return [Send(sender, Receipts(self.key, plan.attempt, plan.epoch, message.owner, shown))]

    def _examine(self, plan: Plan) -> list[Action] | None:
        """What is to be done before a result that is here counts as held; None when that is done."""
        if self._tainted(plan):
            return []
        if not self.audits or self._examined:
            return None
        if self._examining:
            return []
        self._examining = True
        return [Examine(plan.attempt, plan.epoch)]

    def _tell_progress(self, plan: Plan) -> Send:
        raise NotImplementedError
