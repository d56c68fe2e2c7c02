"""Plain links: real calls without encryption, in the memory network and nowhere else."""

from __future__ import annotations

import gc
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from shoal.sim.virtual import VirtualHost
from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import ConfigError, LinkClosed, PeerUnreachable, ProtocolMisuse, RemoteRefused, WaitExpired
from shoal.transport.frames import GoodbyeCode
from shoal.transport.host import RealHost
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryWorld, Route
from shoal.transport.memory_plain import PlainEndpoint, PlainLink
from shoal.transport.rpc import Call, Method


@attrs.frozen
class Word:
    text: str


ECHO = Method("test.echo", Word, Word)
SLOW = Method("test.slow", Word, Word)
LATENCY = 0.05


def answer(call: Call[Word]) -> Word:
    if call.request.text == "refuse":
        raise RemoteRefused("no", "not this word")
    if call.request.text == "bug":
        raise ZeroDivisionError
    return Word(call.request.text * 2)


async def slowly(call: Call[Word]) -> Word:
    await trio.sleep(float(call.request.text))
    return Word("at last")


class Nodes:
    """Endpoints ``a``, ``b``, ``c`` … in one world."""

    def __init__(self, nursery: trio.Nursery, **world: object) -> None:
        self.world = MemoryWorld(random.Random(0), default=Route(latency=LATENCY), **world)  # type: ignore[arg-type]
        self.nursery = nursery

    async def add(self, name: str, *, max_links: int = defaults.MAX_LINKS) -> PlainEndpoint:
        host = VirtualHost(name, self.world, seed=1)
        endpoint = PlainEndpoint(host, Identity(name.encode().ljust(32, b".")), max_links=max_links)
        endpoint.serve_at_once(ECHO, answer)
        endpoint.serve(SLOW, slowly)
        await self.nursery.start(endpoint.run, [Address("mem", name, 1)])
        return endpoint


@asynccontextmanager
async def nodes(**world: object) -> AsyncIterator[Nodes]:
    async with trio.open_nursery() as nursery:
        yield Nodes(nursery, **world)
        nursery.cancel_scope.cancel()


async def meet(one: PlainEndpoint, other: PlainEndpoint) -> None:
    await one.connect(other.peer_id, other.addresses())


async def test_a_call_takes_one_round_trip_and_a_link_three() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        assert trio.current_time() == pytest.approx(6 * LATENCY)
        assert await a.call(b.peer_id, ECHO, Word("ho")) == Word("hoho")
        assert trio.current_time() == pytest.approx(8 * LATENCY)
        # Both ends know each other, with their signed records, as after a real handshake and hello.
        assert b.link(a.peer_id) is not None
        assert a.contact(b.peer_id) == b.record()
        assert b.contact(a.peer_id) == a.record()
        link = a.link(b.peer_id)
        assert link is not None
        assert link.rtt == pytest.approx(2 * LATENCY)


async def test_a_call_takes_as_long_as_the_line_needs_for_its_bytes_and_those_before() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        world.world.set_uplink("b", 10_000.0)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # three answers of twice 1,000 bytes share the line
                nursery.start_soon(a.call, b.peer_id, ECHO, Word("x" * 1000))
        assert trio.current_time() - began == pytest.approx(2 * LATENCY + 3 * 0.2, rel=0.1)


async def test_refusals_and_bugs_come_back_as_typed_errors() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        with pytest.raises(RemoteRefused, match="not this word"):
            await a.call(b.peer_id, ECHO, Word("refuse"))
        with pytest.raises(RemoteRefused, match="internal"):
            await a.call(b.peer_id, ECHO, Word("bug"))
        with pytest.raises(RemoteRefused, match="no method"):
            await a.call(b.peer_id, Method("test.nothing", Word, Word), Word(""))
        assert await a.call(b.peer_id, ECHO, Word("x")) == Word("xx")  # the link has lived through it all


async def test_a_deadline_ends_a_call_on_both_sides() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        with pytest.raises(WaitExpired):
            await a.call(b.peer_id, SLOW, Word("100"), timeout=1.0)
        await trio.sleep(1.0)
        link = b.link(a.peer_id)
        assert link is None or link.idle


@pytest.mark.parametrize("how", ["kill", "unplug", "stop"])
async def test_whoever_waits_learns_that_the_peer_has_gone(how: str) -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def leave() -> None:
                await trio.sleep(0.5)
                if how == "kill":
                    world.world.kill("b")
                elif how == "unplug":
                    world.world.unplug("b")
                else:
                    for link in b.links():
                        link.say_goodbye("enough", GoodbyeCode.LEAVING)

            began = trio.current_time()
            with pytest.raises((LinkClosed, WaitExpired)):
                await a.call(b.peer_id, SLOW, Word("100"), timeout=3.0)
            # A kernel closes connections, a machine without a network says nothing.
            assert trio.current_time() - began == pytest.approx(3.0 if how == "unplug" else 0.5 + LATENCY)
        await trio.sleep(1.0)
        assert a.link(b.peer_id) is None
        if how != "stop":
            with pytest.raises((PeerUnreachable, WaitExpired)):
                await a.call(b.peer_id, ECHO, Word("x"), timeout=3.0)


async def test_a_frozen_peer_answers_when_it_goes_on() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        world.world.freeze("b")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def later() -> None:
                await trio.sleep(5.0)
                world.world.unfreeze("b")

            began = trio.current_time()
            assert await a.call(b.peer_id, ECHO, Word("x"), timeout=20.0) == Word("xx")
            assert trio.current_time() - began == pytest.approx(5.0 + LATENCY)


async def test_a_partition_swallows_calls_and_a_new_link_heals_it() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        world.world.partition(["a"], ["b"])
        with pytest.raises(WaitExpired):
            await a.call(b.peer_id, ECHO, Word("x"), timeout=2.0)
        world.world.heal()
        assert await a.call(b.peer_id, ECHO, Word("x"), timeout=5.0) == Word("xx")


async def test_a_dial_names_the_addresses_and_why_each_failed() -> None:
    async with nodes() as world:
        a, b, c = await world.add("a"), await world.add("b"), await world.add("c")
        with pytest.raises(PeerUnreachable) as caught:
            await a.connect(b.peer_id, [Address("mem", "b", 9), Address("mem", "c", 1), Address("tcp", "127.0.0.1", 1)])
        reasons = dict(caught.value.attempts)
        assert "refused" in reasons["mem://b:9"]
        assert "another peer" in reasons["mem://c:1"]
        assert "not an address of this network" in reasons["tcp://127.0.0.1:1"]
        with pytest.raises(PeerUnreachable, match="itself"):
            await a.identify(Address("mem", "a", 1))
        assert (await a.identify(Address("mem", "c", 1))).peer == c.peer_id


async def test_a_lost_request_to_connect_is_repeated() -> None:
    async with nodes(routes=lambda source, target: Route(latency=LATENCY, loss=0.5)) as world:
        a, b = await world.add("a"), await world.add("b")
        with trio.fail_after(60):
            await meet(a, b)


async def test_idle_links_beyond_the_limit_give_way_least_recently_used_first() -> None:
    async with nodes() as world:
        hub = await world.add("hub", max_links=3)
        others = [await world.add(f"n{number}") for number in range(4)]
        for other in others[:3]:
            await meet(hub, other)
        await trio.sleep(10)
        await hub.call(others[0].peer_id, ECHO, Word("x"))
        await meet(hub, others[3])
        await trio.sleep(1)
        assert [link.peer for link in hub.links()] == [o.peer_id for o in (others[2], others[0], others[3])]
        # The one that was let go is asked again all the same.
        assert await hub.call(others[1].peer_id, ECHO, Word("y")) == Word("yy")


async def test_links_that_have_ended_are_freed_without_the_cycle_collector() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        gc.collect()
        gc.disable()
        try:
            await meet(a, b)
            await a.call(b.peer_id, ECHO, Word("x"))
            assert count_links() == 2
            a.links()[0].say_goodbye("enough", GoodbyeCode.LEAVING)
            await trio.sleep(1)
            assert count_links() == 0
        finally:
            gc.enable()


def count_links() -> int:
    return sum(type(thing) is PlainLink for thing in gc.get_objects())


async def test_streams_are_refused_by_name() -> None:
    async with nodes() as world:
        a, b = await world.add("a"), await world.add("b")
        await meet(a, b)
        with pytest.raises(ProtocolMisuse, match="plain suite"):
            await a.call(b.peer_id, ECHO, Word("x"), body=[b"bulk"])


async def test_it_is_never_negotiated_with_a_real_endpoint() -> None:
    async with nodes() as world:
        a = await world.add("a")
        host = VirtualHost("real", world.world, seed=1)
        real = Endpoint(host, Identity(b"r" * 32))
        await world.nursery.start(real.run, [Address("mem", "real", 1)])
        with pytest.raises(PeerUnreachable, match="refused"):
            await a.connect(real.peer_id, [Address("mem", "real", 1)])
        with pytest.raises(PeerUnreachable, match="refused"):
            await real.connect(a.peer_id, [Address("mem", "a", 1)])


def test_it_does_not_exist_on_a_real_network() -> None:
    with pytest.raises(ConfigError, match="memory network"):
        PlainEndpoint(RealHost(), Identity(bytes(32)))
