"""Models in stages on real processes: the only holder of a stage dies by SIGKILL, and training goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def shoal(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from shoal.sim.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.process
def test_three_processes_train_one_model_in_three_stages(tmp_path: Path) -> None:
    done = shoal(
        "sim", "--task", "digits", "--stages", "3", "--peers", "3", "--rounds", "4", "--kill", "0", "--late", "0",
        "--set", "inner_steps=10", "--no-live", "--json", "report.json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {peer["status"] for peer in report["peers"]} == {"finished"}
    assert report["swarm"] > report["baseline"]["start"]


@pytest.mark.slow
@pytest.mark.process
def test_a_killed_stage_is_recovered_and_a_late_peer_trains(tmp_path: Path) -> None:
    done = shoal(
        "sim", "--task", "digits", "--stages", "3", "--peers", "5", "--rounds", "8", "--kill", "1", "--late", "1",
        "--set", "inner_steps=5", "--no-live", "--json", "report.json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"]
    assert [event["what"] for event in report["events"] if event["what"] in ("kill", "late")]
    assert {peer["status"] for peer in report["peers"]} == {"finished", "killed"}
    assert report["swarm"] > report["baseline"]["start"]


def test_more_stages_than_peers_or_layers_are_refused_by_name(tmp_path: Path) -> None:
    few = shoal("sim", "--stages", "4", "--peers", "4", folder=tmp_path)
    assert few.returncode == 2
    assert "--stages 4 needs as many peers" in few.stderr
    many = shoal("sim", "--stages", "7", "--peers", "8", "--kill", "0", "--late", "0", "--no-live", folder=tmp_path)
    assert many.returncode == 2
    assert "cannot be cut into 7 stages: its model has 3 layers with parameters" in many.stderr
