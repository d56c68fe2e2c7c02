"""A hash tree over the bytes of one slice: whoever signs its root can be held to any part of it.

Leaves are equal runs of elements, the last one may be shorter. A level halves the one below it; a node without a
partner goes up as it is. So nodes of level k, numbered from 0, stand for the leaves ``number << k`` up to the next
node's, and a part of the slice that is one node needs one path, however many leaves it has.

Leaves and nodes are told apart, and hashed with SHA-256, as in RFC 6962: processors have instructions for that, it took
1.1 ns a byte where BLAKE2b, which the rest of Shoal uses, took 2.8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs

from .. import defaults
from .codecs import Buffer, Codec

#: Bytes of a hash.
HASH = 32


def leaf_elements(elements: int, voters: int, codec: Codec) -> int:
    """Elements of one leaf, for a slice of ``elements`` in a round of so many voters: a power of two, whole blocks.

    Small enough that one leaf of every voter fits into a proof, and that a small slice has enough of them for a sample.
    """
    most = defaults.AUDIT_PROOF // (4 * max(voters, 1))
    wanted = max(min(max(elements // defaults.AUDIT_LEAVES, defaults.AUDIT_LEAF), most), 1)
    return max(1 << wanted.bit_length() - 1, codec.block)


@attrs.frozen
class Tree:
    """Hashes by level, leaves first; the last level is the root alone."""

    levels: tuple[tuple[bytes, ...], ...]

    @property
    def root(self) -> bytes:
        return self.levels[-1][0]

    def path(self, level: int, number: int) -> tuple[bytes, ...]:
        """The siblings on the way from a node to the root, where it has any."""
        found = []
        for nodes in self.levels[level:-1]:
            if (sibling := number ^ 1) < len(nodes):
                found.append(nodes[sibling])
            number >>= 1
        return tuple(found)


def bounds(elements: int, leaf: int, number: int, level: int = 0) -> tuple[int, int]:
    """The elements of a slice that a node stands for."""
    return min(number * leaf << level, elements), min((number + 1) * leaf << level, elements)


def leaf_count(elements: int, leaf: int) -> int:
    return max(-(-elements // leaf), 1)


def sample_level(elements: int, leaf: int) -> int:
    """The level whose nodes are what one look takes: at most :data:`defaults.AUDIT_PARTS` of them in a slice."""
    leaves, parts = leaf_count(elements, leaf), defaults.AUDIT_PARTS
    return max((-(-leaves // parts) - 1).bit_length(), 0)


def build(data: Buffer, elements: int, leaf: int, codec: Codec) -> Tree:
    """The tree over the code of ``elements``, whose leaves begin at whole blocks of ``codec``. Blocking."""
    view = memoryview(data).cast("B")
    level = [
        leaf_hash(view[codec.wire_size(start) : codec.wire_size(stop)])
        for start, stop in (bounds(elements, leaf, number) for number in range(leaf_count(elements, leaf)))
    ]
    return Tree(_levels(level))


def _levels(leaves: Sequence[bytes]) -> tuple[tuple[bytes, ...], ...]:
    levels = [tuple(leaves)]
    while len(below := levels[-1]) > 1:
        pairs = [below[at : at + 2] for at in range(0, len(below), 2)]
        levels.append(tuple(_join(*pair) if len(pair) == 2 else pair[0] for pair in pairs))
    return tuple(levels)


def root_from(node: bytes, leaves: int, level: int, number: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a node and the siblings on its way lead to, in a tree of ``leaves``; None when the path has another
    length."""
    width, steps = -(-leaves // (1 << level)), iter(path)
    if not 0 <= number < width:
        return None
    for _ in range(64):
        if width == 1:
            break
        if (number ^ 1) < width:
            sibling = next(steps, None)
            if sibling is None:
                return None
            node = _join(sibling, node) if number & 1 else _join(node, sibling)
        number, width = number >> 1, -(-width // 2)
    return node if next(steps, None) is None else None


def leaf_hash(data: Buffer) -> bytes:
    h = hashlib.sha256(b"\0")
    h.update(data)
    return h.digest()


def _join(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
