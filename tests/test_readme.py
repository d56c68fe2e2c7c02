"""The README's examples run exactly as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def example(name: str) -> str:
    """The code block behind ``<!-- test: name -->``."""
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None, f"README.md has no example marked {name}"
    return found.group(1)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def test_the_task_example_is_about_thirty_lines() -> None:
    code = [line for line in example("task").splitlines() if line.strip() and not line.startswith("#")]
    assert 20 <= len(code) <= 34


@pytest.mark.process
def test_the_task_example_trains_in_a_swarm(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(example("task"))
    result = subprocess.run(
        [
            Path(sys.executable).with_name("shoal"),
            "sim",
            "--task=my_task:Spirals",
            "--peers=3",
            "--rounds=8",
            "--no-live",
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every claim held" in result.stdout


@pytest.mark.process
def test_the_loop_example_trains_alone_and_names_its_ticket(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", example("loop")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "others join with shoal1" in result.stdout
    assert float(result.stdout.rsplit("loss ", 1)[1]) < 0.1
