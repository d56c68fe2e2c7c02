"""Hosts in network namespaces behind real kernel NAT, over a small internet that exists only inside.

Each host stands at a *site*, a customer of the lab's internet with an IPv4 /24 and an IPv6 /48 of its own::

    shoal-PID-net            the internet: routes between sites, drops in silence what is for nobody
      s1 30.0.1.1/24   ── eth0 30.0.1.2    shoal-PID-alice                        public
      s2 30.0.2.1/24   ── wan  30.0.2.2    shoal-PID-bob-nat    192.168.1.1 lan
                                             └─ eth0 192.168.1.12  shoal-PID-bob  cone
      s3 30.0.3.1/24   ── wan  30.0.3.2    shoal-PID-carol-cgn  100.64.3.1 lan
                                             └─ wan 100.64.3.2  shoal-PID-carol-nat  192.168.1.1 lan
                                                 └─ eth0 192.168.1.13  shoal-PID-carol  cgnat

The addresses look public (programs treat private and documentation ranges in other ways), but no namespace is connected
to this machine's own network. All homes use the same private range, as homes do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import attrs

from . import defaults
from .netlab_kinds import KINDS, UPNP_CONFIGURATION, UPNP_RULES, Kind, carrier_rules, router_rules, six_rules
from .netlab_system import (
    FOLDER,
    Guardian,
    NetLabError,
    NetLabUnavailable,
    add_namespace,
    delays,
    inside,
    ip,
    missing,
    missing_upnp,
    remove_namespace,
    run,
    sweep,
    sysctl,
    working_iptables,
)

__all__ = ["KINDS", "Kind", "LabHost", "NetLab", "NetLabError", "NetLabUnavailable", "unavailable"]


def unavailable(kind: str = "") -> str | None:
    """Why this machine cannot run the lab, or hosts of ``kind`` in it; None: it can, as far as one can see."""
    reason = missing()
    if reason is None and kind and KINDS[kind].upnp:
        reason = missing_upnp()
    return reason


@attrs.frozen
class LabHost:
    """One host. ``four``, ``six``: its own addresses. ``external``: the IPv4 address that the internet sees.

    ``namespaces``: of what stands between it and the internet, nearest first.
    """

    name: str
    kind: Kind
    namespace: str
    site: int
    four: str | None
    six: str | None
    external: str | None
    namespaces: tuple[str, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address for address in (self.four, self.six) if address is not None)


class NetLab(AbstractContextManager["NetLab"]):
    """A lab, torn down at the end of its ``with`` block, or by its guardian when this process is killed.

    Its methods block for milliseconds. Not for two threads at once. ``name``: tells several labs of one process apart.
    """

    def __init__(self, name: str = "") -> None:
        self._prefix = f"shoal-{os.getpid()}" + (f"-{name}" if name else "")
        self._net = f"{self._prefix}-net"
        self._hosts: dict[str, LabHost] = {}
        self._namespaces: list[str] = []
        self._daemons: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._guardian: Guardian | None = None
        self._folder: Path | None = None
        self._iptables = ("", "")
        self._sites = 0
        #: How packets are delayed here (``netem``, ``tun``, or empty: not at all), and why so.
        self.delays = ("", "")

    def __enter__(self) -> NetLab:
        """Raises :class:`NetLabUnavailable` naming what this machine lacks."""
        reason = missing()
        if reason is not None:
            raise NetLabUnavailable(f"no NAT lab on this machine: {reason}")
        sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        try:
            self._guardian = Guardian()
            self._add(self._net)
            self._iptables = working_iptables(self._net)
            self.delays = delays(self._net)
            sysctl(self._net, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
            ip(self._net, "route add blackhole 0.0.0.0/0", "route add blackhole ::/0")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs in the lab and remove its namespaces. May be called again."""
        self._remove(tuple(reversed(self._namespaces)))
        self._hosts.clear()
        if self._guardian is not None:
            self._guardian.dismiss()
            self._guardian = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # Hosts

    @property
    def hosts(self) -> tuple[LabHost, ...]:
        return tuple(self._hosts.values())

    def add(self, name: str, kind: str, *, delay: float = 0.0) -> LabHost:
        """A new site with one host. ``delay``: seconds that each packet takes longer, either way.

        Raises :class:`NetLabUnavailable` for what this machine lacks (miniupnpd, netem), :class:`NetLabError`.
        """
        what = KINDS[kind]
        reason = unavailable(kind) or (self.delays[1] if delay and not self.delays[0] else None)
        if reason is not None:
            raise NetLabUnavailable(f"no {kind} host{f' with a delay of {delay:g} s' if delay else ''}: {reason}")
        if self._sites == defaults.LAB_SITES:
            raise NetLabError(f"a lab has at most {defaults.LAB_SITES} sites")
        if name == "net" or name in self._hosts:
            raise NetLabError(f"the lab has a host {name!r} already")
        self._sites += 1
        site = self._sites
        before = len(self._namespaces)
        try:
            build = self._behind_router if what.nat else self._on_the_internet
            host = build(name, what, site, delay)
        except BaseException:
            self._remove(tuple(reversed(self._namespaces[before:])))
            raise
        self._hosts[name] = host
        return host

    def add_neighbour(self, name: str, host: LabHost) -> LabHost:
        """One more host on the LAN of a host behind NAT."""
        if not host.kind.nat:
            raise NetLabError(f"{host.name} has no LAN: it is {host.kind.name}")
        if name == "net" or name in self._hosts:
            raise NetLabError(f"the lab has a host {name!r} already")
        number = sum(1 for other in self._hosts.values() if other.site == host.site)
        before = len(self._namespaces)
        try:
            neighbour = self._on_the_lan(name, host.kind, host.site, host.namespaces, number)
        except BaseException:
            self._remove(tuple(reversed(self._namespaces[before:])))
            raise
        self._hosts[name] = neighbour
        return neighbour

    def remove(self, *hosts: LabHost) -> None:
        """Kill what runs on hosts and remove them with what stands before them (and with neighbours' NAT)."""
        self._remove(tuple(name for host in hosts for name in (host.namespace, *host.namespaces)))
        for host in hosts:
            self._hosts.pop(host.name, None)

    def command(self, host: LabHost, *arguments: str) -> list[str]:
        """What to start so that ``arguments`` run on a host. The process that is started becomes that command."""
        return ["ip", "netns", "exec", host.namespace, *arguments]

    def inside(self, host: LabHost) -> AbstractContextManager[None]:
        """This thread on a host, for making sockets there; they stay there."""
        return inside(host.namespace)

    # Things that happen

    def change_address(self, host: LabHost) -> LabHost:
        """Give a host another address: its own on the internet, or its router's (the carrier's) external one.

        As when a provider renews a lease: connections through the old address never hear of it.
        """
        assert host.four is not None and host.external is not None
        new = f"30.0.{host.site}.{int(host.external.rpartition('.')[2]) + 1}"
        last = host.namespaces[-1] if host.namespaces else host.namespace
        device = "wan" if host.namespaces else "eth0"
        ip(
            last,
            f"address del {host.external}/24 dev {device}",
            f"address add {new}/24 dev {device}",
            f"route replace default via 30.0.{host.site}.1",
        )
        ip(self._net, f"route add blackhole {host.external}/32")
        return self._changed(host, external=new, four=host.four if host.namespaces else new)

    def move(self, host: LabHost) -> LabHost:
        """Give a host behind NAT another address on its LAN."""
        assert host.namespaces and host.four is not None
        new = f"192.168.1.{int(host.four.rpartition('.')[2]) ^ 1}"
        ip(
            host.namespace,
            f"address del {host.four}/24 dev eth0",
            f"address add {new}/24 dev eth0",
            "route replace default via 192.168.1.1",
        )
        return self._changed(host, four=new)

    def _changed(self, host: LabHost, *, four: str | None, external: str | None = None) -> LabHost:
        changed = attrs.evolve(host, four=four, external=external or host.external)
        self._hosts[host.name] = changed
        return changed

    # Building

    def _add(self, namespace: str) -> None:
        assert self._guardian is not None
        add_namespace(namespace)
        self._namespaces.append(namespace)
        self._guardian.guard(namespace)
        ip(namespace, "link set lo up")
        # Addresses are ours alone: no second of doubt before an IPv6 address may be used.
        sysctl(namespace, ipv6__conf__default__accept_dad=0, ipv6__conf__all__accept_dad=0)

    def _remove(self, namespaces: Sequence[str]) -> None:
        for namespace in namespaces:
            remove_namespace(namespace)
            for process in self._daemons.pop(namespace, ()):
                with process:  # closes its pipes and waits for it
                    pass
            if namespace in self._namespaces:
                self._namespaces.remove(namespace)

    def _uplink(self, namespace: str, device: str, site: int, delay: float, *, four: bool, six: bool) -> None:
        """Connect a namespace to the internet as ``site``. ``delay``: seconds, either way."""
        if delay and self.delays[0] == "tun":
            self._carry(namespace, device, site, delay)
        else:
            ip(self._net, f"link add s{site} type veth peer name {device} netns {namespace}")
        ip(self._net, f"link set s{site} up")
        lines = [f"link set {device} up"]
        gateway = []
        if four:
            gateway.append(f"address add 30.0.{site}.1/24 dev s{site}")
            lines += [f"address add 30.0.{site}.2/24 dev {device}", f"route add default via 30.0.{site}.1"]
        if six:
            gateway.append(f"address add {_six(site)}1/64 dev s{site}")
            gateway.append(f"route add {_six(site)}/48 via {_six(site)}2")
            lines += [f"address add {_six(site)}2/64 dev {device}", f"route add default via {_six(site)}1"]
        ip(self._net, *gateway)
        ip(namespace, *lines)
        if delay and self.delays[0] == "netem":
            for where, name in ((namespace, device), (self._net, f"s{site}")):
                run(["tc", "-n", where, *f"qdisc add dev {name} root netem delay {delay * 1e3:g}ms".split()])

    def _carry(self, namespace: str, device: str, site: int, delay: float) -> None:
        """A delayed link instead of a cable. Its process belongs to ``namespace``, and ends with it."""
        command = [sys.executable, "-m", "shoal.sim.netlab_delay", self._net, f"s{site}", namespace, device, str(delay)]
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._daemons.setdefault(namespace, []).append(process)
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            raise NetLabError(f"no delayed link: {process.stderr.read().decode(errors='replace')[-500:]}")

    def _on_the_internet(self, name: str, kind: Kind, site: int, delay: float) -> LabHost:
        namespace = f"{self._prefix}-{name}"
        self._add(namespace)
        self._uplink(namespace, "eth0", site, delay, four=kind.four, six=kind.six)
        four = f"30.0.{site}.2" if kind.four else None
        return LabHost(name, kind, namespace, site, four, f"{_six(site)}2" if kind.six else None, four, ())

    def _behind_router(self, name: str, kind: Kind, site: int, delay: float) -> LabHost:
        router, carrier = f"{self._prefix}-{name}-nat", f"{self._prefix}-{name}-cgn"
        self._router(router, "192.168.1.1/24")
        if kind.carrier:
            self._router(carrier, f"100.64.{site}.1/24")
            self._uplink(carrier, "wan", site, delay, four=True, six=False)
            ip(router, f"link add wan type veth peer name home netns {carrier}")
            ip(carrier, "link set home up master lan")
            ip(router, "link set wan up", f"address add 100.64.{site}.2/24 dev wan")
            ip(router, f"route add default via 100.64.{site}.1")
            self._filter(carrier, carrier_rules())
        else:
            self._uplink(router, "wan", site, delay, four=True, six=kind.six)
        if kind.six_lan:
            ip(router, f"address add {_six(site, 1)}1/64 dev lan")
            self._filter(router, six_rules(), six=True)
        if kind.upnp:
            run(["ip", "netns", "exec", router, "nft", "-f", "-"], UPNP_RULES)
            self._start_upnp(router)
        else:
            self._filter(router, router_rules(kind))
        return self._on_the_lan(name, kind, site, (router, carrier) if kind.carrier else (router,), 0)

    def _router(self, namespace: str, lan: str) -> None:
        """A namespace that forwards, with a LAN (a bridge whose inner traffic the packet filter does not see)."""
        self._add(namespace)
        ip(namespace, "link add lan type bridge", "link set lan up", f"address add {lan} dev lan")
        sysctl(namespace, ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        if Path("/proc/sys/net/bridge/bridge-nf-call-iptables").exists():
            sysctl(namespace, **{"bridge__bridge-nf-call-iptables": 0, "bridge__bridge-nf-call-ip6tables": 0})

    def _on_the_lan(self, name: str, kind: Kind, site: int, behind: tuple[str, ...], number: int) -> LabHost:
        namespace = f"{self._prefix}-{name}"
        self._add(namespace)
        # Homes use the same private range; not the same address in it, or a host would mistake itself for the other.
        last = 10 + 4 * (site % 30) + 2 * number
        four, six = f"192.168.1.{last}", f"{_six(site, 1)}{last:x}" if kind.six_lan else None
        ip(behind[0], f"link add h{number} type veth peer name eth0 netns {namespace}")
        ip(behind[0], f"link set h{number} up master lan")
        lines = ["link set eth0 up", f"address add {four}/24 dev eth0", "route add default via 192.168.1.1"]
        if six is not None:
            lines += [f"address add {six}/64 dev eth0", f"route add default via {_six(site, 1)}1"]
        ip(namespace, *lines)
        return LabHost(name, kind, namespace, site, four, six, f"30.0.{site}.2", behind)

    def _filter(self, namespace: str, rules: str, *, six: bool = False) -> None:
        run(["ip", "netns", "exec", namespace, f"{self._iptables[six]}-restore"], rules)

    def _start_upnp(self, router: str) -> None:
        assert self._folder is not None
        configuration = self._folder / f"{router}.conf"
        configuration.write_text(UPNP_CONFIGURATION)
        log = self._folder / f"{router}.log"
        arguments = ["miniupnpd", "-d", "-f", str(configuration), "-P", str(self._folder / f"{router}.pid")]
        with log.open("wb") as output:
            daemon = subprocess.Popen(
                ["ip", "netns", "exec", router, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._daemons.setdefault(router, []).append(daemon)
        for _ in range(int(defaults.LAB_DAEMON / 0.02)):
            if _listens_for_ssdp(router):
                return
            try:
                daemon.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
        raise NetLabError(f"miniupnpd does not listen: {log.read_text(errors='replace')[-500:]}")


def _six(site: int, lan: int = 0) -> str:
    """The IPv6 prefix of a site's uplink (0) or LAN (1), ending in ``::``."""
    return f"2a00:30:{site:x}::" if lan == 0 else f"2a00:30:{site:x}:{lan:x}::"


def _listens_for_ssdp(namespace: str) -> bool:
    with inside(namespace):
        table = Path("/proc/thread-self/net/udp").read_text().splitlines()
    return any(line.split()[1].endswith(":076C") for line in table[1:])
