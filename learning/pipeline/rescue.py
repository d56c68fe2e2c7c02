"""New weights for a stage that nobody holds: from its neighbours (CheckFree), a checkpoint, or as the founder chose."""

from __future__ import annotations

import logging
from collections.abc import Collection

import attrs
import torch
from torch import Tensor

from ...transport.errors import ConfigError
from ...transport.host import Host
from ..shard import Shard
from ..spec import Pipeline
from ..state import Layout, flatten, flatten_model, unflatten
from ..task import Task, title
from .copies import Copies, Copy
from .crew import Crew
from .cutting import stages_of
from .holding import Held, Holding
from .recovery import average, weights_of

log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Rescued:
    """``weights``: flat fp32. ``rounds``: that the stage had done. ``how``: a sentence for people."""

    weights: Tensor
    rounds: int
    how: str


def swaps(stage: int, stages: int) -> int | None:
    """The inner stage whose place ``stage`` takes in half of the micro-batches (CheckFree+); None for all others."""
    pairs = {1: 2, 2: 1} if stages >= 4 else {}
    if stages > 5:
        pairs |= {stages - 2: stages - 3, stages - 3: stages - 2}
    return pairs.get(stage)


def drawn(task: Task, stages: int, stage: int, seed: int, *, silent: bool) -> Tensor | None:
    """Flat weights of a new ``stage``, drawn from ``seed``. ``silent``: it hands on what it gets; None where it cannot.
    Blocking."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        module = stages_of(task, stages)[stage]
    if silent:
        try:
            task.silence(module)
        except ConfigError:
            return None
    return flatten_model(Layout.of(module), module)


def check_recovery(task: Task, cut: Pipeline) -> None:
    """Raises :class:`ConfigError` where the recovery of ``cut`` can never be had with this task. Blocking."""
    if cut.recovery == "skip" and all(
        drawn(task, cut.stages, stage, 0, silent=True) is None for stage in range(cut.stages)
    ):
        raise ConfigError(f"--recovery skip: task {title(task)} has no stage that can be skipped (Task.silence)")
    layouts = [Layout.of(module) for module in stages_of(task, cut.stages)] if cut.recovery == "copy" else []
    if layouts and not any(_alike(layouts[_before(stage)], layout) for stage, layout in enumerate(layouts)):
        raise ConfigError(
            f"--recovery copy: task {title(task)} in {cut.stages} stages has none that is built like the one before it"
        )


def _before(stage: int) -> int:
    """Whose copy ``stage`` becomes by ``--recovery copy``."""
    return stage - 1 if stage else 1


async def _chosen(
    crew: Crew, holding: Holding, copies: Copies, task: Task, stage: int, layouts: tuple[Layout, ...]
) -> Rescued | None:
    """As the founder wants it; None where that cannot be had, or is the usual order."""
    cut, rounds = crew.spec.pipeline, crew.usual_rounds()
    assert cut is not None
    if cut.recovery == "kept":
        copy = await copies.newest(stage)
        return None if copy is None else _from_copy(copy, rounds, "")
    if cut.recovery == "copy":
        other = _before(stage)
        held = await holding.fetch_any(other) if _alike(layouts[other], layouts[stage]) else None
        return None if held is None else Rescued(held.weights.clone(), rounds, f"a copy of stage {other}, as is wanted")
    if cut.recovery in ("random", "skip"):
        silent, salt = cut.recovery == "skip", 1 + max(0, crew.generation(stage))
        # Other numbers than at the beginning, which the neighbours have learnt to work with.
        seed = crew.spec.seed * 1_000_003 + salt * cut.stages + stage
        found = await crew.host.run_blocking(lambda: drawn(task, cut.stages, stage, seed, silent=silent))
        how = "nothing: it hands on what it gets, as is wanted" if silent else "weights drawn anew, as is wanted"
        return None if found is None else Rescued(found, rounds, how)
    return None


def _from_copy(copy: Copy, rounds: int, lost: str) -> Rescued:
    missing = max(0, rounds - copy.rounds)
    ago = f"{missing} round{'' if missing == 1 else 's'} and {copy.age:.0f} s ago"
    what = f"the checkpoint of it after round {copy.rounds}, {ago}, kept by {copy.holders} of the others"
    return Rescued(copy.weights, rounds, f"{lost}{what}")


async def rescue(
    crew: Crew,
    holding: Holding,
    copies: Copies,
    task: Task,
    stage: int,
    layouts: tuple[Layout, ...],
    fresh: Tensor,
    *,
    dead: Collection[int],
    swap: bool,
    exponent: float,
) -> Rescued:
    """Weights for ``stage``. ``layouts``: of all stages; ``fresh``: initial weights, for want of anything better;
    ``dead``: neighbours that were lost at the same time, also where somebody has them again.

    What the founder chose (:data:`RECOVERIES`), where it can be had; else, and by default, the following.

    CheckFree (arXiv 2506.15461, Alg. 1): the mean of both neighbours, weighted by the norms of their last gradients to
    the power ``exponent``. Where the outer inner stages are swapped (CheckFree+), a lost one is a copy of the stage
    that mimics it. A stage without a neighbour of its own build, and one that is lost together with a neighbour, goes
    back to the newest checkpoint of it that peers keep: what a neighbour has then is as old as that, or older.
    """
    layout = layouts[stage]
    chosen = await _chosen(crew, holding, copies, task, stage, layouts)
    if chosen is not None:
        return chosen
    alike = [other for other in (stage - 1, stage + 1) if 0 <= other < len(layouts) and _alike(layouts[other], layout)]
    near = [other for other in (stage - 1, stage + 1) if 0 <= other < len(layouts)]
    dead = [other for other in near if other in dead or not crew.holders(other) or _new(crew, other)]
    rounds = crew.usual_rounds()
    mimic = swaps(stage, len(layouts)) if swap else None
    if (
        mimic is not None
        and mimic in alike
        and mimic not in dead
        and (held := await holding.fetch_any(mimic)) is not None
    ):
        return Rescued(held.weights.clone(), rounds, f"a copy of stage {mimic}, which takes its place now and then")
    found: dict[int, Held] = {}
    for other in alike:
        if other not in dead and (held := await holding.fetch_any(other)) is not None:
            found[other] = held
    if len(found) == 2:
        before, after = found[stage - 1], found[stage + 1]
        shares = weights_of(before.state.norm, after.state.norm, exponent)
        own = dict(zip(layout.names, layout.shapes, strict=True))
        mixed = average(unflatten(layout, before.weights), unflatten(layout, after.weights), shares, own=own)
        how = f"the mean of stages {stage - 1} and {stage + 1}, weighted {shares[0]:.2f} and {shares[1]:.2f}"
        return Rescued(flatten(layout, [mixed[name] for name in layout.names]), rounds, how)
    lost = f"it was lost together with stage {' and '.join(map(str, dead))}; " if dead else ""
    copy = await copies.newest(stage)
    if copy is not None:
        return _from_copy(copy, rounds, lost)
    if found:
        ((other, held),) = found.items()
        return Rescued(held.weights.clone(), rounds, f"{lost}a copy of stage {other}; nobody kept one of this stage")
    return Rescued(fresh, rounds, f"{lost}fresh weights: no neighbour is built alike, and nobody kept a checkpoint")


def _new(crew: Crew, stage: int) -> bool:
    """Whether ``stage`` was founded anew and has done no step since: as none is done while a stage is lost, it was lost
    together with the one that still is. That is how who has come later knows it."""
    part = crew.part(stage)
    of = None if part is None else crew.parts[part[1]].open().part
    return of is not None and of.generation > 0 and of.step >= crew.usual_step()


async def warm_up(host: Host, task: Task, shard: Shard) -> None:
    """Open the data once: whoever takes the first stage over is waited for by all others, and some tasks read for
    seconds before their first batch."""
    try:
        await host.run_blocking(lambda: next(iter(task.batches(shard)), None))
    except Exception as error:  # noqa: BLE001  # boundary: the task's own code; it is told of again when the data is needed
        log.info("the data cannot be read yet: %r", error)


def _alike(one: Layout, other: Layout) -> bool:
    return (one.names, one.shapes, one.dtypes) == (other.names, other.shapes, other.dtypes)
