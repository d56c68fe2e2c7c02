"""A pipeline that loses stages while it trains, for sweeps over ways to recover and rates of failure.

Training is real, on one machine: the chains of :mod:`stages_models` with the functions of
:mod:`shoal.learning.pipeline.recovery`. Time is virtual: counted by :class:`Costs`, which are those of the paper's
model of 500 M (Blagoev, Ersoy, Chen, arXiv 2506.15461, Table 2). Each run is a pure function of its :class:`Case`;
until its first loss it is that without failures, which :class:`Shared` trains once.

Failures are drawn for each iteration and stage, with the probabilities of the paper's code; that of a stage whose
neighbour is lost in the same iteration is left out, as nothing but a checkpoint would help, and the paper assumes that
it does not happen. All methods see the same failures, and those at a low rate are among those at a higher one. A stage
is lost between two iterations, with its weights and moments. After a recovery by any way the stage learns at 1.1 times
the rate, with fresh moments: only the weights differ.

Without swapping there is nothing that CheckFree could do about the first and the last stage. The paper spares them, in
its code for its baselines too: that is ``checkfree:spared``. ``checkfree`` here loses them like everybody and
copies the neighbour.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..learning import exact
from ..learning.pipeline.recovery import RateScale, average, copy, gradient_norm, weights_of
from .stages_models import PROBLEMS, STAGES, SWAPPED, Pipeline, Problem

#: Failures in % per hour → probability for each stage in each iteration (the paper's code, configuration of 500 M).
RATES: Mapping[int, float] = {5: 0.0009, 10: 0.002, 16: 0.004, 33: 0.01}

#: Gradients of each stage are clipped to this norm (the paper's code).
CLIP = 1.0
#: Iterations that a run may take, in parts of those without failures, to reach the target.
PATIENCE = 1.25
#: Iterations that checkpointing may execute, likewise.
STUBBORN = 60
#: When runs without failures are asked what a recovery would do, in parts of their iterations.
MOMENTS = (0.3, 0.6, 0.9)


@attrs.frozen
class Costs:
    """Seconds of virtual time.

    ``iteration``: Table 2, CheckFree at 5 and 10 %. ``redundant``: an iteration in which each stage computes the next
    one too, Table 2, where failures cost it nothing. ``recovery``: of a lost stage by any other way (the paper: about
    30 s). ``checkpoint``: 91.35 - 91.32 s an iteration in Table 2, at ``every`` 100
    iterations (the code's for models of that size); everybody goes back to the last one, which takes a recovery.
    """

    iteration: float = 91.32
    redundant: float = 151.04
    recovery: float = 30.0
    checkpoint: float = 3.0
    every: int = 100

    def tuned(self, rate: float) -> int:
        """Iterations from checkpoint to checkpoint that cost least (Young, 1974): √(2 C / λ)."""
        return max(1, round(math.sqrt(2 * self.checkpoint / (self.iteration * STAGES * rate))))


@attrs.frozen
class Method:
    """``way``: what a lost stage becomes; ``swap``: half of the micro-batches go through swapped ends."""

    way: str
    swap: bool = False
    spared: bool = False


#: Methods that are trained, each by itself.
TRAINED: Mapping[str, Method] = {
    "random": Method("random"),
    "skip": Method("skip"),
    "copy": Method("copy"),
    "checkfree": Method("gradient"),
    "checkfree:spared": Method("gradient", spared=True),
    "checkfree+": Method("gradient", swap=True),
}
#: Without failures.
WHOLE: Mapping[str, Method] = {"none": Method("none"), "none:swapped": Method("none", swap=True)}
#: Methods that go through the very states of a run without failures, at other times.
TIMED = ("checkpoint", "checkpoint:tuned", "redundant")
METHODS = (*WHOLE, *TIMED, *TRAINED)
#: What a lost stage may become.
WAYS = ("random", "skip", "copy", "average", "gradient", "squared")


@attrs.frozen
class Case:
    """One training. ``target``: held-out loss; until it is reached a run goes on, PATIENCE ``iterations`` at most."""

    problem: str
    method: str
    rate: int
    seed: int
    iterations: int
    target: float = math.inf


@attrs.frozen
class Jump:
    """Held-out loss right before and right after the recovery of ``stage`` by ``way`` before ``iteration``."""

    iteration: int
    stage: int
    way: str
    before: float
    after: float

    @property
    def height(self) -> float:
        return self.after - self.before


@attrs.frozen
class Outcome:
    """``looks``: (iterations done, held-out loss). ``jumps``: of what happened; ``probes``: of what would have."""

    looks: tuple[tuple[int, float], ...]
    jumps: tuple[Jump, ...]
    probes: tuple[Jump, ...]

    def at(self, iterations: int) -> float:
        """The loss at the last look by then."""
        return [loss for done, loss in self.looks if done <= iterations][-1]

    def reaching(self, target: float) -> int | None:
        """Iterations done at the first look at which the loss was no higher."""
        return next((done for done, loss in self.looks if loss <= target), None)


# -- failures and time -------------------------------------------------------------------------------------------------


def failures(seed: int, rate: float) -> Iterator[tuple[int, ...]]:
    """For each iteration from the first on: the stages that are lost right before it; before the first: none."""
    draw = np.random.default_rng([seed, 7])
    yield ()
    while True:
        for row in draw.random((1024, STAGES)) < rate:
            lost: list[int] = []
            for stage in np.flatnonzero(row):
                if not lost or stage - lost[-1] > 1:
                    lost.append(int(stage))
            yield tuple(lost)


def lost_by(method: Method, stages: Sequence[int]) -> tuple[int, ...]:
    """Those of ``stages`` that ``method`` loses too."""
    return tuple(stage for stage in stages if not (method.spared and stage in (0, STAGES - 1)))


def times(method: str, seed: int, rate: int, iterations: int, costs: Costs) -> NDArray[np.float64]:
    """Virtual hours at which the state after 0, 1, ... ``iterations`` iterations is there for the first time.

    inf: not within STUBBORN times as many. ``rate``: % per hour, one of RATES, or 0.
    """
    seconds = np.full(iterations + 1, math.inf)
    seconds[0] = 0.0
    if method in WHOLE or method == "redundant":
        each = costs.redundant if method == "redundant" else costs.iteration
        return np.arange(iterations + 1) * each / 3600
    drawn = failures(seed, RATES[rate])
    now = 0.0
    if method in TRAINED:
        for done, lost in enumerate(itertools.islice(drawn, iterations)):
            now += costs.iteration + (costs.recovery if lost_by(TRAINED[method], lost) else 0.0)
            seconds[done + 1] = now
        return seconds / 3600
    every = costs.tuned(RATES[rate]) if method == "checkpoint:tuned" else costs.every
    done = furthest = 0
    for lost in itertools.islice(drawn, STUBBORN * iterations):
        if lost:
            now += costs.recovery
            done -= done % every
        now += costs.iteration
        done += 1
        if done > furthest:
            seconds[done], furthest = now, done
        if done % every == 0:
            now += costs.checkpoint
        if furthest == iterations:
            break
    return seconds / 3600


# -- training ----------------------------------------------------------------------------------------------------------


def first_loss(case: Case) -> int:
    """Iterations of the run without failures that ``case`` goes through as well, ``iterations`` at most."""
    if case.method in WHOLE:
        return 0
    drawn = itertools.islice(failures(case.seed, RATES[case.rate]), case.iterations)
    return next((done for done, lost in enumerate(drawn) if lost_by(TRAINED[case.method], lost)), case.iterations)


@attrs.frozen
class Start:
    """A run without failures after ``done`` iterations. ``looks``: at it until then. ``tensors``: see Chain.state."""

    done: int
    looks: tuple[tuple[int, float], ...]
    tensors: dict[str, Tensor]

    def save(self, file: Path) -> None:
        """All of it or nothing, also when the process is killed meanwhile."""
        scratch = file.with_suffix(f".{os.getpid()}")
        save_file(self.tensors, scratch, {"done": str(self.done), "looks": json.dumps(self.looks)})
        scratch.replace(file)

    @staticmethod
    def load(file: Path) -> Start | None:
        """None where there is none."""
        try:
            with safe_open(file, "pt") as opened:
                told = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError):
            return None
        return Start(int(told["done"]), tuple((done, loss) for done, loss in json.loads(told["looks"])), tensors)


@attrs.frozen
class Shared:
    """:func:`run` for a sweep. Until the first loss a run is bit for bit the one without failures: it begins from what
    that left of it in ``folder``. ``plan``: (method, rate) of all runs to come. Picklable."""

    folder: Path
    plan: tuple[tuple[str, int], ...]

    def __call__(self, case: Case) -> Outcome:
        if case.method not in WHOLE:
            whole = "none:swapped" if TRAINED[case.method].swap else "none"
            start = Start.load(self._file(attrs.evolve(case, method=whole), first_loss(case)))
            return run(case, start)
        beside = [attrs.evolve(case, method=method, rate=rate) for method, rate in self.plan if method in TRAINED]
        wanted = {first_loss(each) for each in beside if TRAINED[each.method].swap == WHOLE[case.method].swap}
        return run(case, keep=lambda start: start.save(self._file(case, start.done)), at=wanted)

    def _file(self, case: Case, done: int) -> Path:
        name = f"{case.problem}-{case.method}-{case.seed}-{case.iterations}-{done}.safetensors"
        return self.folder / name.replace(":", "-")


def run(
    case: Case,
    start: Start | None = None,
    *,
    keep: Callable[[Start], None] | None = None,
    at: Collection[int] = (),
) -> Outcome:
    """Train; deterministic. ``start``: of the run without failures at the case's first loss or before, to begin from
    with the same result. ``keep`` gets what other runs can begin from, once the iterations ``at`` are done."""
    exact.prepare_torch()
    problem = PROBLEMS[case.problem]
    method = WHOLE.get(case.method) or TRAINED[case.method]
    chain = Chain(problem, case.seed)
    batches = problem.batches(case.seed)
    lost_at = failures(case.seed, RATES[case.rate]) if case.rate else itertools.repeat(())
    moments = {round(moment * case.iterations) for moment in MOMENTS} if case.method in WHOLE else set[int]()
    looks, jumps, probes = list[tuple[int, float]](), list[Jump](), list[Jump]()
    if start is None:
        looks.append((0, chain.held_out()))
    else:
        chain.restore(start.tensors)
        looks += start.looks
        for _ in itertools.islice(zip(batches, lost_at, strict=False), start.done):
            pass
    #: The loss of the weights as they are, once it is known.
    now = looks[-1][1] if start is None else None
    for done in itertools.count(start.done if start is not None else 0):
        if keep is not None and done in at:
            keep(Start(done, tuple(looks), chain.state()))
        enough = done >= case.iterations and any(loss <= case.target for _, loss in looks)
        if enough or done >= round(PATIENCE * case.iterations):
            break
        if done in moments:
            probes += chain.probe(done)
        for stage in lost_by(method, next(lost_at)):
            before = chain.held_out() if now is None else now
            chain.recover(stage, method.way, done)
            now = chain.held_out()
            jumps.append(Jump(done, stage, method.way, before, now))
        chain.step(*next(batches), swap=method.swap)
        now = None
        if (done + 1) % problem.looks == 0:
            now = chain.held_out()
            looks.append((done + 1, now))
    return Outcome(tuple(looks), tuple(jumps), tuple(probes))


class Chain:
    """A pipeline with an optimiser for each stage, and one for both ends."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem, self._seed = problem, seed
        self.pipeline: Pipeline = problem.pipeline(seed)
        self.optimizers = [self._adam(stage) for stage in self.pipeline.stages]
        self._ends = nn.ModuleList([self.pipeline.enter, self.pipeline.leave])
        self._others = self._adam(self._ends) if list(self._ends.parameters()) else None
        self._seen = problem.held_out(seed)
        #: Gradient norms of the stages where the gradients themselves are not there.
        self._norms: list[float] = []

    def _adam(self, module: nn.Module) -> RateScale:
        adam = torch.optim.Adam(module.parameters(), lr=self._problem.rate, betas=(0.9, 0.999), fused=True)
        return RateScale(adam)

    def held_out(self) -> float:
        """Loss on data that is not trained on, in the usual order."""
        with torch.no_grad():
            return float(self._problem.loss(self.pipeline(self._seen[0]), self._seen[1]))

    def step(self, inputs: Tensor, targets: Tensor, *, swap: bool) -> None:
        """An iteration: of two micro-batches, the second in swapped order, or of all at once."""
        self.pipeline.zero_grad(set_to_none=True)
        self._norms = []
        loss = self._problem.loss
        if swap:
            half = len(inputs) // 2
            straight = loss(self.pipeline(inputs[:half]), targets[:half])
            total = (straight + loss(self.pipeline(inputs[half:], SWAPPED), targets[half:])) / 2
        else:
            total = loss(self.pipeline(inputs), targets)
        total.backward()  # type: ignore[no-untyped-call]
        for stage, optimizer in zip(self.pipeline.stages, self.optimizers, strict=True):
            nn.utils.clip_grad_norm_(stage.parameters(), CLIP)
            optimizer.step()
        if self._others is not None:
            nn.utils.clip_grad_norm_(self._ends.parameters(), CLIP)
            self._others.step()

    def recover(self, stage: int, way: str, salt: int) -> None:
        """Stage ``stage`` is lost and comes back by ``way``, one of WAYS."""
        self.pipeline.stages[stage].load_state_dict(self.replacement(stage, way, salt))
        self.optimizers[stage].recovered()

    def replacement(self, stage: int, way: str, salt: int) -> dict[str, Tensor]:
        """What stands in for a stage; ``salt`` draws what is random."""
        stages = self.pipeline.stages
        own = {name: tuple(tensor.shape) for name, tensor in stages[stage].state_dict().items()}
        if way in ("random", "skip"):
            fresh = self._problem.fresh(self._seed * 1_000_003 + salt * STAGES + stage + 1)
            if way == "skip":
                self._problem.silence_(fresh)
            return fresh.state_dict()
        if way == "copy" or stage in (0, STAGES - 1):
            return copy(stages[stage - 1 if stage else 1].state_dict(), own=own)
        exponent = {"average": 0.0, "gradient": 1.0, "squared": 2.0}[way]
        before, after = stages[stage - 1], stages[stage + 1]
        weights = weights_of(self._norm(stage - 1), self._norm(stage + 1), exponent)
        return average(before.state_dict(), after.state_dict(), weights, own=own)

    def _norm(self, stage: int) -> float:
        """That of the last iteration: gradients are there until the next."""
        if self._norms:
            return self._norms[stage]
        return gradient_norm(p.grad for p in self.pipeline.stages[stage].parameters())

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and gradient norms, before anything was lost: what :meth:`restore` takes. Copies."""
        found = {f"weights.{name}": tensor.clone() for name, tensor in self.pipeline.state_dict().items()}
        for number, optimizer in enumerate(self._all()):
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for name, value in optimizer.state[parameter].items():
                    found[f"moments.{number}.{index}.{name}"] = value.clone()
        norms = [self._norm(stage) for stage in range(STAGES)]
        return {**found, "norms": torch.tensor(norms, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on as if the chain had trained to where ``tensors`` are from, bit for bit."""
        weights = {name: tensors[f"weights.{name}"] for name in self.pipeline.state_dict()}
        self.pipeline.load_state_dict(weights)
        for number, optimizer in enumerate(self._all()):
            for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
                front = f"moments.{number}.{index}."
                moments = {name.removeprefix(front): t.clone() for name, t in tensors.items() if name.startswith(front)}
                optimizer.state[parameter] = moments
        self._norms = tensors["norms"].tolist()

    def _all(self) -> list[torch.optim.Optimizer]:
        scaled = [*self.optimizers, *([self._others] if self._others is not None else [])]
        return [each.optimizer for each in scaled]

    def probe(self, done: int) -> Iterator[Jump]:
        """For each stage and way: the loss if that stage were lost now. Nothing is changed."""
        before = self.held_out()
        for stage, module in enumerate(self.pipeline.stages):
            kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            for way in WAYS:
                module.load_state_dict(self.replacement(stage, way, done))
                yield Jump(done, stage, way, before, self.held_out())
            module.load_state_dict(kept)
