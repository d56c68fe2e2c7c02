"""Newcomers are on trial for some rounds, then voters; who comes back begins anew. Whole nodes, virtual and real."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import pytest
from torch import Tensor

from shoal.learning.events import Event
from shoal.learning.faults import Faults
from shoal.learning.rounds.messages import CommitRecord
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from tests.sim.test_processes import shoal_sim

TRIAL = 3


def scenario(nodes: int, rounds: int, *, late: tuple[int, ...], **settings: object) -> Scenario:
    founding = Founding(
        strategy="diloco", strategy_args=(("inner_steps", 5.0),), rounds=rounds, min_peers=nodes - len(late),
        aggregator="median", admission=TRIAL,
    )  # fmt: skip
    own = {name: value for name, value in settings.items() if hasattr(founding, name) and name != "seed"}
    rest = {name: value for name, value in settings.items() if name not in own}
    return Scenario(nodes=nodes, founding=attrs.evolve(founding, **own), late=late, **rest)  # type: ignore[arg-type]


class Opposite:
    """A newcomer that lies: it sends the opposite of its work."""

    def __call__(self, round: int, work: Tensor) -> Tensor:
        return -work

    def saw(self, result: Tensor) -> None:
        pass


class Records:
    """Every record that any node has committed, by branch and round."""

    def __init__(self, world: World) -> None:
        self.found: dict[tuple[int, int], CommitRecord] = {}
        self._world = world
        world.hooks.append(lambda member, event: self._note())

    def _note(self) -> None:
        for member in self._world.live():
            run = member.node.run_here
            if run is None or not hasattr(run, "membership"):
                continue
            head = run.membership.head
            if head.record.kind == "reduce":
                known = self.found.setdefault((head.record.branch, head.record.round), head.record)
                assert known.digest == head.record.digest, "two records of one round"
                signers = {accept.peer for accept in head.certificate.accepts}
                assert not head.voters or signers <= set(head.voters)

    def rounds(self, peer: str) -> tuple[list[int], list[int], list[int]]:
        """The rounds whose records name ``peer`` as on trial, as a voter, as a member."""
        trial, roster, members = [], [], []
        for (_, round), record in sorted(self.found.items()):
            assert not {each.peer for each in record.trial} & {*record.roster, *record.members}
            if any(each.peer.text == peer for each in record.trial):
                trial.append(round)
            if any(each.text == peer for each in record.roster):
                roster.append(round)
            if any(each.text == peer for each in record.members):
                members.append(round)
        return trial, roster, members


def told(member: Member, what: str) -> list[Event]:
    return [event for event in member.events if (event.phase, event.what) == ("commit", what)]


def played(setting: Scenario, script: Callable[[World], Awaitable[None]]) -> tuple[World, Records]:
    found: list[Records] = []

    async def whole(world: World) -> None:
        found.append(Records(world))
        await script(world)

    world = simulate(setting, whole)
    digests = {member.run.digest() for member in world.live() if not member.ended}
    assert len(digests) == 1
    return world, found[0]


def at_round(world: World, round: int) -> Callable[[], bool]:
    return lambda: world.members[0].run.round >= round


@pytest.mark.parametrize(
    ("aggregator", "codec", "mode"),
    [
        ("median", "fp32", "available"),
        ("multikrum:f=1,definition=byzfl", "fp32", "strict"),
        ("nnm+trimmed_mean:f=1", "int8", "available"),
        ("mean", "fp32", "available"),
    ],
)
def test_a_newcomer_is_measured_for_some_rounds_before_it_has_weight(aggregator: str, codec: str, mode: str) -> None:
    setting = scenario(5, 16, late=(4,), seed=1, aggregator=aggregator, codec=codec, mode=mode)
    shown: list[tuple[tuple[str, int], ...]] = []

    async def script(world: World) -> None:
        await world.until(at_round(world, 2), "two rounds")
        world.start(4)
        world.hooks.append(lambda member, event: shown.append(member.run.status().trial))

    world, records = played(setting, script)
    late = world.members[4].peer
    trial, roster, members = records.rounds(late)
    assert len(trial) >= TRIAL
    assert trial == list(range(trial[0], roster[0])), "on trial from the first record that names it until it votes"
    assert members[0] == roster[0] + 1, "its first work with weight is in the round after that"
    assert roster == list(range(roster[0], 17)), "and from then on it is a voter like all others"
    for member in world.live():
        assert [event.peer for event in told(member, "admitted")] == [late]
    assert ((late, TRIAL),) in shown
    assert ((late, 1),) in shown


def test_work_that_is_not_fit_is_never_admitted_and_never_counted() -> None:
    setting = scenario(5, 14, late=(4,), seed=2, faults={4: Faults(disguise=Opposite())})

    async def script(world: World) -> None:
        await world.until(at_round(world, 1), "a round")
        world.start(4)

    world, records = played(setting, script)
    trial, roster, members = records.rounds(world.members[4].peer)
    assert len(trial) > 6
    assert roster == members == []
    assert len(told(world.members[0], "unfit")) >= 6


def test_whoever_leaves_and_comes_back_begins_anew() -> None:
    setting = scenario(5, 40, late=(4,), seed=3)

    async def script(world: World) -> None:
        await world.until(at_round(world, 1), "a round")
        late = world.start(4)
        await world.until(lambda: bool(told(world.members[0], "admitted")), "its admission")
        world.stop(4)
        await world.until(lambda: late.ended, "its end")
        await world.until(lambda: bool(told(world.members[0], "dropped")), "its seat is empty")
        world.restart(4)
        await world.until(lambda: len(told(world.members[0], "admitted")) == 2, "its second admission")

    world, records = played(setting, script)
    trial, roster, _ = records.rounds(world.members[4].peer)
    again = [round for round in trial if round > roster[0]]
    assert len(again) >= TRIAL
    full = [
        round
        for (_, round), record in sorted(records.found.items())
        if any(each.peer.text == world.members[4].peer and each.left == TRIAL for each in record.trial)
    ]
    assert full[-1] > roster[0], "all of its trial, once more"


def test_a_newcomer_that_dies_on_trial_costs_nobody_anything() -> None:
    setting = scenario(4, 14, late=(3,), seed=4)

    async def script(world: World) -> None:
        await world.until(at_round(world, 1), "a round")
        late = world.start(3)

        def hook(member: Member, event: Event) -> None:
            if member is late and (event.phase, event.what) == ("gather", "begin") and not late.killed:
                world.kill(3)

        world.hooks.append(hook)
        await world.until(lambda: bool(told(world.members[0], "trial-ended")), "the end of its trial")

    world, records = played(setting, script)
    assert all(len(record.members) == 3 for record in records.found.values())
    assert not any(told(member, "dropped") for member in world.live())


@pytest.mark.parametrize("phase", ["scatter", "combine", "gather", "commit"])
def test_a_leader_or_owner_that_dies_takes_no_newcomer_with_it(phase: str) -> None:
    setting = scenario(5, 24, late=(4,), seed=5)

    async def script(world: World) -> None:
        await world.until(at_round(world, 1), "a round")
        late = world.start(4)
        await world.until(lambda: bool(told(world.members[0], "on-trial")), "its trial")

        def hook(member: Member, event: Event) -> None:
            victim = world.members[1]
            if member is victim and (event.phase, event.what) == (phase, "begin") and not victim.killed:
                world.kill(1)

        world.hooks.append(hook)
        await world.until(lambda: late.node.run_here is not None and bool(told(late, "admitted")), "its admission")

    world, records = played(setting, script)
    trial, roster, _ = records.rounds(world.members[4].peer)
    assert roster, trial
    last = records.found[max(records.found)]
    assert world.members[1].peer not in {peer.text for peer in last.roster}


def test_those_on_trial_follow_the_side_that_goes_on_and_are_admitted_there() -> None:
    """Two of four voters are lost for good, an available run goes on as a branch, the newcomer with it."""
    setting = scenario(5, 30, late=(4,), seed=6)

    async def script(world: World) -> None:
        await world.until(at_round(world, 1), "a round")
        late = world.start(4)
        await world.until(lambda: bool(told(world.members[0], "on-trial")), "its trial")
        world.kill(1)
        world.kill(2)
        await world.until(lambda: bool(told(late, "admitted")), "its admission")

    world, records = played(setting, script)
    branch, _ = max(records.found)
    assert branch > 0
    _, roster, _ = records.rounds(world.members[4].peer)
    assert roster


def test_without_admission_a_newcomer_votes_at_once() -> None:
    setting = scenario(5, 8, late=(4,), seed=7, admission=0)

    async def script(world: World) -> None:
        await world.until(at_round(world, 2), "two rounds")
        world.start(4)

    world, records = played(setting, script)
    trial, roster, members = records.rounds(world.members[4].peer)
    assert trial == []
    assert members[0] == roster[0] + 1


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_late_process_is_admitted_after_its_trial_and_has_no_weight_before(tmp_path: Path) -> None:
    arguments = ["--peers", "4", "--kill", "0", "--late", "1", "--aggregator", "median", "--admission", "2"]
    with shoal_sim(tmp_path, *arguments, "--rounds", "16", "--json", str(tmp_path / "report.json")) as child:
        output, _ = child.communicate(timeout=170)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [peer["status"] for peer in report["peers"]] == ["finished"] * 4, output
    assert len({peer["digest"] for peer in report["peers"]}) == 1
    late = next(peer["peer"] for peer in report["peers"] if peer["late"])
    came = next(event["round"] for event in report["events"] if event["what"] == "late")
    members = [each["round"] for each in report["rounds"] if late in each["members"]]
    assert members[0] >= came + 3, "two rounds at least in which it was measured, and had no weight"
    assert members == list(range(members[0], 17))
    assert len(members) >= 3
