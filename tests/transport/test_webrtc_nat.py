"""WebRTC and STUN through real kernel NAT: what observers see, and two hosts behind cone NATs that meet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from shoal.sim.netlab import LabHost, NetLab, unavailable
from shoal.transport.address import Address
from shoal.transport.errors import PeerUnreachable
from shoal.transport.host import RealHost
from shoal.transport.network import ByteStream
from shoal.transport.stun import classify_mapping
from shoal.transport.stun_service import StunServer, observe
from shoal.transport.webrtc import WebRtcAnswerer, WebRtcStream, offer
from shoal.transport.webrtc_process import ChildEngine
from shoal.transport.webrtc_signal import IceServers, TurnServer

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(unavailable() is not None, reason=f"no NAT lab here: {unavailable()}"),
]


@pytest.fixture
def lab() -> Iterator[NetLab]:
    with NetLab("webrtc") as made:
        yield made


@asynccontextmanager
async def stun_servers(lab: NetLab, *names: str) -> AsyncIterator[tuple[Address, ...]]:
    """Public hosts of the lab that answer STUN, in this process: their sockets were made over there."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        addresses = []
        for name in names:
            public = lab.add(name, "public")
            assert public.four is not None
            host = RealHost()
            with lab.inside(public):
                served = await host.network.open_datagrams(Address("tcp", public.four, 3478))
            stack.push_async_callback(served.aclose)
            nursery.start_soon(StunServer(host, served).run)
            addresses.append(served.local)
        yield tuple(addresses)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("public", "none"), ("cone", "endpoint-independent"), ("symmetric", "address-dependent")],
)
async def test_two_observers_recognise_each_kind_of_nat(lab: NetLab, kind: str, expected: str) -> None:
    async with stun_servers(lab, "one", "two") as observers:
        home = lab.add("home", kind)
        assert home.four is not None
        host = RealHost()
        with lab.inside(home):
            datagrams = await host.network.open_datagrams(Address("tcp", home.four, 0))
        async with datagrams:
            seen = await observe(host, datagrams, observers)
            mapping, reason = classify_mapping((datagrams.local,), seen)
            assert mapping == expected, reason


class LabEngine(ChildEngine):
    """Engines that run on a host of the lab."""

    def __init__(self, lab: NetLab, host: LabHost) -> None:
        super().__init__()
        self._command = lab.command(host, sys.executable)

    def interpreter(self) -> list[str]:
        return self._command


async def test_two_hosts_behind_cone_nats_meet_with_the_help_of_a_stun_server(lab: NetLab) -> None:
    async with stun_servers(lab, "public") as observers, trio.open_nursery() as nursery:
        hosts = []
        for name in ("alice", "bob"):
            host = RealHost()
            host.webrtc = LabEngine(lab, lab.add(name, "cone"))
            hosts.append(host)
        servers = IceServers(stun=observers)
        arrived, arrivals = trio.open_memory_channel[ByteStream](1)
        answerer = WebRtcAnswerer(hosts[1], arrived.send, lambda: servers)
        await nursery.start(answerer.run)

        async def ask(kind: str, body: bytes) -> bytes:
            return await answerer.answer(body)

        async with await offer(hosts[0], ask, servers) as ours, await arrivals.receive() as theirs:
            assert isinstance(theirs, WebRtcStream)
            assert ours.remote.host.startswith("30.0.")  # an outside address, not the home's
            await ours.send_all(b"hello from behind a NAT")
            assert await theirs.receive_some() == b"hello from behind a NAT"
            await theirs.send_all(b"and back")
            assert await ours.receive_some() == b"and back"
        nursery.cancel_scope.cancel()


async def test_symmetric_nats_on_both_sides_end_in_an_error_that_names_what_was_tried(lab: NetLab) -> None:
    async with stun_servers(lab, "public") as observers, trio.open_nursery() as nursery:
        hosts = []
        for name in ("alice", "bob"):
            host = RealHost()
            host.webrtc = LabEngine(lab, lab.add(name, "symmetric"))
            hosts.append(host)
        servers = IceServers(stun=observers)

        async def nobody(stream: ByteStream) -> None:
            raise AssertionError("they met")

        answerer = WebRtcAnswerer(hosts[1], nobody, lambda: servers)
        await nursery.start(answerer.run)

        async def ask(kind: str, body: bytes) -> bytes:
            return await answerer.answer(body)

        with pytest.raises(PeerUnreachable, match="srflx 30.0."):
            await offer(hosts[0], ask, servers)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def turn_server(lab: NetLab, folder: Path) -> AsyncIterator[TurnServer]:
    """coturn on a public host of the lab."""
    public = lab.add("turn", "public")
    assert public.four is not None
    arguments = (
        "turnserver -n --no-cli --no-tls --no-dtls --lt-cred-mech --realm=lab --user=ann:secret "
        f"--listening-ip={public.four} --relay-ip={public.four} --listening-port=3479 "
        f"--pidfile={folder}/pid --db={folder}/db --log-file={folder}/log --simple-log"
    )
    process = await trio.lowlevel.open_process(
        lab.command(public, *arguments.split()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield TurnServer(public.four, 3479, "ann", "secret")
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.skipif(shutil.which("turnserver") is None, reason="no TURN server here (Debian package coturn)")
async def test_symmetric_nats_meet_through_a_turn_server_that_was_configured(lab: NetLab, tmp_path: Path) -> None:
    async with turn_server(lab, tmp_path) as turn, trio.open_nursery() as nursery:
        hosts = []
        for name in ("alice", "bob"):
            host = RealHost()
            host.webrtc = LabEngine(lab, lab.add(name, "symmetric"))
            hosts.append(host)
        servers = IceServers(turn=turn)
        arrived, arrivals = trio.open_memory_channel[ByteStream](1)
        answerer = WebRtcAnswerer(hosts[1], arrived.send, lambda: servers)
        await nursery.start(answerer.run)

        async def ask(kind: str, body: bytes) -> bytes:
            return await answerer.answer(body)

        sent = os.urandom(1 << 20)
        async with await offer(hosts[0], ask, servers) as ours, await arrivals.receive() as theirs:
            assert "relay" in ours.how
            nursery.start_soon(ours.send_all, sent)
            got = bytearray()
            while len(got) < len(sent):
                got += await theirs.receive_some()
            assert got == sent
        nursery.cancel_scope.cancel()
