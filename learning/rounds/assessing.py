"""What an owner does about those on trial, sans-IO: looks at their work once its own slices are combined."""

from __future__ import annotations

from collections.abc import Sequence

from ...transport.identity import PeerId
from .actions import Action, Assess
from .convicting import Convicting
from .messages import Freeze, Plan
from .trials import Opinion


class Assessing(Convicting):
    """A base of :class:`.voter.Voter`, whose theory of operation tells the whole.

    A result with somebody on trial is held in full only once we know what we think of their work, so that each word to
    the leader that we hold it carries our opinion.
    """

    #: Who is on trial in this round, in PeerId order, whether in the present plan or not.
    trial: tuple[PeerId, ...] = ()
    frozen: Freeze | None
    _holds: dict[tuple[int, int, str], dict[PeerId, None]]

    def _reset_assessing(self) -> None:
        """A new plan: nobody was looked at."""
        self._assessing = self._assessed = False
        self._fit = 0

    def assessed(self, now: float, attempt: int, epoch: int, fit: tuple[PeerId, ...]) -> list[Action]:
        """We compared the work of those on trial with our combined slices: that of ``fit`` is good."""
        plan = self.plan
        if plan is None or (attempt, epoch) != (plan.attempt, plan.epoch) or not self._assessing:
            return []
        self._assessing, self._assessed = False, True
        self._fit = sum(1 << at for at, peer in enumerate(self.trial) if peer in fit)
        return self._check_full(now)

    def _assess(self, plan: Plan, frozen: Freeze) -> list[Action] | None:
        """What is to be done before we have an opinion; None when we have one."""
        mine = self._my_slices(plan)
        if self._assessed or not plan.trial or not mine or not frozen.members:
            return None
        if self._assessing:
            return []
        self._assessing = True
        held = tuple(peer for peer in plan.trial if self._has_all(peer, plan, mine))
        return [Assess(plan.attempt, plan.epoch, held, mine)]

    def _has_all(self, peer: PeerId, plan: Plan, indices: Sequence[int]) -> bool:
        """Whether we hold what ``peer`` contributes to the slices ``indices``."""
        return all(peer in self._holds.get((*plan.slices[i].range, plan.form), ()) for i in indices)

    def _opinion(self, plan: Plan) -> bytes:
        """What we say of those on trial, for the record."""
        frozen = self.frozen
        if not plan.trial or frozen is None or self.me not in frozen.members:
            return b""
        fit = self._fit if self._my_slices(plan) else None
        return Opinion.sign(self._identity, self.key, frozen.members, fit).data
