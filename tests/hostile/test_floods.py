"""Floods from other processes through the kernel: what a node goes through, and what honest peers notice of it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity, PeerId
from shoal.transport.network import ByteStream
from shoal.transport.tcp import TcpNetwork, TcpStream

from .victim_child import ECHO, Echo

HERE = Path(__file__).parent
SECONDS = 3.0
#: Where honest peers come from; the flood comes from 127.0.0.1.
ELSEWHERE = "127.0.0.2"

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of its own only on Linux"),
]


class FromElsewhere(TcpNetwork):
    """Dials from another loopback address."""

    async def dial(self, address: Address, *, shared_port: bool = False) -> ByteStream:
        sock = trio.socket.socket()
        await sock.bind((ELSEWHERE, 0))
        await sock.connect((address.host, address.port))
        return TcpStream(sock)


class VictimProcess:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        first = self._line()
        self.address = Address("tcp", "127.0.0.1", first["port"])
        self.peer = PeerId.parse(first["peer"])

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        return found

    async def state(self) -> dict[str, Any]:
        """Its counters, links, tasks and resident bytes, now."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return await trio.to_thread.run_sync(self._line)


@contextmanager
def victim() -> Iterator[VictimProcess]:
    command = [sys.executable, str(HERE / "victim_child.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            yield VictimProcess(child)
        finally:
            child.kill()


async def flood(address: Address, kind: str, held: int) -> float:
    """Run the flood in a process of its own; attempts per second."""
    command = [sys.executable, str(HERE / "flood_child.py"), str(address.port), str(SECONDS), kind, str(held)]
    done = await trio.run_process(command, capture_stdout=True)
    counted = json.loads(done.stdout.splitlines()[-1])
    return float(counted["rate"])


def honest() -> Endpoint:
    host = RealHost()
    host.network = FromElsewhere()
    return Endpoint(host, Identity(os.urandom(32)))


async def call_for(endpoint: Endpoint, peer: PeerId, seconds: float, times: list[float]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        assert (await endpoint.call(peer, ECHO, Echo("x" * 100), timeout=10.0)).text == "x" * 100
        times.append(time.perf_counter() - began)
        await trio.sleep(0.005)


async def join_for(address: Address, peer: PeerId, seconds: float, times: list[float]) -> None:
    """Newcomers, one after the other: each connects, shakes hands and asks."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        endpoint = honest()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run)
            began = time.perf_counter()
            await endpoint.connect(peer, [address], timeout=20.0)
            await endpoint.call(peer, ECHO, Echo("new"), timeout=10.0)
            times.append(time.perf_counter() - began)
            nursery.cancel_scope.cancel()
        await trio.sleep(0.05)


@pytest.mark.parametrize(("kind", "held"), [("silent", 4000), ("hello", 2000)])
async def test_thousands_of_connections_a_second_from_one_address_leave_other_peers_their_service(
    kind: str, held: int, record_property: Any
) -> None:
    """Measured beside other work on 2 cores: 5,000 to 23,000 attempts per second, 3 MB more of memory; honest calls 21
    to 64 ms at the 99th percentile, newcomers in 26 to 260 ms (median). The bounds leave room for a busy machine."""
    calls, joins = list[float](), list[float]()
    with victim() as target:
        endpoint = honest()
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run)
            await endpoint.connect(target.peer, [target.address])
            await call_for(endpoint, target.peer, 0.5, [])
            before = await target.state()
            rates: list[float] = []

            async def attack() -> None:
                rates.append(await flood(target.address, kind, held))

            async with trio.open_nursery() as during:
                during.start_soon(attack)
                await trio.sleep(0.5)
                during.start_soon(call_for, endpoint, target.peer, SECONDS, calls)
                during.start_soon(join_for, target.address, target.peer, SECONDS - 1.0, joins)
            after = await target.state()
            await call_for(endpoint, target.peer, 0.2, [])
            nursery.cancel_scope.cancel()
    refused = after["counters"].get("connections_throttled", 0)
    grown = (after["resident"] - before["resident"]) / 1e6
    p99 = sorted(calls)[int(len(calls) * 0.99)]
    figures = (
        f"{kind}, {held} held: {rates[0]:.0f} attempts/s, {refused} refused, {grown:+.1f} MB, {after['tasks']} tasks; "
        f"calls p50 {statistics.median(calls) * 1e3:.1f} p99 {p99 * 1e3:.1f} ms; "
        f"{len(joins)} newcomers p50 {statistics.median(joins) * 1e3:.0f} max {max(joins) * 1e3:.0f} ms"
    )
    record_property("figures", figures)
    print(figures)
    assert rates[0] >= 3000, figures
    assert refused >= 3000, figures
    assert grown < 32, figures
    assert after["tasks"] < 64 + 256, figures
    assert p99 < 0.5, figures
    # A SYN that finds the queue full is sent again after 1, 2 and 4 s: the kernel's, not ours.
    assert statistics.median(joins) < 5.0, figures
