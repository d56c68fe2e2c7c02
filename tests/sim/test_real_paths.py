"""Real nodes in network namespaces whose kernel makes single paths slow: rounds begin to go round a ring."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from shoal.sim.netlab import LabHost, NetLab, unavailable

needs_lab = pytest.mark.skipif(unavailable() is not None, reason=f"no NAT lab here: {unavailable()}")
needs_tc = pytest.mark.skipif(shutil.which("tc") is None, reason="no tc here")

#: Mbit/s of each line, and of the paths from one host to another that are slower.
LINE, PATH = 40, 3
SLOW = ((0, 2), (1, 0), (2, 0), (3, 1))
ROUNDS = 6


def limit(hosts: list[LabHost]) -> None:
    """What hosts send is shaped by their own kernel: all of it, and what goes to some other ones."""
    for number, host in enumerate(hosts):
        tc = ["tc", "-n", host.namespace]
        rules = [
            "qdisc add dev eth0 root handle 1: htb default 10",
            f"class add dev eth0 parent 1: classid 1:1 htb rate {LINE}mbit ceil {LINE}mbit",
            f"class add dev eth0 parent 1:1 classid 1:10 htb rate {LINE - PATH * 2}mbit ceil {LINE}mbit",
            f"class add dev eth0 parent 1:1 classid 1:20 htb rate {PATH}mbit ceil {PATH}mbit",
        ]
        rules += [
            f"filter add dev eth0 parent 1: protocol ip u32 match ip dst {hosts[to].four}/32 flowid 1:20"
            for one, to in SLOW
            if one == number
        ]
        for rule in rules:
            done = subprocess.run([*tc, *rule.split()], capture_output=True, text=True, timeout=10)
            if done.returncode:
                pytest.skip(f"tc cannot shape here: {done.stderr.strip()}")


@needs_lab
@needs_tc
@pytest.mark.slow
@pytest.mark.netns
def test_where_the_kernel_makes_paths_slow_rounds_come_to_go_round_a_ring(tmp_path: Path) -> None:
    with NetLab("paths") as lab, ExitStack() as stack:
        hosts = [lab.add(f"h{number}", "public4") for number in range(4)]
        limit(hosts)

        def start(number: int, *arguments: str) -> Path:
            host, said = hosts[number], tmp_path / f"said{number}"
            common = ["--threads", "1", "--evaluate-every", "100", "--no-port-mapping", "--data-dir"]
            command = [sys.executable, "-m", "shoal.sim.cli", *arguments, *common, str(tmp_path / f"data{number}")]
            with said.open("wb") as file:
                process = subprocess.Popen(
                    lab.command(host, *command, "--host", str(host.four)), stdout=file, stderr=subprocess.STDOUT
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return said

        said = start(0, "start", "stdlib", "--set", "inner_steps=1", "--min-peers", "4", "--rounds", str(ROUNDS))
        ticket = wait_for(said, r"shoal join (\S+)", 60.0)
        for number in (1, 2, 3):
            start(number, "join", ticket)
        wait_for(said, "(all rounds are done)", 300.0)
        seconds = [float(found) for found in re.findall(r"\d/6 .*?([\d.]+) s ", said.read_text())]
    assert len(seconds) == ROUNDS, said.read_text()
    print(f"\nexchange, seconds: {seconds}")
    # A slice of a quarter over the slow path takes 3 s in each phase; a ring has the time of the lines, 1.4 s in all.
    assert min(seconds[2:]) < 0.5 * seconds[0]
    assert min(seconds[2:]) < 6.0


def wait_for(file: Path, pattern: str, patience: float) -> str:
    """What ``pattern`` finds in what a node has said."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        found = re.search(pattern, file.read_text())
        if found is not None:
            return found[1]
        time.sleep(0.2)
    raise AssertionError(f"no {pattern!r} within {patience:g} s: {file.read_text()[-2000:]}")
