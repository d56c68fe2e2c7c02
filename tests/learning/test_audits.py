"""Owners of slices that lie: what everybody signs, what looks find, who is convicted, what is left of the round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
import trio
from torch import Tensor

from shoal.learning import defaults
from shoal.learning.aggregate import resolve
from shoal.learning.aggregate.products import pack_triangle, unpack_triangle
from shoal.learning.reduce.codecs import FP32
from shoal.learning.reduce.coding import Coding
from shoal.learning.rounds import audits as audits_module
from shoal.learning.rounds.claims import Accuse, Proof
from shoal.learning.rounds.ledger import Ledger
from shoal.learning.rounds.lies import Lie
from shoal.learning.rounds.methods import PART
from shoal.learning.rounds.statements import Combined, combined_bytes
from shoal.transport.errors import DecodeError, RemoteError, RemoteRefused
from shoal.transport.identity import Identity
from shoal.transport.wire import pack, unpack
from tests.learning.reduce_group import RUN, Group, Member, reduce_group
from tests.learning.test_rule_rounds import CHAINS, ONE_EACH, check, unequal

__all__ = ["unequal"]

ELEMENTS = 20_011


def add_one(result: Tensor) -> None:
    result += 1.0


def one_element(result: Tensor) -> None:
    result[len(result) // 3] += 0.5


def verdicts(group: Group) -> dict[str, int]:
    found = [verdict for member in group.members for _, verdict in member.verdicts]
    return {verdict: found.count(verdict) for verdict in found}


@pytest.mark.parametrize("codec", ["fp32", "int8", "fp16"])
async def test_honest_owners_are_found_right_with_every_rule(codec: str, unequal: None) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.audit, group.coding = 4.0, Coding.of(codec)
        for text in (*ONE_EACH, *CHAINS, "flag:m=2,lam=1", "mean"):
            group.rule = resolve(text)
            await group.reduce(limit=30.0)
            results = [member.result for member in group.members]
            assert all(result is not None and torch.equal(result, results[0]) for result in results)  # type: ignore[arg-type]
            assert verdicts(group) == {"passed": 5 * 4}, text
            for member in group.members:
                member.verdicts.clear()
            group.advance()


async def test_the_bits_are_those_of_a_round_without_audits(unequal: None) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        for text in ("trimmed_mean:f=1", "mean", "median"):
            group.rule = resolve(text)
            found = []
            for audit in (0.0, 1.0):
                group.audit = audit
                await group.reduce(limit=30.0)
                found.append(group.members[0].result)
                group.advance()
            assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("lies", [add_one, one_element])
@pytest.mark.parametrize("leads", [False, True])
@pytest.mark.parametrize("rule", ["median", "nnm+trimmed_mean:f=1", "geometric_median", "mean"])
async def test_an_owner_that_signs_a_wrong_combination_is_convicted_and_the_round_ends_right_without_it(
    rule: str, leads: bool, lies: Callable[[Tensor], None], unequal: None
) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve(rule), 16.0
        liar = group.leader if leads else next(member for member in group.members if member is not group.leader)
        liar.distort = lies
        if lies is one_element:
            look_everywhere(group)
        await group.reduce(limit=90.0)
        check(group, [member for member in group.members if member is not liar])
        record = group.members[0].instance.commit.record  # type: ignore[union-attr]
        assert liar.me not in record.roster
        assert f"expelled: {liar.me.short}" in record.reason
        honest = [member for member in group.members if member is not liar]
        for member in honest:
            assert list(member.instance.voter.convicted) == [liar.me]
        (lie, *_) = [lie for member in honest for lie in member.lies]
        for member in honest:
            assert all(lie.owner == liar.me for lie in member.lies)
        again = unpack(Lie, pack(lie), limit=defaults.MAX_LIE)
        again.check(RUN, group.rule)
        assert again == lie


@pytest.mark.parametrize("finder", ["leader", "another"])
async def test_a_proof_convinces_those_who_did_not_look(finder: str) -> None:
    async with reduce_group(6, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 16.0
        rest = [member for member in group.members if member is not group.leader]
        liar, finds = rest[0], group.leader if finder == "leader" else rest[1]
        liar.distort = add_one

        def opened(member: Member) -> None:
            if member is not finds:
                member.instance.auditor._drawn = lambda others: []  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=90.0)
        check(group, [member for member in group.members if member is not liar])
        await trio.sleep(5)
        for member in group.members:
            if member is not liar:
                assert [lie.owner for lie in member.lies] == [liar.me]


async def test_a_proof_that_proves_nothing_is_counted_against_its_sender_and_the_round_goes_on() -> None:
    lie = await a_lie("median")
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        slanderer, victim = group.members[0], group.members[1]

        def opened(member: Member) -> None:
            if member is slanderer:
                real = member.instance.auditor.examine

                async def examine(action: Any) -> None:
                    framed = pack(attrs.evolve(lie, owner=victim.me))
                    for data in (framed, b"", bytes(1000), framed):
                        for other in group.members:
                            if other is not member:
                                member.post.send(other.me, Proof(member.instance.key, data))
                    await real(action)

                member.instance.auditor.examine = examine  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, group.members)
        for member in group.members[1:]:
            assert member.verdicts.count((slanderer.me, "false-accusation")) <= 1
            assert not member.instance.voter.convicted and not member.lies
        assert any((slanderer.me, "false-accusation") in member.verdicts for member in group.members[1:])


def look_everywhere(group: Group) -> None:
    """Every look is at all parts of a slice, one after the other."""

    def opened(member: Member) -> None:
        auditor = member.instance.auditor
        real = auditor._look

        async def look(plan: Any, frozen: Any, index: int, number: int | None, accuser: Any) -> None:
            case = auditor._case(plan, frozen, index, number)
            if case is None or number is not None:
                await real(plan, frozen, index, number, accuser)
                return
            for each in range(case.cut.parts):
                await real(plan, frozen, index, each, accuser)

        auditor._look = look  # type: ignore[method-assign]

    group.open_hooks.append(opened)


async def test_one_look_finds_a_lie_in_a_whole_slice_wherever_it_looks() -> None:
    """With the rate that runs have: somebody draws the liar's slice in 68 % of rounds of five."""
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        liar = group.members[0]
        liar.distort = add_one
        caught = 0
        for _ in range(20):
            await group.reduce(limit=90.0)
            caught += any(liar.me in member.instance.voter.convicted for member in group.members)
            group.advance()
        assert 8 <= caught <= 19


@pytest.mark.parametrize("silent", ["refuses", "hangs", "garbage"])
async def test_an_owner_that_does_not_show_what_it_combined_loses_its_slice(silent: str) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 16.0
        liar = group.members[0]
        liar.distort = add_one
        group.open_hooks.append(lambda member: hide(member, silent) if member is liar else None)
        await group.reduce(limit=120.0)
        check(group, [member for member in group.members if member is not liar])
        # Its own contribution nobody else can show, so there is no proof, and it stays a member.
        assert not any(member.lies for member in group.members)
        assert liar.me in group.members[0].instance.commit.record.roster  # type: ignore[union-attr]


def hide(member: Member, how: str) -> None:
    real = member.instance.auditor.on_part

    async def on_part(call: Any) -> Any:
        if how == "refuses":
            raise RemoteRefused("busy", "not now")
        if how == "hangs":
            await trio.sleep_forever()
        opened = await real(call)
        return attrs.evolve(opened, marks=tuple(attrs.evolve(mark, signature=bytes(64)) for mark in opened.marks))

    member.instance.auditor.on_part = on_part  # type: ignore[method-assign]


@pytest.mark.parametrize("rule", ["median", "nnm+median:f=1"])
async def test_an_owner_that_shows_only_its_own_part_is_found_out_by_what_the_others_show(rule: str) -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve(rule), 16.0
        liar = group.members[0]
        liar.distort = add_one

        def opened(member: Member) -> None:
            real = member.instance.auditor.on_part

            async def on_part(call: Any) -> Any:
                if not call.request.own:
                    raise RemoteRefused("busy", "not now")
                return await real(call)

            if member is liar:
                member.instance.auditor.on_part = on_part  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=120.0)
        check(group, [member for member in group.members if member is not liar])
        assert any(member.lies for member in group.members)


async def test_an_honest_owner_that_does_not_answer_looks_loses_its_slice_and_is_not_convicted() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("geometric_median"), 4.0
        quiet = group.members[0]
        group.open_hooks.append(lambda member: hide(member, "refuses") if member is quiet else None)
        await group.reduce(limit=60.0)
        check(group, [member for member in group.members if member is not quiet])
        assert verdicts(group)["unanswered"] >= 1
        assert not any(member.instance.voter.convicted for member in group.members)


@pytest.mark.parametrize("rule", ["geometric_median", "nnm+median:f=1"])
@pytest.mark.parametrize("consistent", [False, True])
async def test_an_owner_with_wrong_inner_products_is_convicted(rule: str, consistent: bool, unequal: None) -> None:
    """``consistent``: it signs for parts that add up to its lie; else it tells the leader another sum."""
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve(rule), 16.0
        liar = next(member for member in group.members if member is not group.leader)

        def opened(member: Member) -> None:
            if member is not liar:
                return
            auditor = member.instance.auditor
            real = auditor.products

            def products(action: Any, plan: Any) -> Callable[[], bytes]:
                compute = real(action, plan)

                def lied() -> bytes:
                    data = compute()
                    gram = unpack_triangle(data, len(action.members))
                    if not consistent:
                        return pack_triangle(4.0 * gram)
                    generation, parts = auditor.ledger.products
                    size = len(data)
                    fake = [
                        pack_triangle(4.0 * unpack_triangle(parts[at : at + size], len(action.members)))
                        for at in range(0, len(parts), size)
                    ]
                    auditor.ledger.products = generation, b"".join(fake)
                    return audits_module.pack_triangle(audits_module.add_triangles(fake, len(action.members)))

                return lied

            auditor.products = products  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=90.0)
        check(group, [member for member in group.members if member is not liar])
        assert not any(member.lies for member in group.members), "nothing that fits into a proof"
        for member in group.members:
            if member is not liar:
                assert "inner products" in member.instance.voter.convicted[liar.me]


async def test_a_false_accusation_harms_nobody_but_is_counted_against_its_author() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 0.001
        slanderer, victim = group.members[0], group.members[1]

        def opened(member: Member) -> None:
            if member is slanderer:
                real = member.instance.auditor.examine

                async def examine(action: Any) -> None:
                    plan = member.instance.voter.plan
                    assert plan is not None
                    index = next(i for i, piece in enumerate(plan.slices) if piece.owner == victim.me)
                    for other in group.members:
                        if other is not member:
                            message = Accuse(member.instance.key, plan.attempt, plan.epoch, index, 0)
                            member.post.send(other.me, message)
                            member.post.send(other.me, message)
                    await real(action)

                member.instance.auditor.examine = examine  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, group.members)
        false = [member for member in group.members if (slanderer.me, "false-accusation") in member.verdicts]
        assert len(false) >= 3, "all but the two of them look, if the round is not over before"
        assert all(member.verdicts.count((slanderer.me, "false-accusation")) == 1 for member in false)


async def test_a_contribution_without_its_mark_is_refused_and_its_author_left_out() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        liar = group.members[1]
        group.open_hooks.append(lambda member: forge(member) if member is liar else None)
        await group.reduce(limit=90.0)
        check(group, [member for member in group.members if member is not liar])
        others = [member for member in group.members if member is not liar]
        told = [note for member in others for _, note in member.notes if note.what == "unsigned"]
        assert told and all(note.peer == liar.me for note in told)


def forge(member: Member) -> None:
    """It signs other bytes than it sends."""
    ledger, real = member.instance.auditor.ledger, member.instance.auditor.ledger.mark

    def mark(start: int, stop: int, part: Any) -> Any:
        marked = real(start, stop, part)
        return attrs.evolve(marked, mark=attrs.evolve(marked.mark, root=bytes(32)))

    ledger.mark = mark  # type: ignore[method-assign]


async def test_a_combined_slice_that_its_owner_has_not_signed_as_it_is_does_not_count() -> None:
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        liar = next(member for member in group.members if member is not group.leader)

        def opened(member: Member) -> None:
            if member is liar:
                real = member.instance.auditor.signed
                member.instance.auditor.signed = lambda index: (  # type: ignore[method-assign]
                    None if real(index) is None else attrs.evolve(real(index), signature=bytes(64))
                )

        group.open_hooks.append(opened)
        await group.reduce(limit=120.0)
        check(group, [member for member in group.members if member is not liar])


async def test_strangers_and_nonsense_get_no_parts() -> None:
    async with reduce_group(4, ELEMENTS) as group:
        group.rule, group.audit = resolve("median"), 1.0
        refused: list[str] = []

        def opened(member: Member) -> None:
            real = member.instance.auditor.examine

            async def examine(action: Any) -> None:
                plan = member.instance.voter.plan
                assert plan is not None
                piece = next(piece for piece in plan.slices if piece.owner != member.me)
                right = audits_module.AskPart(
                    member.instance.key, plan.attempt, plan.epoch, piece.start, piece.stop, 0, own=False
                )
                for wrong in (
                    attrs.evolve(right, number=16),
                    attrs.evolve(right, number=-1),
                    attrs.evolve(right, stop=piece.stop + 1),
                    attrs.evolve(right, epoch=7),
                ):
                    with pytest.raises(RemoteRefused) as caught:
                        await member.endpoint.call(piece.owner, PART, wrong)
                    refused.append(caught.value.reason)
                for _ in range(defaults.MAX_LOOKS):
                    with pytest.raises(RemoteError) as asked:  # an answer, whose body nobody reads here, or none
                        await member.endpoint.call(piece.owner, PART, right)
                assert "are enough" in str(asked.value)
                member.instance.auditor._drawn = lambda others: []  # type: ignore[method-assign]
                await real(action)

            if member is group.members[0]:
                member.instance.auditor.examine = examine  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, group.members)
        assert len(refused) == 4


async def test_audits_cost_at_most_a_tenth_of_the_bytes() -> None:
    sent = []
    for audit in (0.0, defaults.AUDIT_RATE):
        async with reduce_group(8, 1 << 18) as group:
            group.rule, group.audit = resolve("multikrum:f=2"), audit
            before = sum(member.sent for member in group.members)
            for _ in range(3):
                await group.reduce(limit=60.0)
                group.advance()
            sent.append(sum(member.sent for member in group.members) - before)
    print(f"bytes with audits, of those without: {sent[1] / sent[0]:.3f}")
    assert sent[0] < sent[1] < 1.10 * sent[0]


# -- proofs ---------------------------------------------------------------------------------------------


async def a_lie(rule: str = "nnm+trimmed_mean:f=1", codec: str = "fp32", count: int = 5) -> Lie:
    async with reduce_group(count, ELEMENTS) as group:
        group.rule, group.audit, group.coding = resolve(rule), 16.0, Coding.of(codec)
        group.members[2].distort = add_one
        await group.reduce(limit=90.0)
        return next(lie for member in group.members for lie in member.lies)


@pytest.mark.parametrize("codec", ["fp32", "int8", "bf16"])
async def test_a_proof_convinces_whoever_was_not_there_and_nothing_like_it_does(codec: str) -> None:
    rule = resolve("nnm+trimmed_mean:f=1")
    lie = await a_lie(codec=codec)
    lie.check(RUN, rule)
    assert len(pack(lie)) < defaults.MAX_LIE
    other = Identity(bytes([77]) * 32).peer_id
    flipped = bytes([lie.result[0] ^ 1]) + lie.result[1:]
    for wrong in (
        attrs.evolve(lie, run=bytes([1]) * 32),
        attrs.evolve(lie, round=lie.round + 1),
        attrs.evolve(lie, prev=bytes([1]) * 32),
        attrs.evolve(lie, voters=lie.voters[::-1]),
        attrs.evolve(lie, voters=(*lie.voters, other)),
        attrs.evolve(lie, attempt=lie.attempt + 1),
        attrs.evolve(lie, epoch=lie.epoch + 1),
        attrs.evolve(lie, start=lie.start + 16),
        attrs.evolve(lie, stop=lie.stop - 16),
        attrs.evolve(lie, codec="fp16"),
        attrs.evolve(lie, owner=next(v for v in lie.voters if v != lie.owner)),
        attrs.evolve(lie, owner=other),
        attrs.evolve(lie, weights=(2, *lie.weights[1:])),
        attrs.evolve(lie, members=lie.members[::-1]),
        attrs.evolve(lie, decision=b""),
        attrs.evolve(lie, decision=lie.decision[::-1]),
        attrs.evolve(lie, roots=lie.roots[::-1]),
        attrs.evolve(lie, parts=lie.parts[::-1]),
        attrs.evolve(lie, paths=((), *lie.paths[1:])),
        attrs.evolve(lie, leaf=lie.leaf ^ 1),
        attrs.evolve(lie, leaf=10_000),
        attrs.evolve(lie, result=flipped),
        attrs.evolve(lie, result=lie.result[:-4]),
        attrs.evolve(lie, result_path=()),
        attrs.evolve(lie, combined=attrs.evolve(lie.combined, signature=bytes(64))),
        attrs.evolve(lie, combined=attrs.evolve(lie.combined, inputs=bytes(32))),
    ):
        with pytest.raises(DecodeError, match="no proof that"):
            wrong.check(RUN, rule)
    with pytest.raises(DecodeError, match="nothing can be combined|the owner signed|is right"):
        lie.check(RUN, resolve("trimmed_mean:f=3"))


async def test_what_an_honest_owner_signs_is_never_a_proof() -> None:
    """The same construction over a right combination."""
    made: list[Lie] = []
    async with reduce_group(5, ELEMENTS) as group:
        group.rule, group.audit = resolve("nnm+trimmed_mean:f=1"), 4.0

        def opened(member: Member) -> None:
            auditor = member.instance.auditor
            real = auditor._from_owner

            async def from_owner(case: Any) -> Any:
                evidence, why = await real(case)
                assert evidence is not None
                first, last = case.bounds
                start, _ = case.range
                result = auditor._buffers.result
                assert result is not None
                theirs = result[start + first : start + last].numpy().tobytes()
                other = bytes([theirs[0] ^ 1]) + theirs[1:]
                from shoal.learning.rounds import cases

                finding = cases._lied(auditor._setting, case, evidence, other, theirs)
                assert finding.lie is not None
                made.append(finding.lie)
                return evidence, why

            auditor._from_owner = from_owner  # type: ignore[method-assign]

        group.open_hooks.append(opened)
        await group.reduce(limit=60.0)
        check(group, group.members)
    assert len(made) == 20
    for lie in made:
        with pytest.raises(DecodeError, match="the combination is right"):
            lie.check(RUN, group.rule)


@pytest.mark.parametrize("voters", [2, 5, 64])
async def test_a_proof_of_many_members_fits_into_an_envelope(voters: int) -> None:
    from shoal.learning.reduce.codecs import resolve as codec_of
    from shoal.learning.reduce.leaves import leaf_count, leaf_elements

    for name in ("fp32", "fp16", "int8", "e3m0"):
        codec = codec_of(name)
        for elements in (1, 1000, 1 << 20, 1 << 28):
            leaf = leaf_elements(elements, voters, codec)
            steps = (leaf_count(elements, leaf) - 1).bit_length()
            size = voters * (codec.wire_size(leaf) + 34 * steps + 2 * 34 + 40) + 4 * leaf + 34 * steps
            size += 8 * voters * 9 + 1000
            assert size < defaults.MAX_LIE, (name, elements, leaf)
            assert leaf % codec.block == 0


def test_a_ledger_forgets_everything_when_its_round_is_over() -> None:
    ledger = Ledger(Identity(bytes([1]) * 32), bytes(32), 3)
    from shoal.learning.reduce.buffers import Part
    from shoal.learning.state import bytes_view

    vector = torch.arange(1000, dtype=torch.float32)
    marked = ledger.mark(0, 1000, Part(FP32, bytes_view(vector), vector))
    assert ledger.take(ledger.me, 0, 1000, marked.part, marked.mark) is None
    assert ledger.sent and ledger.given
    ledger.drop()
    assert not ledger.sent and not ledger.given


def test_a_contributor_cannot_replace_the_part_that_an_owner_may_have_combined() -> None:
    """Else the owner signs for the second what it made of the first, which is the proof of a lie that was none."""
    from shoal.learning.reduce.buffers import Part
    from shoal.learning.state import bytes_view

    owner, author = (Ledger(Identity(bytes([number]) * 32), bytes(32), 3) for number in (1, 2))
    again = Ledger(Identity(bytes([2]) * 32), bytes(32), 3)
    first, second = torch.zeros(1000), torch.ones(1000)
    one = author.mark(0, 1000, Part(FP32, bytes_view(first), first))
    other = again.mark(0, 1000, Part(FP32, bytes_view(second), second))
    assert owner.take(author.me, 0, 1000, one.part, one.mark) is None
    assert owner.take(author.me, 0, 1000, one.part, one.mark) is None, "the same once more, through another member"
    assert owner.take(author.me, 0, 1000, other.part, other.mark) == "it has signed another one before"
    assert owner.given[author.me, 0, 1000, "fp32"].mark == one.mark


def test_an_owner_cannot_replace_the_statement_for_the_slice_that_came_first() -> None:
    """Else whoever finds the lie in the first slice would accuse it with the statement for the second."""
    owner, other = Identity(bytes([1]) * 32), Ledger(Identity(bytes([2]) * 32), bytes(32), 3)
    place, slices = (0, 0, 0, 1000), (torch.zeros(1000), torch.ones(1000))
    said = []
    for result in slices:
        root = other.result_tree(result, FP32).root
        data = combined_bytes(bytes(32), *place, "fp32", bytes(32), bytes(32), root, b"")
        said.append(Combined(bytes(32), bytes(32), root, b"", owner.sign(data)))
    for _ in range(2):
        assert other.check(*place, owner.peer_id, slices[0], FP32, said[0]) is None
        assert other.check(*place, owner.peer_id, slices[1], FP32, said[1]) == "its owner has signed another one before"
    assert other._combined[*place, owner.peer_id][0] == said[0]
