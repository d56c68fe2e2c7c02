"""What each fault costs a round of the group reduce: real endpoints, links and bytes, in virtual time.

Message by message, at every single action, faults are in ``test_round_machine.py`` (kills, freezes, restarts, losses,
two leaders), for whole runs in ``tests/sim/test_kill_matrix.py`` and ``test_chain.py`` (a role killed in each phase; a
node frozen for a minute, killed and restarted). Here: what they cost in time, plans and bytes, and the faults that only
links have. Real processes: ``tests/sim/test_real_stalls.py``, ``scripts/bench.py kill`` and ``soak``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio

from shoal.learning.reduce.coding import Coding
from shoal.learning.reduce.rates import NOTHING
from shoal.learning.reduce.slices import reassign
from shoal.learning.rounds import instance, leader
from shoal.learning.rounds.actions import Note
from shoal.learning.rounds.messages import Plan
from shoal.learning.rounds.planning import first_plan
from shoal.transport.identity import PeerId
from shoal.transport.memory_flow import Route

from .reduce_group import Group, Member, reduce_group

#: Elements of a vector: 1 MiB. At 50 MB/s a slice of a quarter takes 5 ms.
ELEMENTS = 1 << 18
SLICE = ELEMENTS  # bytes of one of four slices
#: Little is already on its way on these when its sender dies. A slice of a quarter of 8 MiB takes 42 ms, and 0.5 s.
NARROW = Route(latency=0.005, bandwidth=50e6, window=128 << 10, buffer=8 << 10)
PIECE = 8 * SLICE
SLOW = Route(latency=0.005, bandwidth=4e6, window=32 << 10, buffer=8 << 10)
#: Bytes per second of a line that is nearly dead, and of one that answers pings and would take minutes for a slice.
TRICKLES = (1e3, 2e4, 2e5)
#: Virtual seconds until a link whose peer does not answer any more is given up: idle for 5 s, pinged, 5 s more.
SILENT = 11.0
#: Virtual seconds that a phase may take at most before it goes on without those that are late; see learning/pace.py.
PHASE = 4.5

ROLES = ("contributor", "owner", "leader")


#: Who owns no slice in the plans of this test.
IDLE: dict[PeerId, None] = {}


@pytest.fixture(autouse=True)
def equal_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner makes of measured rates is another test's: here all but the idle own the same."""
    IDLE.clear()

    def plan(*arguments: Any, **more: Any) -> Plan:
        made = first_plan(*arguments, **more)
        heirs = tuple(owner for owner in dict.fromkeys(p.owner for p in made.slices) if owner not in IDLE)
        return attrs.evolve(made, slices=reassign(made.slices, IDLE, heirs))

    monkeypatch.setattr(leader, "first_plan", plan)
    monkeypatch.setattr(instance, "measured", lambda endpoint, voters: NOTHING)


def victim_of(group: Group, role: str) -> Member:
    """Who has that role in the next round. A contributor owns no slice."""
    if role == "leader":
        return group.leader
    victim = next(member for member in group.members if member is not group.leader)
    IDLE.clear()
    if role == "contributor":
        IDLE[victim.me] = None
    return victim


def at_phase(group: Group, phase: str, victim: Member, act: Callable[[], None]) -> None:
    """Act once, when the victim says that it begins ``phase`` of the round after the present one."""
    round = group.head.round + 1
    done: list[None] = []

    def hook(member: Member, note: Note) -> None:
        begins = (note.phase, note.what) == (phase, "begin") and member.instance.round == round
        if member is victim and begins and not done:
            done.append(None)
            act()

    group.hooks.append(hook)


def plans(member: Member) -> list[str]:
    """Attempt and epoch of every plan it followed."""
    return [text.partition(":")[0] for text in member.plans]


async def first_round(group: Group) -> float:
    """A round without faults: its seconds. Links are warm afterwards."""
    seconds = await group.reduce(limit=5.0)
    group.check(members=group.members)
    group.advance()
    return seconds


# -- deaths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [0, 1, 2])
async def test_an_owner_that_dies_costs_one_gather_and_its_slice_only_if_nobody_has_it(told: int) -> None:
    """It has sent its combined slice to 0, 1 or n-2 of the others; to the rest it is under way."""
    async with reduce_group(4, 8 * ELEMENTS, route=NARROW) as group:
        clean = await first_round(group)
        victim = victim_of(group, "owner")
        others = [member for member in group.members if member is not victim]
        index, moment = group.voters.index(victim.me), []

        def slow_down() -> None:
            for member in others[told:] if told else ():
                group.world.set_route(victim.name, member.name, SLOW, one_way=True)

        def have_it() -> int:
            return sum(index in member.instance.voter._combined for member in others)

        async def kill() -> None:
            while victim.instance.voter.frozen is None or have_it() < told:
                await trio.sleep(0.0005)
            await trio.sleep(0.004)
            assert have_it() == told
            moment.append(trio.current_time())
            group.kill(victim)

        at_phase(group, "combine", victim, slow_down)
        sent = sum(member.sent for member in others)
        async with trio.open_nursery() as nursery:
            at_phase(group, "combine", victim, lambda: nursery.start_soon(kill))
            await group.reduce(limit=20.0, wait_for=others)
        extra = sum(member.sent for member in others) - sent - 3 * 6 * PIECE  # beyond a round without faults
        if told:
            group.check(members=group.members, holders=others)
            assert all(plans(member) == ["attempt 0, epoch 0"] for member in others)
            assert extra < (3 - told) * PIECE + PIECE // 8  # to each that lacked it
        else:
            group.check(members=others, holders=others)
            assert all(plans(member) == ["attempt 0, epoch 0", "attempt 0, epoch 1"] for member in others)
            # Its slice is scattered to three heirs, each of whom has a third of it already: 2. The gather of three: 8.
            assert extra < 10 * PIECE + PIECE // 8
        assert trio.current_time() - moment[0] < 2 * clean


async def test_a_contributor_that_dies_before_the_freeze_costs_nothing() -> None:
    async with reduce_group(4, 8 * ELEMENTS, route=NARROW) as group:
        clean = await first_round(group)
        victim = victim_of(group, "contributor")
        others = [member for member in group.members if member is not victim]
        sent = sum(member.sent for member in others)

        async def kill() -> None:
            await trio.sleep(0.02)  # in mid scatter
            group.kill(victim)

        async with trio.open_nursery() as nursery:
            at_phase(group, "scatter", victim, lambda: nursery.start_soon(kill))
            seconds = await group.reduce(limit=20.0, wait_for=others)
        group.check(members=others, holders=others)
        assert all(plans(member) == ["attempt 0, epoch 0"] for member in others)
        assert seconds < 1.5 * clean
        # Each sends two thirds of its vector to the other two owners, and its third to them and the victim at most.
        assert sum(member.sent for member in others) - sent < 3 * (2 + 3) * PIECE * 4 / 3 + PIECE // 8


async def test_a_contributor_that_dies_after_the_freeze_stays_in_and_costs_nothing() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        clean = await first_round(group)
        victim = victim_of(group, "contributor")
        others = [member for member in group.members if member is not victim]
        at_phase(group, "combine", victim, lambda: group.kill(victim))
        seconds = await group.reduce(limit=20.0, wait_for=others)
        group.check(members=group.members, holders=others)
        assert all(plans(member) == ["attempt 0, epoch 0"] for member in others)
        assert seconds < 1.5 * clean


@pytest.mark.parametrize("phase", ["scatter", "combine", "gather", "commit"])
async def test_a_leader_that_dies_costs_one_hand_over_and_only_its_slice_is_scattered_anew(phase: str) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        clean = await first_round(group)
        victim = group.leader
        others = [member for member in group.members if member is not victim]
        moment: list[float] = []

        async def kill() -> None:
            await trio.sleep({"scatter": 0.02, "gather": 0.012}.get(phase, 0.0))
            moment.append(trio.current_time())
            group.kill(victim)

        sent = sum(member.sent for member in others)
        async with trio.open_nursery() as nursery:
            at_phase(group, phase, victim, lambda: nursery.start_soon(kill))
            await group.reduce(limit=20.0, wait_for=others)
        group.check(members=others, holders=others)
        assert all(plans(member) == ["attempt 0, epoch 0", "attempt 1, epoch 0"] for member in others)
        extra = sum(member.sent for member in others) - sent - 3 * 6 * SLICE
        assert extra < 10 * SLICE + SLICE // 8
        assert trio.current_time() - moment[0] < 2 * clean


# -- stalls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("phase", ["scatter", "gather", "commit"])
async def test_a_peer_that_stands_still_for_a_minute_holds_the_others_up_until_its_link_is_given_up(
    role: str, phase: str
) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        await first_round(group)
        victim = victim_of(group, role)
        others = [member for member in group.members if member is not victim]
        at_phase(group, phase, victim, lambda: group.world.freeze(victim.name))
        seconds = await group.reduce(limit=60.0, wait_for=others)
        assert seconds < SILENT + PHASE
        await trio.sleep(group.began + 60.0 - trio.current_time())
        assert victim.result is None
        group.world.unfreeze(victim.name)
        with trio.fail_after(15.0):
            while victim.result is None:
                await trio.sleep(0.01)
        commit = others[0].instance.commit
        assert commit is not None
        group.check(members=[m for m in group.members if m.me in commit.record.members])
        # And it takes part in the next round as if nothing had been.
        group.advance()
        with trio.fail_after(20.0):
            while any(member.presence.lost for member in group.members):
                await trio.sleep(0.1)
        await group.reduce(limit=5.0)
        group.check(members=group.members)


async def test_a_loop_that_lags_half_a_second_is_not_taken_for_dead() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        await first_round(group)
        for role in (*ROLES, *ROLES):
            victim = victim_of(group, role)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_lag, group, victim)
                # Everything it is asked for comes half a second late: messages of a round follow on each other.
                assert await group.reduce(limit=12.0) > 0.5
                nursery.cancel_scope.cancel()
            group.world.unfreeze(victim.name)
            group.check(members=group.members)
            assert all(plans(member) == ["attempt 0, epoch 0"] for member in group.members)
            assert all(not member.lost for member in group.members)
            group.advance()


async def _lag(group: Group, victim: Member) -> None:
    while True:
        group.world.freeze(victim.name)
        await trio.sleep(0.5)
        group.world.unfreeze(victim.name)
        await trio.sleep(0.01)


# -- ways that are slow, or go only one way ---------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("phase", ["scatter", "combine"])
@pytest.mark.parametrize("speed", TRICKLES)
async def test_a_peer_whose_line_slows_down_to_a_trickle_costs_some_deadlines_and_keeps_nobody_from_ending(
    role: str, phase: str, speed: float
) -> None:
    async with reduce_group(4, 8 * ELEMENTS) as group:
        await first_round(group)
        victim = victim_of(group, role)
        others = [member for member in group.members if member is not victim]
        at_phase(group, phase, victim, lambda: group.world.set_uplink(victim.name, speed))
        seconds = await group.reduce(limit=400.0, wait_for=others)
        assert seconds < SILENT + 4 * PHASE
        commit = others[0].instance.commit
        assert commit is not None
        group.check(members=[m for m in group.members if m.me in commit.record.members], holders=others)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("deaf", [False, True], ids=["mute", "deaf"])
@pytest.mark.parametrize("phase", ["convene", "scatter", "gather"])
async def test_a_peer_cut_off_in_one_direction_costs_the_time_until_its_links_are_given_up(
    role: str, deaf: bool, phase: str
) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        await first_round(group)
        victim = victim_of(group, role)
        others = [member for member in group.members if member is not victim]

        def cut() -> None:
            for member in others:
                one, other = (member, victim) if deaf else (victim, member)
                group.world.cut(one.name, other.name, one_way=True)

        at_phase(group, phase, victim, cut)
        seconds = await group.reduce(limit=60.0, wait_for=others)
        assert seconds < SILENT + 2 * PHASE
        commit = others[0].instance.commit
        assert commit is not None
        group.check(members=[m for m in group.members if m.me in commit.record.members], holders=others)
        if phase == "convene":  # it could not say that it is ready, or did not hear the plan
            assert victim.me not in commit.record.members
        group.world.heal()
        with trio.fail_after(150.0):  # the memory network's TCP repeats after up to two minutes
            while victim.result is None:
                await trio.sleep(0.05)
        group.check(members=[m for m in group.members if m.me in commit.record.members])


# -- lies about the digest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_leader_that_proposes_a_fingerprint_nobody_has_is_left_for_the_next_one(stubborn: bool) -> None:
    """Stubborn: it does not step back either, and goes on to say that it is alive."""
    async with reduce_group(4, ELEMENTS) as group:
        await first_round(group)
        liar = group.leader
        others = [member for member in group.members if member is not liar]

        async def lie(*_: object) -> bytes:
            return b"\0" * 16

        def turn(member: Member) -> None:
            if member is liar:
                member.instance.results.own_fingerprint = lie  # type: ignore[method-assign]
                make = member.instance._lead

                def lead(attempt: int) -> None:
                    make(attempt)
                    if stubborn and attempt == 0:
                        member.instance.leader._on_reject = lambda *_: []  # type: ignore[method-assign,union-attr]

                member.instance._lead = lead  # type: ignore[method-assign]

        group.open_hooks.append(turn)
        seconds = await group.reduce(limit=60.0, wait_for=others)
        record = others[0].instance.commit
        assert record is not None
        group.check(members=[m for m in group.members if m.me in record.record.members], holders=others)
        assert record.record.fingerprint != b"\0" * 16
        assert others[0].instance.voter.attempt == 1
        assert seconds < 12.0


@pytest.mark.parametrize("codec", ["fp32", "int8"])
async def test_who_keeps_its_loop_busy_with_a_result_holds_up_nobody(codec: str) -> None:
    """A program may work on what it was given without a turn of the loop: the commit has left before."""
    async with reduce_group(4, ELEMENTS) as group:
        group.coding = Coding.of(codec)
        lead = victim_of(group, "leader")
        unsaid: list[object] = []

        async def watch(member: Member) -> None:
            await member.instance.outcome()
            # What a program that goes on here without waiting would keep from the others:
            unsaid.extend(queue for queue in member.post._queues.values() if queue.statistics().current_buffer_used)
            unsaid.extend(link for link in member.endpoint.links() if link._mux.has_output)
            watched.append(member.instance.commit is not None)

        watched: list[bool] = []
        async with trio.open_nursery() as nursery:
            group.open_hooks.append(lambda member: nursery.start_soon(watch, member) if member is lead else None)
            await group.reduce(limit=20.0)
        assert watched == [True]
        assert not unsaid


async def test_a_round_that_is_closed_while_its_last_words_leave_takes_no_result_from_who_waits_for_it() -> None:
    async with reduce_group(3, ELEMENTS) as group:
        closed: list[str] = []

        def open_hook(member: Member) -> None:
            instance, leave_first = member.instance, member.post.leave_first

            async def leave() -> None:
                await leave_first()
                if instance.commit is not None and not closed:
                    closed.append(member.name)
                    instance.close()

            member.post.leave_first = leave  # type: ignore[method-assign]

        group.open_hooks.append(open_hook)
        await group.reduce(limit=20.0)
        assert closed
        group.check(members=group.members)
