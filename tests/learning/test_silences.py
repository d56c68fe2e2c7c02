"""A peer that keeps back one kind of message or transfer, and answers everything else, holds nobody up for long.

Its links live, so nothing in the transport gives it up: what ends these waits are the deadlines of the round itself.
Virtual time; where waits stand in the code, ``test_bounded_waits.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trio

from shoal.learning import defaults
from shoal.learning.reduce.rates import NOTHING
from shoal.learning.rounds import instance
from shoal.learning.rounds.messages import MESSAGES
from shoal.learning.rounds.methods import SCATTER, SHARE, WANT
from shoal.transport.memory_flow import Route

from .reduce_group import Group, Member, reduce_group

ELEMENTS = 1 << 16
#: Floors of :mod:`shoal.learning.pace`, with what four round trips of 10 ms and a slice add to them.
PHASE = defaults.TRANSFER_FLOOR + 0.5
SUSPECT = defaults.SUSPECT + 0.5
#: A leader is left, the next one waits for stragglers, an owner is late.
BOUND = SUSPECT + defaults.GRACE_FLOOR + 1.5 * PHASE
#: A leader that says that it lives and keeps back a step is left after these seconds: see planning.step_time.
STALLED = {
    "plan": SUSPECT + 4 * (defaults.GRACE_FLOOR + 2 * PHASE),
    "freeze": SUSPECT + 2 * PHASE,
    "propose": SUSPECT + 6 * PHASE,
}

BULK = {"scatter": SCATTER, "share": SHARE, "want": WANT}
KINDS = [*(kind.__name__.lower() for kind in MESSAGES), *BULK]


@pytest.fixture(autouse=True)
def equal_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "measured", lambda endpoint, voters: NOTHING)


def keep_back(member: Member, kind: str) -> list[str]:
    """From now on ``member`` never sends that; what it would have sent so far."""
    kept: list[str] = []
    send, call = member.post.send, member.endpoint.call

    def quiet_send(to: Any, message: Any) -> None:
        name = type(message).__name__.lower()
        if name == kind:
            kept.append(name)
        else:
            send(to, message)

    async def quiet_call(peer: Any, method: Any, *arguments: Any, **more: Any) -> Any:
        if method is BULK.get(kind):
            kept.append(kind)
            await trio.sleep_forever()
        return await call(peer, method, *arguments, **more)

    member.post.send = quiet_send  # type: ignore[method-assign]
    member.endpoint.call = quiet_call  # type: ignore[method-assign]
    if kind == "want":  # asked, not sent

        def hook(opened: Member) -> None:
            async def on_want(call: Any) -> Any:
                kept.append(kind)
                await trio.sleep_forever()

            if opened is member:
                opened.instance.traffic.on_want = on_want  # type: ignore[method-assign]

        group_of[member.name].open_hooks.append(hook)
    return kept


#: Name of a member → its group.
group_of: dict[str, Group] = {}


def watched(group: Group) -> None:
    for member in group.members:
        group_of[member.name] = group


@pytest.mark.parametrize("leads", [False, True], ids=["member", "leader"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_peer_that_keeps_back_one_kind_of_word_holds_the_others_up_for_a_bounded_time(
    kind: str, leads: bool
) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        watched(group)
        await group.reduce(limit=5.0)
        group.advance()
        victim = group.leader if leads else next(m for m in group.members if m is not group.leader)
        others = [member for member in group.members if member is not victim]
        keep_back(victim, kind)
        seconds = await group.reduce(limit=10 * BOUND, wait_for=others)
        stalled = STALLED.get(kind, 0.0) if leads else 0.0
        assert seconds < stalled + BOUND
        commit = others[0].instance.commit
        assert commit is not None
        assert len(commit.record.members) >= 3
        group.check(members=[m for m in group.members if m.me in commit.record.members], holders=others)


@pytest.mark.parametrize("kind", ["waiting", "convene", "ask", "fetch", "seal", "commit", "want"])
async def test_a_leader_that_keeps_back_what_heals_a_round_holds_it_up_for_a_bounded_time_when_an_owner_dies(
    kind: str,
) -> None:
    async with reduce_group(5, 32 * ELEMENTS) as group:  # without both three are left, a majority
        watched(group)
        await group.reduce(limit=5.0)
        group.advance()
        silent = group.leader
        dying = next(m for m in group.members if m is not silent)
        others = [member for member in group.members if member not in (silent, dying)]
        killed: list[None] = []

        def kill(member: Member, note: Any) -> None:
            if member in others and (note.phase, note.what) == ("gather", "begin") and not killed:
                killed.append(None)
                group.kill(dying)

        group.hooks.append(kill)
        keep_back(silent, kind)
        seconds = await group.reduce(limit=10 * BOUND, wait_for=others)
        assert killed
        assert seconds < STALLED["propose"] + BOUND
        commit = others[0].instance.commit
        assert commit is not None
        group.check(members=[m for m in group.members if m.me in commit.record.members], holders=others)


@pytest.mark.parametrize("kind", ["ready", "held", "progress", "accept", "scatter", "share"])
async def test_what_a_member_keeps_back_is_really_kept_back(kind: str) -> None:
    """Else the test above would show nothing."""
    async with reduce_group(4, ELEMENTS) as group:
        watched(group)
        await group.reduce(limit=5.0)
        group.advance()
        victim = next(m for m in group.members if m is not group.leader)
        kept = keep_back(victim, kind)
        await group.reduce(limit=10 * BOUND, wait_for=[m for m in group.members if m is not victim])
        assert kept


async def test_a_result_is_downloaded_however_long_it_takes_while_bytes_keep_coming() -> None:
    """8 MiB over 200 kB/s take 42 s, more than a call without a body of its own is given."""
    route = Route(latency=0.005, bandwidth=50e6, window=128 << 10, buffer=8 << 10)
    async with reduce_group(4, 2 << 20, route=route) as group:
        watched(group)
        late = next(m for m in group.members if m is not group.leader)
        others = [member for member in group.members if member is not late]
        frozen: list[None] = []

        def freeze(member: Member, note: Any) -> None:
            if member is late and (note.phase, note.what) == ("gather", "begin") and not frozen:
                frozen.append(None)
                group.world.freeze(late.name)

        group.hooks.append(freeze)
        await group.reduce(limit=60.0, wait_for=others)
        assert frozen and late.result is None
        for member in others:
            group.world.set_uplink(member.name, 200e3)
        group.world.unfreeze(late.name)
        with trio.fail_after(120.0):
            while late.result is None:
                await trio.sleep(0.1)
        assert trio.current_time() - group.began > 42.0
        assert others[0].result is not None and torch.equal(late.result, others[0].result)
