"""A whole node of strategy spsa takes the memory of inference: real processes, real resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "onebyte.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux' /proc")
def test_a_node_that_trains_saves_and_keeps_checkpoints_is_within_a_tenth_of_inference() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "nodes", "founder"], check=True, capture_output=True, text=True, timeout=400
    )
    found = json.loads(done.stdout)
    # 224 MiB are the model, so one copy of it would be half as much again.
    assert found["inference"] > 300
    assert found["founder"] <= 1.1 * found["inference"], found
