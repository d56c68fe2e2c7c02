"""Trains one stage of a model: micro-batches come and go over links, forward and backward, in steps (1F1B)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
import trio
from torch import Tensor

from ...transport import deadlines
from ...transport.errors import ConfigError, RemoteError, RemoteRefused
from ...transport.identity import PeerId
from ...transport.rpc import Call
from ..directions import Direction
from ..reduce.measured import measured
from ..rounds.methods import Ack
from ..shard import Shard
from ..spec import StageOf
from ..task import Batch, Task
from ..worker import Part, TrainResult, Worker
from . import defaults
from .abilities import bytes_of_sample, worth_saying
from .cargo import pack_batch, pack_tensor, unpack_batch
from .crew import Crew
from .cutting import StageTask, input_of, loss_of, split_batch
from .flow import Flow, Load
from .gate import Gate
from .looking import Looker
from .messages import PULL, PUSH, SEATED, STEP, Hop, Key, Pull, Push, Pushed, StepDone
from .recovery import RateScale, gradient_norm
from .schedule import Kind, way

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The others are past the step that we feed: it is begun anew as another. Internal."""


class StageTrainer(Worker):
    """A :class:`shoal.learning.peer.Trainer` for one stage, ``of`` which model. ``steps``: in one round.

    A step ends when all feeders are done with it; its gradient is the mean over the samples that passed this replica.
    Replicas through which nothing passed take no step. :meth:`train`, :meth:`gradient` and :meth:`evaluate` may be
    cancelled: a step that was begun is then begun anew next time, and leaves nothing behind.
    """

    def __init__(self, crew: Crew, task: Task, of: StageOf, shard: Shard, steps: int, device: str = "cpu") -> None:
        assert crew.spec.pipeline is not None
        cut, stage = crew.spec.pipeline, of.stage
        super().__init__(crew.host, StageTask(task, cut.stages, stage), shard, device)
        self.crew, self.whole, self.cut, self.stage, self._rate = crew, task, cut, stage, of.rate
        #: Which steps belong to a round: those of round r are ``first + (r - 1) · steps …``, on all replicas.
        self._first, self._steps_of_round = of.step, steps
        self._end: int | None = None
        self.endpoint, self.run_id = crew.endpoint, crew.run_id
        self.flow = Flow(crew.me, stage, cut.stages, of.step)
        #: L2 norm of the last step's gradient, as CheckFree weighs stages by it.
        self.norm = 1.0
        self._tokens = crew.host.random.getrandbits(40)
        self._wake = trio.Event()
        self._backs: dict[bytes, trio.Event] = {}
        #: Seconds that a micro-batch is away, smoothed; and samples computed in a second of computing.
        self._turn: float | None = None
        self._speed: float | None = None
        self._into = self._out = 0  # bytes that come and that go on for a sample
        self.gate = Gate(crew, cut.codec)
        #: Micro-batches that others sent and that could not be computed.
        self.refused = 0
        #: One of them may have left something in the sum of gradients.
        self._spoilt = False
        self._ended_at = math.inf
        self.endpoint.serve(PUSH, self._on_push)
        self.endpoint.serve(PULL, self._on_pull)
        self.endpoint.serve(STEP, self._on_step)
        self._looker = Looker(self)

    def _take_step(self, optimizer: torch.optim.Optimizer) -> None:
        RateScale(optimizer, factor=self._rate).step()

    def set_shard(self, shard: Shard) -> None:
        """See :meth:`Worker.set_shard`. Each round has steps of its own: replicas that go through it together are in
        the same ones, also who comes later or does it anew."""
        super().set_shard(shard)
        if shard.round:
            self._end = self._first + shard.round * self._steps_of_round
            self.flow.go_to(self._end - self._steps_of_round)

    # -- what a run calls ---------------------------------------------------------------------------------------------

    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult:
        """Take part in ``steps`` steps, or ``seconds`` long; see :meth:`Worker.train`. Ends early when the run does."""
        descent = self._descent(rate, drift)
        start, taken, samples, loss = self._host.now(), 0, 0, 0.0
        while (steps is None or taken < steps) and (seconds is None or self._host.now() - start < seconds):
            if self.crew.over() or (steps is not None and self._past()):
                break
            count, total = await self._step()
            if count and not await self._compute(0.0, self._descend, descent, count):
                total = math.nan  # says why this peer gives nothing
            taken, samples, loss = taken + 1, samples + count, loss + total
        return TrainResult(taken, samples, loss / samples if samples else math.nan, self._host.now() - start)

    async def gradient(self) -> tuple[Tensor, TrainResult]:
        """The mean gradient over the samples of one step that passed here, and how many those were."""
        start = self._host.now()
        count, total = await self._step()

        def work() -> tuple[Tensor, bool]:
            sound = self._divide(count)
            gradient = self._flat_gradient()
            self.optimizer.zero_grad(set_to_none=True)
            return gradient, sound

        gradient, sound = await self._compute(0.0, work)
        total = total if sound else math.nan
        return gradient, TrainResult(1, count, total / count if count else math.nan, self._host.now() - start)

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]:
        raise ConfigError("a strategy without gradients needs the whole model on each peer: leave --stages out")

    async def activations(
        self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int
    ) -> list[dict[str, Tensor]]:
        raise ConfigError("matching units needs the whole model on each peer: leave --stages out")

    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]:
        """The whole model's held-out metrics: the stages compute one after the other, where they are."""
        if self.stage != 0:
            raise ConfigError("only the first stage evaluates the model")
        return await self._looker.evaluate()

    async def infer(self, given: Tensor) -> Tensor:
        """What the stage gives for ``given``, in eval mode, without gradients."""

        def work() -> Tensor:
            self.model.eval()
            try:
                with torch.no_grad():
                    found: Tensor = self.model(given.to(self.device))
                    return found
            finally:
                self.model.train()

        return await self._compute(self.whole.step_seconds / (3 * self.cut.stages), work)

    # -- a step -------------------------------------------------------------------------------------------------------

    async def _step(self) -> tuple[int, float]:
        """Samples that count here in the next step, and their loss; their gradients are summed up in the model."""
        batch: list[tuple[Batch, int]] = []
        if self.stage == 0:
            batch = await self._compute(0.0, self._draw)
        while True:
            self.flow.restart()
            self._spoilt = False
            self.optimizer.zero_grad(set_to_none=True)
            self._say_step()
            try:
                await self._flow_through(batch)
            except Interrupted:
                if self._past():
                    # Too late for this round: a step of the next one belongs to that.
                    return 0, 0.0
                continue
            right, wrong = self.flow.counting()
            if wrong or self._spoilt:
                await self._compute(0.0, self._again, right)
            samples, loss = sum(load.samples for load in right), sum(load.loss for load in right)
            self.flow.close()
            self._ended_at = math.inf
            return samples, loss

    def _past(self) -> bool:
        """Whether the others are done with all steps of our round."""
        return self._end is not None and self.flow.step >= self._end

    def _say_step(self) -> None:
        own = self.crew.own
        rate = worth_saying(own.rate, round(1000 * self._speed) if self._speed else 0)
        line = worth_saying(own.line, measured(self.endpoint, list(self.crew.beats)).up)
        self.crew.say(step=self.flow.step, state="ready", rate=rate, line=line, into=self._into, out=self._out)

    def _draw(self) -> list[tuple[Batch, int]]:
        batch = self._next_batch()
        parts = split_batch(batch, self.cut.micro)
        return [(part, self.whole.batch_size(part)) for part in parts]

    async def _flow_through(self, batch: list[tuple[Batch, int]]) -> None:
        step, flow, self._backs = self.flow.step, self.flow, {}
        for index, (part, samples) in enumerate(batch):
            given = input_of(self.whole, part)
            key = Key(self.crew.me, step, index)
            tensors, nest = pack_batch(part, given)
            flow.feed(
                Load(
                    key,
                    self._token(),
                    None,
                    way(self.cut.stages, index, self.cut.swap),
                    0,
                    samples,
                    given,
                    tensors,
                    nest,
                )
            )
        async with trio.open_nursery() as nursery:
            while flow.step == step:
                work = flow.next()
                if work is not None:
                    await self._work(*work, nursery)
                    continue
                if self.stage == 0 and (done := flow.own_done()) is not None:
                    await self._tell_done(attrs.evolve(done, run=self.run_id))
                    break
                if self.stage != 0 and self._over():
                    break
                self._wake = trio.Event()
                with trio.move_on_after(defaults.LOOK_EVERY):
                    await self._wake.wait()
            nursery.cancel_scope.cancel()
        if flow.step != step:
            raise Interrupted

    def _over(self) -> bool:
        """Whether the step is done: by the word of all feeders that are there, but for those that keep us too long."""
        if self.crew.over():
            return True
        steps = self.crew.steps()
        feeders = [peer for peer, _ in steps]
        # Who is far behind takes nothing that is fed now, and hears nothing of it: it goes by what most feeders say.
        usual = sorted(step for _, step in steps)[(len(steps) - 1) // 2] if steps else 0
        if not self.flow.ended(feeders) and usual <= self.flow.step:
            return False
        now = self._host.now()
        if not self.flow.awaited(feeders, steps):
            return True
        self._ended_at = min(self._ended_at, now)
        return now - self._ended_at > self._patience()

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens

    async def _work(self, kind: Kind, load: Load, nursery: trio.Nursery) -> None:
        # A step may be given up meanwhile, and its schedule with it.
        schedule = self.flow.schedule
        share = self.whole.step_seconds / (3 * self.cut.stages * self.cut.micro)
        began = self._host.now()
        try:
            if kind is Kind.FORWARD:
                gradient = await self._compute(3 * share if load.last else share, self._forward, load)
            else:
                gradient = await self._compute(2 * share, self._backward_of, load)
        except Exception as error:  # boundary: what another peer sent does not go through the model here
            if load.sender is None:
                raise
            schedule.done()
            self._refuse(load, error)
            return
        schedule.done()
        load.spent += self._host.now() - began
        if load.counted:
            self._measure(load)
        if kind is Kind.FORWARD:
            if load.last:
                if load.sender is not None:
                    nursery.start_soon(self._send_back, load, gradient)
            else:
                nursery.start_soon(self._send_on, load)
        elif load.sender is not None:
            nursery.start_soon(self._send_back, load, gradient)

    def _refuse(self, load: Load, error: Exception) -> None:
        self.refused += 1
        self._spoilt = True
        self.flow.give_up(load)
        assert load.sender is not None
        log.warning("a micro-batch of %s cannot be computed and is left out: %r", load.sender.short, error)

    def _measure(self, load: Load) -> None:
        speed = load.samples / max(load.spent, 1e-9)
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed

    # -- computing (in a worker thread) -------------------------------------------------------------------------------

    def _forward(self, load: Load) -> Tensor | None:
        """The output; on the last stage the gradients too: returns that of the input."""
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            # What is random in the model is the same when it has to be computed again.
            torch.manual_seed(load.key.step * 1_000_003 + load.key.index * 1009 + self.stage)
            load.leaf = load.input.detach().to(self.device)
            load.leaf.requires_grad_(load.sender is not None and load.leaf.is_floating_point())
            output = self.model(load.leaf)
        if not load.last:
            load.output = output
            return None
        batch = unpack_batch([tensor.to(self.device) for tensor in load.tensors], load.nest)
        loss = loss_of(self.whole, batch, output) * load.samples
        loss.backward()  # type: ignore[no-untyped-call]
        load.loss, load.counted = float(loss.detach()), True
        gradient, load.leaf = load.leaf.grad, None
        return gradient

    def _backward_of(self, load: Load) -> Tensor | None:
        assert load.output is not None and load.gradient is not None and load.leaf is not None
        torch.autograd.backward(load.output, load.gradient.to(load.output))
        load.counted = True
        gradient, load.leaf, load.output = load.leaf.grad, None, load.output.detach()
        return gradient

    def _again(self, loads: Sequence[Load]) -> None:
        """The sum of exactly these gradients, computed anew."""
        self.optimizer.zero_grad(set_to_none=True)
        for load in loads:
            gradient = load.gradient
            self._forward(load)
            if not load.last:
                load.gradient = gradient
                self._backward_of(load)

    def _divide(self, samples: int) -> bool:
        """Make the sum of gradients their mean. False, and nothing is left of it, when it is not finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(max(1, samples))
        norm = gradient_norm(gradients)
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            return False
        if samples:
            self.norm = norm
        return True

    def _descend(self, descent: Any, samples: int) -> bool:
        """Take a step, unless the gradient is not finite; whether it was taken."""
        if not self._divide(samples):
            return False
        for parameter, drift in descent.drifts:
            if parameter.grad is not None:
                parameter.grad.add_(drift)
        self._take_step(descent.optimizer)
        descent.optimizer.zero_grad(set_to_none=True)
        return True

    # -- sending ------------------------------------------------------------------------------------------------------

    def _patience(self) -> float:
        return deadlines.planned_phase(defaults.TURN_FLOOR, defaults.TURN_FACTOR * (self._turn or 0.0) / 1.5, 0.0)

    async def _send_on(self, load: Load) -> None:
        """Have a replica of the next stage compute on. Until the gradient is back: dead and slow ones are replaced."""
        assert load.output is not None
        shape, data = await self._host.run_blocking(pack_tensor, load.output, self.cut.codec)
        self._out = bytes_of_sample(shape, load.samples)
        packed = [pack_tensor(tensor) for tensor in load.tensors]
        back = self._backs[load.name] = trio.Event()
        avoid: dict[PeerId, None] = {}
        stage = load.order[load.at + 1]
        while not back.is_set():
            target = self.crew.pick(stage, avoid)
            if target is None:
                avoid.clear()
                await self.crew.changed.wait()
                continue
            token, began = self._token(), self._host.now()
            load.attempts[token] = target
            push = Push(
                self.run_id, load.key, token, load.order, load.at + 1, load.samples,
                (shape, *(each for each, _ in packed)), load.nest,
            )  # fmt: skip
            avoid = dict.fromkeys([target]) if target in avoid else {**avoid, target: None}
            try:
                # A peer that dies ends the call at once.
                body = [data, *(each for _, each in packed)]
                patience = deadlines.bulk_phase(defaults.PUSH_FLOOR, sum(map(len, body)), 0.0, None)
                reply = await self.endpoint.call(target, PUSH, push, body=body, timeout=patience)
            except RemoteError:
                if load.sender is not None and load.key.feeder not in self.crew.holders(0):
                    # Who fed it has died or left for another stage: nobody takes it, and it would keep others waiting.
                    self.flow.give_up(load)
                    self._wake.set()
                    return
                await trio.sleep(defaults.RETRY)
                continue
            if reply.late:
                self._skip_to(reply.step)
                return
            with trio.move_on_after(self._patience()):
                while not back.is_set() and self.crew.alive(target):
                    changed = self.crew.changed
                    async with trio.open_nursery() as nursery:
                        for event in (back, changed):
                            nursery.start_soon(_until, event, nursery.cancel_scope)
            if back.is_set():
                turn = self._host.now() - began
                self._turn = turn if self._turn is None else 0.8 * self._turn + 0.2 * turn

    async def _send_back(self, load: Load, gradient: Tensor | None) -> None:
        assert load.sender is not None
        if gradient is None:
            gradient = torch.zeros_like(load.input, dtype=torch.float32)
        shape, data = await self._host.run_blocking(pack_tensor, gradient, self.cut.codec)
        path = (Hop(self.crew.me, load.token), *load.path)
        # Numbers in messages are finite: that a loss is not is seen by its gradient.
        loss = load.loss if math.isfinite(load.loss) else 0.0
        pull = Pull(self.run_id, load.key, load.token, path, shape, loss)
        while self.crew.alive(load.sender):
            try:
                await self.endpoint.call(load.sender, PULL, pull, body=[data])
                return
            except RemoteRefused:
                return
            except RemoteError:
                await trio.sleep(defaults.RETRY)

    async def _tell_done(self, done: StepDone) -> None:
        """Tell all stages which ways count; whoever cannot be told finds out by the next step."""

        async def tell(peer: PeerId) -> None:
            try:
                await self.endpoint.call(peer, STEP, done, timeout=deadlines.silence(defaults.BEAT_TIMEOUT, 0.0))
            except RemoteError:
                return

        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for peer in self.crew.peers():
                    beat = self.crew.beat(peer)
                    if peer != self.crew.me and beat.state in SEATED and beat.stage != 0:
                        nursery.start_soon(tell, peer)

    def _skip_to(self, step: int) -> None:
        """The others are further: what was under way here is of a step that is over."""
        if step > self.flow.step:
            self.flow.go_to(step)
            self._wake.set()

    # -- what others send ---------------------------------------------------------------------------------------------

    async def _on_push(self, call: Call[Push]) -> Pushed:
        push = call.request
        self.gate.admit(call.peer, push, self.stage)
        if push.key.step < self.flow.step:
            return Pushed(True, self.flow.step)
        given, *tensors = await self.gate.micro_batch(call, self.flow.loads.values())
        load = Load(push.key, push.token, call.peer, push.order, push.at, push.samples, given, tensors, push.nest)
        self._into = bytes_of_sample(push.shapes[0], push.samples)
        answer = self.flow.arrive(load)
        if answer == "full":
            raise RemoteRefused("busy", "too many micro-batches wait here")
        self._wake.set()
        return Pushed(answer == "late", self.flow.step)

    async def _on_pull(self, call: Call[Pull]) -> Ack:
        pull = call.request
        self.gate.known(call.peer, pull.run)
        wanted = self.flow.wants(call.peer, pull.key, pull.token)
        if wanted is None or wanted.output is None or tuple(wanted.output.shape) != pull.shape.dims:
            raise RemoteRefused("not-wanted", "that gradient is not waited for")
        # As large as what we have sent ourselves, which needs no permission. It need not be finite: a step whose
        # gradient is not is not taken.
        (gradient,) = await self.gate.read(call, [pull.shape])
        load = self.flow.returned(call.peer, pull.key, pull.token, gradient, pull.path)
        if load is None:
            raise RemoteRefused("not-wanted", "that gradient is not waited for")
        load.loss = pull.loss
        if load.name in self._backs:
            self._backs[load.name].set()
        self._wake.set()
        return Ack()

    async def _on_step(self, call: Call[StepDone]) -> Ack:
        self.gate.known(call.peer, call.request.run)
        self.gate.holds(call.peer, 0)
        self.flow.finish(call.peer, call.request)
        self._wake.set()
        return Ack()


async def _until(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
