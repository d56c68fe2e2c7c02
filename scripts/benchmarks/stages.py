"""``bench.py stages``: the only holder of a stage ends by SIGKILL; what each way to recover makes of the loss."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import cattrs
import torch
import torch.nn.functional as F
import trio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoal.learning import exact
from shoal.learning.events import Event, RoundReport
from shoal.learning.pipeline.cutting import stages_of
from shoal.learning.shard import Shard
from shoal.learning.state import Layout, flatten_model, unflatten
from shoal.learning.task import Task
from shoal.learning.tasks.stdlib import ByteGPT, StdlibSmall, windows_of
from shoal.node.node import Founding, Node, NodeConfig
from shoal.node.ticket import Ticket
from shoal.sim.stages_models import Residual
from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

from .children import Worker, end_now
from .processes import Child, Children, ask_all, children
from .report import machine, show, versions

#: Of each task, so that the stage 2 has two neighbours that are built like it.
STAGES = {"teacher": 4, "text": 5}
#: Seconds that a run may take.
PATIENCE = 900.0


class Deep(StdlibSmall):
    """Three blocks of width 48, so that a stage has neighbours that are built like it. They begin with torch's usual
    weights, not with zeros where branches end: a stage that is drawn anew must differ from one that is skipped."""

    name: ClassVar[str] = "text"
    width: ClassVar[int] = 48
    layers: ClassVar[int] = STAGES["text"] - 2
    context: ClassVar[int] = 64
    step_seconds: ClassVar[float] = 0.03

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, ByteGPT)
        for block in model.blocks:
            block.out.reset_parameters()  # type: ignore[union-attr,operator]
            block.down.reset_parameters()  # type: ignore[union-attr,operator]
        return model

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Nats per byte of 16 windows of held-out text, under the metric's name."""
        windows = torch.from_numpy(windows_of(self.corpus().held_out, self.context).astype("int64"))[::8]
        return {"bits_per_byte": float(self.loss(model, windows))}


class Pupil(Task):
    """The chain of `shoal lab stages` that learns from another one; all its stages are built alike."""

    name: ClassVar[str] = "teacher"
    metric: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False
    step_seconds: ClassVar[float] = 0.005
    width: ClassVar[int] = 32

    def model(self) -> nn.Module:
        return nn.Sequential(*(Residual(self.width) for _ in range(STAGES[self.name])))

    def silence(self, stage: nn.Module) -> None:
        assert isinstance(stage, nn.Sequential)
        for layer in stage:
            assert isinstance(layer, Residual)
            nn.init.zeros_(layer.down.weight)
            nn.init.zeros_(layer.down.bias)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(shard.entropy("inputs") >> 1)
        while True:
            x = torch.randn(64, self.width, generator=generator)
            yield x, self._taught(x)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The mean squared error on 512 fresh inputs."""
        x = torch.randn(512, self.width, generator=torch.Generator().manual_seed(2000))
        return {"error": float(F.mse_loss(model(x), self._taught(x)))}

    def _taught(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = _teacher(self.width)(x)
        return found


@functools.cache
def _teacher(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3000)
        return nn.Sequential(*(Residual(width) for _ in range(STAGES["teacher"])))


TASKS: dict[str, type[Task]] = {"teacher": Pupil, "text": Deep}
WHAT = {"teacher": "mean squared error to a teacher", "text": "held-out nats per byte"}


@attrs.frozen
class Way:
    """A way to stand the loss. ``shown``: its name in tables."""

    shown: str
    recovery: str = "checkfree"
    swap: bool = False
    dies: bool = True
    rolls_back: bool = False


WAYS = {
    "none": Way("nobody dies", dies=False),
    "checkfree": Way("CheckFree"),
    "checkfree+": Way("CheckFree+", swap=True),
    "kept": Way("copy that a peer keeps", "kept"),
    "copy": Way("copy of the stage before", "copy"),
    "skip": Way("skip", "skip"),
    "random": Way("random", "random"),
    "checkpoint": Way("checkpoint, all go back", rolls_back=True),
}


@attrs.frozen
class Found:
    """Of one run: held-out loss ``before`` the kill, ``after`` the recovery before anything was trained, at
    the ``end``. Seconds from the kill until the stage was ``held`` again, to the next ``commit`` of the first stage,
    and until that had done one round more than ever (``again``). ``how``: what the rescuer said."""

    way: str
    seed: int
    before: float
    after: float
    end: float
    held: float = 0.0
    commit: float = 0.0
    again: float = 0.0
    how: str = ""
    seconds: float = 0.0
    version: str = ""


# -- a child -----------------------------------------------------------------------------------------------------------


class StageHolder(Worker):
    """One node of a run in stages. Order ``start``, whose answer has its ticket; ``finish``, which waits for the end of
    the run; ``drop`` ends the node as if it was killed."""

    def __init__(self) -> None:
        exact.prepare_torch(1)
        self._asked: dict[str, Any] = {}
        self._node: Node | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._written = trio.Event()

    async def do(self, order: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if order == "warm":
            # What takes long at first, and what a node does before it joins: modules, the text.
            await trio.to_thread.run_sync(_warm, TASKS[arguments["task"]]())
            return {}
        if order == "start":
            self._asked, self._commits, self._reports, self._told = arguments, [], [], list[tuple[float, str]]()
            self._ended, self._scope, self._written = trio.Event(), trio.CancelScope(), trio.Event()
            node = self._node = self._make()
            self.nursery.start_soon(self._run, node, self._scope, self._ended)
            await node.taking_part.wait()
            return {"ticket": str(node.ticket())}
        if order == "drop":
            # The round after which the victim died may be committed here a little later; what it was is to be known.
            with trio.move_on_after(5.0):
                await self._written.wait()
            self._scope.cancel()
        await self._ended.wait()
        return {"commits": self._commits, "reports": self._reports, "told": self._told}

    def _make(self) -> Node:
        asked = self._asked
        founding = Founding(
            strategy="allreduce", min_peers=asked["peers"], rounds=asked["rounds"], seed=asked["seed"],
            stages=asked["stages"], micro=2, swap=asked["swap"], recovery=asked["recovery"],
        )  # fmt: skip
        secret = hashlib.blake2b(f"bench stages {asked['seed']} {asked['number']}".encode(), digest_size=32).digest()
        config = NodeConfig(
            bind=(Address("tcp", "127.0.0.1", 0),),
            folder=self._folder,
            task=asked["task"],
            founding=None if asked["ticket"] or asked["again"] else founding,
            ticket=Ticket.parse(asked["ticket"]) if asked["ticket"] else None,
            evaluate_every=asked["rounds"],
            linger=0.0,
            # The spare says that no stage fits, so that it takes none before one is lost.
            memory=1 if asked["number"] == asked["stages"] else 0,
        )
        return Node(
            RealHost(),
            Identity(secret),
            config,
            task=TASKS[asked["task"]](),
            on_event=self._event,
            on_round=self._round,
        )

    @property
    def _folder(self) -> Path:
        return Path(self._asked["folder"]) / f"node-{self._asked['number']}"

    async def _run(self, node: Node, scope: trio.CancelScope, ended: trio.Event) -> None:
        with scope:
            await node.run()
        ended.set()

    def _round(self, report: RoundReport, samples: int) -> None:
        if report.metric is not None:
            self._reports.append([report.round, report.metric])

    def _event(self, event: Event) -> None:
        node, asked = self._node, self._asked
        if node is None or node.staged is None or node.staged.staged.trainer is None:
            return
        trainer = node.staged.staged.trainer
        if event.what == "recovered" and event.phase == "run":
            self._told.append((time.monotonic(), event.detail))
            self._write("origin", trainer.stage, flatten_model(Layout.of(trainer.model), trainer.model))
        if (event.phase, event.what) != ("commit", "done") or node.run_here is None:
            return
        snapshot, crew = node.run_here.snapshots[-1], node.staged.crew
        if trainer.stage == 0:
            of = node.run_here.spec.part
            assert of is not None
            self._commits.append([time.monotonic(), of.step + snapshot.round])
        # Of a recovered stage the run counts anew; what is looked for here is all before that.
        if crew.generation(trainer.stage):
            return
        if snapshot.round in (asked["kept_at"], asked["dies_at"]) and not asked["again"]:
            self._write(str(snapshot.round), trainer.stage, snapshot.vectors["weights"])
            if snapshot.round == asked["dies_at"]:
                self._written.set()
        if snapshot.round == asked["kept_at"] and asked["keeps"] and not asked["again"]:
            # A checkpoint of a file system that outlives the peer: it blocks everything, as a consistent one would.
            node.run_here.store.save_state(snapshot.vectors, snapshot.head, snapshot.own)
            shutil.copytree(self._folder, self._folder.with_name(f"kept-{asked['number']}"))
        if snapshot.round == asked["dies_at"] and trainer.stage == asked["victim"] and not asked["again"]:
            assert len(crew.holders(trainer.stage)) == 1
            end_now(Path(asked["folder"]) / "killed")

    def _write(self, what: str, stage: int, weights: Tensor) -> None:
        save_file({"weights": weights.contiguous()}, Path(self._asked["folder"]) / f"{what}-{stage}.safetensors")


def _warm(task: Task) -> None:
    model = task.model()
    task.optimizer(model)
    task.evaluate(model)


# -- the parent --------------------------------------------------------------------------------------------------------


class Team:
    """Processes that go from run to run; who is killed is replaced. Two more than stages: the spare, and one that gets
    ready for the next run during this one, long before anybody dies."""

    def __init__(self, group: Children, options: argparse.Namespace) -> None:
        self._group, self._options, self._stages = group, options, STAGES[options.task]
        self._all: list[Child] = []

    async def run(self, way: str, seed: int, folder: Path) -> Found:
        began = time.monotonic()
        missing = self._stages + 1 - len(self._all)
        self._all += await self._group.start("stage-holder", max(0, missing))
        await ask_all(self._all, "warm", task=self._options.task)
        late = await self._group.start(
            "stage-holder", 1 if len(self._all) == self._stages + 1 and WAYS[way].dies else 0
        )
        members, spare = self._all[: self._stages], self._all[self._stages]
        method, options = WAYS[way], self._options
        common = {
            "task": options.task, "seed": seed, "stages": self._stages, "rounds": options.rounds,
            "swap": method.swap, "recovery": method.recovery,
            "victim": options.victim, "dies_at": options.at, "kept_at": options.at - options.back,
            "keeps": method.rolls_back, "folder": str(folder), "again": False,
        }  # fmt: skip
        if not method.dies:
            common["victim"] = -1
        if method.dies and not method.rolls_back:
            members = [*members, spare]
        # Also the spare is to be there, and to know the others, when training begins.
        common["peers"] = len(members)
        await self._begin(members, common)
        how, killed = "", 0.0
        if method.dies:
            victim = await _first_dead(members)
            killed = float((folder / "killed").read_text())
            survivors = [child for child in members if child is not victim]
            if method.rolls_back:
                members = [spare if child is victim else child for child in members]
                how = await self._roll_back(members, survivors, folder, common)
            else:
                members = survivors
            self._all = [*members, *late]
            await self._group.end(victim)
        answers = await ask_all(members, "finish", patience=PATIENCE)
        commits = sorted(tuple(c) for answer in answers for c in answer["commits"] if c[0] > killed)
        metrics = [metric for answer in answers for round, metric in answer["reports"] if round == options.rounds]
        told = [(t, text) for answer in answers for t, text in answer["told"] if t > killed]
        loss = functools.partial(loss_of, TASKS[options.task](), folder)
        before = loss(str(options.at))
        held = 0.0
        if not method.dies:
            after = before
        elif method.rolls_back:
            after = loss(str(options.at - options.back))
        else:
            ((at, how),) = told
            after, held = loss(str(options.at), options.victim), at - killed
        return Found(
            way, seed, before, after, metrics[-1], held,
            # The round after which it died may be committed by the others a little later.
            next(t for t, round in commits if round != options.at) - killed if killed else 0.0,
            next(t for t, round in commits if round > options.at) - killed if killed else 0.0, how,
            time.monotonic() - began, version(options),
        )  # fmt: skip

    async def _begin(self, members: Sequence[Child], common: dict[str, Any]) -> None:
        """The first founds the run, or is the first to go on with it; the others come through it."""
        answer = await members[0].ask("start", **common, number=0, ticket="")
        each = [{"number": number} for number in range(1, len(members))]
        await ask_all(members[1:], "start", each, **common, ticket=answer["ticket"])

    async def _roll_back(
        self, members: Sequence[Child], survivors: Sequence[Child], folder: Path, common: dict[str, Any]
    ) -> str:
        """What an operator with checkpoints does: end all, put the folders back, start all."""
        await ask_all(survivors, "drop")
        for number in range(self._stages):
            shutil.rmtree(folder / f"node-{number}")
            shutil.copytree(folder / f"kept-{number}", folder / f"node-{number}")
        await self._begin(members, {**common, "again": True})
        return f"all started again with what they had {common['dies_at'] - common['kept_at']} rounds before"


async def _first_dead(members: Sequence[Child]) -> Child:
    dead: list[Child] = []
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def watch(child: Child) -> None:
                await child.wait()
                dead.append(child)
                nursery.cancel_scope.cancel()

            for child in members:
                nursery.start_soon(watch, child)
    return dead[0]


def loss_of(task: Task, folder: Path, what: str, recovered: int | None = None) -> float:
    """Held-out loss of the whole model with the stages as they were written down at ``what``."""
    cut = stages_of(task, STAGES[task.name])
    for stage, module in enumerate(cut):
        name = "origin" if stage == recovered else what
        weights = load_file(folder / f"{name}-{stage}.safetensors")["weights"]
        module.load_state_dict(unflatten(Layout.of(module), weights))
    whole = nn.Sequential(*cut).eval()
    with torch.no_grad():
        return next(iter(task.evaluate(whole).values()))


def version(options: argparse.Namespace) -> str:
    """What a run kept on disk must have been made with to count."""
    return f"{options.task} {options.rounds} {options.at} {options.back} {options.victim}"


async def run(options: argparse.Namespace) -> None:
    exact.prepare_torch(1)
    found = _kept(options)
    todo = [(way, seed) for seed in range(options.seeds) for way in options.ways if (way, seed) not in found]
    began = time.monotonic()
    async with children() as group:
        team = Team(group, options)
        for done, (way, seed) in enumerate(todo):
            with tempfile.TemporaryDirectory(prefix="shoal-bench-stages-") as folder:
                one = found[way, seed] = await team.run(way, seed, Path(folder))
            left = (time.monotonic() - began) / (done + 1) * (len(todo) - done - 1) / 60
            print(
                f"{way}, seed {seed}: {one.before:.4f} → {one.after:.4f} → {one.end:.4f}; goes on after "
                f"{one.commit:.1f} s; {one.how}; {one.seconds:.0f} s, about {left:.0f} minutes left",
                flush=True,
            )
            _write(options, found)
    _table(options, [found[way, seed] for way in options.ways for seed in range(options.seeds)])


def _kept(options: argparse.Namespace) -> dict[tuple[str, int], Found]:
    """Of an earlier call with the same file and numbers."""
    if options.json is None or not options.json.exists():
        return {}
    rows = cattrs.structure(json.loads(options.json.read_text())["runs"], list[Found])
    return {(row.way, row.seed): row for row in rows if row.version == version(options)}


def _write(options: argparse.Namespace, found: dict[tuple[str, int], Found]) -> None:
    if options.json is not None:
        told = {"bench": "stages", **machine(), "versions": versions(), "runs": cattrs.unstructure([*found.values()])}
        scratch = options.json.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(told, indent=1) + "\n")
        scratch.replace(options.json)


def _table(options: argparse.Namespace, found: Sequence[Found]) -> None:
    lines = []
    for way in options.ways:
        runs = [each for each in found if each.way == way]
        dies = WAYS[way].dies
        jumps = [each.after - each.before for each in runs]
        lines.append((
            WAYS[way].shown, spread([r.before for r in runs], 3), spread([r.after for r in runs], 3) if dies else "",
            spread(jumps, 3) if dies else "", spread([r.end for r in runs], 3),
            spread([r.held for r in runs], 1) if dies and not WAYS[way].rolls_back else "",
            spread([r.commit for r in runs], 1) if dies else "", spread([r.again for r in runs], 1) if dies else "",
        ))  # fmt: skip
    columns = ("way", "before", "recovered", "jump", f"round {options.rounds}", "held, s", "goes on, s", "new round, s")
    notes = [
        f"stage {options.victim} of {STAGES[options.task]}, killed after round {options.at}, {options.back} rounds "
        f"after a checkpoint; {WHAT[options.task]}; mean ± deviation over {options.seeds} seeds"
    ]
    show("a stage's only holder is killed", columns, lines, notes)


def spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"
