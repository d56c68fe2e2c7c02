"""What rules other than the mean ask of a round, as pure functions: how many must contribute, and what is decided.

Rules on the Gram matrix need one number for each pair of members before anything can be combined::

    owners --Products--> leader: adds them up, decides --Decided--> all: check, combine with the leader's bytes

"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from ...transport.errors import ConfigError
from ...transport.identity import PeerId
from .. import defaults
from ..aggregate.aggregator import Aggregator, Decision
from ..aggregate.linear import fault
from ..aggregate.mean import Mean
from ..aggregate.products import add_triangles, pack_triangle, triangle_fault, triangle_size, unpack_triangle
from .messages import Decided, Plan
from .remembering import read, written

#: What a run does that names no other rule.
MEAN = Aggregator((), Mean())


def too_few(rule: Aggregator, count: int) -> str | None:
    """Why ``rule`` promises nothing for ``count`` contributions. None when it does, or when there are none at all."""
    if not count:
        return None
    try:
        rule.check(count)
    except ConfigError as error:
        return str(error)
    return None


def unfit(rule: Aggregator, min_peers: int) -> str | None:
    """Why rounds cannot use ``rule`` in a run that begins with ``min_peers``; None when they can."""
    if rule.needs_reference:
        return f"{rule.rule.name} begins at the last result, which newcomers do not have; in rounds it is start=zero"
    peers = max(min_peers, 1)
    wrong = too_few(rule, peers)
    if wrong is None:
        return None
    enough = next((count for count in range(peers, defaults.MAX_ROSTER + 1) if too_few(rule, count) is None), None)
    hint = f"--min-peers {enough} is enough" if enough is not None else "no number of peers is enough"
    return f"{wrong}; rounds begin with {peers} (min_peers): {hint}"


def owners_of(plan: Plan) -> tuple[PeerId, ...]:
    """Who owns slices, in the order of these: the order in which products are added."""
    return tuple(dict.fromkeys(piece.owner for piece in plan.slices))


def part_fault(plan: Plan, owner: PeerId, data: bytes, count: int) -> str | None:
    """What is wrong with the products that ``owner`` sends of the slices of ``count`` members."""
    return triangle_fault(data, count, sum(p.stop - p.start for p in plan.slices if p.owner == owner))


def heaviest(parts: Mapping[PeerId, bytes], count: int) -> PeerId:
    """Whose part is the largest: who pays when parts that look well add up to what nothing can be decided from."""
    return max(parts, key=lambda owner: float(unpack_triangle(parts[owner], count).trace()))


def told_in_full(owners: int, size: int) -> bool:
    """Whether the leader passes on every owner's part, ``size`` bytes each: so each sees that its own is in the sum."""
    return owners * size <= defaults.PRODUCTS_IN_FULL


def parts_to_tell(parts: Sequence[bytes], count: int) -> tuple[bytes, ...]:
    """What the leader tells all of the owners' parts: all of them, or where that is too much their sum."""
    if told_in_full(len(parts), len(parts[0])):
        return tuple(parts)
    return (pack_triangle(add_triangles(parts, count)),)


def seed_of(key: bytes) -> int:
    """The seed of what rules draw in the round ``key``: nobody can choose it, since the commit before fixes the key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"shoal aggregate").digest(), "big")


@attrs.frozen
class Weighed:
    """What comes of inner products. ``data``: :attr:`.Decision.data`; ``quality`` of each member, 0 … 1, empty where
    the rule has none; ``learnt``: what it remembers of each after this round, empty where it remembers nothing.
    ``wrong``: why nothing, or something else than the leader says."""

    data: bytes = b""
    quality: tuple[float, ...] = ()
    learnt: tuple[int, ...] = ()
    wrong: str | None = None


def decide(
    rule: Aggregator,
    key: bytes,
    parts: Sequence[bytes],
    count: int,
    scores: Sequence[int] = (),
    said: bytes | None = None,
) -> Weighed:
    """What is to be decided for ``count`` members from the ``parts``, and from the ``scores`` that are remembered of
    them (none: nothing is). ``said``: what the leader has decided, to be compared. Blocking."""
    try:
        with np.errstate(all="ignore"):  # of absurd products; what comes of them is looked at
            gram = add_triangles(parts, count)
            wrong = fault(gram, count)
            if wrong is not None:
                return Weighed(wrong=f"the sum of the inner products is none: {wrong}")
            own = rule.decide(gram, count, seed_of(key), read(scores) if scores else None)
            wrong = Decision.read(said, count).differs(own, gram) if said is not None else None
    except (ConfigError, ValueError) as error:  # of linear algebra that does not converge, too
        return Weighed(wrong=str(error))
    quality = () if own.quality is None else tuple(own.quality.tolist())
    return Weighed(own.data, quality, written(own.scores), wrong)


def decided_fault(message: Decided, plan: Plan, me: PeerId, own: bytes, count: int) -> str | None:
    """Why the products that a leader has told cannot be what the owners sent, as far as can be seen without computing.

    ``own``: the products that ``me`` has sent, empty if none.
    """
    owners = owners_of(plan)
    full = told_in_full(len(owners), triangle_size(count))
    if len(message.parts) != (len(owners) if full else 1):
        return f"the inner products of {len(message.parts)} of {len(owners)} owners"
    if me not in owners or not count:
        return None
    if not own:
        return "it was decided without our inner products"
    if full and message.parts[owners.index(me)] != own:
        return "our inner products are not among those that were added up"
    return None
