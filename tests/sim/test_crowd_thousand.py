"""A thousand nodes in virtual time, as CI runs them; larger worlds are `shoal lab dht`'s."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from shoal.sim.crowd import CrowdScenario, run_crowd
from shoal.sim.lab_dht import Plan, trial
from shoal.sim.lab_dht_report import success


def main() -> None:
    scenario = CrowdScenario(nodes=1000, seed=11, loss=0.005)
    plan = Plan(lookups=200, records=40, victims=0, seconds=10.0)
    report = run_crowd(scenario, functools.partial(trial, plan=plan, progress=lambda text: None))
    found = {
        "complaints": report.complaints(),
        "hops": report.hops,
        "allowed": report.hops_allowed,
        "success": [success(report.of("node")), success(report.of("record"))],
        "neighbours": report.health.neighbours,
        "memory": report.memory_mib,
    }
    sys.stdout.write(json.dumps(found))


@pytest.mark.process
def test_a_thousand_nodes_join_and_find_everything_in_few_hops() -> None:
    # In a process of its own: its memory is measured.
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["complaints"] == []
    assert found["hops"] <= found["allowed"]
    assert found["success"] == [1.0, 1.0]
    assert found["neighbours"] > 0.9
    assert found["memory"] < 500  # 250 seen


if __name__ == "__main__":
    main()
