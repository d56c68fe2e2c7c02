"""A node's part in a run whose model is cut into stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trio
from torch import Tensor

from ..learning.files import save_state
from ..learning.pipeline.crew import Crew
from ..learning.pipeline.staged import Staged
from ..learning.pipeline.trainer import StageTrainer
from ..learning.reduce.codecs import resolve as resolve_codec
from ..learning.run import Run
from ..learning.spec import MAX_MICRO, MAX_STAGES, RECOVERIES, Pipeline, SignedSpec
from ..learning.store import RunStore
from ..learning.task import Task
from ..transport.errors import ConfigError

if TYPE_CHECKING:
    from .founding import Founding
    from .node import Node

#: Strategies that need more of a model than one stage of it.
WHOLE = {"spsa": "it has no gradients", "dimat": "it matches units across all layers"}


def cut_of(founding: Founding, *, own_loop: bool, origin: bool, apart: bool) -> Pipeline | None:
    """How the model of a run to found is cut. Raises :class:`ConfigError` for what cannot go together."""
    if not founding.stages:
        if founding.micro or founding.swap or founding.activations != "fp32" or founding.recovery != "checkfree":
            raise ConfigError("--micro-batches, --swap, --activations and --recovery are for runs with --stages")
        return None
    if not 2 <= founding.stages <= MAX_STAGES:
        raise ConfigError(f"--stages {founding.stages}: from 2 to {MAX_STAGES}")
    if not 0 <= founding.micro <= MAX_MICRO:
        raise ConfigError(f"--micro-batches {founding.micro}: from 1 to {MAX_MICRO}")
    if founding.strategy in WHOLE:
        raise ConfigError(f"--strategy {founding.strategy} does not go with --stages: {WHOLE[founding.strategy]}")
    if own_loop:
        raise ConfigError("an own training loop holds the whole model: found the run without stages")
    if origin:
        raise ConfigError("--from does not go with --stages yet: each stage begins with the task's fresh weights")
    if apart:
        raise ConfigError("--train-apart does not go with --stages")
    resolve_codec(founding.activations)
    if founding.swap and founding.stages < 4:
        raise ConfigError("--swap needs two inner stages to swap: at least 4 stages")
    if founding.recovery not in RECOVERIES:
        raise ConfigError(f"--recovery {founding.recovery}: one of {', '.join(RECOVERIES)}")
    micro = founding.micro or founding.stages
    return Pipeline(founding.stages, micro, founding.swap, founding.activations, founding.recovery)


class Stages:
    """Holds a stage for ``node``, another one when that is needed more."""

    def __init__(self, node: Node, task: Task) -> None:
        assert node.signed is not None
        self._node, self._task = node, task
        self.crew = Crew(node.endpoint, node.dht, node.signed, node._bootstrap())
        self.staged = Staged(
            node.endpoint,
            self.crew,
            task,
            make=self._make,
            conduct=self._conduct,
            stored=node.store.stage,
            device=node.config.device,
            memory=node.config.memory,
            wants_whole=node.config.whole,
            tell=node._on_note,
        )
        self.over = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the run is over, or cancelled."""
        assert self._node.signed is not None
        await self._node.host.run_blocking(self._node.store.save_spec, self._node.signed)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.crew.run)
                task_status.started()
                await self.staged.run()
                await self.crew.linger()
                with trio.move_on_after(self._node.config.linger):
                    await self.staged.others_done()
                nursery.cancel_scope.cancel()
        finally:
            # The blobs of all stages that were held.
            self._node.store.close()
        self.over.set()

    def notes(self) -> tuple[tuple[str, str], ...]:
        """Lines for ``shoal status``."""
        counts = [len(self.crew.holders(stage)) for stage in range(self.crew.stages)]
        held = ", ".join(f"{stage}: {count or 'nobody'}" for stage, count in enumerate(counts))
        trainer, more = self.staged.trainer, list[tuple[str, str]]()
        if trainer is not None:
            more.append(("flow", f"step {trainer.flow.step}: {trainer.flow.schedule.reason}"))
            if trainer.refused:
                more.append(("refused", f"{trainer.refused} micro-batches that did not fit"))
        whole = f"the run of the whole model is {self.crew.run_id.hex()[:8]}"
        return ("stage", f"{self.staged.reason}; {whole}"), ("stages", f"peers that hold each: {held}"), *more

    async def export(self, path: Path) -> str:
        """Write the whole model, as it was when the run ended. Raises :class:`ConfigError` before that."""
        if self.staged.whole is None or self._node.signed is None:
            raise ConfigError("a model in stages is exported when its run ends: start the node with --export FILE")
        rounds = max((self.crew.beat(peer).rounds for peer in self.crew.peers()), default=0)
        notes = {"round": str(rounds), "run": self.crew.run_id.hex(), "digest": "", "strategy": ""}
        await self._node.host.run_blocking(save_state, path, self.staged.whole, notes)
        return f"round {rounds}, all {self.crew.stages} stages"

    def _make(
        self, signed: SignedSpec, trainer: StageTrainer, store: RunStore, origin: dict[str, Tensor] | None
    ) -> Run:
        # The first stage evaluates, for all.
        every = None if trainer.stage == 0 else 0
        run = self._node.make_run(signed, self._task, store, trainer, origin, every)
        run.weighs_samples = True
        return run

    async def _conduct(self, run: Run) -> None:
        documents = self._node.config.documents
        of = run.spec.part
        assert of is not None
        own = None if documents is None else documents.with_name(f"stage-{of.stage}-{run.run_id.hex()[:12]}.db")
        async with trio.open_nursery() as nursery:
            await self._node.conduct(run, nursery, documents=own)
            nursery.cancel_scope.cancel()
