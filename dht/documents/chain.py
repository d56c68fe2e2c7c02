"""One author's envelopes of one incarnation, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from ...transport.identity import PeerId
from . import defaults
from .envelope import Envelope, client_id
from .guard import Guard
from .guard_decoder import ARRAY, MAP, TEXT

if TYPE_CHECKING:
    import pycrdt

# pycrdt is imported where it is used: a node without an open document does without it.


@attrs.define(eq=False)
class Chain:
    """Envelopes ``first`` to ``next`` - 1, at least one. The first is number 0 or a snapshot; all passed the guard."""

    author: PeerId
    document: bytes
    incarnation: int
    envelopes: list[Envelope]
    #: Bytes of all updates.
    size: int
    #: Unix seconds: when the first of them expires, and the chain with it, as the later ones mean nothing without it.
    expires: float
    _guard: Guard | None
    _view: dict[str, Any] | None = None

    @classmethod
    def begin(cls, envelope: Envelope) -> Chain:
        """Raises :class:`GuardError`. ``envelope`` is number 0 or a snapshot, and has been checked."""
        guard = Guard(client_id(envelope.author, envelope.document, envelope.incarnation))
        guard.admit(envelope.update)
        return cls(
            envelope.author,
            envelope.document,
            envelope.incarnation,
            [envelope],
            len(envelope.update),
            envelope.expires,
            guard,
        )

    @property
    def first(self) -> int:
        return self.envelopes[0].counter

    @property
    def next(self) -> int:
        return self.envelopes[0].counter + len(self.envelopes)

    @property
    def head(self) -> bytes:
        return self.envelopes[-1].id

    @property
    def worn(self) -> bool:
        """Whether it begins with so large a snapshot that its author should write it anew, without what was deleted."""
        return self.first > 0 and len(self.envelopes[0].update) > defaults.FRESH_BYTES

    def at(self, counter: int) -> Envelope | None:
        index = counter - self.first
        return self.envelopes[index] if 0 <= index < len(self.envelopes) else None

    def append(self, envelope: Envelope) -> None:
        """Raises :class:`GuardError`, and is as before then. ``envelope`` is the next one and names our head."""
        guard, self._guard = self.guard(), None  # a guard that refuses is spoiled, and made anew when it is needed
        guard.admit(envelope.update)
        self._guard = guard
        self.envelopes.append(envelope)
        self.size += len(envelope.update)
        self.expires = min(self.expires, envelope.expires)
        self._view = None

    def guard(self) -> Guard:
        if self._guard is None:
            self._guard = self.replayed()
        return self._guard

    def replayed(self) -> Guard:
        """A fresh guard that has seen all that is here."""
        guard = Guard(client_id(self.author, self.document, self.incarnation))
        for envelope in self.envelopes:
            guard.admit(envelope.update)
        return guard

    def rest(self) -> None:
        """Give back what can be made anew: the guard. A chain of 1,000 pieces has one of 200 kB."""
        self._guard = None

    def doc(self) -> pycrdt.Doc[Any]:
        """A new pycrdt document with all of it, whose next change is the author's next."""
        import pycrdt

        doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client_id(self.author, self.document, self.incarnation))
        for envelope in self.envelopes:
            doc.apply_update(envelope.update)
        for name, kind in self.guard().roots.items():
            doc.get(name, type=_types()[kind])
        return doc

    def view(self) -> dict[str, Any]:
        """Root types by name, as plain Python; empty ones are left out. Kept until something is appended."""
        if self._view is None:
            doc = self.doc()
            found = {name: plain(doc[name].to_py()) for name in sorted(self.guard().roots)}
            self._view = {name: value for name, value in found.items() if value}
        return self._view


def fresh(author: PeerId, document: bytes, incarnation: int, old: Chain | None) -> pycrdt.Doc[Any]:
    """A new document for ``incarnation``, with what ``old`` said written in it anew."""
    import pycrdt

    doc: pycrdt.Doc[Any] = pycrdt.Doc(client_id=client_id(author, document, incarnation))
    if old is not None:
        source = old.doc()
        with doc.transaction():
            for name in sorted(old.guard().roots):
                doc[name] = _copy(source[name])
    return doc


def changed(doc: pycrdt.Doc[Any], change: Callable[[pycrdt.Doc[Any]], None]) -> bytes | None:
    """Let ``change`` alter ``doc`` in one transaction; the update that it amounts to, None when it is nothing."""
    updates: list[bytes] = []
    subscription = doc.observe(lambda event: updates.append(event.update))
    try:
        with doc.transaction():
            change(doc)
    finally:
        doc.unobserve(subscription)
    return updates[0] if updates else None


def _types() -> dict[int, type[pycrdt.Array[Any]] | type[pycrdt.Map[Any]] | type[pycrdt.Text]]:
    import pycrdt

    return {ARRAY: pycrdt.Array, MAP: pycrdt.Map, TEXT: pycrdt.Text}


def _copy(value: Any) -> Any:
    """A shared type of another document, to be put into one of ours. At most MAX_NESTING deep."""
    import pycrdt

    match value:
        case pycrdt.Map():
            return pycrdt.Map({key: _copy(value[key]) for key in sorted(value.keys())})
        case pycrdt.Array():
            return pycrdt.Array([_copy(item) for item in value])
        case pycrdt.Text():
            return pycrdt.Text(str(value))
        case _:
            return plain(value)  # pycrdt gives bytearrays, and does not take them


def plain(value: Any) -> Any:
    """What pycrdt gives, in a form that is the same everywhere: keys sorted, bytes immutable, whole numbers integers.

    pycrdt forgets whether a number was an int or a float, and keeps objects in no order. At most MAX_NESTING deep.
    """
    match value:
        case float() if value.is_integer() and abs(value) < 1 << 63:
            return int(value)
        case dict():
            return {key: plain(value[key]) for key in sorted(value)}
        case list():
            return [plain(item) for item in value]
        case bytearray():
            return bytes(value)
        case _:
            return value


def compact(chain: Chain | None, doc: pycrdt.Doc[Any], update: bytes, wall: float, lifetime: float) -> bytes | None:
    """The snapshot of ``doc`` that its author should sign instead of ``update``, None when it is not time for one."""
    if chain is None:
        return None
    count, size = len(chain.envelopes) + 1, chain.size + len(update)
    must = count > defaults.COMPACT_ENVELOPES or size > defaults.MAX_AUTHOR_BYTES or len(update) > defaults.MAX_UPDATE
    old = chain.expires < wall + lifetime / 2
    if not (must or old or size > defaults.COMPACT_BYTES):
        return None
    snapshot = doc.get_update()
    return snapshot if must or old or len(snapshot) <= size / 2 else None
