"""Whatever a disk does to the files: the store opens, says so, gives back only what was written, and peers mend it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from shoal.dht.documents.envelope import Envelope
from shoal.dht.documents.store import DocumentStore
from shoal.transport.identity import PeerId
from shoal.transport.wire import pack

from .swarm import IDS, SPEC, WALL, Writer, assert_equal, exchange, put, signed

ME = IDS[0].peer_id
FILES = ("documents.sqlite", "documents.sqlite-wal", "documents.sqlite.marks")


@attrs.define
class Sample:
    """A node's folder, as it is while the node runs or after it has ended, and a peer that holds the same."""

    folder: Path
    peer: Writer
    packed: dict[tuple[PeerId, tuple[int, int]], bytes]


def build(folder: Path, closed: bool) -> Sample:
    """Our own chain of 12 envelopes, 10 of 4 others each; ``closed``: the log has gone into the database."""
    store = DocumentStore(folder / "live" / "documents.sqlite")
    mine, peer = Writer(IDS[0]), Writer(IDS[7])
    mine.incarnation = store.reserve(SPEC.id, ME, WALL) - 1
    kept: list[Envelope] = []

    def keep(envelope: Envelope, own: PeerId | None) -> None:
        store.append([envelope], own)
        assert peer.offer(envelope).kept
        kept.append(envelope)

    for number in range(12):
        keep(mine.must_write(put(f"k{number % 4}", "x" * (number * 30))), ME)
    others = [Writer(identity) for identity in IDS[1:5]]
    for number in range(10):
        for other in others:
            keep(other.must_write(put("loss", number / 3)), None)
            if number == 7:
                exchange(other, peer)
    if closed:
        store.close()
    shutil.copytree(folder / "live", folder / "copy")
    store.close()
    return Sample(folder / "copy", peer, {(e.author, e.place): pack(e) for e in kept})


@pytest.fixture(scope="module", params=["closed", "running"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return build(tmp_path_factory.mktemp("damage"), request.param == "closed")


def harmed(sample: Sample, folder: Path, harm: Callable[[Path], None]) -> DocumentStore:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sample.folder, folder)
    harm(folder)
    return DocumentStore(folder / "documents.sqlite")


def check(sample: Sample, store: DocumentStore) -> tuple[int, bool]:
    """Load, write, mend from the peer, restart; returns how many envelopes were saved, and whether damage was told."""
    loaded = store.load(SPEC.id, ME)
    saved = {(envelope.author, envelope.place): pack(envelope) for envelope in loaded.envelopes}
    assert saved.items() <= sample.packed.items()  # nothing but what was written
    node = Writer(IDS[0])
    node.replica.load(loaded.envelopes, loaded.evidence, WALL, loaded.own)
    told = bool(store.notices)
    if node.replica.must_begin(ME):
        node.incarnation = store.reserve(SPEC.id, ME, WALL + 1) - 1  # time has gone on
    else:
        assert len([1 for author, _ in saved if author == ME]) == 12
    # It writes before it has heard of anybody: whoever holds its whole chain sees no contradiction.
    draft = node.must_write(put("after", 1))
    store.append([draft], ME)
    peer = Writer(IDS[7])
    exchange(peer, sample.peer)
    assert peer.offer(draft).kept
    while exchange(node, peer):
        pass
    assert_equal([node, peer])
    assert not any(held.frozen for held in peer.replica.summary())
    # What came back from the peer is kept, and survives a restart.
    for held in node.replica.summary():
        store.append(node.replica.envelopes(held.author, held.incarnation, held.first, held.next))
    store.close()
    again = DocumentStore(store.path)
    whole = Writer(IDS[0])
    loaded = again.load(SPEC.id, ME)
    whole.replica.load(loaded.envelopes, loaded.evidence, WALL, loaded.own)
    assert again.notices == [] and loaded.own == ME
    assert_equal([whole, peer])
    again.close()
    return len(saved), told


def test_untouched_files_give_everything_back(sample: Sample, tmp_path: Path) -> None:
    assert check(sample, harmed(sample, tmp_path / "d", lambda folder: None)) == (len(sample.packed), False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("many", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_files_cut_off_anywhere_are_survived(sample: Sample, tmp_path: Path, name: str, many: int) -> None:
    if not (sample.folder / name).exists():
        pytest.skip("the log has gone into the database")
    data = (sample.folder / name).read_bytes()
    rng = random.Random(name)
    ends = {0, 99, 4096, len(data) - 1, *(rng.randrange(len(data)) for _ in range(many))}
    for end in sorted(each for each in ends if 0 <= each <= len(data)):
        store = harmed(sample, tmp_path / "d", lambda folder, end=end: (folder / name).write_bytes(data[:end]))  # type: ignore[misc]
        saved, told = check(sample, store)
        if name == "documents.sqlite" and saved < len(sample.packed):
            assert told, f"cut off at {end} and nothing was said"
        if name == "documents.sqlite.marks":
            assert saved == len(sample.packed)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["bits", "page of zeros", "page of noise"])
@pytest.mark.parametrize("many", [3, pytest.param(150, marks=pytest.mark.slow)])
def test_bits_and_pages_overwritten_anywhere_are_survived(
    sample: Sample, tmp_path: Path, name: str, what: str, many: int
) -> None:
    if not (sample.folder / name).exists():
        pytest.skip("the log has gone into the database")
    rng = random.Random(name + what)
    lost = 0
    for _ in range(many):

        def harm(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            for _ in range(rng.choice((1, 1, 5))):
                at = rng.randrange(len(data))
                if what == "bits":
                    data[at] ^= 1 << rng.randrange(8)
                else:
                    at -= at % 4096
                    size = len(data[at : at + 4096])
                    data[at : at + size] = bytes(size) if what == "page of zeros" else rng.randbytes(size)
            (folder / name).write_bytes(data)

        store = harmed(sample, tmp_path / "d", harm)
        saved, told = check(sample, store)
        lost += saved < len(sample.packed)
        if name == "documents.sqlite" and saved < len(sample.packed) and what != "bits":
            assert told
    if name == "documents.sqlite" and not (sample.folder / FILES[1]).exists() and what != "bits":
        assert lost > 0  # or nothing was tested


@pytest.mark.parametrize("names", [FILES[:1], FILES[1:2], FILES[2:], FILES[:2], FILES])
def test_files_that_are_gone_are_survived(sample: Sample, tmp_path: Path, names: tuple[str, ...]) -> None:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    saved, told = check(sample, harmed(sample, tmp_path / "d", remove))
    if "documents.sqlite" in names and "documents.sqlite.marks" not in names:
        assert told
    assert saved == len(sample.packed) or names != FILES[2:]


def test_a_damaged_file_is_kept_under_another_name_and_most_of_it_is_saved(tmp_path: Path) -> None:
    sample = build(tmp_path, closed=True)
    path = tmp_path / "d" / "documents.sqlite"

    def harm(folder: Path) -> None:
        data = bytearray(path.read_bytes())
        pages = [at for at in range(4096, len(data), 4096) if b"signature" in data[at : at + 4096]]
        for at in pages[1:3]:
            data[at : at + 4096] = bytes(4096)
        path.write_bytes(data)

    store = harmed(sample, tmp_path / "d", harm)
    assert "It is kept as documents.sqlite.damaged-1" in store.notices[0]
    kept = path.with_name("documents.sqlite.damaged-1").read_bytes()
    assert kept.count(bytes(4096)) >= 2
    saved, _ = check(sample, store)
    assert 0.3 * len(sample.packed) < saved < len(sample.packed)


def test_only_the_last_few_damaged_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    for number in range(5):
        path.write_bytes(b"not a database at all" * 50)
        store = DocumentStore(path)
        assert f"damaged-{number + 1}" in store.notices[0]
        store.close()
    assert sorted(each.name for each in tmp_path.glob("*damaged*")) == [
        f"documents.sqlite.damaged-{number}" for number in (3, 4, 5)
    ]


def test_damage_that_shows_while_the_node_runs_is_mended_on_the_spot(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite"
    store = DocumentStore(path)
    big = [signed(IDS[1], bytes(50_000), counter, bytes(31) + b"\1") for counter in range(1, 60)]
    store.append(big)
    store.tidy()
    assert store._db is not None
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        if page % 7 == 0:
            data[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    with path.open("r+b") as file:
        file.write(data)
    loaded = store.load(SPEC.id, ME)
    assert store.notices and {pack(e) for e in loaded.envelopes} <= {pack(e) for e in big}
    store.append(big)
    assert len(store.load(SPEC.id, ME).envelopes) == len(big)
