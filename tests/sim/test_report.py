"""The report says what happened, and its claims fail for the reason that is true."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from shoal.sim.report import (
    Baseline,
    Expectation,
    PeerOutcome,
    Report,
    RoundOutcome,
    SimEvent,
    judge,
)
from shoal.transport.errors import ConfigError

EXPECTED = Expectation(3, kills=1, late=1, identical=True, higher_is_better=True, at_least=0.95, above_isolated=0.1)


def good() -> Report:
    peers = (
        PeerOutcome("alice", "finished", 3, 300, 0.97, "d1", 10, 20),
        PeerOutcome("bob", "killed", 1, 100, None, "", 5, 5),
        PeerOutcome("carol", "finished", 3, 300, 0.97, "d1", 10, 20, late=True),
    )
    rounds = tuple(
        RoundOutcome(r, ("alice", "carol"), 0.1, int(r == 1), ("bob",) if r == 1 else (), "all came") for r in (1, 2, 3)
    )
    events = (SimEvent(1.0, 1, "combine", "kill", "bob"),)
    baseline = Baseline(0.1, 0.97, 0.6)
    return Report(
        True, (), "digits", "diloco", "available", 0, 9.5, "accuracy", baseline, 0.97, peers, rounds, events, ()
    )


def test_a_run_that_keeps_every_promise_is_ok() -> None:
    report = judge(good(), EXPECTED)
    assert report.ok
    assert report.why == ()
    assert len(report.claims) == 7


def test_a_differing_digest_fails_with_both_digests_shown() -> None:
    report = good()
    peers = (*report.peers[:2], attrs.evolve(report.peers[2], digest="d2"))
    report = judge(attrs.evolve(report, peers=peers), EXPECTED)
    assert not report.ok
    assert report.why == ("all surviving peers hold bit-identical weights: 2 peers, digest d1 d2",)


def test_peers_without_any_digest_are_not_identical() -> None:
    report = good()
    peers = tuple(attrs.evolve(peer, digest="") for peer in report.peers)
    assert not judge(attrs.evolve(report, peers=peers), EXPECTED).ok


def test_a_victim_that_no_round_names_fails() -> None:
    report = good()
    report = judge(attrs.evolve(report, rounds=tuple(attrs.evolve(r, dropped=()) for r in report.rounds)), EXPECTED)
    assert "no round names bob as dropped" in report.why[0]


def test_a_kill_outside_of_scatter_to_commit_fails() -> None:
    report = good()
    report = judge(attrs.evolve(report, events=(SimEvent(1.0, 1, "train", "kill", "bob"),)), EXPECTED)
    assert "killed in round 1 at train" in report.why[0]


def test_a_late_peer_with_too_few_rounds_fails() -> None:
    report = good()
    peers = (*report.peers[:2], attrs.evolve(report.peers[2], rounds=2))
    assert "carol committed 2" in judge(attrs.evolve(report, peers=peers), EXPECTED).why[0]


@pytest.mark.parametrize(
    ("swarm", "isolated", "failing"),
    [(0.94, 0.6, "at least 0.95"), (0.96, 0.87, "0.1 better than the mean of isolated"), (None, 0.6, "improves")],
)
def test_a_metric_that_falls_short_fails(swarm: float | None, isolated: float, failing: str) -> None:
    report = attrs.evolve(good(), swarm=swarm, baseline=Baseline(0.1, 0.97, isolated))
    assert failing in judge(report, EXPECTED).why[0]


def test_a_metric_where_less_is_better_is_compared_the_other_way() -> None:
    expected = Expectation(
        3, kills=1, late=1, identical=True, higher_is_better=False, above_isolated=0.1, beats_reference=True
    )
    baseline = Baseline(8.0, 2.4, 3.0, 2.9, "order-2 n-gram")
    assert judge(attrs.evolve(good(), swarm=2.5, baseline=baseline), expected).ok
    report = judge(attrs.evolve(good(), swarm=2.95, baseline=baseline), expected)
    assert [why.split(":")[0] for why in report.why] == [
        "accuracy is 0.1 better than the mean of isolated peers",
        "accuracy is better than the order-2 n-gram's",
    ]


def test_a_problem_on_the_way_fails_the_run_even_when_all_claims_hold() -> None:
    report = judge(good(), EXPECTED, ["node 3 died"])
    assert not report.ok
    assert report.why == ("node 3 died",)


def test_the_json_has_the_promised_fields_and_no_nan(tmp_path: Path) -> None:
    report = attrs.evolve(good(), baseline=Baseline(float("nan"), 0.9, None))
    report.write(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    for key in ("ok", "why", "task", "strategy", "seed", "wall_s", "metric", "baseline", "peers", "rounds", "events"):
        assert key in found
    assert set(found["baseline"]) >= {"start", "single", "isolated"}
    assert found["baseline"]["start"] is None
    assert set(found["peers"][0]) >= {
        "peer", "status", "rounds", "samples", "metric", "digest", "bytes_sent", "bytes_received"
    }  # fmt: skip
    assert set(found["rounds"][0]) >= {"round", "members", "wall_s", "retries", "dropped", "reason"}
    assert set(found["events"][0]) >= {"t", "round", "phase", "what", "peer"}


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere"):
        good().write(tmp_path / "nowhere" / "report.json")
