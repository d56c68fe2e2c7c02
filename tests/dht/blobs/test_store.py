"""What the store says it has, it has: across crashes, damage, full disks and eviction."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch

from shoal.dht.blobs import defaults
from shoal.dht.blobs.store import Store
from shoal.dht.blobs.tree import Tree, build_tree
from shoal.transport.errors import ConfigError, Overloaded, ProtocolMisuse

CHILD = Path(__file__).with_name("store_child.py")


def blob(seed: int, size: int = 400_000, chunk: int = 1 << 16) -> tuple[Tree, list[bytes]]:
    data = [seed.to_bytes(8, "big"), random.Random(seed).randbytes(size)]
    return build_tree([("round", "U8", data[0]), ("weights", "F32", data[1])], chunk=chunk), data


def chunk_of(tree: Tree, data: list[bytes], index: int) -> bytes:
    place = tree.place(index)
    return data[place.part][place.offset : place.offset + place.size]


@pytest.fixture(params=["disk", "memory"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens a store; a second call: after a crash."""
    open_ones: list[Store] = []

    def again(quota: int = defaults.QUOTA) -> Store:
        if request.param == "memory" and open_ones:
            made = open_ones[-1].copy()
            made.quota = quota
        else:
            # The one before is left as a crash leaves it: never closed.
            made = Store(tmp_path / "blobs" if request.param == "disk" else None, quota)
        open_ones.append(made)
        return made

    yield again
    for store in open_ones:
        store._db.close()


def test_a_blob_comes_back_after_a_crash_and_its_file_is_safetensors(tmp_path: Path) -> None:
    tree, data = blob(1)
    store = Store(tmp_path)
    store.put(tree, data, tag="checkpoint", note=b"note")
    again = Store(tmp_path)
    (entry,) = again.entries()
    assert entry.complete and entry.size == len(data[1]) + 8
    assert (entry.tag, entry.note, entry.pinned) == ("checkpoint", b"note", False)
    assert all(again.read(tree.id, n) == chunk_of(tree, data, n) for n in range(len(tree)))
    assert again.path(tree.id).endswith(f"{tree.id.hex()}.safetensors")
    tensors = safetensors.torch.load_file(again.path(tree.id))
    assert tensors["weights"].numpy().tobytes() == data[1]
    out = bytearray(len(data[1]))
    assert again.read_part(tree.id, 1, memoryview(out))
    assert out == data[1]
    for each in (store, again):
        each.close()


def test_what_was_flushed_is_had_after_a_crash_and_nothing_else(reopen: Callable[..., Store]) -> None:
    tree, data = blob(2)
    store = reopen()
    store.begin(tree)
    for index in (0, 3, 5):
        assert store.write(tree.id, index, chunk_of(tree, data, index))
    store.flush()
    assert store.write(tree.id, 6, chunk_of(tree, data, 6))
    assert not store.write(tree.id, 1, chunk_of(tree, data, 2)), "not the chunk it is said to be"
    assert list(store.bits(tree.id) or ()) == [0, 3, 5], "not had before it is flushed"
    again = reopen()
    assert list(again.bits(tree.id) or ()) == [0, 3, 5]
    assert again.read(tree.id, 3) == chunk_of(tree, data, 3)
    assert again.read(tree.id, 6) is None
    for index in range(len(tree)):
        again.write(tree.id, index, chunk_of(tree, data, index))
    again.flush(tree.id)
    entry = again.entry(tree.id)
    assert entry is not None and entry.complete


def test_the_least_recently_used_give_way_and_never_those_that_are_pinned_or_in_use(
    reopen: Callable[..., Store],
) -> None:
    blobs = [blob(n, 100_000) for n in range(6)]
    store = reopen(450_000)
    for tree, data in blobs[:4]:
        store.put(tree, data)
    first, second, third, fourth = (tree.id for tree, _ in blobs[:4])
    store.pin(first)
    store.hold(second)
    assert store.read(third, 0) is not None
    store.put(*blobs[4])
    assert [e.id for e in store.entries() if e.id == fourth] == [], "used longest ago of those that may go"
    store.release(second)
    store.put(*blobs[5])
    left = [entry.id for entry in store.entries()]
    assert second not in left
    assert {first, third, blobs[4][0].id, blobs[5][0].id} == set(left)
    assert store.used() <= 450_000
    assert [e.id for e in reopen().entries() if e.pinned] == [first]


def test_too_small_a_quota_is_named_and_nothing_is_lost(reopen: Callable[..., Store]) -> None:
    store = reopen(450_000)
    small, large = blob(1, 100_000), blob(2, 500_000)
    pinned = blob(3, 300_000)
    store.put(*pinned, pinned=True)
    store.put(*small)
    with pytest.raises(Overloaded, match=f"blob {large[0].id.hex()[:16]} of .* the quota is 450,000 bytes"):
        store.put(*large)
    assert {e.id for e in store.entries()} == {pinned[0].id, small[0].id}


def test_a_disk_without_room_is_named_before_anything_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    old, new = blob(1), blob(2)
    store.put(*old)
    monkeypatch.setattr(defaults, "KEEP_FREE", 1 << 60)
    with pytest.raises(Overloaded, match=rf"{tmp_path}: the disk has only [0-9,]+ bytes free"):
        store.put(*new)
    assert [entry.id for entry in store.entries()] == [old[0].id]
    store.close()


def test_a_chunk_that_went_bad_on_disk_is_found_when_it_is_read_dropped_and_can_be_written_again(
    tmp_path: Path,
) -> None:
    tree, data = blob(1)
    store = Store(tmp_path)
    store.put(tree, data)
    path = Path(store.path(tree.id))
    content = bytearray(path.read_bytes())
    content[-70_000] ^= 1  # in the last chunk but one, as the last one is short
    path.write_bytes(content)
    bad = [n for n in range(len(tree)) if store.read(tree.id, n) is None]
    assert len(bad) == store.damaged == 1
    store.close()
    store = Store(tmp_path)
    assert list(store.bits(tree.id).missing()) == bad  # type: ignore[union-attr]
    assert not store.read_part(tree.id, 1, memoryview(bytearray(len(data[1]))))
    assert store.path(tree.id).endswith(".partial")
    store.write(tree.id, bad[0], chunk_of(tree, data, bad[0]))
    store.flush()
    assert store.entry(tree.id).complete  # type: ignore[union-attr]
    path = Path(store.path(tree.id))
    path.write_bytes(path.read_bytes()[:1000])
    assert store.read(tree.id, 3) is None, "cut short"
    store.close()


def test_files_that_vanish_are_forgotten_and_leftovers_are_swept_away(tmp_path: Path) -> None:
    one, two = blob(1), blob(2)
    store = Store(tmp_path)
    store.put(*one)
    store.put(*two)
    Path(store.path(one[0].id)).unlink()
    left = tmp_path / f"{'ab' * 32}.partial"
    left.write_bytes(b"x")
    mine = tmp_path / "notes.txt"
    mine.write_text("not a blob")
    store.close()
    again = Store(tmp_path)
    assert [entry.id for entry in again.entries()] == [two[0].id]
    assert not left.exists()
    assert mine.exists()
    assert again.remove(two[0].id) and again.entries() == ()
    with pytest.raises(ProtocolMisuse):
        again.write(two[0].id, 0, b"")
    again.close()


@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_without_its_index_a_store_keeps_what_is_there(tmp_path: Path, how: str) -> None:
    tree = build_tree([("weights", "F32", random.Random(1).randbytes(400_000))])
    store = Store(tmp_path)
    store.put(tree, [random.Random(1).randbytes(400_000)], tag="checkpoint", note=b"note")
    store.close()
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"") if how == "emptied" else index.unlink()
    for _ in range(2):
        again = Store(tmp_path)
        (entry,) = again.entries()
        assert (entry.id, entry.complete, entry.note, entry.pinned) == (tree.id, True, b"note", True)
        again.close()


@pytest.mark.parametrize("how", ["no database", "torn pages", "truncated"])
def test_a_damaged_index_is_made_anew_from_the_blobs_and_nothing_whole_is_lost(tmp_path: Path, how: str) -> None:
    # In chunks of the usual size: that is all a file does not say itself.
    whole, torn = (build_tree([("weights", "F32", random.Random(n).randbytes(400_000))]) for n in (1, 2))
    store = Store(tmp_path)
    for n, tree in ((1, whole), (2, torn)):
        store.put(tree, [random.Random(n).randbytes(400_000)], tag="checkpoint", note=b"note")
    file = Path(store.path(torn.id))
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    store.close()
    index = tmp_path / "index.sqlite"
    content = bytearray(index.read_bytes())
    match how:
        case "no database":
            content[:100] = bytes(100)
        case "torn pages":
            content[4096:] = bytes(len(content) - 4096)
        case _:
            del content[5000:]
    index.write_bytes(content)
    again = Store(tmp_path)
    (entry,) = again.entries()
    assert (entry.id, entry.complete, entry.tag, entry.note) == (whole.id, True, "checkpoint", b"note")
    assert entry.pinned, "nobody knows any more, so it is kept"
    assert file.with_suffix(".damaged").exists(), "put aside, not deleted"
    assert (tmp_path / "index.damaged").exists()
    again.close()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        Store(tmp_path / "file" / "blobs")
    (tmp_path / "dir" / "index.sqlite").mkdir(parents=True)
    with pytest.raises(ConfigError, match="index.sqlite"):
        Store(tmp_path / "dir")


def test_an_index_that_cannot_be_written_is_named_and_takes_nothing_for_had(tmp_path: Path) -> None:
    tree, data = blob(1)
    store = Store(tmp_path)
    store.begin(tree)
    store.write(tree.id, 0, chunk_of(tree, data, 0))
    other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}/index.sqlite"):
        store.flush()
    assert list(store.bits(tree.id) or ()) == []
    other.execute("ROLLBACK")
    other.close()
    store.flush()
    assert list(store.bits(tree.id) or ()) == [0]
    store.close()


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_killed_at_any_moment_no_acknowledged_chunk_is_lost_and_no_wrong_one_believed(tmp_path: Path) -> None:
    rng = random.Random(7)
    acknowledged: dict[tuple[int, int], None] = {}
    kills = 0
    for turn in range(12):
        arguments = [sys.executable, str(CHILD), str(tmp_path), str(turn)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(rng.randrange(1, 40))]
        child.send_signal(signal.SIGKILL)
        # What it said before it died counts, but for a line that was cut short.
        said += [line for line in child.stdout.readlines() if line.endswith("\n")]
        kills += child.wait() == -signal.SIGKILL
        child.stdout.close()
        going = None
        for line in said:
            word, *numbers = line.split()
            if word == "had":
                acknowledged[int(numbers[0]), int(numbers[1])] = None
            else:
                assert word in ("go", "gone"), line
                going = int(numbers[0]) if word == "go" else None
                acknowledged = {key: None for key in acknowledged if word == "go" or key[0] != int(numbers[0])}
        store = Store(tmp_path)
        for seed, index in acknowledged:
            if seed != going:
                tree, data = blob(seed, 300_000, 1 << 14)
                assert store.read(tree.id, index) == chunk_of(tree, data, index), f"turn {turn}: {seed}, {index}"
        if going is not None:
            # It was being removed: gone or whole.
            entry = store.entry(blob(going, 300_000, 1 << 14)[0].id)
            assert entry is None or entry.complete
            acknowledged = {key: None for key in acknowledged if key[0] != going}
        for entry in store.entries():
            bits = store.bits(entry.id)
            assert bits is not None
            assert all(store.read(entry.id, index) is not None for index in bits), "believed, and wrong"
        assert store.damaged == 0
        store.close()
    assert kills == 12
    assert len(acknowledged) > 10


@pytest.mark.process
def test_a_disk_that_refuses_in_the_middle_is_named_and_what_was_acknowledged_stays(tmp_path: Path) -> None:
    code = (
        "import resource, sys; sys.argv = ['x', sys.argv[1], 'full'];"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        f"exec(open({str(CHILD)!r}).read())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "cannot write" in done.stdout and "File too large" in done.stdout, done.stdout + done.stderr
    assert f"{tmp_path}" in done.stdout
    store = Store(tmp_path)
    for entry in store.entries():
        assert all(store.read(entry.id, index) is not None for index in store.bits(entry.id) or ())
    store.close()
