"""Things that happen to nodes in the NAT lab: an address changes, the relay dies, two train through a relay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import attrs
import trio
from rich.console import Console

from ..learning.events import RoundReport
from ..node.control import ControlClient, NodeStatus, RoundFrame, Watcher
from ..node.datadir import DataDir
from ..transport.errors import ConfigError, ShoalError
from . import defaults
from .lab_messages import Beat, Beaten, Meet, Met, Watched
from .lab_nodes import Builder, LabFailed, LabNode, environment, started
from .netlab import LabHost, NetLab


@attrs.frozen
class ScenarioResult:
    """What came of one scenario: ``sentence`` for people, ``figures`` for programs (seconds, counts, names)."""

    name: str
    ok: bool
    sentence: str
    figures: dict[str, object] = attrs.field(factory=dict)


Scenario = Callable[[Builder, Path], Awaitable[tuple[ScenarioResult, ...]]]


# An address changes


async def address_change(builder: Builder, folder: Path) -> tuple[ScenarioResult, ...]:
    """A host's address changes while its link is in use, in three places; the link must serve again.

    Its own address on the internet; its home router's external address; the same for a link that was punched.
    """
    results = []
    for name, kinds, ways in (
        ("own-address", ("public4", "public"), ("direct",)),
        ("router-address", ("cone", "public"), ("direct",)),
        ("punched", ("cone", "cone"), ("punch",)),
    ):
        try:
            results.append(await _change(builder, folder, name, kinds, ways))
        except LabFailed as error:
            results.append(ScenarioResult(f"address-change/{name}", False, str(error)))
    return tuple(results)


async def _change(
    builder: Builder, folder: Path, name: str, kinds: tuple[str, str], ways: tuple[str, ...]
) -> ScenarioResult:
    async with _pair(builder, folder, name, kinds, ways) as (_, one, other):
        seconds = defaults.LAB_CALM + defaults.LAB_CHANGE
        await one.tell(Beat(other.account.peer, seconds, defaults.LAB_BEAT, defaults.LAB_AFTER))
        await trio.sleep(defaults.LAB_CALM)
        changed = await builder(lambda: builder.lab.change_address(one.host))
        beaten = await one.hear(Beaten, seconds + defaults.LAB_ANSWER)
    figures = {**attrs.asdict(beaten), "before": one.host.external, "after": changed.external}
    name = f"address-change/{name}"
    if not beaten.recovered:
        reason = "; ".join(beaten.errors) or "no answer came any more"
        return ScenarioResult(name, False, f"the link never served again: {reason}", figures)
    how = "survived" if beaten.links == 1 else "was replaced"
    after = f"{one.host.external} → {changed.external}"
    return ScenarioResult(name, True, f"the link {how}; {after} cost {beaten.gap:.1f} s without an answer", figures)


# The relay dies


async def kill_relay(builder: Builder, folder: Path) -> tuple[ScenarioResult, ...]:
    """Two hosts behind cones are linked and upgraded; then the relay is killed, and their link must not notice."""
    async with _pair(builder, folder, "kill-relay", ("cone", "cone"), ("punch",)) as (relay, one, other):
        seconds = defaults.LAB_CALM + defaults.LAB_KILLED
        await one.tell(Beat(other.account.peer, seconds, defaults.LAB_BEAT, 0.0))
        await trio.sleep(defaults.LAB_CALM)
        relay.process.kill()
        beaten = await one.hear(Beaten, seconds + defaults.LAB_ANSWER)
    figures = attrs.asdict(beaten)
    lost = beaten.asked - beaten.answered
    if lost or beaten.links != 1 or beaten.gap > defaults.LAB_UNDISTURBED:
        what = f"{lost} of {beaten.asked} beats lost, {beaten.links} links, {beaten.gap:.1f} s without an answer"
        return (ScenarioResult("kill-relay", False, f"the link suffered: {what}; {'; '.join(beaten.errors)}", figures),)
    sentence = f"the link lives on by {beaten.ways[-1][1]}: {beaten.answered} of {beaten.asked} beats answered"
    return (ScenarioResult("kill-relay", True, f"{sentence}, at most {beaten.gap * 1e3:.0f} ms apart", figures),)


@asynccontextmanager
async def _pair(
    builder: Builder, folder: Path, name: str, kinds: tuple[str, str], ways: tuple[str, ...]
) -> AsyncIterator[tuple[LabNode, LabNode, LabNode]]:
    """A relay and two nodes whose link has one of ``ways``. Raises :class:`LabFailed` when it gets none of them."""
    async with AsyncExitStack() as stack:
        nodes = []
        for letter, kind in zip("rab", ("public", *kinds), strict=True):
            host = await stack.enter_async_context(builder.host(f"{name}-{letter}", kind))
            nodes.append(await stack.enter_async_context(started(builder.lab, host, folder)))
        relay, one, other = nodes
        for node in (one, other):
            await node.attach(relay)
        await one.learn(other)
        await one.ask(Meet(other.account.peer, defaults.LAB_WATCH, ways), Met, defaults.LAB_MEET)
        watched = await one.hear(Watched, defaults.LAB_WATCH + defaults.LAB_ANSWER)
        if watched.changes[-1][1] not in ways:
            raise LabFailed(f"the link has {watched.changes[-1][1]}, not {' or '.join(ways)}: nothing to try")
        yield relay, one, other


# Two train through a relay


class Trainer:
    """A real `shoal` process on a host, followed through its control socket."""

    def __init__(self, lab: NetLab, host: LabHost, folder: Path) -> None:
        self.lab, self.host = lab, host
        self.data = DataDir(folder / f"{host.name}-data")
        self.log = folder / f"{host.name}.log"
        self.reports: list[RoundReport] = []
        self.process: trio.Process | None = None

    @asynccontextmanager
    async def running(self, *arguments: str) -> AsyncIterator[Trainer]:
        command = [sys.executable, "-m", "shoal.node.process", *arguments, "--data-dir", str(self.data.path)]
        with self.log.open("wb") as output:
            self.process = await trio.lowlevel.open_process(
                self.lab.command(self.host, *command, "--log-level", "info"),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment(),
            )  # fmt: skip
        try:
            yield self
        finally:
            with trio.CancelScope(shield=True):
                if self.process.returncode is None:
                    self.process.kill()
                await self.process.wait()

    async def status(self, ready: Callable[[NodeStatus], bool]) -> NodeStatus:
        """What its control socket says, once that is ``ready``. Raises :class:`LabFailed`."""
        with trio.move_on_after(defaults.BOOT):
            while self.process is not None and self.process.returncode is None:
                if self.data.control_path.exists():
                    try:
                        found = await trio.to_thread.run_sync(ControlClient(self.data).status, abandon_on_cancel=True)
                    except ConfigError:
                        pass
                    else:
                        if ready(found):
                            return found
                await trio.sleep(defaults.POLL)
        raise LabFailed(f"{self.host.name} is not up; log:{self.tail()}")

    async def follow(self, rounds: int) -> None:
        """Note its rounds until ``rounds`` of them are committed, or it ends."""
        async with aclosing(await Watcher.open(self.data)) as watcher:
            while len(self.reports) < rounds and (frame := await watcher.receive()) is not None:
                if isinstance(frame, RoundFrame):
                    self.reports.append(frame.report)

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(["", *(f"    {line}" for line in lines[-defaults.TAIL :])])


async def train_relay(builder: Builder, folder: Path) -> tuple[ScenarioResult, ...]:
    """Two hosts behind symmetric NATs train `digits` together; nothing but the relay connects them."""
    lab, name = builder.lab, "train-relay"
    async with AsyncExitStack() as stack:
        hosts = []
        for letter, kind in zip("rab", ("public", "symmetric", "symmetric"), strict=True):
            hosts.append(await stack.enter_async_context(builder.host(f"train-{letter}", kind)))
        relay, one, other = (Trainer(lab, host, folder) for host in hosts)
        await stack.enter_async_context(relay.running("relay", "--port", str(defaults.LAB_PORT)))
        await relay.status(lambda status: True)
        via = f"{relay.host.four}:{defaults.LAB_PORT}"
        await stack.enter_async_context(
            one.running("start", "digits", "--min-peers", "2", "--rounds", str(defaults.LAB_ROUNDS), "--via", via)
        )
        founded = await one.status(lambda status: status.run is not None and bool(status.ticket))
        await stack.enter_async_context(other.running("join", founded.ticket))
        await other.status(lambda status: status.run is not None)
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + defaults.LAB_TRAIN
            for trainer in (one, other):
                nursery.start_soon(trainer.follow, defaults.LAB_ROUNDS)
        moved = (await relay.status(lambda status: True)).bytes_received
    return (_judge_training(name, (one.reports, other.reports), moved),)


def _judge_training(name: str, reports: Sequence[list[RoundReport]], moved: int) -> ScenarioResult:
    digests: list[dict[int, str]] = [{report.round: report.digest for report in own} for own in reports]
    common = sorted(digests[0].keys() & digests[1].keys())
    both = [report.round for report in reports[0] if len(report.members) == 2 and report.round in common]
    differing = [number for number in common if digests[0][number] != digests[1][number]]
    figures: dict[str, object] = {
        "rounds": common, "both": both, "differing": differing, "relay_received": moved,
        "metric": next((r.metric for r in reversed(reports[0]) if r.metric is not None), None),
    }  # fmt: skip
    if differing:
        return ScenarioResult(name, False, f"the digests of rounds {differing} differ", figures)
    if len(both) < defaults.LAB_ROUNDS // 2:
        return ScenarioResult(name, False, f"only {len(both)} rounds were committed with both members", figures)
    sentence = f"{len(both)} rounds with both members, identical digests, {moved / 1e6:.1f} MB into the relay"
    return ScenarioResult(name, True, sentence, figures)


SCENARIOS: Mapping[str, Scenario] = {
    "address-change": address_change,
    "kill-relay": kill_relay,
    "train-relay": train_relay,
}


async def run_scenarios(names: Sequence[str], folder: Path, console: Console) -> tuple[ScenarioResult, ...]:
    """One after the other, each in a lab of its own. Raises :class:`ConfigError` for a name nobody knows."""
    for name in names:
        if name not in SCENARIOS:
            raise ConfigError(f"no scenario is called {name!r}; there are {', '.join(SCENARIOS)}")
    results: list[ScenarioResult] = []
    for name in names:
        with NetLab() as lab:
            try:
                found = await SCENARIOS[name](Builder(lab), folder)
            except ShoalError as error:
                found = (ScenarioResult(name, False, str(error)),)
        for result in found:
            verdict = "ok    " if result.ok else "FAILED"
            console.print(f"{verdict} {result.name}: {result.sentence}", soft_wrap=True, markup=False)
        results += found
    return tuple(results)
