"""Envelopes on disk: SQLite in WAL mode, a checksum per row; damage is found, set aside and told.

What belongs to others comes back from peers by anti-entropy, so a damaged row is simply left out, and a damaged file is
replaced by a new one with all that could be read from it. What belongs to us is protected by :mod:`.marks`.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import attrs

from ...transport.errors import ConfigError, DecodeError
from ...transport.identity import PeerId
from ...transport.wire import pack, unpack
from . import defaults
from .envelope import MAX_INCARNATION, Envelope, Evidence
from .marks import Marks

T = TypeVar("T")

#: Of the tables; another one is refused, as we cannot know what it means.
VERSION = 1

_SCHEMA = """
CREATE TABLE envelopes (
    document BLOB NOT NULL, author BLOB NOT NULL, incarnation INTEGER NOT NULL, counter INTEGER NOT NULL,
    data BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE UNIQUE INDEX place ON envelopes (document, author, incarnation, counter);
CREATE TABLE evidence (
    document BLOB NOT NULL, author BLOB NOT NULL, incarnation INTEGER NOT NULL, data BLOB NOT NULL,
    checksum BLOB NOT NULL, PRIMARY KEY (document, author));
CREATE TABLE reserved (
    document BLOB NOT NULL, author BLOB NOT NULL, incarnation INTEGER NOT NULL, PRIMARY KEY (document, author));
"""

_PUT = "INSERT OR REPLACE INTO envelopes VALUES (?, ?, ?, ?, ?, ?)"
_PUT_EVIDENCE = "INSERT OR REPLACE INTO evidence VALUES (?, ?, ?, ?, ?)"
_REPLACED = (
    "DELETE FROM envelopes WHERE document = ? AND author = ? AND (incarnation < ? OR incarnation = ? AND counter < ?)"
)


@attrs.frozen
class Loaded:
    """What the store holds of one document: for :meth:`Replica.load`.

    ``own``: the author that may go on with its chain, as nothing of it is missing; None: it begins anew.
    """

    envelopes: tuple[Envelope, ...]
    evidence: tuple[Evidence, ...]
    own: PeerId | None


class _Damaged(Exception):
    """The database file is not what was written."""


class DocumentStore:
    """All documents of one node. Every method blocks: call it through ``host.run_blocking``; any thread may.

    ``path``: the database file; None: in memory. Raises :class:`ConfigError` when the file cannot be used: no room, no
    right to write, another process, a newer version. ``notices``: what was damaged and what was done about it, for the
    log; take them out.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.notices: list[str] = []
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        with self._explained():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._marks = Marks(None if path is None else path.with_name(path.name + ".marks"))
            if self._marks.damaged:
                self.notices.append(f"{path}.marks was damaged: what we write begins a fresh incarnation")
            try:
                self._db = self._open(path)
            except _Damaged as damage:
                self._set_aside(str(damage))

    def close(self) -> None:
        """Write the log into the database, and let go of it. Later calls fail."""
        with self._lock, self._explained():
            if self._db is not None:
                db, self._db = self._db, None
                try:
                    with suppress(sqlite3.DatabaseError):  # on a full disk the log stays, and is as good
                        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    db.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def load(self, document: bytes, own: PeerId) -> Loaded:
        """All that is held of ``document``, by author, incarnation and counter. Damaged rows are dropped and told."""
        return self._do(lambda db: self._load(db, document, own))

    def _load(self, db: sqlite3.Connection, document: bytes, own: PeerId) -> Loaded:
        envelopes: list[Envelope] = []
        damaged: list[int] = []
        # Not by the index: it could be the damaged part.
        rows = db.execute("SELECT rowid, * FROM envelopes NOT INDEXED WHERE document = ?", (document,))
        for rowid, *row in rows:
            envelope = _envelope(row)
            if envelope is None:
                damaged.append(rowid)
            else:
                envelopes.append(envelope)
        evidence: list[Evidence] = []
        for _, author, incarnation, data, checksum in db.execute(
            "SELECT * FROM evidence WHERE document = ?", (document,)
        ):
            proof = _evidence((document, author, incarnation, data, checksum))
            if proof is not None:
                evidence.append(proof)
        if damaged:
            self.notices.append(f"{len(damaged)} damaged envelopes in {self.path} were dropped; peers have them")
            with self._transaction(db):
                db.executemany("DELETE FROM envelopes WHERE rowid = ?", [(rowid,) for rowid in damaged])
        envelopes.sort(key=lambda envelope: (envelope.author.key, *envelope.place))
        evidence.sort(key=lambda proof: proof.author.key)
        whole = self._is_whole(document, own, envelopes)
        return Loaded(tuple(envelopes), tuple(evidence), own if whole else None)

    def _is_whole(self, document: bytes, own: PeerId, envelopes: list[Envelope]) -> bool:
        """Whether the last envelopes of ``own`` are here, so that it may go on."""
        mine = [envelope.place for envelope in envelopes if envelope.author == own]
        mark = self._marks.get(document, own)
        if not mine or mark is None or self._marks.damaged:
            return False
        incarnation, last = mine[-1]
        counters = [counter for number, counter in mine if number == incarnation]
        return counters == list(range(counters[0], last + 1)) and (incarnation, last + 1) >= mark

    # -- writing ------------------------------------------------------------------------------------------------------

    def append(self, envelopes: Iterable[Envelope], own: PeerId | None = None) -> None:
        """Durable on return, all or none. What a snapshot or a newer incarnation replaces goes in the same transaction.

        ``own``: these are ours, and go out next: they are noted in the second place as well.
        """
        kept = list(envelopes)

        def put(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                for envelope in kept:
                    document, author, (incarnation, counter) = envelope.document, envelope.author.key, envelope.place
                    data = pack(envelope)
                    row = (document, author, incarnation, counter, data)
                    db.execute(_PUT, (*row, _checksum(*row)))
                    if envelope.snapshot or counter == 0:
                        db.execute(_REPLACED, (document, author, incarnation, incarnation, counter))
                        db.execute(
                            "DELETE FROM evidence WHERE document = ? AND author = ? AND incarnation < ?",
                            (document, author, incarnation),
                        )

        self._do(put)
        if own is not None:
            with self._lock, self._explained():
                for envelope in kept:
                    self._marks.put(envelope.document, own, envelope.incarnation, envelope.counter + 1)

    def accuse(self, evidence: Evidence) -> None:
        """Keep the proof instead of all that its author wrote up to that incarnation."""
        document, author, incarnation = evidence.first.document, evidence.author.key, evidence.incarnation
        row = (document, author, incarnation, pack(evidence))

        def put(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                db.execute(_REPLACED, (document, author, incarnation + 1, 0, 0))
                db.execute(_PUT_EVIDENCE, (*row, _checksum(*row)))

        self._do(put)

    def remove(self, document: bytes, authors: Iterable[PeerId]) -> None:
        """Forget all that ``authors`` wrote in ``document``."""
        places = [(document, author.key) for author in authors]

        def delete(db: sqlite3.Connection) -> None:
            with self._transaction(db):
                db.executemany("DELETE FROM envelopes WHERE document = ? AND author = ?", places)
                db.executemany("DELETE FROM evidence WHERE document = ? AND author = ?", places)

        self._do(delete)

    def reserve(self, document: bytes, author: PeerId, wall: float) -> int:
        """An incarnation of ``author`` that was never used, durable on return in both places.

        It is above all that we know of, and at least ``wall`` (Unix seconds) in milliseconds: if both places are lost,
        it is still a new one.
        """

        def take(db: sqlite3.Connection) -> int:
            place = (document, author.key)
            known = [
                db.execute(f"SELECT max(incarnation) FROM {table} WHERE document = ? AND author = ?", place).fetchone()
                for table in ("envelopes", "evidence", "reserved")
            ]
            mark = self._marks.get(document, author) or (-1, 0)
            last = max(mark[0], *(row[0] if row[0] is not None else -1 for row in known))
            incarnation = min(max(last + 1, int(wall * 1000), 0), MAX_INCARNATION - 1)
            if incarnation <= last:
                raise ConfigError(f"{author.short} has used up its incarnations: it needs a new key")
            self._marks.put(document, author, incarnation, 0)
            with self._transaction(db):
                db.execute("INSERT OR REPLACE INTO reserved VALUES (?, ?, ?)", (*place, incarnation))
            return incarnation

        return self._do(take)

    def tidy(self) -> None:
        """Give back a bounded number of free pages, and bound the log. Milliseconds; call it every few minutes."""

        def vacuum(db: sqlite3.Connection) -> None:
            # `execute` would take one step of it, and give back one page.
            db.executescript(f"PRAGMA incremental_vacuum({defaults.VACUUM_PAGES})")
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

        self._do(vacuum)

    # -- the file -----------------------------------------------------------------------------------------------------

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work``; once more on a fresh database when the file turns out to be damaged."""
        with self._lock, self._explained():
            if self._db is None:
                raise ConfigError(f"the document store {self.path} is closed")
            try:
                return work(self._db)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _is_damage(error):
                    raise
                self._set_aside(str(error))
            return work(self._db)

    def _open(self, path: Path | None) -> sqlite3.Connection:
        """Raises :class:`_Damaged`."""
        db = sqlite3.connect(
            ":memory:" if path is None else path, isolation_level=None, check_same_thread=False, timeout=1.0
        )
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {defaults.MAX_LOG}")
            db.execute(f"PRAGMA cache_size = -{defaults.CACHE_KIB}")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables == 0 and version == 0:
                if path is not None and len(self._marks) and not path.with_name(path.name + ".damaged-1").exists():
                    self.notices.append(f"{path} was lost or emptied: peers have what was in it")
                with self._transaction(db):
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {VERSION}")
            elif VERSION < version < 100:  # more is no version, but damage
                raise ConfigError(f"{path} was written by a newer Shoal (version {version}, we know {VERSION})")
            elif path is not None:
                found = [text for (text,) in db.execute("PRAGMA integrity_check(3)")]
                if found != ["ok"] or version != VERSION:
                    raise _Damaged("; ".join(found) if found != ["ok"] else f"it says that it is of version {version}")
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            db.close()
            if _is_damage(error):
                raise _Damaged(str(error)) from None
            raise
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, why: str) -> None:
        """Keep the damaged file under another name, and go on with a new one that holds what could be read from it."""
        if self._db is not None:
            self._db.close()
            self._db = None
        assert self.path is not None, f"a database in memory is damaged: {why}"
        aside = self._rename(self.path)
        try:
            self._db = self._open(self.path)
        except _Damaged as again:
            raise ConfigError(f"cannot make {self.path} anew: {again}") from None
        saved = self._salvage(aside, self._db)
        self.notices.append(
            f"{self.path} was damaged ({why}). It is kept as {aside.name}; {saved} envelopes could be read from it, "
            "what is missing comes back from peers"
        )

    def _rename(self, path: Path) -> Path:
        """Move the database and its log to the next free name; the oldest of those kept go."""
        numbers = sorted(
            int(old.suffix.removeprefix(".damaged-"))
            for old in path.parent.glob(path.name + ".damaged-*")
            if old.suffix.removeprefix(".damaged-").isdecimal()
        )
        for number in numbers[: max(0, len(numbers) + 1 - defaults.MAX_SET_ASIDE)]:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(f"{path.name}.damaged-{number}{suffix}").unlink(missing_ok=True)
        aside = path.with_name(f"{path.name}.damaged-{numbers[-1] + 1 if numbers else 1}")
        for suffix in ("", "-wal"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        return aside

    def _salvage(self, aside: Path, db: sqlite3.Connection) -> int:
        """Copy every row of ``aside`` that is whole."""
        saved = 0
        old = sqlite3.connect(aside, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            with self._transaction(db):
                for row in _readable(old, "envelopes"):
                    if _envelope(row) is not None:
                        db.execute(_PUT, tuple(row))
                        saved += 1
                for row in _readable(old, "evidence"):
                    if _evidence(row) is not None:
                        db.execute(_PUT_EVIDENCE, tuple(row))
                for document, author, incarnation in _readable(old, "reserved"):
                    if isinstance(document, bytes) and isinstance(author, bytes) and isinstance(incarnation, int):
                        db.execute("INSERT OR REPLACE INTO reserved VALUES (?, ?, ?)", (document, author, incarnation))
        finally:
            old.close()
        return saved

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what a user can do about errors of the disk."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            hint = {
                sqlite3.SQLITE_FULL: "the disk is full; free some space",
                sqlite3.SQLITE_READONLY: "the file or its folder cannot be written; check who owns it",
                sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check that its folder exists and can be written",
                sqlite3.SQLITE_BUSY: "another process uses it; one node per folder",
                sqlite3.SQLITE_LOCKED: "another process uses it; one node per folder",
            }.get(code, str(error))
            raise ConfigError(f"cannot use the document store {self.path}: {hint}") from error
        except OSError as error:
            raise ConfigError(f"cannot use the document store {self.path}: {error.strerror}") from error


#: Our statements are right: when SQLite finds fault with one, or with a text, it is the schema that was damaged.
_DAMAGE = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_CONSTRAINT,
)


def _is_damage(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _checksum(document: bytes, author: bytes, *rest: int | bytes) -> bytes:
    """Over the columns of a row; their lengths are fixed but the last one's."""
    numbers = b"".join(part.to_bytes(8, "big") if isinstance(part, int) else part for part in rest)
    return hashlib.blake2b(document + author + numbers, digest_size=16, person=b"shoal doc row").digest()


def _envelope(row: list[object]) -> Envelope | None:
    """The envelope of a row of ``envelopes``, None when the row is damaged."""
    match row:
        case [bytes(document), bytes(author), int(incarnation), int(counter), bytes(data), bytes(checksum)]:
            if incarnation < 0 or counter < 0:
                return None
            if checksum != _checksum(document, author, incarnation, counter, data):
                return None
            try:
                envelope = unpack(Envelope, data)
            except DecodeError:
                return None
            same = (envelope.document, envelope.author.key, *envelope.place) == (document, author, incarnation, counter)
            return envelope if same else None
        case _:
            return None


def _evidence(row: Iterable[object]) -> Evidence | None:
    """The proof of a row of ``evidence``, None when the row is damaged."""
    match list(row):
        case [bytes(document), bytes(author), int(incarnation), bytes(data), bytes(checksum)]:
            if incarnation < 0 or checksum != _checksum(document, author, incarnation, data):
                return None
            try:
                return unpack(Evidence, data)
            except DecodeError:
                return None
        case _:
            return None


def _readable(db: sqlite3.Connection, table: str) -> Iterator[list[object]]:
    """Every row of ``table`` that SQLite can still find: a damaged page hides those on it, not those after it."""
    after, missing = 0, 0
    while missing < defaults.MAX_MISSING_ROWS:
        try:
            rows = db.execute(f"SELECT rowid, * FROM {table} NOT INDEXED WHERE rowid > ? LIMIT 1", (after,)).fetchall()
        except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError):
            after, missing = after + 1, missing + 1
            continue
        if not rows:
            return
        if rows[0][0] <= after:  # a damaged tree can lead back to where we have been
            after, missing = after + 1, missing + 1
            continue
        missing, after = 0, rows[0][0]
        yield list(rows[0][1:])
