"""Measures what the swarm is compared with, and what its peers exported, in a process of its own.

``python -m shoal.sim.baseline``: reads a :class:`Question` as one line of JSON from standard input,
writes an :class:`Answer` as one line of JSON. A process of its own can be ended at any moment,
and two of them use two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import cattrs

from ..transport.errors import ShoalError
from . import defaults

if TYPE_CHECKING:
    import torch

    from ..learning.shard import Shard
    from ..learning.task import Task


@attrs.frozen
class Part:
    """One peer of the swarm: its id in hex, its place in the roster, and the samples it had."""

    peer: str
    index: int
    count: int
    samples: int


@attrs.frozen
class Question:
    """What to measure. ``task``: as on the command line. ``single`` and ``isolated``: whether to train these;
    ``exports``: name of a node to the safetensors file it wrote."""

    task: str
    strategy: str
    seed: int
    parts: tuple[Part, ...]
    single: bool
    isolated: bool
    exports: dict[str, str]


@attrs.frozen
class Export:
    """What a node's file holds. ``digest``: of its state, computed anew as the run's commits do, hex."""

    digest: str
    metric: float | None
    error: str = ""


@attrs.frozen
class Answer:
    """Main metric of the task: untrained, one machine, and each peer alone (in the order of the parts).

    ``replicated``: whether the strategy promises the same bits on all peers.
    """

    metric: str
    higher_is_better: bool
    replicated: bool
    start: float
    single: float | None
    isolated: tuple[float, ...]
    reference: float | None
    reference_name: str
    exports: dict[str, Export]


def answer(question: Question) -> Answer:
    """Train and measure. Blocking: either baseline takes about as long as all the swarm's steps on one core."""
    from ..learning.shard import Shard
    from ..learning.strategies import resolve as resolve_strategy
    from ..learning.task import metric_name, resolve, title

    task = resolve(question.task, allow_import=True)
    values = _evaluate(task, question.seed, None)
    total = sum(part.samples for part in question.parts)
    everything = Shard(question.seed, bytes(32), 0, 0, 1)
    alone = [part for part in question.parts if part.samples] if question.isolated else []
    isolated = tuple(
        _train(task, Shard(question.seed, bytes.fromhex(part.peer), 0, part.index, part.count), part.samples)
        for part in alone
    )
    single = _train(task, everything, total) if total and question.single else None
    reference = None
    if question.single and defaults.TASKS.get(title(task), defaults.OTHER_TASK).ngram:
        from ..learning.tasks.stdlib import ngram_baseline

        reference = ngram_baseline(2)
    return Answer(
        metric=metric_name(task, values),
        higher_is_better=task.higher_is_better,
        replicated=resolve_strategy(question.strategy, {}).replicated,
        start=_score(task, values),
        single=single,
        isolated=isolated,
        reference=reference,
        reference_name="order-2 n-gram model" if reference is not None else "",
        exports={name: _export(task, question.seed, Path(path)) for name, path in question.exports.items()},
    )


def _score(task: Task, values: dict[str, float]) -> float:
    from ..learning.task import score

    return score(task, values)


def _train(task: Task, shard: Shard, samples: int) -> float:
    """The metric after training one fresh model on ``shard`` for at least ``samples`` samples."""
    import trio

    from ..learning.worker import Worker
    from ..transport.host import RealHost

    async def work() -> float:
        worker = Worker(RealHost(), task, shard)
        done = steps = 0
        while done < samples:
            per_step = done / steps if steps else 1.0
            result = await worker.train(max(1, int((samples - done) / per_step)) if steps else 1)
            done += result.samples
            steps += result.steps
        return _score(task, await worker.evaluate())

    return trio.run(work)


def _evaluate(task: Task, seed: int, tensors: dict[str, torch.Tensor] | None) -> dict[str, float]:
    import torch

    from ..learning.task import state_tensors

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = task.model()
        for name, tensor in state_tensors(model):
            if tensors is not None:
                tensor.copy_(tensors[name])
        model.eval()
        return {name: float(value) for name, value in task.evaluate(model).items()}


def _export(task: Task, seed: int, path: Path) -> Export:
    from ..learning.files import load_state
    from ..learning.state import Layout, flatten
    from ..learning.sync import state_digest

    try:
        tensors, notes = load_state(path)
        layout = Layout.of(task.model())
        extra = {name: tensor for name, tensor in tensors.items() if name.startswith("shoal.")}
        vectors = {name.removeprefix("shoal."): tensor for name, tensor in extra.items()}
        vectors["weights"] = flatten(layout, [tensors[name] for name in layout.names])
        digest = state_digest(int(notes["round"]), vectors).hex()
        return Export(digest, _score(task, _evaluate(task, seed, tensors)))
    except (ShoalError, KeyError, ValueError) as error:
        return Export("", None, f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] = ()) -> int:
    import torch

    torch.set_num_threads(1)
    line = sys.stdin.readline()
    if not line:
        return 0
    question = cattrs.structure(json.loads(line), Question)
    sys.stdout.write(json.dumps(cattrs.unstructure(answer(question))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
