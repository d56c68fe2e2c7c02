"""``bench.py codecs`` runs and writes its rows. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"


@pytest.mark.process
def test_codecs_are_measured_on_all_paths_and_the_rows_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["codecs", "--elements", "4096", "--runs", "2", "--json", str(file)]
    done = subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["system"] for row in rows} >= {"pure", "torch"}
    assert {row["case"]["codec"] for row in rows} >= {"fp32", "fp16", "bf16", "int8", "e3m0", "topk:0.01"}
    assert all(row["bench"] == "codecs" and row["ns_per_element"] > 0 for row in rows)
    assert "relative RMS error and bias" in done.stdout
