"""A whole swarm as processes of this machine: real sockets, real encryption, real training, real SIGKILL.

The parent starts ``shoal start`` and ``shoal join`` as anybody would, each with a data directory of its
own, and follows them through their control sockets. It kills with SIGKILL when a node says that it has
reached the phase in which it is to die, hands a late peer its ticket when a round is committed, and has
the weights that the finished nodes exported measured by :mod:`.baseline`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import attrs
import trio

from ..learning.events import Event, RoundReport
from ..node.cli import ERROR, USAGE
from ..node.control import ControlClient, Ended, EventFrame, NodeStatus, RoundFrame, Watcher
from ..node.datadir import DataDir
from ..transport.errors import ConfigError, ShoalError
from . import defaults
from .recorder import PeerTrace, Recorder
from .report import KILL_PHASES


class SimulationFailed(ShoalError):
    """The simulation cannot go on: no first node, no progress, everybody died. The text says where to look."""


@attrs.frozen
class Kill:
    """Node ``name`` is to die by SIGKILL in ``round``, on reaching ``phase``."""

    name: str
    round: int
    phase: str


@attrs.frozen
class Late:
    """Node ``name`` gets its ticket once ``round`` is committed."""

    name: str
    round: int


@attrs.frozen
class Plan:
    """What is going to happen: a pure function of the options and the seed."""

    names: tuple[str, ...]
    first: int
    kills: tuple[Kill, ...]
    late: tuple[Late, ...]
    #: Names of those that lie, and the attack that all of them make.
    liars: tuple[str, ...] = ()
    attack: str = ""


def make_plan(
    *,
    peers: int,
    kill: int,
    late: int,
    rounds: int,
    seed: int,
    liars: int = 0,
    attack: str = "",
    phases: Sequence[str] = KILL_PHASES,
) -> Plan:
    """Draw victims, rounds and ``phases``. Raises :class:`ConfigError` when the numbers leave no swarm."""
    first = peers - late
    if first < 1:
        raise ConfigError(f"--late {late} of --peers {peers} leaves nobody to begin the run")
    if kill >= first:
        raise ConfigError(f"--kill {kill} leaves none of the {first} peers that begin the run")
    if liars and 2 * liars >= first - kill:
        raise ConfigError(
            f"--byzantine {liars} of {first - kill} peers that begin the run and live: at most a minority"
        )
    if late and rounds < defaults.LATE_MARGIN + 1:
        raise ConfigError(
            f"--late needs at least {defaults.LATE_MARGIN + 1} rounds, so that the late peer can commit 3 of them"
        )
    if kill and rounds < 3:
        raise ConfigError("--kill needs at least 3 rounds: one before, the one that is hit, and one after")
    draw = random.Random(f"shoal sim {seed}")
    names = tuple(f"node-{number}" for number in range(peers))
    kills = tuple(
        Kill(name, draw.randint(2, max(2, rounds // 2)), draw.choice(phases))
        for name in sorted(draw.sample(names[:first], kill))
    )
    # The last ones, and never the first, with whose weights training begins.
    spared = [name for name in names[1:first] if name not in {each.name for each in kills}]
    latest = rounds - defaults.LATE_MARGIN
    joins = tuple(Late(name, draw.randint(1, max(1, min(latest, rounds // 3)))) for name in names[first:])
    return Plan(names, first, kills, joins, tuple(spared[len(spared) - liars :]), attack)


@attrs.frozen
class Settings:
    """How the nodes are started. ``strategy_args``: in text form, for ``--set``. ``folder``: of all data and logs."""

    task: str
    strategy: str
    strategy_args: tuple[str, ...]
    aggregator: str
    audit: float | None
    admission: int | None
    mode: str
    topology: str
    rounds: int
    seed: int
    folder: Path
    log_level: str
    custom: bool
    #: How the model is cut into stages, as arguments; empty: it is not.
    stages: tuple[str, ...] = ()


class NodeProcess:
    """One child: its process, its data directory, its log."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.data = DataDir(folder / name)
        self.log = folder / f"{name}.log"
        self.export = folder / f"{name}.safetensors"
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def environment() -> dict[str, str]:
        """One torch thread each: the cores are shared by all nodes, and more threads change the bits."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def launch(self, arguments: Sequence[str], attack: str = "") -> None:
        """Start it; ``attack``: the lie that it tells."""
        module = ["shoal.sim.liar", attack] if attack else ["shoal.node.process"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *module, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                # Ctrl-C in the terminal goes to the parent alone, which ends its children in order.
                start_new_session=True,
            )

    def tell(self, line: str) -> None:
        """Write a line to its standard input, which stays open: closing it tells the node that the parent is gone."""
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            # It died; whoever waits for it says so.
            pass

    @property
    def code(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def tail(self) -> str:
        """The end of its log, indented."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return "    (no log)"
        return "\n".join(f"    {line}" for line in lines[-defaults.TAIL :]) or "    (the log is empty)"

    def complaint(self) -> str:
        """The error that ended it, without the prefix."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(ERROR)]
        return errors[-1].removeprefix(ERROR) if errors else f"{self.name} found its arguments bad; log: {self.log}"

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass


class Swarm:
    """Runs one plan to its end. ``watch`` is told after everything that changes the recorder."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        recorder: Recorder,
        *,
        say: Callable[[str], None],
        on_round: Callable[[int], None],
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.recorder = recorder
        #: Liars that an honest node has expelled.
        self.expelled: dict[str, None] = {}
        self.problems: list[str] = []
        self.nodes = {name: NodeProcess(name, settings.folder) for name in plan.names}
        self._kills = {kill.name: kill for kill in plan.kills}
        self._say = say
        self._on_round = on_round
        #: Seconds after which the last node had ended.
        self.ended = 0.0
        self._began = 0.0
        self._heard = 0.0
        self._progress = trio.Event()
        self._ticket = ""

    def clock(self) -> float:
        """Seconds since the simulation began."""
        return trio.current_time() - self._began

    async def run(self) -> None:
        """Start, follow, kill, wait for all. Raises :class:`SimulationFailed`. However it ends, no child is left."""
        self._began = self._heard = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard)
                for number, name in enumerate(self.plan.names):
                    lie = self.plan.attack if name in self.plan.liars else ""
                    self.nodes[name].launch(self._arguments(number, name), lie)
                    self.recorder.note(self.clock(), "start", name)
                async with trio.open_nursery() as following:
                    for name in self.plan.names:
                        following.start_soon(self._follow, self.nodes[name], self.recorder.traces[name])
                    following.start_soon(self._hand_out_tickets)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end_all()
            self.ended = self.clock()

    def _arguments(self, number: int, name: str) -> list[str]:
        settings, node = self.settings, self.nodes[name]
        arguments = ["start", settings.task] if number == 0 else ["join", "-"]
        arguments += ["--data-dir", str(node.data.path), "--host", "127.0.0.1", "--port", "0", "--leash"]
        arguments += ["--log-level", settings.log_level, "--export", str(node.export)]
        if number == 0:
            arguments += ["--strategy", settings.strategy, "--mode", settings.mode, "--rounds", str(settings.rounds)]
            arguments += ["--min-peers", str(self.plan.first), "--seed", str(settings.seed)]
            arguments += ["--aggregator", settings.aggregator]
            if settings.topology:
                arguments += ["--topology", settings.topology]
            if settings.audit is not None:
                arguments += ["--audit", f"{settings.audit:g}"]
            if settings.admission is not None:
                arguments += ["--admission", str(settings.admission)]
            arguments += settings.stages
            for assignment in settings.strategy_args:
                arguments += ["--set", assignment]
        elif settings.custom:
            arguments += ["--task", settings.task]
        kill = self._kills.get(name)
        if kill is not None:
            arguments += ["--fault", f"hold:{kill.round}:{kill.phase}"]
        return arguments

    async def _hand_out_tickets(self) -> None:
        founder = self.nodes[self.plan.names[0]]
        with trio.move_on_after(defaults.BOOT):
            while not (ticket := await self._ask_ticket(founder)):
                if founder.code is not None:
                    return
                await trio.sleep(defaults.POLL)
            self._ticket = ticket
            for name in self.plan.names[1 : self.plan.first]:
                self.nodes[name].tell(ticket)
        if not self._ticket:
            raise SimulationFailed(f"{founder.name} has no ticket after {defaults.BOOT:g} s; log: {founder.log}")
        for late in sorted(self.plan.late, key=lambda late: late.round):
            while self.recorder.last_round < late.round:
                await self._progress.wait()
            ticket = await self._living_ticket()
            self.recorder.note(self.clock(), "late", late.name, round=late.round)
            self._say(f"round {late.round} is committed: {late.name} joins late")
            self.nodes[late.name].tell(ticket)

    async def _ask_ticket(self, node: NodeProcess) -> str:
        status = await self._status(node)
        # Where the model is cut, a node takes part before it has a stage, and with it a run.
        return "" if status is None or (status.run is None and not self.settings.stages) else status.ticket

    async def _living_ticket(self) -> str:
        """The ticket as a node that is alive gives it: the founder may be the one that was killed."""
        for name in self.plan.names[: self.plan.first]:
            alive = self.nodes[name].code is None and self.recorder.traces[name].status not in ("killed", "failed")
            if alive and (ticket := await self._ask_ticket(self.nodes[name])):
                return ticket
        return self._ticket

    async def _status(self, node: NodeProcess) -> NodeStatus | None:
        if not node.data.control_path.exists():
            return None
        try:
            return await trio.to_thread.run_sync(ControlClient(node.data).status, abandon_on_cancel=True)
        except ConfigError:
            return None

    async def _follow(self, node: NodeProcess, trace: PeerTrace) -> None:
        watcher = await self._watcher(node)
        ended: Ended | None = None
        if watcher is not None:
            async with aclosing(watcher):
                while (frame := await watcher.receive()) is not None:
                    self._heard = trio.current_time()
                    match frame:
                        case EventFrame(event):
                            self._on_event(node, trace, event)
                        case RoundFrame(report, samples, sent, received):
                            self._on_report(trace, report, samples, sent, received)
                        case Ended():
                            ended = frame
                    self._wake()
        code = await self._wait(node)
        self._on_end(node, trace, ended, code)
        self._wake()

    def _wake(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def _watcher(self, node: NodeProcess) -> Watcher | None:
        """None when the node died before it had a control socket."""
        while True:
            if node.data.control_path.exists():
                try:
                    watcher = await Watcher.open(node.data)
                except ConfigError:
                    pass
                else:
                    status = await self._status(node)
                    if status is not None:
                        self.recorder.traces[node.name].peer = status.peer
                    return watcher
            if node.code is not None:
                return None
            await trio.sleep(defaults.POLL)

    async def _wait(self, node: NodeProcess) -> int:
        """The exit code, as soon as there is one."""
        code = node.code
        while code is None:
            await trio.sleep(defaults.POLL)
            code = node.code
        return code

    def _on_event(self, node: NodeProcess, trace: PeerTrace, event: Event) -> None:
        t = self.clock()
        if event.what == "hold":
            self._kill(node, trace, event, t)
            return
        if event.what == "expelled":
            self._expel(node, event, t)
        self.recorder.event(node.name, t, event)

    def _kill(self, node: NodeProcess, trace: PeerTrace, event: Event, t: float) -> None:
        """The victim has reached its phase and waits there: now it dies, in the middle of the round."""
        node.signal(signal.SIGKILL)
        trace.status = "killed"
        trace.round, trace.phase = event.round, event.phase
        self.recorder.note(t, "kill", trace.peer, round=event.round, phase=event.phase)
        self._say(f"SIGKILL {trace.label} ({node.name}) in round {event.round}, in phase {event.phase}")

    def _expel(self, node: NodeProcess, event: Event, t: float) -> None:
        """``node`` says that somebody lied as an owner, and who."""
        for name in self.plan.liars:
            trace = self.recorder.traces[name]
            if trace.peer == event.peer and name not in self.expelled:
                self.expelled[name] = None
                self.recorder.note(t, "expelled", trace.peer, round=event.round)
                self._say(f"round {event.round}: {node.name} expels {trace.label} ({name}): {event.detail}")

    def _dismiss(self) -> None:
        """Those who were expelled ask to be let in for ever. Once all others have ended, they may go."""
        traces = self.recorder.traces
        if all(trace.status for name, trace in traces.items() if name not in self.expelled):
            for name in self.expelled:
                if not traces[name].status:
                    traces[name].status = "expelled"
                    self.nodes[name].signal(signal.SIGTERM)

    def _on_report(self, trace: PeerTrace, report: RoundReport, samples: int, sent: int, received: int) -> None:
        before = self.recorder.last_round
        self.recorder.committed(trace.name, self.clock(), report, samples, sent, received)
        if report.round > before:
            self._on_round(report.round)

    def _on_end(self, node: NodeProcess, trace: PeerTrace, ended: Ended | None, code: int) -> None:
        t = self.clock()
        if ended is not None:
            trace.bytes_sent, trace.bytes_received = ended.status.bytes_sent, ended.status.bytes_received
        if trace.status in ("killed", "expelled"):
            return
        trace.status = ended.outcome if ended is not None and code == 0 else "failed"
        self.recorder.note(t, trace.status, trace.peer, round=trace.round)
        self._dismiss()
        if trace.status == "failed" and not self._ticket and code == USAGE:
            # What it was told is what we were told: its complaint is ours.
            raise ConfigError(node.complaint())
        if trace.status == "failed":
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            reason = ended.reason if ended is not None else how
            self.problems.append(f"{node.name} ({trace.label}) failed: {reason}; log: {node.log}")
            self._say(f"{node.name} failed ({how}); the end of {node.log}:\n{node.tail()}")
            if node.name == self.plan.names[0] and not self._ticket:
                raise SimulationFailed(f"{node.name} ended before it had a ticket ({how}); log: {node.log}")
        elif trace.status != "finished":
            self.problems.append(f"{node.name} ({trace.label}) {trace.status} before the end; log: {node.log}")

    async def _guard(self) -> None:
        """Ends a simulation in which nothing happens any more."""
        while True:
            await trio.sleep(1.0)
            if trio.current_time() - self._heard > defaults.STALL:
                waiting = [
                    f"{name} (round {trace.round}, {trace.phase or trace.state}), log {self.nodes[name].log}"
                    for name, trace in self.recorder.traces.items()
                    if not trace.status
                ]
                raise SimulationFailed(f"no node said anything for {defaults.STALL:g} s; waiting: {'; '.join(waiting)}")

    async def _end_all(self) -> None:
        """SIGTERM, then SIGKILL for whoever is slower than it promised."""
        running = [node for node in self.nodes.values() if node.process is not None and node.code is None]
        for node in running:
            # A suspended process would not hear it.
            node.signal(signal.SIGCONT)
            node.signal(signal.SIGTERM)
        with trio.move_on_after(defaults.TERMINATE):
            for node in running:
                await self._wait(node)
        for node in running:
            node.signal(signal.SIGKILL)
        for node in self.nodes.values():
            node.close()
            if node.process is not None:
                node.process.wait()
