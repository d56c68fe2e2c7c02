"""The data directory: one node at a time, files replaced whole, errors that name the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.node.datadir import DataDir, NodeRecord, default_path
from shoal.transport.errors import ConfigError

RECORD = NodeRecord("shoal1abc", "digits", "127.0.0.1", 4001, True)

HOLD = """
import sys
from pathlib import Path
from shoal.node.datadir import DataDir
data = DataDir(Path(sys.argv[1]))
with data.locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_share_a_data_directory(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    assert data.holder() is None
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert data.holder() == child.pid
        with pytest.raises(ConfigError) as caught, data.locked():
            raise AssertionError("two nodes hold one directory")
        assert f"pid {child.pid}" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert "shoal stop" in str(caught.value)
        assert "--data-dir" in str(caught.value)
        child.kill()
        child.wait()
        # SIGKILL leaves the file behind, but not the lock
        with data.locked():
            assert data.lock_path.read_text() == f"{os.getpid()}\n"
    assert data.holder() is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_said_when_the_directory_is_taken(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    data.lock_path = Path("/dev/full")
    with pytest.raises(ConfigError, match="cannot write /dev/full"), data.locked():
        raise AssertionError("there was no room for the lock")


def test_a_folder_that_went_away_is_said_when_something_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write .*gone/node: No such file"):
        DataDir(tmp_path / "gone").write_record(RECORD)


def test_a_record_reads_back_and_replaces_the_old_one_whole(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    assert data.read_record() is None
    data.write_record(RECORD)
    data.write_record(NodeRecord("shoal1xyz", "stdlib", "0.0.0.0", 0, False))
    assert data.read_record() == NodeRecord("shoal1xyz", "stdlib", "0.0.0.0", 0, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    data.write_record(RECORD)
    data.node_path.write_bytes(data.node_path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match=rf"{data.node_path} is damaged .* delete it to begin anew"):
        data.read_record()


def test_what_was_known_of_the_swarm_reads_back(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    assert data.read_dht() is None
    data.write_dht(b"snapshot")
    assert data.read_dht() == b"snapshot"


def test_a_key_file_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    data.create()
    first = data.identity(os.urandom)
    assert data.identity(os.urandom).peer_id == first.peer_id
    data.key_path.chmod(0o644)
    with pytest.raises(ConfigError, match=rf"can be read by others \(mode 0644\); run: chmod 600 {data.key_path}"):
        data.identity(os.urandom)


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=rf"cannot make the data directory {blocked}.*--data-dir"):
        DataDir(blocked).create()


def test_the_environment_names_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "here"))
    assert default_path() == tmp_path / "here"
    monkeypatch.delenv("SHOAL_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local/share/shoal"
