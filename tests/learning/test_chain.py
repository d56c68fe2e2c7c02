"""Membership in virtual time: joining, leaving, losing majorities, branches, freezes, restarts."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import attrs
import torch
import trio

from shoal.dht.blobs.messages import CHUNKS, AskChunks, Sent
from shoal.learning import defaults
from shoal.learning.sync import HEAD, AskHead, HeadInfo
from shoal.node.node import Founding
from shoal.sim.world import Member, Scenario, World, simulate
from shoal.transport.memory import Route
from shoal.transport.rpc import Call

from ..sim.tiny import PLAIN, Pull


class Slow(Pull):
    """Rounds of about three seconds: faults that last a minute then cost a few rounds to simulate."""

    step_seconds: ClassVar[float] = 1.5


def scenario(nodes: int, rounds: int, *, mode: str = "available", task: type = Slow, **more: Any) -> Scenario:
    founding = Founding(strategy="diloco", strategy_args=PLAIN, mode=mode, min_peers=nodes, rounds=rounds)
    more.setdefault("late", ())
    enrolled = Founding(**{**_fields(founding), "min_peers": nodes - len(more["late"])})
    return partial(Scenario, nodes, enrolled, make_task=task, route=Route(latency=0.02))(**more)


def _fields(founding: Founding) -> dict[str, Any]:
    return {name: getattr(founding, name) for name in founding.__slots__ if not name.startswith("__")}


def events(member: Member, what: str) -> list[str]:
    return [event.detail for event in member.events if event.what == what]


def reason(member: Member) -> str:
    status = member.node.status()
    assert status is not None
    return status.reason


async def reach(world: World, round: int, *numbers: int, seconds: float = 300.0) -> None:
    """Until these nodes (by default all that live) have committed ``round``."""

    def there() -> bool:
        members = [world.members[n] for n in numbers] or world.live()
        return all(m.node.run_here is not None and m.run.round >= round for m in members)

    await world.until(there, f"round {round}", seconds)


def agree(world: World, *, rounds: int) -> None:
    """All live nodes have ended with the same bits."""
    assert [member.run.round for member in world.live()] == [rounds] * len(world.live())
    assert len({member.run.digest() for member in world.live()}) == 1
    assert len({member.run.weights().numpy().tobytes() for member in world.live()}) == 1


# -- joining and leaving --------------------------------------------------------------------------------


def test_a_peer_that_joins_late_loads_the_state_and_takes_part() -> None:
    async def script(world: World) -> None:
        await reach(world, 3)
        world.start(3)

    world = simulate(scenario(4, 10, late=(3,)), script)
    agree(world, rounds=10)
    late = world.members[3]
    (loaded,) = events(late, "loaded")
    assert "3 of 3 holders agree" in loaded
    took_part = [report for report in late.run.reports if late.peer in report.members]
    assert len(took_part) >= 4
    # Nobody lost a round by it.
    assert [report.round for report in world.members[0].run.reports] == list(range(1, 11))
    assert all(len(report.members) >= 3 for report in world.members[0].run.reports)


def test_the_founder_may_leave_and_a_peer_may_still_join_afterwards() -> None:
    async def script(world: World) -> None:
        await reach(world, 2)
        world.stop(0)
        await world.until(lambda: world.members[0].ended, "the founder to end", 5.0)
        del world.members[0]
        await reach(world, 4)
        world.start(3)

    world = simulate(scenario(4, 12, late=(3,)), script)
    agree(world, rounds=12)
    assert [member.number for member in world.live()] == [1, 2, 3]
    # A goodbye is no loss: no attempt was wasted on a leader that was gone.
    assert any("left: " in report.reason for report in world.members[1].run.reports)
    assert len([r for r in world.members[3].run.reports if world.members[3].peer in r.members]) >= 3


class Wide(Pull):
    """A state of many chunks: weights of 2 MiB, of which only the first numbers are trained."""

    def model(self) -> torch.nn.Module:
        model = super().model()
        model.rest = torch.nn.Parameter(torch.zeros(1 << 19))
        return model

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return super().loss(model, batch) + 0.0 * model.rest.sum()


class Calm(Wide):
    """Rounds long enough for the lines to be idle between two exchanges."""

    step_seconds: ClassVar[float] = 3.0


def lie(member: Member, asked: list[int]) -> None:
    """From now on ``member`` serves a state with one altered number, of the digest that everybody agrees on."""

    async def on_chunks(call: Call[AskChunks]) -> Sent:
        asked.append(member.number)
        source = member.run.blobs.offered(call.request.blob)
        assert source is not None
        for index in call.request.chunks:
            data = bytearray(await source.read(index) or b"")
            data[7] ^= 1
            await call.write(data)
        return Sent()

    member.run.endpoint.serve(CHUNKS, on_chunks)


def test_a_holder_that_serves_another_state_than_it_said_is_named_and_the_join_goes_on_without_it() -> None:
    asked: list[int] = []

    async def script(world: World) -> None:
        for number in range(3):
            # So slow that every holder is needed.
            world.network.set_uplink(f"node{number}", 4e6)
        await reach(world, 2)
        for number in (0, 1):
            lie(world.members[number], asked)
        world.start(3)

    world = simulate(attrs.evolve(scenario(4, 9, late=(3,)), make_task=Calm), script)
    agree(world, rounds=9)
    joiner = world.members[3]
    assert set(asked) == {0, 1}
    assert len(asked) <= 4, "found out at the first chunk: at most a second request was on its way"
    liars = [event.peer for event in joiner.events if event.what == "liar"]
    assert sorted(liars) == sorted(world.members[number].peer for number in (0, 1))
    (loaded,) = events(joiner, "loaded")
    assert "from 1 peer," in loaded


def test_a_joiner_loads_the_state_from_all_holders_at_once() -> None:
    async def script(world: World) -> None:
        for number in range(3):
            world.network.set_uplink(f"node{number}", 1e6)
        await reach(world, 2)
        world.start(3)

    world = simulate(attrs.evolve(scenario(4, 6, late=(3,)), make_task=Calm), script)
    agree(world, rounds=6)
    (loaded,) = events(world.members[3], "loaded")
    assert "from 3 peers" in loaded
    # Weights and momentum, 4 MiB: 4.2 s from one of them, 1.4 s from all, 2.1 s in whole chunks.
    assert float(loaded.split(" in ")[1].split()[0]) < 3.0


def test_a_joiner_that_loads_for_longer_than_rounds_take_is_waited_for_and_takes_part_from_the_next_on() -> None:
    async def script(world: World) -> None:
        await reach(world, 3)
        for number in range(3):
            world.network.set_route(f"node{number}", "node3", Route(latency=0.02, bandwidth=3e5))
        world.start(3)

    world = simulate(attrs.evolve(scenario(4, 8, late=(3,)), make_task=Wide), script)
    agree(world, rounds=8)
    late = world.members[3]
    (loaded,) = events(late, "loaded")
    # Longer than the grace for stragglers, which is 3 s.
    assert float(loaded.split(" in ")[1].split()[0]) > 5.0
    first = next(report for report in world.members[0].run.reports if late.peer in report.joined)
    assert late.peer in world.members[0].run.reports[first.round].members


def test_a_holder_that_names_another_digest_is_outvoted() -> None:
    async def script(world: World) -> None:
        await reach(world, 2)
        liar = world.members[1]
        honest = liar.run.membership._on_head

        async def on_head(call: Call[AskHead]) -> HeadInfo:
            info = await honest(call)
            object.__setattr__(info, "digest", b"x" * 32 if info.digest else b"")
            return info

        liar.run.endpoint.serve(HEAD, on_head)
        world.start(3)

    world = simulate(scenario(4, 9, late=(3,)), script)
    agree(world, rounds=9)
    assert any("2 of 3 holders agree" in detail for detail in events(world.members[3], "loaded"))


# -- lost majorities ------------------------------------------------------------------------------------


def test_in_strict_mode_a_minority_waits_says_so_and_catches_up_when_the_partition_ends() -> None:
    reasons: list[str] = []
    stuck: list[int] = []

    async def script(world: World) -> None:
        await reach(world, 2)
        world.partition((0, 1), (2, 3, 4))
        await reach(world, 12, 2, 3, 4)
        stuck.extend(world.members[n].run.round for n in (0, 1))
        reasons.extend(reason(world.members[n]) for n in (0, 1))
        world.heal()

    world = simulate(scenario(5, 30, mode="strict"), script)
    agree(world, rounds=30)
    assert max(stuck) <= 4
    assert reasons == ["strict: 2 of 5 voters alive, waiting for a majority of 3"] * 2
    assert all(member.run.membership.head.record.branch == 0 for member in world.live())
    for number in (0, 1):
        assert any(r.round > 12 and world.members[number].peer in r.members for r in world.members[2].run.reports)


def test_in_strict_mode_nobody_commits_while_no_side_has_a_majority_and_all_go_on_afterwards() -> None:
    rounds: list[list[int]] = []

    async def script(world: World) -> None:
        await reach(world, 2)
        world.partition((0, 1), (2, 3), (4,))
        await trio.sleep(10.0)
        rounds.append([member.run.round for member in world.live()])
        await trio.sleep(60.0)
        rounds.append([member.run.round for member in world.live()])
        assert all("strict: " in reason(member) for member in world.live())
        world.heal()

    world = simulate(scenario(5, 8, mode="strict"), script)
    agree(world, rounds=8)
    assert rounds[0] == rounds[1]
    assert all(not events(member, "branch") for member in world.live())


def test_in_available_mode_a_minority_branches_after_the_lease_and_gives_way_when_branches_meet() -> None:
    branched: list[int] = []
    began: list[float] = []

    async def script(world: World) -> None:
        await reach(world, 2)
        world.partition((0, 1), (2, 3, 4))
        began.append(trio.current_time())
        await world.until(lambda: all(events(world.members[n], "branch") for n in (0, 1)), "branches", 120.0)
        branched.append(int(trio.current_time() - began[0]))
        assert world.members[0].run.membership.head.record.branch == 1
        at = world.members[0].run.round
        await reach(world, at + 3, 0, 1)
        assert {member.run.digest() for member in world.live()[:2]} != {world.members[2].run.digest()}
        world.heal()

    world = simulate(scenario(5, 45), script)
    agree(world, rounds=45)
    assert branched[0] >= defaults.LEASE
    # Three trained more than two: theirs is the branch that stays.
    assert world.members[0].run.membership.head.record.branch == 0
    for number in (0, 1):
        assert any("another branch" in detail for detail in events(world.members[number], "step-aside"))
        assert events(world.members[number], "loaded")
    assert not any(events(world.members[number], "step-aside") for number in (2, 3, 4))


def test_of_two_peers_one_goes_on_when_the_other_is_gone_whatever_the_mode() -> None:
    async def script(world: World) -> None:
        await reach(world, 2)
        world.kill(1)

    world = simulate(scenario(2, 6, mode="strict"), script)
    agree(world, rounds=6)
    assert events(world.members[0], "branch")


# -- freezes and restarts -------------------------------------------------------------------------------


async def restart(world: World, *numbers: int) -> None:
    """One after the other, as people do: the first finds nobody, the others find it through its ticket."""
    for number in numbers:
        world.restart(number)
        await trio.sleep(1.0)


def test_a_node_that_is_frozen_for_a_minute_is_left_behind_and_comes_back() -> None:
    missed: list[int] = []

    async def script(world: World) -> None:
        await reach(world, 2)
        world.freeze(1)
        at = world.members[0].run.round
        await trio.sleep(60.0)
        missed.append(world.members[0].run.round - at)
        world.unfreeze(1)

    world = simulate(scenario(4, 40), script)
    agree(world, rounds=40)
    # The others lost some seconds to find out, not the minute.
    assert missed[0] >= 8
    back = [r.round for r in world.members[0].run.reports if world.members[1].peer in r.members]
    assert max(back) == 40


def test_a_killed_node_comes_back_with_its_key_and_catches_up() -> None:
    async def script(world: World) -> None:
        await reach(world, 3)
        world.kill(2)
        await reach(world, 7)
        world.restart(2)

    world = simulate(scenario(4, 16), script)
    agree(world, rounds=16)
    again = world.members[2]
    assert any(again.peer in report.members for report in world.members[0].run.reports if report.round > 7)


def test_a_killed_node_that_is_back_at_once_loses_at_most_a_round() -> None:
    async def script(world: World) -> None:
        await reach(world, 3)
        world.kill(2)
        await trio.sleep(1.0)
        world.restart(2)

    world = simulate(scenario(4, 12), script)
    agree(world, rounds=12)
    reports = world.members[0].run.reports
    assert sum(world.members[2].peer not in report.members for report in reports) <= 4


def test_a_run_whose_nodes_were_all_stopped_goes_on_where_it_was() -> None:
    rounds: list[int] = []

    async def script(world: World) -> None:
        await reach(world, 3)
        for number in range(3):
            world.stop(number)
        await world.until(lambda: all(m.ended for m in world.members.values()), "everybody to end", 10.0)
        rounds.append(max(member.run.round for member in world.members.values()))
        await restart(world, 0, 1, 2)

    world = simulate(scenario(3, 10), script)
    agree(world, rounds=10)
    assert all(events(member, "restored") for member in world.live())
    first = [member.run.reports[0].round for member in world.live()]
    assert min(first) >= rounds[0] - 1


def test_a_run_whose_nodes_were_all_killed_at_once_goes_on_from_what_they_had_saved() -> None:
    async def script(world: World) -> None:
        await reach(world, 5)
        for number in range(3):
            world.kill(number)
        await restart(world, 0, 1, 2)

    for mode in ("strict", "available"):
        world = simulate(scenario(3, 12, mode=mode), script)
        agree(world, rounds=12)


def test_a_founder_alone_goes_on_after_a_restart() -> None:
    async def script(world: World) -> None:
        await reach(world, 3)
        world.kill(0)
        await restart(world, 0)

    world = simulate(scenario(1, 8), script)
    agree(world, rounds=8)
