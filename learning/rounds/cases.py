"""What a look at a combined slice is about and what it finds, as pure functions: evidence, judgement, proof."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch

from ...transport.errors import ConfigError, DecodeError, ProtocolMisuse
from ...transport.identity import PeerId
from .. import defaults
from ..aggregate.products import add_triangles, pack_triangle, triangle_size, unpack_triangle
from ..reduce.buffers import Part
from ..reduce.codecs import FP32, Codec, resolve
from ..reduce.leaves import Tree, bounds, build, leaf_count, leaf_elements, root_from, sample_level
from ..reduce.robust import Given, products_of
from ..standing import Verdict
from .ledger import Marked
from .lies import Lie, recombine
from .messages import Freeze, Plan
from .setting import Setting
from .statements import Combined, Mark, mark_fault
from .statements import products_of as products_name
from .weighing import owners_of, told_in_full


@attrs.frozen
class Finding:
    """What a look found. ``why`` is for people; ``lie``: proof for others, where there is one."""

    verdict: Verdict
    why: str = ""
    lie: Lie | None = None


@attrs.frozen
class Cut:
    """How a slice of ``elements`` is cut: into leaves of ``leaf`` elements, ``1 << level`` of which are a part."""

    elements: int
    leaf: int
    level: int

    @property
    def leaves(self) -> int:
        return leaf_count(self.elements, self.leaf)

    @property
    def parts(self) -> int:
        return -(-self.leaves // (1 << self.level))

    def part(self, number: int) -> tuple[int, int]:
        """The elements of a part."""
        return bounds(self.elements, self.leaf, number, self.level)


def cut_of(elements: int, voters: int, codec: Codec) -> Cut:
    leaf = leaf_elements(elements, voters, codec)
    return Cut(elements, leaf, sample_level(elements, leaf))


def parts_owned(plan: Plan, owner: PeerId, voters: int, before: int | None = None) -> int:
    """Parts of all slices of ``owner``, or of those before slice ``before``."""
    codec = resolve(plan.codec)
    mine = [piece for piece in plan.slices[:before] if piece.owner == owner]
    return sum(cut_of(piece.stop - piece.start, voters, codec).parts for piece in mine)


@attrs.frozen
class Case:
    """What is looked at: part ``number`` of slice ``index``, elements ``first..last`` of it."""

    plan: Plan
    frozen: Freeze
    index: int
    number: int
    codec: Codec
    cut: Cut
    signed: Combined
    tree: Tree
    weights: tuple[int, ...]
    decision: bytes

    @property
    def owner(self) -> PeerId:
        return self.plan.slices[self.index].owner

    @property
    def range(self) -> tuple[int, int]:
        return self.plan.slices[self.index].range

    @property
    def bounds(self) -> tuple[int, int]:
        """The elements of the slice that are looked at."""
        return self.cut.part(self.number)


@attrs.frozen
class Evidence:
    """Everybody's part of what is looked at, member by member, with marks and paths; the owner's ``products``."""

    parts: tuple[memoryview, ...]
    marks: tuple[Mark, ...]
    paths: tuple[tuple[bytes, ...], ...]
    products: bytes


def evidence_fault(setting: Setting, case: Case, members: Sequence[PeerId], evidence: Evidence) -> str | None:
    first, last = case.bounds
    start, stop = case.range
    for member, data, mark, path in zip(members, evidence.parts, evidence.marks, evidence.paths, strict=True):
        wrong = mark_fault(mark, member, setting.key, start, stop, case.codec.name)
        if wrong is not None:
            return wrong
        node = build(data, last - first, case.cut.leaf, case.codec).root
        if root_from(node, case.cut.leaves, case.cut.level, case.number, path) != mark.root:
            return f"the part of {member.short} is not of what it signed"
        if case.codec.fault(data, last - first) is not None:
            return f"the part of {member.short} is not finite"
    return None


def judge(setting: Setting, case: Case, evidence: Evidence, theirs: bytes, told: Sequence[bytes]) -> Finding:
    """Compare what comes of the parts with ``theirs``, the float32 bytes that the owner made of them. Blocking.

    ``told``: the inner products of all owners, as the leader told them.
    """
    first, last = case.bounds
    rule = setting.rule
    try:
        own = recombine(rule, case.codec, evidence.parts, case.weights, case.decision, last - first)
    except (ConfigError, ProtocolMisuse, ValueError) as error:
        return Finding("unanswered", f"nothing can be combined: {error}")
    if own != theirs:
        found = _lied(setting, case, evidence, own, theirs)
        assert found.lie is not None
        try:
            found.lie.check(setting.run, setting.rule)
        except DecodeError:
            return attrs.evolve(found, lie=None)  # what would not convince others is not sent to them
        return found
    wrong = _products_fault(setting, case, evidence, told)
    return Finding("lied", wrong) if wrong is not None else Finding("passed")


def _products_fault(setting: Setting, case: Case, evidence: Evidence, parts: Sequence[bytes]) -> str | None:
    """What is wrong with the inner products that the owner told the leader, as far as they are known here."""
    owners = owners_of(case.plan)
    count = len(case.frozen.members)
    size = triangle_size(count)
    if not evidence.products or not told_in_full(len(owners), size) or len(parts) != len(owners):
        return None
    if products_name(evidence.products) != case.signed.products:
        return None  # as if it had shown none
    triangles = [evidence.products[at : at + size] for at in range(0, len(evidence.products), size)]
    if pack_triangle(add_triangles(triangles, count)) != parts[owners.index(case.owner)]:
        return "its inner products are not the sum of those of the parts of its slices"
    first, last = case.bounds
    mine = products_of([([_given(case.codec, data) for data in evidence.parts], last - first)])
    at = parts_owned(case.plan, case.owner, len(setting.voters), case.index) + case.number
    theirs = unpack_triangle(triangles[at], count)
    lengths = np.sqrt(np.diag(mine))
    if (np.abs(mine - theirs) > defaults.AUDIT_PRODUCTS * np.outer(lengths, lengths)).any():
        return f"its inner products of part {case.number} of slice {case.index} are wrong"
    return None


def _lied(setting: Setting, case: Case, evidence: Evidence, own: bytes, theirs: bytes) -> Finding:
    first, last = case.bounds
    wrong = next(at for at in range(0, len(own), 4) if own[at : at + 4] != theirs[at : at + 4]) // 4
    leaf = (first + wrong) // case.cut.leaf
    low, high = bounds(case.cut.elements, case.cut.leaf, leaf)
    codec = case.codec
    base = codec.wire_size(first)
    cut = slice(codec.wire_size(low) - base, codec.wire_size(high) - base)
    inner = leaf - (case.number << case.cut.level)
    paths = []
    for data, path in zip(evidence.parts, evidence.paths, strict=True):
        paths.append((*build(data, last - first, case.cut.leaf, codec).path(0, inner), *path))
    start, stop = case.range
    lie = Lie(
        run=setting.run, round=setting.round, prev=setting.prev, voters=setting.voters,
        attempt=case.plan.attempt, epoch=case.plan.epoch, start=start, stop=stop, codec=codec.name,
        owner=case.owner, members=case.frozen.members, weights=case.weights, decision=case.decision,
        combined=case.signed, roots=tuple(mark.root for mark in evidence.marks), leaf=leaf,
        parts=tuple(bytes(data[cut]) for data in evidence.parts), paths=tuple(paths),
        result=theirs[4 * (low - first) : 4 * (high - first)], result_path=case.tree.path(0, leaf),
    )  # fmt: skip
    why = f"element {start + first + wrong} is not what {len(evidence.parts)} contributions combine to"
    return Finding("lied", why, lie)


def bytes_of(part: Part, first: int, last: int) -> memoryview:
    return part.data[part.codec.wire_size(first) : part.codec.wire_size(last)]


def part_of(part: Part, first: int, last: int) -> Given:
    return part.vector[first:last] if part.vector is not None else (part.codec, bytes_of(part, first, last))


def _given(codec: Codec, data: memoryview) -> Given:
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if codec is FP32 else (codec, data)


def opened(
    marked: Marked, level: int, number: int, first: int, last: int
) -> tuple[tuple[memoryview, ...], tuple[Mark, ...], tuple[tuple[bytes, ...], ...]]:
    return (bytes_of(marked.part, first, last),), (marked.mark,), (marked.tree.path(level, number),)
