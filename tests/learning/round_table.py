"""Peers of one round around a table: real voters and leaders, messages as events, no network, no clock but ours."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from shoal.learning.aggregate import Aggregator, Decision
from shoal.learning.aggregate.products import pack_triangle
from shoal.learning.reduce.robust import combine_by, fits, products_of
from shoal.learning.rounds import remembering
from shoal.learning.rounds.actions import (
    Action,
    Assess,
    Check,
    Circulate,
    Combine,
    Done,
    Fingerprint,
    Measure,
    Note,
    Pace,
    Persist,
    Prepare,
    Promise,
    Pull,
    Push,
    Send,
    Share,
    Verify,
    Weigh,
)
from shoal.learning.rounds.decisions import candidates, resume_at
from shoal.learning.rounds.leader import Leader
from shoal.learning.rounds.messages import (
    ANSWERED,
    TO_LEADER,
    Accept,
    Accepted,
    Commit,
    CommitRecord,
    OnTrial,
    Plan,
    Ready,
    Reject,
    instance_key,
    members_hash,
    quorum,
    verify_certificate,
)
from shoal.learning.rounds.terms import Terms, accepts_needed
from shoal.learning.rounds.trainee import SAID, Trainee
from shoal.learning.rounds.trials import trial_fault
from shoal.learning.rounds.voter import Voter
from shoal.learning.rounds.weighing import MEAN, Weighed, decide, too_few
from shoal.transport.identity import Identity, PeerId

PACE = Pace(grace=3.0, suspect=5.0, scatter=4.0, gather=4.0, accept=0.25)


class Seat:
    """One peer: its voter, the leaders it has been, and the numbers it holds."""

    def __init__(self, table: Table, identity: Identity, stored: tuple[int, Accepted | None] | None = None) -> None:
        self.table, self.identity, self.me = table, identity, identity.peer_id
        self.alive, self.frozen_until = True, 0.0
        self.vector = np.random.default_rng(identity.peer_id.key[0]).integers(-8, 8, table.length).astype(np.float32)
        self.parts: dict[tuple[PeerId, int, int], np.ndarray] = {}
        self.sums: dict[tuple[int, int, int], np.ndarray] = {}
        self.result: dict[tuple[int, int], dict[int, np.ndarray]] = {}
        self.commit: Commit | None = None
        self.final: np.ndarray | None = None
        self.stored = stored
        self.contributes = True
        self.leader: Leader | None = None
        self.notes: list[Note] = []
        promised, accepted = resume_at(stored, candidates(table.prev, 1, table.voters), self.me)
        self.first = promised
        self.voter = (Trainee if self.me in table.guests else Voter)(
            key=table.key,
            round=1,
            prev=table.prev,
            voters=table.voters,
            identity=identity,
            pace=PACE,
            nonce=lambda attempt, epoch: self.me.key[:14] + bytes([attempt % 256, epoch % 256]),
            check=self.check,
            max_length=10_000,
            rule=table.rule,
            trial=table.guests,
            scores=table.scores,
            promised=promised,
            accepted=accepted,
        )

    def check(self, record: CommitRecord) -> str | None:
        table = self.table
        few = too_few(table.rule, len(table.voters)) is not None
        wrong = trial_fault(record, table.trial, table.voters, table.key, table.admission, few)
        wrong = wrong or remembering.fault(record, table.scores, table.rule)
        if wrong is not None:
            return wrong
        return None if record.state == self.table.states.get(self.me, b"") else "it goes on from another state"

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if not self.alive:
                return
            self.table.trace(self, action)
            if self.alive:
                self._do(action)

    def _do(self, action: Action) -> None:
        table = self.table
        match action:
            case Send():
                table.post(self.me, action.to, lambda seat: seat.hear(self.me, action.message), action.message)
            case Push():
                piece = self.vector[action.start : action.stop].copy()
                key = (self.me, action.start, action.stop)
                table.post(self.me, action.owner, lambda seat: seat.take(key, piece))
            case Circulate() if action.to == self.me:
                here = (action.attempt, action.epoch, action.index)
                table.post(self.me, self.me, lambda seat: seat.do(seat.voter.sum_closed(table.now, *here)))
            case Circulate():
                plan = self.voter.plan
                assert plan is not None and plan.ring
                place = (action.attempt, action.epoch, action.index)
                summed = self._with_own(plan, *place)
                me = self.me
                table.post(me, action.to, lambda seat: seat.take_sum(me, place, summed))
            case Combine() if (plan := self.voter.plan) is not None and plan.ring:
                out = self.result.setdefault((action.attempt, action.epoch), {})
                total = np.float32(sum(action.weights))
                for index in action.indices:
                    out[index] = self._with_own(plan, action.attempt, action.epoch, index) / total
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(seat.voter.combined(table.now, action.attempt, action.epoch, action.indices)),
                )
            case Combine():
                plan = self.voter.plan
                assert plan is not None
                out = self.result.setdefault((action.attempt, action.epoch), {})
                total = np.float32(sum(action.weights))
                for index in action.indices:
                    start, stop = plan.slices[index].range
                    value = np.zeros(stop - start, np.float32)
                    if action.members and not table.rule.is_mean:
                        parts = [torch.from_numpy(self.parts[member, start, stop]) for member in action.members]
                        decision = Decision.read(action.decision, len(parts)) if action.decision else None
                        combine_by(table.rule, parts, decision, action.weights, torch.from_numpy(value))
                        out[index] = value
                        continue
                    for member, weight in zip(action.members, action.weights, strict=True):
                        value += self.parts[member, start, stop] * np.float32(weight)
                    out[index] = value / total if action.members else value
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(seat.voter.combined(table.now, action.attempt, action.epoch, action.indices)),
                )
            case Measure():
                plan = self.voter.plan
                assert plan is not None
                ranges = [plan.slices[index].range for index in action.indices]
                data = pack_triangle(
                    products_of(
                        [([torch.from_numpy(self.parts[m, a, b]) for m in action.members], b - a) for a, b in ranges]
                    )
                )
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(seat.voter.measured(table.now, action.attempt, action.epoch, data)),
                )
            case Weigh():
                leader = self.leader
                assert leader is not None
                decided = table.decides(
                    self, decide(table.rule, table.key, action.parts, action.members, action.scores)
                )
                table.post(self.me, self.me, lambda seat: seat.do(leader.weighed(table.now, action, decided)))
            case Check():
                own = decide(table.rule, table.key, action.parts, action.members, action.scores, said=action.decision)
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(seat.voter.weighed(table.now, action.attempt, action.epoch, own)),
                )
            case Assess():
                plan = self.voter.plan
                assert plan is not None
                ranges, held = [plan.slices[i].range for i in action.indices], self.result[action.attempt, action.epoch]
                ours = [torch.from_numpy(held[i]) for i in action.indices]
                fit = tuple(
                    peer
                    for peer in action.trial
                    if fits(
                        [(torch.from_numpy(self.parts[peer, a, b]), c) for (a, b), c in zip(ranges, ours, strict=True)]
                    )
                )
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(seat.voter.assessed(table.now, action.attempt, action.epoch, fit)),
                )
            case Share():
                self._offer(action.receiver, action.attempt, action.epoch, action.index, pulled=False)
            case Pull():
                me = self.me
                table.post(
                    me,
                    action.holder,
                    lambda seat: seat._offer(me, action.attempt, action.epoch, action.index, pulled=True),
                )
            case Prepare():
                pass  # computed ahead of time where that takes time
            case Fingerprint():
                value = self._print(self._whole(action.attempt, action.epoch), action.nonces)
                assert self.leader is not None
                leader = self.leader
                table.post(
                    self.me,
                    self.me,
                    lambda seat: seat.do(leader.fingerprint(table.now, action.attempt, action.epoch, value, "test")),
                )
            case Verify():
                self._verify(action)
            case Persist():
                self.stored = (action.promised, action.accepted)
            case Promise():
                self.do(self.voter.promise(action.attempt))
            case Done():
                self._done(action.commit)
            case Note():
                self.notes.append(action)

    def _whole(self, attempt: int, epoch: int) -> np.ndarray:
        parts = self.result[attempt, epoch]
        return np.concatenate([parts[i] for i in sorted(parts)])

    def _print(self, whole: np.ndarray, nonces: tuple[bytes, ...]) -> bytes:
        return whole.tobytes()[:4096] + b"".join(nonces)

    def _mine(self, record: CommitRecord) -> np.ndarray | None:
        plan, frozen = self.voter.plan, self.voter.frozen
        if plan is None or frozen is None or not self.voter.full or frozen.members != record.members:
            return None
        whole = self._whole(plan.attempt, plan.epoch)
        return whole if self._print(whole, record.nonces) == record.fingerprint else None

    def _verify(self, action: Verify) -> None:
        whole = self._mine(action.record)
        if whole is None and self.final is not None:
            # What was verified before is held until the round is over.
            same = self._print(self.final, action.record.nonces) == action.record.fingerprint
            whole = self.final if same else None
        if whole is not None:
            self.final = whole
            self.table.post(
                self.me,
                self.me,
                lambda seat: seat.do(seat.voter.verified(self.table.now, action.attempt, action.record, None)),
            )
            return
        for holder in action.holders:
            self.table.post(self.me, holder, lambda seat: seat._give(self.me, action))

    def _give(self, to: PeerId, action: Verify) -> None:
        whole = self._mine(action.record)
        if whole is None:
            whole = self.final
        if whole is not None and self._print(whole, action.record.nonces) == action.record.fingerprint:
            self.table.post(self.me, to, lambda seat: seat._got(action, whole))

    def _got(self, action: Verify, whole: np.ndarray) -> None:
        self.final = whole
        self.do(self.voter.verified(self.table.now, action.attempt, action.record, None))

    def _done(self, commit: Commit) -> None:
        self.commit = commit
        mine = self._mine(commit.record)
        if mine is not None:
            self.final = mine
        elif self.final is None or self._print(self.final, commit.record.nonces) != commit.record.fingerprint:
            self.final = None
            verify = Verify(0, commit.record, ())
            for accept in commit.certificate.accepts:
                self.table.post(self.me, accept.peer, lambda seat: seat._give(self.me, verify))

    def _offer(self, to: PeerId, attempt: int, epoch: int, index: int, *, pulled: bool) -> None:
        part = self.result.get((attempt, epoch), {}).get(index)
        frozen = self.voter.frozen
        if part is None or frozen is None:
            return
        hashed, me = members_hash(frozen.members), self.me
        self.table.post(me, to, lambda seat: seat.gather(me, attempt, epoch, index, hashed, part, pulled))

    def take(self, key: tuple[PeerId, int, int], piece: np.ndarray) -> None:
        self.parts[key] = piece
        self.do(self.voter.slice_received(self.table.now, *key))

    def _with_own(self, plan: Plan, attempt: int, epoch: int, index: int) -> np.ndarray:
        """Whole numbers, whose sums are exact in any order."""
        start, stop = plan.slices[index].range
        weight = plan.weights[plan.members.index(self.me)]
        own = self.vector[start:stop] * np.float32(weight)
        before = self.sums.get((attempt, epoch, index))
        return own if before is None else before + own

    def take_sum(self, sender: PeerId, place: tuple[int, int, int], summed: np.ndarray) -> None:
        self.sums[place] = summed
        self.do(self.voter.sum_received(self.table.now, sender, *place))

    def gather(
        self, sender: PeerId, attempt: int, epoch: int, index: int, hashed: bytes, part: np.ndarray, pulled: bool
    ) -> None:
        self.result.setdefault((attempt, epoch), {})[index] = part
        self.do(self.voter.combined_received(self.table.now, sender, attempt, epoch, index, hashed, pulled=pulled))

    def hear(self, sender: PeerId, message: object) -> None:
        now = self.table.now
        if self.commit is not None:
            if isinstance(message, ANSWERED):
                commit = self.commit
                self.table.post(self.me, sender, lambda seat: seat.hear(self.me, commit))
            return
        if sender not in self.table.voters and not isinstance(message, SAID):
            return
        if isinstance(message, Commit):
            needed = accepts_needed(len(self.table.voters), self.table.gossip)
            assert verify_certificate(message.record, message.certificate, self.table.voters, needed) is None
        guest = sender not in self.table.voters
        if isinstance(message, Ready) and not guest and self.voter.leader(message.attempt) == self.me:
            known = self.first - 1 if self.leader is None else self.leader.attempt
            if known < message.attempt:
                self.lead(message.attempt)
        if isinstance(message, TO_LEADER) and self.leader is not None:
            self.do(self.leader.receive(now, sender, message))
        if not isinstance(message, TO_LEADER) or isinstance(message, Reject):
            self.do(self.voter.receive(now, sender, message))

    def start(self) -> None:
        samples = 10 if self.contributes else 0
        offer = Ready(
            self.table.key,
            1,
            0,
            self.contributes,
            samples,
            self.table.weight(self.me),
            self.table.length,
            None,
            False,
            "",
        )
        self.do(self.voter.begin(self.table.now, offer))

    def lose(self, who: PeerId) -> None:
        if self.commit is None:
            self.do(self.voter.peer_lost(self.table.now, who, "killed"))
            if self.leader is not None:
                self.do(self.leader.peer_lost(self.table.now, who, "killed"))

    def find(self, who: PeerId) -> None:
        if self.commit is None:
            self.do(self.voter.peer_alive(self.table.now, who))
            if self.leader is not None:
                self.leader.peer_alive(who)

    def lead(self, attempt: int) -> None:
        self.leader = Leader(
            key=self.table.key,
            round=1,
            voters=self.table.voters,
            attempt=attempt,
            identity=self.identity,
            pace=PACE,
            terms=self.table.terms(self.me),
            now=self.table.now,
            lost=self.voter.lost,
            unfit=self.check,
            rule=self.table.rule,
            trial=self.table.trial,
            scores=self.table.scores,
        )

    def follow(self) -> None:
        if self.leader is not None and self.commit is None and self.alive:
            self.do(self.leader.follow(self.table.now, self.voter.attempt))

    def tick(self) -> None:
        if self.commit is None:
            self.do(self.voter.tick(self.table.now))
            if self.leader is not None:
                self.do(self.leader.tick(self.table.now))

    def due(self) -> float | None:
        times = [self.voter.deadline(), self.leader.deadline() if self.leader else None]
        return min((t for t in times if t is not None), default=None)


class Table:
    """Runs one round of ``n`` peers to its end. ``hook`` sees every action before it is carried out."""

    def __init__(
        self,
        n: int,
        *,
        seed: int = 0,
        length: int = 100,
        gossip: bool = False,
        weighted: bool = False,
        rule: Aggregator = MEAN,
        guests: int = 0,
        admission: int = 0,
        scores: Sequence[int] = (),
    ) -> None:
        """``guests``: so many more are on trial, the first of them for one round more, the second for two … ``scores``:
        what the rule remembers of the voters, in their order."""
        self.rule, self.admission = rule, admission
        #: What a leader makes of its decision before it tells it.
        self.decides: Callable[[Seat, Weighed], Weighed] = lambda seat, found: found
        self.random, self.length, self.gossip = random.Random(seed), length, gossip
        self.now, self._counter = 0.0, itertools.count()
        self.weighted = weighted
        #: What differs from the state that the others hold before the round.
        self.states: dict[PeerId, bytes] = {}
        self.accepts: dict[tuple[int, bytes], dict[PeerId, None]] = {}
        self.dead: list[Seat] = []
        self.drops: Callable[[PeerId, PeerId, object], bool] = lambda sender, to, message: False
        self._severed: dict[tuple[PeerId, PeerId], None] = {}
        self._queue: list[tuple[float, int, PeerId, PeerId, Callable[[Seat], None]]] = []
        identities = [Identity(bytes([seed % 256, i]) * 16) for i in range(n + guests)]
        self.voters = tuple(sorted(i.peer_id for i in identities[:n]))
        self.guests = tuple(sorted(i.peer_id for i in identities[n:]))
        self.trial = tuple(OnTrial(peer, 1 + at) for at, peer in enumerate(self.guests))
        #: Who wishes to join.
        self.wishes: tuple[PeerId, ...] = ()
        self.prev = bytes([seed % 256]) * 32
        self.key = instance_key(b"r" * 32, 1, self.prev, self.voters)
        self.scores: Mapping[PeerId, int] = dict(zip(self.voters, scores, strict=False))
        self.seats = {i.peer_id: Seat(self, i) for i in identities}
        self.hook: Callable[[Seat, Action], None] = lambda seat, action: None
        self._fifo: dict[tuple[PeerId, PeerId], float] = {}

    def terms(self, leader: PeerId | None = None) -> Terms:
        def draft(members, samples, weights, roster, nonces, reason):  # type: ignore[no-untyped-def]
            return CommitRecord(
                run=b"r" * 32,
                round=1,
                kind="reduce",
                prev=self.prev,
                members=members,
                samples=samples,
                weights=weights,
                roster=roster,
                total=sum(samples),
                branch=0,
                state=self.states.get(leader, b"") if leader is not None else b"",
                nonces=nonces,
                algorithm="",
                fingerprint=b"",
                reason=reason,
            )

        strict, wishes = not self.gossip, self.wishes
        return Terms(draft, lambda: wishes, lambda: (), self.gossip, 64, strict, self.admission)

    def weight(self, peer: PeerId) -> int:
        """Of a peer's contribution in the mean."""
        return 1 + self.voters.index(peer) % 3 if self.weighted and peer in self.voters else 1

    def trace(self, seat: Seat, action: Action) -> None:
        if isinstance(action, Send) and isinstance(action.message, Accept):
            self.accepts.setdefault((action.message.attempt, action.message.digest), {})[seat.me] = None
        self.hook(seat, action)

    def post(self, sender: PeerId, to: PeerId, deliver: Callable[[Seat], None], message: object = None) -> None:
        if to not in self.seats or self.cut(sender, to) or (sender != to and self.drops(sender, to, message)):
            return
        delay = 0.0001 if sender == to else self.random.uniform(0.01, 0.1)
        at = max(self.now + delay, self._fifo.get((sender, to), 0.0))
        self._fifo[sender, to] = at
        heapq.heappush(self._queue, (at, next(self._counter), sender, to, deliver))

    def kill(self, seat: Seat) -> None:
        """SIGKILL: what it sent is on its way, nothing more; the others' links break after a moment."""
        seat.alive = False
        self._queue = [entry for entry in self._queue if not entry[2] == entry[3] == seat.me]
        heapq.heapify(self._queue)
        self._tell(seat.me, self.now, lambda other: other.lose(seat.me))

    def restart(self, seat: Seat) -> None:
        """The process of a killed peer again, with what it had stored; it trains for a second."""
        again = Seat(self, seat.identity, seat.stored)
        again.vector, again.contributes = seat.vector, seat.contributes
        self.seats[seat.me] = again
        self.dead.append(seat)
        self._tell(seat.me, self.now + 0.3, lambda other: other.find(seat.me))
        for other in self.seats.values():
            if not other.alive:
                self.at(self.now + 0.5, seat.me, lambda s, who=other.me: s.lose(who))  # type: ignore[misc]
        self.at(self.now + 1.0, seat.me, lambda s: s.start())

    def freeze(self, seat: Seat, seconds: float) -> None:
        """SIGSTOP and SIGCONT: its links stay up for 12 s, then the others take it for lost until it is back."""
        seat.frozen_until = self.now + seconds
        if seconds > 12.0:
            self._tell(seat.me, self.now + 12.0, lambda other: other.lose(seat.me))
            self._tell(seat.me, seat.frozen_until, lambda other: other.find(seat.me))

    def sever(self, one: PeerId, other: PeerId) -> None:
        """No way between the two any more, in both directions."""
        self._severed[one, other] = self._severed[other, one] = None
        for here, there in ((one, other), (other, one)):
            self.at(self.now + 0.2, here, lambda seat, there=there: seat.lose(there))

    def cut(self, one: PeerId, other: PeerId) -> bool:
        return (one, other) in self._severed

    def at(self, when: float, to: PeerId, act: Callable[[Seat], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._counter), to, to, act))

    def _tell(self, about: PeerId, when: float, act: Callable[[Seat], None]) -> None:
        for other in self.seats.values():
            if other.me != about:
                self.at(when + self.random.uniform(0.1, 0.3), other.me, act)

    def chosen(self) -> dict[bytes, None]:
        """Digests that a quorum has accepted at one ballot, whether anybody knows it or not."""
        needed = 1 if self.gossip else quorum(len(self.voters))
        return {digest: None for (_, digest), peers in self.accepts.items() if len(peers) >= needed}

    def commits(self) -> list[Commit]:
        """Of everybody, the dead included."""
        return [s.commit for s in (*self.seats.values(), *self.dead) if s.commit is not None]

    def live(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.alive]

    def run(self, *, begin: dict[PeerId, float] | None = None, limit: float = 300.0) -> None:
        """Until every live peer holds the committed result, or ``limit`` seconds have passed."""
        for peer, seat in self.seats.items():
            self.at((begin or {}).get(peer, self.random.uniform(0.0, 1.0)), peer, lambda s: s.start())
            if seat.voter.leader(0) == peer:
                seat.lead(0)
        while self.now < limit:
            live = self.live()
            if all(s.commit is not None and s.final is not None for s in live) or not live:
                return
            awake = [seat for seat in live if seat.frozen_until <= self.now]
            ticks = [(due, seat) for seat in awake if seat.commit is None and (due := seat.due()) is not None]
            due, ticking = min(ticks, key=lambda item: (item[0], item[1].me), default=(limit, None))
            if self._queue and self._queue[0][0] <= due:
                at, count, sender, to, deliver = heapq.heappop(self._queue)
                self.now = max(self.now, at)
                seat = self.seats[to]
                if seat.alive and seat.frozen_until > self.now:
                    # It waits in the kernel's buffers; in order, as the counter says.
                    heapq.heappush(self._queue, (seat.frozen_until, count, sender, to, deliver))
                elif seat.alive:
                    deliver(seat)
                    seat.follow()
            elif ticking is not None:
                self.now = max(self.now, due)
                ticking.tick()
                ticking.follow()
                again = ticking.due() if ticking.alive and ticking.commit is None else None
                assert again is None or again > self.now, "it would tick for ever without time going on"
            else:
                return
