"""Rounds with newcomers on trial over real endpoints in virtual time, and what honest work looks like to owners."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import attrs
import pytest
import torch
from torch import Tensor, nn

from shoal.learning.aggregate import aggregate, resolve
from shoal.learning.reduce.coding import Coding
from shoal.learning.reduce.robust import fits
from shoal.learning.reduce.slices import split
from shoal.learning.rounds.actions import Note
from shoal.learning.rounds.messages import CommitRecord
from shoal.learning.rounds.trainee import Trainee
from shoal.learning.rounds.trials import passed
from shoal.learning.shard import Shard
from shoal.learning.tasks.digits import Digits
from tests.learning.reduce_group import Group, Member, reduce_group
from tests.learning.test_rule_rounds import in_one_place

ELEMENTS = 40_000


def around(group: Group, common: Tensor) -> None:
    """Everybody's work is ``common`` and a part of its own."""
    for member in group.members:
        member.vector = common + 0.5 * member.vector


def judged(group: Group) -> tuple[CommitRecord, list[Member]]:
    """The record of the round, the same everywhere, with the rule's result over the voters; those found fit."""
    records = {m.instance.commit.record.digest: m.instance.commit.record for m in group.live() if m.instance.commit}
    (record,) = records.values()
    voters = [member for member in group.members if member.me in record.members]
    assert record.members == tuple(sorted(set(record.members) & set(group.voters)))
    results = [member.result for member in group.live()]
    assert all(result is not None and torch.equal(result, results[0]) for result in results)  # type: ignore[arg-type]
    if group.coding.plain:
        wanted = in_one_place(group, voters)
        assert results[0] is not None
        assert float((results[0] - wanted).norm()) <= 1e-5 * float(wanted.norm())
    trial = [each.peer for each in group.trial]
    good = passed(record.opinions, len(record.members), trial)
    return record, [member for member in group.members if member.me in good]


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("audit", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["mean", "median", "multikrum:f=1", "nnm+trimmed_mean:f=1"])
async def test_owners_judge_what_those_on_trial_send_and_combine_without_it(
    rule: str, audit: float, codec: str
) -> None:
    async with reduce_group(8, ELEMENTS) as group:
        group.rule, group.audit, group.coding = resolve(rule), audit, Coding.of(codec)
        around(group, torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(7)))
        good, bad = group.members[2], group.members[5]
        bad.vector = -bad.vector
        for member in (good, bad):
            group.put_on_trial(member, left=1)
        await group.reduce(limit=30.0)
        record, fit = judged(group)
        assert record.members == group.voters
        assert fit == [good]
        assert record.roster == tuple(sorted((*group.voters, good.me)))
        assert [(each.peer, each.left) for each in record.trial] == [(bad.me, 1)]
        for member in (good, bad):
            assert isinstance(member.instance.voter, Trainee)
            assert not member.votes, "it promises nothing"
        assert not [lie for member in group.members for lie in member.lies]


async def test_one_on_trial_costs_a_round_no_more_than_a_member_that_owns_nothing() -> None:
    elements = 500_000
    sent = {}
    for trial in (False, True):
        async with reduce_group(6, elements) as group:
            group.rule = resolve("median")
            guest = group.members[3]
            if trial:
                group.put_on_trial(guest)
            else:
                # Nobody is there in its place.
                group.voters = tuple(voter for voter in group.voters if voter != guest.me)
                group.members.remove(guest)
                group.head = attrs.evolve(group.head, roster=group.voters)
            before = sum(member.sent for member in group.members)
            await group.reduce(limit=60.0)
            sent[trial] = sum(member.sent for member in group.members) - before
            record, _ = judged(group)
    size = 4 * elements
    # Its vector goes to the owners, the result comes back.
    assert sent[True] - sent[False] <= 2 * size * 1.02, sent
    assert sum(map(len, record.opinions)) <= 5 * 71


@pytest.mark.parametrize("phase", ["scatter", "combine", "gather"])
async def test_a_voter_or_a_newcomer_that_dies_leaves_a_round_that_ends(phase: str) -> None:
    for victim_on_trial in (False, True):
        async with reduce_group(6, ELEMENTS) as group:
            group.rule, group.audit = resolve("median"), 1.0
            around(group, torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(7)))
            for member in group.members[4:]:
                group.put_on_trial(member)
            victim = (
                group.members[5] if victim_on_trial else next(m for m in group.members[:4] if m is not group.leader)
            )

            def hook(member: Member, note: Note, victim: Member = victim, group: Group = group) -> None:
                if member is victim and (note.phase, note.what) == (phase, "begin") and not victim.dead:
                    group.kill(victim)

            group.hooks.append(hook)
            await group.reduce(limit=90.0)
            record, fit = judged(group)
            assert len(record.members) >= 3
            assert set(fit) <= set(group.members[4:])
            assert group.members[4] in fit


async def test_the_leader_of_the_first_attempt_is_lost_and_those_on_trial_follow_the_next() -> None:
    async with reduce_group(6, ELEMENTS) as group:
        group.rule = resolve("median")
        around(group, torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(7)))
        for member in group.members[4:]:
            group.put_on_trial(member)
        leader = group.leader
        group.hooks.append(
            lambda member, note: (
                group.kill(leader) if (note.phase, note.what) == ("scatter", "begin") and not leader.dead else None
            )
        )
        await group.reduce(limit=90.0)
        record, fit = judged(group)
        assert leader.me not in record.members
        assert fit == group.members[4:]


# --- what honest work looks like ------------------------------------------------------------------------------------


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def load(model: nn.Module, vector: Tensor) -> None:
    at = 0
    for parameter in model.parameters():
        parameter.data.copy_(vector[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()


def endless(task: Digits, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in itertools.count():
        yield from task.batches(attrs.evolve(shard, epoch=epoch))


def share_of_rounds(rule: str, voters: int, steps: int, rounds: int, liars: int = 0) -> dict[str, float]:
    """Share of ``rounds`` on digits (Dirichlet 0.3) in which more than half of the owners find a newcomer's work fit:
    honest, its opposite, noise. Each of ``voters`` and of three newcomers trains ``steps`` steps between two results;
    ``liars`` of the voters send ten times the opposite."""
    task, noise = Digits(), torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = task.model()
    weights = flat(model).clone()
    data = [endless(task, Shard(1, bytes([i]) * 32, 1, i % voters, voters)) for i in range(voters + 3)]
    owners = [piece.range for piece in split(0, len(weights), tuple(range(voters)))]  # type: ignore[arg-type]
    counts = {"honest": 0, "opposite": 0, "noise": 0}
    for _ in range(rounds):
        work = []
        for batches in data:
            load(model, weights)
            optimizer = task.optimizer(model)
            for _ in range(steps):
                optimizer.zero_grad()
                task.loss(model, next(batches)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            work.append(weights - flat(model))
        rows = [-10.0 * row if at < liars else row for at, row in enumerate(work[:voters])]
        result = aggregate(rows, rule).vector

        def passes(vector: Tensor, result: Tensor = result) -> bool:
            return 2 * sum(fits([(vector[a:b], result[a:b])]) for a, b in owners) > voters

        for newcomer in work[voters:]:
            counts["honest"] += passes(newcomer)
            counts["opposite"] += passes(-newcomer)
            counts["noise"] += passes(torch.randn(len(weights), generator=noise))
        weights = weights - result
    return {kind: count / (3 * rounds) for kind, count in counts.items()}


@pytest.mark.parametrize(
    ("rule", "voters", "steps", "liars"),
    [("median", 5, 10, 0), ("median", 7, 1, 0), ("multikrum:f=1", 7, 10, 1), ("centered_clipping", 5, 10, 0)],
)
def test_honest_work_on_a_mixture_of_its_own_is_fit_in_most_rounds_and_its_opposite_and_noise_are_not(
    rule: str, voters: int, steps: int, liars: int
) -> None:
    shares = share_of_rounds(rule, voters, steps, 30, liars)
    print(f"\n{rule}, {voters} voters, {liars} of which lie, {steps} steps: {shares}")
    assert shares["honest"] >= 0.8, shares
    assert shares["opposite"] <= 0.1, shares
    assert shares["noise"] <= 0.05, shares
