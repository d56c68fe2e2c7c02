"""What facts mean: every check by itself, and whole machines."""

from __future__ import annotations

import attrs
import pytest

from shoal.node.doctor import EXIT
from shoal.node.doctor_checks import LEVELS, Facts, Finding, PeerFacts, judge, worst
from shoal.transport.address import Address


def tcp(*hosts: str, port: int = 4001) -> tuple[Address, ...]:
    return tuple(Address("tcp", host, port) for host in hosts)


PEER = PeerFacts(
    "tcp://30.0.1.2:4001", (("tcp://30.0.1.2:4001", "abcdefgh answers after 9 ms"),), "abcdefgh", "direct", 0.009, 0.1,
    12e6, "", ("abcdefgh",),
)  # fmt: skip
#: A machine at home, all well.
HOME = Facts(
    addresses=tcp("192.168.1.7", "127.0.0.1"),
    listen=tcp("192.168.1.7", "127.0.0.1"),
    state="unreachable",
    reason="abcdefgh could not dial tcp://8.8.8.8:4001",
    external=tcp("8.8.8.8"),
    mapping="endpoint-independent",
    mapping_reason="both see the same",
    stun=(("tcp://30.0.1.2:4001", "sees tcp://8.8.8.8:4001", True),),
    gateway="192.168.1.1",
    port_mapping=(("PCP", "the router 192.168.1.1 does not answer"),),
    mtu=("eth0", 1500),
    data_dir="/d",
    disk_free=10**11,
    key="",
    torch=("2.13", ("cpu",)),
    peer=PEER,
)


SIX_ONLY = Facts(addresses=tcp("2a00::2", "127.0.0.1", "::1"))


def check(facts: Facts, name: str) -> Finding:
    (found,) = (finding for finding in judge(facts) if finding.check == name)
    return found


def changed(**changes: object) -> Facts:
    return attrs.evolve(HOME, **changes)  # type: ignore[arg-type]


def peer(**changes: object) -> Facts:
    return changed(peer=attrs.evolve(PEER, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "facts", "level", "words"),
    [
        ("interfaces", HOME, "ok", "none of them public"),
        ("interfaces", changed(addresses=tcp("30.0.1.2", "2a00::1")), "ok", "public IPv4 and IPv6"),
        ("interfaces", changed(addresses=tcp("127.0.0.1", "::1")), "fail", "no network"),
        ("listening port", HOME, "ok", "a test listens"),
        ("listening port", changed(running=77), "ok", "the running node (pid 77)"),
        ("listening port", changed(listen=(), listen_trouble="port 1 in use"), "fail", "port 1 in use"),
        ("listening port", changed(listen=tcp("127.0.0.1")), "warn", "this machine only"),
        ("MTU", HOME, "ok", "1500"),
        ("MTU", changed(mtu=("wg0", 1280)), "warn", "tunnel"),
        ("MTU", changed(mtu=None), "skipped", "not known"),
        ("UDP", HOME, "ok", "both ways"),
        ("UDP", changed(stun=(("tcp://30.0.1.2:4001", "no answer", False),)), "warn", "firewall drops UDP"),
        ("UDP", changed(stun=(), peer=None), "skipped", "needs a peer"),
        ("dial-back", HOME, "warn", "relays it knows, by itself (abcdefgh)"),
        ("dial-back", changed(external=()), "warn", "allow TCP and UDP port 4001"),
        ("dial-back", changed(mapped="tcp://8.8.8.8:4001"), "warn", "passes nothing on"),
        ("dial-back", changed(mapped="x", mapped_trouble="double NAT"), "warn", "no port can be forwarded here"),
        ("dial-back", changed(state="reachable", confirmed=tcp("8.8.8.8")), "ok", "strangers can dial"),
        ("dial-back", changed(state="reachable", external=(), confirmed=tcp("10.0.0.1")), "ok", "neighbours can dial"),
        ("dial-back", changed(state="unknown"), "skipped", "nobody could try"),
        ("dial-back", Facts(), "skipped", "needs a peer"),
        ("NAT mapping", HOME, "ok", "cone"),
        ("NAT mapping", changed(mapping="address-dependent"), "warn", "symmetric"),
        ("NAT mapping", changed(mapping="none", external=()), "ok", "no NAT"),
        ("NAT mapping", changed(mapping="unknown"), "ok", "takes two peers"),
        ("NAT mapping", changed(mapping=None, external=()), "ok", "no NAT on the way to that peer"),
        ("NAT mapping", Facts(), "skipped", "needs a peer"),
        ("NAT filtering", HOME, "ok", "addressed first"),
        ("NAT filtering", changed(state="reachable", mapped="x"), "ok", "the port that the router gave"),
        ("NAT filtering", changed(external=()), "skipped", "no NAT"),
        ("port mapping", HOME, "warn", "the router gives no port"),
        ("port mapping", changed(mapped="tcp://8.8.8.8:4001"), "ok", "tcp://8.8.8.8:4001"),
        ("port mapping", changed(mapped="x", mapped_trouble="there is a double NAT"), "warn", "double NAT"),
        ("port mapping", changed(addresses=tcp("30.0.1.2")), "ok", "gives no port"),
        ("port mapping", changed(port_mapping=None), "skipped", "not asked for"),
        ("relays", HOME, "ok", "1 peers relay"),
        ("relays", peer(candidates=()), "warn", "shoal relay"),
        ("relays", attrs.evolve(peer(candidates=()), state="reachable"), "ok", "no peer is known"),
        ("connection", HOME, "ok", "abcdefgh answers"),
        ("connection", changed(peer=None), "skipped", "no ticket"),
        (
            "connection",
            peer(peer="", attempts=(("tcp://10.0.0.1:1", "timed out"), ("tcp://127.0.0.1:1", "connection refused"))),
            "fail", "from its own network only",
        ),
        (
            "connection",
            peer(peer="", attempts=(("tcp://8.8.8.8:1", "it belongs to a private swarm, we to an open swarm"),)),
            "fail", "it carries the key",
        ),
        (
            "connection",
            peer(peer="", attempts=(("tcp://8.8.8.8:1", "it speaks wire version 3, we speak version 2"),)),
            "fail", "the same version of Shoal",
        ),
        (
            "connection",
            attrs.evolve(SIX_ONLY, peer=PeerFacts("shoal1…", (("tcp://30.0.1.2:1", "no route"),))),
            "fail", "this machine has no IPv4",
        ),
        (
            "connection",
            peer(peer="", attempts=(("tcp://127.0.0.1:80", "not a Shoal peer: its first bytes are 'HTTP'"),)),
            "fail", "another program listens there",
        ),
        (
            "connection",
            peer(peer="", attempts=(("tcp://10.0.0.1:1", "connection refused (nobody listens there)"),)),
            "fail", "is it running",
        ),
        ("dial-back", attrs.evolve(SIX_ONLY, peer=PeerFacts("shoal1…")), "skipped", "the peer was not reached"),
        ("NAT mapping", attrs.evolve(SIX_ONLY, peer=PeerFacts("shoal1…")), "skipped", "the peer was not reached"),
        ("UDP", attrs.evolve(SIX_ONLY, peer=PeerFacts("shoal1…")), "skipped", "the peer was not reached"),
        ("round trip", HOME, "ok", "9.0 ms"),
        ("round trip", peer(rtt=0.9), "warn", "900.0 ms"),
        ("throughput", HOME, "ok", "96.0 Mbit/s"),
        ("throughput", peer(rate=50_000.0), "warn", "0.4 Mbit/s"),
        ("throughput", peer(rate=None, trouble="not measured: refused"), "skipped", "refused"),
        ("clocks", HOME, "ok", "agree"),
        ("clocks", peer(skew=-40.0), "warn", "40.0 s behind"),
        ("clocks", peer(skew=4000.0), "fail", "NTP"),
        ("data directory", HOME, "ok", "no node runs"),
        ("data directory", changed(data_trouble="it is a file"), "fail", "it is a file"),
        ("keys", HOME, "ok", "the node's key,"),
        ("keys", changed(swarm_key=""), "ok", "private swarm"),
        ("keys", changed(key=None), "ok", "none yet"),
        ("keys", changed(swarm_key="can be read by others"), "fail", "can be read by others"),
        ("disk", HOME, "ok", "100.0 GB"),
        ("disk", changed(disk_free=10**9), "warn", "1.0 GB"),
        ("disk", changed(disk_free=10**7), "fail", "make room"),
        ("torch", HOME, "ok", "torch 2.13: cpu"),
        ("torch", changed(torch=None, torch_trouble="No module named 'torch'"), "fail", "No module named"),
        ("torch", changed(torch=None), "skipped", "not looked at"),
    ],
)  # fmt: skip
def test_each_fact_has_its_judgement(name: str, facts: Facts, level: str, words: str) -> None:
    found = check(facts, name)
    assert found.level == level, found
    assert words in f"{found.finding} {found.evidence} {found.advice}"


def test_whatever_is_wrong_comes_with_something_to_do_or_the_reason() -> None:
    for facts in (HOME, changed(torch=None, torch_trouble="x", disk_free=1, key="bad"), peer(peer="", attempts=())):
        for finding in judge(facts):
            if finding.level in ("warn", "fail"):
                assert finding.advice or finding.evidence, finding


def test_nothing_gathered_is_nothing_wrong_but_the_network() -> None:
    levels = {finding.check: finding.level for finding in judge(Facts())}
    assert [name for name in levels if levels[name] == "fail"] == ["interfaces"]


def test_the_worst_finding_gives_the_exit_code() -> None:
    assert worst(()) == "ok"
    assert [EXIT[level] for level in LEVELS] == [0, 0, 3, 1]
    assert worst(judge(HOME)) == "warn"
    assert worst(judge(changed(disk_free=1))) == "fail"
