"""The benchmarks run, check their results and write the rows that are asked for. Nothing here is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"


def bench(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def rows(file: Path, bench: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())
    for row in found:
        assert row["bench"] == bench
        assert isinstance(row["case"], dict)
        values = [row[unit] for unit in ("median_s", "per_s", "mb_s") if unit in row]
        assert len(values) == 1
        assert 0 < row["min"] <= values[0] <= row["max"]
        assert row["runs"] >= 1
        assert "torch" in row["versions"]
    return found


@pytest.mark.process
def test_allreduce_measures_shoal_and_gloo_and_writes_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("allreduce", "--peers", "2", "--mb", "1", "--runs", "2", "--warmup", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = rows(file, "allreduce")
    assert [row["system"] for row in found] == ["shoal", "gloo"]
    assert all(row["case"] == {"peers": 2, "bytes": 1 << 20, "dtype": "float32"} for row in found)
    assert "× gloo" in done.stdout


@pytest.mark.process
def test_link_measures_shoal_and_plain_tcp_and_writes_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("link", "--mb", "8", "--calls", "20", "--runs", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = rows(file, "link")
    assert [(row["case"]["what"], row["system"]) for row in found] == [
        ("bulk", "shoal"),
        ("bulk", "trio TCP"),
        ("calls", "shoal"),
        ("calls", "trio TCP"),
    ]


def test_help_says_what_is_measured_and_loads_nothing_heavy() -> None:
    done = bench("allreduce", "--help", timeout=20)
    assert done.returncode == 0
    assert "floor" in done.stdout
    assert "gloo" in done.stdout


def test_a_wrong_list_of_peers_is_named() -> None:
    done = bench("allreduce", "--peers", "2,x", timeout=20)
    assert done.returncode == 2
    assert "--peers" in done.stderr


@pytest.mark.process
def test_a_child_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import trio\n"
        "from benchmarks.processes import children\n"
        "async def main():\n"
        "    async with children() as group:\n"
        "        child, = await group.start('shoal', 1)\n"
        "        await child.ask('start')\n"
        "trio.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCH.parent)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert "process shoal 0 ended during 'start'" in done.stderr
    assert "this torch is broken" in done.stderr
