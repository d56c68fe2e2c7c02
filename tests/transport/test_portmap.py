"""Asking routers for a port: liars, mutes, real ones (miniupnpd behind kernel NAT)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import trio

from shoal.sim import netlab
from shoal.transport.address import Address
from shoal.transport.errors import PeerUnreachable
from shoal.transport.gateway import Route
from shoal.transport.host import RealHost
from shoal.transport.portmap import Mapping, PortMapper
from shoal.transport.portmap_wire import PORT

pytestmark = pytest.mark.real

#: A router's answer to a request, or silence.
Answer = Callable[[bytes], bytes | None]


def nat_pmp(public: str = "8.8.4.4", code: int = 0, lifetime: int = 3600) -> Answer:
    """A router that speaks NAT-PMP only, and says what it likes."""

    def answer(request: bytes) -> bytes | None:
        if request[0] == 2:
            return bytes([0, 128 + request[1], 0, 1, 0, 0, 0, 9])
        if request[1] == 0:
            return bytes([0, 128]) + code.to_bytes(2, "big") + bytes(4) + bytes(map(int, public.split(".")))
        return bytes([0, 130, 0, 0, 0, 0, 0, 9]) + request[4:8] + lifetime.to_bytes(4, "big")

    return answer


class Router:
    """Listens where routers do, at a loopback address of its own."""

    def __init__(self, number: int, answer: Answer) -> None:
        self.route = Route(f"127.0.77.{number}", "127.0.0.1")
        self.requests: list[bytes] = []
        self._answer = answer

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        network = RealHost().network
        async with await network.open_datagrams(Address("tcp", self.route.gateway, PORT)) as datagrams:
            task_status.started()
            while True:
                data, source = await datagrams.receive()
                self.requests.append(data)
                answer = self._answer(data)
                if answer is not None:
                    await datagrams.send(answer, source)


async def test_an_old_router_is_asked_by_the_old_protocol_and_gives_the_port_back() -> None:
    router = Router(1, nat_pmp())
    heard: list[tuple[Mapping | None, str]] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        mapper = PortMapper(RealHost(), route=lambda: router.route)
        async with trio.open_nursery() as keeping:
            keeping.start_soon(mapper.keep, 4001, lambda mapping, reason: heard.append((mapping, reason)))
            with trio.fail_after(5):
                while not heard:
                    await trio.sleep(0.01)
            began = trio.current_time()
            keeping.cancel_scope.cancel()
        assert trio.current_time() - began < 1.0
        ((mapping, reason),) = heard
        assert mapping is not None
        assert (str(mapping.external), mapping.method, mapping.trouble) == ("tcp://8.8.4.4:4001", "nat-pmp", "")
        assert reason == f"by NAT-PMP of the router {router.route.gateway}"
        assert mapper.troubles == {"pcp": f"the router {router.route.gateway} speaks NAT-PMP only"}
        # taken back: our port, no external one, for 0 s
        assert router.requests[-1] == bytes([0, 2, 0, 0]) + (4001).to_bytes(2, "big") + bytes(6)
        nursery.cancel_scope.cancel()


async def test_a_double_nat_is_said() -> None:
    router = Router(2, nat_pmp("192.168.178.20"))
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        found = await PortMapper(RealHost(), route=lambda: router.route).map(4001, methods=("nat-pmp",))
        assert "double NAT" in found.trouble
        nursery.cancel_scope.cancel()


async def test_a_router_that_refuses_or_rambles_is_quoted_and_costs_little() -> None:
    for number, answer, word in (
        (3, nat_pmp(code=2), "switched off"),
        (4, lambda request: b"\0\x80" + bytes(900), "does not answer"),
        (5, lambda request: None, "does not answer"),
    ):
        router = Router(number, answer)
        async with trio.open_nursery() as nursery:
            await nursery.start(router.run)
            mapper = PortMapper(RealHost(), route=lambda router=router: router.route)  # type: ignore[misc]
            began = trio.current_time()
            with pytest.raises(PeerUnreachable, match=word):
                await mapper.map(4001, methods=("pcp", "nat-pmp"))
            assert trio.current_time() - began < 5.0
            assert len(router.requests) <= 6
            nursery.cancel_scope.cancel()


async def test_answers_from_elsewhere_are_not_heard() -> None:
    """Somebody on the LAN answers faster than the router."""
    forged = nat_pmp("6.6.6.6")
    async with trio.open_nursery() as nursery:
        network = RealHost().network
        async with await network.open_datagrams(Address("tcp", "127.0.77.99", 0)) as elsewhere:
            heard: list[bytes] = []

            def mute(data: bytes) -> None:
                heard.append(data)

            router = Router(6, mute)
            await nursery.start(router.run)

            async def forge() -> None:
                # It cannot know our port; here it is told every port that could be ours.
                while not heard:
                    await trio.sleep(0.01)
                for port in range(32768, 61000):
                    answer = forged(b"\0\0")
                    assert answer is not None
                    await elsewhere.send(answer, Address("tcp", "127.0.0.1", port))

            nursery.start_soon(forge)
            with pytest.raises(PeerUnreachable, match="does not answer"):
                await PortMapper(RealHost(), route=lambda: router.route).map(4001, methods=("nat-pmp",))
            nursery.cancel_scope.cancel()


async def test_without_a_gateway_there_is_nobody_to_ask() -> None:
    with pytest.raises(PeerUnreachable, match="no IPv4 gateway"):
        await PortMapper(RealHost(), route=lambda: None).map(4001, methods=("pcp", "nat-pmp"))


ASK = """
import sys, trio
from shoal.transport.host import RealHost
from shoal.transport.portmap import PortMapper
async def main():
    mapper = PortMapper(RealHost())
    found = await mapper.map(int(sys.argv[2]), methods=(sys.argv[1],))
    print(found.external, found.method, found.trouble, flush=True)
    sys.stdin.readline()
    await mapper.unmap(found)
    print("taken back", flush=True)
trio.run(main)
"""
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1.0)
    print("connected")
except OSError as error:
    print("not connected")
"""
LISTEN = (
    "import socket, sys; s = socket.create_server(('', int(sys.argv[1]))); print('up', flush=True); sys.stdin.read()"
)


@pytest.mark.netns
@pytest.mark.skipif(netlab.unavailable("upnp") is not None, reason=f"no NAT lab: {netlab.unavailable('upnp')}")
@pytest.mark.parametrize("method", ["pcp", "nat-pmp", "upnp"])
def test_a_real_router_maps_the_port_and_takes_it_back(method: str) -> None:
    port = 4100
    with netlab.NetLab(f"map-{method}") as lab:
        home, far = lab.add("home", "upnp"), lab.add("far", "public4")

        def reached() -> str:
            arguments = (sys.executable, "-c", CONNECT, str(home.external), str(port))
            return subprocess.run(
                lab.command(far, *arguments), capture_output=True, text=True, timeout=30, check=True
            ).stdout.strip()

        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        listening = lab.command(home, sys.executable, "-c", LISTEN, str(port))
        asking = lab.command(home, sys.executable, "-c", ASK, method, str(port))
        with subprocess.Popen(listening, **pipes) as listener:  # type: ignore[call-overload]
            try:
                assert listener.stdout.readline() == "up\n"
                assert reached() == "not connected"
                with subprocess.Popen(asking, **pipes) as asker:  # type: ignore[call-overload]
                    try:
                        assert asker.stdout.readline().split() == [f"tcp://{home.external}:{port}", method]
                        assert reached() == "connected"
                        asker.stdin.write("\n")
                        asker.stdin.flush()
                        assert asker.stdout.readline() == "taken back\n"
                        assert reached() == "not connected"
                    finally:
                        asker.kill()
            finally:
                listener.kill()
