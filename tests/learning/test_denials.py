"""Owners that deny contributions: receipts, other ways to the owner, and who loses what."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio

from shoal.learning.aggregate import resolve
from shoal.learning.reduce.slices import Slice
from shoal.learning.rounds.challenges import Challenges
from shoal.learning.rounds.claims import Denied, Receipt, Receipts
from shoal.learning.rounds.messages import Plan
from shoal.learning.rounds.statements import receipt_bytes
from shoal.transport.errors import RemoteRefused
from shoal.transport.identity import Identity
from tests.learning.reduce_group import Group, Member, reduce_group
from tests.learning.test_rule_rounds import check

ELEMENTS = 20_011


def deny(group: Group, liar: Member, victim: Member, how: str) -> None:
    """``liar`` keeps ``victim`` out, as far as it can."""

    def opened(member: Member) -> None:
        if member is not liar:
            return
        traffic, voter = member.instance.traffic, member.instance.voter
        real, received = traffic.on_scatter, voter.slice_received

        async def on_scatter(call: Any) -> Any:
            ours = victim.me in (call.peer, call.request.contributor)
            directly = call.peer == victim.me
            if (how == "refuses" and ours) or (how == "refuses directly" and directly):
                raise RemoteRefused("not-finite", "your contribution holds NaN")
            if (how == "hangs" and ours) or (how == "hangs directly" and directly):
                await trio.sleep_forever()
            taken = await real(call)
            return attrs.evolve(taken, receipt=bytes(64)) if how == "signs nothing" and ours else taken

        def slice_received(now: float, contributor: Any, *place: Any) -> Any:
            if contributor == victim.me and how in ("forgets", "signs nothing"):
                return []
            return received(now, contributor, *place)

        traffic.on_scatter = on_scatter  # type: ignore[method-assign]
        voter.slice_received = slice_received  # type: ignore[method-assign]

    group.open_hooks.append(opened)


@pytest.mark.parametrize("how", ["refuses directly", "hangs directly"])
@pytest.mark.parametrize("rule", ["median", "geometric_median"])
async def test_what_an_owner_does_not_take_from_its_author_reaches_it_through_others(how: str, rule: str) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve(rule), 1.0
        liar, victim = (member for member in group.members[:2])
        deny(group, liar, victim, how)
        await group.reduce(limit=60.0)
        check(group, group.members)


@pytest.mark.parametrize("how", ["refuses", "hangs", "forgets", "signs nothing"])
@pytest.mark.parametrize("leads", ["liar", "victim", "another"])
async def test_an_owner_that_denies_a_contribution_loses_its_slices_and_the_sender_keeps_its_place(
    how: str, leads: str
) -> None:
    async with reduce_group(6, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        rest = [member for member in group.members if member is not group.leader]
        liar = group.leader if leads == "liar" else rest[0]
        victim = group.leader if leads == "victim" else rest[1]
        deny(group, liar, victim, how)
        await group.reduce(limit=120.0)
        record = group.live()[0].instance.commit.record  # type: ignore[union-attr]
        if leads == "liar":
            # What it does with an attempt that it leads is not for others to say. The round ends all the same.
            assert len(record.members) >= 5
            return
        check(group, [member for member in group.members if member is not liar])
        assert victim.me in record.members and liar.me in record.roster


async def test_a_member_that_really_sends_nothing_to_an_owner_is_left_out_and_the_owner_keeps_its_slices() -> None:
    async with reduce_group(6, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        rest = [member for member in group.members if member is not group.leader]
        slow, owner = rest[0], rest[1]

        def opened(member: Member) -> None:
            if member is slow:
                real = member.instance.traffic.delivery.push

                async def push(to: Any, request: Any, part: Any) -> bool:
                    return to != owner.me and await real(to, request, part)

                member.instance.traffic.delivery.push = push  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, [member for member in group.members if member is not slow])
        plan = owner.instance.voter.plan
        assert plan is not None and any(piece.owner == owner.me for piece in plan.slices)


async def test_nobody_carries_what_is_not_signed_or_not_expected() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        victim, carrier = group.members[0], group.members[1]
        owner = group.members[2]
        seen: list[str] = []
        from shoal.learning.rounds.methods import FORWARD, Forward
        from shoal.learning.rounds.statements import Mark

        def opened(member: Member) -> None:
            if member is victim:
                real = member.instance.traffic.delivery.push

                async def push(to: Any, request: Any, part: Any) -> bool:
                    if to == owner.me:
                        right = Forward(request.key, to, request.start, request.stop, request.codec, request.mark)
                        for wrong, body in (
                            (attrs.evolve(right, mark=Mark(right.mark.root, bytes(64))), part.data),
                            (right, bytes(len(part.data))),
                            (attrs.evolve(right, stop=right.stop + 16), bytes(len(part.data) + 64)),
                            (attrs.evolve(right, owner=carrier.me), part.data),
                        ):
                            with pytest.raises(RemoteRefused) as caught:
                                await member.endpoint.call(carrier.me, FORWARD, wrong, body=[body])
                            seen.append(caught.value.code)
                    return await real(to, request, part)

                member.instance.traffic.delivery.push = push  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, group.members)
        assert seen == ["bad-range", "unsigned", "bad-range", "bad-range"]


# -- what the leader makes of it ------------------------------------------------------------------------

IDENTITIES = sorted((Identity(bytes([number]) * 32) for number in range(1, 6)), key=lambda i: i.peer_id)
PEERS = tuple(identity.peer_id for identity in IDENTITIES)
KEY = bytes(32)


def plan() -> Plan:
    slices = tuple(Slice(100 * number, 100 * (number + 1), peer) for number, peer in enumerate(PEERS))
    return Plan(KEY, 0, 0, PEERS, (1,) * 5, (1,) * 5, PEERS, slices, 500, "")


def held(**without: Any) -> dict[Any, Any]:
    return {
        peer: tuple(m for m in PEERS if (number, PEERS.index(m)) not in without.get("pairs", ()))
        for number, peer in enumerate(PEERS)
    }


def receipt(owner: int, member: int, start: int | None = None) -> Receipt:
    at = 100 * owner if start is None else start
    data = receipt_bytes(KEY, at, at + 100, "fp32", PEERS[member], bytes(32))
    return Receipt(at, at + 100, "fp32", bytes(32), IDENTITIES[owner].sign(data))


def test_a_member_that_one_owner_lacks_is_asked_once_and_believed_with_a_receipt_for_every_slice() -> None:
    challenges = Challenges(KEY, plan())
    denied = held(pairs=[(1, 3)])
    assert challenges.due(held(), ()) == [] and not challenges.waiting
    ((member, message),) = challenges.due(denied, ())
    assert (member, message.owner) == (PEERS[3], PEERS[1]) and challenges.waiting
    assert challenges.due(denied, ()) == []
    assert challenges.guilty(denied) == ()
    challenges.shown(PEERS[3], Receipts(KEY, 0, 0, PEERS[1], (receipt(1, 3),)))
    assert not challenges.waiting and challenges.guilty(denied) == (PEERS[1],)
    assert challenges.guilty(held()) == (), "it says in the end that it has it"


@pytest.mark.parametrize(
    "shown",
    [
        (),
        (receipt(1, 2),),
        (receipt(2, 3),),
        (receipt(1, 3, 200),),
        (attrs.evolve(receipt(1, 3), root=bytes([1]) * 32),),
        (attrs.evolve(receipt(1, 3), codec="fp16"),),
        (attrs.evolve(receipt(1, 3), signature=bytes(64)),),
    ],
)
def test_other_receipts_prove_nothing(shown: tuple[Receipt, ...]) -> None:
    challenges = Challenges(KEY, plan())
    denied = held(pairs=[(1, 3)])
    challenges.due(denied, ())
    challenges.shown(PEERS[3], Receipts(KEY, 0, 0, PEERS[1], shown))
    assert not challenges.waiting and challenges.guilty(denied) == ()


def test_two_witnesses_are_believed_but_neither_of_the_two_whom_it_is_about() -> None:
    challenges = Challenges(KEY, plan())
    denied = held(pairs=[(1, 3)])
    message = Denied(KEY, 0, 0, PEERS[3], PEERS[1])
    for witness in (PEERS[1], PEERS[3], PEERS[0], PEERS[0]):
        challenges.denied(witness, message)
        assert challenges.guilty(denied) == ()
    challenges.denied(PEERS[2], message)
    assert challenges.guilty(denied) == (PEERS[1],)


def test_a_member_that_most_owners_lack_is_slow_and_a_lost_one_is_not_asked() -> None:
    challenges = Challenges(KEY, plan())
    assert challenges.due(held(pairs=[(0, 3), (1, 3), (2, 3)]), ()) == []
    assert challenges.due(held(pairs=[(1, 3)]), (PEERS[3],)) == []
