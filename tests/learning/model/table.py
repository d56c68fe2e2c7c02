"""All peers of a round and what is under way between them: one state of the model, and every step that leads on.

A step is a tuple of words and indices, so that a way through the model can be printed, replayed and shortened:
``("deliver", 0, 2)`` hands peer 2 the oldest message from peer 0. What a step makes a peer say to itself is heard
within the step. A number at the end says that the peer dies within the step, after so many effects (a message to
another peer, or a write to disk): this is how a committer dies that has told one member.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from shoal.learning.rounds import terms as terms_module
from shoal.learning.rounds.actions import (
    Action,
    Check,
    Circulate,
    Combine,
    Done,
    Fingerprint,
    Measure,
    Note,
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
from shoal.learning.rounds.messages import (
    ANSWERED,
    TO_LEADER,
    Commit,
    CommitRecord,
    Ready,
    Reject,
    Waiting,
    members_hash,
    verify_certificate,
)

from .laws import check_commit, check_held, check_said
from .seats import Seat, Shape, Value, hash_of
from .weights import weighed
from .words import Broken, Budget, Pair, Step, brief, printed


class _Died(Exception):
    """The acting peer crashes in the middle of a step."""


class Table:
    """One state. Steps make a new one and leave this one as it is: seats that do not act are shared."""

    __slots__ = (
        "accepts", "beyond", "cuts", "effects", "held", "inplace", "keep_words", "logged", "persists", "queues",
        "records", "seats", "shape",
    )  # fmt: skip

    def __init__(self, shape: Shape, *, persists: bool = True, beyond: bool = False) -> None:
        self.shape, self.persists, self.beyond, self.keep_words = shape, persists, beyond, False
        self.seats = [Seat(shape, place) for place in range(shape.count)]
        self.queues: dict[Pair, tuple[Any, ...]] = {}
        self.cuts: tuple[Pair, ...] = ()
        self.held: tuple[Pair, ...] = ()
        #: Who has ever said (and, before that, stored) that it accepts a value: by key of the instance, ballot, digest.
        self.accepts: dict[tuple[bytes, int, bytes], tuple[int, ...]] = {}
        #: Records somebody has a valid certificate of, by instance and digest.
        self.records: dict[tuple[bytes, bytes], CommitRecord] = {}
        self.effects, self.inplace = 0, False
        self.logged: list[str] | None = None
        for place in range(shape.count):
            if place not in shape.idle:
                self._run(place, lambda seat=self.seats[place]: self._begin(seat))

    # -- ways on ------------------------------------------------------------------------------------

    def free(self, *, ordered: bool = False) -> Iterator[Step]:
        """What may happen in any run: nothing here is a fault. ``ordered``: of all messages the oldest comes next."""
        for pair in self.queues:
            if pair not in self.held:
                yield "deliver", *pair
                if ordered:
                    break
        for seat in self.seats:
            if not seat.alive:
                yield "restart", seat.place
                continue
            if seat.commit is not None:
                continue
            if not seat.begun:
                yield "begin", seat.place
            for other in self.seats:
                if other is not seat and other.me in seat.voter.voters:
                    thinks = other.me in seat.voter.lost
                    if not other.alive and not thinks:
                        yield "lose", seat.place, other.place
                    elif other.alive and thinks:
                        yield "find", seat.place, other.place
        yield from (("mend", *pair) for pair in self.cuts)
        yield from (("release", *pair) for pair in self.held)

    def faults(self, budget: Budget, timers: tuple[str, ...], *, ordered: bool = False) -> Iterator[tuple[Step, str]]:
        """Steps that cost one of ``budget``'s faults, with the kind that they cost."""
        if budget.total <= 0:
            return
        for pair, queue in self.queues.items():
            if budget.hold and pair not in self.held:
                yield ("hold", *pair), "hold"
            if pair in self.held:
                continue
            if budget.drop:
                yield ("drop", *pair), "drop"
            if budget.twice:
                yield ("twice", *pair), "twice"
            if len(queue) > 1 and budget.skip:
                yield ("skip", *pair), "skip"
            if ordered:
                break
        for seat in self.seats:
            if not seat.alive:
                continue
            if budget.crash:
                yield ("crash", seat.place), "crash"
            if seat.commit is not None:
                continue
            if budget.timer:
                for name in seat.timers():
                    if name in timers:
                        yield ("timer", seat.place, name), "timer"
            for other in self.seats if budget.alarm or budget.cut else ():
                if other is seat or other.me not in seat.voter.voters:
                    continue
                if budget.alarm and other.alive and other.me not in seat.voter.lost:
                    yield ("lose", seat.place, other.place), "alarm"
                if budget.cut and (other.place, seat.place) not in self.cuts:
                    yield ("cut", other.place, seat.place), "cut"

    def can(self, step: Step) -> bool:
        """Whether ``step`` means something here."""
        kind, place = step[0], step[1]
        if kind in ("deliver", "drop", "twice", "skip"):
            return len(self.queues.get((place, step[2]), ())) > (kind == "skip")
        if kind in ("hold", "release"):
            return ((place, step[2]) in self.held) == (kind == "release")
        if kind == "mend":
            return (place, step[2]) in self.cuts
        if kind == "cut":
            return (place, step[2]) not in self.cuts
        seat = self.seats[place]
        if kind == "restart":
            return not seat.alive
        if not seat.alive:
            return False
        if kind == "crash":
            return True
        if seat.commit is not None:
            return False
        match kind:
            case "begin":
                return not seat.begun
            case "timer":
                return step[2] in seat.timers()
            case "lose":
                return self.seats[step[2]].me not in seat.voter.lost
            case "find":
                return self.seats[step[2]].me in seat.voter.lost
        raise ValueError(f"no step {kind}")

    def after(self, step: Step, log: list[str] | None = None) -> Table:
        """The state after ``step``; ``effects`` says how many the acting peer had. Raises :class:`Broken`."""
        table = self._copy(log)
        table.take(step)
        table.logged = None
        return table

    def _copy(self, log: list[str] | None = None) -> Table:
        table = object.__new__(Table)
        table.shape, table.persists, table.beyond = self.shape, self.persists, self.beyond
        table.keep_words = self.keep_words
        table.seats, table.queues = list(self.seats), dict(self.queues)
        table.cuts, table.held = self.cuts, self.held
        table.accepts, table.records, table.effects, table.logged = self.accepts, self.records, 0, log
        table.inplace = False
        return table

    def own(self) -> Table:
        """A copy whose :meth:`take` changes it, and in which the words to those who wait are sent."""
        table = self._copy()
        table.seats = [seat.copy() for seat in self.seats]
        table.inplace = table.keep_words = True
        return table

    def take(self, step: Step) -> None:
        """Carry out ``step`` on this very table."""
        kind, place = step[0], step[1]
        dies = step[3] if len(step) == 4 else None
        match kind:
            case "deliver" | "twice" | "drop" | "skip":
                pair = (place, step[2])
                at = 1 if kind == "skip" else 0
                message = self.queues[pair][at]
                if kind != "twice":
                    left = self.queues[pair][:at] + self.queues[pair][at + 1 :]
                    del self.queues[pair]
                    if left:
                        self.queues[pair] = left  # behind the others
                if kind == "drop" or not self.seats[step[2]].alive or pair in self.cuts:
                    return
                seat, sender = self._touch(step[2]), self.shape.peers[place]
                self._run(step[2], lambda: self._hear(seat, sender, message), dies)
            case "crash":
                self._touch(place).crash()
            case "restart":
                seat = self._touch(place)
                seat.wake()
                self._run(place, lambda: self._begin(seat))
            case "begin":
                seat = self._touch(place)
                self._run(place, lambda: self._begin(seat), dies)
            case "timer":
                seat = self._touch(place)
                seat.clock = max(seat.clock, seat.timers()[step[2]])
                self._run(place, lambda: self._tick(seat), dies)
            case "lose":
                seat, peer = self._touch(place), self.shape.peers[step[2]]
                self._run(place, lambda: self._lose(seat, peer), dies)
            case "find":
                seat, peer = self._touch(place), self.shape.peers[step[2]]
                self._run(place, lambda: self._find(seat, peer))
            case "cut":
                self.cuts = (*self.cuts, (place, step[2]))
            case "hold":
                self.held = (*self.held, (place, step[2]))
            case "release":
                self.held = tuple(pair for pair in self.held if pair != (place, step[2]))
            case "mend":
                self.cuts = tuple(cut for cut in self.cuts if cut != (place, step[2]))

    def run_timers(self, place: int) -> None:
        """Tick one peer of a table of its own, now."""
        seat = self.seats[place]
        self._run(place, lambda: self._tick(seat))

    # -- a peer at work -----------------------------------------------------------------------------

    def _touch(self, place: int) -> Seat:
        if self.inplace:
            return self.seats[place]
        self.seats[place] = twin = self.seats[place].copy()
        return twin

    def _run(self, place: int, first: Callable[[], list[Action]], dies: int | None = None) -> None:
        """Do ``first`` at ``place`` and everything that follows without a message from one peer to another."""
        work: deque[tuple[int, Callable[[], list[Action]]]] = deque([(place, first)])
        touched = {place}
        while work:
            at, call = work.popleft()
            if at not in touched:
                touched.add(at)
                self._touch(at)
            seat = self.seats[at]
            if not seat.alive:
                continue
            try:
                for action in call():
                    self._do(seat, action, work, acting=at == place, dies=dies)
                if seat.alive and seat.leader is not None and seat.commit is None:
                    for action in seat.leader.follow(seat.clock, seat.voter.attempt):
                        self._do(seat, action, work, acting=at == place, dies=dies)
            except _Died:
                seat.crash()

    def _effect(self, acting: bool, dies: int | None) -> None:
        if acting:
            if self.effects == dies:
                raise _Died
            self.effects += 1

    def _do(
        self,
        seat: Seat,
        action: Action,
        work: deque[tuple[int, Callable[[], list[Action]]]],
        *,
        acting: bool,
        dies: int | None,
    ) -> None:
        shape, place = self.shape, seat.place
        # Steps of other seats (the owner of a slice) run within ours, on copies of theirs made when their turn comes.
        match action:
            case Send() if action.to == seat.me:
                message = action.message
                check_said(self, seat, message)
                work.append((place, lambda: self._hear(self.seats[place], seat.me, message)))
            case Send():
                self._effect(acting, dies)
                check_said(self, seat, action.message)
                to = shape.index[action.to]
                if isinstance(action.message, Waiting) and not self.keep_words:
                    # Words to those who wait only put off their timers, which fire when they like here.
                    return
                self.queues[place, to] = (*self.queues.get((place, to), ()), action.message)
                self._log(seat, f"says {type(action.message).__name__} to {to}: {brief(action.message)}")
            case Push():
                key = (seat.me, action.start, action.stop)
                owner = shape.index[action.owner]
                if self._open(place, owner):
                    work.append((owner, lambda: self._take(self.seats[owner], key)))
                else:
                    back = (action.owner, action.start, action.stop)
                    work.append((place, lambda: self.seats[place].voter.push_failed(seat.clock, *back)))
            case Circulate() if action.to == seat.me:
                here = (action.attempt, action.epoch, action.index)
                work.append((place, lambda: self.seats[place].voter.sum_closed(self.seats[place].clock, *here)))
            case Circulate():
                to, sender = shape.index[action.to], seat.me
                so_far = (action.attempt, action.epoch, action.index)
                summed = (*seat.sums.get(so_far, ()), sender)
                if self._open(place, to):
                    work.append((to, lambda: self._take_sum(self.seats[to], sender, so_far, summed)))
            case Combine():
                value = action.members, action.weights
                plan = seat.voter.plan
                assert plan is not None
                check_held(seat, action)
                for index in action.indices:
                    seat.values.setdefault((action.attempt, action.epoch), {})[index] = value
                again = action.attempt, action.epoch, action.indices
                work.append((place, lambda: self.seats[place].voter.combined(self.seats[place].clock, *again)))
            case Measure() | Weigh() | Check():
                work.append((place, weighed(self, seat, action)))
            case Share():
                self._offer(seat, action, work, shape.index[action.receiver], pulled=False)
            case Pull():
                holder = self.seats[shape.index[action.holder]]
                if holder.alive and self._open(holder.place, place):
                    self._offer(holder, action, work, place, pulled=True)
            case Fingerprint():
                leader = seat.leader
                assert leader is not None
                value = self._whole(seat, action.attempt, action.epoch)
                shown = printed(value, action.nonces)
                work.append(
                    (
                        place,
                        lambda: (
                            self.seats[place].leader.fingerprint(  # type: ignore[union-attr]
                                self.seats[place].clock, action.attempt, action.epoch, shown, action.algorithm
                            )
                            if self.seats[place].leader is not None
                            else []
                        ),
                    )
                )
            case Prepare():
                pass  # computed ahead of time where that takes time
            case Verify():
                wrong = self._obtain(seat, action.record, action.holders)
                work.append(
                    (
                        place,
                        lambda: self.seats[place].voter.verified(
                            self.seats[place].clock, action.attempt, action.record, wrong
                        ),
                    )
                )
            case Persist():
                self._effect(acting, dies)
                if self.persists:
                    seat.stored = (action.promised, action.accepted)
            case Promise():
                for more in seat.voter.promise(action.attempt):
                    self._do(seat, more, work, acting=acting, dies=dies)
            case Done():
                check_commit(self, seat, action.commit)
                self._done(seat, action.commit)
            case Note():
                self._log(seat, f"notes {action.phase} {action.what} {action.detail}")

    def _open(self, sender: int, to: int) -> bool:
        return sender == to or ((sender, to) not in self.cuts and self.seats[to].alive)

    def _begin(self, seat: Seat) -> list[Action]:
        seat.begun = True
        return seat.voter.begin(seat.clock, seat.offer())

    def _tick(self, seat: Seat) -> list[Action]:
        actions = seat.voter.tick(seat.clock)
        if seat.leader is not None:
            actions += seat.leader.tick(seat.clock)
        return actions

    @staticmethod
    def _lose(seat: Seat, peer: Any) -> list[Action]:
        actions = seat.voter.peer_lost(seat.clock, peer, "lost")
        if seat.leader is not None:
            actions += seat.leader.peer_lost(seat.clock, peer, "lost")
        return actions

    @staticmethod
    def _find(seat: Seat, peer: Any) -> list[Action]:
        if seat.leader is not None:
            seat.leader.peer_alive(peer)
        return seat.voter.peer_alive(seat.clock, peer)

    def _hear(self, seat: Seat, sender: Any, message: Any) -> list[Action]:
        """What an instance does with a message (:meth:`Instance.receive`)."""
        if message.key != seat.view.key:
            return []  # the hub knows no such round
        if isinstance(message, Commit):
            needed = terms_module.accepts_needed(len(seat.view.voters), False)
            wrong = verify_certificate(message.record, message.certificate, seat.view.voters, needed)
            if wrong is not None or message.certificate.key != seat.view.key:
                raise Broken(f"a commit whose certificate does not hold: {wrong}")
        elif sender not in seat.view.voters:
            return []
        if seat.commit is not None:
            return [Send(sender, seat.commit)] if isinstance(message, ANSWERED) and sender != seat.me else []
        actions: list[Action] = []
        if isinstance(message, Ready) and seat.voter.leader(message.attempt) == seat.me:
            known = seat.first - 1 if seat.leader is None else seat.leader.attempt
            if known < message.attempt:
                seat.lead(message.attempt)
        if isinstance(message, TO_LEADER) and seat.leader is not None:
            actions += seat.leader.receive(seat.clock, sender, message)
        if not isinstance(message, TO_LEADER) or isinstance(message, Reject):
            actions += seat.voter.receive(seat.clock, sender, message)
        return actions

    # -- numbers ------------------------------------------------------------------------------------

    def _take(self, seat: Seat, key: tuple[Any, int, int]) -> list[Action]:
        if seat.commit is not None:
            return []
        seat.parts[key] = None
        return seat.voter.slice_received(seat.clock, *key)

    def _take_sum(self, seat: Seat, sender: Any, place: tuple[int, int, int], summed: tuple[Any, ...]) -> list[Action]:
        if seat.commit is not None or place in seat.sums:
            return []  # from one that came back and begins again: refused
        seat.sums[place] = summed
        return seat.voter.sum_received(seat.clock, sender, *place)

    def _offer(self, holder: Seat, action: Share | Pull, work: Any, to: int, *, pulled: bool) -> None:
        value = holder.values.get((action.attempt, action.epoch), {}).get(action.index)
        frozen = holder.voter.frozen
        if value is None or frozen is None or not self._open(holder.place, to):
            return
        hashed, sender = members_hash(frozen.members), holder.me

        def gather() -> list[Action]:
            seat = self.seats[to]
            if seat.commit is not None:
                return []
            seat.values.setdefault((action.attempt, action.epoch), {})[action.index] = value
            return seat.voter.combined_received(
                seat.clock, sender, action.attempt, action.epoch, action.index, hashed, pulled=pulled
            )

        work.append((to, gather))

    @staticmethod
    def _whole(seat: Seat, attempt: int, epoch: int) -> Value:
        found = list(dict.fromkeys(seat.values[attempt, epoch].values()))
        if len(found) != 1:
            raise Broken(f"{seat.place} holds slices of {len(found)} different results")
        return found[0]

    def _mine(self, seat: Seat, record: CommitRecord) -> Value | None:
        plan, frozen = seat.voter.plan, seat.voter.frozen
        if plan is None or frozen is None or not seat.voter.full or frozen.members != record.members:
            return None
        value = self._whole(seat, plan.attempt, plan.epoch)
        return value if printed(value, record.nonces) == record.fingerprint else None

    def _obtain(self, seat: Seat, record: CommitRecord, holders: tuple[Any, ...]) -> str | None:
        """Make the result of ``record`` ours, as an instance does: combined here, or from a holder."""
        digest = record.digest
        value = seat.final.get(digest) or self._mine(seat, record)
        for peer in holders:
            other = self.seats[self.shape.index[peer]]
            if value is None and other.alive and self._open(other.place, seat.place):
                value = other.final.get(digest)
        if value is None:
            return "no holder gives the result"
        if value != (record.members, record.weights):
            raise Broken(f"{seat.place} holds {value} as the result of {record}")
        seat.final = {digest: value}
        return None

    def _done(self, seat: Seat, commit: Commit) -> None:
        seat.commit, seat.leader = commit, None
        holders = tuple(accept.peer for accept in commit.certificate.accepts if accept.peer != seat.me)
        if self._obtain(seat, commit.record, holders) is None:
            seat.applied = seat.final[commit.record.digest]
        self._log(seat, f"COMMITS {brief(commit.record)}{'' if seat.applied else ' without its result'}")

    # -- comparing ----------------------------------------------------------------------------------

    def fingerprint(self, *, ordered: bool = False) -> int:
        """Equal for states from which the same may happen. ``ordered``: in which order messages were sent matters."""
        waiting = self.queues.items() if ordered else sorted(self.queues.items())
        queues = tuple((pair, tuple(map(hash_of, queue))) for pair, queue in waiting)
        ghosts = tuple(sorted(self.accepts.items())), tuple(sorted(digest for _, digest in self.records))
        return hash((tuple([seat.fingerprint() for seat in self.seats]), queues, self.cuts, self.held, ghosts))

    def _log(self, seat: Seat, text: str) -> None:
        if self.logged is not None:
            self.logged.append(f"    {seat.place} {text}")
