"""Decides which updates of an author pycrdt is given: only those that continue what the author wrote before.

A document's part has one writer, and its updates are taken in the order in which they were written. So an honest one
has a simple form: clocks go on without a gap, and every item stands exactly between the two neighbours that it names
(deleted ones count), or replaces the last entry of its key. Here the lists are replayed, without their content, and
whatever does not fit is refused. Then pycrdt has nothing to resolve and nothing to wait for, what its state will be is
known beforehand, and its cost is linear. It would otherwise let anybody delete anything, take two contents for one
clock without noticing, compare each of 10,000 items with 10,000 others, and end the process on 20,000 nested arrays.

Which updates pass depends on nothing but the updates that passed before since the last snapshot: all replicas agree.
"""

from __future__ import annotations

import bisect

import attrs

from . import defaults
from .guard_decoder import ANY, ARRAY, DELETED, GC, MAP, STRING, TEXT, TYPE, GuardError, Struct, decode

#: What a sequence is called as long as only deleted content stands in it.
UNKNOWN = 3

_NAMES = {ARRAY: "an array", MAP: "a map", TEXT: "a text", UNKNOWN: "a sequence"}


@attrs.define(eq=False)
class _Type:
    """A shared type: a root, or inside an item. ``level``: 0 for a root."""

    level: int
    kind: int | None
    head: _Run | None = None
    #: Of a map: the last entry by key, deleted or not.
    tails: dict[str, _Run] = attrs.Factory(dict)


@attrs.define(eq=False)
class _Run:
    """Clocks ``start`` to ``end`` - 1, which follow one another in ``place`` too; None: they stand nowhere any more."""

    start: int
    end: int
    place: _Type | None
    key: str | None = None
    left: _Run | None = None
    right: _Run | None = None
    deleted: bool = False
    inner: _Type | None = None


class Guard:
    """What is known of one author's document. A guard that has refused something is of no use any more: replay anew."""

    def __init__(self, client: int) -> None:
        self.client = client
        #: The clock of whatever comes next.
        self.next = 0
        self._roots: dict[str, _Type] = {}
        self._starts: list[int] = []
        self._runs: list[_Run] = []
        self._pairs: set[int] = set()

    @property
    def roots(self) -> dict[str, int]:
        """Name → ARRAY, MAP or TEXT of every root type with content, in order of appearance."""
        return {name: root.kind for name, root in self._roots.items() if root.kind in (ARRAY, MAP, TEXT)}

    def deleted(self) -> list[tuple[int, int]]:
        """(clock, length) of all that is deleted: the delete set that pycrdt will have."""
        found: list[tuple[int, int]] = []
        for run in self._runs:
            if not (run.deleted or run.place is None):
                continue
            if found and sum(found[-1]) == run.start:
                found[-1] = (found[-1][0], found[-1][1] + run.end - run.start)
            else:
                found.append((run.start, run.end - run.start))
        return found

    def admit(self, data: bytes) -> None:
        """Take in an update that may be applied after those before. Raises :class:`GuardError`; see the class."""
        if len(data) > defaults.MAX_UPDATE:
            raise GuardError(f"an update of {len(data)} bytes, at most {defaults.MAX_UPDATE} allowed")
        update = decode(data, self.client)
        if update.structs and update.start != self.next:
            raise GuardError(f"begins at clock {update.start} where {self.next} is next")
        for struct in update.structs:
            if self.next + struct.length > defaults.MAX_CLOCK:
                raise GuardError(f"goes beyond clock {defaults.MAX_CLOCK}")
            if struct.kind == GC:
                self._add(_Run(self.next, self.next + struct.length, None, deleted=True))
            else:
                self._insert(struct)
            self.next += struct.length
            if len(self._runs) > defaults.MAX_RUNS:
                raise GuardError(f"more than {defaults.MAX_RUNS} pieces")
        for clock, length in update.deleted:
            if clock + length > self.next:
                raise GuardError(f"deletes clock {clock + length - 1}, and {self.next} is next")
            self._delete(clock, clock + length)

    # -- runs by clock ----------------------------------------------------------------------------------------

    def _add(self, run: _Run) -> None:
        last = self._runs[-1] if self._runs else None
        if run.place is None and last is not None and last.place is None:
            last.end = run.end
            return
        self._starts.append(run.start)
        self._runs.append(run)

    def _find(self, clock: int, what: str) -> tuple[int, _Run]:
        """Position and run of a clock that stands somewhere."""
        if clock >= self.next:
            raise GuardError(f"{what} at clock {clock}, and {self.next} is next")
        at = bisect.bisect_right(self._starts, clock) - 1
        run = self._runs[at]
        if run.place is None:
            raise GuardError(f"{what} at clock {clock}, which stands nowhere any more")
        return at, run

    def _cut(self, at: int, clock: int) -> _Run:
        """The run that begins at ``clock``, which lies in the run at position ``at``."""
        run = self._runs[at]
        if run.start == clock:
            return run
        if run.key is not None:
            raise GuardError("an entry that does not replace the last one of its key")
        if clock in self._pairs:
            raise GuardError(f"cuts a character in two at clock {clock}")
        rest = _Run(clock, run.end, run.place, run.key, run, run.right, run.deleted)
        if run.right is not None:
            run.right.left = rest
        run.right = rest
        run.end = clock
        self._starts.insert(at + 1, clock)
        self._runs.insert(at + 1, rest)
        return rest

    # -- items ------------------------------------------------------------------------------------------------

    def _insert(self, struct: Struct) -> None:
        left, right, place, key = self._neighbours(struct)
        if (key is not None) != struct.keyed:
            raise GuardError("an entry of a map that is none")
        self._check_content(struct, place, key)
        start, end = self.next, self.next + struct.length
        self._pairs.update(start + offset for offset in struct.pairs)
        deleted = struct.kind == DELETED
        plain = struct.kind != TYPE
        goes_on = key is None and left is not None and left.end == start and left.deleted == deleted
        if goes_on and plain and left is not None and left.inner is None:
            left.end = end  # most writing goes on where it stopped
            return
        run = _Run(start, end, place, key, left, right, deleted)
        if not plain:
            run.inner = _Type(place.level + 1, struct.detail)
        self._add(run)
        if key is not None:
            place.tails[key] = run
            if left is not None:
                self._remove(left)
                left.place = left.left = None  # nothing can name it any more
                run.left = None
            return
        if left is None:
            place.head = run
        else:
            left.right = run
        if right is not None:
            right.left = run

    def _neighbours(self, struct: Struct) -> tuple[_Run | None, _Run | None, _Type, str | None]:
        if struct.parent is not None:
            place = self._parent(struct.parent)
            if struct.key is not None and struct.key in place.tails:
                raise GuardError("an entry that ignores the one it replaces")
            if struct.key is None and place.head is not None:
                raise GuardError("an item that does not say beside which others it stands")
            return None, None, place, struct.key
        left = right = None
        if struct.right >= 0:
            right = self._cut(self._find(struct.right, "a right origin")[0], struct.right)
        if struct.origin >= 0:
            at, left = self._find(struct.origin, "an origin")
            if left.end > struct.origin + 1:
                self._cut(at, struct.origin + 1)
        one = left if left is not None else right
        assert one is not None and one.place is not None
        if one.key is not None:
            if right is not None or one.place.tails[one.key] is not one or one.end != struct.origin + 1:
                raise GuardError("an entry that does not replace the last one of its key")
            return left, None, one.place, one.key
        before, after = (None, right) if left is None else (left, left.right)
        if after is not right or (left is None and right is not one.place.head) or (right and right.left is not before):
            raise GuardError("an item that does not stand between the two it names")
        return left, right, one.place, None

    def _parent(self, parent: str | int) -> _Type:
        if isinstance(parent, str):
            root = self._roots.get(parent)
            if root is None:
                if len(self._roots) >= defaults.MAX_ROOTS:
                    raise GuardError(f"more than {defaults.MAX_ROOTS} root types")
                root = self._roots[parent] = _Type(0, None)
            return root
        _, run = self._find(parent, "a parent")
        if run.inner is None or run.deleted:
            raise GuardError(f"a parent at clock {parent}, which is no type, or deleted")
        return run.inner

    def _check_content(self, struct: Struct, place: _Type, key: str | None) -> None:
        kind = struct.kind
        if key is not None:
            wanted = MAP
        elif kind == DELETED:
            wanted = place.kind if place.kind in (ARRAY, TEXT) else UNKNOWN
        else:
            wanted = TEXT if kind == STRING else ARRAY
        if place.kind is None or (place.kind == UNKNOWN and wanted in (ARRAY, TEXT)):
            place.kind = wanted
        elif place.kind != wanted:
            raise GuardError(f"content of {_NAMES[wanted]} in {_NAMES[place.kind]}")
        if key is not None and (kind == STRING or (kind == ANY and struct.length != 1)):
            raise GuardError("an entry of a map that is not one value")
        level = place.level + (struct.detail if kind == ANY else 1)
        if level > defaults.MAX_NESTING:
            raise GuardError(f"nested deeper than {defaults.MAX_NESTING}")

    # -- deletion ---------------------------------------------------------------------------------------------

    def _delete(self, start: int, end: int) -> None:
        at = bisect.bisect_right(self._starts, start) - 1
        while at < len(self._runs) and self._runs[at].start < end:
            run = self._runs[at]
            if not run.deleted and run.place is not None:
                if run.start < start:
                    self._cut(at, start)
                    at += 1
                    run = self._runs[at]
                if run.end > end:
                    self._cut(at, end)
                self._remove(run)
            at += 1

    def _remove(self, run: _Run) -> None:
        """Delete ``run`` and, where it holds a type, all that is in it, at any depth."""
        run.deleted = True
        types = [run.inner] if run.inner is not None else []
        run.inner = None
        while types:
            each = types.pop()
            inside = list(each.tails.values())
            item = each.head
            while item is not None:
                inside.append(item)
                item = item.right
            for item in inside:
                item.deleted = True
                item.place = None
                item.left = item.right = None
                if item.inner is not None:
                    types.append(item.inner)
                    item.inner = None
            each.tails.clear()
            each.head = None
