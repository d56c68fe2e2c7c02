"""Kernel TCP: conformance over IPv4 and IPv6, and what only real sockets do."""

from __future__ import annotations

import os
import resource
import socket
import struct

import pytest
import trio

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
