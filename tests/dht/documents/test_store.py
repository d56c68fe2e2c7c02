"""What is appended is there after a restart, what is replaced is not, and a disk that fails is explained."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from shoal.dht.documents import defaults
from shoal.dht.documents.envelope import Envelope, Evidence
from shoal.dht.documents.marks import Marks
from shoal.dht.documents.store import DocumentStore
from shoal.transport.errors import ConfigError
from shoal.transport.wire import pack

from .swarm import IDS, SPEC, WALL, Writer, put, replica, signed

ME = IDS[0].peer_id


def chain(length: int, author: int = 0, **fields: int) -> list[Envelope]:
    made = [signed(IDS[author], b"\0\0", 0, **fields)]
    for counter in range(1, length):
        made.append(signed(IDS[author], b"\0\0", counter, made[-1].id, **fields))
    return made


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DocumentStore:
    return DocumentStore(tmp_path / "documents.sqlite" if request.param == "file" else None)


def test_envelopes_come_back_as_their_very_bytes_in_order(store: DocumentStore) -> None:
    made = [*chain(3), *chain(2, 1)]
    store.append(made[::-1])
    loaded = store.load(SPEC.id, ME)
    assert sorted(map(pack, loaded.envelopes)) == sorted(map(pack, made))
    places = [(envelope.author, *envelope.place) for envelope in loaded.envelopes]
    assert places == sorted(places)
    assert store.load(bytes(32), ME).envelopes == ()


def test_a_snapshot_takes_the_place_of_what_was_before(store: DocumentStore) -> None:
    first = chain(3)
    snapshot = signed(IDS[0], b"\0\0", 7, bytes(31) + b"\1", snapshot=True)
    store.append([*first, *chain(2, 1)])
    store.append([snapshot])
    assert [e.counter for e in store.load(SPEC.id, ME).envelopes if e.author == ME] == [7]
    store.append(chain(1, incarnation=2))
    assert [e.place for e in store.load(SPEC.id, ME).envelopes if e.author == ME] == [(2, 0)]
    assert len(store.load(SPEC.id, ME).envelopes) == 3


def test_evidence_takes_the_place_of_what_it_voids(store: DocumentStore) -> None:
    proof = Evidence.of(chain(1)[0].header, signed(IDS[0], b"\0\0", 0, expires=WALL + 5).header)
    store.append(chain(3))
    store.accuse(proof)
    loaded = store.load(SPEC.id, ME)
    assert loaded.envelopes == () and loaded.evidence == (proof,)
    store.append(chain(2, incarnation=2))
    loaded = store.load(SPEC.id, ME)
    assert len(loaded.envelopes) == 2 and loaded.evidence == ()


def test_what_expired_or_was_banned_is_removed(store: DocumentStore) -> None:
    store.append([*chain(3), *chain(2, 1)])
    store.remove(SPEC.id, [ME])
    assert [envelope.author for envelope in store.load(SPEC.id, ME).envelopes] == [IDS[1].peer_id] * 2


def test_an_incarnation_is_never_given_twice(store: DocumentStore) -> None:
    given = [store.reserve(SPEC.id, ME, wall) for wall in (5.0, 5.0, 1.0, 7.0, 0.0, -3.0)]
    assert given == [5000, 5001, 5002, 7000, 7001, 7002]
    store.append(chain(1, incarnation=9000))
    assert store.reserve(SPEC.id, ME, 0.0) == 9001
    assert store.reserve(bytes(32), ME, 0.0) == 0
    store.append(chain(1, incarnation=(1 << 63) - 1))
    with pytest.raises(ConfigError, match="used up its incarnations"):
        store.reserve(SPEC.id, ME, 0.0)


@pytest.mark.parametrize("lost", ["documents.sqlite", "documents.sqlite.marks"])
def test_a_reservation_survives_in_either_place(tmp_path: Path, lost: str) -> None:
    store = DocumentStore(tmp_path / "documents.sqlite")
    first = store.reserve(SPEC.id, ME, WALL)
    store.close()
    (tmp_path / lost).unlink()
    assert DocumentStore(tmp_path / "documents.sqlite").reserve(SPEC.id, ME, WALL) == first + 1


def test_an_author_goes_on_with_its_chain_only_when_nothing_of_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    store = DocumentStore(path)
    made = chain(4)
    store.append(made[:2], ME)
    store.append(made[2:], ME)
    store.append(chain(2, 1))
    store.close()
    store = DocumentStore(path)
    assert store.load(SPEC.id, ME).own == ME
    assert store.load(SPEC.id, IDS[1].peer_id).own is None  # we never wrote as that one
    store.close()
    db = sqlite3.connect(path)
    db.execute("DELETE FROM envelopes WHERE author = ? AND counter = 3", (ME.key,))
    db.commit()
    db.close()
    store = DocumentStore(path)
    assert len(store.load(SPEC.id, ME).envelopes) == 5 and store.load(SPEC.id, ME).own is None
    store.append(made[3:])  # a peer had it
    assert store.load(SPEC.id, ME).own == ME


def test_two_stores_do_not_share_a_file(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "documents.sqlite")
    with pytest.raises(ConfigError, match="another process uses it"):
        DocumentStore(tmp_path / "documents.sqlite")
    store.close()
    with pytest.raises(ConfigError, match="closed"):
        store.tidy()


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    store = DocumentStore(path)
    store.append(chain(1))
    store.close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(ConfigError, match="newer Shoal"):
        DocumentStore(path)
    assert sqlite3.connect(path).execute("SELECT count(*) FROM envelopes").fetchone() == (1,)
    assert not list(tmp_path.glob("*damaged*"))


def test_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    store = DocumentStore(path)
    big = [signed(IDS[1], bytes(100_000), counter, bytes(31) + b"\1", snapshot=False) for counter in range(1, 40)]
    store.append(big)
    store.tidy()
    full = path.stat().st_size
    store.remove(SPEC.id, [IDS[1].peer_id])
    for _ in range(10):
        store.tidy()
    assert full > 3_000_000 and path.stat().st_size < 200_000
    assert path.with_name(path.name + "-wal").stat().st_size <= 2 * defaults.MAX_LOG


# --- disks that fail -----------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "documents.sqlite")
    store.append(chain(2))
    assert store._db is not None
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(ConfigError, match=r"documents\.sqlite: the disk is full; free some space"):
        store.append([signed(IDS[1], bytes(100_000), 0), *chain(1, 2)])
    assert len(store.load(SPEC.id, ME).envelopes) == 2
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.append([signed(IDS[1], bytes(100_000), 0)])
    assert len(store.load(SPEC.id, ME).envelopes) == 3


def test_a_failed_write_is_not_continued() -> None:
    writer = Writer(IDS[0])
    writer.must_write(put("a", 1))
    draft = writer.replica.write(put("b", 2), IDS[0], WALL)
    assert draft is not None
    writer.replica.discard(draft)
    assert writer.replica.must_begin(ME)
    again = writer.must_write(put("c", 3))
    assert again.incarnation > draft.incarnation and writer.replica.view(ME) == {"m": {"a": 1, "c": 3}}


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="drops the rights of root")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "documents.sqlite")
    store.append(chain(1), ME)
    store.close()
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        if parent.name.startswith("pytest"):
            parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setuid(65534)
            DocumentStore(tmp_path / "documents.sqlite")
        except ConfigError as error:
            code = 0 if "cannot use the document store" in str(error) and str(tmp_path) in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken"):
        DocumentStore(tmp_path / "taken" / "documents.sqlite")


# --- marks ---------------------------------------------------------------------------------------------------------


def test_marks_survive_and_only_rise(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks")
    marks.put(SPEC.id, ME, 5, 1)
    marks.put(SPEC.id, ME, 4, 9)
    marks.put(SPEC.id, IDS[1].peer_id, 1, 1)
    marks.put(SPEC.id, ME, 5, 2)
    again = Marks(tmp_path / "marks")
    assert again.get(SPEC.id, ME) == (5, 2) and again.get(SPEC.id, IDS[1].peer_id) == (1, 1) and not again.damaged


def test_marks_stay_small(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks")
    for next in range(1, 800):
        marks.put(SPEC.id, ME, 1, next)
    assert (tmp_path / "marks").stat().st_size <= defaults.MAX_MARKS
    assert Marks(tmp_path / "marks").get(SPEC.id, ME) == (1, 799)


def test_marks_cut_short_at_any_byte_hold_what_was_whole(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks")
    for next in (1, 2, 3):
        marks.put(SPEC.id, ME, 1, next)
    data = (tmp_path / "marks").read_bytes()
    size = len(data) // 3
    for end in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:end])
        cut = Marks(tmp_path / "cut")
        assert cut.get(SPEC.id, ME) == ((1, end // size) if end >= size else None) and not cut.damaged
        cut.put(SPEC.id, ME, 1, 7)
        assert Marks(tmp_path / "cut").get(SPEC.id, ME) == (1, 7)


def test_a_flipped_byte_in_the_marks_is_noticed_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    store = DocumentStore(path)
    store.append(chain(3), ME)
    store.close()
    marks = path.with_name(path.name + ".marks")
    data = bytearray(marks.read_bytes())
    data[-20] ^= 1
    marks.write_bytes(data)
    store = DocumentStore(path)
    assert "was damaged" in store.notices[0] and store.load(SPEC.id, ME).own is None
    held = replica()
    loaded = store.load(SPEC.id, ME)
    held.load(loaded.envelopes, loaded.evidence, WALL, loaded.own)
    assert held.must_begin(ME)
    assert store.reserve(SPEC.id, ME, 0.0) == 2
    store.close()
    assert DocumentStore(path).notices == []
