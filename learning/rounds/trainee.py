"""A peer on trial in one round, sans-IO: does what a voter does with its work, and decides nothing.

Theory of operation. It tells whoever leads that it is ready, sends its contribution to the owners, gathers the result
and waits for the commit, all with the machinery of :class:`.voter.Voter`. It owns no slice, looks at nobody, accuses
nobody, accepts nothing. It promises nothing either, so it follows any candidate that leads an attempt, later or
earlier; when it loses all of them it goes on asking them in turn, and whoever knows the commit answers with it. Nothing
it says makes anybody lead, or move to another attempt.
"""

from __future__ import annotations

from .actions import Action, Done, Persist, Send
from .claims import Accuse, Proof
from .messages import Commit, Convene, Plan, Progress, Propose, Ready, Reject, Waiting
from .voter import Voter
from .weighing import Weighed

#: What a peer on trial says. All else is for voters.
SAID = (Ready, Progress)


class Trainee(Voter):
    """See the module. Methods as those of a voter."""

    def begin(self, now: float, offer: Ready) -> list[Action]:
        return _own(super().begin(now, offer))

    def withdraw(self, now: float, why: str) -> list[Action]:
        return _own(super().withdraw(now, why))

    def receive(self, now: float, sender: object, message: object) -> list[Action]:
        if isinstance(message, Propose | Accuse | Proof | Reject):
            return []
        if isinstance(message, Convene | Waiting | Plan) and self._leads(sender, message.attempt):
            return _own([*self._follow(now, message), *super().receive(now, sender, message)])  # type: ignore[arg-type]
        return _own(super().receive(now, sender, message))  # type: ignore[arg-type]

    def tick(self, now: float) -> list[Action]:
        return _own(super().tick(now))

    def peer_lost(self, now: float, peer: object, why: str) -> list[Action]:
        return _own(super().peer_lost(now, peer, why))  # type: ignore[arg-type]

    def weighed(self, now: float, attempt: int, epoch: int, found: Weighed) -> list[Action]:
        return _own(super().weighed(now, attempt, epoch, found))

    def _leads(self, sender: object, attempt: int) -> bool:
        return sender == self.leader(attempt) and not self._far(attempt) and not self.decided

    def _follow(self, now: float, message: Convene | Waiting | Plan) -> list[Action]:
        """A candidate leads another attempt than the one we follow: we go there, unless that is over for us."""
        attempt = message.attempt
        if attempt == self.attempt or (self.plan is not None and attempt < self.plan.attempt):
            return []
        if isinstance(message, Plan):
            self.attempt = self.promised = attempt
            return []
        return self._move(now, attempt, f"{self.leader(attempt).short} leads attempt {attempt}")

    def _advance(self, now: float, why: str) -> list[Action]:
        """The next candidate that is not lost; where all are, the next one: it may be back."""
        after = range(self.attempt + 1, self.attempt + 1 + len(self.order))
        return self._move(now, next((a for a in after if self.leader(a) not in self.lost), after[0]), why)

    def _on_commit(self, message: Commit) -> list[Action]:
        # That our work is in no result is no news.
        return [action for action in super()._on_commit(message) if isinstance(action, Done)]


def _own(actions: list[Action]) -> list[Action]:
    return [
        action
        for action in actions
        if not isinstance(action, Persist) and not (isinstance(action, Send) and not isinstance(action.message, SAID))
    ]
