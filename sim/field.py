"""Many peers that learn together in one process, in virtual time, without a network: for studies of strategies.

What is real: the strategies with their peers and rounds, training, data, codecs, the arithmetic of a reduce. What is
modelled: how long training and reduces take, and the bytes of a reduce (:mod:`.field_links`); that all agree. What is
left out: everything that can go wrong on the way. :mod:`.world` has all of it, and is too slow for hundreds of peers.
A run is a pure function of its :class:`FieldCase`; with codec fp32 four peers end with the bits that they have in
:mod:`.world` (``tests/sim/test_field.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import attrs
import torch
import trio
from torch import Tensor

from ..learning import exact, topologies
from ..learning.shard import Shard
from ..learning.state import Layout, bytes_view, flatten_model, unflatten_into
from ..learning.strategies import resolve as resolve_strategy
from ..learning.strategies.base import Strategy
from ..learning.task import Task, resolve, score
from ..learning.tasks.digits import ALPHA, Digits
from ..node.boundary import first_error
from ..transport.errors import ConfigError
from ..transport.identity import Identity, PeerId
from ..transport.memory import MemoryWorld
from .determinism import run_virtual, seeded
from .field_links import Links, transfer
from .field_rounds import Meeting
from .field_run import FieldRun
from .field_worker import FieldWorker, Gym
from .virtual import VirtualHost


@attrs.frozen
class Churn:
    """At ``time``, virtual seconds, ``peer`` says goodbye and leaves, or joins (who joins first was not there)."""

    time: float
    peer: int
    what: Literal["leave", "join"]


def _pairs(given: Mapping[str, float] | Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(dict(given).items()))


def _numbers(given: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(dict(given).items()))


@attrs.frozen
class FieldCase:
    """One run, which is a pure function of this.

    ``strategy``: a built-in one with ``args`` over those that the task recommends; or ``make_strategy`` makes it.
    ``task``: a built-in one; or ``make_task`` makes one for each peer, and ``alpha`` does not count. ``alpha``:
    Dirichlet concentration of the classes of ``digits`` over the peers, None: the same mixture for all. ``topology``
    and ``group``: see :mod:`shoal.learning.topologies`; empty and 0: as the strategy has it. ``codec``: of what is
    reduced, where the strategy says nothing else. ``slowness``: number of a peer → how many times as long its training
    takes. ``time_budget``: seconds to train in a round instead of steps, as in a run; the mean is weighted by samples.
    ``evaluate_every``: rounds; 0: only at both ends. ``local``: peers whose own models are evaluated, None: all.
    ``first``: number of the first round, of which the order of a peer's samples follows. ``batched``: replicas that
    train at the same time are computed in one call; the bits are the same (:mod:`.field_batch`).
    """

    strategy: str = "diloco"
    args: tuple[tuple[str, float], ...] = attrs.field(default=(), converter=_pairs)
    peers: int = 8
    rounds: int = 20
    seed: int = 0
    task: str = "digits"
    alpha: float | None = ALPHA
    links: Links = attrs.field(factory=Links)
    topology: str = ""
    group: int = 0
    codec: str = "fp32"
    slowness: tuple[tuple[int, float], ...] = attrs.field(default=(), converter=_numbers)
    churn: tuple[Churn, ...] = attrs.field(default=(), converter=tuple)
    time_budget: float | None = None
    evaluate_every: int = 1
    local: int | None = None
    first: int = 1
    batched: bool = True
    make_task: Callable[[], Task] | None = None
    make_strategy: Callable[[], Strategy] | None = None


@attrs.frozen
class FieldPoint:
    """After a round, when the last of its peers has ended it; round 0: before the first.

    ``seconds``: virtual time. ``sent``: bytes that each peer has sent so far, by number; ``bytes``: all of them.
    ``loss`` (None if the task has none) and ``metric``: held-out, of the mean of all states; ``local_metric``: mean
    over the peers of that of their own models. ``train_loss``: mean of what they trained in the round. ``peers``: how
    many there were.
    """

    round: int
    seconds: float
    bytes: int
    sent: tuple[int, ...]
    loss: float | None
    metric: float
    local_metric: float
    train_loss: float | None
    peers: int

    @property
    def bytes_per_peer(self) -> float:
        return self.bytes / max(1, self.peers)


@attrs.frozen(eq=False)
class FieldResult:
    """``rounds``: one point for each that was evaluated. ``weights``: number → final state, fp32, of those that were
    there at the end. ``sent``: bytes by number. ``notes``: (seconds, number, why a contribution was withdrawn)."""

    case: FieldCase
    rounds: tuple[FieldPoint, ...]
    weights: dict[int, Tensor]
    sent: tuple[int, ...]
    seconds: float
    notes: tuple[tuple[float, int, str], ...]

    @property
    def last(self) -> FieldPoint:
        return self.rounds[-1]

    def digest(self) -> str:
        """Of all points and bits: equal runs have equal digests."""
        found = hashlib.blake2b(repr((self.rounds, self.sent, self.notes)).encode(), digest_size=16)
        for number, vector in sorted(self.weights.items()):
            found.update(b"%d" % number + bytes_view(vector))
        return found.hexdigest()


@attrs.frozen(eq=False)
class Place:
    """Where a peer is in a round; ``index`` of ``count`` selects its part of the data."""

    meeting: Meeting
    index: int
    count: int


@attrs.define(eq=False)
class _Ended:
    """Those that have ended a round, with what is to be evaluated."""

    states: dict[PeerId, Tensor | None] = attrs.field(factory=dict)
    models: dict[PeerId, Tensor] = attrs.field(factory=dict)
    losses: dict[PeerId, float] = attrs.field(factory=dict)


class Field:
    """See the module and :func:`run_field`. Raises :class:`ConfigError` for a case that makes no run."""

    def __init__(self, case: FieldCase) -> None:
        self.case = case
        probe = self._task()
        if case.make_strategy is not None:
            self.strategy = case.make_strategy()
        else:
            self.strategy = resolve_strategy(
                case.strategy, {**probe.recommended.get(case.strategy, {}), **dict(case.args)}
            )
        topologies.check_strategy(case.topology, case.strategy, self.strategy.replicated, self.strategy.group)
        if case.peers < 1 or case.rounds < 0:
            raise ConfigError(f"a field of {case.peers} peers and {case.rounds} rounds")
        self.first, self.last = case.first, case.first + case.rounds - 1
        #: Peers in a group, 0: all.
        self.group = 0 if self.strategy.replicated else case.group or self.strategy.group
        self._network = MemoryWorld(seeded(case.seed, "network"))
        self.ids = tuple(identity_of(case.seed, number) for number in range(case.peers))
        self.lines = {peer: case.links.line(number) for number, peer in enumerate(self.ids)}
        self.runs: dict[int, FieldRun] = {}
        self._numbers = {peer: number for number, peer in enumerate(self.ids)}
        self._sent = [0] * case.peers
        self._rosters: dict[int, tuple[PeerId, ...]] = {}
        self._known: dict[PeerId, None] = {}
        self._seats: dict[int, dict[PeerId, int]] = {}
        self._meetings: dict[int, dict[PeerId, Meeting]] = {}
        self._living: dict[PeerId, FieldRun] = {}
        self._joining: dict[PeerId, FieldRun] = {}
        self._slowness = dict(case.slowness)
        self._changed = trio.Event()
        self._ended: dict[int, _Ended] = {}
        self._points: list[FieldPoint] = []
        self._notes: list[tuple[float, int, str]] = []
        self._gym = Gym(probe, case.batched)
        self._task_of_referee = probe
        self._referee = probe.model().eval()
        self._layout = Layout.of(self._referee)
        self.nursery: trio.Nursery

    def _task(self) -> Task:
        if self.case.make_task is not None:
            return self.case.make_task()
        return Digits(self.case.alpha) if self.case.task == "digits" else resolve(self.case.task, allow_import=False)

    # -- lives --------------------------------------------------------------------------------------

    async def run(self) -> FieldResult:
        """All rounds of all peers."""
        churn = sorted(self.case.churn, key=lambda change: change.time)
        absent = {number for number, what in {c.peer: c.what for c in reversed(churn)}.items() if what == "join"}
        async with trio.open_nursery() as self.nursery:
            for number in range(self.case.peers):
                if number not in absent:
                    self._start(number)
            for change in churn:
                self.nursery.start_soon(self._change, change)
            while self._living:
                await self._wait()
            seconds = trio.current_time()
            self.nursery.cancel_scope.cancel()
        weights = {number: self.state_of(run).clone() for number, run in sorted(self.runs.items()) if run.over()}
        return FieldResult(self.case, tuple(self._points), weights, tuple(self._sent), seconds, tuple(self._notes))

    def _start(self, number: int, join: bool = False) -> None:
        case, me = self.case, self.ids[number]
        before = self.runs.get(number)
        host = VirtualHost(f"node{number}", self._network, seed=case.seed, slowness=self._slowness.get(number, 1.0))
        trainer = FieldWorker(host, self._task(), Shard(case.seed, me.key, 0, 0, 1), host.slowness, self._gym)
        owned = before.peer.own_vectors() if before is not None else {}
        run = self.runs[number] = FieldRun(self, number, me, host, trainer, owned)
        if join:
            self._joining[run.me] = run
        else:
            self._living[run.me] = run
            self._known[run.me] = None
            self.nursery.start_soon(self._live, run, 0.0)

    async def _live(self, run: FieldRun, loading: float) -> None:
        with run.scope:
            await trio.sleep(loading)
            await self.strategy.run(run.peer)
            run.done = True
        if self._living.get(run.me) is run:
            self._gone(run)

    async def _change(self, change: Churn) -> None:
        await trio.sleep_until(change.time)
        run = self.runs.get(change.peer)
        if change.what == "join":
            if run is None or (self._living.get(run.me) is not run and not run.over()):
                self._start(change.peer, join=True)
        elif run is not None and self._living.get(run.me) is run:
            run.scope.cancel()
            self._gone(run)

    def _gone(self, run: FieldRun) -> None:
        """It has left, or has had all its rounds."""
        del self._living[run.me]
        for meetings in self._meetings.values():
            if run.me in meetings and not meetings[run.me].decided.is_set():
                meetings[run.me].leave(run.me)
        for round in sorted(self._ended):
            self._look(round)
        event, self._changed = self._changed, trio.Event()
        event.set()

    # -- rounds -------------------------------------------------------------------------------------

    def place(self, run: FieldRun, round: int) -> Place:
        """Where ``run`` is in ``round``. Who comes first fixes who takes part, with those that wait to join: they go on
        from its state."""
        if round not in self._rosters:
            for joiner in self._joining.values():
                self._admit(joiner, run, round)
            self._joining.clear()
            roster = self._rosters[round] = tuple(sorted(self._living))
            # In gossip, parts of the data do not wander when somebody leaves: see learning/gossip.py.
            parts = roster if self.strategy.replicated else tuple(sorted(self._known))
            self._seats[round] = {peer: seat for seat, peer in enumerate(parts)}
            self._meetings[round] = self._meet(round, roster)
            self._forget(round)
        seats = self._seats[round]
        return Place(self._meetings[round][run.me], seats[run.me], len(seats))

    def _admit(self, joiner: FieldRun, donor: FieldRun, round: int) -> None:
        state, kept = self.state_of(donor), donor.peer.vectors()
        joiner.restored = {name: vector.clone() for name, vector in kept.items()}
        unflatten_into(self._layout, state, joiner.trainer.model)
        joiner.round, joiner.entered = round - 1, round
        self._known[joiner.me] = None
        self._living[joiner.me] = joiner
        size = 4 * (state.numel() + sum(vector.numel() for vector in kept.values()))
        self.count(donor.me, size)
        self.nursery.start_soon(self._live, joiner, transfer(size, self.lines[donor.me], self.lines[joiner.me]))

    def _meet(self, round: int, roster: tuple[PeerId, ...]) -> dict[PeerId, Meeting]:
        case, found = self.case, {}
        if self.strategy.replicated or not (case.topology or self.group):
            groups: topologies.Groups = (roster,)
        elif self.group == 1:
            groups = tuple((peer,) for peer in roster)
        else:
            topology = case.topology or "random"
            groups, _ = topologies.groups(topology, case.seed, round, roster, self.group)
        for group in groups:
            meeting = Meeting(round, group, {peer: self.lines[peer] for peer in group}, self.count)
            found.update(dict.fromkeys(group, meeting))
        return found

    def _forget(self, round: int) -> None:
        """What nobody can still be in."""
        slowest = min((run.round for run in self._living.values()), default=round)
        for old in [old for old in self._rosters if old < slowest - 1]:
            del self._rosters[old], self._seats[old], self._meetings[old]

    def count(self, peer: PeerId, size: int) -> None:
        """``peer`` has sent so many bytes."""
        self._sent[self._numbers[peer]] += size

    def note(self, run: FieldRun, why: str) -> None:
        """For people."""
        self._notes.append((trio.current_time(), run.number, why))

    # -- what becomes of it ---------------------------------------------------------------------------

    def state_of(self, run: FieldRun) -> Tensor:
        """The state of a peer after its last round."""
        return flatten_model(self._layout, run.trainer.model) if run.peer.agreed is None else run.peer.agreed

    def settled(self, run: FieldRun) -> None:
        """``run`` has ended a round, and its state is final."""
        round, case = run.round, self.case
        if round < run.entered:
            return  # the state that it has joined with: it was not in that round
        ended = self._ended.setdefault(round, _Ended())
        every = case.evaluate_every
        due = round in (self.first - 1, self.last) or bool(every and (round - self.first + 1) % every == 0)
        state: Tensor | None = None
        if due:
            state = self.state_of(run)
            first = next(iter(ended.states.values()), None)
            if self.strategy.replicated and first is not None:
                if not torch.equal(first, state):
                    raise RuntimeError(f"replicas differ after round {round}: {run.me.short} has other bits")
                state = first
            apart = not self.strategy.replicated or run.peer.agreed is not None
            if apart and (case.local is None or len(ended.models) < case.local):
                ended.models[run.me] = (
                    state if run.peer.agreed is None else flatten_model(self._layout, run.trainer.model)
                )
            if run.loss is not None:
                ended.losses[run.me] = run.loss
        ended.states[run.me] = state
        self._look(round)

    def _look(self, round: int) -> None:
        """Make a point of a round that all have ended who are still there."""
        roster = self._rosters.get(round) or tuple(sorted(self._living))
        ended = self._ended[round]
        if any(peer in self._living and peer not in ended.states for peer in roster):
            return
        del self._ended[round]
        states = [state for _, state in sorted(ended.states.items()) if state is not None]
        if not states:
            return
        mean = states[0] if self.strategy.replicated else exact.weighted_mean(states, [1.0] * len(states))
        values = self._evaluate(mean)
        metric = score(self._task_of_referee, values)
        models = [model for _, model in sorted(ended.models.items())]
        local = [score(self._task_of_referee, self._evaluate(model)) for model in models]
        losses = [loss for _, loss in sorted(ended.losses.items())]
        self._points.append(
            FieldPoint(
                round=round - self.first + 1,
                seconds=trio.current_time(),
                bytes=sum(self._sent),
                sent=tuple(self._sent),
                loss=values.get("loss"),
                metric=metric,
                local_metric=math.fsum(local) / len(local) if local else metric,
                train_loss=math.fsum(losses) / len(losses) if losses else None,
                peers=len(states),
            )
        )

    def _evaluate(self, vector: Tensor) -> dict[str, float]:
        unflatten_into(self._layout, vector, self._referee)
        with torch.no_grad():
            return {name: float(value) for name, value in self._task_of_referee.evaluate(self._referee).items()}

    async def _wait(self) -> None:
        await self._changed.wait()


def identity_of(seed: int, number: int) -> PeerId:
    """That of node ``number`` in a world of this ``seed``: see :class:`shoal.sim.world.World`."""
    return Identity(hashlib.blake2b(f"{seed} node{number}".encode(), digest_size=32).digest()).peer_id


def run_field(case: FieldCase) -> FieldResult:
    """Train; deterministic. Raises :class:`ConfigError` for a case that makes no run, and what a strategy raises."""

    async def main() -> FieldResult:
        return await Field(case).run()

    try:
        return run_virtual(main, seed=case.seed)
    except BaseExceptionGroup as group:
        raise first_error(group) from None
