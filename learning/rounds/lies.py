"""A proof that the owner of a slice did not combine what it was given: anybody can check it, with nothing but itself.

It holds one leaf of everybody's part and of the result, which the owner's signature binds, and whoever combines those
leaves gets another result.
"""

from __future__ import annotations

import attrs
import torch

from ...transport.errors import ConfigError, DecodeError, ProtocolMisuse
from ...transport.identity import PeerId
from .. import defaults
from ..aggregate.aggregator import Aggregator, Decision
from ..reduce.codecs import FP32, Codec, resolve
from ..reduce.leaves import HASH, bounds, leaf_count, leaf_elements, leaf_hash, root_from
from ..reduce.robust import Given, combine_by
from .messages import MAX_SAMPLES, check_codec, instance_key
from .statements import Combined, combined_fault, context_of, inputs_of


@attrs.frozen
class Lie:
    """``owner`` signed ``combined`` for elements ``start..stop`` of a round, which ``run`` to ``voters`` name, as what
    its rule makes of ``members`` with ``weights`` and ``decision``.

    ``roots``: of all members' parts. ``leaf``: the number of the leaf; ``parts``, ``paths``: that leaf of each member's
    part, coded, and its siblings; ``result``, ``result_path``: likewise of what the owner says comes of it, as float32.
    """

    run: bytes
    round: int
    prev: bytes
    voters: tuple[PeerId, ...]
    attempt: int
    epoch: int
    start: int
    stop: int
    codec: str
    owner: PeerId
    members: tuple[PeerId, ...]
    weights: tuple[int, ...]
    decision: bytes
    combined: Combined
    roots: tuple[bytes, ...]
    leaf: int
    parts: tuple[bytes, ...]
    paths: tuple[tuple[bytes, ...], ...]
    result: bytes
    result_path: tuple[bytes, ...]

    def __attrs_post_init__(self) -> None:
        check_codec(self.codec)
        numbers = (self.round, self.attempt, self.epoch, self.start, self.stop, self.leaf, *self.weights)
        if not all(0 <= number < 1 << 62 for number in numbers):
            raise ValueError("a number out of range")
        if not 0 < self.stop - self.start <= 1 << 40 or any(not 0 < weight <= MAX_SAMPLES for weight in self.weights):
            raise ValueError("an empty slice, or a weight that is none")
        counts = {len(each) for each in (self.members, self.weights, self.roots, self.parts, self.paths)}
        if counts != {len(self.members)} or not 0 < len(self.members) <= len(self.voters) <= defaults.MAX_ROSTER:
            raise ValueError("members, weights, roots, leaves and paths differ in number")
        if any(len(root) != HASH for root in self.roots) or any(len(p) > 64 for p in (*self.paths, self.result_path)):
            raise ValueError("hashes of another length")

    @property
    def key(self) -> bytes:
        return instance_key(self.run, self.round, self.prev, self.voters)

    @property
    def reason(self) -> str:
        return f"signed a wrong combination: elements {self.start}..{self.stop} of round {self.round}, leaf {self.leaf}"

    def check(self, run: bytes, rule: Aggregator) -> None:
        """Raises :class:`DecodeError` saying why this proves nothing against ``owner`` in ``run``, whose rule is
        ``rule``. Some ms for 64 members. Blocking."""
        wrong = self._fault(run, rule)
        if wrong is not None:
            raise DecodeError(f"no proof that {self.owner.short} lied: {wrong}", peer=self.owner.short)

    def _fault(self, run: bytes, rule: Aggregator) -> str | None:
        codec = resolve(self.codec)
        if self.run != run:
            return "it is of another run"
        if not codec.elementwise:
            return f"{codec.name} is not coded element by element"
        if self.owner not in self.voters or any(member not in self.voters for member in self.members):
            return "somebody is no voter"
        elements = self.stop - self.start
        leaf = leaf_elements(elements, len(self.voters), codec)
        leaves = leaf_count(elements, leaf)
        first, last = bounds(elements, leaf, self.leaf)
        if not 0 <= self.leaf < leaves:
            return "there is no such leaf"
        if len(self.result) != 4 * (last - first):
            return "the leaf of the result has another size"
        output = root_from(leaf_hash(self.result), leaves, 0, self.leaf, self.result_path)
        if output is None:
            return "the path of the result's leaf leads nowhere"
        place = self.attempt, self.epoch, self.start, self.stop, codec.name
        wrong = combined_fault(self.combined, self.owner, self.key, *place, output)
        if wrong is not None:
            return f"of the result, {wrong}"
        if self.combined.context != context_of(self.members, self.weights, self.decision):
            return "the owner signed for other members, weights or coefficients"
        if self.combined.inputs != inputs_of(self.roots):
            return "the owner signed for other parts"
        for member, root, data, path in zip(self.members, self.roots, self.parts, self.paths, strict=True):
            if len(data) != codec.wire_size(last - first) or codec.fault(data, last - first) is not None:
                return f"the leaf of {member.short} is no code of {last - first} numbers"
            if root_from(leaf_hash(data), leaves, 0, self.leaf, path) != root:
                return f"the leaf of {member.short} is not of its part"
        return self._same(rule, codec, last - first)

    def _same(self, rule: Aggregator, codec: Codec, elements: int) -> str | None:
        try:
            own = recombine(rule, codec, self.parts, self.weights, self.decision, elements)
        except (ConfigError, ProtocolMisuse, ValueError) as error:
            return f"nothing can be combined: {error}"
        return "the combination is right" if own == self.result else None


def recombine(
    rule: Aggregator, codec: Codec, parts: tuple[bytes | memoryview, ...], weights: tuple[int, ...], decision: bytes,
    elements: int,
) -> bytes:  # fmt: skip
    """The float32 bytes that come of ``parts``, some elements of each member's, once they have been coded and decoded
    as the whole slice was. Raises :class:`ConfigError`, :class:`ProtocolMisuse`, ``ValueError``. Blocking."""
    rule.check(len(parts))
    given: list[Given] = [(codec, part) for part in parts]
    if codec is FP32:
        given = [torch.frombuffer(bytearray(part), dtype=torch.float32) for part in parts]
    out = torch.empty(elements)
    chosen = Decision.read(decision, len(parts)) if decision else None
    combine_by(rule, given, chosen, [float(weight) for weight in weights], out)
    if codec is not FP32:
        code = bytearray(codec.wire_size(elements))
        codec.encode(out, code)
        codec.decode(code, out)
    return out.numpy().tobytes()
