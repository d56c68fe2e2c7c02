"""Things that happen to nodes in the NAT lab: an address changes, the relay dies, two train through a relay."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio
from rich.console import Console

from ..learning.events import RoundReport
from ..transport.errors import ConfigError
from . import defaults
from .lab_messages import Beat, Beaten, Meet, Met, Watched
from .lab_nodes import Builder, LabFailed, LabNode, ShoalProcess, started
from .netlab import NetLab


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
    trials = (
        ("own-address", ("public4", "public"), ("direct",)),
        ("router-address", ("cone", "public"), ("direct",)),
        ("punched", ("cone", "cone"), ("punch",)),
    )
    results: dict[str, ScenarioResult] = {}

    async def run(name: str, kinds: tuple[str, str], ways: tuple[str, ...]) -> None:
        try:
            results[name] = await _change(builder, folder, name, kinds, ways)
        except LabFailed as error:
            results[name] = ScenarioResult(f"address-change/{name}", False, str(error))

    async with trio.open_nursery() as nursery:  # most of the time they wait
        for trial in trials:
            nursery.start_soon(run, *trial)
    return tuple(results[name] for name, *_ in trials)


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
        relay.kill()
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
) -> AsyncIterator[tuple[ShoalProcess, LabNode, LabNode]]:
    """A relay and two nodes whose link has one of ``ways``. Raises :class:`LabFailed` when it gets none of them."""
    async with AsyncExitStack() as stack:
        relay_host = await stack.enter_async_context(builder.host(f"{name}-r", "public"))
        relay = ShoalProcess(builder.lab, relay_host, folder)
        await stack.enter_async_context(relay.relaying())
        nodes = []
        for letter, kind in zip("ab", kinds, strict=True):
            host = await stack.enter_async_context(builder.host(f"{name}-{letter}", kind))
            nodes.append(await stack.enter_async_context(started(builder.lab, host, folder)))
            await nodes[-1].attach(relay)
            await nodes[-1].settle()
        one, other = nodes
        await one.learn(other)
        await one.ask(Meet(other.account.peer, defaults.LAB_WATCH, ways), Met, defaults.LAB_MEET)
        watched = await one.hear(Watched, defaults.LAB_WATCH + defaults.LAB_ANSWER)
        if watched.changes[-1][1] not in ways:
            raise LabFailed(f"the link has {watched.changes[-1][1]}, not {' or '.join(ways)}: nothing to try")
        yield relay, one, other


# Two train through a relay


async def train_relay(builder: Builder, folder: Path) -> tuple[ScenarioResult, ...]:
    """Two hosts behind symmetric NATs train `digits` together; nothing but the relay connects them."""
    lab, name = builder.lab, "train-relay"
    async with AsyncExitStack() as stack:
        hosts = []
        for letter, kind in zip("rab", ("public", "symmetric", "symmetric"), strict=True):
            hosts.append(await stack.enter_async_context(builder.host(f"train-{letter}", kind)))
        relay, one, other = (ShoalProcess(lab, host, folder) for host in hosts)
        await stack.enter_async_context(relay.relaying())
        via = f"{relay.host.four}:{defaults.LAB_PORT}"
        await stack.enter_async_context(
            one.running("start", "digits", "--min-peers", "2", "--rounds", str(defaults.LAB_ROUNDS), "--via", via)
        )
        founded = await one.status(lambda status: status.run is not None and bool(status.ticket))
        await stack.enter_async_context(other.running("join", founded.ticket))
        await other.status(lambda status: status.run is not None)
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + defaults.LAB_TRAIN
            for node in (one, other):
                nursery.start_soon(node.follow, defaults.LAB_ROUNDS)
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


def check_names(names: Sequence[str]) -> None:
    """Raises :class:`ConfigError` for a name nobody knows."""
    for name in names:
        if name not in SCENARIOS:
            raise ConfigError(f"no scenario is called {name!r}; there are {', '.join(SCENARIOS)}")


async def run_scenarios(names: Sequence[str], folder: Path, console: Console) -> tuple[ScenarioResult, ...]:
    """All at once, each in a lab of its own. ``names``: keys of :data:`SCENARIOS`."""
    results: dict[str, tuple[ScenarioResult, ...]] = {}

    async def run(name: str) -> None:
        # Most of the time they wait: for keepalives, for rounds.
        with NetLab(name) as lab:
            try:
                results[name] = await SCENARIOS[name](Builder(lab), folder)
            except LabFailed as error:
                results[name] = (ScenarioResult(name, False, str(error)),)
        for result in results[name]:
            verdict = "ok    " if result.ok else "FAILED"
            console.print(f"{verdict} {result.name}: {result.sentence}", soft_wrap=True, markup=False)

    async with trio.open_nursery() as nursery:
        for name in dict.fromkeys(names):
            nursery.start_soon(run, name)
    return tuple(result for name in dict.fromkeys(names) for result in results[name])
