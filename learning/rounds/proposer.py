"""What a leader proposes and when it is agreed, sans-IO: the ballot of one attempt, and word to those who wait."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import attrs

from ...transport.identity import Identity, PeerId
from ..aggregate.aggregator import Aggregator
from .actions import Action, Note, Pace, Promise, Send
from .challenges import Challenges
from .decisions import next_roster, roster_room
from .messages import (
    Accept,
    Certificate,
    Commit,
    CommitRecord,
    Convene,
    Decided,
    OnTrial,
    Plan,
    Progress,
    Propose,
    Ready,
    Signed,
    Waiting,
    accept_bytes,
)
from .payloads import GATHER
from .remembering import NOTHING, carried
from .terms import Terms, accepts_needed
from .trials import counted, gathered, next_trial, served
from .weighing import MEAN, too_few

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
        trial: tuple[OnTrial, ...] = (),
        scores: Mapping[PeerId, int] = NOTHING,
        rings: bool = False,
    ) -> None:
        """``unfit``: why we ourselves would refuse a record that somebody accepted; None when we would not.
        ``convicted``: who lied, and in what; they are led no more, and are in no roster that we propose. ``trial``: who
        is on trial in this round: they are led as voters are, but promise, own and accept nothing. ``scores``: what the
        rule remembers of the voters. ``rings``: whether contributions may go round a ring."""
        self.key, self.round, self.voters, self.attempt = key, round, voters, attempt
        self.me, self._identity, self.pace, self._terms = identity.peer_id, identity, pace, terms
        self._unfit, self.spare = unfit, 0.0  # spare: see Voter
        self.rule, self.trial, self.guests = rule, trial, tuple(each.peer for each in trial)
        self.needed = accepts_needed(len(voters), terms.gossip)
        self.convicted, self.audits, self._rings = dict(convicted or {}), audits, rings and not audits
        self._challenges: Challenges | None = None
        self.lost: dict[PeerId, str] = {**lost, **self.convicted}
        self.phase = "convene"
        self.plan: Plan | None = None
        self.record: CommitRecord | None = None
        self.certificate: Certificate | None = None
        self._ready: dict[PeerId, Ready] = {}
        self._guests: dict[PeerId, Ready] = {}  # those on trial that are ready
        self._grace_until: float | None = None
        self._ticked = now
        self._holders: tuple[PeerId, ...] = ()
        self._held: dict[PeerId, tuple[PeerId, ...]] = {}
        self._frozen: tuple[PeerId, ...] = ()
        self._products: dict[PeerId, bytes] = {}
        self._scores, self._learnt = scores, NOTHING  # before this round, and what is new since
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

    @property
    def _apart(self) -> Collection[PeerId]:
        """Those whose word about slices does not count: lost, or on trial. The latter get what they lack later."""
        return {**self.lost, **dict.fromkeys(self.guests)} if self.guests else self.lost

    def _next(self, proven: int) -> tuple[tuple[PeerId, ...], tuple[OnTrial, ...], tuple[bytes, ...], str]:
        """For the record: the voters of the next round, who is on trial then, opinions, and the reasons.

        ``proven``: voters that have done this round.
        """
        terms, room = self._terms, roster_room(proven, self._terms.roster_limit)
        present = {v: None for v in (*self.voters, *self.guests) if v not in self.lost}
        leaving, wishes = terms.leaving(), terms.wishes()
        if not terms.admission:
            roster, why = next_roster(self.voters, present, leaving, wishes, room, self.convicted)
            return roster, (), (), why
        opinions = gathered(self._progress, self.key, self._frozen, len(self.guests))
        few = too_few(self.rule, len(self.voters)) is not None
        after = served(self.trial, counted(opinions, self._frozen, self.guests, few))
        ready = [each.peer for each in after if each.left == 0 and each.peer in present]
        roster, why = next_roster(self.voters, present, leaving, ready, room, self.convicted)
        gone = {*leaving, *self.convicted}
        free = room - len(roster)
        trial, more = next_trial(after, roster, self.voters, present, gone, wishes, free, terms.admission)
        return roster, trial, opinions if self.trial else (), why + more

    def _collect(self, now: float, members: tuple[PeerId, ...], why: str) -> list[Action]:
        """Nothing is to be combined: what ``members`` gave is the record, and all there is to agree on."""
        given = {peer: self._ready[peer].payload for peer in members}
        sound = {peer: each for peer, each in given.items() if each is not None and each.of(peer, self.key)}
        roster, trial, opinions, after = self._next(len(self._ready))
        samples = tuple(self._ready[peer].samples for peer in sound)
        weights = tuple(self._ready[peer].weight for peer in sound)
        record = self._terms.draft(tuple(sound), samples, weights, roster, (), f"{why}; roster {after}")
        self.record = attrs.evolve(
            record,
            kind=GATHER,
            branch=record.branch if self._branch is None else self._branch,
            trial=trial,
            opinions=opinions,
            scores=carried(roster, self._scores),
            payloads=tuple(sound.values()),
        )
        actions: list[Action] = [Note("convene", "members", why)]
        actions += [Note("convene", "refused", "its payload is not its own", p) for p in members if p not in sound]
        return [*actions, *self._propose(now, tuple(self._ready))]

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
        heard = {**self.lost, **self._accepts, **self._refusals, **dict.fromkeys(self.guests)}
        pending = [v for v in expected if v not in heard]
        if pending and not late:
            self._until = min(self._until or now + self.pace.accept, now + self.pace.accept)
            return []
        accepts = tuple(Signed(peer, self._accepts[peer].signature) for peer in sorted(self._accepts))
        self.certificate = Certificate(self.key, self.attempt, accepts)
        self.phase, self._until = "done", None
        commit = Commit(self.key, self.record, self.certificate)
        after = (*self.record.roster, *(each.peer for each in self.record.trial))
        others = [v for v in (*self.voters, *self.guests, *after) if v != self.me]
        # Ourselves last: whoever acts on our commit finds it already on its way to the others.
        return [Send(peer, commit) for peer in (*dict.fromkeys(others), self.me)]

    def _abort(self, now: float, why: str, attempt: int | None = None) -> list[Action]:
        self.phase, self._until = "aborted", None
        convene = Convene(self.key, self.round, self.attempt + 1 if attempt is None else attempt)
        note = Note("convene", "abort", why)
        return [note, *(Send(v, convene) for v in (*self.voters, *self.guests) if v not in self.lost)]

    def _waiting(self, now: float, to: PeerId) -> Action:
        missing = tuple(v for v in self.voters if v not in self._ready)
        reason = f"{self._reason or 'convening'} (leader {self.me.short}, {self.phase})"
        until = self._grace_until if self.phase == "convene" else self._until
        left = 0 if until is None else max(0, int(1e3 * (until - now)))
        return Send(to, Waiting(self.key, self.attempt, missing, reason, left))

    def _say_waiting(self, now: float) -> list[Action]:
        self._word = now + self.pace.suspect / 4
        if self.plan is not None and self.phase in ("scatter", "weigh", "gather"):
            live = [r for r in self.plan.receivers if r not in self.lost and r not in self.guests]
            if len(live) < self.needed:
                # This plan leads nowhere, whoever comes back. Silent, we are left for an attempt that can begin anew.
                return []
        to = {**self._ready, **(dict.fromkeys(self.voters) if self._grace_until is not None else {}), **self._guests}
        actions: list[Action] = [self._waiting(now, peer) for peer in to if peer not in self.lost]
        if self.phase == "convene" and self._ready and (self.attempt > 0 or self.me in self._ready):
            # Who has committed already answers this with the commit.
            actions += self._call_in()
        return actions

    def _call_in(self) -> list[Action]:
        convene = Convene(self.key, self.round, self.attempt)
        here = {**self.lost, **self._ready, **self._guests}
        return [Send(v, convene) for v in (*self.voters, *self.guests) if v not in here]
