"""Real nodes in network namespaces whose kernel makes paths slow: rounds begin to go round a ring, and a peer that is
reached by several paths gets its bulk over all of them."""

from __future__ import annotations

import json
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


def shape(host: LabHost, *rules: str) -> None:
    """Have the kernel of ``host`` shape what it sends."""
    for rule in rules:
        done = subprocess.run(["tc", "-n", host.namespace, *rule.split()], capture_output=True, text=True, timeout=10)
        if done.returncode:
            pytest.skip(f"tc cannot shape here: {done.stderr.strip()}")


def limit(hosts: list[LabHost]) -> None:
    """What hosts send is shaped by their own kernel: all of it, and what goes to some other ones."""
    for number, host in enumerate(hosts):
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
        shape(host, *rules)


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


@needs_lab
@needs_tc
@pytest.mark.netns
@pytest.mark.parametrize("rates", [(40, 10), pytest.param((40, 40), marks=pytest.mark.slow)], ids=["unlike", "alike"])
def test_bulk_goes_over_all_paths_to_a_peer_and_each_carries_its_share(rates: tuple[int, int]) -> None:
    """Mbit/s of two paths, to the two addresses of one host: far from the short round trip at which one connection is
    enough on one path."""
    with NetLab("share") as lab, ExitStack() as stack:
        here, there = lab.add("here", "public4"), lab.add("there", "public4")
        assert there.four is not None
        second = there.four.rpartition(".")[0] + ".250"
        subprocess.run(["ip", "-n", there.namespace, *f"addr add {second}/24 dev eth0".split()], check=True, timeout=10)
        rules = [
            "qdisc add dev eth0 root handle 1: htb default 30",
            "class add dev eth0 parent 1: classid 1:30 htb rate 1gbit",
        ]
        for place, (address, rate) in enumerate(zip((there.four, second), rates, strict=True), 1):
            rules += [
                f"class add dev eth0 parent 1: classid 1:{place}0 htb rate {rate}mbit ceil {rate}mbit",
                f"qdisc add dev eth0 parent 1:{place}0 pfifo limit 100",
                f"filter add dev eth0 parent 1: protocol ip u32 match ip dst {address}/32 flowid 1:{place}0",
            ]
        shape(here, *rules)

        def child(host: LabHost, *arguments: str) -> subprocess.Popen[str]:
            command = lab.command(host, sys.executable, "-m", "tests.sim.paths_child", *arguments)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        serving = child(there, "serve", there.four, second)
        assert serving.stdout is not None
        peer, address = serving.stdout.readline().split()
        found = json.loads(child(here, "send", peer, address, "16", "14").communicate(timeout=90)[0])
    print(f"\n{rates}: {[f'{8 * rate / 1e6:.1f}' for rate in found['rates']]} Mbit/s, {found}")
    carried = found["carried"]
    assert set(carried) == {there.four, second}, found["reason"]
    last = found["rates"][len(found["rates"]) // 2 :]
    assert max(last) * 8 > 0.85e6 * sum(rates)  # of what both can carry; one alone does 38
    share = carried[there.four] / sum(carried.values())
    assert abs(share - rates[0] / sum(rates)) < 0.15
