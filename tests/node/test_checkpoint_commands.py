"""`shoal checkpoint` and `shoal start --from`, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch

from shoal.node.datadir import DataDir

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = ("--host", "127.0.0.1", "--no-port-mapping")


def shoal(cwd: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-c", "from shoal.sim.cli import entry; entry()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV, cwd=cwd, timeout=110)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def listed(cwd: Path, data: str) -> list[dict[str, object]]:
    found: Sequence[dict[str, object]] = json.loads(shoal(cwd, "checkpoint", "list", "--json", "--data-dir", data))[
        "checkpoints"
    ]
    return list(found)


@pytest.mark.process
def test_from_the_bad_end_of_a_run_to_a_new_one_that_begins_earlier(tmp_path: Path) -> None:
    assert "holds no run" in shoal(tmp_path, "checkpoint", "list", "--data-dir", "a", code=2)
    shoal(tmp_path, "start", "digits", "--data-dir", "a", "--rounds", "9", "--checkpoint-every", "2", *QUIET)
    assert [each["round"] for each in listed(tmp_path, "a")] == [4, 6, 8]
    assert "stays for ever" in shoal(tmp_path, "checkpoint", "pin", "6", "--data-dir", "a")
    table = shoal(tmp_path, "checkpoint", "list", "--data-dir", "a")
    assert table.splitlines()[0].split() == ["ROUND", "DIGEST", "SIZE", "KEPT", "PINNED", "COMPLETE", "FILE"]
    (pinned,) = [each for each in listed(tmp_path, "a") if each["pinned"]]
    assert pinned["round"] == 6

    said = shoal(tmp_path, "checkpoint", "restore", "6", "--data-dir", "a")
    assert "round 6" in said and "shoal start TASK --from checkpoint-6.safetensors" in said
    restored = safetensors.torch.load_file(tmp_path / "checkpoint-6.safetensors")
    assert "0.weight" in restored
    shoal(tmp_path, "checkpoint", "restore", str(pinned["digest"])[:8], "again.safetensors", "--data-dir", "a")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all((again[name] == restored[name]).all() for name in restored)

    for arguments, complaint in (
        (("restore", "7"), "there is no checkpoint 7 here (rounds kept: 4, 6, 8)"),
        (("restore", "xyz"), "'xyz' is no checkpoint"),
        (("restore", "6", "no/such/file"), "there is no folder"),
        (("pin", "99"), "there is no checkpoint 99"),
    ):
        assert complaint in shoal(tmp_path, "checkpoint", *arguments, "--data-dir", "a", code=2)

    begin = ("--from", "checkpoint-6.safetensors")
    assert "holds a run already" in shoal(tmp_path, "start", "digits", "--data-dir", "a", *begin, *QUIET, code=2)
    assert "no such file" in shoal(tmp_path, "start", "digits", "--data-dir", "b", "--from", "nix", *QUIET, code=2)
    end = ("--rounds", "2", "--export", "end.safetensors", *QUIET)
    shoal(tmp_path, "start", "digits", "--data-dir", "b", *begin, "--checkpoint-every", "1", *end)
    assert [each["round"] for each in listed(tmp_path, "b")] == [1, 2]
    trained = safetensors.torch.load_file(tmp_path / "end.safetensors")
    moved = sum(float((trained[name] - restored[name]).norm()) for name in restored if not name.startswith("shoal."))
    size = sum(float(restored[name].norm()) for name in restored if not name.startswith("shoal."))
    assert 0 < moved < 0.3 * size, "two rounds do not lead far from where they began"
    assert DataDir(tmp_path / "b").holder() is None
