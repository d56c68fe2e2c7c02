"""Which attempt of a round a voter follows, sans-IO: what it promises, whom it is ready for, and how long it waits."""

from __future__ import annotations

import attrs

from ...transport.identity import Identity, PeerId
from .actions import Action, Note, Pace, Persist, Send
from .decisions import candidates
from .messages import Accepted, Convene, Freeze, Plan, Ready, Reject
from .planning import step_time

#: Attempts by which one message may move a voter ahead. One that slept through a whole round is some tens behind.
MAX_LEAP = 1000


class Ballots:
    """The base of :class:`.voter.Voter`, whose theory of operation tells the whole."""

    def __init__(
        self,
        *,
        key: bytes,
        round: int,
        prev: bytes,
        voters: tuple[PeerId, ...],
        identity: Identity,
        pace: Pace,
        promised: int,
        accepted: Accepted | None,
    ) -> None:
        self.key, self.round, self.voters, self.pace = key, round, voters, pace
        self.me, self._identity = identity.peer_id, identity
        self.order = candidates(prev, round, voters)
        self.promised, self.accepted = promised, accepted
        self._kept = -1  # a promise that is surely stored: who leads while it trains has stored none yet
        self._holds_accepted = False  # what was accepted in an earlier life is a promise without its bytes
        #: Seconds that a scatter may take longer, since contributions are still being computed when it begins.
        self.spare = 0.0
        self.attempt = promised
        self.layout = ""  # of what we bring into the round; see Ready
        self.offer: Ready | None = None  # our Ready, less attempt and accepted; None while training
        self.plan: Plan | None = None
        self.frozen: Freeze | None = None
        self.phase = "train"
        self.reason = "training"
        self.decided = False
        self.lost: dict[PeerId, str] = {}
        #: Owners that lied in this round, as we saw ourselves, and in what.
        self.convicted: dict[PeerId, str] = {}
        self._heard = 0.0
        self._moved = 0.0  # the last step of this attempt; word of waiting is none
        self._resend = 0.0
        self._phase_until: float | None = None
        self._verifying: tuple[int, bytes] | None = None

    def leader(self, attempt: int | None = None) -> PeerId:
        return self.order[(self.attempt if attempt is None else attempt) % len(self.order)]

    def begin(self, now: float, offer: Ready) -> list[Action]:
        """Training is over; ``offer`` says what we contribute (attempt, accepted and layout are ours to fill)."""
        self.offer = attrs.evolve(offer, layout=offer.layout or self.layout)
        if self.decided:
            return []
        self.phase, self.reason = "convene", "ready"
        if self.leader() in self.lost:
            return [Note("convene", "begin"), *self._advance(now, "the leader is lost")]
        return [Note("convene", "begin"), *self._ready(now)]

    def peer_alive(self, now: float, peer: PeerId) -> list[Action]:
        """``peer`` can be reached again."""
        self.lost.pop(peer, None)
        return []

    def promise(self, attempt: int) -> list[Action]:
        """We are about to propose at ``attempt`` ourselves."""
        if attempt < self.promised or attempt <= self._kept:
            return []
        self.promised = self.attempt = self._kept = attempt
        return [Persist(self.promised, self.accepted)]

    def _patience(self) -> float:
        # Doubles with every full turn of candidates, so that slow swarms settle.
        return self.pace.suspect * float(2 ** min(4, self.attempt // len(self.order)))

    def _stall(self) -> float:
        """Seconds within which the attempt must come a step on, whatever its leader says meanwhile."""
        plan = self.plan if self.plan is not None and self.plan.attempt == self.attempt else None
        step = step_time(self.pace, plan, self.frozen is not None, self.spare)
        return self._patience() * (1.0 + step / self.pace.suspect)

    def scatter_time(self) -> float:
        """Seconds that contributions of the present plan have to reach their owners."""
        return (self.pace.scatter if self.plan is None else self.plan.phase(self.pace.scatter)) + self.spare

    def _ready(self, now: float, *, again: bool = False) -> list[Action]:
        assert self.offer is not None
        if not again:
            self._heard = self._moved = now
        self._resend = now + self.pace.suspect / 2
        holds = self._holds_accepted
        message = attrs.evolve(self.offer, attempt=self.attempt, accepted=self.accepted, holds=holds)
        # Whoever promised nothing comes back as it was. A leader must know that it led, or it could propose twice.
        nothing = not self.promised and self.accepted is None and self.leader() != self.me
        if again or nothing:
            return [Send(self.leader(), message)]
        self._kept = self.promised
        return [Persist(self.promised, self.accepted), Send(self.leader(), message)]

    def _advance(self, now: float, why: str) -> list[Action]:
        """Leave the present leader for the next candidate that is not lost (in the end: ourselves)."""
        attempt = self.attempt + 1
        while self.leader(attempt) in self.lost and self.leader(attempt) != self.me:
            attempt += 1
        return self._move(now, attempt, why)

    def _far(self, attempt: int) -> bool:
        # Attempts grow one by one. Nobody may push them out of all bounds with a single message.
        return attempt > self.attempt + MAX_LEAP

    def _move(self, now: float, attempt: int, why: str) -> list[Action]:
        self.attempt = self.promised = attempt
        self._verifying = None
        self._phase_until = None
        self.reason = why
        if self.offer is None:
            return []
        self.phase = "convene"
        return [Note("convene", "attempt", f"attempt {attempt}: {why}", self.leader()), *self._ready(now)]

    def _on_convene(self, now: float, sender: PeerId, message: Convene) -> list[Action]:
        if message.attempt < self.promised and self.offer is not None:
            # A candidate that was overtaken follows us; it may not be able to learn of it in another way.
            return [Send(sender, Reject(self.key, message.attempt, self.promised, "promised a later attempt"))]
        # A leader that gives up its own attempt is believed; anybody else only by those with nothing to do.
        idle = self.plan is None or self.plan.attempt < self.attempt or now - self._heard > self._patience() / 2
        idle = idle or sender == self.leader()
        if message.attempt <= self.attempt or self._far(message.attempt) or self.offer is None or not idle:
            return []
        return self._move(now, message.attempt, "another candidate convenes")
