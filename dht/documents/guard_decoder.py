"""Takes a Yjs v1 update apart, without recursion and within bounds; what we do not use is refused by name.

The layout (lib0 variable-length integers throughout) is that of Yjs' ``UpdateEncoderV1``; ``src/structs`` there and
``update.rs``, ``block.rs`` and ``id_set.rs`` of yrs 0.28 say the same:

    update  = sections structs* deletions          a section: count, client, first clock, structs
    struct  = info …                               bits of info: 0x80 origin, 0x40 right origin, 0x20 key of a map entry
    origin  = client clock                         5 lower bits: the kind of content
    parent  = 1 name | 0 client clock              only where there is no origin; then the key
    deletions = clients (client count (clock length)*)*

Numbers have to be in their shortest form, and everything names one client, the author's: an update says one thing, in
one way. pycrdt is less strict: it takes text for UTF-8 without looking, and allocates what a count announces.
"""

from __future__ import annotations

import attrs

from ...transport.errors import DecodeError
from . import defaults

#: Kinds of structs and content.
GC, DELETED, JSON, BINARY, STRING, EMBED, FORMAT, TYPE, ANY, DOC, SKIP, MOVE = range(12)

_NAMES = {
    JSON: "JSON text",
    BINARY: "a binary",
    EMBED: "an embedded object",
    FORMAT: "a text format",
    DOC: "a document within a document",
    SKIP: "a gap",
    MOVE: "a move",
}

#: Shared types that may stand in one another.
ARRAY, MAP, TEXT = range(3)
_TYPES = {
    3: "an XML element",
    4: "an XML fragment",
    5: "an XML hook",
    6: "an XML text",
    7: "a weak link",
    9: "a document",
}

_HAS_ORIGIN, _HAS_RIGHT, _HAS_KEY, _KIND = 0x80, 0x40, 0x20, 0x1F

#: First byte of a plain value → bytes after it, of those that hold no length.
_FIXED = {127: 0, 126: 0, 124: 4, 123: 8, 122: 8, 121: 0, 120: 0}
_BUFFER, _LIST, _OBJECT, _TEXT, _INTEGER = 116, 117, 118, 119, 125

#: Whole numbers that a double holds exactly.
_MAX_INTEGER = 1 << 53


class GuardError(DecodeError):
    """An update that is not a change an honest author makes."""


@attrs.define(eq=False)
class Struct:
    """One run of content. ``origin`` and ``right``: clocks of its neighbours, -1 without. ``parent`` (only without
    neighbours): name of a root type, or clock of the item that holds the type. ``keyed``: an entry of a map.
    """

    kind: int
    length: int
    origin: int = -1
    right: int = -1
    parent: str | int | None = None
    key: str | None = None
    keyed: bool = False
    #: Of TYPE: ARRAY, MAP or TEXT. Of ANY: how deep its values are nested.
    detail: int = 0
    #: Of STRING: offsets at which it must not be cut, since one character counts for two clocks.
    pairs: tuple[int, ...] = ()


@attrs.frozen
class Update:
    """``start``: the first clock of ``structs``. ``deleted``: (clock, length), ascending, not touching."""

    start: int
    structs: list[Struct]
    deleted: list[tuple[int, int]]


def decode(data: bytes, client: int) -> Update:
    """Raises :class:`GuardError`. Allocates in proportion to ``len(data)``, which the caller has bounded."""
    reader = _Reader(data, client)
    start, structs = reader.structs()
    deleted = reader.deletions()
    if reader.at != len(data):
        raise GuardError(f"{len(data) - reader.at} bytes too many")
    return Update(start, structs, deleted)


class _Reader:
    __slots__ = ("at", "client", "data", "end", "values")

    def __init__(self, data: bytes, client: int) -> None:
        self.data, self.client = data, client
        self.at, self.end = 0, len(data)
        self.values = 0

    def byte(self) -> int:
        at = self.at
        if at >= self.end:
            raise GuardError("ends early")
        self.at = at + 1
        return self.data[at]

    def uint(self, limit: int = defaults.MAX_CLOCK) -> int:
        """A variable-length unsigned integer up to ``limit``, in its shortest form."""
        byte = self.byte()
        if byte < 0x80:
            value = byte
        else:
            value, shift = byte & 0x7F, 7
            while True:
                byte = self.byte()
                value |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift > 56:
                    raise GuardError("a number of more than 63 bits")
            if byte == 0:
                raise GuardError("a number with zeros in front")
        if value > limit:
            raise GuardError(f"a number of {value} where at most {limit} is allowed")
        return value

    def count(self, each: int) -> int:
        """How many items of at least ``each`` bytes follow: no more than bytes are left."""
        count = self.uint()
        if count * each > self.end - self.at:
            raise GuardError(f"announces {count} items with {self.end - self.at} bytes left")
        return count

    def raw(self) -> bytes:
        size = self.count(1)
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        try:
            return self.raw().decode()
        except UnicodeDecodeError:
            raise GuardError("a text that is not UTF-8") from None

    def name(self) -> str:
        at = self.at
        text = self.text()
        if self.at - at > defaults.MAX_NAME:
            raise GuardError(f"a name of more than {defaults.MAX_NAME} bytes")
        return text

    def own_client(self, of: str) -> None:
        client = self.uint(_MAX_INTEGER)
        if client != self.client:
            raise GuardError(f"{of} of client {client}, which is not its author's")

    def clock(self, of: str) -> int:
        self.own_client(of)
        return self.uint()

    # -- structs ----------------------------------------------------------------------------------------------

    def structs(self) -> tuple[int, list[Struct]]:
        sections = self.uint()
        if sections == 0:
            return 0, []
        if sections != 1:
            raise GuardError(f"structs of {sections} clients")
        count = self.count(2)
        if not 0 < count <= defaults.MAX_STRUCTS:
            raise GuardError(f"{count} structs, 1 to {defaults.MAX_STRUCTS} allowed")
        self.own_client("structs")
        start = self.uint()
        return start, [self.struct() for _ in range(count)]

    def struct(self) -> Struct:
        info = self.byte()
        kind = info & _KIND
        if info == GC:
            return Struct(GC, self.length())
        if kind not in (DELETED, STRING, TYPE, ANY):
            raise GuardError(f"{_NAMES.get(kind, f'content of kind {kind}')} is not used here")
        made = Struct(kind, 1, keyed=bool(info & _HAS_KEY))
        if info & _HAS_ORIGIN:
            made.origin = self.clock("an origin")
        if info & _HAS_RIGHT:
            made.right = self.clock("a right origin")
        if not info & (_HAS_ORIGIN | _HAS_RIGHT):
            if self.uint(1):
                made.parent = self.name()
            else:
                made.parent = self.clock("a parent")
            if made.keyed:
                made.key = self.name()
        if kind == ANY:
            made.length = self.count(1)
            if made.length == 0:
                raise GuardError("content without a value")
            made.detail = max([self.any() for _ in range(made.length)])
        elif kind == STRING:
            self.string(made)
        elif kind == TYPE:
            made.detail = self.byte()
            if made.detail not in (ARRAY, MAP, TEXT):
                raise GuardError(f"{_TYPES.get(made.detail, f'a type of kind {made.detail}')} is not used here")
        else:
            made.length = self.length()
        return made

    def length(self) -> int:
        length = self.uint()
        if length == 0:
            raise GuardError("content without a length")
        return length

    def string(self, made: Struct) -> None:
        """Yjs counts UTF-16 units: a character beyond U+FFFF has two clocks."""
        text = self.text()
        if not text:
            raise GuardError("content without a character")
        made.length = len(text)
        if not text.isascii() and max(text) > "\uffff":
            pairs, at = [], 0
            for character in text:
                if character > "\uffff":
                    pairs.append(at + 1)
                    at += 1
                at += 1
            made.length, made.pairs = at, tuple(pairs)

    def any(self) -> int:
        """Walk over one plain value; returns how deep it is nested (1 for a number)."""
        deepest = 1
        left = [1]  # values still to come, per open container
        keys = [False]  # whether a key stands before each
        while left:
            if left[-1] == 0:
                left.pop()
                keys.pop()
                continue
            left[-1] -= 1
            self.values += 1
            if self.values > defaults.MAX_VALUES:
                raise GuardError(f"more than {defaults.MAX_VALUES} values")
            if keys[-1]:
                self.text()
            kind = self.byte()
            fixed = _FIXED.get(kind)
            if fixed is not None:
                self.at += fixed
            elif kind == _TEXT:
                self.text()
            elif kind == _INTEGER:
                self.integer()
            elif kind == _BUFFER:
                self.raw()
            elif kind in (_LIST, _OBJECT):
                left.append(self.count(1 if kind == _LIST else 2))
                keys.append(kind == _OBJECT)
                if len(left) > deepest:
                    deepest = len(left)
                    if deepest > defaults.MAX_NESTING:
                        raise GuardError(f"nested deeper than {defaults.MAX_NESTING}")
            else:
                raise GuardError(f"a value of kind {kind}, which does not exist")
        if self.at > self.end:
            raise GuardError("ends early")
        return deepest

    def integer(self) -> None:
        """A variable-length signed integer: the sign stands in the first byte, before 6 bits."""
        byte = self.byte()
        value, shift = byte & 0x3F, 6
        more = byte >= 0x80
        while more:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            more = byte >= 0x80
            if value > _MAX_INTEGER or shift > 62 or not (more or byte):
                raise GuardError("an integer beyond 53 bits, or with zeros in front")

    # -- deletions --------------------------------------------------------------------------------------------

    def deletions(self) -> list[tuple[int, int]]:
        clients = self.uint()
        if clients == 0:
            return []
        if clients != 1:
            raise GuardError(f"deletions of {clients} clients")
        self.own_client("deletions")
        count = self.count(2)
        if not 0 < count <= defaults.MAX_DELETED_RANGES:
            raise GuardError(f"{count} ranges are deleted, 1 to {defaults.MAX_DELETED_RANGES} allowed")
        found: list[tuple[int, int]] = []
        end = -1
        for _ in range(count):
            clock, length = self.uint(), self.length()
            if clock <= end:
                raise GuardError("deleted ranges that overlap, touch or descend")
            end = clock + length
            found.append((clock, length))
        return found
