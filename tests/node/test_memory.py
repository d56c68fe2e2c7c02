"""An idle node is small: no torch, no aiortc, no numpy, and less than 60 MiB, with 32 peers as well."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import trio
from shoal.node.relay_node import RelayNode
from shoal.transport.address import Address
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
import shoal.node.relay

HEAVY = ("torch", "aiortc", "av", "numpy", "sklearn", "safetensors", "cryptography", "aioice", "rich")

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024

async def main():
    host = RealHost()
    async with trio.open_nursery() as nursery:
        node = RelayNode(host, Identity(host.entropy(32)), bind=(Address("tcp", "127.0.0.1", 0),))
        await nursery.start(node.run)
        print(resident(), node.addresses()[0], *(name for name in HEAVY if name in sys.modules), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        peers = len(node.dht.table)
        print(resident(), peers, *(name for name in HEAVY if name in sys.modules), flush=True)
        node.stop()

trio.run(main)
"""

CROWD = """
import sys
import trio
from shoal.dht.kademlia.node import Dht
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity

async def main():
    async with trio.open_nursery() as nursery:
        for _ in range(32):
            host = RealHost()
            endpoint = Endpoint(host, Identity(host.entropy(32)))
            await nursery.start(endpoint.run, [Address("tcp", "127.0.0.1", 0)])
            await Dht(endpoint).bootstrap([Address.parse(sys.argv[1])])
        print("joined", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.cancel_scope.cancel()

trio.run(main)
"""

LIMIT = 60.0


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_idle_node_takes_less_than_60_mib_and_loads_nothing_heavy() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], **pipes) as node:  # type: ignore[call-overload]
        alone, address, *heavy = node.stdout.readline().split()
        assert heavy == []
        assert float(alone) < LIMIT
        with subprocess.Popen([sys.executable, "-c", CROWD, address], **pipes) as crowd:  # type: ignore[call-overload]
            assert crowd.stdout.readline() == "joined\n"
            among, peers, *heavy = node.communicate("\n", timeout=60)[0].split()
            crowd.communicate("\n", timeout=60)
    assert heavy == []
    assert int(peers) > 20
    assert float(among) < LIMIT, f"{among} MiB with {peers} peers in the table, {alone} alone"
