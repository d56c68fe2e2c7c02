"""`shoal checkpoint` and `shoal start --from`, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from shoal.node.cli import main

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = ("--host", "127.0.0.1", "--no-port-mapping")


def start(cwd: Path, *arguments: str) -> None:
    """`shoal start`, in a process of its own, to its end."""
    command = [sys.executable, "-c", "from shoal.sim.cli import entry; entry()", "start", *arguments, *QUIET]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV, cwd=cwd, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.process
def test_from_the_bad_end_of_a_run_to_a_new_one_that_begins_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def shoal(*arguments: str, code: int = 0) -> str:
        """A light command, in this process; what it said."""
        assert main(arguments) == code
        said = capsys.readouterr()
        return said.out if code == 0 else said.err

    def listed(data: str) -> list[dict[str, object]]:
        found: dict[str, list[dict[str, object]]] = json.loads(
            shoal("checkpoint", "list", "--json", "--data-dir", data)
        )
        return found["checkpoints"]

    assert "holds no run" in shoal("checkpoint", "list", "--data-dir", "a", code=2)
    start(tmp_path, "digits", "--data-dir", "a", "--rounds", "9", "--checkpoint-every", "2")
    assert [each["round"] for each in listed("a")] == [4, 6, 8]
    assert "stays for ever" in shoal("checkpoint", "pin", "6", "--data-dir", "a")
    header, *rows = shoal("checkpoint", "list", "--data-dir", "a").splitlines()
    assert header.split() == ["ROUND", "DIGEST", "SIZE", "KEPT", "PINNED", "COMPLETE", "FILE"]
    assert [row.split()[0] for row in rows] == ["4", "6", "8"]
    (pinned,) = [each for each in listed("a") if each["pinned"]]
    assert pinned["round"] == 6

    said = shoal("checkpoint", "restore", "6", "--data-dir", "a")
    assert "round 6" in said and "shoal start TASK --from checkpoint-6.safetensors" in said
    restored = safetensors.torch.load_file(tmp_path / "checkpoint-6.safetensors")
    assert "0.weight" in restored
    shoal("checkpoint", "restore", str(pinned["digest"])[:8], "again.safetensors", "--data-dir", "a")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all((again[name] == restored[name]).all() for name in restored)

    for arguments, complaint in (
        (("restore", "7"), "there is no checkpoint 7 here (rounds kept: 4, 6, 8)"),
        (("restore", "xyz"), "'xyz' is no checkpoint"),
        (("restore", "6", "no/such/file"), "there is no folder"),
        (("pin", "99"), "there is no checkpoint 99"),
    ):
        assert complaint in shoal("checkpoint", *arguments, "--data-dir", "a", code=2)

    begin = ("--from", "checkpoint-6.safetensors")
    assert "holds a run already" in shoal("start", "digits", "--data-dir", "a", *begin, *QUIET, code=2)
    assert "no such file" in shoal("start", "digits", "--data-dir", "b", "--from", "nix", *QUIET, code=2)
    end = ("--rounds", "2", "--export", "end.safetensors")
    start(tmp_path, "digits", "--data-dir", "b", *begin, "--checkpoint-every", "1", *end)
    assert [each["round"] for each in listed("b")] == [1, 2]
    trained = safetensors.torch.load_file(tmp_path / "end.safetensors")
    names = [name for name in restored if not name.startswith("shoal.")]
    moved = sum(float((trained[name] - restored[name]).norm()) for name in names)
    assert 0 < moved < 0.3 * sum(float(restored[name].norm()) for name in names), "two rounds do not lead far"
