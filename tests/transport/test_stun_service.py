"""A STUN server and its clients over real datagrams: answers, silence, limits."""

from __future__ import annotations

import random

import pytest
import trio

from shoal.transport import deadlines, defaults, stun
from shoal.transport.address import Address
from shoal.transport.host import Host
from shoal.transport.stun import classify_mapping
from shoal.transport.stun_service import SourceLimit, StunServer, observe

from .harness import Real


async def serve_and_ask(asking: Host, serving: Host, ours: Address, theirs: Address) -> None:
    async with (
        await serving.network.open_datagrams(theirs) as served,
        await asking.network.open_datagrams(ours) as datagrams,
        trio.open_nursery() as nursery,
    ):
        server = StunServer(serving, served)
        nursery.start_soon(server.run)
        (seen,) = await observe(asking, datagrams, (served.local,))
        assert seen.mapped == datagrams.local
        assert server.answered == 1
        mapping, reason = classify_mapping((datagrams.local,), (seen,))
        assert mapping == "none", reason
        nursery.cancel_scope.cancel()


@pytest.mark.real
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_client_learns_its_address_over_udp(host: str) -> None:
    bind = Address("tcp", host, 0)
    await serve_and_ask(Real().host("a"), Real().host("b"), bind, bind)


@pytest.mark.real
async def test_silence_is_told_as_such_after_three_requests() -> None:
    host = Real().host("a")
    bind = Address("tcp", "127.0.0.1", 0)
    async with (
        await host.network.open_datagrams(bind) as silent,
        await host.network.open_datagrams(bind) as datagrams,
    ):
        began = trio.current_time()
        (seen,) = await observe(host, datagrams, (silent.local,))
        assert seen.mapped is None
        assert "no answer to 3 requests" in seen.trouble
        assert trio.current_time() - began >= deadlines.stun() - 0.05
        for _ in range(3):
            data, _ = await silent.receive()
            assert stun.decode(data).kind == "request"


@pytest.mark.real
async def test_a_forged_answer_from_elsewhere_or_with_other_bits_is_passed_over() -> None:
    host = Real().host("a")
    bind = Address("tcp", "127.0.0.1", 0)
    forged = Address("tcp", "203.0.113.66", 666)
    async with (
        await host.network.open_datagrams(bind) as served,
        await host.network.open_datagrams(bind) as stranger,
        await host.network.open_datagrams(bind) as datagrams,
        trio.open_nursery() as nursery,
    ):

        async def serve() -> None:
            data, source = await served.receive()
            right = stun.answer(data, forged)
            assert right is not None
            await stranger.send(right, source)  # the right bits from the wrong place
            wrong = stun.answer(stun.request(bytes(12)), forged)
            assert wrong is not None
            await served.send(wrong, source)  # the wrong bits from the right place
            await served.send(b"\x16\xfe\xfd junk", source)
            answered = stun.answer(data, source)
            assert answered is not None
            await served.send(answered, source)

        nursery.start_soon(serve)
        (seen,) = await observe(host, datagrams, (served.local,))
        assert seen.mapped == datagrams.local


@pytest.mark.real
async def test_junk_and_floods_get_silence_and_the_server_goes_on() -> None:
    host = Real().host("a")
    bind = Address("tcp", "127.0.0.1", 0)
    async with (
        await host.network.open_datagrams(bind) as served,
        await host.network.open_datagrams(bind) as datagrams,
        trio.open_nursery() as nursery,
    ):
        server = StunServer(host, served)
        nursery.start_soon(server.run)
        generator = random.Random(1)
        for _ in range(20):
            await datagrams.send(generator.randbytes(generator.randrange(1, 1200)), served.local)
        for n in range(100):
            await datagrams.send(stun.request(n.to_bytes(12, "big")), served.local)
        while server.answered + server.dropped < 120:
            await trio.sleep(0.01)
        # The burst is for all from one address, junk included.
        assert 0 < server.answered <= defaults.STUN_BURST
        await trio.sleep(2 / defaults.STUN_RATE)
        (seen,) = await observe(host, datagrams, (served.local,))
        assert seen.mapped == datagrams.local
        nursery.cancel_scope.cancel()


def test_a_source_gets_its_burst_and_then_its_rate() -> None:
    limit = SourceLimit(rate=2.0, burst=4.0, sources=10, total_rate=1000.0)
    source = Address("tcp", "192.0.2.1", 1)
    assert sum(limit.admit(source, 0.0) for _ in range(10)) == 4
    assert sum(limit.admit(source, 1.0) for _ in range(10)) == 2
    assert limit.admit(Address("tcp", "192.0.2.2", 1), 1.0)


def test_the_ports_of_an_address_and_the_hosts_of_a_64_are_one_source() -> None:
    limit = SourceLimit(rate=1.0, burst=2.0, sources=10, total_rate=1000.0)
    assert sum(limit.admit(Address("tcp", "192.0.2.1", port), 0.0) for port in range(9)) == 2
    assert sum(limit.admit(Address("tcp", f"2001:db8::{n:x}", 1), 0.0) for n in range(1, 9)) == 2


def test_the_table_of_sources_stays_bounded_and_so_does_the_total() -> None:
    limit = SourceLimit(rate=1.0, burst=2.0, sources=100, total_rate=500.0)
    admitted = sum(limit.admit(Address("tcp", f"10.{n >> 8 & 255}.{n & 255}.1", 1), 0.0) for n in range(5000))
    assert admitted == 500
    assert len(limit) == 100
