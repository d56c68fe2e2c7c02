"""What a peer keeps of a run: whole or not at all, and damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from shoal.learning.events import Standing
from shoal.learning.rounds.messages import Accepted, Certificate, CommitRecord, Signed
from shoal.learning.spec import SignedSpec
from shoal.learning.store import Head, RunStore, Vote
from shoal.transport.errors import ConfigError
from shoal.transport.identity import Identity

PEER = Identity(b"\x01" * 32).peer_id

RECORD = CommitRecord(
    b"r" * 32, 3, "reduce", b"p" * 32, (PEER,), (5,), (1,), (PEER,), 15, 0, b"", (b"n",), "blake3", b"f", "why"
)
HEAD = Head(RECORD, Certificate(b"k" * 32, 2, (Signed(PEER, b"s" * 64),)), (PEER,))
VOTE = Vote(b"k" * 32, 7, Accepted(6, RECORD))
SEEN = (Standing(PEER.text, 3, 3, 2, 2 / 3, 1, 0.5, 0.5, 1, 2, 3, 4), Standing(PEER.text))
SPEC = SignedSpec(b"spec", b"signature")
VECTORS = {"weights": torch.arange(5, dtype=torch.float32), "outer.momentum": torch.ones(5)}


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "run" if request.param == "folder" else None)


def again(store: RunStore) -> RunStore:
    """The store as the next process finds it."""
    return store if store.folder is None else RunStore(store.folder)


def test_an_empty_store_holds_nothing(store: RunStore) -> None:
    assert store.load_spec() is None
    assert store.load_vote(b"k" * 32) is None
    assert store.load_state() is None
    assert store.load_trust() == ()
    assert store.load_standings() == ()


def test_everything_comes_back_in_the_next_life(store: RunStore) -> None:
    store.save_spec(SPEC)
    store.save_vote(VOTE)
    store.save_state(VECTORS, HEAD)
    store.save_trust((HEAD, HEAD))
    store.save_standings(SEEN)
    store = again(store)
    assert store.load_spec() == SPEC
    assert store.load_vote(VOTE.key) == VOTE
    assert store.load_trust() == (HEAD, HEAD)
    assert store.load_standings() == SEEN
    found = store.load_state()
    assert found is not None
    vectors, head = found
    assert head == HEAD
    assert sorted(vectors) == sorted(VECTORS)
    assert all(torch.equal(vectors[name], VECTORS[name]) for name in VECTORS)


def test_a_saved_state_does_not_change_with_the_vectors_it_was_made_of(store: RunStore) -> None:
    vectors = {"weights": torch.zeros(3)}
    store.save_state(vectors, HEAD)
    vectors["weights"] += 1
    found = again(store).load_state()
    assert found is not None
    assert torch.equal(found[0]["weights"], torch.zeros(3))


def test_a_vote_counts_only_in_the_instance_it_was_cast_in(store: RunStore) -> None:
    store.save_vote(VOTE)
    assert again(store).load_vote(b"other".ljust(32)) is None


def test_the_last_of_several_saves_counts(store: RunStore) -> None:
    for attempt in range(5):
        store.save_vote(Vote(b"k" * 32, attempt, None))
    assert again(store).load_vote(b"k" * 32) == Vote(b"k" * 32, 4, None)


# -- on disk --------------------------------------------------------------------------------------------


def full(folder: Path) -> RunStore:
    store = RunStore(folder)
    store.save_spec(SPEC)
    store.save_vote(VOTE)
    store.save_state(VECTORS, HEAD)
    store.save_trust((HEAD,))
    store.save_standings(SEEN)
    return store


def load_all(store: RunStore) -> None:
    store.load_spec()
    store.load_vote(VOTE.key)
    store.load_trust()
    store.load_standings()
    store.load_state()


@pytest.mark.parametrize("name", ["spec", "vote", "trust", "standings", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flip"])
def test_a_damaged_file_is_named_and_nothing_worse_happens(tmp_path: Path, name: str, damage: str) -> None:
    store, path = full(tmp_path), tmp_path / name
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\xc1" * len(data))
        case _:
            path.write_bytes(data[:1] + bytes([data[1] ^ 0x55]) + data[2:])
    if (name, damage) == ("trust", "empty"):
        assert store.load_trust() == ()
        return
    with pytest.raises(ConfigError) as caught:
        load_all(RunStore(tmp_path))
    assert str(path) in str(caught.value)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = full(tmp_path)

    def crash(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(ConfigError, match="cannot write .*vote.*No space left"):
        store.save_vote(Vote(b"k" * 32, 99, None))
    monkeypatch.undo()
    assert RunStore(tmp_path).load_vote(b"k" * 32) == VOTE


def test_a_vote_is_on_disk_before_saving_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    RunStore(tmp_path).save_vote(VOTE)
    # The bytes before the name, and the name itself before we say that it is done.
    assert order[:2] == ["sync", "replace"]
    assert os.name != "posix" or order == ["sync", "replace", "sync"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "spec").mkdir()
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path / 'spec'}"):
        RunStore(tmp_path).load_spec()
