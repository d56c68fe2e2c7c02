"""Rounds whose contributions and results travel coded: the same bits everywhere, fewer bytes, faults as ever."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.learning import exact
from shoal.learning.reduce.codecs import resolve
from shoal.learning.reduce.codecs.feedback import ErrorFeedback
from shoal.learning.reduce.coding import Coding
from shoal.learning.rounds.actions import Note
from tests.learning.reduce_group import Group, Member, reduce_group

ELEMENTS = 64 << 10


def decoded(codec: str, vector: Tensor) -> Tensor:
    """What others make of ``vector``."""
    coder, out = resolve(codec), torch.empty_like(vector)
    data = bytearray(coder.wire_size(len(vector)))
    coder.encode(vector, data)
    coder.decode(data, out)
    return out


def expected(codec: str, group: Group, members: list[Member]) -> Tensor:
    parts = [decoded(codec, member.vector) for member in group.members if member in members]
    return decoded(codec, exact.weighted_mean(parts, [1.0] * len(parts)))


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "e3m0"])
async def test_all_end_with_what_the_coded_mean_decodes_to_for_the_bytes_that_the_codec_takes(codec: str) -> None:
    async with reduce_group(4, ELEMENTS) as group:
        group.coding = Coding.of(codec)
        before = sum(member.sent for member in group.members)
        await group.reduce(limit=30.0)
        mean = expected(codec, group, group.members)
        for member in group.members:
            assert member.result is not None
            assert torch.equal(member.result, mean)
        bulk = 2 * 3 * resolve(codec).wire_size(ELEMENTS)  # each slice: 3 others send it, and 3 receive it
        assert bulk < sum(member.sent for member in group.members) - before < bulk + 40_000


async def test_an_owner_that_dies_after_the_freeze_leaves_the_bits_that_the_survivors_agree_on() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        group.coding = Coding.of("int8")
        victim = next(member for member in group.members if member is not group.leader)

        def hook(member: Member, note: Note) -> None:
            if member is victim and (note.phase, note.what) == ("combine", "begin"):
                group.kill(victim)

        group.hooks.append(hook)
        await group.reduce(limit=60.0)
        commit = group.live()[0].instance.commit
        assert commit is not None
        members = [member for member in group.members if member.me in commit.record.members]
        mean = expected("int8", group, members)
        for member in group.live():
            assert member.result is not None
            assert torch.equal(member.result, mean)


async def test_what_the_codec_dropped_is_sent_in_later_rounds() -> None:
    async with reduce_group(3, ELEMENTS) as group:
        true = exact.weighted_mean([member.vector for member in group.members], [1.0] * 3)
        feedback = {member.name: ErrorFeedback(resolve("e3m0"), ELEMENTS) for member in group.members}
        group.codings = {name: Coding.of("e3m0", each) for name, each in feedback.items()}
        total, errors = torch.zeros(ELEMENTS), []
        for number in range(1, 9):
            await group.reduce(limit=30.0)
            for member in group.members:
                group.codings[member.name].settle(True)
            result = group.members[0].result
            assert result is not None
            total += result
            errors.append(float((total / number - true).norm() / true.norm()))
            group.advance()
        # Of the contributions nothing is lost in the end; what remains is the coding of the result, once a round.
        assert errors[0] > 0.15
        assert errors[-1] < 0.6 * errors[0]


async def test_a_member_with_another_codec_is_left_out_and_told() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        other = group.members[2]
        group.codings = {member.name: Coding.of("int8") for member in group.members}
        group.codings[other.name] = Coding.of("fp16")
        await group.reduce(limit=30.0)
        members = [member for member in group.members if member is not other]
        mean = expected("int8", group, members)
        for member in group.members:
            commit = member.instance.commit
            assert commit is not None and "another codec: fp16 instead of int8" in commit.record.reason
            assert member.result is not None
            assert torch.equal(member.result, mean)
