"""Envelopes on disk: SQLite in WAL mode, a checksum per row, damage found, set aside and told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import attrs

from ...transport.identity import PeerId
from .envelope import Envelope, Evidence


@attrs.frozen
class Loaded:
    """What the store holds of one document: for :meth:`Replica.load`."""

    envelopes: tuple[Envelope, ...]
    evidence: tuple[Evidence, ...]
    #: Whether ``own`` envelopes may be continued; otherwise its author begins a fresh incarnation.
    whole: bool


class DocumentStore:
    """All documents of one node. Every method blocks: call it through ``host.run_blocking``. ``path`` None: memory.

    ``notices``: what was damaged and what was done about it, for the log.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notices: list[str] = []

    def load(self, document: bytes, own: PeerId) -> Loaded:
        raise NotImplementedError

    def append(self, envelopes: Iterable[Envelope], own: PeerId | None = None) -> None:
        """Durable on return. A snapshot or a newer incarnation deletes what it replaces, in the same transaction."""
        raise NotImplementedError

    def accuse(self, evidence: Evidence) -> None:
        """Keep the proof, drop what it freezes."""
        raise NotImplementedError

    def remove(self, document: bytes, authors: Iterable[PeerId]) -> None:
        raise NotImplementedError

    def reserve(self, document: bytes, author: PeerId, wall: float) -> int:
        """An incarnation that was never used, durable on return: the larger of the last one plus one and ``wall`` in ms."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Give back a bounded number of free pages; cheap, call it every few minutes."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
