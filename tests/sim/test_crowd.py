"""Thousands of nodes in virtual time: here hundreds, and whether the trial tells the truth."""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from shoal.sim import cli
from shoal.sim.churn import Sessions
from shoal.sim.crowd import CrowdScenario, run_crowd
from shoal.sim.lab_dht import Plan, trial
from shoal.sim.lab_dht_report import Act, DhtReport, success
from shoal.sim.liars import Gang, grind
from shoal.sim.places import Places


def run(
    scenario: CrowdScenario, *, lookups: int = 60, records: int = 20, victims: int = 0, seconds: float = 6.0
) -> DhtReport:
    plan = Plan(lookups, records, victims, seconds)
    return run_crowd(scenario, functools.partial(trial, plan=plan, progress=lambda text: None))


def test_a_quiet_crowd_finds_everything_in_few_hops() -> None:
    report = run(CrowdScenario(nodes=80, seed=1, loss=0.005), lookups=80)
    assert report.complaints() == []
    assert success(report.of("node")) == success(report.of("record")) == 1.0
    assert report.health.alive == 1.0
    assert report.health.neighbours > 0.9
    assert 0.5 < report.health.size_estimate < 1.5
    assert report.stored > 15


@pytest.mark.process(computes=True)
def test_the_same_seed_gives_the_same_events_in_every_process() -> None:
    code = (
        "import functools\n"
        "from shoal.sim.crowd import CrowdScenario, run_crowd\n"
        "from shoal.sim.lab_dht import Plan, trial\n"
        "scenario = CrowdScenario(nodes=80, seed=3, session=300.0, adversaries=0.2, loss=0.02, traced=True)\n"
        "plan = Plan(20, 10, 0, 60.0)\n"
        "print(run_crowd(scenario, functools.partial(trial, plan=plan, progress=lambda text: None)).digest)\n"
    )
    digests = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        digests.append(done.stdout)
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64


def test_a_crowd_so_small_that_everybody_holds_everything_is_asked_all_the_same() -> None:
    report = run(CrowdScenario(nodes=8, seed=12), lookups=6, records=3)
    assert success(report.of("record")) == 1.0


def test_another_seed_gives_other_events() -> None:
    digests = [run(CrowdScenario(nodes=40, seed=seed), lookups=4).digest for seed in (1, 2)]
    assert digests[0] != digests[1]


def test_nodes_come_and_go_and_lookups_succeed() -> None:
    report = run(CrowdScenario(nodes=80, seed=4, session=600.0), lookups=80, seconds=300.0)
    assert report.departed > 20
    assert report.complaints() == []
    assert 0.7 < report.health.alive < 1.0


def test_disjoint_paths_find_what_liars_hide_from_one() -> None:
    report = run(CrowdScenario(nodes=200, seed=5, adversaries=0.2), lookups=200, records=40, victims=1, seconds=20.0)
    one, several, full = (success(report.of("record", mode)) for mode in ("single", "disjoint", "full"))
    assert several >= 0.95
    assert full >= 0.95
    assert one <= several
    # The record whose place 24 adversaries crowd is hidden from one path most of the time, and found by `get`.
    assert success(report.of("victim", "full")) > success(report.of("victim", "single"))


def test_encrypted_links_tell_the_same_story() -> None:
    plain, real = (run(CrowdScenario(nodes=24, seed=6, encrypted=encrypted), lookups=20) for encrypted in (False, True))
    for report in (plain, real):
        assert report.complaints() == []
    assert real.join_queries == pytest.approx(plain.join_queries, rel=0.25)
    assert statistics.median(act.seconds for act in real.of("node")) == pytest.approx(
        statistics.median(act.seconds for act in plain.of("node")), rel=0.5
    )


def test_sessions_have_their_mean_and_those_met_last_longer() -> None:
    sessions = Sessions(1800.0, random.Random(0))
    lengths = [sessions.length() for _ in range(40_000)]
    assert statistics.mean(lengths) == pytest.approx(1800, rel=0.05)
    assert statistics.median(lengths) < 900  # many short visits
    # In a stationary swarm the mean rest is E[X²] / 2 E[X].
    rest = statistics.mean(sessions.rest() for _ in range(40_000))
    assert rest == pytest.approx(statistics.mean(x * x for x in lengths) / (2 * 1800), rel=0.1)


def test_round_trips_are_those_of_the_internet() -> None:
    trips = []
    for seed in range(10):
        places = Places(random.Random(seed))
        for number in range(100):
            places.add(f"n{number}")
        rng = random.Random(seed)
        pairs = [rng.sample(range(100), 2) for _ in range(300)]
        trips += [places.latency(f"n{a}", f"n{b}") + places.latency(f"n{b}", f"n{a}") for a, b in pairs]
    cuts = statistics.quantiles(trips, n=100)
    assert 0.1 < cuts[49] < 0.18
    assert 0.22 < cuts[98] < 0.4


def test_ground_keys_are_closer_than_chance() -> None:
    place, found = 1 << 255, grind("seed", 1 << 255, 100, 5)
    from shoal.dht.kademlia.keys import node_key

    assert len({identity.peer_id for identity in found}) == 5
    assert all(node_key(identity.peer_id) ^ place < (1 << 256) // 100 for identity in found)


def test_accomplices_are_named_closest_first_as_a_full_search_finds_them() -> None:
    @attrs.define(eq=False)
    class Member:
        key: int
        running: bool = True

        @property
        def endpoint(self) -> Member:
            return self

        def record(self) -> int:
            return self.key

    gang, rng = Gang(), random.Random(7)
    keys = [rng.getrandbits(256) for _ in range(300)] + [(1 << 255) + n for n in range(40)]
    gang._keys = sorted((key, Member(key)) for key in keys)  # type: ignore[misc]
    for place in [rng.getrandbits(256) for _ in range(50)] + [1 << 255, (1 << 255) + 20, 0]:
        assert list(gang.closest(place)) == sorted(keys, key=lambda key: key ^ place)[:20]


def test_the_report_says_what_falls_short_and_survives_json(tmp_path: Path) -> None:
    report = run(CrowdScenario(nodes=40, seed=8), lookups=6)
    bad = tuple(attrs.evolve(act, ok=False, hops=99) for act in report.acts)
    worse = attrs.evolve(report, acts=(*bad, Act("node", "single", 0.0, True, 99, 1, 1.0, 1.0)))
    text = " ".join(worse.complaints())
    assert "99.00 hops" in text
    assert "of 3 lookups succeed, 99.9% required" in text
    loaded = json.loads(worse.to_json())
    assert loaded["complaints"] == worse.complaints()
    assert len(loaded["acts"]) == len(worse.acts)
    worse.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not math.isnan(worse.hops)


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, complaint in (
        (["--churn", "soon"], "'soon' is not a time"),
        (["--adversaries", "0.9"], "'0.9' is not a part"),
        (["--nodes", "0"], "0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["lab", "dht", *arguments])
        assert complaint in capsys.readouterr().err
    assert cli.main(["lab", "dht", "--nodes", "1000", "--encrypted"]) == 2
    assert "500 nodes at most" in capsys.readouterr().err
    assert cli.main(["lab", "dht", "--nodes", "50", "--adversaries", "0.2"]) == 2
    assert "at least 200 nodes" in capsys.readouterr().err
    assert cli.main(["lab", "dht", "--churn", "1s"]) == 2
    assert "a mean session of 1 s is too short" in capsys.readouterr().err
    for wrong, complaint in ((tmp_path / "no" / "x.json", "there is no folder"), (tmp_path, "it is a folder")):
        for option in ("--json", "--plot"):
            assert cli.main(["lab", "dht", option, str(wrong)]) == 2  # before anything runs
            assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_nodes_with_churn_and_liars() -> None:
    quiet = run(CrowdScenario(nodes=1000, seed=9, loss=0.005), lookups=1000, records=100, seconds=50.0)
    churning = run(
        CrowdScenario(nodes=1000, seed=9, session=1800.0, loss=0.005), lookups=600, records=100, seconds=1200.0
    )
    hostile = run(CrowdScenario(nodes=1000, seed=9, adversaries=0.2, loss=0.005), lookups=600, records=100, victims=4)
    for report in (quiet, churning, hostile):
        assert report.complaints() == []
