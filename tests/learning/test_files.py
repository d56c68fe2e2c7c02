"""State files are whole or not there, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from shoal.learning.files import load_state, save_state
from shoal.transport.errors import ConfigError

STATE = {"a.weight": torch.arange(6, dtype=torch.float32).view(2, 3), "steps": torch.tensor(3), "none": torch.zeros(0)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "state.safetensors"
    save_state(path, STATE, {"round": "7"})
    return path


def test_a_state_comes_back_bit_for_bit_with_its_notes(saved: Path) -> None:
    tensors, notes = load_state(saved)
    assert notes == {"round": "7"}
    assert sorted(tensors) == sorted(STATE)
    for name, value in STATE.items():
        assert torch.equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    assert torch.equal(safetensors.torch.load_file(saved)["a.weight"], STATE["a.weight"])


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(saved: Path) -> None:
    save_state(saved, {"b": torch.ones(2)}, {})
    assert list(load_state(saved)[0]) == ["b"]
    assert [path.name for path in saved.parent.iterdir()] == ["state.safetensors"]


def test_tied_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_state(tmp_path / "s", {"one": shared, "two": shared.view(2, 2).t()}, {})
    tensors, _ = load_state(tmp_path / "s")
    assert tensors["two"].tolist() == [[0.0, 2.0], [1.0, 3.0]]


@pytest.mark.parametrize("where", [0, 9, 60, -1])
def test_a_flipped_bit_anywhere_is_noticed_and_the_file_named(saved: Path, where: int) -> None:
    data = bytearray(saved.read_bytes())
    data[where] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ConfigError, match="state.safetensors"):
        load_state(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"state.safetensors.*damaged"):
        load_state(saved)


def test_a_missing_a_foreign_and_an_unwritable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file .*absent"):
        load_state(tmp_path / "absent")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ConfigError, match="foreign was not written by Shoal"):
        load_state(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="cannot read"):
        load_state(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*below"):
        save_state(tmp_path / "file" / "below", STATE, {})
