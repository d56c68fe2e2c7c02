"""How far we have written, noted beside the database: losing either never makes us contradict ourselves.

SQLite takes a log that was cut off for one that ends there: what was acknowledged can be gone without an error. Of
other authors that is no harm, peers have it. But an author that has lost its last envelopes and goes on would sign a
second history. So every envelope of our own is noted here once it is in the database, before it is shown to anybody.
When the database holds less than is noted, the author begins a fresh incarnation.

The file is a sequence of records, each with a checksum: document, author, incarnation, counter of the next envelope.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from ...transport.identity import PeerId
from ..durable import sync_folder
from . import defaults

_RECORD = struct.Struct(">32s32sQQ16s")


class Marks:
    """Kept in ``path``; None: in memory. Every method blocks; OSErrors are the caller's to explain.

    ``damaged``: records were unreadable, so that nothing noted here can be relied on as being the last word.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._marks: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        self._size = 0
        self._rewrite = False
        self.damaged = False
        if path is not None and path.exists():
            self._read(path.read_bytes())

    def __len__(self) -> int:
        return len(self._marks)

    def get(self, document: bytes, author: PeerId) -> tuple[int, int] | None:
        """(incarnation, next counter) of the furthest mark."""
        return self._marks.get((document, author.key))

    def put(self, document: bytes, author: PeerId, incarnation: int, next: int) -> None:
        """On return the mark survives a crash. A mark only ever rises."""
        place, mark = (document, author.key), (incarnation, next)
        if mark <= self._marks.get(place, (-1, -1)):
            return
        self._marks[place] = mark
        if self._path is None:
            return
        if self._rewrite or self._size + _RECORD.size > defaults.MAX_MARKS:
            self._write_anew(self._path)
            return
        self._rewrite = True  # until this one is whole, what stands behind the records is unknown
        with self._path.open("ab") as file:
            file.write(self._packed(place))
            file.flush()
            os.fsync(file.fileno())
        if self._size == 0:
            sync_folder(self._path.parent)
        self._size += _RECORD.size
        self._rewrite = False

    def _packed(self, place: tuple[bytes, bytes]) -> bytes:
        document, author = place
        incarnation, next = self._marks[place]
        body = _RECORD.pack(document, author, incarnation, next, bytes(16))[:-16]
        return body + _checksum(body)

    def _read(self, data: bytes) -> None:
        whole = len(data) - len(data) % _RECORD.size
        self._size = whole
        self._rewrite = whole != len(data)  # a record whose writing was cut short was never relied on
        for at in range(0, whole, _RECORD.size):
            document, author, incarnation, next, checksum = _RECORD.unpack_from(data, at)
            if checksum != _checksum(data[at : at + _RECORD.size - 16]):
                self.damaged = self._rewrite = True
                continue
            place = document, author
            self._marks[place] = max((incarnation, next), self._marks.get(place, (-1, -1)))

    def _write_anew(self, path: Path) -> None:
        draft = path.with_name(path.name + ".new")
        with draft.open("wb") as file:
            for place in self._marks:
                file.write(self._packed(place))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
        self._size = len(self._marks) * _RECORD.size
        self._rewrite = False


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16, person=b"shoal doc mark").digest()
