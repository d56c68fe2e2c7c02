"""The key file of a private swarm: made once, kept from others, never half written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shoal.node import swarm_key
from shoal.node.datadir import DataDir
from shoal.transport.errors import ConfigError


def test_a_key_is_made_once_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "key"
    key = swarm_key.load_or_create(path, os.urandom)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert swarm_key.load_or_create(path, os.urandom) == key
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "key"
    swarm_key.load_or_create(path, os.urandom)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"can be read by others \\(mode {mode:04o}\\).*run: chmod 600"):
            swarm_key.load(path)


@pytest.mark.parametrize(
    "content", ["", "hello", "shoal-swarm-key-v1 ", "shoal-swarm-key-v1 AAAA\n", "shoal-key-v1 " + "A" * 56, "x" * 9999]
)
def test_some_other_file_is_no_key(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not the key of a private swarm"):
        swarm_key.load(path)
    assert path.read_text() == content
    # Nobody is told to close a file that has nothing to do with Shoal
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="is not the key of a private swarm"):
        swarm_key.load(path)


def test_a_folder_and_a_place_where_nothing_can_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        swarm_key.load_or_create(tmp_path, os.urandom)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the swarm's key"):
        swarm_key.load_or_create(tmp_path / "file" / "key", os.urandom)


def test_whoever_was_faster_made_the_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    swarm_key.save(path, b"a" * 32)
    swarm_key.save(path, b"b" * 32)
    assert swarm_key.load(path) == b"a" * 32


def test_a_data_directory_keeps_the_key_it_was_made_private_with(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.create()
    assert data.swarm_key() is None
    key = data.make_private(tmp_path / "shared", os.urandom)
    assert data.swarm_key() == key == swarm_key.load(tmp_path / "shared")
    assert data.make_private(tmp_path / "shared", os.urandom) == key
    assert data.make_private(None, os.urandom) == key
    with pytest.raises(ConfigError, match="private swarm with another key than .*other"):
        data.make_private(tmp_path / "other", os.urandom)
