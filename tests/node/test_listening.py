"""Where a node listens: both IP versions, one port; which addresses go first."""

from __future__ import annotations

import errno
import socket

import pytest

from shoal.node.listening import EVERYWHERE, best_of_each, for_ticket, free_bind, in_order, parse_hosts, parse_via
from shoal.node.mapping import worth_mapping
from shoal.transport.address import Address
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.network import ByteStream, Listener
from shoal.transport.tcp import TcpNetwork


def tcp(host: str, port: int = 4001) -> Address:
    return Address("tcp", host, port)


class WithoutSix(TcpNetwork):
    """A kernel that was built without IPv6."""

    async def listen(self, bind: Address) -> Listener:  # type: ignore[override]
        if ":" in bind.host:
            raise ConfigError("no IPv6 here") from OSError(errno.EAFNOSUPPORT, "no IPv6")
        return await super().listen(bind)


class SixSwitchedOff(TcpNetwork):
    """``disable_ipv6=1``: the wildcard can be listened at, and nothing is behind it."""

    async def dial(self, address: Address, *, shared_port: bool = False) -> ByteStream:  # type: ignore[override]
        if ":" in address.host:
            raise PeerUnreachable("cannot connect", attempts=((str(address), "no local address"),))
        return await super().dial(address)

    def reachable_addresses(self, listener: Listener) -> tuple[Address, ...]:
        if ":" in listener.address.host:
            return (tcp("::1", listener.address.port),)
        return super().reachable_addresses(listener)


def test_without_hosts_everything_is_listened_at() -> None:
    assert parse_hosts([], 7) == (tcp("0.0.0.0", 7), tcp("::", 7))
    assert parse_hosts(["[::1]", "127.0.0.1", "::1"], 7) == (tcp("::1", 7), tcp("127.0.0.1", 7))
    with pytest.raises(ConfigError, match=r"--host 'localhost' is not an IP address; 0\.0\.0\.0"):
        parse_hosts(["localhost"], 0)


def test_via_takes_addresses_and_says_where_they_come_from() -> None:
    assert parse_via(["1.2.3.4:5", "tcp://[::1]:6", "1.2.3.4:5"]) == (tcp("1.2.3.4", 5), tcp("::1", 6))
    with pytest.raises(ConfigError, match="--via: 'relay' is not an address.*`shoal relay` prints"):
        parse_via(["relay"])
    with pytest.raises(ConfigError, match="'example.com' is a name, give the IP address"):
        parse_via(["example.com:4001"])
    with pytest.raises(ConfigError, match="port 0, at which nobody can be reached"):
        parse_via(["1.2.3.4:0"])


@pytest.mark.real
async def test_both_ip_versions_get_one_port_that_is_free_on_both() -> None:
    four, six = await free_bind(TcpNetwork(), parse_hosts([], 0))
    assert (four.host, six.host) == EVERYWHERE
    assert four.port == six.port != 0


@pytest.mark.real
@pytest.mark.parametrize("network", [WithoutSix, SixSwitchedOff])
async def test_a_machine_without_ipv6_listens_by_ipv4(network: type[TcpNetwork]) -> None:
    bind = await free_bind(network(), parse_hosts([], 0))
    assert [address.host for address in bind] == ["0.0.0.0"]


@pytest.mark.real
async def test_an_address_that_was_asked_for_by_name_is_never_left_out() -> None:
    with pytest.raises(ConfigError, match="no IPv6 here"):
        await free_bind(WithoutSix(), parse_hosts(["::"], 0))


@pytest.mark.real
async def test_a_taken_port_is_an_error_unless_there_is_another() -> None:
    notes: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="in use"):
            await free_bind(TcpNetwork(), parse_hosts(["127.0.0.1"], port))
        (bind,) = await free_bind(
            TcpNetwork(), parse_hosts(["127.0.0.1"], port), parse_hosts(["127.0.0.1"], 0), notes.append
        )
    assert bind.port not in (0, port)
    assert "in use" in notes[0] and "taking another port" in notes[0]


def test_of_a_peer_a_ticket_takes_the_best_of_each_ip_version() -> None:
    relay = (tcp("192.168.1.2", 1), tcp("30.0.1.2", 1), tcp("2a00::2", 1), tcp("127.0.0.1", 1), tcp("::1", 1))
    assert best_of_each(relay) == relay[1:3]
    assert best_of_each((tcp("127.0.0.1", 1), tcp("2a00::2", 1), tcp("::1", 1))) == (tcp("2a00::2", 1),)
    assert best_of_each((tcp("127.0.0.1", 1), tcp("::1", 1))) == (tcp("127.0.0.1", 1),)
    assert best_of_each(()) == ()


@pytest.mark.parametrize(
    ("hosts", "wanted", "why"),
    [
        (["192.168.1.2", "127.0.0.1", "2a00::2"], True, "all private"),
        (["30.0.1.2", "192.168.1.2"], False, "public IPv4"),
        (["127.0.0.1", "::1", "2a00::2"], False, "its network has no IPv4"),
        (["127.0.0.1", "::1"], False, "this machine only"),
        (["2a00::2"], False, "does not listen by IPv4"),
    ],
)
def test_a_router_is_asked_only_where_its_port_would_help(hosts: list[str], wanted: bool, why: str) -> None:
    asked, reason = worth_mapping([tcp(host, 1) for host in hosts])
    assert asked is wanted
    assert why in reason


def test_public_addresses_go_first_and_loopback_last() -> None:
    found = [tcp("127.0.0.1"), tcp("192.168.1.7"), tcp("fd00::1"), tcp("8.8.8.8"), tcp("::1"), tcp("2a00::1")]
    assert [a.host for a in in_order(found)] == ["8.8.8.8", "2a00::1", "192.168.1.7", "fd00::1", "127.0.0.1", "::1"]
    world = (Address("mem", "b", 1), Address("mem", "a", 1))
    assert in_order(world) == world


def test_a_ticket_takes_the_best_of_each_ip_version_and_one_loopback() -> None:
    bridges = [tcp(f"172.{n}.0.1") for n in range(17, 27)]
    own = [tcp("127.0.0.1"), tcp("192.168.1.7"), *bridges, tcp("::1"), tcp("2a00::1"), tcp("fd00::1")]
    hosts = [a.host for a in for_ticket(own)]
    assert hosts[:2] == ["2a00::1", "192.168.1.7"]
    assert hosts[-1] == "127.0.0.1"
    assert "::1" not in hosts
    assert len(hosts) == 6
    local = [tcp("192.168.1.7"), *bridges, tcp("fd00::1"), tcp("127.0.0.1")]
    assert "fd00::1" in [a.host for a in for_ticket(local)]
    assert for_ticket([tcp("127.0.0.1")]) == (tcp("127.0.0.1"),)
    assert for_ticket([]) == ()
