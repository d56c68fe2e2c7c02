"""`shoal doctor` on real machines: this one, with peers of its own, and every kind of host in the NAT lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from shoal.node.cli import main
from shoal.node.control import ControlClient
from shoal.node.datadir import DataDir
from shoal.node.doctor_gather import Wishes, gather
from shoal.node.relay_node import RelayNode
from shoal.node.ticket import Ticket
from shoal.sim import netlab
from shoal.transport.address import Address
from shoal.transport.errors import ConfigError
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

HERE = Address("tcp", "127.0.0.1", 0)


@pytest.mark.real
async def test_a_peer_tells_clock_line_and_whether_it_can_dial_us(tmp_path: Path) -> None:
    relay = RelayNode(RealHost(), Identity(os.urandom(32)), bind=(HERE,))
    data = DataDir(tmp_path / "data")
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        (at,) = relay.addresses()
        wishes = Wishes(at, hosts=("127.0.0.1",), ask_router=False, look_at_torch=False)
        facts = await gather(RealHost(), data, wishes)
        assert facts.peer is not None
        assert facts.peer.peer == relay.identity.peer_id.short
        assert facts.peer.rtt is not None and 0 < facts.peer.rtt < 1
        assert facts.peer.skew is not None and abs(facts.peer.skew) < 1
        assert facts.peer.rate is not None and facts.peer.rate > 1e6
        assert facts.state == "reachable"
        assert [answered for _, _, answered in facts.stun] == [True]
        assert facts.mapping == "none"
        assert relay.helping.answered == 1
        # it leaves nothing behind
        assert not (tmp_path / "data").exists()
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_nobody_there_is_a_fact_not_an_error(tmp_path: Path) -> None:
    wishes = Wishes(Address("tcp", "127.0.0.1", 9), hosts=("127.0.0.1",), ask_router=False, look_at_torch=False)
    facts = await gather(RealHost(), DataDir(tmp_path), wishes)
    assert facts.peer is not None
    assert facts.peer.peer == ""
    assert facts.peer.attempts == (("tcp://127.0.0.1:9", "connection refused (nobody listens there)"),)


@pytest.mark.real
async def test_a_stranger_to_a_private_swarm_learns_that(tmp_path: Path) -> None:
    relay = RelayNode(RealHost(), Identity(os.urandom(32)), bind=(HERE,), psk=b"k" * 32)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        (at,) = relay.addresses()
        for psk, peer in ((None, ""), (b"k" * 32, relay.identity.peer_id.short)):
            wishes = Wishes(at, psk, ("127.0.0.1",), ask_router=False, look_at_torch=False)
            facts = await gather(RealHost(), DataDir(tmp_path), wishes)
            assert facts.peer is not None and facts.peer.peer == peer
            if psk is None:
                assert "it belongs to a private swarm" in facts.peer.attempts[0][1]
        nursery.cancel_scope.cancel()


def test_local_checks_need_nothing_and_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--no-torch", "--no-port-mapping", "--host", "127.0.0.1", "--data-dir", str(tmp_path / "d")]
    assert main([*arguments, "--json"]) in (0, 3)
    report = json.loads(capsys.readouterr().out)
    found = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert found["connection"] == found["torch"] == "skipped"
    assert found["disk"] in ("ok", "warn")
    assert main(arguments) in (0, 3)
    text = capsys.readouterr().out
    assert "this machine" in text and "warnings, 0 failures" in text
    assert not (tmp_path / "d").exists()


def test_a_bad_target_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "nonsense"]) == 2
    assert "'nonsense' is not an address" in capsys.readouterr().err
    assert main(["doctor", "shoal1aaa"]) == 2


@pytest.mark.process
def test_a_running_node_is_asked_for_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [sys.executable, "-m", "shoal.node.process", "relay", "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen([*arguments, "--data-dir", str(tmp_path)], stdout=subprocess.DEVNULL) as child:
        try:
            give_up = time.monotonic() + 30
            while time.monotonic() < give_up:
                try:
                    ControlClient(DataDir(tmp_path)).health()
                    break
                except ConfigError:
                    time.sleep(0.1)
            assert main(["doctor", "--no-torch", "--json", "--host", "127.0.0.1", "--data-dir", str(tmp_path)]) == 3
            found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
            assert found["listening port"]["finding"].startswith(f"the running node (pid {child.pid})")
            assert found["listening port"]["level"] == "warn"
            assert "listens on this machine only" in found["port mapping"]["evidence"]
        finally:
            child.kill()


#: What doctor must find on each kind of host: check → (level, a word of the finding).
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "public": {"dial-back": ("ok", "strangers can"), "NAT mapping": ("ok", "no NAT"), "UDP": ("ok", "both ways")},
    "cone": {"dial-back": ("warn", "cannot"), "NAT mapping": ("ok", "cone"), "port mapping": ("warn", "no port")},
    "symmetric": {"dial-back": ("warn", "cannot"), "NAT mapping": ("warn", "symmetric"), "UDP": ("ok", "both ways")},
    "cgnat": {"dial-back": ("warn", "cannot"), "port mapping": ("warn", "no port")},
    "udp_blocked": {"UDP": ("warn", "no answer by UDP"), "dial-back": ("warn", "cannot")},
    "upnp": {
        "dial-back": ("ok", "strangers can"),
        "port mapping": ("ok", "gives a port"),
        "NAT mapping": ("ok", "cone"),
    },
    "ipv6": {
        "dial-back": ("ok", "strangers can"),
        "NAT mapping": ("ok", "no NAT"),
        "interfaces": ("ok", "public IPv6"),
    },
}


@pytest.mark.netns
@pytest.mark.skipif(netlab.unavailable("upnp") is not None, reason=f"no NAT lab: {netlab.unavailable('upnp')}")
def test_each_kind_of_host_gets_the_right_diagnosis(tmp_path: Path) -> None:
    shoal = (sys.executable, "-m", "shoal.node.process")
    children: list[subprocess.Popen[str]] = []
    with netlab.NetLab("doctor") as lab:
        try:
            relays = [lab.add("first", "public"), lab.add("second", "public")]
            addresses = [Address("tcp", text, 4001) for relay in relays for text in relay.addresses]
            for number, relay in enumerate(relays):
                command = [*shoal, "relay", "--data-dir", str(tmp_path / relay.name)]
                command += ["--via", str(addresses[0])] if number else []
                children.append(subprocess.Popen(lab.command(relay, *command), stdout=subprocess.PIPE, text=True))
                assert children[-1].stdout is not None
                assert children[-1].stdout.readline().startswith("relay ")
            ticket = Ticket(b"r" * 32, Identity(b"f" * 32).peer_id, tuple(addresses)).encode()
            patients = {}
            for kind in EXPECTED:
                host = lab.add(kind.replace("_", "-"), kind)
                command = [*shoal, "doctor", ticket, "--no-torch", "--json", "--data-dir", str(tmp_path / kind)]
                patients[kind] = subprocess.Popen(
                    lab.command(host, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                children.append(patients[kind])
            for kind, patient in patients.items():
                out, err = patient.communicate(timeout=90)
                assert patient.returncode in (0, 3), (kind, err)
                report = json.loads(out)
                found = {finding["check"]: finding for finding in report["findings"]}
                assert found["connection"]["level"] == "ok", (kind, found["connection"])
                for check, (level, word) in EXPECTED[kind].items():
                    assert found[check]["level"] == level, (kind, found[check])
                    assert word in found[check]["finding"], (kind, found[check])
                bad = any(level == "warn" for level, _ in EXPECTED[kind].values())
                assert patient.returncode == (3 if bad else 0), (kind, out)
        finally:
            for child in children:
                child.kill()
                child.communicate()
