"""Rounds whose contributions are combined by any rule: as in one place, the same bits everywhere, faults as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.learning import defaults
from shoal.learning.aggregate import RULES, aggregate, resolve
from shoal.learning.reduce import topology
from shoal.learning.reduce.coding import Coding
from shoal.learning.reduce.slices import Slice
from shoal.learning.rounds import leader as leader_module
from shoal.learning.rounds import planning
from shoal.learning.rounds.actions import Note, Weigh
from shoal.learning.rounds.messages import Decided, Products
from shoal.learning.rounds.weighing import Weighed, decide, seed_of
from tests.learning.reduce_group import Group, Member, reduce_group
from tests.learning.test_codec_rounds import decoded

ELEMENTS = 20_011

ONE_EACH = (
    "mean",
    "median",
    "trimmed_mean:f=1",
    "meamed:f=1",
    "flag",
    "krum:f=1,definition=byzfl",
    "multikrum:f=1,definition=byzfl",
    "geometric_median",
    "mda:f=1",
    "monna:f=1",
    "caf:f=1",
    "smea:f=1",
    "centered_clipping:start=zero,iterations=3",
)
CHAINS = (
    "normalise+mean",
    "nnm+trimmed_mean:f=1",
    "bucketing:s=2+median",
    "clipping:c=1.5+geometric_median",
    "arc+nnm+multikrum:f=1,definition=byzfl",
)


@pytest.fixture
def unequal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans give every owner another number of elements; one of them owns two slices that do not touch."""
    real = planning.topology.plan

    def plan(
        members: Any, receivers: Any, length: int, rates: Any, codec: Any, schedules: Any = ("butterfly",)
    ) -> topology.Topology:
        chosen = real(members, receivers, length, rates, codec)
        owners = list(dict.fromkeys(piece.owner for piece in chosen.slices))
        owners.append(owners[0])
        shares = np.arange(1, len(owners) + 1)
        blocks = -(-length // codec.block)
        ends = [min(length, int(end) * codec.block) for end in np.cumsum(shares) * blocks // shares.sum()]
        ends[-1] = length
        bounds = zip([0, *ends[:-1]], ends, owners, strict=True)
        slices = tuple(Slice(start, stop, owner) for start, stop, owner in bounds if start < stop)
        return attrs.evolve(chosen, slices=slices)

    monkeypatch.setattr(planning.topology, "plan", plan)


def in_one_place(group: Group, members: list[Member], codec: str = "fp32") -> Tensor:
    vectors = [decoded(codec, member.vector) for member in group.members if member in members]
    seed = seed_of(group.live()[0].instance.key)
    return aggregate(vectors, group.rule, seed=seed).vector


def check(group: Group, members: list[Member], tolerance: float = 1e-6) -> None:
    """One record of ``members`` everywhere, one result, and that is the rule's over their vectors."""
    wanted = in_one_place(group, members)
    records = [member.instance.commit.record for member in group.live() if member.instance.commit is not None]
    assert len(records) == len(group.live())
    assert {record.digest for record in records} == {records[0].digest}
    assert records[0].members == tuple(m.me for m in group.members if m in members), records[0].reason
    results = [member.result for member in group.live()]
    assert results[0] is not None
    assert all(result is not None and torch.equal(result, results[0]) for result in results)
    assert float((results[0] - wanted).norm()) <= tolerance * float(wanted.norm())


def test_every_rule_is_here() -> None:
    assert {resolve(text).rule.name for text in ONE_EACH} == set(RULES)


@pytest.mark.parametrize("count", [3, 5, 8])
async def test_all_end_with_the_bits_that_the_rule_gives_in_one_place(count: int, unequal: None) -> None:
    more = ("krum:f=1", "multikrum:f=1", "nnm+krum:f=1", "flag:m=2,lam=1") if count >= 5 else ()
    async with reduce_group(count, ELEMENTS) as group:
        for text in (*ONE_EACH, *CHAINS, *more):
            group.rule = resolve(text)
            await group.reduce(limit=30.0)
            check(group, group.members)
            coordinate = not group.rule.needs_gram
            if coordinate and text != "mean":
                assert torch.equal(group.members[0].result, in_one_place(group, group.members))  # type: ignore[arg-type]
            assert len(group.members[0].instance.voter.plan.slices) == count + 1  # type: ignore[union-attr]
            group.advance()


@pytest.mark.parametrize("count", [3, 5])
async def test_coded_contributions_are_decoded_for_the_rule_and_the_result_coded_once(
    count: int, unequal: None
) -> None:
    async with reduce_group(count, 300_000) as group:
        group.coding = Coding.of("int8")
        for text in ("median", "trimmed_mean:f=1", "geometric_median", "nnm+median:f=1"):
            group.rule = resolve(text)
            await group.reduce(limit=30.0)
            wanted = decoded("int8", in_one_place(group, group.members, "int8"))
            for member in group.members:
                assert member.result is not None
                assert torch.equal(member.result, group.members[0].result)  # type: ignore[arg-type]
                if not group.rule.needs_gram:
                    assert torch.equal(member.result, wanted)
                # Coefficients that differ in their last bits move a few values to the next code.
                assert float((member.result - wanted).norm()) < 1e-3 * float(wanted.norm())
            group.advance()


@pytest.mark.parametrize("count", [6, pytest.param(26, marks=pytest.mark.slow)])
async def test_members_beyond_those_whose_products_all_fit_are_told_the_sum(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if count < 24:
        monkeypatch.setattr(defaults, "PRODUCTS_IN_FULL", 500)
    async with reduce_group(count, 30_000) as group:
        group.rule = resolve("multikrum:f=1")
        told: list[Decided] = []
        hear(group, lambda member, sender, message: told.append(message), Decided)
        await group.reduce(limit=60.0)
        check(group, group.members)
        assert told and all(len(message.parts) == 1 for message in told)
        quality = group.members[0].instance.scales.quality_of(group.members[0].instance.commit.record)  # type: ignore[union-attr]
        assert len(quality) == count and sum(quality) == count - 1 - 2


def hear(group: Group, told: Callable[[Member, Member, Any], None], kind: type) -> None:
    """Call ``told`` with (receiver, sender, message) for every message of ``kind`` before it is handled."""

    def opened(member: Member) -> None:
        real = member.instance.receive

        def receive(sender: Any, message: object) -> None:
            if isinstance(message, kind):
                told(member, next(m for m in group.members if m.me == sender), message)
            if not member.dead:
                real(sender, message)

        member.instance.receive = receive  # type: ignore[method-assign]

    group.open_hooks.append(opened)


# -- faults ---------------------------------------------------------------------------------------------

RULE = "nnm+multikrum:f=1,definition=byzfl"


async def test_an_owner_that_dies_between_its_products_and_its_slice_leaves_the_members() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(RULE)
        leader = group.leader
        victim = next(member for member in group.members if member is not leader)

        def told(member: Member, sender: Member, message: Products) -> None:
            if sender is victim and not victim.dead:
                group.kill(victim)

        hear(group, told, Products)
        await group.reduce(limit=60.0)
        check(group, group.live())
        assert len(group.live()) == 4


@pytest.mark.parametrize("told_before", [1, 2, 4])
async def test_a_leader_that_dies_once_some_know_its_decision_is_followed_by_another(told_before: int) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(RULE)
        leader, heard = group.leader, []

        def told(member: Member, sender: Member, message: Decided) -> None:
            heard.append(member)
            if len(heard) == told_before:
                group.kill(leader)

        hear(group, told, Decided)
        await group.reduce(limit=90.0)
        check(group, group.live())
        commit = group.live()[0].instance.commit
        assert commit is not None and len(group.live()) == 4


def lie(member: Member, how: Callable[[bytes], bytes]) -> None:
    """``member`` decides otherwise than its rule says."""
    real = member.instance.scales.weigh

    async def weigh(action: Weigh) -> Weighed:
        found = await real(action)
        return attrs.evolve(found, data=how(found.data))

    member.instance.scales.weigh = weigh  # type: ignore[method-assign]


def refusals(member: Member) -> list[Note]:
    return [note for _, note in member.notes if (note.phase, note.what) == ("combine", "refused")]


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("rule", [RULE, "geometric_median", "nnm+median:f=1"])
async def test_a_leader_whose_coefficients_are_off_is_refused_by_name_and_followed_by_another(
    rule: str, deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``deaf``: it does not hear of the refusals, either."""
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(rule)
        liar = group.leader

        def off(data: bytes) -> bytes:
            matrix = np.frombuffer(data, "<f8").copy()
            matrix[0 if matrix[0] else np.flatnonzero(matrix)[0]] += 1e-3
            return matrix.tobytes()

        group.open_hooks.append(lambda member: lie(member, off) if member is liar else None)
        if deaf:
            monkeypatch.setattr(leader_module.Leader, "_on_reject", lambda self, now, sender, message: [])
        seconds = await group.reduce(limit=90.0)
        check(group, group.members)
        assert liar.instance.commit is not None and liar.instance.commit.certificate.attempt >= 1
        assert seconds < (20.0 if deaf else 5.0)
        for member in group.members:
            if member is not liar:
                (note, *_) = refusals(member)
                assert note.peer == liar.me
                assert f"the decision of leader {liar.me.short} is refused: row 0 is off by" in note.detail


async def test_a_leader_that_adds_up_other_products_than_an_owners_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(RULE)
        liar, real = group.leader, leader_module.Leader.weighed

        def weighed(self: Any, now: float, action: Weigh, found: Weighed) -> Any:
            if self.me == liar.me:
                other = attrs.evolve(action, parts=(action.parts[0],) * len(action.parts))
                return real(self, now, other, decide(self.rule, self.key, other.parts, other.members))
            return real(self, now, action, found)

        monkeypatch.setattr(leader_module.Leader, "weighed", weighed)
        await group.reduce(limit=60.0)
        check(group, group.members)
        told = [note.detail for member in group.members for note in refusals(member)]
        assert any("our inner products are not among those that were added up" in detail for detail in told)


def _bent(data: bytes, how: str) -> bytes:
    values = np.frombuffer(data, "<f8").copy()
    match how:
        case "nan":
            values[3] = np.nan
        case "infinite":
            values[0] = np.inf
        case "huge":
            values[0] = 1e300
        case "negative":
            values[0] = -1.0
        case "impossible":
            values[1] = 10 * values.max()
        case "short":
            values = values[:-1]
        case "indefinite":
            # Each pair may be; all together they are not.
            values = np.array([1, 0.9, 0.9, 0, 0, 1, -0.9, 0, 0, 1, 0, 0, 1, 0, 1.0])
    return values.tobytes()


@pytest.mark.parametrize("how", ["nan", "infinite", "huge", "negative", "impossible", "short", "indefinite"])
async def test_an_owner_that_sends_absurd_products_loses_its_slices_and_its_place(how: str) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(RULE)
        liar = next(member for member in group.members if member is not group.leader)
        leader = group.leader

        def opened(member: Member) -> None:
            if member is liar:
                real = member.instance.voter.measured
                member.instance.voter.measured = lambda now, attempt, epoch, data: real(  # type: ignore[method-assign]
                    now, attempt, epoch, _bent(data, how)
                )

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, [member for member in group.members if member is not liar])
        (note, *_) = refusals(leader)
        assert note.peer == liar.me
        assert f"the inner products of {liar.me.short} are refused: " in note.detail
        assert leader.instance.commit is not None
        assert f"the inner products of {liar.me.short} are refused" in leader.instance.commit.record.reason


async def test_products_that_come_after_their_epoch_mean_nothing() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve(RULE)
        late = next(member for member in group.members if member is not group.leader)
        kept: list[Callable[[], object]] = []

        def opened(member: Member) -> None:
            if member is not late:
                return
            voter, real = member.instance.voter, member.instance.voter.measured

            def measured(now: float, attempt: int, epoch: int, data: bytes) -> Any:
                if epoch:
                    return [action for again in kept for action in again()] + real(now, attempt, epoch, data)  # type: ignore[attr-defined]
                kept.append(lambda: real(now, attempt, epoch, data))
                return []

            voter.measured = measured  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, [member for member in group.members if member is not late])


# -- too few --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trimmed_mean:f=1", "nnm+median:f=1"])
async def test_fewer_contributions_than_a_rule_needs_give_no_result_but_its_words(rule: str) -> None:
    """One sends NaN, which every owner refuses: two are left, of whom one may lie."""
    async with reduce_group(3, ELEMENTS) as group:
        group.rule = resolve(rule)
        spoilt = next(member for member in group.members if member is not group.leader)
        honest, spoilt.vector = spoilt.vector, torch.full_like(spoilt.vector, float("nan"))
        seconds = await group.reduce(limit=60.0)
        assert seconds < 30.0
        for member in group.members:
            commit = member.instance.commit
            assert commit is not None and commit.record.members == () and commit.certificate.attempt == 1
            assert commit.record.reason.startswith("no contribution is combined: ")
            assert "f = 1 of 2 vectors cannot be tolerated: n > 2 f" in commit.record.reason
            assert member.result is not None and not member.result.any()
        spoilt.vector = honest
        group.advance()
        await group.reduce(limit=30.0)
        check(group, group.members)


async def test_the_time_for_stragglers_is_waited_for_when_too_few_are_there() -> None:
    async with reduce_group(3, ELEMENTS) as group:
        group.rule = resolve("trimmed_mean:f=1")
        gone = next(member for member in group.members if member is not group.leader)
        group.kill(gone)
        waiting: list[str] = []

        def hook(member: Member, note: Note) -> None:
            waiting.append(member.instance.voter.reason)

        group.hooks.append(hook)
        seconds = await group.reduce(limit=60.0)
        assert seconds > 3.0
        for member in group.live():
            commit = member.instance.commit
            assert commit is not None and commit.record.members == ()
            assert "no contribution is combined: trimmed_mean: f = 1 of 2 vectors cannot be" in commit.record.reason
            assert gone.me not in commit.record.roster


# -- what it costs --------------------------------------------------------------------------------------


async def test_a_rule_on_inner_products_costs_little_more_than_a_mean_which_sends_nothing_more() -> None:
    async with reduce_group(8, (1 << 20) // 4) as group:
        said: list[str] = []
        for member in group.members:
            real = member.post.send
            member.post.send = lambda to, message, real=real: (said.append(type(message).__name__), real(to, message))  # type: ignore[method-assign,misc]
        cost = []
        for text in ("mean", "median", "multikrum:f=1", "nnm+median:f=1"):
            group.rule = resolve(text)
            said.clear()
            before = sum(member.sent for member in group.members)
            await group.reduce(limit=30.0)
            cost.append(sum(member.sent for member in group.members) - before)
            assert said.count("Products") == said.count("Decided") == (7 if group.rule.needs_gram else 0)
            group.advance()
        print("bytes", cost, [round(each / cost[0], 4) for each in cost])
        assert max(cost) < 1.1 * cost[0]
        assert all(member.result is not None for member in group.members)


async def test_everybody_says_how_far_the_rule_took_whom_seriously() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule = resolve("multikrum:f=1")
        liar = group.members[2]
        liar.vector = 100 * liar.vector
        await group.reduce(limit=30.0)
        check(group, group.members)
        for member in group.members:
            assert member.instance.commit is not None
            quality = member.instance.scales.quality_of(member.instance.commit.record)
            assert len(quality) == 5 and quality[2] == 0.0 and sum(quality) == 2.0
