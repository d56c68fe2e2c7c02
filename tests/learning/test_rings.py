"""Contributions that go round a ring: real endpoints and bytes, in virtual time and over sockets.

Message by message, with every fault at every action: ``test_round_machine.py``; model-checked: ``test_agreement.py``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
import trio
from torch import Tensor

from shoal.learning import defaults as learning
from shoal.learning import exact
from shoal.learning.reduce.filling import Filling
from shoal.learning.rounds import instance, leader, relay
from shoal.learning.rounds.messages import Plan
from shoal.learning.rounds.methods import PASS, Passed
from shoal.learning.rounds.planning import plan_fault
from shoal.learning.state import bytes_view
from shoal.sim.reduce_world import ReduceScenario, optimum, reduce_rounds
from shoal.transport.errors import RemoteRefused
from shoal.transport.identity import PeerId
from shoal.transport.memory_flow import Route
from shoal.transport.rpc import Body

from .reduce_group import Group, Member, reduce_group
from .rings import ring_plan, rings  # noqa: F401
from .test_reduce_faults import at_phase, plans

#: Elements of a vector: 1 MiB.
ELEMENTS = 1 << 18
NARROW = Route(latency=0.005, bandwidth=50e6, window=128 << 10, buffer=8 << 10)


def check(group: Group, members: list[Member], holders: list[Member] | None = None) -> None:
    """One record everywhere, of exactly ``members``; everybody holds the same bits, the mean but for rounding."""
    holders = holders or group.live()
    parts = [member.vector for member in group.members if member in members]
    mean = exact.weighted_mean(parts, [1.0] * len(parts))
    first = holders[0].result
    assert first is not None
    assert torch.allclose(first, mean, rtol=1e-5, atol=1e-6)
    for member in holders:
        commit = member.instance.commit
        assert commit is not None, group.describe(member)
        assert commit.record.members == tuple(m.me for m in group.members if m in members), commit.record.reason
        assert member.result is not None
        assert torch.equal(member.result, first)


def ringed(group: Group) -> bool:
    """Whether everybody followed a ring to the end of the round."""
    found = [member.instance.voter.plan for member in group.live()]
    return all(plan is not None and bool(plan.ring) and plan.epoch == 0 for plan in found)


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("count", [3, 4, 7])
async def test_a_ring_moves_as_many_bytes_as_a_butterfly_and_all_hold_the_same_bits(count: int) -> None:
    async with reduce_group(count, ELEMENTS + 5) as group:
        for _ in range(2):
            before = [member.sent for member in group.members]
            await group.reduce(limit=10.0)
            check(group, group.members)
            assert ringed(group)
            for member, sent in zip(group.members, before, strict=True):
                most = 2 * (count - 1) * 4 * (ELEMENTS + 5) / count
                assert member.sent - sent < 1.01 * most + 8192 * count
            group.advance()


@pytest.mark.real(timeout=60)
@pytest.mark.usefixtures("rings")
async def test_a_ring_over_sockets() -> None:
    async with reduce_group(4, 8 * ELEMENTS, real=True) as group:
        for _ in range(3):
            await group.reduce(limit=20.0)
            check(group, group.members)
            assert ringed(group)
            group.advance()


@pytest.mark.usefixtures("rings")
async def test_weights_count_and_a_vector_that_is_not_whole_yet_goes_round_as_it_comes() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        fillings: dict[str, Filling] = {}

        async def take_part(member: Member) -> None:
            index = group.members.index(member)
            fillings[member.name] = filling = Filling(ELEMENTS, 0)
            member.nursery.start_soon(member.instance.run)
            member.instance.begin(member.vector, 1, 1 + index, ELEMENTS, "", filling=filling)
            for stop in range(ELEMENTS // 8, ELEMENTS + 1, ELEMENTS // 8):
                await trio.sleep(0.01 * (1 + index))
                filling.advance(stop)
            member.result = await member.instance.outcome()

        group._take_part = take_part  # type: ignore[method-assign]
        await group.reduce(limit=10.0)
        assert ringed(group)
        mean = exact.weighted_mean([member.vector for member in group.members], [1.0, 2.0, 3.0, 4.0])
        for member in group.members:
            assert member.result is not None and group.members[0].result is not None
            assert torch.equal(member.result, group.members[0].result)
            assert torch.allclose(member.result, mean, rtol=1e-5, atol=1e-6)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("role", ["leader", "member"])
@pytest.mark.parametrize("phase", ["scatter", "combine", "gather", "commit"])
async def test_whoever_dies_in_a_ring_costs_a_butterfly_or_less(role: str, phase: str) -> None:
    async with reduce_group(5, 8 * ELEMENTS, route=NARROW) as group:
        clean = await group.reduce(limit=20.0)
        group.advance()
        victim = group.leader if role == "leader" else next(m for m in group.members if m is not group.leader)
        others = [member for member in group.members if member is not victim]

        async def kill() -> None:
            await trio.sleep({"scatter": 0.1, "gather": 0.05}.get(phase, 0.0))
            group.kill(victim)

        async with trio.open_nursery() as nursery:
            at_phase(group, phase, victim, lambda: nursery.start_soon(kill))
            seconds = await group.reduce(limit=30.0, wait_for=others)
        commit = others[0].instance.commit
        assert commit is not None
        check(group, [m for m in group.members if m.me in commit.record.members], others)
        assert seconds < 3.0 * clean


@pytest.mark.usefixtures("rings")
async def test_a_ring_that_does_not_close_is_not_planned_again_soon() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        broken = group.members[1]

        async def nothing(action: object) -> None:
            """It takes part, and passes nothing on."""

        def open_(member: Member) -> None:
            if member is broken:
                member.instance.traffic.relay.circulate = nothing  # type: ignore[method-assign]

        group.open_hooks[:] = [open_]
        await group.reduce(limit=30.0)
        check(group, group.members)
        commit = group.members[0].instance.commit
        assert commit is not None and "the ring does not close" in commit.record.reason
        assert plans(group.members[0]) == ["attempt 0, epoch 0", "attempt 0, epoch 1"]
        group.open_hooks.clear()
        group.advance()
        for member in group.members:
            group.open(member)
        assert not any(member.instance.rings() for member in group.members)
        await trio.sleep(learning.RING_AGAIN + 1.0)
        assert all(member.instance.rings() for member in group.members)
        # Each that breaks soon after keeps it from another one for twice as long.
        group.open_hooks.append(open_)
        await group.reduce(limit=30.0)
        group.open_hooks.clear()
        group.advance()
        for member in group.members:
            group.open(member)
        await trio.sleep(learning.RING_AGAIN + 1.0)
        assert not any(member.instance.rings() for member in group.members)
        await trio.sleep(learning.RING_AGAIN + 1.0)
        assert all(member.instance.rings() for member in group.members)


@pytest.mark.usefixtures("rings")
async def test_what_is_not_finite_never_gets_further_than_one_member(monkeypatch: pytest.MonkeyPatch) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        liar, add = group.members[2], relay.add

        def poison(before: Tensor | None, own: Tensor, factor: float, out: Tensor) -> None:
            add(before, own, factor, out)
            if own.data_ptr() - liar.vector.data_ptr() in range(4 * ELEMENTS):
                out[7] = float("nan")

        monkeypatch.setattr(relay, "add", poison)
        await group.reduce(limit=10.0)
        # Its own contribution is sound: to the owners of a butterfly it sends that.
        check(group, group.members)
        commit = group.members[0].instance.commit
        assert commit is not None and "the ring does not close" in commit.record.reason
        notes = [note.detail for member in group.members for _, note in member.notes if note.what == "refused"]
        assert any("what came round the ring" in detail for detail in notes)


@pytest.mark.usefixtures("rings")
async def test_sums_that_are_not_the_rings_are_refused_by_name_and_change_nothing() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        told: list[str] = []
        one, other = group.members[0], group.members[1]

        async def tell(index: int, start: int, stop: int, epoch: int = 0) -> None:
            request = Passed(other.instance.key, 0, epoch, index, start, stop)
            body = [memoryview(bytes(4 * max(0, stop - start)))]
            with pytest.raises(RemoteRefused) as caught:
                await one.endpoint.call(other.me, PASS, request, body=body)
            told.append(caught.value.code)

        async def attack() -> None:
            plan = other.instance.voter.plan
            assert plan is not None
            behind = plan.ring[plan.ring.index(other.me) - 1]
            own = next(i for i, piece in enumerate(plan.slices) if piece.owner == behind)
            await tell(own, *plan.slices[own].range)  # the sum of that slice begins with the one it is sent to
            await tell(0, 0, 16)
            await tell(99, 0, 16)
            await tell(0, 0, 64 * ELEMENTS, epoch=3)

        async with trio.open_nursery() as nursery:
            at_phase_now = [lambda: nursery.start_soon(attack)]

            def hook(member: Member, note: object) -> None:
                plan = other.instance.voter.plan
                if member is other and plan is not None and at_phase_now:
                    at_phase_now.pop()()

            group.hooks.append(hook)
            await group.reduce(limit=10.0)
        check(group, group.members)
        assert told == ["bad-range"] * 4


def test_a_ring_of_others_or_where_each_contribution_counts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> Plan:
        async with reduce_group(4, ELEMENTS) as group:
            await group.reduce(limit=10.0)
            plan = group.members[0].instance.voter.plan
            assert plan is not None
            return plan

    monkeypatch.setattr(leader, "first_plan", ring_plan)
    plan = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    peers = plan.members
    offer = instance.Ready(plan.key, 1, 0, True, 1, 1, ELEMENTS, None, False, "")

    def wrong(sums: bool = True, **changes: object) -> str | None:
        return plan_fault(attrs.evolve(plan, **changes), peers, ELEMENTS, peers[0], offer, (), sums)

    assert wrong() is None
    for changes in (
        {"ring": peers[:3]},
        {"ring": (*peers[:3], peers[0])},
        {"receivers": peers[:3], "slices": tuple(attrs.evolve(p, owner=peers[0]) for p in plan.slices)},
        {"members": peers[1:], "samples": (1,) * 3, "weights": (1,) * 3},
    ):
        assert wrong(**changes) == "a ring of others than the members"
    assert wrong(slices=tuple(attrs.evolve(p, owner=peers[0]) for p in plan.slices)) == (
        "a ring in which somebody owns two slices"
    )
    assert wrong(epoch=1) == "a ring after the first epoch"
    assert wrong(sums=False) == wrong(codec="bf16") == "a ring where each contribution is looked at"


# -- what it is for ---------------------------------------------------------------------------------------------------

#: Paths of six peers with 25 Mbit/s each that are 5 to 19 times slower than that: (from, to) → how many times.
SLOW_PATHS = {(0, 1): 6.5, (0, 3): 6.0, (1, 3): 13.1, (1, 5): 6.6, (2, 0): 18.9, (2, 5): 9.6, (3, 5): 14.1,
              (4, 2): 12.1, (4, 3): 19.0}  # fmt: skip


def test_where_many_paths_are_slow_a_ring_is_planned_once_they_are_known_and_reaches_the_bound() -> None:
    up = 25e6 / 8
    routes = {pair: up / times for pair, times in SLOW_PATHS.items()}
    scenario = ReduceScenario((up,) * 6, 24 << 20, rounds=3, routes=routes, seed=4)
    first, *later = reduce_rounds(scenario)
    assert first.seconds > 3.0 * optimum(scenario)  # a butterfly, as nothing is known
    for result in later:
        assert "ring" in result.reason and result.epochs == result.attempts == 1
        assert len(result.members) == 6
        assert optimum(scenario) / result.seconds > 0.9


# -- lies -------------------------------------------------------------------------------------------------------------


async def with_something_before_the_plan(group: Group, act: Callable[[], Awaitable[None]]) -> float:
    """A round in which ``act`` is done before anybody is ready: its seconds from there on."""

    async def late(member: Member) -> None:
        member.nursery.start_soon(member.instance.run)
        await trio.sleep(0.5)
        member.instance.begin(member.vector, 1, 1, member.vector.numel(), "")
        member.result = await member.instance.outcome()

    group._take_part = late  # type: ignore[method-assign]

    async def soon() -> None:
        await trio.sleep(0.1)
        await act()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(soon)
        return await group.reduce(limit=60.0) - 0.5


async def say_sum(sender: Member, to: Member, index: int, *, attempt: int = 0, epoch: int = 0, size: int = 0) -> str:
    """Before there is a plan ``sender`` says to pass on the sum of a slice; what comes of it."""
    step = ELEMENTS // 4
    start, stop = (0, size) if size else (index * step, (index + 1) * step)
    request = Passed(to.instance.key, attempt, epoch, index, start, stop)
    body = [bytes_view(torch.full((stop - start,), 1000.0))]
    try:
        await sender.endpoint.call(to.me, PASS, request, body=body)
    except RemoteRefused as refused:
        return refused.code
    return "taken"


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("index", range(4))
async def test_a_sum_of_somebody_else_that_comes_before_the_plan_counts_for_nothing_and_is_in_nobodys_way(
    index: int,
) -> None:
    """The ring is 0, 2, 3, 1: to each member, for each slice, from one that is not before it."""
    async with reduce_group(4, ELEMENTS) as group:

        async def lie() -> None:
            for victim, before in {0: 1, 2: 0, 3: 2, 1: 3}.items():
                liar = next(number for number in range(4) if number not in (victim, before))
                assert await say_sum(group.members[liar], group.members[victim], index) == "taken"

        seconds = await with_something_before_the_plan(group, lie)
        check(group, group.members)
        assert ringed(group)
        assert seconds < 1.0


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("size", [1, 64, ELEMENTS])
@pytest.mark.parametrize("index", [0, 2])
async def test_a_sum_of_another_length_that_comes_before_the_plan_costs_the_ring_and_ends_nobody(
    index: int, size: int
) -> None:
    """From the member before: for a slice of whom it is sent to, and for one that is to be passed on."""
    async with reduce_group(4, ELEMENTS) as group:

        async def lie() -> None:
            assert await say_sum(group.members[1], group.members[0], index, size=size) == "taken"

        assert await with_something_before_the_plan(group, lie) < 1.0
        check(group, group.members)
        assert not ringed(group)


@pytest.mark.usefixtures("rings")
async def test_early_sums_by_the_hundred_keep_nobody_elses_away() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        liar, victim = group.members[0], group.members[1]

        async def flood() -> None:
            receive = victim.instance.receive

            def late(sender: PeerId, message: object) -> None:
                if isinstance(message, Plan):
                    victim.nursery.start_soon(later, sender, message)
                else:
                    receive(sender, message)

            async def later(sender: PeerId, message: object) -> None:
                await trio.sleep(0.1)
                receive(sender, message)

            victim.instance.receive = late  # type: ignore[method-assign]
            told = [await say_sum(liar, victim, index, attempt=50, size=1) for index in range(100)]
            told += [await say_sum(liar, victim, 0, epoch=1, size=1)]
            assert told == ["taken"] * 100 + ["bad-range"]

        seconds = await with_something_before_the_plan(group, flood)
        check(group, group.members)
        assert ringed(group)
        assert seconds < 1.0


@pytest.mark.usefixtures("rings")
async def test_a_leader_cannot_leave_anybody_out_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        liar = group.leader
        out = next(member for member in reversed(group.members) if member is not liar)
        freeze = leader.freeze

        def fewer(plan: Plan, held: Mapping[PeerId, Sequence[PeerId]]) -> Any:
            frozen, slow, why = freeze(plan, held)
            return tuple(peer for peer in frozen if peer != out.me) if plan.ring else frozen, slow, why

        monkeypatch.setattr(leader, "freeze", fewer)
        await group.reduce(limit=60.0)
        commit = group.members[0].instance.commit
        assert commit is not None
        check(group, [member for member in group.members if member.me in commit.record.members])
        refused = [note.detail for member in group.members for _, note in member.notes if note.what == "refused"]
        assert any("nobody can be left out" in detail for detail in refused)


async def test_after_a_ring_that_broke_the_next_leader_plans_a_butterfly(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = leader.first_plan
    monkeypatch.setattr(leader, "first_plan", lambda *a, **k: ring_plan(*a, **k) if a[8] else plain(*a, **k))
    async with reduce_group(5, 8 * ELEMENTS, route=NARROW) as group:
        victim = group.leader
        others = [member for member in group.members if member is not victim]

        async def kill() -> None:
            await trio.sleep(0.1)
            group.kill(victim)

        async with trio.open_nursery() as nursery:
            at_phase(group, "scatter", victim, lambda: nursery.start_soon(kill))
            await group.reduce(limit=60.0, wait_for=others)
        plan = others[0].instance.voter.plan
        assert plan is not None and plan.attempt == 1 and not plan.ring
        check(group, others, others)


@pytest.mark.usefixtures("rings")
@pytest.mark.parametrize("moved_on", [False, True])
async def test_a_sum_that_is_cut_off_leaves_nothing_behind_and_may_come_again(moved_on: bool) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        sender, to = group.members[3], group.members[1]
        relays = []

        async def cut_off() -> None:
            relay = to.instance.traffic.relay
            relays.append(relay)

            async def pieces() -> AsyncGenerator[memoryview, None]:
                yield bytes_view(torch.zeros(ELEMENTS // 8))
                await trio.sleep_forever()

            request = Passed(to.instance.key, 0, 0, 1, ELEMENTS // 4, ELEMENTS // 2)
            with trio.move_on_after(0.05):
                await sender.endpoint.call(to.me, PASS, request, body=Body(ELEMENTS, pieces))
            await trio.sleep(0.1)
            assert relay._sums == {}
            if moved_on:
                with trio.move_on_after(0.05) as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(
                            partial(sender.endpoint.call, to.me, PASS, request, body=Body(ELEMENTS, pieces))
                        )
                        await trio.sleep(0.02)
                        relay.drop()
                assert scope.cancelled_caught and relay._sums == {}

        seconds = await with_something_before_the_plan(group, cut_off)
        check(group, group.members)
        assert ringed(group) and len(relays) == 1
        assert seconds < 1.0
