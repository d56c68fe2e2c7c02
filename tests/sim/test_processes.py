"""Real swarms of processes: what is planned, what is killed, what is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shoal.sim import defaults
from shoal.sim.attacks import check, resolve
from shoal.sim.liar import Lie
from shoal.sim.processes import KILL_PHASES, make_plan
from shoal.sim.report import GATHER_KILL_PHASES
from shoal.transport.errors import ConfigError

TASK = """
import torch
from torch import nn
from shoal import Task

class Line(Task):
    def model(self):
        return nn.Linear(3, 1)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.02)
    def batches(self, shard):
        rng = shard.generator("data")
        while True:
            yield torch.randn(8, 3, generator=rng)
    def loss(self, model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    def evaluate(self, model):
        return {"error": float((model.weight - 1).abs().max())}
    higher_is_better = False

class Failing(Line):
    def loss(self, model, batch):
        raise RuntimeError("this task cannot be trained")
"""


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_kills_beginners_in_the_exchange_and_leaves_late_ones_time(seed: int) -> None:
    plan = make_plan(peers=8, kill=2, late=2, rounds=16, seed=seed)
    assert plan == make_plan(peers=8, kill=2, late=2, rounds=16, seed=seed)
    assert plan.first == 6
    assert len({kill.name for kill in plan.kills}) == 2
    for kill in plan.kills:
        assert kill.name in plan.names[:6]
        assert kill.phase in KILL_PHASES
        assert 2 <= kill.round <= 8
    assert [late.name for late in plan.late] == list(plan.names[6:])
    for late in plan.late:
        assert 1 <= late.round <= 16 - defaults.LATE_MARGIN


def test_seeds_differ_in_victim_round_and_phase() -> None:
    kills = [make_plan(peers=8, kill=1, late=1, rounds=20, seed=seed).kills[0] for seed in range(40)]
    assert len({kill.name for kill in kills}) > 4
    assert len({kill.round for kill in kills}) > 4
    assert {kill.phase for kill in kills} == set(KILL_PHASES)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"peers": 2, "kill": 0, "late": 2, "rounds": 20}, "--late 2 of --peers 2 leaves nobody"),
        ({"peers": 3, "kill": 3, "late": 0, "rounds": 20}, "--kill 3 leaves none of the 3 peers"),
        ({"peers": 3, "kill": 0, "late": 1, "rounds": 4}, "--late needs at least"),
        ({"peers": 3, "kill": 1, "late": 0, "rounds": 2}, "--kill needs at least 3 rounds"),
        ({"peers": 5, "kill": 1, "late": 0, "rounds": 9, "liars": 2}, "--byzantine 2 of 4 peers"),
    ],
)
def test_numbers_that_leave_no_swarm_are_refused(numbers: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(**numbers, seed=0)


def test_liars_are_neither_the_founder_nor_killed_nor_late() -> None:
    for seed in range(20):
        plan = make_plan(peers=9, kill=2, late=1, rounds=20, seed=seed, liars=2, attack="alie")
        assert len(plan.liars) == 2
        assert not {*plan.liars} & {plan.names[0], *(kill.name for kill in plan.kills), *plan.names[plan.first :]}


def test_a_lie_is_the_attack_on_what_its_node_knows() -> None:
    lie, work = Lie(resolve("replay:factor=2")), torch.tensor([1.0, -2.0])
    assert torch.equal(lie(1, work), torch.tensor([-2.0, 4.0]))  # no result yet
    lie.saw(torch.tensor([5.0, 5.0]))
    assert torch.equal(lie(2, work), torch.tensor([-10.0, -10.0]))
    noise = Lie(resolve("gaussian"))
    assert torch.equal(noise(3, work), Lie(resolve("gaussian"))(3, work))
    assert not torch.equal(noise(3, work), noise(4, work))
    assert torch.equal(work, torch.tensor([1.0, -2.0]))


@pytest.mark.process
def test_one_liar_ruins_the_mean_and_not_a_robust_rule(tmp_path: Path) -> None:
    errors = {}
    for rule in ("mean", "median"):
        folder = tmp_path / rule
        folder.mkdir()
        arguments = ["--task", "line_task:Line", "--peers", "4", "--byzantine", "1:gaussian", "--aggregator", rule]
        arguments += ["--rounds", "10", "--set", "inner_steps=100", "--json", str(folder / "report.json")]
        with shoal_sim(folder, *arguments) as child:
            output, _ = child.communicate(timeout=110)
        assert child.returncode == 0, output[-3000:]
        assert "node-3 lies: gaussian" in output
        report = json.loads((folder / "report.json").read_text())
        assert [peer["status"] for peer in report["peers"]] == ["finished"] * 4
        assert len({peer["digest"] for peer in report["peers"]}) == 1
        errors[rule] = report["swarm"]
    assert errors["median"] < errors["mean"] / 3, errors


@pytest.mark.process
def test_a_lying_owner_is_found_out_by_real_processes_and_the_swarm_goes_on_without_it(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    arguments = ["--peers", "5", "--byzantine", "1:lying_owner", "--aggregator", "median", "--rounds", "8"]
    with shoal_sim(tmp_path, *arguments, "--audit", "4", "--json", str(report_file)) as child:
        output, _ = child.communicate(timeout=110)
    assert child.returncode == 0, output
    assert "node-4 lies: lying_owner" in output and "expels" in output
    report = json.loads(report_file.read_text())
    assert sorted(peer["status"] for peer in report["peers"]) == ["expelled", *["finished"] * 4]
    assert any("found out and expelled" in claim["claim"] and claim["ok"] for claim in report["claims"])


@pytest.mark.parametrize("attack", ["lying_owner", "lying_digest", "alie:tau=1.2"])
def test_attacks_of_processes_are_known(attack: str) -> None:
    check(attack)


@pytest.mark.parametrize("attack", ["nonsense", "lying_owner:f=1", "alie:tau=x"])
def test_other_attacks_are_refused_by_name(attack: str) -> None:
    with pytest.raises(ConfigError, match=attack.partition(":")[0]):
        check(attack)


# --- whole swarms -----------------------------------------------------------------------------------------------------


def shoal_sim(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "line_task.py").write_text(TASK)
    return subprocess.Popen(
        [sys.executable, "-m", "shoal.sim.cli", "sim", "--no-live", "--workdir", str(folder / "work"), *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def nodes_of(folder: Path) -> list[int]:
    """Pids of processes whose command line names ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command and b"shoal.node.process" in command:
                found.append(int(entry.name))
    return found


@pytest.mark.process
def test_a_swarm_survives_a_kill_and_takes_in_a_late_peer(tmp_path: Path) -> None:
    report_file, plot_file = tmp_path / "report.json", tmp_path / "plot.png"
    arguments = ["--task", "line_task:Line", "--peers", "4", "--kill", "1", "--late", "1", "--rounds", "14"]
    arguments += ["--set", "inner_steps=100", "--json", str(report_file), "--plot", str(plot_file)]
    with shoal_sim(tmp_path, *arguments) as child:
        output, _ = child.communicate(timeout=110)
    assert child.returncode == 0, output
    assert "every claim held" in output
    report = json.loads(report_file.read_text())
    assert report["ok"]
    assert report["why"] == []
    assert (report["task"], report["strategy"], report["seed"]) == ("line_task:Line", "diloco", 0)
    assert report["metric"] == "error"
    assert report["baseline"]["start"] > report["swarm"]
    by_status = {status: [p for p in report["peers"] if p["status"] == status] for status in ("finished", "killed")}
    assert (len(by_status["finished"]), len(by_status["killed"])) == (3, 1)
    assert len({peer["digest"] for peer in by_status["finished"]}) == 1
    assert all(peer["bytes_sent"] > 0 and peer["samples"] > 0 for peer in by_status["finished"])
    victim = by_status["killed"][0]["peer"]
    kill = next(event for event in report["events"] if event["what"] == "kill")
    assert kill["peer"] == victim
    assert kill["phase"] in KILL_PHASES
    assert any(victim in r["dropped"] for r in report["rounds"])
    late = next(peer for peer in report["peers"] if peer["late"])
    assert late["rounds"] >= 3
    assert next(event for event in report["events"] if event["what"] == "late")["peer"] == late["peer"]
    assert [r["round"] for r in report["rounds"]] == list(range(1, 15))
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    assert nodes_of(tmp_path) == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("task", "more"),
    # Pre-training in every process, and four baselines of the same samples.
    [("line_task:Line", ("--set", "lr=0.05")), pytest.param("digits-finetune", (), marks=pytest.mark.slow)],
)
def test_a_swarm_that_exchanges_bytes_survives_a_sigkill_and_takes_in_a_late_peer(
    tmp_path: Path, task: str, more: tuple[str, ...]
) -> None:
    report_file = tmp_path / "report.json"
    arguments = ["--task", task, "--strategy", "spsa", "--peers", "4", "--kill", "1", "--late", "1", "--rounds", "24"]
    with shoal_sim(tmp_path, *arguments, *more, "--json", str(report_file)) as child:
        output, _ = child.communicate(timeout=240 if "digits" in task else 110)
    assert child.returncode == 0, output
    assert "every claim held" in output and "bytes of gradients in all" in output
    report = json.loads(report_file.read_text())
    if task == "digits-finetune":
        assert report["baseline"]["start"] <= 0.86 and report["swarm"] >= 0.93
    payloads = [r["payload"] for r in report["rounds"]]
    assert len(payloads) == 24 and sum(payloads) <= 2048
    assert all(payload == 8 * len(r["members"]) for payload, r in zip(payloads, report["rounds"], strict=True))
    finished = [peer for peer in report["peers"] if peer["status"] == "finished"]
    assert len(finished) == 3 and len({peer["digest"] for peer in finished}) == 1
    assert next(event for event in report["events"] if event["what"] == "kill")["phase"] in GATHER_KILL_PHASES


@pytest.mark.process
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])  # another moment
def test_survivors_of_a_sigkill_at_any_moment_end_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    report_file = tmp_path / "report.json"
    arguments = ["--task", "line_task:Line", "--peers", "4", "--kill", "0", "--late", "0", "--rounds", "60"]
    with shoal_sim(tmp_path, *arguments, "--set", "inner_steps=20", "--json", str(report_file)) as child:
        assert child.stdout is not None
        output = ""
        while "round 3/" not in output:
            line = child.stdout.readline()
            assert line, output
            output += line
        time.sleep(draw.uniform(0.0, 1.0))
        os.kill(draw.choice(sorted(nodes_of(tmp_path))), signal.SIGKILL)
        rest, _ = child.communicate(timeout=110)
    report = json.loads(report_file.read_text())
    finished = [peer for peer in report["peers"] if peer["status"] == "finished"]
    assert len(finished) == 3, output + rest
    assert len({peer["digest"] for peer in finished}) == 1
    assert "" not in {peer["digest"] for peer in finished}
    # nobody had announced this death: it is a failure, and it is named
    assert child.returncode == 1
    assert any("signal SIGKILL" in why for why in report["why"])
    victim = next(peer["peer"] for peer in report["peers"] if peer["status"] == "failed")
    assert any(victim in r["dropped"] for r in report["rounds"])


@pytest.mark.process
def test_ctrl_c_ends_all_nodes(tmp_path: Path) -> None:
    with shoal_sim(tmp_path, "--task", "line_task:Line", "--peers", "2", "--rounds", "100000") as child:
        give_up = time.monotonic() + 90
        assert child.stdout is not None
        while "round 3/" not in child.stdout.readline():
            assert time.monotonic() < give_up
        assert len(nodes_of(tmp_path)) == 2
        child.send_signal(signal.SIGINT)
        # Read on: a full pipe would hold it back, and rounds of this task are many a second.
        child.communicate(timeout=20)
        assert child.returncode == 130
    assert nodes_of(tmp_path) == []


@pytest.mark.process
def test_a_killed_simulation_leaves_no_nodes(tmp_path: Path) -> None:
    with shoal_sim(tmp_path, "--task", "line_task:Line", "--peers", "2", "--rounds", "100000") as child:
        give_up = time.monotonic() + 90
        assert child.stdout is not None
        while "round 3/" not in child.stdout.readline():
            assert time.monotonic() < give_up
        child.kill()
        give_up = time.monotonic() + 20
        while nodes_of(tmp_path):
            assert time.monotonic() < give_up
            time.sleep(0.1)


@pytest.mark.process
def test_a_task_that_fails_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    with shoal_sim(tmp_path, "--task", "line_task:Failing", "--peers", "2", "--rounds", "3") as child:
        output, _ = child.communicate(timeout=110)
    assert child.returncode == 1
    assert "this task cannot be trained" in output
    assert str(tmp_path / "work" / "node-0.log") in output
    assert nodes_of(tmp_path) == []


@pytest.mark.process
def test_an_unknown_task_is_bad_input(tmp_path: Path) -> None:
    with shoal_sim(tmp_path, "--task", "digitz", "--peers", "2", "--rounds", "3") as child:
        output, _ = child.communicate(timeout=110)
    assert child.returncode == 2, output
    assert "unknown task 'digitz': built-in tasks are" in output
