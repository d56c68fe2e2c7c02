"""One run on one peer: membership, rounds and state around a strategy that knows nothing of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import trio
from torch import Tensor

from ..dht.blobs.node import Blobs
from ..dht.kademlia.node import Dht
from ..transport import deadlines
from ..transport.address import Address
from ..transport.endpoint import Endpoint
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults
from .chain import Chain
from .checkpoints import Keeper, Keeping
from .events import Event, RoundReport, RunStatus
from .exchange import Contribution, Exchange
from .faults import Faults, with_a_bit_turned
from .gossip import Gossip
from .liars import Liars
from .membership import Membership
from .peer import Group, OutOfStep, Peer, Round, Tally, Trainer
from .placing import rule_of, setting_of
from .reduce.probes import Probes
from .replay import Ledger
from .rounds.actions import Note
from .rounds.hub import Hub
from .rounds.instance import Instance
from .rounds.messages import CommitRecord
from .rounds.post import Post
from .rounds.presence import Presence
from .shard import Shard
from .snapshots import Snapshot, Snapshots
from .spec import SignedSpec
from .standing import Standings
from .state import Layout
from .store import Head, RunStore
from .strategies import resolve as resolve_strategy
from .task import Task, compare_signatures, metric_name, score, signature
from .telling import export, status_of
from .worker import Worker

log = logging.getLogger(__name__)


class Run:
    """Takes part in the run that ``spec`` names, until cancelled. See :class:`shoal.learning.spec.RunSpec`.

    ``bootstrap``: addresses of peers that may know the run. ``trainer``: what trains instead of a
    :class:`Worker` on the task (a user's own loop); it brings its ``model``. ``time_budget``: seconds to train per
    round instead of the strategy's number of steps; the mean is then weighted by samples. ``origin``: the state that
    the founder begins with, where the spec names one.
    Raises :class:`ConfigError` when the task's model is not the run's.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        dht: Dht,
        spec: SignedSpec,
        task: Task,
        *,
        store: RunStore,
        device: str = "cpu",
        on_event: Callable[[Event], None] = lambda event: None,
        time_budget: float | None = None,
        evaluate_every: int = 1,
        faults: Faults | None = None,
        bootstrap: tuple[Address, ...] = (),
        trainer: Trainer | None = None,
        keeping: Keeping | None = None,
        origin: dict[str, Tensor] | None = None,
    ) -> None:
        self.endpoint, self.dht, self.host, self.me = endpoint, dht, endpoint.host, endpoint.peer_id
        self.signed, self.spec, self.run_id = spec, spec.open(), spec.run_id
        self.task, self.store, self.time_budget, self.bootstrap = task, store, time_budget, bootstrap
        #: The mean is weighted by samples: peers train unequal numbers of them.
        self.weighs_samples = time_budget is not None
        self.faults, self.origin, self.name = faults or Faults(), origin, self.me.key
        self.strategy = resolve_strategy(self.spec.strategy, dict(self.spec.strategy_args))
        self.rule = rule_of(self.spec, self.strategy)
        self._on_event, self._evaluate_every = on_event, evaluate_every
        self._start = self.host.now()
        alone = Shard(self.spec.seed, self.me.key, 0, 0, 1)
        self.trainer: Trainer = trainer or Worker(self.host, task, alone, device, still=self.strategy.ledger)
        wrong = compare_signatures(signature(self.trainer.model), self.spec.parameters)
        if wrong is not None:
            raise ConfigError(f"the model does not match the run's: {wrong}")
        self.layout, self.gossip = Layout.of(self.trainer.model), not self.strategy.replicated
        self.blobs = Blobs(endpoint, dht, store.blobs)
        self.shelf = Snapshots(self.blobs, store.folder)
        #: The model itself as a vector, where it stays what it is until the end of a round.
        self._vector: Tensor | None = getattr(self.trainer, "vector", None)
        self.standings, self.liars = Standings(self.me), Liars(self)
        self._keeper = Keeper(self.host, store, self.run_id, keeping or Keeping(), self.emit)
        self.ledger, self.restored = Ledger(), dict[str, Tensor]()
        self.owned: dict[str, Tensor] = {}
        self.reports, self.reported = list[RoundReport](), 0  # the latest of them, and how many there were
        self.finished = trio.Event()
        self.round = self.round_now = 0
        self.phase, self.reason = "join", "starting"
        self._peer = Peer(self, self.trainer)
        self._instance: Instance | None = None
        self.exchange: Exchange | None = None
        self._given: Tally | None = None  # what was trained for the contribution of the round that is exchanged
        self._flipped: dict[int, None] = {}
        self._strategy_scope, self._adopted = trio.CancelScope(), False
        self._open: Round | None = None
        self._metric_name = metric_name(task, {})
        self._metric: float | None = None
        self._loss: float | None = None
        self._round_began = self._trained = self._worked = 0.0
        self._saved_at, self._entered = -math.inf, False
        self._pending_report: RoundReport | None = None

    # -- life ---------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Join or found, train, commit; serve the state to others; until cancelled. ``finished`` is set after the
        last round of a finite run. Cancelled, it saves the state and says goodbye to the run (bounded, under 1 s)."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.post = Post(self.endpoint, self.nursery)
                self.presence = Presence(self.endpoint, self.nursery)
                self.hub = Hub(self.endpoint, self.post)
                self.presence.on_change = self._presence_changed
                self.probes = Probes(self.endpoint, self.nursery, partial(self.emit, "run", "line", self.me))
                self.membership: Membership = Gossip(self) if self.gossip else Chain(self)
                self.presence.on_link = self.membership.found
                self._entered = True
                await self.host.run_blocking(self.store.save_spec, self.signed)
                self.owned = await self.host.run_blocking(self.store.load_own)
                await self.nursery.start(self.standings.run, self.host, self.store)
                self.nursery.start_soon(self.dht.announce, self.run_id, defaults.SCOUT_EVERY)
                self.nursery.start_soon(self.blobs.run)
                self.nursery.start_soon(self.membership.scout)
                task_status.started()
                await self._live()
                self.phase, self.reason = "finished", f"all {self.spec.rounds} rounds are done"
                self.emit("run", "finished")
                await self._keeper.idle()
                self.finished.set()
                await self.save()
                await trio.sleep_forever()
        finally:
            with trio.move_on_after(deadlines.goodbye(), shield=True):
                await self.save()
                self.emit("run", "left")
            self.store.close()

    async def _live(self) -> None:
        while True:
            self.phase = "join"
            self._adopted = False
            await self.membership.enter()
            self._peer.forget()
            if not self._adopted:
                await self._rewind()
            with trio.CancelScope() as self._strategy_scope:
                try:
                    await self.strategy.run(self._peer)
                except OutOfStep as error:
                    self.emit("run", "out-of-step", detail=error.message)
                    continue
                finally:
                    self._close_instance()
            if not self._strategy_scope.cancelled_caught:
                return

    async def _rewind(self) -> None:
        """We begin anew where we were, but the model and what is kept have gone on since."""
        if self.snapshots and self.snapshots[-1].round == self.round:
            last = self.snapshots[-1]
            self.restored = {name: vector for name, vector in last.vectors.items() if name != "weights"}
            if not last.live:
                await self.trainer.load(last.vectors["weights"])

    def step_aside(self, why: str) -> None:
        """Leave the present round and state: something better was found. :meth:`Membership.enter` decides anew."""
        self.emit("run", "step-aside", detail=why)
        self._strategy_scope.cancel()

    async def leave(self) -> None:
        """Tell the others that we go, so that nobody waits for us. Bounded; failures do not matter."""
        if not self._entered:
            return
        with trio.move_on_after(deadlines.goodbye()):
            await self.membership.leave()

    # -- what the strategy's objects call ------------------------------------------------------------

    def over(self) -> bool:
        """Whether a finite run has had all its rounds."""
        return 0 < self.spec.rounds <= self.round

    async def settle(self) -> None:
        """The state after the last round is final: keep, digest, evaluate, report and (now and then) save it."""
        agreed = self._peer.agreed
        weights = self._vector if agreed is None else agreed
        if weights is None:
            weights = await self.trainer.weights()
        # Copies: outer optimisers go on in place, while this is given to joiners and saved.
        kept = {name: vector.clone() for name, vector in (self._peer.vectors() or self.restored).items()}
        vectors = {"weights": weights, **kept}
        own = {name: vector.clone() for name, vector in (self._peer.own_vectors() or self.owned).items()}
        snapshot = Snapshot(self.round, vectors, self.membership.head, own, live=weights is self._vector)
        self.shelf.keep(snapshot)
        self.nursery.start_soon(self.shelf.settle, snapshot)
        self._keeper.settled(snapshot, self.nursery, final=self.over())
        due = self._evaluate_every and (self.round % self._evaluate_every == 0 or self.over())
        # All others wait for a stage that was lost: what it begins with is not looked at.
        again = self.spec.part is not None and self.spec.part.generation > 0
        if due and (self._pending_report is not None or (self._metric is None and not again)):
            values = await self.trainer.evaluate(agreed)
            self._metric, self._metric_name = score(self.task, values), metric_name(self.task, values)
        if self._pending_report is not None:
            await snapshot.ready.wait()
            metric, digest = self._metric if due else None, snapshot.digest.hex()
            report, self._pending_report = attrs.evolve(self._pending_report, metric=metric, digest=digest), None
            self.reports, self.reported = [*self.reports[-999:], report], self.reported + 1
            self.emit("commit", "done", detail=report.reason)
        if self.host.now() - self._saved_at > defaults.SAVE_EVERY:
            self._saved_at = self.host.now()
            self.nursery.start_soon(self.save)

    async def end_round(self) -> None:
        """The strategy is done with its round. Raises :class:`ConfigError` for a reduce that nobody awaited."""
        if self.exchange is not None:
            await self.exchange.settle()
            self.exchange.close("the next round has begun")
            self.exchange = None

    async def open_round(self) -> Round:
        """Begin the next round. Raises :class:`OutOfStep` when we are not among its voters."""
        place = await self.membership.place()
        self.round_now = place.round
        self._given = None
        self._round_began = self.host.now()
        self.trainer.set_shard(Shard(self.spec.seed, self.me.key, place.round, place.index, place.count))
        self.presence.watch(place.watch)
        self.probes.consider(place.watch, 4 * self.layout.size, lambda: self._given is None)
        self._instance = None
        if place.key is not None:
            self._instance = self._make_instance()
        self.exchange = Exchange(self, place.round)
        self.phase, self.reason = "train", f"round {place.round}"
        self.note(Note("train", "begin"))
        if (place.round, "train") in self.faults.hold:
            await trio.sleep_forever()
        if place.round in self.faults.flip and place.round not in self._flipped:
            self._flipped[place.round] = None
            await self.moving()
            await self.trainer.load(with_a_bit_turned(await self.trainer.weights(), self.me.key))
        peers = tuple(peer.key for peer in place.voters)
        self._open = Round(self, Group(place.round, self.me.key, peers, place.prev))
        return self._open

    def _make_instance(self) -> Instance:
        setting = setting_of(self, self._worked, self.shelf.size)
        instance = Instance(self.endpoint, self.post, setting, self.presence.lost, self.hub.memory)
        self.hub.add(instance)
        self.nursery.start_soon(instance.run)
        return instance

    def open_exchange(self, round: int) -> Exchange:
        """The exchange of ``round``. Raises :class:`ConfigError` when that is not the round we are in."""
        if self.exchange is None or round != self.round_now or self._instance is None:
            raise ConfigError(f"round {round} is not open: reduce within the loop over peer.rounds()")
        return self.exchange

    async def agree(self, given: Contribution) -> tuple[CommitRecord, Tensor]:
        """The committed record and mean of this round (fp32, 1-D), our contribution among those of the others.

        Raises :class:`OutOfStep` when it cannot be had any more.
        """
        assert self._instance is not None
        self._trained, self._worked = given.at, given.at - self._round_began
        tally = self._given = self._peer.tally
        self._peer.tally = Tally()  # what is trained from here on belongs to the next round's contribution
        gathers = given.payload is not None
        weight = tally.samples if self.weighs_samples and not gathers else 1
        while True:
            instance = self._instance
            instance.voter.layout = given.layout
            why = given.why or ("" if tally.samples or gathers else "no samples")
            vector, filling = (None, None) if why else (given.vector, given.filling)
            offered = None if why else given.payload
            instance.begin(vector, tally.samples, weight, given.length, why, filling, given.coding, offered)
            await self._until_decided(instance)
            if instance.commit is not None:
                break
            self.hub.drop(instance)
            self._instance = self._make_instance()  # of a branch: the same contribution goes into its first round
        commit, plan = instance.commit, instance.voter.plan
        given.coding.settle(self.me in commit.record.members)
        await self.membership.confirm(commit.record)
        result = await instance.outcome()
        if result is None or result.numel() != given.length:
            raise OutOfStep(f"the result of round {commit.record.round} cannot be had any more")
        if self.me not in commit.record.members and plan is not None and plan.layout != given.layout:
            raise OutOfStep(f"we reduced other tensors: {given.layout} instead of {plan.layout}")
        if self._open is not None:
            self._open.members = tuple(peer.key for peer in commit.record.members)
        self._committed(commit.record.round, instance, instance.voter.attempt + (plan.epoch if plan else 0))
        return commit.record, result

    def withdrawn(self, given: Contribution, broken: bool) -> None:
        """Our contribution is not sent, or taken back: ``given.why``. ``broken``: its numbers are not finite."""
        self.emit("convene", "refused", self.me, f"our own contribution is not sent: {given.why}")
        if broken and not self._peer.shares_optimizer:
            self.trainer.reset_optimizer()
        if self._instance is not None and self._instance.began is not None:
            self._instance.withdraw(given.why)

    @property
    def patience(self) -> float:
        """Seconds in which the rest of a contribution has to follow its beginning."""
        assert self._instance is not None
        return self._instance.setting.pace.scatter + self._instance.setting.pace.grace

    async def _until_decided(self, instance: Instance) -> None:
        async with trio.open_nursery() as nursery:

            async def guard() -> None:
                await self.membership.guard(instance)
                nursery.cancel_scope.cancel()

            nursery.start_soon(guard)
            await instance.decided.wait()
            nursery.cancel_scope.cancel()

    def waiting_since(self) -> float | None:
        """When this peer began to wait for the present round's commit; None while it trains or nothing is open."""
        instance = self._instance
        return None if instance is None or instance.commit is not None else instance.began

    async def moving(self) -> None:
        await self.shelf.moving()

    async def skip(self) -> None:
        """End a round without exchange."""
        self._trained = self.host.now()
        samples, self._peer.tally = self._peer.tally.samples, Tally()
        self.membership.skipped(samples)
        self._report(retries=0, voters=(self.me,), members=(self.me,), samples=samples, reason="local")
        await trio.lowlevel.checkpoint()

    def when_decided(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the present round is decided without us: before we began its exchange."""
        instance = self._instance
        if instance is None or instance.began is not None:
            return

        async def wait() -> None:
            await instance.decided.wait()
            if instance.began is None:
                then()

        self.nursery.start_soon(wait)

    def note_loss(self, tally: Tally) -> None:
        """Training came this far."""
        if tally.loss is not None:
            self._loss = tally.loss

    # -- commits ------------------------------------------------------------------------------------

    def _committed(self, round: int, instance: Instance, retries: int) -> None:
        commit = instance.commit
        assert commit is not None
        self.membership.committed(commit, instance.voters)
        self.hub.remember(commit)
        record = commit.record
        self._report(
            retries=retries,
            voters=instance.voters,
            members=record.members,
            samples=sum(record.samples),
            reason=record.reason,
            roster=record.roster,
            quality=instance.scales.quality_of(record),
            payload=sum(len(each.data) for each in record.payloads),
        )

    def _report(
        self,
        *,
        retries: int,
        voters: tuple[PeerId, ...],
        members: tuple[PeerId, ...],
        samples: int,
        reason: str,
        roster: tuple[PeerId, ...] | None = None,
        quality: tuple[float, ...] = (),
        payload: int = 0,
    ) -> None:
        after = voters if roster is None else roster
        self.round = self.membership.round
        now, loss, round = self.host.now(), self._loss, self.round
        self.standings.committed(round, voters, members, quality)
        dropped = tuple(peer.text for peer in voters if peer not in after)
        joined = tuple(peer.text for peer in after if peer not in voters)
        for peer in dropped:
            self.emit("commit", "dropped", PeerId.parse(peer), reason)
        for peer in joined:
            self.emit("commit", "joined", PeerId.parse(peer))
        self._pending_report = RoundReport(
            round=round,
            t=now - self._start,
            # A round is what its voters trained, so its time runs from the end of training here to the commit.
            wall_s=now - self._trained,
            members=tuple(peer.text for peer in members),
            retries=retries,
            dropped=dropped,
            joined=joined,
            reason=reason,
            samples=samples,
            loss=loss,
            metric=None,
            digest="",
            quality=quality,
            payload=payload,
        )

    def _close_instance(self) -> None:
        if self.exchange is not None:
            self.exchange.close("this peer left it")
            self.exchange = None
        if self._instance is not None and self._instance.commit is None:
            self.hub.drop(self._instance)
        self._instance = None

    async def adopt(self, vectors: dict[str, Tensor], head: Head) -> None:
        """Take over a state and the head it belongs to."""
        self._adopted = True
        self.restored = {name: vector for name, vector in vectors.items() if name != "weights"}
        await self.moving()
        await self.trainer.load(vectors["weights"])
        self.membership.adopt(head)
        self.round = self.membership.round
        self._pending_report = None

    async def save(self) -> None:
        """Write the newest final state to the store, unless the model is just leaving it; one save at a time."""
        await self.shelf.save(self.store)

    # -- what others ask ----------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """The moment, for people."""
        return status_of(self)

    def companions(self) -> tuple[PeerId, ...]:
        """Those who may still need us after the last round: who did it with us, ourselves perhaps among them."""
        return self.membership.head.voters if self.gossip else self.membership.members()

    @property
    def snapshots(self) -> list[Snapshot]:
        """The last final states."""
        return self.shelf.last

    def digest(self) -> str:
        """Hex digest of the last final state; empty before there is one."""
        ready = [snapshot.digest for snapshot in self.snapshots if snapshot.digest]
        return ready[-1].hex() if ready else ""

    async def export(self, path: Path) -> str:
        """Write the last final state to ``path``, see :func:`write_model`. Raises :class:`ConfigError` before there is
        one."""
        return await export(self, path)

    def weights(self) -> Tensor:
        """A copy of the weights of the last final state. Raises :class:`ConfigError` when there is none to read."""
        return self.shelf.weights()

    def emit(self, phase: str, what: str, peer: PeerId | None = None, detail: str = "") -> None:
        """Tell whoever watches."""
        round = self.round_now if self._instance is not None else self.round
        event = Event(self.host.now() - self._start, round, phase, what, peer.text if peer else "", detail)
        log.debug("round %d %s %s %s %s", event.round, phase, what, event.peer[:8], detail)
        self._on_event(event)

    def note(self, note: Note) -> None:
        """An event of the round machinery."""
        self.emit(note.phase, note.what, note.peer, note.detail)
        if note.what == "begin" and (self.round_now, note.phase) in self.faults.hold:
            self.emit(note.phase, "hold", self.me)

    def _presence_changed(self, peer: PeerId, why: str | None) -> None:
        self.emit("run", "lost" if why is not None else "found", peer, why or "")
        self.hub.peer_changed(peer, why)
