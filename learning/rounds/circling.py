"""What a voter does where contributions go round a ring, sans-IO: adds its own to what came, and passes it on.

Slice *i* of a plan with a ring belongs to one member. The one behind it begins with its own part, weighted; each adds
its own and passes the sum on, until it comes to the owner, which then holds what everybody gives. So there is no
contribution of a single member that could be left out: a ring closes with all, or it is given up for a butterfly in
the next epoch. After the freeze each combined slice goes the same way round, from its owner to the member before it.
Every line carries as much as in a butterfly, but only the paths between neighbours carry anything (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

from ...transport.identity import PeerId
from .actions import Action, Circulate, Note, Send, Share
from .assessing import Assessing
from .messages import Plan, sign_held


def after(plan: Plan, peer: PeerId) -> PeerId:
    """To whom ``peer`` passes on."""
    return plan.ring[(plan.ring.index(peer) + 1) % len(plan.ring)]


def source(plan: Plan, index: int, me: PeerId) -> PeerId | None:
    """From whom ``me`` gets combined slice ``index``; None: from nobody, in this ring."""
    if not plan.ring:
        return plan.slices[index].owner
    return plan.ring[plan.ring.index(me) - 1] if me in plan.ring else None


class Circling(Assessing):
    """A base of :class:`.voter.Voter`, whose theory of operation tells the whole."""

    #: A ring of this round did not close.
    ring_broken: bool
    _combined: dict[int, None]
    _sums: dict[tuple[PeerId, int, int, int], None]

    def _report_held(self, now: float, *, force: bool) -> list[Action]:
        raise NotImplementedError

    def _circulate(self, plan: Plan) -> list[Action]:
        """A plan with a ring: begin with the slice of the member before us; go on with what came before the plan."""
        early, self._sums = self._sums, {}
        actions: list[Action] = []
        for index, piece in enumerate(plan.slices):
            if after(plan, piece.owner) == self.me:
                actions.append(Circulate(after(plan, self.me), plan.attempt, plan.epoch, index))
        for sender, attempt, epoch, index in early:
            actions += self.sum_received(self._moved, sender, attempt, epoch, index)
        return actions

    def sum_received(self, now: float, sender: PeerId, attempt: int, epoch: int, index: int) -> list[Action]:
        """The sum of slice ``index`` came from ``sender``: of all before us, from the one behind its owner on."""
        plan = self.plan
        if plan is None or (attempt, epoch) > (plan.attempt, plan.epoch):
            if sum(each[0] == sender for each in self._sums) < 4 * len(self.voters):
                self._sums[sender, attempt, epoch, index] = None
            return []
        if (attempt, epoch) != (plan.attempt, plan.epoch) or not self.passes(plan, index, sender):
            return []
        ours = plan.slices[index].owner == self.me
        return [Circulate(self.me if ours else after(plan, self.me), attempt, epoch, index)]

    def sum_closed(self, now: float, attempt: int, epoch: int, index: int) -> list[Action]:
        """The sum of slice ``index``, which is ours, is here, and so is our own part."""
        plan = self.plan
        if plan is None or not plan.ring or (attempt, epoch) != (plan.attempt, plan.epoch):
            return []
        self._holds[(*plan.slices[index].range, plan.form)] = dict.fromkeys(plan.members)
        return self._report_held(now, force=False)

    def passes(self, plan: Plan, index: int, sender: PeerId) -> bool:
        """Whether ``plan`` has ``sender`` pass the sum of slice ``index`` on to us."""
        if self.me not in plan.ring or not 0 <= index < len(plan.slices):
            return False
        return source(plan, index, self.me) == sender != plan.slices[index].owner

    def sum_refused(self, attempt: int, epoch: int, why: str) -> list[Action]:
        """What came round the ring is of no use. Whose fault that is nobody can tell: a butterfly shows it."""
        plan = self.plan
        if plan is None or self.frozen is not None or (attempt, epoch) != (plan.attempt, plan.epoch):
            return []
        held = sign_held(self._identity, self.key, attempt, epoch, ())
        return [Note("scatter", "refused", why), Send(self.leader(), held)]

    def _hand_out(self, plan: Plan, index: int) -> list[Action]:
        """Combined slice ``index`` is here, by our own work or from the ring: who gets it from us."""
        if not plan.ring:
            return [Share(r, plan.attempt, plan.epoch, index) for r in plan.receivers if r != self.me]
        onward = after(plan, self.me)
        return [] if onward == plan.slices[index].owner else [Share(onward, plan.attempt, plan.epoch, index)]
