"""Blobs that this machine keeps: an index in SQLite (WAL) and a file per blob; crash-safe, bounded, with eviction.

What counts as *had* is what the index says, and the index says it only after the bytes have reached the disk
(:meth:`Store.flush`). So a process that is killed at any moment loses no chunk that was acknowledged, and never
believes one that was not written. What an unreliable disk does to chunks later is found when they are read: each is
checked against its leaf, and one that fails is dropped from the index, to be fetched again.

Without a folder everything is in memory, with the same code.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from ...transport.errors import ConfigError, DecodeError, Overloaded, ProtocolMisuse
from ...transport.wire import pack, unpack
from . import defaults
from .bits import Bits
from .files import WHOLE, DiskFiles, Files, MemoryFiles, header, read_header
from .tree import Buffer, Outline, Part, Tree, leaf_hash, outline_fault, page_count, page_fault, tree_over

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blobs (
    id BLOB PRIMARY KEY, outline BLOB NOT NULL, start INTEGER NOT NULL, tag TEXT NOT NULL, note BLOB NOT NULL,
    pinned INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pages (
    id BLOB NOT NULL, page INTEGER NOT NULL, leaves BLOB NOT NULL, bits BLOB NOT NULL, PRIMARY KEY (id, page)
) WITHOUT ROWID;
"""


@attrs.frozen
class Entry:
    """A blob in the store. ``size``: bytes of its parts; ``had`` of ``chunks``; ``tag``, ``note``: its keeper's own."""

    id: bytes
    size: int
    chunks: int
    had: int
    pinned: bool
    tag: str
    note: bytes

    @property
    def complete(self) -> bool:
        return self.had == self.chunks


@attrs.define(eq=False)
class _Blob:
    tree: Tree
    start: int  # bytes of the file's header
    tag: str
    note: bytes
    pinned: bool
    used: int
    bits: Bits  # on disk for certain
    fresh: Bits  # written, not flushed yet
    holds: int = 0  # users that must not lose it

    @property
    def room(self) -> int:
        return self.start + self.tree.size


class Store:
    """See the module. All methods block and may be called from any thread.

    ``quota``: bytes that all blobs may take together. Raises :class:`ConfigError` when the folder cannot be used.
    """

    def __init__(self, folder: Path | None, quota: int = defaults.QUOTA) -> None:
        self.folder, self.quota = folder, quota
        self._lock = threading.RLock()
        self._blobs: dict[bytes, _Blob] = {}
        self._clock = 0
        #: Chunks that were found damaged when they were read.
        self.damaged = 0
        self._files: Files = MemoryFiles()
        if folder is None:
            self._db = self._connect(":memory:")
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
            self._files = DiskFiles(folder)
            self._db = self._open(folder / "index.sqlite")
        self._sweep()

    def _connect(self, name: str) -> sqlite3.Connection:
        db = sqlite3.connect(name, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            if db.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
                raise sqlite3.DatabaseError("its pages do not fit together")
            db.executescript(_SCHEMA)
            self._load(db)
        except BaseException:
            db.close()
            raise
        return db

    def _open(self, path: Path) -> sqlite3.Connection:
        empty = not path.exists() or path.stat().st_size == 0
        try:
            db = self._connect(str(path))
            if empty and not self._blobs and self._files.found():
                log.warning("%s is empty or gone: it is made anew from the blobs beside it", path)
                self._rebuild(db)
            return db
        except (sqlite3.OperationalError, PermissionError) as error:
            raise ConfigError(f"cannot use {path}: {error}") from None
        except (sqlite3.DatabaseError, DecodeError, ValueError, TypeError, ProtocolMisuse) as error:
            log.warning("%s is damaged (%s): it is made anew from the blobs beside it", path, error)
        aside = path.with_suffix(".damaged")
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True) if suffix else path.replace(aside)
        self._blobs.clear()
        db = self._connect(str(path))
        self._rebuild(db)
        return db

    def _load(self, db: sqlite3.Connection) -> None:
        for blob, outline_data, start, tag, note, pinned, used in db.execute(
            "SELECT id, outline, start, tag, note, pinned, used FROM blobs ORDER BY id"
        ):
            outline = unpack(Outline, outline_data)
            rows = db.execute("SELECT leaves, bits FROM pages WHERE id = ? ORDER BY page", (blob,)).fetchall()
            fault = outline_fault(outline)
            if not (isinstance(start, int) and isinstance(used, int) and isinstance(tag, str) and type(note) is bytes):
                raise ValueError(f"an entry of other types than were written for blob {bytes(blob).hex()[:16]}")
            if fault is None and (outline.root != blob or len(rows) != page_count(outline)):
                fault = "the outline of another blob"
            for number, (leaves, _) in enumerate(rows):
                fault = fault or page_fault(outline, number, leaves)
            if fault is not None:
                raise ValueError(f"blob {blob.hex()[:16]}: {fault}")
            tree = Tree(outline, b"".join(leaves for leaves, _ in rows), blob)
            bits = Bits.decode(b"".join(bits for _, bits in rows), len(tree))
            self._blobs[blob] = _Blob(tree, start, tag, note, bool(pinned), used, bits, Bits(len(tree)))
            self._clock = max(self._clock, used)

    def _sweep(self) -> None:
        """Files without an entry were being removed, or not begun; entries without a file lost it."""
        found = self._files.found()
        for blob in found:
            if blob not in self._blobs:
                self._files.remove(blob)
        for blob in list(self._blobs):
            if blob not in found:
                log.warning("the file of blob %s is gone", blob.hex()[:16])
                self._forget(blob)

    def _rebuild(self, db: sqlite3.Connection) -> None:
        """Whole files name themselves: their content must hash to their name."""
        for blob in self._files.found():
            path = Path(self._files.where(blob))
            kept = self._recognise(blob, path)
            if kept is not None:
                self._blobs[blob] = kept
                self._insert(db, kept)
            elif path.suffix == WHOLE:
                log.warning("%s does not hold what its name says: it is put aside", path)
                path.replace(path.with_suffix(".damaged"))

    def _recognise(self, blob: bytes, path: Path) -> _Blob | None:
        try:
            described, notes, at = read_header(path)
            start, parts, leaves = at, [], []
            for label, kind, size in described:
                parts.append(Part(label, kind, size))
                for offset in range(0, size, defaults.CHUNK):
                    length = min(defaults.CHUNK, size - offset)
                    leaves.append(leaf_hash(self._files.read(blob, at + offset, length)))
                at += size
            tree = tree_over(parts, leaves)
            note = bytes.fromhex(notes.get("shoal.note", ""))
        except (DecodeError, ProtocolMisuse, ValueError):
            return None
        if tree.id != blob:
            return None
        # Nobody knows any more which were pinned: better too many than too few.
        return _Blob(tree, start, notes.get("shoal.tag", ""), note, True, 0, Bits.full(len(tree)), Bits(len(tree)))

    def close(self) -> None:
        """Flush and let go of the files."""
        with self._lock:
            self.flush()
            self._db.close()

    def copy(self) -> Store:
        """Of a store in memory: what is acknowledged now, as after a crash. One on disk is its own copy."""
        if self.folder is not None:
            return self
        made = Store(None, self.quota)
        with self._lock:
            assert isinstance(self._files, MemoryFiles) and isinstance(made._files, MemoryFiles)
            self._db.backup(made._db)
            made._files.data = {blob: bytearray(data) for blob, data in self._files.data.items()}
        made._load(made._db)
        return made

    # -- what is there -----------------------------------------------------------------------------------------------

    def entries(self) -> tuple[Entry, ...]:
        """All blobs, the most recently used last."""
        with self._lock:
            found = sorted(self._blobs.items(), key=lambda item: (item[1].used, item[0]))
            return tuple(self._entry(blob, kept) for blob, kept in found)

    def entry(self, blob: bytes) -> Entry | None:
        with self._lock:
            kept = self._blobs.get(blob)
            return None if kept is None else self._entry(blob, kept)

    @staticmethod
    def _entry(blob: bytes, kept: _Blob) -> Entry:
        size, chunks = kept.tree.size, len(kept.tree)
        return Entry(blob, size, chunks, kept.bits.count, kept.pinned, kept.tag, kept.note)

    def tree(self, blob: bytes) -> Tree | None:
        with self._lock:
            kept = self._blobs.get(blob)
            return None if kept is None else kept.tree

    def bits(self, blob: bytes) -> Bits | None:
        """The chunks that are kept for certain; None for an unknown blob."""
        with self._lock:
            kept = self._blobs.get(blob)
            return None if kept is None else kept.bits.copy()

    def used(self) -> int:
        """Bytes that all blobs take, those still to come of partial ones included."""
        with self._lock:
            return sum(kept.room for kept in self._blobs.values())

    def path(self, blob: bytes) -> str:
        """Where the bytes are, for people."""
        return self._files.where(blob)

    def _known(self, blob: bytes) -> _Blob:
        kept = self._blobs.get(blob)
        if kept is None:
            raise ProtocolMisuse(f"blob {blob.hex()[:16]} is not in the store")
        return kept

    # -- writing -----------------------------------------------------------------------------------------------------

    def begin(self, tree: Tree, *, tag: str = "", note: bytes = b"", pinned: bool = False) -> None:
        """Make room for a blob, of which nothing is had yet; one that is there already stays as it is.

        Evicts the least recently used blobs that are neither pinned nor held if need be. Raises :class:`Overloaded`
        when that is not enough for the quota or the disk; nothing is evicted then.
        """
        if len(note) > defaults.MAX_NOTE:
            raise ProtocolMisuse(f"a note of {len(note)} bytes")
        with self._lock:
            if tree.id in self._blobs:
                self._use(self._blobs[tree.id])
                return
            notes = {"shoal.blob": tree.id.hex(), "shoal.tag": tag, "shoal.note": note.hex()}
            head = header(tree.outline, notes)
            self._make_room(tree, len(head) + tree.size)
            self._files.create(tree.id, head, len(head) + tree.size)
            kept = _Blob(tree, len(head), tag, note, pinned, 0, Bits(len(tree)), Bits(len(tree)))
            self._clock += 1
            kept.used = self._clock
            with self._transaction() as db:
                self._insert(db, kept)
            self._blobs[tree.id] = kept

    def _insert(self, db: sqlite3.Connection, kept: _Blob) -> None:
        tree = kept.tree
        db.execute(
            "INSERT INTO blobs VALUES (?, ?, ?, ?, ?, ?, ?)",
            (tree.id, pack(tree.outline), kept.start, kept.tag, kept.note, int(kept.pinned), kept.used),
        )
        for page in range(page_count(tree.outline)):
            row = (tree.id, page, tree.page(page), _page_bits(kept.bits, page))
            db.execute("INSERT INTO pages VALUES (?, ?, ?, ?)", row)

    def _make_room(self, tree: Tree, size: int) -> None:
        taken = sum(kept.room for kept in self._blobs.values())
        evictable = [k for k in sorted(self._blobs.values(), key=lambda k: k.used) if not k.pinned and not k.holds]
        name, place = f"blob {tree.id.hex()[:16]} of {size:,} bytes", self.folder or "memory"
        fixed = taken - sum(kept.room for kept in evictable)
        if fixed + size > self.quota:
            raise Overloaded(
                f"no room for {name} in {place}: the quota is {self.quota:,} bytes, of which {fixed:,} are pinned or "
                "in use; unpin or remove something, or raise the quota"
            )
        free = self._files.free()
        if free + (taken - fixed) < size + defaults.KEEP_FREE:
            raise Overloaded(f"no room for {name} in {place}: the disk has only {free:,} bytes free")
        for kept in evictable:
            if taken + size <= self.quota and free >= size + defaults.KEEP_FREE:
                break
            log.info("blob %s gives way to %s", kept.tree.id.hex()[:16], name)
            self._forget(kept.tree.id)
            taken, free = taken - kept.room, free + kept.room

    def write(self, blob: bytes, index: int, data: Buffer) -> bool:
        """Check and write one chunk; False when it is not the blob's. It counts as kept after :meth:`flush`."""
        with self._lock:
            kept = self._known(blob)
        if not kept.tree.verify(index, data):
            return False
        place = kept.tree.place(index)
        self._files.write(blob, kept.start + place.start, data)
        with self._lock:
            if self._blobs.get(blob) is kept:
                kept.fresh.add(index)
        return True

    def put(
        self, tree: Tree, parts: Sequence[Buffer], *, tag: str = "", note: bytes = b"", pinned: bool = False
    ) -> None:
        """Keep a whole blob, of which ``tree`` was built. On return it survives a crash. Raises as :meth:`begin`."""
        with self._lock:
            self.begin(tree, tag=tag, note=note, pinned=pinned)
            kept = self._known(tree.id)
            if kept.bits.complete:
                return
            kept.holds += 1
        try:
            at = kept.start
            for data in parts:
                view = memoryview(data)
                for begin in range(0, len(view), defaults.FLUSH_BYTES):
                    piece = view[begin : begin + defaults.FLUSH_BYTES]
                    self._files.write(tree.id, at + begin, piece)
                at += len(view)
            with self._lock:
                kept.fresh = Bits.full(len(tree))
            self.flush(tree.id)
        finally:
            self.release(tree.id)

    def flush(self, blob: bytes | None = None) -> None:
        """Acknowledge what was written, of one blob or of all: bytes first, then the index."""
        with self._lock:
            chosen = [blob] if blob is not None else list(self._blobs)
        for name in chosen:
            with self._lock:
                kept = self._blobs.get(name)
                if kept is None or (not kept.fresh.count and len(kept.tree)):
                    continue
                fresh, kept.fresh = kept.fresh, Bits(len(kept.tree))
            try:
                self._files.sync(name)
                with self._lock:
                    self._acknowledge(name, kept, fresh)
            except BaseException:
                with self._lock:
                    for index in fresh:
                        kept.fresh.add(index)
                raise

    def _acknowledge(self, blob: bytes, kept: _Blob, fresh: Bits) -> None:
        if self._blobs.get(blob) is not kept:
            return
        before = kept.bits.copy()
        pages: dict[int, None] = {}
        for index in fresh:
            kept.bits.add(index)
            pages[index // defaults.PAGE] = None
        try:
            self._save_bits(kept, list(pages))
        except BaseException:
            kept.bits = before
            raise
        if kept.bits.complete:
            self._files.rename(blob, True)

    def _save_bits(self, kept: _Blob, pages: Sequence[int]) -> None:
        with self._transaction() as db:
            for page in pages:
                row = (_page_bits(kept.bits, page), kept.tree.id, page)
                db.execute("UPDATE pages SET bits = ? WHERE id = ? AND page = ?", row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise ConfigError(f"cannot write {self.folder or 'the index in memory'}/index.sqlite: {error}") from error

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, blob: bytes, index: int) -> bytearray | None:
        """One chunk, checked; None when it is not had. One that is damaged is dropped from the index, and counted."""
        with self._lock:
            kept = self._blobs.get(blob)
            if kept is None or index not in kept.bits:
                return None
            self._use(kept)
        place = kept.tree.place(index)
        data = self._files.read(blob, kept.start + place.start, place.size)
        if kept.tree.verify(index, data):
            return data
        with self._lock:
            if self._blobs.get(blob) is kept and index in kept.bits:
                log.warning("chunk %d of %s is damaged on disk: it is dropped", index, self._files.where(blob))
                self.damaged += 1
                kept.bits.discard(index)
                self._save_bits(kept, [index // defaults.PAGE])
                self._files.rename(blob, False)
        return None

    def read_part(self, blob: bytes, number: int, out: memoryview) -> bool:
        """Fill ``out`` with a whole part, each chunk checked. False when one is not had, or damaged."""
        tree = self.tree(blob)
        if tree is None:
            return False
        for index in tree.chunks_of(number):
            data, place = self.read(blob, index), tree.place(index)
            if data is None:
                return False
            out[place.offset : place.offset + place.size] = data
        return True

    def _use(self, kept: _Blob) -> None:
        # Saved with the next change: after a crash a few blobs look as if they had not been used lately.
        if kept.used != self._clock:
            self._clock += 1
            kept.used = self._clock

    # -- keeping -----------------------------------------------------------------------------------------------------

    def pin(self, blob: bytes, pinned: bool = True) -> None:
        """A pinned blob is never evicted."""
        with self._lock:
            kept = self._known(blob)
            with self._transaction() as db:
                db.execute("UPDATE blobs SET pinned = ?, used = ? WHERE id = ?", (int(pinned), kept.used, blob))
            kept.pinned = pinned

    def hold(self, blob: bytes) -> None:
        """It is in use: not evicted until as many calls of :meth:`release`."""
        with self._lock:
            self._known(blob).holds += 1

    def release(self, blob: bytes) -> None:
        with self._lock:
            if blob in self._blobs:
                self._blobs[blob].holds -= 1

    def remove(self, blob: bytes) -> bool:
        """Delete a blob. False, and nothing happens, while somebody holds it."""
        with self._lock:
            kept = self._blobs.get(blob)
            if kept is None or kept.holds:
                return kept is None
            self._forget(blob)
            return True

    def _forget(self, blob: bytes) -> None:
        # The index first: a file without an entry is swept away, an entry without a file would be a lie.
        with self._transaction() as db:
            db.execute("DELETE FROM blobs WHERE id = ?", (blob,))
            db.execute("DELETE FROM pages WHERE id = ?", (blob,))
        self._blobs.pop(blob, None)
        self._files.remove(blob)


def _page_bits(bits: Bits, page: int) -> bytes:
    width = defaults.PAGE // 8
    return bits.encode()[width * page : width * (page + 1)]
