"""`shoal sim`: plan, run, compare, judge, show."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import attrs
import cattrs
import trio
from rich.console import Console

from ..learning import topologies
from ..learning.strategies import LEDGERS
from ..node.boundary import first_error
from ..node.cli import FAILED, OK
from ..transport.errors import ConfigError
from ..transport.identity import PeerId
from . import defaults
from .attack_names import LYING_OWNER
from .baseline import Answer, Part, Question
from .live import LiveView, closing
from .outputs import check_outputs
from .processes import NodeProcess, Plan, Settings, SimulationFailed, Swarm, make_plan
from .recorder import Recorder
from .report import GATHER_KILL_PHASES, KILL_PHASES, STAGE_KILL_PHASES, Baseline, Expectation, Report, judge


def simulate(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code; raises :class:`ConfigError` for arguments that make no swarm."""
    known = defaults.TASKS.get(options.task, defaults.OTHER_TASK)
    lonely = options.strategy == "local"
    if options.topology:
        topologies.check(options.topology)
    if lonely and (options.kill or options.late):
        raise ConfigError("with --strategy local nothing is exchanged: nobody can be killed in a round or join late")
    rounds = options.rounds or known.rounds * defaults.MORE_ROUNDS.get(options.strategy, 1)
    few = options.peers < 4 or rounds <= defaults.LATE_MARGIN or lonely
    liars, attack = options.byzantine or (0, "")
    few = few or bool(liars)  # one thing at a time, unless it is asked for
    kill = options.kill if options.kill is not None else int(not few)
    late = options.late if options.late is not None else int(not few)
    if attack:
        from .attacks import check  # brings torch

        check(attack)
    if options.stages and options.peers - late - kill < options.stages:
        raise ConfigError(
            f"--stages {options.stages} needs as many peers that begin the run and live; there are "
            f"{options.peers - late - kill} of --peers {options.peers} (--kill {kill}, --late {late})"
        )
    phases = GATHER_KILL_PHASES if options.strategy in LEDGERS else KILL_PHASES
    plan = make_plan(
        peers=options.peers,
        kill=kill,
        late=late,
        rounds=rounds,
        seed=options.seed,
        liars=liars,
        attack=attack,
        phases=STAGE_KILL_PHASES if options.stages else phases,
    )
    check_outputs(options.json, options.plot)
    folder = _folder(options.workdir)
    arguments = dict(options.strategy_args)
    settings = Settings(
        task=options.task,
        strategy=options.strategy,
        strategy_args=tuple(f"{name}={value:g}" for name, value in sorted(arguments.items())),
        aggregator=options.aggregator,
        audit=options.audit,
        admission=options.admission,
        mode=options.mode,
        topology=options.topology,
        rounds=rounds,
        seed=options.seed,
        folder=folder,
        log_level=options.log_level,
        custom=":" in options.task,
        stages=stage_arguments(options),
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        # A log file has no width; rich would take 80 columns and cut the tables.
        console = Console(highlight=False, width=120)
    keep = True
    try:
        report = _run(plan, settings, console, live=console.is_terminal and not options.no_live, options=options)
        console.print(closing(report))
        for reason in report.why:
            console.print(f"[red]FAILED[/red] {reason}", soft_wrap=True)
        if options.json is not None:
            report.write(options.json)
        keep = options.keep or options.workdir is not None or not report.ok
        console.print(
            "[green]every claim held[/green]" if report.ok else f"logs of all nodes: {folder}", soft_wrap=True
        )
        return OK if report.ok else FAILED
    except SimulationFailed:
        console.print(f"logs of all nodes: {folder}", soft_wrap=True)
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def stage_arguments(options: argparse.Namespace) -> tuple[str, ...]:
    """What is said of stages, for the founder's command line."""
    found: list[str] = []
    for name, value in (("--stages", options.stages), ("--micro-batches", options.micro)):
        found += [name, str(value)] if value else []
    found += ["--swap"] if options.swap else []
    found += ["--activations", options.activations] if options.activations else []
    found += ["--recovery", options.recovery] if options.recovery else []
    return tuple(found)


def _folder(workdir: Path | None) -> Path:
    if workdir is None:
        return Path(tempfile.mkdtemp(prefix="shoal-sim-"))
    folder = workdir.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
    if any(folder.iterdir()):
        raise ConfigError(f"--workdir {folder} is not empty; a simulation begins in an empty folder")
    return folder


def _run(plan: Plan, settings: Settings, console: Console, *, live: bool, options: argparse.Namespace) -> Report:
    recorder = Recorder(plan.names, [late.name for late in plan.late])
    began = time.monotonic()
    title = f"{len(plan.names)} peers, {settings.task}, {settings.strategy}, seed {settings.seed}"
    if plan.liars:
        title += f"; {', '.join(plan.liars)} {'lies' if len(plan.liars) == 1 else 'lie'}: {plan.attack}"
    view = LiveView(
        console, recorder, rounds=settings.rounds, title=title, clock=lambda: time.monotonic() - began, live=live
    )
    swarm = Swarm(plan, settings, recorder, say=view.say, on_round=view.round_committed)
    with view:
        _run_swarm(swarm)
    view.say(f"the swarm is done after {swarm.ended:.1f} s; now the same samples without a swarm")
    # Two, for two cores: one machine's training takes as long as that of all isolated peers.
    referees = [_start_referee(settings.folder, number) for number in (1, 2)]
    try:
        answer = _ask(referees, _question(settings, recorder, swarm.nodes), settings.folder)
    finally:
        for referee in referees:
            referee.kill()
            referee.communicate()
    report = _report(settings, recorder, answer, time.monotonic() - began)
    problems = [*swarm.problems, *_check_exports(recorder, answer, answer.replicated and not settings.stages)]
    report = judge(report, _expectation(plan, settings, answer), problems)
    if options.plot is not None:
        from .plot import plot

        plot(report, list(recorder.traces.values()), options.plot)
    return report


def _run_swarm(swarm: Swarm) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(_until_sigterm)
            await swarm.run()
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


async def _until_sigterm(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            raise SimulationFailed("ended by SIGTERM")
    raise AssertionError("a signal receiver never ends")


def _start_referee(folder: Path, number: int) -> subprocess.Popen[str]:
    with (folder / f"baseline-{number}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "shoal.sim.baseline"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            env=NodeProcess.environment(),
        )  # fmt: skip


def _question(settings: Settings, recorder: Recorder, nodes: dict[str, NodeProcess]) -> Question:
    known = sorted((trace for trace in recorder.traces.values() if trace.peer), key=lambda trace: trace.peer)
    parts = tuple(
        Part(PeerId.parse(trace.peer).key.hex(), index, len(known), trace.samples) for index, trace in enumerate(known)
    )
    exports = {
        trace.name: str(nodes[trace.name].export)
        for trace in recorder.traces.values()
        if trace.status == "finished" and nodes[trace.name].export.exists()
    }
    if settings.stages:
        # Each sample passes all stages, and each of them counts it.
        samples = sum(trace.samples for trace in known) // int(settings.stages[1])
        parts = (Part(bytes(32).hex(), 0, 1, samples),)
    return Question(settings.task, settings.strategy, settings.seed, parts, True, not settings.stages, exports)


def _ask(referees: Sequence[subprocess.Popen[str]], question: Question, folder: Path) -> Answer:
    """Have the first train what one machine would and measure the exports, the second train the isolated peers."""
    shares = (attrs.evolve(question, isolated=False), attrs.evolve(question, single=False, exports={}))
    answers = []
    for referee, share in zip(referees, shares, strict=True):
        assert referee.stdin is not None
        try:
            referee.stdin.write(json.dumps(cattrs.unstructure(share)) + "\n")
            referee.stdin.flush()
        except BrokenPipeError:
            # It died; its missing answer is noticed below.
            pass
    for number, referee in enumerate(referees, 1):
        assert referee.stdout is not None
        line = referee.stdout.readline()
        if not line:
            raise SimulationFailed(f"the baselines could not be computed; log: {folder / f'baseline-{number}.log'}")
        answers.append(cattrs.structure(json.loads(line), Answer))
    return attrs.evolve(answers[0], isolated=answers[1].isolated)


def _check_exports(recorder: Recorder, answer: Answer, replicated: bool) -> list[str]:
    """What is wrong with the exported states: unreadable, or not what the node's last commit names."""
    problems = []
    for name, export in answer.exports.items():
        reports = recorder.traces[name].reports
        if export.error:
            problems.append(f"the export of {name} cannot be used: {export.error}")
        elif replicated and reports and export.digest != reports[-1].digest:
            problems.append(f"{name} exported another state ({export.digest[:16]}) than its last commit names")
    return problems


def _report(settings: Settings, recorder: Recorder, answer: Answer, wall: float) -> Report:
    for name, export in answer.exports.items():
        if export.metric is not None:
            recorder.traces[name].metric = export.metric
    metrics = [export.metric for export in answer.exports.values() if export.metric is not None]
    isolated = answer.isolated
    return recorder.report(
        task=settings.task,
        strategy=settings.strategy,
        mode=settings.mode,
        seed=settings.seed,
        wall_s=wall,
        metric=answer.metric,
        baseline=Baseline(
            start=answer.start,
            single=answer.single,
            isolated=sum(isolated) / len(isolated) if isolated else None,
            reference=answer.reference,
            reference_name=answer.reference_name,
        ),
        # Where peers end with different weights (gossip, local), the swarm is as good as its mean member.
        swarm=sum(metrics) / len(metrics) if metrics else None,
        digests={name: export.digest for name, export in answer.exports.items()},
    )


def _expectation(plan: Plan, settings: Settings, answer: Answer) -> Expectation:
    known = defaults.TASKS.get(settings.task, defaults.OTHER_TASK)
    shared = settings.strategy != "local" and not settings.stages
    long_enough = settings.rounds >= known.rounds * defaults.MORE_ROUNDS.get(settings.strategy, 1) and shared
    return Expectation(
        rounds=settings.rounds,
        kills=len(plan.kills),
        late=len(plan.late),
        expelled=len(plan.liars) if plan.attack == LYING_OWNER else 0,
        # In stages nobody has all of the state; what each exports is from whoever held the stages last.
        identical=answer.replicated and not settings.stages,
        recovers=bool(settings.stages),
        higher_is_better=answer.higher_is_better,
        # With the data of liars lost, nothing is promised but that it is worth while to take part.
        at_least=known.at_least if long_enough and answer.replicated and not plan.liars else None,
        above_isolated=known.above_isolated if long_enough and len(plan.names) >= 4 else None,
        beats_reference=known.ngram and long_enough,
    )
