"""What the facts about a machine and its network mean: pure judgements, each with evidence and what to do."""

from __future__ import annotations

from typing import Literal

import attrs

from ..transport.address import Address, scope_of
from . import defaults

Level = Literal["ok", "warn", "fail", "skipped"]
LEVELS: tuple[Level, ...] = ("skipped", "ok", "warn", "fail")


@attrs.frozen
class Finding:
    """One check. ``finding``: a sentence; ``evidence``: what was seen; ``advice``: what to do, empty when nothing."""

    group: str
    check: str
    level: Level
    finding: str
    evidence: str = ""
    advice: str = ""


@attrs.frozen
class PeerFacts:
    """What came of trying a peer. ``target``: as given. ``attempts``: (address, what happened) of every address.

    ``peer``: who answered (empty: nobody). ``way`` and ``rtt`` (seconds) of the link. ``skew``: seconds their clock is
    ahead of ours; ``rate``: bytes per second that they took from us. None: not measured, ``trouble`` may say why.
    ``candidates``: peers that relay, as far as it knows.
    """

    target: str
    attempts: tuple[tuple[str, str], ...] = ()
    peer: str = ""
    way: str = ""
    rtt: float | None = None
    skew: float | None = None
    rate: float | None = None
    trouble: str = ""
    candidates: tuple[str, ...] = ()


@attrs.frozen
class Facts:
    """Everything that was gathered. None: not gathered.

    ``addresses``: of the interfaces. ``listen``: where it listens, ``listen_trouble``: why it does not; ``running``:
    the pid of the node that runs in the data directory. ``state``, ``reason``, ``external``, ``confirmed``: of the
    dial-back. ``mapping``: how a NAT maps UDP, with the reason. ``stun``: (observer, what it saw or the trouble).
    ``gateway``: the router. ``port_mapping``: (method, what came of it); ``mapped``: the address gained,
    ``mapped_trouble``: why it does not help.
    ``mtu``: (interface, bytes). ``disk_free``: bytes. ``key`` and ``swarm_key``: what is wrong with them, empty: fine,
    None: none there. ``torch``: (version, devices), or the trouble.
    """

    addresses: tuple[Address, ...] = ()
    listen: tuple[Address, ...] = ()
    listen_trouble: str = ""
    running: int | None = None
    state: str | None = None
    reason: str = ""
    external: tuple[Address, ...] = ()
    confirmed: tuple[Address, ...] = ()
    mapping: str | None = None
    mapping_reason: str = ""
    stun: tuple[tuple[str, str, bool], ...] = ()
    gateway: str | None = None
    port_mapping: tuple[tuple[str, str], ...] | None = None
    mapped: str = ""
    mapped_trouble: str = ""
    mtu: tuple[str, int] | None = None
    data_dir: str = ""
    data_trouble: str = ""
    disk_free: int | None = None
    key: str | None = None
    swarm_key: str | None = None
    torch: tuple[str, tuple[str, ...]] | None = None
    torch_trouble: str = ""
    peer: PeerFacts | None = None


NETWORK, REACH, PEER, MACHINE = "network", "can others reach this machine", "the peer", "this machine"
_NO_PEER = "needs a peer to ask: give a ticket, or the address of a relay"
_NOT_REACHED = "the peer was not reached"
_RELAY = "others reach it through a relay: run `shoal relay` on a machine with a public address, then --via ITS_ADDRESS"


def judge(facts: Facts) -> tuple[Finding, ...]:
    """All checks, in the order of the output."""
    checks = (
        interfaces, listening, gateway_and_mtu, udp,
        dial_back, nat_mapping, nat_filtering, port_mapping, relays,
        peer_reached, round_trip, throughput, clock,
        data_directory, keys, disk, torch,
    )  # fmt: skip
    return tuple(check(facts) for check in checks)


def worst(findings: tuple[Finding, ...]) -> Level:
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def _nobody_asked(facts: Facts) -> str:
    """Why a check that takes a peer was not made."""
    return _NO_PEER if facts.peer is None else _NOT_REACHED


def _listed(addresses: tuple[Address, ...]) -> str:
    """Without loopback ones, unless there are no others."""
    others = [address for address in addresses if scope_of(address) != "loopback"]
    return ", ".join(str(address) for address in others or addresses)


def _relay_advice(facts: Facts) -> str:
    known = facts.peer.candidates if facts.peer is not None else ()
    if known:
        return f"a node here is reached through the relays it knows, by itself ({', '.join(known)})"
    return _RELAY


def _public(addresses: tuple[Address, ...], six: bool | None = None) -> tuple[Address, ...]:
    return tuple(a for a in addresses if scope_of(a) == "public" and (six is None or (":" in a.host) == six))


def interfaces(facts: Facts) -> Finding:
    found = tuple(a for a in facts.addresses if scope_of(a) != "loopback")
    hosts = ", ".join(f"{a.host} ({scope_of(a)})" for a in found)
    if not found:
        return Finding(
            NETWORK, "interfaces", "fail", "no network: the only addresses are loopback ones", "",
            "connect this machine to a network",
        )  # fmt: skip
    versions = [name for six, name in ((False, "IPv4"), (True, "IPv6")) if any((":" in a.host) == six for a in found)]
    public = [name for six, name in ((False, "IPv4"), (True, "IPv6")) if _public(found, six)]
    what = " and ".join(versions) + (f"; public {' and '.join(public)}" if public else "; none of them public")
    return Finding(NETWORK, "interfaces", "ok", what, hosts)


def listening(facts: Facts) -> Finding:
    if facts.listen_trouble:
        return Finding(NETWORK, "listening port", "fail", "cannot listen", facts.listen_trouble)
    if not facts.listen:
        return Finding(NETWORK, "listening port", "skipped", "nothing was listened at")
    who = f"the running node (pid {facts.running})" if facts.running is not None else "a test"
    only_here = all(scope_of(a) == "loopback" for a in facts.listen)
    if only_here:
        return Finding(
            NETWORK, "listening port", "warn", f"{who} listens on this machine only", _listed(facts.listen),
            "start without --host 127.0.0.1 to be reached by others",
        )  # fmt: skip
    return Finding(NETWORK, "listening port", "ok", f"{who} listens", _listed(facts.listen))


def gateway_and_mtu(facts: Facts) -> Finding:
    if facts.mtu is None:
        return Finding(NETWORK, "MTU", "skipped", "not known on this system")
    name, size = facts.mtu
    seen = f"{size} bytes on {name}" + (f", gateway {facts.gateway}" if facts.gateway else "")
    if size < defaults.SMALL_MTU:
        return Finding(
            NETWORK, "MTU", "warn", f"packets of at most {size} bytes: a tunnel or VPN is on the way", seen,
            "if links come up and then hang, lower the MTU of this interface or let ICMP through the firewall",
        )  # fmt: skip
    return Finding(NETWORK, "MTU", "ok", f"packets of up to {size} bytes", seen)


def udp(facts: Facts) -> Finding:
    if not facts.stun:
        met = facts.peer is not None and facts.peer.peer
        return Finding(NETWORK, "UDP", "skipped", "the peer answers no STUN" if met else _nobody_asked(facts))
    said = "; ".join(f"{observer}: {text}" for observer, text, _ in facts.stun)
    if any(answered for _, _, answered in facts.stun):
        return Finding(NETWORK, "UDP", "ok", "UDP passes both ways", said)
    return Finding(
        NETWORK, "UDP", "warn", "no answer by UDP, though TCP reaches the same machine", said,
        "a firewall drops UDP: WebRTC cannot be used from here; direct links, hole punching by TCP and relays can",
    )  # fmt: skip


def dial_back(facts: Facts) -> Finding:
    if facts.state is None or (facts.state == "unknown" and facts.peer is None and facts.running is None):
        return Finding(REACH, "dial-back", "skipped", _nobody_asked(facts))
    outside = _public(facts.confirmed)
    if facts.state == "reachable" and (outside or not facts.external):
        far = "strangers" if outside else "neighbours"
        return Finding(REACH, "dial-back", "ok", f"{far} can dial this machine", facts.reason)
    if facts.state == "unreachable":
        return Finding(REACH, "dial-back", "warn", "strangers cannot dial this machine", facts.reason, _advice(facts))
    return Finding(REACH, "dial-back", "skipped", "nobody could try", facts.reason or "no peer answered")


def _advice(facts: Facts) -> str:
    port = facts.listen[0].port if facts.listen else 0
    if facts.mapped and not facts.mapped_trouble:
        return "the router gives a port (see below) and passes nothing on to it: look at its firewall settings"
    if not facts.external:
        return f"a firewall drops what comes in: allow TCP and UDP port {port} on this machine"
    if facts.mapped_trouble:
        return f"no port can be forwarded here ({facts.mapped_trouble}); {_relay_advice(facts)}"
    forward = f"to be reached directly, switch on UPnP or NAT-PMP at the router, or forward TCP port {port} to here"
    return f"{forward}; otherwise {_relay_advice(facts)}"


def nat_mapping(facts: Facts) -> Finding:
    check = "NAT mapping"
    if facts.mapping is None or (facts.mapping == "unknown" and not facts.external):
        if facts.state is not None and facts.peer is not None and not facts.external and facts.peer.peer:
            return Finding(REACH, check, "ok", "no NAT on the way to that peer", "it sees our own address")
        return Finding(REACH, check, "skipped", facts.mapping_reason or _nobody_asked(facts))
    match facts.mapping:
        case "none":
            return Finding(REACH, check, "ok", "no NAT", facts.mapping_reason)
        case "endpoint-independent":
            return Finding(
                REACH, check, "ok", "a NAT that keeps the port (cone): hole punching works with most peers",
                facts.mapping_reason,
            )  # fmt: skip
        case "address-dependent":
            return Finding(
                REACH, check, "warn", "a NAT with another port for every peer (symmetric): holes cannot be punched",
                facts.mapping_reason, _relay_advice(facts),
            )  # fmt: skip
        case _:
            seen = _listed(facts.external)
            return Finding(
                REACH, check, "ok", "a NAT; of which kind takes two peers on different addresses to tell",
                f"others see {seen}" if seen else facts.mapping_reason,
            )  # fmt: skip


def nat_filtering(facts: Facts) -> Finding:
    check = "NAT filtering"
    if not facts.external:
        asked = facts.state not in (None, "unknown")
        return Finding(REACH, check, "skipped", "no NAT was seen" if asked else _nobody_asked(facts))
    if facts.state == "unreachable":
        return Finding(
            REACH,
            check,
            "ok",
            "the NAT lets in only answers of peers that were addressed first, as usual",
            facts.reason,
        )
    if facts.state == "reachable" and facts.mapped:
        return Finding(REACH, check, "ok", "the NAT lets strangers in at the port that the router gave", facts.reason)
    if facts.state == "reachable":
        return Finding(REACH, check, "ok", "the NAT lets strangers in at the listening port", facts.reason)
    return Finding(REACH, check, "skipped", "nobody could try", facts.reason)


def port_mapping(facts: Facts) -> Finding:
    check = "port mapping"
    if facts.port_mapping is None:
        return Finding(REACH, check, "skipped", facts.mapped_trouble or "not asked for")
    said = "; ".join(f"{method}: {text}" for method, text in facts.port_mapping)
    if facts.mapped and facts.mapped_trouble:
        return Finding(REACH, check, "warn", facts.mapped_trouble, said, _relay_advice(facts))
    if facts.mapped:
        return Finding(REACH, check, "ok", f"the router gives a port: {facts.mapped}", said)
    needed = not _public(facts.addresses, six=False) and facts.state != "reachable"
    return Finding(
        REACH, check, "warn" if needed else "ok",
        "the router gives no port" if facts.gateway else "no router to ask for a port", said,
        "switch on UPnP, NAT-PMP or PCP in the router's settings" if needed and facts.gateway else "",
    )  # fmt: skip


def relays(facts: Facts) -> Finding:
    check = "relays"
    known = facts.peer.candidates if facts.peer is not None else ()
    if known:
        return Finding(REACH, check, "ok", f"{len(known)} peers relay for others", ", ".join(known))
    if facts.peer is None or not facts.peer.peer:
        return Finding(REACH, check, "skipped", _nobody_asked(facts))
    needed = facts.state == "unreachable"
    return Finding(
        REACH, check, "warn" if needed else "ok", "no peer is known that relays", "",
        f"without one, two machines like this cannot meet where punching fails; {_RELAY}" if needed else "",
    )  # fmt: skip


def peer_reached(facts: Facts) -> Finding:
    check = "connection"
    if facts.peer is None:
        return Finding(PEER, check, "skipped", "no ticket and no address was given")
    tried = "; ".join(f"{address}: {what}" for address, what in facts.peer.attempts)
    if facts.peer.peer:
        return Finding(PEER, check, "ok", f"{facts.peer.peer} answers", tried)
    advice = "is it running, and is the ticket (or address) a recent one?"
    if "swarm" in tried:
        advice = "take the ticket of that swarm: it carries the key"
    elif "wire version" in tried:
        advice = "run the same version of Shoal on both machines"
    elif "not a Shoal peer" in tried:
        advice = "another program listens there: is it the port that the peer shows?"
    elif other := _other_version(facts):
        advice = (
            f"this machine has no {other}, and the peer is known by {other} only: they meet through a relay that has "
            "IPv4 and IPv6 (`shoal relay`); start the run with --via both of its addresses"
        )
    elif _only_private(facts.peer):
        advice = f"all its addresses are private, so it can be reached from its own network only; {_RELAY}"
    return Finding(PEER, check, "fail", "nobody was reached", tried, advice)


def _other_version(facts: Facts) -> str:
    """The IP version of all the peer's addresses but loopback ones, if this machine does not have it; else empty."""
    assert facts.peer is not None
    tried = [Address.parse(address) for address, _ in facts.peer.attempts]
    theirs = {":" in address.host for address in tried if scope_of(address) != "loopback"}
    own = {":" in address.host for address in facts.addresses if scope_of(address) not in ("loopback", "link")}
    if not own or not theirs or own & theirs:
        return ""
    return "IPv6" if True in theirs else "IPv4"


def _only_private(peer: PeerFacts) -> bool:
    """It is known by private addresses alone, and nothing at them says that its machine is in this network.

    A ticket's loopback address says nothing: whatever refuses there is this machine.
    """
    others = [(address, why) for address, why in peer.attempts if scope_of(Address.parse(address)) != "loopback"]
    private = all(scope_of(Address.parse(address)) != "public" for address, _ in others)
    return bool(others) and private and not any("refused" in why for _, why in others)


def round_trip(facts: Facts) -> Finding:
    check = "round trip"
    if facts.peer is None or facts.peer.rtt is None:
        return Finding(PEER, check, "skipped", "no link to measure")
    text = f"{1000 * facts.peer.rtt:.1f} ms"
    if facts.peer.rtt > defaults.SLOW_ROUND_TRIP:
        return Finding(
            PEER, check, "warn", f"{text}: a long way, or a full line", "", "use more inner steps per round: --set"
        )
    return Finding(PEER, check, "ok", text)


def throughput(facts: Facts) -> Finding:
    check = "throughput"
    if facts.peer is None or facts.peer.rate is None:
        trouble = facts.peer.trouble if facts.peer is not None else ""
        return Finding(PEER, check, "skipped", trouble or "no link to measure")
    text = f"{8 * facts.peer.rate / 1e6:.1f} Mbit/s towards it"
    if facts.peer.rate < defaults.SLOW_RATE:
        return Finding(
            PEER, check, "warn", f"{text}: rounds will take long", f"{facts.peer.rate:.0f} bytes/s",
            "a smaller model, more inner steps per round, or another line",
        )  # fmt: skip
    return Finding(PEER, check, "ok", text)


def clock(facts: Facts) -> Finding:
    check = "clocks"
    if facts.peer is None or facts.peer.skew is None:
        return Finding(PEER, check, "skipped", "no peer to compare with")
    skew = facts.peer.skew
    text = f"its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
    advice = "set the clock of one of the two machines: switch on NTP"
    if abs(skew) > defaults.BAD_SKEW:
        return Finding(PEER, check, "fail", f"{text}: records of one look expired to the other", "", advice)
    if abs(skew) > defaults.NOTABLE_SKEW:
        return Finding(PEER, check, "warn", text, "", advice)
    return Finding(PEER, check, "ok", "the clocks agree", text)


def data_directory(facts: Facts) -> Finding:
    if facts.data_trouble:
        return Finding(MACHINE, "data directory", "fail", facts.data_trouble, facts.data_dir)
    running = f"a node runs in it (pid {facts.running})" if facts.running is not None else "no node runs in it"
    return Finding(MACHINE, "data directory", "ok", running, facts.data_dir)


def keys(facts: Facts) -> Finding:
    wrong = "; ".join(text for text in (facts.key, facts.swarm_key) if text)
    if wrong:
        return Finding(MACHINE, "keys", "fail", "a key file cannot be used", wrong)
    if facts.key is None:
        return Finding(MACHINE, "keys", "ok", "none yet: the first start makes one")
    private = " and that of a private swarm" if facts.swarm_key is not None else ""
    return Finding(MACHINE, "keys", "ok", f"the node's key{private}, for this user only")


def disk(facts: Facts) -> Finding:
    if facts.disk_free is None:
        return Finding(MACHINE, "disk", "skipped", "not known")
    text = f"{facts.disk_free / 1e9:.1f} GB free"
    if facts.disk_free < defaults.DISK_FULL:
        return Finding(MACHINE, "disk", "fail", f"{text}: a run's state cannot be saved", facts.data_dir, "make room")
    if facts.disk_free < defaults.DISK_LOW:
        return Finding(
            MACHINE, "disk", "warn", f"{text}: a large model's state may not fit twice", facts.data_dir, "make room"
        )
    return Finding(MACHINE, "disk", "ok", text)


def torch(facts: Facts) -> Finding:
    if facts.torch is not None:
        version, devices = facts.torch
        return Finding(MACHINE, "torch", "ok", f"torch {version}: {', '.join(devices)}")
    if facts.torch_trouble:
        return Finding(
            MACHINE, "torch", "fail", "torch cannot be used", facts.torch_trouble,
            "install it for this Python to train here; `shoal relay` does without",
        )  # fmt: skip
    return Finding(MACHINE, "torch", "skipped", "not looked at")
