"""What a leader does about owners that lie, do not show their work, or deny what they were given, sans-IO."""

from __future__ import annotations

from ...transport.identity import PeerId
from .actions import Action, Note, Send
from .challenges import Challenges
from .claims import Denied, Receipts
from .decisions import short
from .proposer import Proposer


class Judging(Proposer):
    """A base of :class:`.leader.Leader`, whose theory of operation tells the whole. See also :mod:`.convicting`."""

    def convict(self, now: float, peer: PeerId, why: str) -> list[Action]:
        """We have seen ourselves that ``peer`` lied as an owner: nothing of this round is its any more."""
        if peer in self.convicted or peer == self.me or self.phase in ("done", "aborted"):
            return []
        self.convicted[peer] = self.lost[peer] = why
        self._ready.pop(peer, None)
        match self.phase:
            case "convene":
                return self._maybe_begin(now)
            case "scatter" | "weigh" | "gather" if self._owns(peer):
                return self._replan(now, (peer,), f"owner {peer.short} lied: {why}")
            case "seal" | "propose" if self._owns(peer):
                return self._abort(now, f"owner {peer.short} lied: {why}")
            case _:
                return []

    def looking(self) -> None:
        """We look at an owner that somebody accuses: nothing is proposed before we know."""
        self._looking += 1

    def looked(self, now: float, attempt: int, epoch: int, doubted: PeerId | None, why: str) -> list[Action]:
        """A look has ended. ``doubted``: an owner that does not show what it combined; nobody can say whether it lied,
        and its slices go to others."""
        self._looking -= 1
        plan = self.plan
        if plan is None or self.phase != "gather":
            return []
        now_in = (attempt, epoch) == (plan.attempt, plan.epoch)
        if doubted is not None and now_in and self._owns(doubted) and doubted != self.me:
            return [Note("gather", "doubted", why, doubted), *self._replan(now, (doubted,), why[:200])]
        return self._maybe_propose(now)

    def _challenge(self, now: float, challenges: Challenges) -> list[Action] | None:
        """What comes before the freeze where owners deny what others hold; None when nothing does."""
        guilty = challenges.guilty(self._held)
        if guilty:
            return self._replan(now, guilty, f"{short(guilty)} denies contributions that reached it")
        asks = challenges.due(self._held, self.lost)
        if asks:
            self._until = now + self.pace.accept + self.pace.grace / 4
        if asks or challenges.waiting:
            return [Send(member, message) for member, message in asks]
        return None

    def _on_claim(self, now: float, sender: PeerId, message: Receipts | Denied) -> list[Action]:
        plan, challenges = self.plan, self._challenges
        if self.phase != "scatter" or plan is None or challenges is None:
            return []
        if (message.attempt, message.epoch) != (plan.attempt, plan.epoch):
            return []
        if isinstance(message, Receipts):
            challenges.shown(sender, message)
        else:
            challenges.denied(sender, message)
        return self._maybe_freeze(now)

    def _owns(self, peer: PeerId) -> bool:
        raise NotImplementedError

    def _replan(self, now: float, gone: tuple[PeerId, ...], why: str) -> list[Action]:
        raise NotImplementedError

    def _maybe_begin(self, now: float) -> list[Action]:
        raise NotImplementedError

    def _maybe_freeze(self, now: float) -> list[Action]:
        raise NotImplementedError

    def _maybe_propose(self, now: float, *, late: bool = False) -> list[Action]:
        raise NotImplementedError
