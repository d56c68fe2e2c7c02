"""Two terminals by hand, as processes: start, join, look, stop, kill, resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shoal.node.control import ControlClient, NodeStatus
from shoal.node.datadir import DataDir
from shoal.transport.errors import ConfigError

pytestmark = pytest.mark.process

#: Seconds for anything that involves starting Python and torch on a busy machine.
PATIENCE = 90.0

TASK = """
import torch
from torch import nn
from shoal import Task

class Line(Task):
    width = 3
    def model(self):
        return nn.Linear(self.width, 1)
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.02)
    def batches(self, shard):
        rng = shard.generator("data")
        while True:
            yield torch.randn(8, self.width, generator=rng)
    def loss(self, model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    def evaluate(self, model):
        return {"error": float((model.weight - 1).abs().max())}

class Wider(Line):
    width = 4
"""


class Shoal:
    """A folder in which nodes are started; all of them end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._children: list[subprocess.Popen[str]] = []
        (folder / "line_task.py").write_text(TASK)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def spawn(self, *arguments: str, data: str) -> subprocess.Popen[str]:
        log = self.log(data).open("a")
        child = subprocess.Popen(
            [sys.executable, "-m", "shoal.node.process", *arguments, "--data-dir", str(self.folder / data)],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._children.append(child)
        return child

    def run(self, *arguments: str, data: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shoal.node.process", *arguments, "--data-dir", str(self.folder / data)],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    def log(self, data: str) -> Path:
        return self.folder / f"{data}.log"

    def client(self, data: str) -> ControlClient:
        return ControlClient(DataDir(self.folder / data), timeout=20.0)

    def until(self, data: str, condition: Callable[[NodeStatus], bool], what: str) -> NodeStatus:
        """The node's status, once ``condition`` holds for it."""
        give_up = time.monotonic() + PATIENCE
        status: NodeStatus | None = None
        while time.monotonic() < give_up:
            try:
                status = self.client(data).status()
            except ConfigError:
                pass
            else:
                if condition(status):
                    return status
            time.sleep(0.1)
        raise AssertionError(f"not within {PATIENCE:g} s: {what}; {status}\n{self.log(data).read_text()[-3000:]}")

    def rounds(self, data: str, count: int) -> NodeStatus:
        return self.until(data, lambda s: s.rounds >= count, f"{count} rounds of {data}")

    def end(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.wait()


@pytest.fixture
def shoal(tmp_path: Path) -> Iterator[Shoal]:
    made = Shoal(tmp_path)
    yield made
    made.end()


START = ("start", "line_task:Line", "--host", "127.0.0.1", "--set", "inner_steps=20")
JOIN = ("--task", "line_task:Line", "--host", "127.0.0.1")


def members(status: NodeStatus) -> int:
    return 0 if status.run is None else len(status.run.members)


def digest(status: NodeStatus) -> str:
    return "" if status.run is None else status.run.digest


def test_start_join_look_export_stop_and_resume(shoal: Shoal) -> None:
    founder = shoal.spawn(*START, data="a")
    first = shoal.rounds("a", 1)
    assert first.ticket.startswith("shoal1")
    assert "only processes on this machine" in first.reach
    assert first.ticket in shoal.log("a").read_text()

    joiner = shoal.spawn("join", first.ticket, *JOIN, data="b")
    shoal.rounds("b", 2)
    shoal.until("a", lambda s: members(s) == 2, "two members")
    # looking
    text = shoal.run("status", data="b").stdout
    for word in ("Line, diloco, available mode", "members", "2: ", "error", f"pid {joiner.pid}", "join with"):
        assert word in text
    assert json.loads(shoal.run("status", "--json", data="a").stdout)["run"]["task"] == "Line"
    found = json.loads(shoal.run("peers", "--json", data="a").stdout)
    peers, (seen,) = found["peers"], found["standings"]
    assert [peer["peer"] for peer in peers] == [shoal.client("b").status().peer] == [seen["peer"]]
    assert peers[0]["member"]
    assert 0 < seen["contributed"] <= seen["rounds"]
    assert (seen["lied"], seen["quality"]) == (0, None), "nothing is audited, the mean takes all alike"
    head, row = (line.split() for line in shoal.run("peers", data="b").stdout.splitlines())
    assert (head[:2], head[-2:]) == (["PEER", "ADDRESS"], ["ROUND", "CONTRIBUTED"])
    assert re.fullmatch(r"\d+/\d+", row[-1])
    # weights of a running node
    target = shoal.folder / "running.safetensors"
    assert shoal.run("export", str(target), data="b").returncode == 0
    assert safetensors.numpy.load_file(target)["weight"].shape == (1, 3)

    # Ctrl-C: goodbye, state saved, out within 2 s
    began = time.monotonic()
    joiner.send_signal(signal.SIGINT)
    assert joiner.wait(PATIENCE) == 0
    assert time.monotonic() - began < 2.0
    assert "saying goodbye" in shoal.log("b").read_text()
    # SIGTERM likewise, then both come back as who they were
    round_before = shoal.until("a", lambda s: members(s) == 1, "the founder to go on alone").rounds
    (seen,) = shoal.client("a").peers().standings
    alone = shoal.run("peers", data="a").stdout
    assert "no links: this node is alone so far" in alone
    assert f"{seen.peer[:8]}  {seen.round} " in alone and f" {seen.contributed}/{seen.rounds}" in alone
    founder.send_signal(signal.SIGTERM)
    assert founder.wait(PATIENCE) == 0
    exported = shoal.run("export", str(shoal.folder / "saved.safetensors"), data="a")
    assert exported.returncode == 0, exported.stderr
    assert "no node is running" in exported.stdout
    saved_round = int(re.search(r"round (\d+)", exported.stdout)[1])  # type: ignore[index]
    assert saved_round >= round_before

    shoal.spawn("start", data="a")
    again = shoal.rounds("a", 1)
    assert again.peer == first.peer
    assert again.run is not None
    assert first.run is not None
    assert again.run.run == first.run.run
    assert again.run.round > saved_round
    assert again.addresses == first.addresses
    assert shoal.client("a").peers().standings == (seen,), "what it saw in its first life"
    shoal.spawn("join", first.ticket, *JOIN, data="b")
    shoal.until("b", lambda s: members(s) == 2 and s.rounds >= 1, "the joiner to be back")
    assert shoal.run("stop", data="b").returncode == 0
    assert shoal.run("status", data="b").returncode == 2


def test_another_run_asked_for_in_a_used_data_directory_is_refused(shoal: Shoal) -> None:
    child = shoal.spawn(*START, "--rounds", "2", data="a")
    assert child.wait(PATIENCE) == 0
    assert "finished: all rounds are done" in shoal.log("a").read_text()
    done = shoal.run("start", "line_task:Line", "--strategy", "noloco", "--seed", "7", data="a")
    assert done.returncode == 2
    assert "--strategy noloco (it has diloco); --seed 7 (it has 0)" in done.stderr
    assert "another --data-dir" in done.stderr


def test_a_model_that_is_not_the_runs_is_refused_with_names_and_shapes(shoal: Shoal) -> None:
    shoal.spawn(*START, data="a")
    ticket = shoal.rounds("a", 1).ticket
    done = shoal.run("join", ticket, "--task", "line_task:Wider", "--host", "127.0.0.1", data="b")
    assert done.returncode == 2
    assert "weight" in done.stderr
    assert "1x4" in done.stderr
    assert "1x3" in done.stderr
    done = shoal.run("join", ticket, "--host", "127.0.0.1", data="c")
    assert done.returncode == 2
    assert "the run trains the task 'Line', which is not built in" in done.stderr
    assert "--task module:Class" in done.stderr


def test_a_killed_node_comes_back_into_its_run(shoal: Shoal) -> None:
    shoal.spawn(*START, data="a")
    ticket = shoal.rounds("a", 1).ticket
    victim = shoal.spawn("join", ticket, *JOIN, data="b")
    before = shoal.rounds("b", 2)
    victim.kill()
    victim.wait()
    with pytest.raises(ConfigError, match="no node is running"):
        shoal.client("b").status()
    shoal.spawn("start", data="b")  # no ticket, no task: the data directory knows
    after = shoal.until("b", lambda s: members(s) == 2 and s.rounds >= 2, "the killed node to be back")
    assert after.peer == before.peer
    a = shoal.client("a").status()
    assert a.run is not None
    assert a.run.run == (after.run.run if after.run else "")


def test_a_node_that_loses_a_bit_of_its_weights_heals_from_the_others_and_says_so(shoal: Shoal) -> None:
    left = {name: shoal.folder / f"{name}.safetensors" for name in "abc"}

    def export(name: str) -> tuple[str, str]:
        return "--export", str(left[name])

    children = [shoal.spawn(*START, "--min-peers", "3", "--rounds", "40", *export("a"), data="a")]
    ticket = shoal.until("a", lambda s: bool(s.ticket), "a ticket").ticket
    children.append(shoal.spawn("join", ticket, *JOIN, *export("b"), data="b"))
    children.append(shoal.spawn("join", ticket, *JOIN, *export("c"), "--fault", "flip:3", data="c"))
    # What a status says of a state may be of the round before; what they leave behind is final.
    assert [child.wait(PATIENCE) for child in children] == [0, 0, 0]
    one, *others = (load_file(path) for path in left.values())
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)
    about = [safe_open(path, framework="pt").metadata() for path in left.values()]  # with the digest of the whole state
    assert about[0]["round"] == "40"
    assert about[0] == about[1] == about[2]
    said = shoal.log("c").read_text()
    wrong = re.search(
        r"our state after round 3 is (\w{16}); 2 of 3 voters hold the state (\w{16}).*: loading theirs", said
    )
    assert wrong is not None and wrong[1] != wrong[2], said
    assert "our state is that of the others again, after round " in said
    assert "! loading another state: our state after round 3 is not that of the others" in said
    for name in "ab":
        assert "loading theirs" not in shoal.log(name).read_text()


def test_a_second_ctrl_c_ends_at_once(shoal: Shoal) -> None:
    child = shoal.spawn(*START, data="a")
    shoal.rounds("a", 1)
    child.send_signal(signal.SIGINT)
    # Two signals at once may arrive as one.
    give_up = time.monotonic() + PATIENCE
    while "saying goodbye" not in shoal.log("a").read_text() and time.monotonic() < give_up:
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    assert child.wait(10.0) in (0, 130)


def test_a_node_on_a_leash_ends_with_whoever_started_it(shoal: Shoal) -> None:
    arguments = [sys.executable, "-m", "shoal.node.process", *START, "--leash", "--data-dir", str(shoal.folder / "a")]
    with subprocess.Popen(
        arguments,
        cwd=shoal.folder,
        env=shoal.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            shoal.rounds("a", 1)
            assert child.stdin is not None
            child.stdin.close()
            code = child.wait(10.0)
            assert child.stderr is not None
            assert code == 0, child.stderr.read()
        finally:
            child.kill()


def round_of(status: NodeStatus) -> int:
    return 0 if status.run is None else status.run.round


def frozen(shoal: Shoal, seconds: float) -> int:
    """Stop a joined node for a while as a sleeping laptop would, wake it, wait until it trains again.

    Returns the rounds that the others did in the meantime.
    """
    shoal.spawn(*START, data="a")
    ticket = shoal.rounds("a", 1).ticket
    sleeper = shoal.spawn("join", ticket, *JOIN, data="b")
    shoal.rounds("b", 2)
    sleeper.send_signal(signal.SIGSTOP)
    asleep = round_of(shoal.client("a").status())
    time.sleep(seconds)
    awake = round_of(shoal.until("a", lambda s: members(s) == 1, "the others to go on without the sleeper"))
    sleeper.send_signal(signal.SIGCONT)
    shoal.until("b", lambda s: members(s) == 2 and round_of(s) > awake, "the sleeper to be back")
    return awake - asleep


@pytest.mark.slow
@pytest.mark.real(timeout=300)
def test_a_node_frozen_for_a_minute_rejoins(shoal: Shoal) -> None:
    assert frozen(shoal, 60.0) > 0
