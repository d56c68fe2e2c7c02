"""What a peer reports about its lines."""

from __future__ import annotations

import pytest
import trio

from shoal.learning.reduce.measured import measured
from shoal.transport.endpoint import Endpoint
from shoal.transport.identity import Identity

from ..transport.harness import Real, Virtual, World


async def report_in(world: World) -> tuple[int, int, int]:
    """(up, down, rtt) of a peer with one link, whose line was seen to carry 10 and 20 MB/s."""
    async with trio.open_nursery() as nursery:
        ends = []
        for name in ("a", "b"):
            host = world.host(name)
            endpoint = Endpoint(host, Identity(name.encode() * 32))
            await nursery.start(endpoint.run, [world.bind(name)])
            ends.append(endpoint)
        one, other = ends
        link = await one.connect(other.peer_id, list(other.addresses()))
        with trio.fail_after(10.0):
            while not link.nearest:
                await trio.sleep(0.01)
        now = one.host.now()
        one.line.up.windows.append((now, 10e6))
        one.line.down.windows.append((now, 20e6))
        rates = measured(one, [one.peer_id, other.peer_id])
        nursery.cancel_scope.cancel()
    return rates.up, rates.down, rates.rtt


async def test_the_rate_of_a_line_is_reported() -> None:
    up, down, rtt = await report_in(Virtual())
    assert (up, down) == (10_000_000, 20_000_000)
    assert rtt >= 20_000


@pytest.mark.real
async def test_what_passes_within_this_machine_is_no_line() -> None:
    """It shows how busy the processors were. Slices sized by that cost time and memory, and tell nothing."""
    up, down, rtt = await report_in(Real())
    assert (up, down) == (0, 0)
    assert rtt > 0
