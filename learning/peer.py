"""The two objects a strategy is written against: this peer, and the round it is in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import attrs
import torch
import trio
from torch import Tensor, nn

from ..transport.errors import ConfigError, RemoteError
from .directions import Direction, Move, trainable_of
from .exchange import Reducing
from .reduce.coding import Feedback
from .reduce.tensors import Tensors
from .shard import Shard
from .state import Layout
from .worker import Part, TrainResult

#: Of each of several states: what each of several modules gives, (samples, units).
Activations: TypeAlias = list[dict[str, Tensor]]


class Kept(Protocol):
    """State beside the weights that belongs to a peer's committed state: outer optimiser, control variates."""

    def vectors(self) -> dict[str, Tensor]:
        """fp32 CPU vectors by name; empty before the first step."""

    def restore(self, vectors: dict[str, Tensor]) -> None:
        """Take over what :meth:`vectors` gave."""


class Trainer(Protocol):
    """What trains the model: a :class:`Worker` on a task, or the user's own loop."""

    model: nn.Module

    def set_shard(self, shard: Shard) -> None: ...
    def reset_optimizer(self) -> None: ...
    async def train(
        self,
        steps: int | None = None,
        seconds: float | None = None,
        *,
        rate: float | None = None,
        drift: Tensor | None = None,
    ) -> TrainResult: ...
    async def gradient(self) -> tuple[Tensor, TrainResult]: ...
    async def apply(self, gradient: Tensor) -> None: ...
    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int], part: Part | None = None
    ) -> tuple[list[tuple[float, ...]], TrainResult]: ...
    async def descend(self, moves: Sequence[Move]) -> None: ...
    async def weights(self, out: Tensor | None = None) -> Tensor: ...
    async def load(self, vector: Tensor) -> None: ...
    async def fresh(self, peer: bytes) -> Tensor: ...
    async def activations(self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int) -> Activations: ...
    async def evaluate(self, vector: Tensor | None = None) -> dict[str, float]: ...


@attrs.frozen
class Group:
    """Who takes part in one round: ``peers``, in canonical order, 32 bytes each, with ``me`` among them. ``prev``: what
    nobody could know before the round, the same for all of them (in gossip groups only the run's id)."""

    round: int
    me: bytes
    peers: tuple[bytes, ...]
    prev: bytes


class Reduces(Protocol):
    """Takes the reduces of one round: :class:`.exchange.Exchange`, or a model of it."""

    def submit(
        self,
        tensors: T,
        of: int | None,
        out: T | None,
        codec: str | None = None,
        feedback: Feedback | None = None,
        *,
        why: str = "",
    ) -> Reducing[T]: ...
    async def gather(self, payload: bytes) -> dict[bytes, bytes]: ...


class Conduct(Protocol):
    """What a :class:`Peer` needs of whoever conducts its run: :class:`.run.Run`, or a model of a swarm."""

    layout: Layout
    restored: dict[str, Tensor]
    owned: dict[str, Tensor]
    time_budget: float | None

    @property
    def name(self) -> bytes: ...

    run_id: bytes

    def when_decided(self, then: Callable[[], None]) -> None: ...
    def note_loss(self, tally: Tally) -> None: ...
    async def end_round(self) -> None: ...
    async def settle(self) -> None: ...
    def over(self) -> bool: ...
    async def open_round(self) -> Round: ...
    def open_exchange(self, round: int) -> Reduces: ...
    async def skip(self) -> None: ...
    async def moving(self) -> None: ...


class OutOfStep(RemoteError):
    """The run went on without us, and what we missed is gone: load the state and begin again. Internal to the run."""


K = TypeVar("K", bound=Kept)
T = TypeVar("T", bound=Tensors)


@attrs.define
class Tally:
    """What this peer trained since the last round."""

    steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    broken: str = ""

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.samples if self.samples else None


class Peer:
    """This peer, as a strategy sees it. Weights are flat fp32 CPU vectors of the run's layout."""

    def __init__(self, run: Conduct, trainer: Trainer) -> None:
        self._run, self._trainer = run, trainer
        self._kept: dict[str, Kept] = {}
        self._owned: dict[str, Any] = {}
        self.agreed: Tensor | None = None
        self.tally = Tally()
        #: The optimiser's state is replicated: it is never ours alone to reset.
        self.shares_optimizer = False

    @property
    def id(self) -> bytes:
        """32 bytes that name this peer."""
        return self._run.name

    @property
    def run(self) -> bytes:
        """32 bytes that name the run."""
        return self._run.run_id

    @property
    def layout(self) -> Layout:
        """Where the model's tensors stand in its flat vector."""
        return self._run.layout

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that are trained."""
        return tuple(trainable_of(self._trainer.model))

    async def weights(self) -> Tensor:
        """A copy of the model's state."""
        return await self._trainer.weights()

    async def load(self, vector: Tensor) -> None:
        """Replace the model's state."""
        await self._run.moving()
        await self._trainer.load(vector)

    async def fresh(self) -> Tensor:
        """Initial weights of this peer's own: drawn from its name and the run's seed, the same whenever asked. With an
        own training loop: those that its model had before it was given the run's."""
        return await self._trainer.fresh(self.id)

    @property
    def model(self) -> nn.Module:
        """What is trained, to look at how it is built; its values change in another thread."""
        return self._trainer.model

    async def activations(self, vectors: Sequence[Tensor], modules: Sequence[str], samples: int) -> Activations:
        """What ``modules`` (by name) of the model give on about ``samples`` of this peer's own samples, with each of
        ``vectors`` as its state: for each vector a dict of matrices (samples, units), fp32 on the CPU.

        The same samples for all of them; takes none from the training. Raises :class:`ConfigError` with an own training
        loop, which keeps its data to itself.
        """
        return await self._trainer.activations(vectors, modules, samples)

    def agree(self, vector: Tensor) -> None:
        """``vector`` is the swarm's state after this round, where the model has gone on from it: it is what gets
        digested, saved, evaluated and given to joiners, from the end of this round on, and must not be written to.

        Never called, the model is the state.
        """
        self.agreed = vector

    def keep(self, name: str, state: K) -> K:
        """Make ``state`` part of the committed state: saved, digested, and given to joiners. Returns it."""
        self._kept[name] = state
        state.restore(_under(name, self._run.restored))
        return state

    def own(self, name: str, state: K) -> K:
        """Make ``state`` part of what this peer keeps for itself (a control variate): saved beside the committed state,
        told to nobody. It outlives rounds missed and restarts. Returns what is in use: ``state``, with what was saved,
        or that of an earlier call."""
        if name not in self._owned:
            self._owned[name] = state
            state.restore(_under(name, self._run.owned))
        found: K = self._owned[name]
        return found

    def optimizer_state(self) -> Kept:
        """The task's optimiser as state to :meth:`keep`."""
        optimizer = getattr(self._trainer, "optimizer", None)
        if optimizer is None:
            raise ConfigError(
                "this strategy needs the task's optimiser, which an own training loop or process keeps to itself"
            )
        self.shares_optimizer = True
        return OptimizerState(optimizer)

    async def train(self, steps: int, *, rate: float | None = None, drift: Tensor | None = None) -> int:
        """Train ``steps`` steps, or for the run's time budget; ends early when the round was decided without us.

        ``rate``: plain gradient descent with this learning rate, instead of the task's optimiser. ``drift``: a vector
        that is added to every gradient. Returns the steps taken: 0 when it ended early.
        """
        budget = self._run.time_budget
        result: TrainResult | None = None
        with trio.CancelScope() as scope:
            self._run.when_decided(scope.cancel)
            if budget is None:
                result = await self._trainer.train(steps=steps, rate=rate, drift=drift)
            else:
                result = await self._trainer.train(seconds=budget, rate=rate, drift=drift)
            self._count(result)
        return 0 if result is None else result.steps

    async def gradient(self) -> Tensor:
        """The gradient of one batch at the present weights: flat, zero for buffers."""
        gradient, result = await self._trainer.gradient()
        self._count(result)
        return gradient

    async def apply(self, gradient: Tensor) -> None:
        """One step of the task's optimiser with this gradient."""
        await self._trainer.apply(gradient)

    async def probe(
        self, directions: Sequence[Direction], eps: float, sides: Sequence[int] = (1, -1), part: Part | None = None
    ) -> list[tuple[float, ...]]:
        """For each direction z the losses at θ + side · ``eps`` · z, each direction on a batch of its own.

        In inference mode, and the model stays as it is, bit for bit. ``part``: the data, instead of our next batches.
        Ends early, with nothing, when the round was decided without us.
        """
        with trio.CancelScope() as scope:
            self._run.when_decided(scope.cancel)
            losses, result = await self._trainer.probe(directions, eps, sides, part)
            self._count(result)
            return losses
        return []

    async def descend(self, moves: Sequence[Move]) -> None:
        """Move all trainable parameters (float32) by all ``moves`` together: the same bits on every peer."""
        await self._run.moving()
        await self._trainer.descend(moves)

    def rounds(self) -> Rounds:
        """The rounds of the run, until it ends. Raises out of the loop when this peer must load the state again."""
        return Rounds(self._run)

    def vectors(self) -> dict[str, Tensor]:
        """Everything kept, by ``name.vector``."""
        return _named(self._kept)

    def own_vectors(self) -> dict[str, Tensor]:
        """Everything owned, by ``name.vector``."""
        return _named(self._owned)

    def forget(self) -> None:
        """Begin anew: what was kept is given up; what is owned stays."""
        self._kept.clear()
        self.agreed = None
        self.tally = Tally()

    def _count(self, result: TrainResult) -> None:
        self.tally.steps += result.steps
        self.tally.samples += result.samples
        if math.isfinite(result.loss_mean):
            self.tally.loss_sum += result.loss_mean * result.samples
        elif result.steps:
            self.tally.broken = f"the training loss is {result.loss_mean}"
        self._run.note_loss(self.tally)


def _under(name: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in vectors.items() if k.startswith(f"{name}.")}


def _named(states: dict[str, Kept]) -> dict[str, Tensor]:
    return {f"{name}.{key}": vector for name, kept in sorted(states.items()) for key, vector in kept.vectors().items()}


class Rounds:
    """Async iterator over rounds; between two of them the state is final, is digested, saved and evaluated."""

    def __init__(self, run: Conduct) -> None:
        self._run = run

    def __aiter__(self) -> Rounds:
        return self

    async def __anext__(self) -> Round:
        await self._run.end_round()
        await self._run.settle()
        if self._run.over():
            raise StopAsyncIteration
        return await self._run.open_round()


class Round:
    """One round: reduce tensors with the others in it. ``index``: 1 for the first round of the run."""

    def __init__(self, run: Conduct, group: Group) -> None:
        self._run, self.index, self.group = run, group.round, group
        #: Whose contributions the results are made of, once there is one.
        self.members: tuple[bytes, ...] = ()

    def sample(self, count: int) -> tuple[bytes, ...]:
        """``count`` of the peers of this round (all, if there are fewer), in canonical order: the same on all of them,
        drawn anew each round. Nobody can choose an identity that is drawn more often, but in gossip groups."""
        seed = hashlib.blake2b(b"%d" % self.index, key=self.group.prev[:64], digest_size=32).digest()
        order = sorted(self.group.peers, key=lambda peer: hashlib.blake2b(peer, key=seed, digest_size=16).digest())
        return tuple(sorted(order[:count]))

    async def reduce(
        self,
        tensors: T,
        *,
        out: T | None = None,
        codec: str | None = None,
        feedback: Feedback | None = None,
        why: str = "",
    ) -> T:
        """The mean over the members of this round of what each of them gives: the same bits on every member.

        ``tensors``: one tensor, or a list, tuple or dict of them, float32, float16 or bfloat16, of any shapes and
        strides, on any devices. The result has the same structure, shapes, dtypes and devices; the mean is taken in
        float32 and rounded once. ``out``: tensors to write the result to (``out=tensors`` for in place) and to return.
        Without it, float32 results on the CPU are views of memory from which late members are served: do not write to
        them. ``codec``: how it travels there and back, instead of as the run says (``fp32``, ``fp16``, ``bf16``,
        ``int8``, ``e3m0``, ``topk:SHARE``: docs/codecs.md); ``feedback``: what keeps this peer's error of coding.
        ``why``: this peer gives nothing, for that reason, and takes the result: ``tensors`` say only what it is like.

        All members must give tensors of the same sizes in the same order, with the same codec. Waits for the commit.
        Tensors that are not finite are not sent; the mean is then over the others. Where the run has another rule than
        the mean (docs/aggregation.md), it is that rule's result. Nobody's contribution, or fewer than the rule needs,
        give zeros. Cancelled, the round goes on without the result. Raises :class:`ConfigError` for what cannot be
        reduced, :class:`OutOfStep` when the result cannot be had any more.
        """
        handle = self.reduce_async(tensors, out=out, codec=codec, feedback=feedback, why=why)
        try:
            return await handle
        except trio.Cancelled:
            handle.cancel()
            raise

    def reduce_async(
        self,
        tensors: T,
        *,
        of: int | None = None,
        out: T | None = None,
        codec: str | None = None,
        feedback: Feedback | None = None,
        why: str = "",
    ) -> Reducing[T]:
        """:meth:`reduce` that begins at once and does not wait: await what it returns, before the next round.

        Neither ``tensors`` nor ``out`` may be written to, nor ``out`` read, until then.

        Several reduces of a round share one membership and are done together, at its commit. The first one begins the
        round: it has to say how many elements all of them have together (``of``), and what it brings travels while the
        others are still being computed. They have to follow within about the time that training took. Samples trained
        after the first one count for the next round. ``codec``, ``feedback`` and ``why`` are those of the first.
        """
        return self._run.open_exchange(self.index).submit(tensors, of, out, codec, feedback, why=why)

    async def gather(self, payload: bytes) -> dict[bytes, bytes]:
        """Give a few bytes (at most 1 KiB), and get what every member of this round gave: by the 32 bytes that name it,
        in canonical order, the same on all of them.

        It is all that happens in such a round: nothing is reduced in it, and it is agreed in one exchange. Who came too
        late is not in it. All that was given stands in the record of the round, signed by who gave it. Cancelled, the
        round goes on without the result. Raises :class:`ConfigError` for too many bytes and for a second exchange in a
        round, :class:`OutOfStep` when the result cannot be had any more.
        """
        return await self._run.open_exchange(self.index).gather(payload)

    async def skip(self) -> None:
        """End the round without any exchange."""
        await self._run.skip()


class OptimizerState:
    """A torch optimiser's per-parameter tensors as named fp32 vectors, in parameter order."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def vectors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self._parameters()):
            for key, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    found[f"{index}.{key}"] = value.detach().to("cpu", torch.float32).reshape(-1).clone()
        return found

    def restore(self, vectors: dict[str, Tensor]) -> None:
        parameters = self._parameters()
        self._optimizer.state.clear()
        for name, vector in vectors.items():
            index, _, key = name.partition(".")
            if not index.isdigit() or int(index) >= len(parameters):
                raise RemoteError(f"optimiser state {name!r} belongs to no parameter")
            parameter = parameters[int(index)]
            if vector.numel() == parameter.numel() and key != "step":
                value = vector.to(parameter.device, parameter.dtype).reshape(parameter.shape).clone()
            else:
                value = vector.clone().reshape(()) if vector.numel() == 1 else vector.clone()
            self._optimizer.state[parameter][key] = value
