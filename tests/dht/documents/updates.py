"""Yjs updates for tests: what honest authors write, and what nobody would, from one random source."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pycrdt

from shoal.dht.documents.guard import Guard
from shoal.dht.documents.guard_decoder import ANY, ARRAY, DELETED, GC, MAP, STRING, TEXT, TYPE, decode

KINDS: dict[int, Any] = {ARRAY: pycrdt.Array, MAP: pycrdt.Map, TEXT: pycrdt.Text}

_SCALARS: tuple[Any, ...] = (
    0, 1, -5, 1 << 40, (1 << 53) + 1, 1.5, -0.1, None, True, False, float("inf"), "", "a", "häß", "x" * 50, "😀y", b"",
    b"\0\xff", [], {},
)  # fmt: skip
_TEXTS = ("x", "ab😀c", "über", "😀😀", "long " * 9)


# --- honest ----------------------------------------------------------------------------------------------------------


class Author:
    """Writes at random, and remembers the updates as pycrdt gave them."""

    def __init__(self, rng: random.Random, client: int) -> None:
        self.rng = rng
        self.updates: list[bytes] = []
        self.doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client)
        self._listen()

    def _listen(self) -> None:
        self._subscription = self.doc.observe(lambda event: self.updates.append(event.update))
        self.roots = [self.doc.get(name, type=KINDS[kind]) for name, kind in (("m", MAP), ("a", ARRAY), ("t", TEXT))]

    def write(self, edits: int = 1) -> None:
        """One transaction of ``edits`` changes; an update when anything came of it."""
        with self.doc.transaction():
            for _ in range(edits):
                self._edit(self.rng.choice(self.roots), 0)

    def restart(self) -> bytes:
        """Go on from a snapshot of what was written, like an author that compacts and loads it again."""
        snapshot = self.doc.get_update()
        client = self.doc.client_id
        self.doc = pycrdt.Doc(client_id=client)
        self.doc.apply_update(snapshot)
        self._listen()
        self.updates = [snapshot]
        return snapshot

    def value(self, depth: int) -> Any:
        draw = self.rng.randrange(10)
        if draw < 6 or depth > 3:
            return self.rng.choice(_SCALARS)
        inside = [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        match draw:
            case 6:
                return [item for item in inside if not isinstance(item, pycrdt.Array | pycrdt.Map | pycrdt.Text)]
            case 7:
                return {
                    key: item
                    for key, item in zip("abcd", inside, strict=False)
                    if not isinstance(item, pycrdt.Array | pycrdt.Map | pycrdt.Text)
                }
            case 8:
                return pycrdt.Array(inside) if self.rng.random() < 0.6 else pycrdt.Text(self.rng.choice(_TEXTS))
            case _:
                return pycrdt.Map(dict(zip("abcd", inside, strict=False)))

    def _edit(self, shared: Any, depth: int) -> None:
        match shared:
            case pycrdt.Map():
                self._edit_map(shared, depth)
            case pycrdt.Array():
                self._edit_array(shared, depth)
            case _:
                self._edit_text(shared)

    def _edit_map(self, shared: Any, depth: int) -> None:
        rng, keys = self.rng, sorted(shared.keys())
        match rng.randrange(4):
            case 0 if keys:
                del shared[rng.choice(keys)]
            case 1 if keys and depth < 4:
                inner = shared[rng.choice(keys)]
                if isinstance(inner, pycrdt.Array | pycrdt.Map | pycrdt.Text):
                    self._edit(inner, depth + 1)
            case _:
                shared[rng.choice("abcdef")] = self.value(depth)

    def _edit_array(self, shared: Any, depth: int) -> None:
        rng, size = self.rng, len(shared)
        match rng.randrange(6):
            case 0 if size:
                start = rng.randrange(size)
                del shared[start : rng.randrange(start, size) + 1]
            case 1 if size:
                inner = shared[rng.randrange(size)]
                if isinstance(inner, pycrdt.Array | pycrdt.Map | pycrdt.Text):
                    self._edit(inner, depth + 1)
            case 2:
                shared.extend([self.value(depth) for _ in range(rng.randrange(4))])
            case 3 if size:
                shared[rng.randrange(size)] = self.value(depth)
            case _:
                shared.insert(rng.randrange(size + 1), self.value(depth))

    def _edit_text(self, shared: Any) -> None:
        rng, text = self.rng, str(shared)
        cuts = [len(text[:at].encode()) for at in range(len(text) + 1)]  # pycrdt counts bytes
        if rng.random() < 0.3 and text:
            start = rng.randrange(len(text))
            del shared[cuts[start] : cuts[rng.randrange(start, len(text)) + 1]]
        else:
            shared.insert(rng.choice(cuts), rng.choice(_TEXTS))


def honest(rng: random.Random, client: int, transactions: int) -> list[bytes]:
    """The updates of an honest author, in order."""
    author = Author(rng, client)
    for _ in range(transactions):
        author.write(rng.choice((1, 1, 2, 5)))
    return author.updates


# --- whatever --------------------------------------------------------------------------------------------------------


def uint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def text(value: str) -> bytes:
    data = value.encode()
    return uint(len(data)) + data


@attrs.define
class Piece:
    """A struct to be encoded: whatever it says."""

    kind: int
    client: int
    body: bytes
    origin: int | None = None
    right: int | None = None
    parent: str | int = "a"
    key: str | None = None
    keyed: bool = False

    def encode(self) -> bytes:
        if self.kind == GC:
            return bytes([GC]) + self.body
        info = self.kind | (0x80 if self.origin is not None else 0) | (0x40 if self.right is not None else 0)
        out = bytes([info | (0x20 if self.keyed or self.key is not None else 0)])
        for clock in (self.origin, self.right):
            if clock is not None:
                out += uint(self.client) + uint(clock)
        if not info & 0xC0:
            out += (
                uint(1) + text(self.parent)
                if isinstance(self.parent, str)
                else uint(0) + uint(self.client) + uint(self.parent)
            )
            if self.key is not None:
                out += text(self.key)
        return out + self.body


def encode(client: int, start: int, pieces: Sequence[Piece], deleted: Sequence[tuple[int, int]] = ()) -> bytes:
    out = b"\0"
    if pieces:
        out = uint(1) + uint(len(pieces)) + uint(client) + uint(start) + b"".join(each.encode() for each in pieces)
    if not deleted:
        return out + b"\0"
    ranges = b"".join(uint(clock) + uint(length) for clock, length in deleted)
    return out + uint(1) + uint(client) + uint(len(deleted)) + ranges


_BODIES: dict[int, Callable[[random.Random], tuple[bytes, int]]] = {
    GC: lambda rng: (uint(length := rng.choice((1, 2, 3))), length),
    DELETED: lambda rng: (uint(length := rng.choice((1, 1, 2, 5))), length),
    STRING: lambda rng: (text(value := rng.choice(_TEXTS)), len(value.encode("utf-16-le")) // 2),
    TYPE: lambda rng: (bytes([rng.choice((ARRAY, MAP, TEXT))]), 1),
    ANY: lambda rng: (uint(length := rng.choice((1, 1, 2))) + b"\x7d\x05" * length, length),
}


def imagined(rng: random.Random, client: int, start: int) -> bytes:
    """A well-formed update of items that stand anywhere, often almost right: beside the last ones, in known parents."""
    pieces, clock = [], start
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        kind = rng.choice((GC, DELETED, STRING, TYPE, TYPE, ANY, ANY, ANY))
        body, length = _BODIES[kind](rng)
        piece = Piece(kind, client, body)
        near = [max(0, clock - back) for back in (1, 1, 1, 2, 3)] + [rng.randrange(clock + 1)]
        match rng.randrange(6):
            case 0 | 1 if clock:
                piece.origin = rng.choice(near)
                piece.keyed = rng.random() < 0.3
            case 2 if clock:
                piece.right = rng.choice(near)
            case 3 if clock:
                piece.origin, piece.right = rng.choice(near), rng.choice(near)
            case 4 if clock:
                piece.parent = rng.choice(near)
            case _:
                piece.parent = rng.choice(("a", "m", "t", "new", "new2"))
        if piece.origin is None and piece.right is None and rng.random() < 0.4:
            piece.key = rng.choice("abcdefgh")
        pieces.append(piece)
        clock += length
    deleted: list[tuple[int, int]] = []
    if rng.random() < 0.5 and clock:
        at = rng.randrange(clock)
        deleted = [(at, rng.randrange(1, clock - at + 1))]
    return encode(client, start, pieces, deleted)


# --- what pycrdt makes of it -----------------------------------------------------------------------------------------


def checked(client: int, updates: Sequence[bytes]) -> tuple[Guard, pycrdt.Doc[Any]]:
    """Let the guard and pycrdt take ``updates``, and compare what became of them.

    Raises GuardError when the guard refuses one, and AssertionError when pycrdt's state is another than the guard's.
    """
    guard = Guard(client)
    for update in updates:
        guard.admit(update)
    doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client ^ 1)
    for update in updates:
        doc.apply_update(update)
    full = doc.get_update()  # whatever waits for something would stand in it too, as a gap
    state = decode(full, client)
    assert state.start == 0 and sum(struct.length for struct in state.structs) == guard.next
    assert state.deleted == guard.deleted()
    assert doc.get_state() == (uint(1) + uint(client) + uint(guard.next) if guard.next else b"\0")
    for name, kind in guard.roots.items():
        doc.get(name, type=KINDS[kind]).to_py()
    again = Guard(client)
    again.admit(full)
    assert (again.next, again.deleted()) == (guard.next, guard.deleted())
    return guard, doc
