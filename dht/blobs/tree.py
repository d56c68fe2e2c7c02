"""The hash tree that names a blob: labelled parts, cut in chunks, under one root that is the blob's id.

::

    id = root = H(chunk size, labels, kinds and sizes of the parts, hashes of the pages)
                      │
    page              H(up to 1024 leaves, in the order of the chunks)                 1 GiB of data
                      │
    leaf              H(chunk of up to 1 MiB; the last one of a part is shorter)

Chunks never span two parts, so each can be read straight into the buffer it belongs to; they are numbered through, part
after part. The parts' list and the hashes of the pages are the *outline*: whoever knows the id checks it as a whole,
with it each page of leaves, and with that each chunk, whoever it came from. So nothing has to be believed before it is
checked, and what is needed for that is small: the outline of 64 GiB in one part holds 2 KiB of page hashes, a page is
32 KiB.

H is BLAKE3 in its ``derive_key`` mode, under another context on each level: none can be passed off as another.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from typing import TypeAlias

import attrs
from blake3 import blake3

from ...transport.errors import ProtocolMisuse, RemoteProtocolError
from . import defaults

Buffer: TypeAlias = bytes | bytearray | memoryview

HASH_BYTES = 32

_LEAF = "shoal 2026 blob leaf v1"
_PAGE = "shoal 2026 blob page v1"
_ROOT = "shoal 2026 blob root v1"

#: What a part holds, by the names of safetensors, and the bytes of one item.
KINDS = {
    "U8": 1, "I8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8,
}  # fmt: skip


@attrs.frozen
class Part:
    """One labelled buffer. ``kind``: of its items, one of :data:`KINDS`; ``size`` in bytes."""

    label: str
    kind: str
    size: int


@attrs.frozen
class Outline:
    """What a blob consists of. Travels as a message: see :func:`check_outline`. ``pages``: 32 bytes each, joined."""

    chunk: int
    parts: tuple[Part, ...]
    pages: bytes

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def root(self) -> bytes:
        """The id of the blob: 32 bytes."""
        hasher = blake3(derive_key_context=_ROOT)
        hasher.update(struct.pack("<QQQ", self.chunk, len(self.parts), len(self.pages)))
        for part in self.parts:
            label, kind = part.label.encode(), part.kind.encode()
            hasher.update(struct.pack("<QQQ", len(label), len(kind), part.size))
            hasher.update(label)
            hasher.update(kind)
        hasher.update(self.pages)
        return hasher.digest()


def outline_fault(outline: Outline) -> str | None:
    """What is wrong with an outline, whatever its root; None when it is sound and within the bounds."""
    if not 0 < outline.chunk <= defaults.MAX_CHUNK:
        return f"chunks of {outline.chunk} bytes"
    if len(outline.parts) > defaults.MAX_PARTS:
        return f"{len(outline.parts)} parts, at most {defaults.MAX_PARTS} allowed"
    labels: dict[str, None] = {}
    chunks = 0
    for part in outline.parts:
        if part.kind not in KINDS or part.size < 0 or part.size % KINDS[part.kind]:
            return f"a part of {part.size} bytes of kind {part.kind[:16]!r}"
        try:
            length = len(part.label.encode())
        except UnicodeEncodeError:
            return "a label that is no text"
        if not 0 < length <= defaults.MAX_LABEL or part.label == "__metadata__" or part.label in labels:
            return f"an empty, too long, reserved or repeated label {part.label[:32]!r}"
        labels[part.label] = None
        chunks += -(-part.size // outline.chunk)
    if chunks > defaults.MAX_CHUNKS:
        return f"{chunks} chunks, at most {defaults.MAX_CHUNKS} allowed"
    if len(outline.pages) != HASH_BYTES * -(-chunks // defaults.PAGE):
        return f"{len(outline.pages)} bytes of page hashes for {chunks} chunks"
    return None


def check_outline(outline: Outline, blob: bytes, peer: str = "") -> None:
    """Raises :class:`RemoteProtocolError` unless ``outline`` is that of ``blob``, and sound."""
    fault = outline_fault(outline)
    if fault is not None:
        raise RemoteProtocolError(f"an outline with {fault}", peer=peer)
    if outline.root != blob:
        raise RemoteProtocolError(f"the outline of another blob than {blob.hex()[:16]}", peer=peer)


@attrs.frozen
class Place:
    """Where a chunk stands: in part number ``part``, ``size`` bytes from ``offset`` on; ``start``: in all bytes."""

    part: int
    offset: int
    size: int
    start: int


class Tree:
    """An outline and all leaves of a blob: what is needed to check each of its chunks."""

    __slots__ = ("_first", "_starts", "id", "leaves", "outline")

    def __init__(self, outline: Outline, leaves: bytes, blob: bytes | None = None) -> None:
        """``leaves`` must have been checked page by page. ``blob``: the root, where it is known already."""
        self.outline, self.leaves = outline, leaves
        self.id = outline.root if blob is None else blob
        self._first: list[int] = []  # number of the first chunk of each part
        self._starts: list[int] = []  # bytes before each part
        chunks = at = 0
        for part in outline.parts:
            self._first.append(chunks)
            self._starts.append(at)
            chunks += -(-part.size // outline.chunk)
            at += part.size
        if len(leaves) != HASH_BYTES * chunks:
            raise ProtocolMisuse(f"{len(leaves)} bytes of leaves for {chunks} chunks")

    def __len__(self) -> int:
        """Chunks of the blob."""
        return len(self.leaves) // HASH_BYTES

    @property
    def size(self) -> int:
        return self.outline.size

    def place(self, index: int) -> Place:
        """Where chunk ``index`` stands. Raises :class:`ProtocolMisuse` when there is none."""
        if not 0 <= index < len(self):
            raise ProtocolMisuse(f"chunk {index} of a blob of {len(self)}")
        # Of several parts that begin with one chunk the last one is not empty.
        part = bisect.bisect_right(self._first, index) - 1
        offset = (index - self._first[part]) * self.outline.chunk
        size = min(self.outline.chunk, self.outline.parts[part].size - offset)
        return Place(part, offset, size, self._starts[part] + offset)

    def chunks_of(self, part: int) -> range:
        """The numbers of the chunks of part number ``part``."""
        first = self._first[part]
        return range(first, first - (-self.outline.parts[part].size // self.outline.chunk))

    def chunk_size(self, index: int) -> int:
        return self.place(index).size

    def verify(self, index: int, data: Buffer) -> bool:
        """Whether ``data`` is chunk ``index``. Takes 0.3 ms."""
        if not 0 <= index < len(self) or len(data) != self.chunk_size(index):
            return False
        return leaf_hash(data) == self.leaves[HASH_BYTES * index : HASH_BYTES * (index + 1)]

    def page(self, number: int) -> bytes:
        """The leaves of page ``number``; empty when there is none."""
        size = HASH_BYTES * defaults.PAGE
        return self.leaves[size * number : size * (number + 1)] if number >= 0 else b""


def leaf_hash(data: Buffer) -> bytes:
    return blake3(data, derive_key_context=_LEAF).digest()


def page_hash(leaves: Buffer) -> bytes:
    return blake3(leaves, derive_key_context=_PAGE).digest()


def page_count(outline: Outline) -> int:
    return len(outline.pages) // HASH_BYTES


def chunk_count(outline: Outline) -> int:
    return sum(-(-part.size // outline.chunk) for part in outline.parts)


def page_fault(outline: Outline, number: int, leaves: bytes) -> str | None:
    """What is wrong with ``leaves`` as page ``number`` of a checked outline; None when they are it."""
    expected = HASH_BYTES * min(defaults.PAGE, chunk_count(outline) - number * defaults.PAGE)
    if len(leaves) != expected:
        return f"a page of {len(leaves)} bytes, {expected} expected"
    if page_hash(leaves) != outline.pages[HASH_BYTES * number : HASH_BYTES * (number + 1)]:
        return f"leaves that are not page {number} of the blob"
    return None


def build_tree(parts: Sequence[tuple[str, str, Buffer]], *, chunk: int = defaults.CHUNK) -> Tree:
    """The tree over ``(label, kind, bytes)`` parts. Blocking, 64 MiB in about 18 ms.

    Raises :class:`ProtocolMisuse` for buffers of other items than bytes (cast them first), and for parts out of bounds.
    """
    described, leaves = [], []
    for label, kind, data in parts:
        view = memoryview(data)
        if view.itemsize != 1:
            raise ProtocolMisuse("digests are taken over bytes")
        described.append(Part(label, kind, len(view)))
        leaves += [leaf_hash(view[start : start + chunk]) for start in range(0, len(view), chunk)]
    return tree_over(described, leaves, chunk=chunk)


def tree_over(parts: Sequence[Part], leaves: Sequence[bytes], *, chunk: int = defaults.CHUNK) -> Tree:
    """The tree over parts whose leaves are known. Raises :class:`ProtocolMisuse` for parts out of bounds."""
    joined, size = b"".join(leaves), HASH_BYTES * defaults.PAGE
    pages = b"".join(page_hash(joined[at : at + size]) for at in range(0, len(joined), size))
    outline = Outline(chunk, tuple(parts), pages)
    fault = outline_fault(outline)
    if fault is not None:
        raise ProtocolMisuse(f"no blob can have {fault}")
    return Tree(outline, joined)
