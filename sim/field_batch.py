"""Many replicas' training steps in one call, with the bits that each would have alone.

The replicas' parameters, and what their optimisers keep, are stacked along a new first axis; the task's own loss runs
under ``torch.vmap`` and the task's own optimiser on the stacked tensors. Two operations are done otherwise than vmap
does them, as their bits would differ: linear layers, whose weight gradient is the same product in the same order as
alone, and cross-entropy, whose mean is taken one replica at a time. Short batches are padded, and the padding has no
gradient.

Nobody promises that any other model has the same bits stacked: so the first cohorts, and every :data:`EVERY`-th one
later, are looked at: one replica is computed alone, too. One bit off, and everything is computed alone from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..learning.task import Batch, Task

#: Cohorts that are looked at from the beginning, and then every so many.
FIRST, EVERY = 3, 64

#: Replicas in one stack: beyond that its tensors leave the cache.
MOST = 128

#: Samples from which on a batch may be padded: products of fewer rows are computed by other kernels.
LEAST = 4


class Unfit(Exception):
    """This cannot be done for many at a time. Internal."""


@attrs.define(eq=False)
class Replica:
    """What trains: ``batches`` one after the other. ``losses``: of each, × samples, when it is done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    samples: list[int]
    losses: list[Tensor] = attrs.field(factory=list)
    result: Result | None = None


@attrs.frozen(eq=False)
class Result:
    """Where a replica is afterwards, not written to it yet."""

    parameters: list[Tensor]
    state: dict[int, dict[str, Any]]


def apply(replica: Replica) -> None:
    """Write what came of it to its model and optimiser."""
    result = replica.result
    assert result is not None
    with torch.no_grad():
        for index, (parameter, value) in enumerate(zip(replica.model.parameters(), result.parameters, strict=True)):
            parameter.copy_(value)
            parameter.grad = None
            if index in result.state:
                replica.optimizer.state[parameter].update(result.state[index])


def alone(task: Task, replica: Replica) -> None:
    """As :class:`shoal.learning.worker.Worker` does it, at once."""
    model, optimizer = replica.model, replica.optimizer
    model.train()
    for batch, samples in zip(replica.batches, replica.samples, strict=True):
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        replica.losses.append(loss.detach() * samples)
        optimizer.step()


class Batcher:
    """Trains replicas of one task. ``off``: why it does so one at a time; empty while it need not."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._lossy = _Lossy(task, task.model()).train()
        self._cohorts = 0
        self._padding = True
        self.off = ""
        if any(True for _ in self._lossy.buffers()):
            self.off = "a model with buffers"

    def train(self, replicas: Sequence[Replica]) -> None:
        """All of them; what comes of each is its ``result``, or in it already where that is None."""
        for cohort in _cohorts(replicas):
            if len(cohort) < 2 or self.off:
                self._alone(cohort)
                continue
            try:
                self._together(cohort)
            except (Unfit, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                # A loss that cannot be mapped over replicas (it reads numbers, draws, branches): alone it can.
                self._give_up(cohort, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            self._cohorts += 1
            if self._cohorts <= FIRST or self._cohorts % EVERY == 0:
                wrong = self._look_at(cohort[self._cohorts % len(cohort)])
                if wrong and self._padding:
                    self._padding = False  # perhaps it was that
                    self._undo(cohort)
                    self.train(cohort)
                elif wrong:
                    self._give_up(cohort, wrong)

    def _alone(self, cohort: Sequence[Replica]) -> None:
        for replica in cohort:
            alone(self._task, replica)

    @staticmethod
    def _undo(cohort: Sequence[Replica]) -> None:
        for replica in cohort:
            replica.losses, replica.result = [], None

    def _give_up(self, cohort: Sequence[Replica], why: str) -> None:
        self.off = why
        self._undo(cohort)
        self._alone(cohort)

    def _look_at(self, replica: Replica) -> str:
        """Compute it alone, in copies: what differs."""
        model = self._task.model()
        model.load_state_dict(replica.model.state_dict())
        optimizer = self._task.optimizer(model)
        for ours, own in zip(model.parameters(), replica.model.parameters(), strict=True):
            if own in replica.optimizer.state:
                optimizer.state[ours] = {
                    name: value.clone() if isinstance(value, Tensor) else value
                    for name, value in replica.optimizer.state[own].items()
                }
        copy = Replica(model, optimizer, replica.batches, replica.samples)
        alone(self._task, copy)
        assert replica.result is not None
        for index, (parameter, value) in enumerate(zip(model.parameters(), replica.result.parameters, strict=True)):
            if not torch.equal(parameter.detach(), value):
                return "stacked parameters have other bits"
            for name, kept in optimizer.state.get(parameter, {}).items():
                if isinstance(kept, Tensor) and not torch.equal(kept, replica.result.state[index][name]):
                    return f"the optimiser's stacked {name} has other bits"
        if not torch.equal(torch.stack(copy.losses), torch.stack(replica.losses)):
            return "stacked losses have other bits"
        return ""

    # -- many at a time -------------------------------------------------------------------------------

    def _together(self, cohort: Sequence[Replica]) -> None:
        stack = self._task.model()
        columns = list(zip(*(replica.model.parameters() for replica in cohort), strict=True))
        with torch.no_grad():
            for parameter, column in zip(stack.parameters(), columns, strict=True):
                parameter.data = torch.stack([each.detach() for each in column])
        optimizer = self._task.optimizer(stack)
        for parameter, column in zip(stack.parameters(), columns, strict=True):
            states = [replica.optimizer.state.get(each, {}) for replica, each in zip(cohort, column, strict=True)]
            if states[0]:
                optimizer.state[parameter] = {name: _stacked(states, name, parameter) for name in states[0]}
        names = [name for name, _ in stack.named_parameters()]
        for step in range(len(cohort[0].batches)):
            optimizer.zero_grad(set_to_none=True)
            losses = self._gradients(dict(zip(names, stack.parameters(), strict=True)), cohort, step)
            optimizer.step()
            for replica, loss in zip(cohort, losses, strict=True):
                replica.losses.append(loss * replica.samples[step])
        parameters = [parameter.detach().unbind(0) for parameter in stack.parameters()]
        kept = [
            {
                name: value.unbind(0) if _is_stacked(value, parameter) else value
                for name, value in optimizer.state.get(parameter, {}).items()
            }
            for parameter in stack.parameters()
        ]
        for row, replica in enumerate(cohort):
            state = {
                index: {name: _of_row(value, row) for name, value in each.items()}
                for index, each in enumerate(kept)
                if each
            }
            replica.result = Result([each[row] for each in parameters], state)

    def _gradients(self, parameters: dict[str, nn.Parameter], cohort: Sequence[Replica], step: int) -> list[Tensor]:
        """Into the stacked parameters' ``grad``; returns the losses."""
        parts = list(
            _alike([replica.batches[step] for replica in cohort], [r.samples[step] for r in cohort], self._padding)
        )
        losses: list[Tensor] = [torch.empty(0)] * len(cohort)
        for rows, batch, sizes in parts:
            whole = len(rows) == len(cohort)
            taken = dict(parameters) if whole else {n: p.detach()[rows].requires_grad_() for n, p in parameters.items()}
            with _Exact(sizes):
                each = torch.vmap(self._loss, randomness="error")(taken, batch)
            each.sum().backward()
            for row, loss in zip(rows, each.detach().unbind(0), strict=True):
                losses[row] = loss
            if whole:
                continue
            for name, parameter in parameters.items():
                gradient = taken[name].grad
                if gradient is not None:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad[rows] = gradient
        return losses

    def _loss(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        named = {f"model.{name}": value for name, value in parameters.items()}
        found: Tensor = functional_call(self._lossy, named, (batch,))
        return found


class _Lossy(nn.Module):
    """A model with its loss, so that another one's parameters can stand in for both."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Batch) -> Tensor:
        return self.task.loss(self.model, batch)


def _cohorts(replicas: Sequence[Replica]) -> Iterator[list[Replica]]:
    """Those with as many steps to go, and whose optimisers are as far."""
    found: dict[object, list[Replica]] = {}
    for replica in replicas:
        optimizer = replica.optimizer
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        first = next(iter(replica.model.parameters()))
        state = optimizer.state.get(first, {})
        scalars = {k: v.item() if isinstance(v, Tensor) else v for k, v in state.items() if not _is_wide(v, first)}
        found.setdefault((len(replica.batches), repr(settings), repr(scalars), tuple(state)), []).append(replica)
    for cohort in found.values():
        for start in range(0, len(cohort), MOST):
            yield cohort[start : start + MOST]


def _is_wide(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and (value.dim() > 0 or value.shape == parameter.shape)


def _stacked(states: Sequence[dict[str, Any]], name: str, parameter: Tensor) -> Any:
    first = states[0][name]
    if not isinstance(first, Tensor):
        return first
    if first.shape == parameter.shape[1:]:
        return torch.stack([state[name] for state in states])
    if first.dim():
        raise Unfit(f"the optimiser keeps a {name} of a shape of its own")
    return first.clone()


def _is_stacked(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _of_row(value: Any, row: int) -> Any:
    if isinstance(value, tuple):
        return value[row].clone()
    return value.clone() if isinstance(value, Tensor) else value


def _alike(batches: Sequence[Batch], samples: Sequence[int], padding: bool) -> Iterator[tuple[list[int], Batch, Sizes]]:
    """Batches that can be stacked, as (rows, stacked, samples of each)."""
    found: dict[object, list[int]] = {}
    for row, (batch, count) in enumerate(zip(batches, samples, strict=True)):
        pads = padding and count >= LEAST and _is_labelled(batch)
        found.setdefault("padded" if pads else (count, _shapes(batch)), []).append(row)
    for rows in found.values():
        sizes = tuple(samples[row] for row in rows)
        most = max(sizes)
        yield rows, _stack([batches[row] for row in rows], most), Sizes(sizes, most)


def _is_labelled(batch: Batch) -> bool:
    """Inputs and the numbers of their classes."""
    return (
        isinstance(batch, tuple)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
        and batch[0].is_floating_point()
        and batch[1].dtype == torch.int64
        and batch[1].dim() == 1
    )


def _shapes(batch: Batch) -> object:
    match batch:
        case Tensor():
            return tuple(batch.shape), str(batch.dtype)
        case dict():
            return tuple((key, _shapes(value)) for key, value in batch.items())
        case tuple() | list():
            return tuple(_shapes(value) for value in batch)
        case _:
            return repr(batch)


def _stack(batches: Sequence[Batch], most: int) -> Batch:
    first = batches[0]
    match first:
        case Tensor():
            if all(batch.shape == first.shape for batch in batches):
                return torch.stack(list(batches))
            stacked = first.new_zeros((len(batches), most, *first.shape[1:]))
            for row, batch in enumerate(batches):
                stacked[row, : len(batch)] = batch
            return stacked
        case dict():
            return {key: _stack([batch[key] for batch in batches], most) for key in first}
        case tuple() | list():
            return type(first)(_stack([batch[i] for batch in batches], most) for i in range(len(first)))
        case _:
            raise Unfit(f"a batch with a {type(first).__name__}")


# -- the two operations ---------------------------------------------------------------------------------


class Sizes:
    """Samples of each replica, of ``most`` rows that each has in the stack. No tuple: torch would take it apart."""

    def __init__(self, each: tuple[int, ...], most: int) -> None:
        self.each, self.most = each, most
        self.rows: dict[int, list[int]] = {}
        for row, size in enumerate(each):
            self.rows.setdefault(size, []).append(row)
        #: Where there is padding, ``(replicas, rows)``; None: nowhere.
        self.padding: Tensor | None = None
        if len(self.rows) > 1 or each[0] < most:
            self.padding = torch.arange(most)[None, :] >= torch.tensor(each)[:, None]


class _Exact(TorchFunctionMode):
    """Within it, vmap does linear layers and cross-entropy with the bits that they have alone."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and len(args) == 3 and args[0].dim() == 2 and args[2] is not None:
            return _Linear.apply(*args, self._sizes)
        if func is F.cross_entropy and len(args) == 2 and args[0].dim() == 2 and _plain_mean(kwargs):
            return _MeanOfPicked.apply(F.log_softmax(args[0], 1), args[1], self._sizes)
        return func(*args, **kwargs)


def _plain_mean(kwargs: dict[str, Any]) -> bool:
    usual = {"weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean",
             "label_smoothing": 0.0}  # fmt: skip
    return all(name in usual and usual[name] == value for name, value in kwargs.items())


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return torch.baddbmm(bias[:, None, :], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        if ctx.sizes.padding is None:
            of_bias = gradient.sum(1)
        else:
            # A sum over padding, too, would add in another order.
            of_bias = torch.empty_like(gradient[:, 0])
            for size, rows in ctx.sizes.rows.items():
                of_bias[rows] = gradient[rows, :size].sum(1)
        return of_x, torch.bmm(gradient.transpose(1, 2), x), of_bias, None


class _StackedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logs: Tensor, labels: Tensor, sizes: Sizes) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.sizes, ctx.shape = sizes, logs.shape
        pairs = zip(logs.unbind(0), labels.unbind(0), sizes.each, strict=True)
        return torch.stack([F.nll_loss(log[:size], label[:size]) for log, label, size in pairs])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (labels,) = ctx.saved_tensors
        count = torch.tensor(ctx.sizes.each, dtype=gradient.dtype)
        each = (-gradient / count)[:, None].expand(labels.shape).clone()
        if ctx.sizes.padding is not None:
            each[ctx.sizes.padding] = 0.0
        return gradient.new_zeros(ctx.shape).scatter_(2, labels[..., None], each[..., None]), None, None


class _Linear(torch.autograd.Function):
    """Of one replica; vmap makes it :class:`_StackedLinear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sizes) -> Tensor:
        raise Unfit("linear layers outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: Sizes) -> Any:
        if dims[:3] != (0, 0, 0):
            raise Unfit("a linear layer that is not stacked")
        return _StackedLinear.apply(x, weight, bias, sizes), 0


class _MeanOfPicked(torch.autograd.Function):
    """Of one replica; vmap makes it :class:`_StackedMean`."""

    @staticmethod
    def forward(logs: Tensor, labels: Tensor, sizes: Sizes) -> Tensor:
        raise Unfit("cross-entropy outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, dims: Any, logs: Tensor, labels: Tensor, sizes: Sizes) -> Any:
        if dims[:2] != (0, 0):
            raise Unfit("a loss that is not stacked")
        return _StackedMean.apply(logs, labels, sizes), 0
