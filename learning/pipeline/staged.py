"""A peer in a run whose model is cut into stages: takes a stage, trains it, and takes over one that is lost.

Each stage has a run of its own, founded by its first holder, in which its replicas average with the strategy and the
rule of the whole: rounds, state, joining and healing are those of any run (:mod:`..run`). What couples the stages is
the flow of micro-batches (:mod:`.trainer`). A stage that nobody holds is founded anew, as the next generation of its
run, with weights made of what others have (:mod:`.rescue`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import attrs
import torch
import trio
from torch import Tensor

from ...dht.blobs.node import Blobs
from ...transport.endpoint import Endpoint
from ...transport.errors import ConfigError, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ..run import Run
from ..shard import Shard
from ..spec import SignedSpec, StageOf
from ..state import Layout, flatten_model, unflatten
from ..store import RunStore
from ..strategies import resolve as resolve_strategy
from ..sync import state_digest
from ..task import Signature, Task, compare_signatures, signature
from . import defaults
from .abilities import UNKNOWN, able, costs, usual
from .copies import Copies
from .crew import Crew
from .cutting import stages_of, whole_names
from .holding import Holding
from .messages import Seat
from .planner import assign, place, rescuer
from .rescue import Rescued, rescue, warm_up
from .trainer import StageTrainer

log = logging.getLogger(__name__)


class MakeRun(Protocol):
    """Makes the run of a stage: see :class:`shoal.learning.run.Run`."""

    def __call__(
        self, signed: SignedSpec, trainer: StageTrainer, store: RunStore, origin: dict[str, Tensor] | None
    ) -> Run: ...


@attrs.frozen
class Berth:
    """The stage that is taken: ``signed``: its run. ``origin``: what it begins with, when it is founded so. ``kept``: a
    state of it is kept here."""

    stage: int
    signed: SignedSpec
    origin: dict[str, Tensor] | None = None
    how: str = ""
    kept: bool = False


def signature_of_stages(task: Task, stages: int) -> Signature:
    """Names, shapes and dtypes of a model that is cut so: names begin with the number of the stage. Blocking."""
    return _numbered(stages_of(task, stages))


def _numbered(cut: Sequence[torch.nn.Module]) -> Signature:
    return tuple(
        attrs.evolve(each, name=f"{number}.{each.name}")
        for number, module in enumerate(cut)
        for each in signature(module)
    )


class Staged:
    """``conduct`` runs a stage's run until it is over or cancelled; ``stored`` opens the store of a name.
    ``memory``: bytes that this peer can use, 0: not known. ``wants_whole``: fetch all stages at the end, for an export.
    ``tell``: sentences for people."""

    def __init__(
        self,
        endpoint: Endpoint,
        crew: Crew,
        task: Task,
        *,
        make: MakeRun,
        conduct: Callable[[Run], Awaitable[None]],
        stored: Callable[[str], RunStore],
        device: str = "cpu",
        memory: int = 0,
        wants_whole: bool = False,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        self.endpoint, self.crew, self.task, self.host, self.me = endpoint, crew, task, endpoint.host, endpoint.peer_id
        self.spec = crew.spec
        assert self.spec.pipeline is not None
        self.cut = self.spec.pipeline
        self._all = range(self.cut.stages)
        self._make, self._conduct, self._stored, self._device, self._tell = make, conduct, stored, device, tell
        self._memory, self._wants_whole = memory, wants_whole
        #: The whole model by the task's names, at the end, where it was asked for.
        self.whole: dict[str, Tensor] | None = None
        strategy = resolve_strategy(self.spec.strategy, dict(self.spec.strategy_args))
        self._steps_of_round, self._gossip = strategy.round_steps, not strategy.replicated
        self.reason = "starting"
        #: Of the stage that is held, or was held last.
        self.trainer: StageTrainer | None = None
        self._models: list[torch.nn.Module] = []
        self._lost_since: dict[int, float] = {}
        #: Of each lost stage: the neighbours that were lost at the same time.
        self._lost_with: dict[int, dict[int, None]] = {}
        #: Stages that somebody was seen to hold.
        self._seen: dict[int, None] = {}
        self._begun = self._resumed = self._warm = False
        #: Where a new plan wants us; and how often one did.
        self._next: int | None = None
        self._moves = 0

    async def run(self) -> None:
        """Take part until the run is over. Raises :class:`ConfigError` for a task that cannot be cut so."""
        fresh = await self.host.run_blocking(self._cut)
        wrong = compare_signatures(_numbered(self._models), self.spec.parameters)
        if wrong is not None:
            raise ConfigError(f"the model does not match the run's: {wrong}")
        self.layouts = tuple(Layout.of(module) for module in self._models)
        self._signatures = [signature(module) for module in self._models]
        self._models = []
        sizes = tuple(layout.size for layout in self.layouts)
        self.holding = Holding(self.crew, sizes)
        store = await self.host.run_blocking(lambda: self._stored("held").blobs)
        blobs = Blobs(self.endpoint, self.crew.dht, store)
        self.copies = Copies(self.crew, sizes, blobs, steps=self._steps_of_round, gossip=self._gossip, tell=self._tell)
        await self.copies.restore()
        self._fresh = fresh
        self.crew.say(memory=self._memory)
        while not self.crew.over():
            berth = await self._choose()
            if berth is None:
                break
            await self._hold(berth)
        self.reason = "the run is over"
        if self._wants_whole:
            try:
                self.whole = await self._gather()
            except RemoteError as error:
                self._tell(f"the whole model could not be had: {error}")
        # We need nobody any more; what is held here stays until nobody needs that either.
        self.crew.say(state="finished", part=b"")

    async def _gather(self) -> dict[str, Tensor]:
        """The whole model, by the task's own names. Raises :class:`RemoteError` when a stage is not to be had."""
        found: dict[str, Tensor] = {}
        names = await self.host.run_blocking(whole_names, self.task, self.cut.stages)
        for stage, layout in enumerate(self.layouts):
            held = await self.holding.fetch_any(stage) or await self.copies.newest(stage)
            if held is None:
                raise RemoteRefused(
                    "not-held", f"nobody has stage {stage} any more: the model cannot be exported whole"
                )
            found |= {names[stage][name]: tensor for name, tensor in unflatten(layout, held.weights).items()}
        return found

    async def others_done(self) -> None:
        """Return once nobody needs our stage any more."""
        while any(
            self.crew.beat(peer).state != "spare" and self.crew.beat(peer).part
            for peer in self.crew.peers()
            if peer != self.me
        ):
            changed = self.crew.changed
            with trio.move_on_after(defaults.LOOK_EVERY):
                await changed.wait()

    def _cut(self) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed % (1 << 63))
            self._models = stages_of(self.task, self.cut.stages)
        return [flatten_model(Layout.of(module), module) for module in self._models]

    # -- which stage --------------------------------------------------------------------------------------------------

    async def _choose(self) -> Berth | None:
        """The stage to take; waits until there is one. None when the run is over."""
        resumed = await self._resume()
        if resumed is not None:
            return resumed
        while not self.crew.over():
            berth = await self._seat()
            if berth is not None:
                return berth
            changed = self.crew.changed
            with trio.move_on_after(defaults.LOOK_EVERY):
                await changed.wait()
        return None

    async def _seat(self) -> Berth | None:
        held = [bool(self.crew.holders(stage)) for stage in self._all]
        self._begun = self._begun or any(held)
        plan = self._plan()
        mine = next((seat.stage for seat in plan if seat.peer == self.me), None)
        if not self._begun and not plan:
            return None
        lost = self._lost()  # also where all are held: then that is noted
        if not all(held):
            # At the beginning each stage is founded by the first one who is to hold it; later by a rescuer.
            for number, here in enumerate(held):
                seats = [seat.peer for seat in plan if seat.stage == number and self.crew.alive(seat.peer)]
                if not here and seats and min(seats) == self.me and number not in self._seen:
                    return self._found(number, 0)
                if number in lost and self._rescuer(number) == self.me:
                    return await self._rescue(number)
            if mine is None or not held[mine]:
                self.reason = "waiting for stages to be taken"
                return None
        wanted, self._next = self._next, None
        if wanted is not None and held[wanted]:
            stage: int | None = wanted
        else:
            stage = mine if mine is not None and held[mine] and not self._moves else self._best()
        return None if stage is None else self._join(stage)

    def _plan(self) -> tuple[Seat, ...]:
        """Who begins with which stage: the founder says so once enough peers are there."""
        founder = self.spec.founder
        if founder != self.me:
            beat = self.crew.beats.get(founder)
            return () if beat is None else tuple(seat for seat in beat.plan if seat.stage < self.cut.stages)
        if self.crew.own.plan or self._begun:
            return self.crew.own.plan
        peers, wanted = self.crew.peers(), max(self.spec.min_peers, self.cut.stages)
        if len(peers) < wanted:
            self.reason = f"{len(peers)} of {wanted} peers are here"
            return ()
        seats, reason = assign([able(self.crew, peer, UNKNOWN) for peer in peers], costs(self.layouts, UNKNOWN))
        if len(set(seats.values())) < self.cut.stages:
            self.reason = reason
            return ()
        self._tell(f"stages: {reason}")
        plan = tuple(Seat(PeerId(peer), stage) for peer, stage in sorted(seats.items()))
        self.crew.say(plan=plan)
        return plan

    def _held(self) -> dict[bytes, int]:
        """Everybody's stage but ours, of those who have shown its run."""
        seats = {bytes(peer): s for s in self._all for peer in self.crew.holders(s, loading=True)}
        return {peer: stage for peer, stage in seats.items() if peer != self.me}

    def _best(self) -> int | None:
        """Where a peer that comes later is of most use."""
        held, known = self._held(), usual(self.crew)
        others = [able(self.crew, PeerId(peer), known) for peer in held]
        found = place(able(self.crew, self.me, known), others, costs(self.layouts, known), held)
        if found is None:
            self.reason = "no stage fits into the memory of this peer"
        return found

    def _elsewhere(self, stage: int) -> int | None:
        """Where we should go from ``stage``, by the plan that all make of what they see. One peer moves at a time, but
        never the last holder of a stage, and not while a stage has none (:meth:`_rescuer`)."""
        counts, states = [len(self.crew.holders(each)) for each in self._all], map(self.crew.beat, self.crew.peers())
        if counts[stage] < 2 or not all(counts) or any(beat.state in ("loading", "resuming") for beat in states):
            return None
        held, known = {**self._held(), bytes(self.me): stage}, usual(self.crew)
        peers = [able(self.crew, PeerId(peer), known) for peer in held]
        seats, reason = assign(peers, costs(self.layouts, known), held=held)
        movers = sorted(peer for peer, at in seats.items() if at != held[peer])
        if not movers or movers[0] != self.me:
            return None
        self._tell(f"this peer goes from stage {stage} to stage {seats[movers[0]]}: {reason}")
        return seats[movers[0]]

    # -- lost stages --------------------------------------------------------------------------------------------------

    def _lost(self) -> list[int]:
        """Stages that were held and have been without a holder for a while."""
        now, lost = self.host.now(), []
        for stage in self._all:
            if self.crew.holders(stage):
                self._lost_since[stage], self._seen[stage], self._begun = now, None, True
                self._lost_with.pop(stage, None)
            elif self._begun:
                since = self._lost_since.setdefault(stage, now)
                if now - since >= self._grace(stage):
                    self._note_neighbours(stage)
                    lost.append(stage)
        return lost

    def _note_neighbours(self, stage: int) -> None:
        """``stage`` is lost: so are neighbours that have no holder either, and they know it of each other."""
        for other in (stage - 1, stage + 1):
            alone = other in self._all and not self.crew.holders(other)
            if alone and other not in self._lost_with.setdefault(stage, {}):
                self._lost_with[stage][other] = self._lost_with.setdefault(other, {})[stage] = None
                self._tell(
                    f"stages {min(stage, other)} and {max(stage, other)}, which are neighbours, are lost at once: each "
                    "goes on from the newest checkpoint that peers keep of it"
                )

    def _grace(self, stage: int) -> float:
        """Seconds that a stage may be without a holder."""
        if self.crew.resuming(stage):
            return defaults.RESUME_GRACE
        if stage in self._seen:
            return defaults.LOST_GRACE
        # Whoever held it may be about to start as well, after a restart of all; or whoever is to begin with it.
        if self._resumed or any(map(self.crew.resuming, self._all)):
            return defaults.RESUME_GRACE
        return defaults.BEGIN_GRACE if self._plan() else defaults.LOST_GRACE

    def _rescuer(self, lost: int) -> PeerId | None:
        holders = {stage: [bytes(p) for p in self.crew.holders(stage)] for stage in self._all}
        # Who is about to load a stage is as free: no round takes it in while another stage is lost.
        spares = [bytes(peer) for peer in self.crew.peers() if self.crew.beat(peer).state in ("spare", "loading")]
        found, self.reason = rescuer(holders, spares, lost)
        if found is None:
            self.reason += "; waiting for a peer to join"
            return None
        return PeerId(found)

    async def _watch(self, berth: Berth, run: Run, scope: trio.CancelScope) -> None:
        """While a stage is held: leave it for one that is lost or needs us more, when another run of it won, or when
        the run is over."""
        # What a move brings is an estimate: who has moved is slower to move again.
        pause = defaults.REPLAN_EVERY * 2 ** min(self._moves, defaults.MAX_DOUBLINGS)
        steady, look, since = self._view(), self.host.now() + pause, self.host.now()
        reason = told = self.reason
        while True:
            lost = self._lost()
            if not lost:
                self.reason = told = reason
            named = any(self._rescuer(stage) == self.me for stage in lost)
            since = since if named else self.host.now()
            if named and self.host.now() - since >= defaults.NAMED:
                if lost != [berth.stage]:
                    self._tell(f"stage {lost[0]} is lost: this peer leaves stage {berth.stage} for it")
                break
            if self.reason != told:
                told = self.reason
                self._tell(told)
            part = self.crew.part(berth.stage)
            if part is not None and part[1] != berth.signed.run_id and self.crew.own.part == berth.signed.run_id:
                self._tell(f"stage {berth.stage} was taken over by others meanwhile: its run is joined anew")
                break
            if self.crew.over() and berth.stage != 0:
                break
            if self._view() != steady:
                steady, look = self._view(), max(look, self.host.now() + defaults.REPLAN_STEADY)
            elif self.host.now() >= look:
                look = self.host.now() + pause
                if self.crew.own.state == "ready" and (there := self._elsewhere(berth.stage)) is not None:
                    self._next, self._moves = there, self._moves + 1
                    break
            changed = self.crew.changed
            with trio.move_on_after(defaults.LOOK_EVERY):
                await changed.wait()
        # The other replicas must not wait for us: our link stays, only this run of it ends.
        await run.leave()
        scope.cancel()

    def _view(self) -> tuple[tuple[PeerId, str, int], ...]:
        """Who holds what."""
        beats = [(peer, self.crew.beat(peer)) for peer in self.crew.peers()]
        return tuple((peer, beat.state, beat.stage) for peer, beat in beats)

    async def _rescue(self, stage: int) -> Berth:
        generation = 1 + max(0, self.crew.generation(stage))
        found = await self._own(stage) or await rescue(
            self.crew, self.holding, self.copies, self.task, stage, self.layouts, self._fresh[stage],
            dead=self._lost_with.get(stage, {}), swap=self.cut.swap, exponent=defaults.NORM_EXPONENT,
        )  # fmt: skip
        self._tell(f"stage {stage} was lost and goes on here: {found.how}")
        return self._found(stage, generation, {"weights": found.weights}, found.rounds, found.how)

    # -- berths ------------------------------------------------------------------------------------------------------

    def _found(
        self, stage: int, generation: int, origin: dict[str, Tensor] | None = None, rounds: int = 0, how: str = ""
    ) -> Berth:
        whole, left = self.spec, max(1, self.spec.rounds - rounds)
        rate = 1.0 if generation == 0 else defaults.RECOVERED_RATE
        step = 0 if generation == 0 else self.crew.usual_step()
        origin = origin or {"weights": self._fresh[stage]}
        spec = attrs.evolve(
            whole,
            parameters=self._signatures[stage],
            founder=self.me,
            created=self.host.wall(),
            min_peers=1,
            rounds=left if stage == 0 and whole.rounds else 0,
            origin=state_digest(0, origin),
            part=StageOf(self.crew.run_id, stage, generation, rate, step),
        )
        return Berth(stage, SignedSpec.sign(self.endpoint.identity, spec), origin, how)

    def _join(self, stage: int) -> Berth | None:
        """The run of ``stage`` that others are in; None when nobody has shown it."""
        part = self.crew.part(stage)
        return None if part is None else Berth(stage, self.crew.parts[part[1]])

    async def _resume(self) -> Berth | None:
        """After a restart: the stage that was held here, where nobody has taken it over."""
        kept = None if self._begun else await self._kept()
        if kept is None:
            return None
        signed, of = kept
        with trio.move_on_after(defaults.RESUME_WAIT):
            while not self.crew.beats:
                await self.crew.changed.wait()
        part = self.crew.part(of.stage)
        self._begun = True
        if part is not None and part != (of.generation, signed.run_id):
            self._tell(f"stage {of.stage}, which was held here, was taken over by others meanwhile")
            return None
        self._resumed = True
        return Berth(of.stage, signed, kept=True)

    async def _kept(self) -> tuple[SignedSpec, StageOf] | None:
        """The run of a stage that was held here last, if a state of it is kept."""
        signed = await self.host.run_blocking(self._stored("held").load_spec)
        of = None if signed is None else signed.open().part
        if signed is None or of is None or of.whole != self.crew.run_id:
            return None
        return (signed, of) if await self.host.run_blocking(self._store_of(signed, of).keeps_state) else None

    def _store_of(self, signed: SignedSpec, of: StageOf) -> RunStore:
        return self._stored(f"{of.stage}-{signed.run_id.hex()[:12]}")

    async def _own(self, stage: int) -> Rescued | None:
        """The newest state of ``stage`` that is kept here, where nothing came after it."""
        kept = await self._kept()
        if kept is None or kept[1].stage != stage or kept[1].generation != self.crew.generation(stage):
            return None
        found = await self.host.run_blocking(self._store_of(*kept).load_state)
        if found is None or found[0]["weights"].numel() != self.layouts[stage].size:
            return None
        rounds = self._rounds_of(kept[1], found[1].record.round)
        return Rescued(found[0]["weights"], rounds, f"what this peer kept of it after round {rounds}")

    def _rounds_of(self, of: StageOf, round: int) -> int:
        """Rounds of the whole run when the run of a stage has done ``round``: a later generation counts anew."""
        return of.step // self._steps_of_round + round

    # -- holding a stage ----------------------------------------------------------------------------------------------

    async def _hold(self, berth: Berth) -> None:
        spec = berth.signed.open()
        assert spec.part is not None
        wrong = self.crew.prove(berth.signed, berth.stage, spec.part.generation)
        if wrong is not None:
            raise ConfigError(f"the run of stage {berth.stage} that is kept here cannot be gone on with: {wrong}")
        state = "resuming" if berth.kept else "loading"
        self.crew.say(state=state, stage=berth.stage, part=berth.signed.run_id, generation=spec.part.generation)
        await self.host.run_blocking(self._stored("held").save_spec, berth.signed)
        shard = Shard(self.spec.seed, self.me.key, 0, 0, 1)
        trainer = self.trainer = await self.host.run_blocking(
            StageTrainer, self.crew, self.task, spec.part, shard, self._steps_of_round, self._device
        )
        await trainer.load(self._fresh[berth.stage] if berth.origin is None else berth.origin["weights"])
        if berth.origin is not None:
            self.holding.trainer = trainer
            self.crew.say(state="ready", step=trainer.flow.step)
        run = self._make(berth.signed, trainer, self._store_of(berth.signed, spec.part), berth.origin)
        self.copies.run = run
        self.reason = f"stage {berth.stage} of {self.cut.stages}" + (f": {berth.how}" if berth.how else "")
        if berth.how:
            run.emit("run", "recovered", detail=f"stage {berth.stage}: {berth.how}")
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, berth, run, scope)
                    nursery.start_soon(self._report, spec.part, run, trainer)
                    nursery.start_soon(self.copies.keep, berth.stage)
                    if not self._warm:
                        self._warm = True
                        nursery.start_soon(warm_up, self.host, self.task, shard)
                    await self._conduct(run)
                    nursery.cancel_scope.cancel()
        finally:
            if (run.finished.is_set() and berth.stage == 0) or self.crew.over():
                # Others may still fetch the stage: it goes with the last word.
                self.crew.say(state="finished")
            else:
                self.holding.trainer = self.copies.run = None
                self.crew.say(state="spare", part=b"", generation=0)

    async def _report(self, of: StageOf, run: Run, trainer: StageTrainer) -> None:
        """Say how far the stage is."""
        said = 0
        while True:
            if self.crew.own.state == "ready":
                self.holding.trainer = trainer
            if run.round != said:
                said = run.round
                self.crew.say(rounds=self._rounds_of(of, said))
            await trio.sleep(defaults.LOOK_EVERY)
