"""Kernel TCP: conformance over IPv4 and IPv6, and what only real sockets do."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import sys

import pytest
import trio
import trio.testing

from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.network import Network
from shoal.transport.tcp import TcpNetwork

from .stream_conformance import StreamConformance


class TcpConformance(StreamConformance):
    # Zero-window probes carry bytes: after a few hundred milliseconds a full kernel has room again for some.
    clogs = False

    def networks(self) -> tuple[Network, Network]:
        return TcpNetwork(), TcpNetwork()


@pytest.mark.real
class TestConformanceOverIPv4(TcpConformance):
    def bind(self) -> Address:
        return Address("tcp", "127.0.0.1", 0)


def _ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.real
@pytest.mark.skipif(not _ipv6_works(), reason="this machine has no IPv6 loopback")
class TestConformanceOverIPv6(TcpConformance):
    def bind(self) -> Address:
        return Address("tcp", "::1", 0)


LOOPBACK = Address("tcp", "127.0.0.1", 0)


@pytest.mark.real
async def test_small_writes_are_not_delayed() -> None:
    network = TcpNetwork()
    async with await network.listen(LOOPBACK) as listener, await network.dial(listener.address) as ours:
        theirs = await listener.accept()
        async with theirs:
            for stream in (ours, theirs):
                assert stream._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.real
@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="this system has no choice")
async def test_within_a_machine_nobody_waits_for_the_pacing_of_bbr() -> None:
    network = TcpNetwork()
    async with await network.listen(LOOPBACK) as listener, await network.dial(listener.address) as ours:
        theirs = await listener.accept()
        async with theirs:
            for stream in (ours, theirs):
                chosen = stream._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                assert chosen.rstrip(b"\0") == b"reno"


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="what only Linux says")
async def test_the_round_trip_is_that_of_packets_however_long_the_answer_takes() -> None:
    network = TcpNetwork()
    async with (
        await network.listen(Address("tcp", "127.0.0.1", 0)) as listener,
        await network.dial(listener.address) as ours,
    ):
        theirs = await listener.accept()
        async with theirs:
            for _ in range(3):
                await ours.send_all(b"question")
                await theirs.receive_some(8)
                await trio.sleep(0.05)  # a busy peer
                await theirs.send_all(b"answer")
                await ours.receive_some(6)
            round_trip = ours.round_trip()
            assert round_trip is not None and 0 < round_trip < 0.04
        await ours.aclose()
        assert ours.round_trip() is None


@pytest.mark.real
async def test_a_wildcard_listener_is_reachable_at_every_interface_loopback_last() -> None:
    network = TcpNetwork()
    async with await network.listen(Address("tcp", "0.0.0.0", 0)) as listener:
        addresses = network.reachable_addresses(listener)
        assert addresses[-1] == Address("tcp", "127.0.0.1", listener.address.port)
        assert len(set(addresses)) == len(addresses)
        async with await network.dial(addresses[-1]) as ours:
            assert ours.remote == addresses[-1]


@pytest.mark.real
@pytest.mark.skipif(not _ipv6_works(), reason="this machine has no IPv6 loopback")
async def test_ipv4_and_ipv6_wildcards_can_share_a_port() -> None:
    network = TcpNetwork()
    async with await network.listen(Address("tcp", "0.0.0.0", 0)) as four:
        six = await network.listen(Address("tcp", "::", four.address.port))
        async with six:
            addresses = network.reachable_addresses(six)
            assert addresses[-1].host == "::1"
            assert not any(address.host.startswith("fe80") for address in addresses)


@pytest.mark.real
async def test_a_port_in_use_says_what_to_do() -> None:
    network = TcpNetwork()
    async with await network.listen(LOOPBACK) as listener:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{listener.address.port} is in use .* --port"):
            await network.listen(listener.address)


@pytest.mark.real
async def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.77 is not an address of this machine"):
        await TcpNetwork().listen(Address("tcp", "192.0.2.77", 0))


@pytest.mark.real
async def test_an_interface_that_is_not_here_is_no_way_to_a_peer() -> None:
    with pytest.raises(PeerUnreachable):
        await TcpNetwork().dial(Address("tcp", "fe80::1%nosuchif0", 1))


@pytest.mark.real
async def test_a_dial_does_not_connect_to_itself() -> None:
    """A dead port in the ephemeral range may be picked as the dialling socket's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connecting = trio.socket.socket()
    await connecting.bind(("127.0.0.1", port))
    await connecting.connect(("127.0.0.1", port))
    assert connecting.getsockname() == connecting.getpeername(), "the kernel connects a socket to itself"
    connecting.close()
    with pytest.raises(PeerUnreachable, match="connection refused"):
        await TcpNetwork().dial(Address("tcp", "127.0.0.1", port))


@pytest.mark.real
async def test_a_cancelled_dial_leaves_no_socket_open() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    async with await TcpNetwork().listen(LOOPBACK) as listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            await TcpNetwork().dial(listener.address)
        assert scope.cancelled_caught
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


@pytest.mark.real
async def test_accepting_survives_running_out_of_file_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    network = TcpNetwork()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with await network.listen(LOOPBACK) as listener, await network.dial(listener.address) as ours:
        top = max(int(name) for name in os.listdir("/dev/fd"))
        holes = [os.dup(0) for _ in range(max(0, top))]  # fill what is free below the limit
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1, hard))
            with trio.move_on_after(0.35) as scope:
                await listener.accept()
            assert scope.cancelled_caught
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for hole in holes:
                os.close(hole)
        with trio.fail_after(10):
            theirs = await listener.accept()
        async with theirs:
            await ours.send_all(b"in the end")
            assert await theirs.receive_some() == b"in the end"
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "cannot accept connections for now: Too many open files",
        "accepts connections again",
    ], "the shortage is reported once, however often accept was tried"


@pytest.mark.real
async def test_a_client_that_resets_before_it_is_accepted_does_no_harm() -> None:
    network = TcpNetwork()
    async with await network.listen(LOOPBACK) as listener:
        rude = socket.create_connection((listener.address.host, listener.address.port))
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close()
        async with await network.dial(listener.address) as polite:
            await polite.send_all(b"hello")
            while True:
                async with await listener.accept() as accepted:
                    try:
                        assert await accepted.receive_some() == b"hello"
                    except trio.BrokenResourceError:
                        continue
                    break


@pytest.mark.real
async def test_bytes_are_received_straight_into_a_buffer_until_the_end() -> None:
    network = TcpNetwork()
    listener = await network.listen(Address("tcp", "127.0.0.1", 0))
    async with listener, await network.dial(listener.address) as ours, await listener.accept() as theirs:
        ours.allow_unsent(1 << 20)
        await ours.send_all(b"0123456789")
        await ours.send_eof()
        buffer, done = bytearray(64), 0
        while size := await theirs.receive_into(memoryview(buffer)[done:]):
            done += size
        assert bytes(buffer[:done]) == b"0123456789"
        await theirs.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive_into(memoryview(buffer))


# Coming from the listening port


@pytest.mark.real
@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_a_dial_that_shares_the_port_comes_from_the_listening_port(bind: str) -> None:
    if ":" in bind and not _ipv6_works():
        pytest.skip("this machine has no IPv6 loopback")
    far, near = TcpNetwork(), TcpNetwork()
    loopback = Address("tcp", "::1" if ":" in bind else "127.0.0.1", 0)
    async with await far.listen(loopback) as there, await near.listen(Address("tcp", bind, 0)) as here:
        ours = await near.dial(there.address, shared_port=True)
        async with ours, await there.accept() as theirs:
            assert ours.local.port == here.address.port
            assert theirs.remote == ours.local
            await ours.send_all(b"hello")
            assert await theirs.receive_some() == b"hello"
            back = await far.dial(Address("tcp", loopback.host, here.address.port))
            async with back, await here.accept() as accepted:
                assert accepted.remote == back.local, "the listener goes on accepting"


@pytest.mark.real
async def test_a_second_dial_between_the_same_ports_falls_back_to_another_port() -> None:
    far, near = TcpNetwork(), TcpNetwork()
    async with await far.listen(LOOPBACK) as there, await near.listen(LOOPBACK) as here:
        first = await near.dial(there.address, shared_port=True)
        second = await near.dial(there.address, shared_port=True)
        async with first, second:
            assert first.local.port == here.address.port
            assert second.local.port != here.address.port


@pytest.mark.real
async def test_a_dial_shares_no_port_where_nobody_listens_or_only_at_loopback() -> None:
    far, near = TcpNetwork(), TcpNetwork()
    async with await far.listen(LOOPBACK) as there:
        async with await near.dial(there.address, shared_port=True) as ours:
            assert ours.remote == there.address
        here = await near.listen(LOOPBACK)
        assert near._origin(Address("tcp", "192.0.2.1", 1)) is None
        await here.aclose()
        assert near._origin(there.address) is None


@pytest.mark.real
async def test_a_dial_from_the_listening_port_to_itself_is_refused() -> None:
    network = TcpNetwork()
    async with await network.listen(LOOPBACK) as listener:
        with pytest.raises(PeerUnreachable, match="connection refused"):
            await network.dial(listener.address, shared_port=True)


@pytest.mark.real
async def test_a_port_stays_in_use_though_dials_share_it() -> None:
    far, near = TcpNetwork(), TcpNetwork()
    async with await far.listen(LOOPBACK) as there:
        async with await near.listen(LOOPBACK) as here:
            stream = await near.dial(there.address, shared_port=True)
            with pytest.raises(ConfigError, match="in use"):
                await TcpNetwork().listen(here.address)
        async with stream, await TcpNetwork().listen(here.address) as again:
            assert again.address == here.address, "a connection that is left does not keep the port from its next owner"


@pytest.mark.real
async def test_a_stream_from_the_listening_port_says_goodbye_all_the_same() -> None:
    """Only an attempt that is given up is closed with a reset."""
    far, near = TcpNetwork(), TcpNetwork()
    async with await far.listen(LOOPBACK) as there, await near.listen(LOOPBACK):
        ours = await near.dial(there.address, shared_port=True)
        async with await there.accept() as theirs:
            await ours.send_all(b"goodbye")
            await ours.aclose()
            assert [await theirs.receive_some(), await theirs.receive_some()] == [b"goodbye", b""]


@pytest.mark.real
async def test_a_cancelled_dial_from_the_listening_port_leaves_the_ports_free() -> None:
    near = TcpNetwork()
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    with full, contextlib.ExitStack() as others:
        for _ in range(2):  # from now on requests are not answered
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        address = Address("tcp", "127.0.0.1", full.getsockname()[1])
        async with await near.listen(LOOPBACK) as here:
            for _ in range(3):
                with trio.move_on_after(0.05) as scope:
                    await near.dial(address, shared_port=True)
                assert scope.cancelled_caught
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.setblocking(False)
                probe.bind(("127.0.0.1", here.address.port))
                assert probe.connect_ex((address.host, address.port)) == errno.EINPROGRESS


# Datagrams


@pytest.mark.real
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_travel_both_ways_and_say_where_they_come_from(host: str) -> None:
    if ":" in host and not _ipv6_works():
        pytest.skip("this machine has no IPv6 loopback")
    network = TcpNetwork()
    async with await network.listen(Address("tcp", host, 0)) as listener:
        one = await network.open_datagrams(listener.address)
        other = await network.open_datagrams(Address("tcp", host, 0))
        async with one, other:
            assert one.local == listener.address, "at the port of the TCP listener"
            await other.send(b"question", one.local)
            assert await one.receive() == (b"question", other.local)
            await one.send(b"answer", other.local)
            assert await other.receive() == (b"answer", one.local)


@pytest.mark.real
async def test_datagrams_longer_than_allowed_are_dropped_and_do_no_harm() -> None:
    network = TcpNetwork()
    one, other = await network.open_datagrams(LOOPBACK), await network.open_datagrams(LOOPBACK)
    async with one, other:
        await other.send(bytes(defaults.MAX_DATAGRAM + 1), one.local)
        await other.send(bytes(defaults.MAX_DATAGRAM), one.local)
        data, _ = await one.receive()
        assert len(data) == defaults.MAX_DATAGRAM
        with pytest.raises(PeerUnreachable, match="too long"):
            await other.send(bytes(70_000), one.local)


@pytest.mark.real
async def test_a_datagram_port_in_use_or_of_another_network_is_an_error_of_configuration() -> None:
    network = TcpNetwork()
    async with await network.open_datagrams(LOOPBACK) as one:
        with pytest.raises(ConfigError, match="in use"):
            await network.open_datagrams(one.local)
    with pytest.raises(ConfigError, match="not a UDP address"):
        await network.open_datagrams(Address("mem", "n", 1))


@pytest.mark.real
async def test_who_waits_for_datagrams_is_told_when_they_are_closed() -> None:
    one = await TcpNetwork().open_datagrams(LOOPBACK)

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await one.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await one.send(b"x", LOOPBACK)
