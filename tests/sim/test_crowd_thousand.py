"""A thousand nodes in virtual time, as CI runs them; larger worlds are `shoal lab dht`'s."""

from __future__ import annotations

import functools

from shoal.sim.crowd import CrowdScenario, run_crowd
from shoal.sim.lab_dht import Plan, trial
from shoal.sim.lab_dht_report import success


def test_a_thousand_nodes_join_and_find_everything_in_few_hops() -> None:
    scenario = CrowdScenario(nodes=1000, seed=11, loss=0.005)
    plan = Plan(lookups=200, records=40, victims=0, seconds=10.0)
    report = run_crowd(scenario, functools.partial(trial, plan=plan, progress=lambda text: None))
    assert report.complaints() == []
    assert report.hops <= report.hops_allowed
    assert success(report.of("node")) == success(report.of("record")) == 1.0
    assert report.health.neighbours > 0.9
    assert report.memory_mib < 1500
