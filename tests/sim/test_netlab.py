"""The NAT lab holds what it says of its kinds of hosts, seen with plain sockets; and it leaves nothing behind."""

from __future__ import annotations

import errno
import http.client
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from shoal.sim import netlab_system
from shoal.sim.netlab import KINDS, LabHost, NetLab, NetLabError, NetLabUnavailable, unavailable

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(unavailable() is not None, reason=f"no NAT lab here: {unavailable()}"),
]
needs_upnp = pytest.mark.skipif(unavailable("upnp") is not None, reason=f"no UPnP router here: {unavailable('upnp')}")

#: Seconds of silence that count as "dropped". Packets in the lab take far less than a millisecond.
SILENCE = 0.3
#: Seconds for what must come, on a machine that is busy.
PATIENCE = 10.0


class World:
    """A lab with a public host and helpers that make sockets on hosts."""

    def __init__(self, lab: NetLab, stack: ExitStack) -> None:
        self.lab = lab
        self.stack = stack
        self.number = 0
        self.public = self.add("public")

    def add(self, kind: str, **options: float) -> LabHost:
        self.number += 1
        return self.lab.add(f"{kind}{self.number}", kind, **options)

    def socket(
        self,
        host: LabHost,
        kind: socket.SocketKind = socket.SOCK_STREAM,
        port: int = 0,
        *,
        six: bool = False,
        shared: bool = False,
    ) -> socket.socket:
        with self.lab.inside(host):
            made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind)
        self.stack.callback(made.close)
        made.settimeout(PATIENCE)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(("::" if six else "0.0.0.0", port))
        return made

    def udp(self, host: LabHost, port: int = 0) -> socket.socket:
        return self.socket(host, socket.SOCK_DGRAM, port)

    def listener(self, host: LabHost, port: int, *, six: bool = False) -> socket.socket:
        made = self.socket(host, port=port, six=six)
        made.listen()
        return made

    def accept(self, listener: socket.socket) -> tuple[str, int]:
        """Where the next connection comes from."""
        accepted, address = listener.accept()
        self.stack.callback(accepted.close)
        return address[0], address[1]

    def reaches(self, host: LabHost, address: str, port: int) -> bool:
        """Whether a TCP connection opens; other failures than silence are errors."""
        try:
            return self._connects(host, address, port, PATIENCE)
        except OSError as error:
            # Neighbours of IPv6 ask each other first, and give up soon on a machine that is too busy to answer.
            if error.errno != errno.EHOSTUNREACH or ":" not in address:
                raise
        return self._connects(host, address, port, PATIENCE)

    def drops(self, host: LabHost, address: str, port: int) -> bool:
        """Whether nothing answers at all."""
        return not self._connects(host, address, port, SILENCE)

    def _connects(self, host: LabHost, address: str, port: int, seconds: float) -> bool:
        dialler = self.socket(host, six=":" in address)
        dialler.settimeout(seconds)
        try:
            dialler.connect((address, port))
        except TimeoutError:
            return False
        return True


@pytest.fixture(scope="module")
def lab() -> Iterator[NetLab]:
    with NetLab() as made:
        yield made


@pytest.fixture
def world(lab: NetLab) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(lab, stack)
        lab.remove(*lab.hosts)


def test_public_hosts_reach_each_other_over_both_ip_versions(world: World) -> None:
    other = world.add("public")
    four, six = world.listener(other, 4001), world.listener(other, 4001, six=True)
    assert other.four is not None and other.six is not None
    assert world.reaches(world.public, other.four, 4001)
    assert world.accept(four)[0] == world.public.four
    assert world.reaches(world.public, other.six, 4001)
    assert world.accept(six)[0] == world.public.six


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.nat and not kind.upnp])
def test_a_host_behind_nat_reaches_the_internet_and_is_not_reached_from_it(world: World, kind: str) -> None:
    home = world.add(kind)
    server = world.listener(world.public, 4001)
    world.listener(home, 4001)
    assert world.public.four is not None and home.external is not None
    assert world.reaches(home, world.public.four, 4001)
    assert world.accept(server)[0] == home.external
    assert world.drops(world.public, home.external, 4001)


def test_a_cone_keeps_the_port_and_filters_by_address_and_port(world: World) -> None:
    home, stranger = world.add("cone"), world.add("public4")
    inner, server = world.udp(home, 4001), world.udp(world.public, 5000)
    inner.sendto(b"out", (world.public.four, 5000))
    data, seen = server.recvfrom(100)
    assert (data, seen) == (b"out", (home.external, 4001))
    world.udp(world.public, 5001).sendto(b"other port", seen)
    world.udp(stranger, 5000).sendto(b"other address", seen)
    inner.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        inner.recvfrom(100)
    inner.settimeout(PATIENCE)
    server.sendto(b"back", seen)
    assert inner.recvfrom(100) == (b"back", (world.public.four, 5000))
    second = world.udp(stranger, 5002)
    inner.sendto(b"out", (stranger.four, 5002))
    assert second.recvfrom(100)[1] == seen, "another destination sees another port"


def test_two_cones_meet_by_simultaneous_open(world: World) -> None:
    one, two = world.add("cone"), world.add("cone")
    ends = world.socket(one, port=4001), world.socket(two, port=4002)
    for end in ends:
        end.setblocking(False)
    assert ends[0].connect_ex((two.external, 4002)) == errno.EINPROGRESS
    # The first SYN is dropped by the other's firewall; the second one passes, because it looks like an answer.
    assert ends[1].connect_ex((one.external, 4001)) == errno.EINPROGRESS
    for end in ends:
        assert select.select([], [end], [], 5)[1]
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        end.setblocking(True)
        end.settimeout(5)
    ends[0].sendall(b"hello")
    assert ends[1].recv(5) == b"hello"


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_STREAM"])
def test_a_symmetric_nat_has_another_external_port_for_each_destination(world: World, kind: str) -> None:
    home = world.add("symmetric")
    ports = [4001]
    for number in range(3):
        inner = world.socket(home, socket.SocketKind[kind], 4001, shared=True)
        if kind == "SOCK_DGRAM":
            server = world.udp(world.public, 5000 + number)
            inner.sendto(b"out", (world.public.four, 5000 + number))
            ports.append(server.recvfrom(100)[1][1])
        else:
            server = world.listener(world.public, 5000 + number)
            inner.connect((world.public.four, 5000 + number))
            ports.append(world.accept(server)[1])
    assert len(set(ports)) == 4


def test_a_carrier_translates_a_second_time(world: World) -> None:
    home = world.add("cgnat")
    inner, server = world.udp(home, 4001), world.udp(world.public, 5000)
    inner.sendto(b"out", (world.public.four, 5000))
    assert server.recvfrom(100)[1] == (home.external, 4001)
    router, carrier = home.namespaces
    wan = netlab_system.run(["ip", "-n", router, "-4", "-o", "address", "show", "wan"])
    assert f"inet 100.64.{home.site}.2/24" in wan, "the home's own router has no public address"
    for namespace, source in ((router, home.four), (carrier, f"100.64.{home.site}.2")):
        with netlab_system.inside(namespace):
            tracked = Path("/proc/thread-self/net/nf_conntrack").read_text()
        assert f"src={source} dst={world.public.four}" in tracked, "each of the two NATs translates the connection"


def test_where_udp_is_blocked_none_passes_and_tcp_does(world: World) -> None:
    home = world.add("udp_blocked")
    server = world.udp(world.public, 5000)
    world.udp(home, 4001).sendto(b"out", (world.public.four, 5000))
    server.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        server.recvfrom(100)
    world.listener(world.public, 5000)
    assert world.public.four is not None and world.reaches(home, world.public.four, 5000)


SOAP = """<?xml version="1.0"?>
<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/">
<s:Body><u:AddPortMapping xmlns:u="urn:schemas-upnp-org:service:WANIPConnection:1"><NewRemoteHost></NewRemoteHost>
<NewExternalPort>4001</NewExternalPort><NewProtocol>TCP</NewProtocol><NewInternalPort>4001</NewInternalPort>
<NewInternalClient>{client}</NewInternalClient><NewEnabled>1</NewEnabled>
<NewPortMappingDescription>test</NewPortMappingDescription><NewLeaseDuration>0</NewLeaseDuration>
</u:AddPortMapping></s:Body></s:Envelope>"""


@needs_upnp
def test_a_upnp_router_answers_ssdp_and_maps_a_port(world: World) -> None:
    home = world.add("upnp")
    server = world.listener(home, 4001)
    assert home.external is not None
    assert world.drops(world.public, home.external, 4001)
    search = world.udp(home)
    device = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
    search.settimeout(5)
    search.sendto(
        f'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: {device}\r\n\r\n'
        .encode(), ("239.255.255.250", 1900),
    )  # fmt: skip
    location = re.search(r"(?i)location: *(\S+)", search.recv(2000).decode())
    assert location is not None
    at = urlsplit(location[1])
    assert at.hostname == "192.168.1.1" and at.port is not None
    with world.lab.inside(home):
        connection = http.client.HTTPConnection(at.hostname, at.port, timeout=5)
        connection.connect()
    world.stack.callback(connection.close)
    action = {"SOAPAction": '"urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping"'}
    connection.request("POST", "/ctl/IPConn", SOAP.format(client=home.four), {"Content-Type": "text/xml", **action})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert world.reaches(world.public, home.external, 4001)
    assert world.accept(server)[0] == world.public.four


@needs_upnp
def test_a_upnp_router_also_speaks_nat_pmp(world: World) -> None:
    home = world.add("upnp")
    asking = world.udp(home)
    asking.settimeout(5)
    asking.sendto(bytes([0, 0]), ("192.168.1.1", 5351))
    answer = asking.recv(100)
    assert answer[:4] == bytes([0, 128, 0, 0])
    assert socket.inet_ntoa(answer[8:12]) == home.external


def test_a_host_with_ipv6_only_reaches_no_ipv4(world: World) -> None:
    host = world.add("ipv6")
    world.listener(world.public, 4001), world.listener(world.public, 4001, six=True)
    assert host.addresses == (host.six,) and world.public.four is not None and world.public.six is not None
    with pytest.raises(OSError, match="unreachable") as caught:
        world.reaches(host, world.public.four, 4001)
    assert caught.value.errno == errno.ENETUNREACH
    assert world.reaches(host, world.public.six, 4001)
    world.listener(host, 4001, six=True)
    assert world.reaches(world.public, host.six or "", 4001), "nothing stands in the way from outside"


def test_ipv6_of_a_dual_home_is_public_but_firewalled(world: World) -> None:
    home = world.add("dual")
    server = world.listener(world.public, 4001, six=True)
    world.listener(home, 4001, six=True)
    assert home.six is not None and world.public.six is not None
    assert world.reaches(home, world.public.six, 4001)
    assert world.accept(server)[0] == home.six, "no translation"
    assert world.drops(world.public, home.six, 4001)


def test_two_behind_one_nat_reach_each_other_and_share_an_address(world: World) -> None:
    one = world.add("cone")
    two = world.lab.add_neighbour("neighbour", one)
    assert two.four is not None and world.public.four is not None
    lan, server = world.listener(two, 4001), world.listener(world.public, 4001)
    assert world.reaches(one, two.four, 4001)
    assert world.accept(lan)[0] == one.four, "not through the router"
    for host in (one, two):
        assert world.reaches(host, world.public.four, 4001)
        assert world.accept(server)[0] == one.external == two.external


def test_what_is_for_nobody_is_dropped_in_silence(world: World) -> None:
    home, other = world.add("cone"), world.add("cone")
    world.listener(other, 4001)
    assert other.four is not None and other.four != home.four
    assert world.drops(world.public, "44.1.2.3", 4001)
    assert world.drops(world.public, other.four, 4001), "a private address means nothing outside"


def test_after_a_change_of_address_old_connections_are_dead_and_new_ones_come_from_elsewhere(world: World) -> None:
    assert world.public.four is not None
    for kind, change in (("public4", "change_address"), ("cone", "change_address"), ("cgnat", "change_address")):
        host = world.add(kind)
        server = world.listener(world.public, 5000 + host.site)
        dialler = world.socket(host)
        dialler.connect((world.public.four, 5000 + host.site))
        accepted, before = server.accept()
        world.stack.callback(accepted.close)
        after = getattr(world.lab, change)(host)
        assert after.external != before[0] == host.external
        accepted.settimeout(SILENCE)
        if kind != "public4":  # there the socket's own address is gone, and the kernel knows
            dialler.send(b"anybody?")
        with pytest.raises(TimeoutError):
            accepted.recv(100)
        assert world.reaches(after, world.public.four, 5000 + host.site)
        assert world.accept(server)[0] == after.external


def test_a_host_can_move_within_its_lan(world: World) -> None:
    home = world.add("cone")
    moved = world.lab.move(home)
    assert moved.four != home.four and moved.external == home.external
    server = world.listener(world.public, 4001)
    assert world.public.four is not None and world.reaches(moved, world.public.four, 4001)
    assert world.accept(server)[0] == home.external


@pytest.mark.parametrize("how", ["as this kernel does", "tun"])
@pytest.mark.parametrize("kind", ["public", "cone"])
def test_a_delay_holds_every_packet_up(world: World, kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "tun":
        monkeypatch.setattr(world.lab, "delays", ("tun", ""))
    if not world.lab.delays[0]:
        pytest.skip(world.lab.delays[1])
    host = world.add(kind, delay=0.05)
    server = world.listener(world.public, 4001)
    dialler = world.socket(host)
    dialler.settimeout(5)
    began = time.monotonic()
    dialler.connect((world.public.four, 4001))
    assert 0.1 <= time.monotonic() - began < 5
    accepted, _ = server.accept()
    world.stack.callback(accepted.close)
    data = os.urandom(1 << 20)
    received = bytearray()
    began = time.monotonic()
    thread = threading.Thread(target=dialler.sendall, args=(data,))
    thread.start()
    while len(received) < len(data):
        received += accepted.recv(1 << 16)
    thread.join()
    assert received == data and time.monotonic() - began >= 0.05


def test_where_packets_cannot_be_delayed_the_lab_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.lab, "delays", ("", "this kernel has no netem, and there is no /dev/net/tun"))
    with pytest.raises(NetLabUnavailable, match="no cone host with a delay of 0.05 s: this kernel has no netem"):
        world.add("cone", delay=0.05)


def test_a_name_is_taken_once(world: World) -> None:
    with pytest.raises(NetLabError, match="already"):
        world.lab.add(world.public.name, "cone")


# What is left behind


def ours(pid: int) -> list[str]:
    return sorted(name for name in os.listdir("/run/netns") if name.startswith(f"shoal-{pid}-"))


LAB = """
import subprocess, sys, time
from shoal.sim.netlab import NetLab
with NetLab() as lab:
    host = lab.add("home", "cone")
    sleeper = subprocess.Popen(lab.command(host, "sleep", "1000"))
    while not open(f"/proc/{sleeper.pid}/cmdline").read().startswith("sleep"):
        time.sleep(0.01)  # before that it is no process of the host
    print(sleeper.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_lab_whose_process_dies(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", LAB], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process:
        sleeper = int(process.stdout.readline())
        assert ours(process.pid) == [f"shoal-{process.pid}-{name}" for name in ("home", "home-nat", "net")]
        process.send_signal(number)
    deadline = time.monotonic() + 10
    while ours(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ours(process.pid) == []
    while Path(f"/proc/{sleeper}/cmdline").exists() and Path(f"/proc/{sleeper}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "a process of the lab is left"
        time.sleep(0.02)


def test_an_error_in_the_middle_leaves_nothing() -> None:
    before = ours(os.getpid())
    try:
        with NetLab(name="second") as lab:
            lab.add("home", "cone")
            assert len(ours(os.getpid())) == len(before) + 3
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert ours(os.getpid()) == before


def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_are_not() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = f"shoal-{dead.pid}-left", f"shoal-{os.getppid()}-alive"
    try:
        for name in names:
            netlab_system.run(["ip", "netns", "add", name])
        netlab_system.sweep()  # that of a lab which begins beside this test may have been first
        assert not (netlab_system.NAMESPACES / names[0]).exists()
        assert (netlab_system.NAMESPACES / names[1]).exists()
    finally:
        for name in names:
            netlab_system.remove_namespace(name)


def test_two_sweeps_at_once_are_no_error() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = [f"shoal-{dead.pid}-left{number}" for number in range(10)]
    for name in names:
        netlab_system.add_namespace(name)
    with ThreadPoolExecutor(4) as pool:
        swept = [pool.submit(netlab_system.sweep) for _ in range(4)]
    assert set(names) <= {name for sweep in swept for name in sweep.result()}
    assert not any((netlab_system.NAMESPACES / name).exists() for name in names)


def test_a_namespace_that_cannot_be_removed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text('#!/bin/sh\necho "device or resource busy" >&2\nexit 1\n')
    (tmp_path / "ip").chmod(0o755)
    name = f"shoal-{os.getpid()}-stays"
    netlab_system.add_namespace(name)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            with pytest.raises(NetLabError, match="busy"):
                netlab_system.remove_namespace(name)
    finally:
        netlab_system.remove_namespace(name)


# Where there can be no lab


def test_without_root_the_lab_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetLabUnavailable, match="not root"), NetLab():
        pass


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetLabUnavailable, match=r"`ip` is not installed \(Debian package iproute2\)"), NetLab():
        pass
    (tmp_path / "ip").symlink_to("/bin/true")
    with pytest.raises(NetLabUnavailable, match=r"`iptables` is not installed \(Debian package iptables\)"), NetLab():
        pass


def test_where_namespaces_are_forbidden_the_lab_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text('#!/bin/sh\necho "mount --make-shared /run/netns failed: not permitted" >&2\nexit 1\n')
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NetLabUnavailable, match="cannot be made here.*not permitted"), NetLab(name="x"):
        pass


def test_where_iptables_cannot_do_nat_the_lab_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for flavour in ("", "-nft", "-legacy"):
        tool = tmp_path / f"iptables{flavour}-restore"
        tool.write_text('#!/bin/sh\necho "no such table: nat" >&2\nexit 2\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(NetLabUnavailable, match="no iptables here can do NAT.*no such table"), NetLab(name="third"):
        pass
