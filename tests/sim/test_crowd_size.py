"""A thousand nodes in virtual time, a few hundred in CI; larger worlds are `shoal lab dht`'s."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from shoal.sim.crowd import CrowdScenario, run_crowd
from shoal.sim.lab_dht import Plan, trial
from shoal.sim.lab_dht_report import success


def main(nodes: int) -> None:
    scenario = CrowdScenario(nodes=nodes, seed=11, loss=0.005)
    plan = Plan(lookups=100, records=20, victims=0, seconds=10.0)
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


@pytest.mark.process(computes=True)
@pytest.mark.parametrize(("nodes", "memory"), [(300, 200), pytest.param(1000, 500, marks=pytest.mark.slow)])
def test_hundreds_of_nodes_join_and_find_everything_in_few_hops(nodes: int, memory: int) -> None:
    """``memory``: MiB at most; 250 seen for 1000 nodes."""
    # In a process of its own: its memory is measured.
    done = subprocess.run(
        [sys.executable, __file__, str(nodes)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["complaints"] == []
    assert found["hops"] <= found["allowed"]
    assert found["success"] == [1.0, 1.0]
    assert found["neighbours"] > 0.9
    assert found["memory"] < memory


if __name__ == "__main__":
    main(int(sys.argv[1]))
