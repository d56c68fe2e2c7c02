"""Links: conformance in both worlds, keepalive, frozen peers, virtual time without storms."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shoal.transport import defaults
from shoal.transport.deadlines import LoopLag
from shoal.transport.errors import HandshakeError, LinkClosed, WaitExpired
from shoal.transport.establish import establish
from shoal.transport.identity import Identity
from shoal.transport.link import Priority
from shoal.transport.memory import Route
from shoal.transport.secure import SecureChannel

from .harness import Real, Virtual, World, connect_bytes, link_pair
from .link_conformance import LinkConformance


class TestInMemory(LinkConformance):
    def world(self) -> World:
        return Virtual()


class TestInMemoryOnASlowLine(LinkConformance):
    def world(self) -> World:
        return Virtual(Route(latency=0.05, bandwidth=20e6, window=1 << 20))


@pytest.mark.real
class TestOverTcp(LinkConformance):
    def world(self) -> World:
        return Real()


async def test_an_idle_link_is_kept_alive_by_one_ping_per_interval() -> None:
    async with link_pair(Virtual()) as pair:
        await trio.sleep(1.0)
        before = pair.a.bytes_sent + pair.b.bytes_sent
        await trio.sleep(100 * defaults.KEEPALIVE_IDLE)
        assert pair.a.alive
        assert pair.b.alive
        # One side's ping is a sign of life for the other: 100 pings and 100 answers of 9 bytes in a record each.
        per_exchange = (pair.a.bytes_sent + pair.b.bytes_sent - before) / 100
        assert 50 <= per_exchange <= 3 * 9 * 8
        assert pair.a.rtt == pytest.approx(0.02, abs=0.001) or pair.b.rtt == pytest.approx(0.02, abs=0.001)


async def test_a_frozen_peer_is_found_within_ten_seconds_and_named() -> None:
    world = Virtual()
    async with link_pair(world) as pair:
        stream = await pair.a.open_stream("x")
        await trio.sleep(3)
        world.memory.freeze("there")
        frozen = trio.current_time()
        with pytest.raises(LinkClosed, match="no sign of life within 5.0 s"):
            await stream.receive_some()
        assert 5 <= trio.current_time() - frozen <= 10.1
        await pair.a.closed.wait()
        assert isinstance(pair.a.close_reason, WaitExpired)
        assert pair.a.close_reason.awaited == "sign of life"
        assert pair.a.peer.short in str(pair.a.close_reason)


async def test_a_peer_frozen_in_the_middle_of_a_bulk_transfer_is_found() -> None:
    world = Virtual()
    async with link_pair(world) as pair:
        stream = await pair.a.open_stream("x", Priority.BULK)
        world.memory.freeze("there")
        frozen = trio.current_time()
        with pytest.raises(LinkClosed, match="no sign of life"):
            await stream.send_all(bytes(64 << 20))
        assert trio.current_time() - frozen <= 10.1


async def test_a_vanished_network_is_found_by_both_sides() -> None:
    world = Virtual()
    async with link_pair(world) as pair:
        world.memory.partition(["here"], ["there"])
        began = trio.current_time()
        await pair.a.closed.wait()
        await pair.b.closed.wait()
        assert trio.current_time() - began <= 10.2
        assert isinstance(pair.a.close_reason, WaitExpired)
        assert isinstance(pair.b.close_reason, WaitExpired)


async def test_a_slow_line_full_of_bulk_is_not_a_dead_one() -> None:
    # 20 kB/s: a record takes 13 s on the line, and the answer to a ping waits behind it.
    async with link_pair(Virtual(Route(latency=0.3, bandwidth=20e3, window=1 << 20, buffer=64 << 10))) as pair:
        stream = await pair.a.open_stream("x", Priority.BULK)
        theirs = await pair.accept()
        with trio.fail_after(600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(2 << 20))
                await theirs.read_exactly_into(memoryview(bytearray(2 << 20)))
        assert pair.a.alive
        assert pair.b.alive


async def test_a_peer_that_wakes_before_the_deadline_keeps_its_link() -> None:
    world = Virtual()
    async with link_pair(world) as pair:
        await trio.sleep(1)
        world.memory.freeze("there")
        await trio.sleep(4)
        world.memory.unfreeze("there")
        await trio.sleep(30)
        assert pair.a.alive


def channel(identity: Identity, entropy: LoopLag | None = None, *, initiator: bool) -> SecureChannel:
    import os

    return SecureChannel(initiator=initiator, identity=identity, entropy=os.urandom, wall=1.7e9)


@pytest.mark.parametrize("initiator", [True, False])
async def test_a_silent_peer_is_shut_out_after_the_handshake_deadline(initiator: bool) -> None:
    here, _, raw, other = await connect_bytes(Virtual())
    began = trio.current_time()
    with pytest.raises(WaitExpired, match="it connected and says nothing within 8.0 s"):
        await establish(here, raw, channel(Identity(bytes(32)), initiator=initiator), LoopLag())
    assert trio.current_time() - began == pytest.approx(defaults.HANDSHAKE_FLOOR)
    with trio.fail_after(1):
        while await other.receive_some():
            pass


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 10_000])
async def test_garbage_instead_of_a_handshake_is_named(garbage: bytes) -> None:
    here, _, raw, other = await connect_bytes(Virtual())
    await other.send_all(garbage)
    with pytest.raises(HandshakeError, match="not a Shoal peer"):
        await establish(here, raw, channel(Identity(bytes(32)), initiator=False), LoopLag())


async def test_a_peer_that_hangs_up_in_the_handshake_is_named() -> None:
    here, _, raw, other = await connect_bytes(Virtual())
    await other.aclose()
    with pytest.raises(LinkClosed, match=r"hung up|broke"):
        await establish(here, raw, channel(Identity(bytes(32)), initiator=True), LoopLag())
