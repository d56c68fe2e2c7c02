"""What a leader proposes and when it is agreed, sans-IO: the ballot of one attempt, and word to those who wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...transport.identity import Identity, PeerId
from ..aggregate.aggregator import Aggregator
from .actions import Action, Note, Pace, Promise, Send
from .challenges import Challenges
from .messages import (
    Accept,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Decided,
    Plan,
    Progress,
    Propose,
    Ready,
    Signed,
    Waiting,
    accept_bytes,
)
from .terms import Terms, accepts_needed
from .weighing import MEAN

#: Holders of a result that a proposal names: who lacks it asks one after the other. All of 64 would be 2 KB for each.
MAX_HOLDERS = 8


class Proposer:
    """The base of :class:`.leader.Leader`, whose theory of operation tells the whole."""

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
        unfit: Callable[[CommitRecord], str | None] = lambda record: None,
        rule: Aggregator = MEAN,
        convicted: Mapping[PeerId, str] | None = None,
        audits: bool = False,
    ) -> None:
        """``unfit``: why we ourselves would refuse a record that somebody accepted; None when we would not.
        ``convicted``: who lied, and in what; they are led no more, and are in no roster that we propose."""
        self.key, self.round, self.voters, self.attempt = key, round, voters, attempt
        self.me, self._identity, self.pace, self._terms = identity.peer_id, identity, pace, terms
        self._unfit, self.spare = unfit, 0.0  # spare: see Voter
        self.rule = rule
        self.needed = accepts_needed(len(voters), terms.gossip)
        self.convicted, self.audits = dict(convicted or {}), audits
        self._challenges: Challenges | None = None
        self.lost: dict[PeerId, str] = {**lost, **self.convicted}
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
        self._products: dict[PeerId, bytes] = {}
        self._decided: Decided | None = None
        self._progress: dict[PeerId, Progress] = {}
        self._asked: dict[PeerId, None] = {}
        self._fetching: dict[tuple[PeerId, int], list[PeerId]] = {}
        self._accepts: dict[PeerId, Accept] = {}
        self._refusals: dict[PeerId, str] = {}
        self._until: float | None = None
        self._word: float = now + pace.suspect / 4
        self._reason = ""
        self._late: dict[PeerId, str] = {}  # not waited for, and in which phase
        self._overdue = False
        self._branch: int | None = None
        self._looking = 0  # looks at accused owners that are under way here

    def peer_alive(self, peer: PeerId) -> None:
        """``peer`` can be reached again: it is told of this attempt with the next word to those who wait."""
        if peer not in self.convicted:
            self.lost.pop(peer, None)

    def follow(self, now: float, attempt: int) -> list[Action]:
        """Our own voter is at ``attempt``. Past ours, we lead no more: whoever still listens here is sent there.

        Without this the few that follow us and the few that left would wait for each other for ever.
        """
        if attempt <= self.attempt or self.phase in ("done", "aborted"):
            return []
        return self._abort(now, f"attempt {attempt} has begun", attempt)

    def _propose(self, now: float, holders: tuple[PeerId, ...]) -> list[Action]:
        assert self.record is not None
        self.phase, self._until = "propose", now + self.pace.gather
        self._holders = holders
        message = Propose(self.key, self.attempt, self.record, holders[:MAX_HOLDERS])
        return [Promise(self.attempt), *(Send(voter, message) for voter in self.voters if voter not in self.lost)]

    def _on_accept(self, now: float, sender: PeerId, message: Accept) -> list[Action]:
        if self.phase != "propose" or self.record is None or message.attempt != self.attempt:
            return []
        digest = self.record.digest
        if message.digest != digest or not sender.verify(
            accept_bytes(self.key, self.attempt, digest), message.signature
        ):
            return []
        self._accepts[sender] = message
        return self._maybe_commit(now)

    def _maybe_commit(self, now: float, *, late: bool = False) -> list[Action]:
        assert self.record is not None
        if len(self._accepts) < self.needed:
            if late:
                if all(peer in self.lost or peer in self._refusals for peer in (*self._holders, *self._accepts)):
                    # Nobody can check the value any more (holders may be back without it): it may be given up now.
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

    def _abort(self, now: float, why: str, attempt: int | None = None) -> list[Action]:
        self.phase, self._until = "aborted", None
        convene = Convene(self.key, self.round, self.attempt + 1 if attempt is None else attempt)
        note = Note("convene", "abort", why)
        return [note, *(Send(voter, convene) for voter in self.voters if voter not in self.lost)]

    def _waiting(self, now: float, to: PeerId) -> Action:
        missing = tuple(v for v in self.voters if v not in self._ready)
        reason = f"{self._reason or 'convening'} (leader {self.me.short}, {self.phase})"
        until = self._grace_until if self.phase == "convene" else self._until
        left = 0 if until is None else max(0, int(1e3 * (until - now)))
        return Send(to, Waiting(self.key, self.attempt, missing, reason, left))

    def _say_waiting(self, now: float) -> list[Action]:
        self._word = now + self.pace.suspect / 4
        if self.plan is not None and self.phase in ("scatter", "weigh", "gather"):
            live = [r for r in self.plan.receivers if r not in self.lost]
            if len(live) < self.needed:
                # This plan leads nowhere, whoever comes back. Silent, we are left for an attempt that can begin anew.
                return []
        to = {**self._ready, **(dict.fromkeys(self.voters) if self._grace_until is not None else {})}
        actions: list[Action] = [self._waiting(now, peer) for peer in to if peer not in self.lost]
        if self.phase == "convene" and self._ready and (self.attempt > 0 or self.me in self._ready):
            # Who has committed already answers this with the commit.
            actions += self._call_in()
        return actions

    def _call_in(self) -> list[Action]:
        convene = Convene(self.key, self.round, self.attempt)
        return [Send(v, convene) for v in self.voters if v not in self.lost and v not in self._ready]
