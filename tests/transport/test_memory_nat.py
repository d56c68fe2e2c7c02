"""NAT, firewalls and changes of address in the memory network."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio

from shoal.transport.address import Address
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.memory import MemoryListener, MemoryStream, MemoryWorld, Route
from shoal.transport.memory_nat import HOLE_LIFETIME
from shoal.transport.network import ByteStream

HOP = 0.02


class Site:
    """A world with public ``p`` and ``q``, and listeners at port 1 of every machine asked for."""

    def __init__(self, **routes: Route) -> None:
        self.world = MemoryWorld(random.Random(5), default=Route(latency=HOP))
        self.listeners: dict[str, MemoryListener] = {}

    async def add(self, *names: str) -> None:
        for name in names:
            self.listeners[name] = await self.world.network(name).listen(mem(name))

    async def dial(self, name: str, to: Address, seconds: float = 20.0, **how: bool) -> MemoryStream:
        with trio.fail_after(seconds):
            return await self.world.network(name).dial(to, **how)

    async def seen(self, name: str, by: str, **how: bool) -> Address:
        """As whom ``by`` sees a connection from ``name``."""
        async with await self.dial(name, mem(by), **how), await self.listeners[by].accept() as theirs:
            return theirs.remote

    async def silent(self, name: str, to: Address, seconds: float = 20.0) -> bool:
        try:
            await self.dial(name, to, seconds)
        except trio.TooSlowError:
            return True
        return False


def mem(host: str, port: int = 1) -> Address:
    return Address("mem", host, port)


async def both(*calls: Callable[[], Awaitable[MemoryStream]]) -> list[MemoryStream]:
    """What the calls return, made at once."""
    results: list[MemoryStream] = []

    async def one(call: Callable[[], Awaitable[MemoryStream]]) -> None:
        results.append(await call())

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(one, call)
    return results


async def talk(one: ByteStream, other: ByteStream) -> None:
    for sender, receiver in ((one, other), (other, one)):
        await sender.send_all(b"hello")
        with trio.fail_after(10):
            assert await receiver.receive_some() == b"hello"


async def test_a_machine_behind_a_cone_nat_is_seen_with_its_port_and_another_host() -> None:
    site = Site()
    await site.add("p", "q", "a")
    site.world.set_nat("a", "cone")
    assert [await site.seen("a", by, shared_port=True) for by in ("p", "q")] == [mem("a-nat")] * 2
    assert (await site.seen("a", "p")).port != 1, "without sharing it comes from any port"


async def test_a_machine_behind_a_symmetric_nat_is_seen_with_another_port_by_everybody() -> None:
    site = Site()
    await site.add("p", "q", "a")
    site.world.set_nat("a", "symmetric")
    seen = [await site.seen("a", by, shared_port=True) for by in ("p", "q")]
    assert [address.host for address in seen] == ["a-nat"] * 2
    assert len({address.port for address in seen} | {1}) == 3
    assert await site.seen("a", "p", shared_port=True) == seen[0], "while its entry lives it stays the same"


@pytest.mark.parametrize("kind", ["cone", "symmetric", "blocked"])
async def test_nobody_outside_reaches_a_machine_behind_nat(kind: str) -> None:
    site = Site()
    await site.add("p", "a")
    site.world.set_nat("a", kind)  # type: ignore[arg-type]
    await site.seen("a", "p", shared_port=True)
    for host in ("a", "a-nat"):
        refused = kind == "blocked" and host == "a-nat"
        if not refused:
            assert await site.silent("p", mem(host)), "not even whom it has talked to, from another port"


async def test_a_firewall_translates_nothing() -> None:
    site = Site()
    await site.add("p", "a")
    site.world.set_nat("a", "blocked")
    assert await site.seen("a", "p", shared_port=True) == mem("a")


async def test_a_hole_from_the_listening_port_leads_to_the_listener() -> None:
    site = Site()
    await site.add("a", "b")
    site.world.set_nat("a", "cone")
    site.world.set_nat("b", "cone")
    with trio.move_on_after(0.5):
        await site.world.network("a").dial(mem("b-nat"), shared_port=True)
    ours = await site.dial("b", mem("a-nat"), shared_port=True)
    theirs = await site.listeners["a"].accept()
    assert (theirs.remote, theirs.local) == (mem("b-nat"), mem("a"))
    assert (ours.remote, ours.local) == (mem("a-nat"), mem("b"))
    await talk(ours, theirs)
    await trio.sleep(HOLE_LIFETIME + 1)
    await talk(ours, theirs)
    assert await site.silent("b", mem("a-nat"))


@pytest.mark.parametrize("late", [0.0, 0.01, 0.5])
async def test_two_cones_meet_in_one_connection_when_both_dial(late: float) -> None:
    site = Site()
    await site.add("a", "b")
    site.world.set_nat("a", "cone")
    site.world.set_nat("b", "cone")

    async def later() -> MemoryStream:
        await trio.sleep(late)
        return await site.dial("b", mem("a-nat"), shared_port=True)

    one, other = await both(lambda: site.dial("a", mem("b-nat"), shared_port=True), later)
    assert {one.local, other.local} == {mem("a"), mem("b")}
    assert trio.current_time() == pytest.approx(late + 2 * HOP, abs=1.01 * HOP), "no repeated request was needed"
    await talk(one, other)
    for listener in site.listeners.values():
        with trio.move_on_after(5) as scope:
            await listener.accept()
        assert scope.cancelled_caught, "nothing came to the listeners"


async def test_two_public_machines_that_dial_each_other_from_their_listening_ports_get_one_connection() -> None:
    site = Site()
    await site.add("p", "q")
    one, other = await both(
        lambda: site.dial("p", mem("q"), shared_port=True), lambda: site.dial("q", mem("p"), shared_port=True)
    )
    await talk(one, other)
    again = await site.dial("p", mem("q"), shared_port=True)
    assert again.local.port != 1, "the two ports are connected already"


@pytest.mark.parametrize("other", ["cone", "symmetric"])
async def test_a_symmetric_nat_is_not_met(other: str) -> None:
    site = Site()
    await site.add("a", "b")
    site.world.set_nat("a", "symmetric")
    site.world.set_nat("b", other)  # type: ignore[arg-type]
    with pytest.raises(BaseExceptionGroup) as caught:
        await both(
            lambda: site.dial("a", mem("b-nat"), shared_port=True),
            lambda: site.dial("b", mem("a-nat"), shared_port=True),
        )
    assert caught.group_contains(trio.TooSlowError)


async def test_a_router_that_resets_refuses_at_once_and_the_askers_hole_closes() -> None:
    site = Site()
    await site.add("a", "b")
    site.world.set_nat("a", "cone", resets=True)
    site.world.set_nat("b", "cone", resets=True)
    for one, other in (("a", "b"), ("b", "a")):
        with pytest.raises(PeerUnreachable, match="connection refused"):
            await site.dial(one, mem(f"{other}-nat"), shared_port=True)
    assert trio.current_time() == pytest.approx(4 * HOP), "also the second: the hole of the first was closed again"
    await both(
        lambda: site.dial("a", mem("b-nat"), shared_port=True), lambda: site.dial("b", mem("a-nat"), shared_port=True)
    )


async def test_machines_of_one_site_meet_by_their_inner_names_only() -> None:
    site = Site()
    await site.add("a", "b", "p")
    for name in ("a", "b"):
        site.world.set_nat(name, "cone", site="home")
    assert await site.seen("a", "b") != await site.seen("b", "a")
    assert (await site.seen("a", "b", shared_port=True)) == mem("a")
    assert await site.silent("a", mem("home-nat"))
    seen = [await site.seen(name, "p", shared_port=True) for name in ("a", "b")]
    assert [address.host for address in seen] == ["home-nat"] * 2
    assert seen[0].port != seen[1].port, "two machines with one port"


async def test_a_dial_from_the_listening_port_to_itself_is_refused() -> None:
    site = Site()
    await site.add("p")
    with pytest.raises(PeerUnreachable, match="connection refused"):
        await site.dial("p", mem("p"), shared_port=True)


async def test_a_request_that_comes_too_early_is_repeated_as_the_kernel_does() -> None:
    site = Site()
    await site.add("a", "b")
    for name in ("a", "b"):
        site.world.set_nat(name, "cone")
    site.world.cut("b", "a", one_way=True)

    async def dial_and_heal() -> MemoryStream:
        await trio.sleep(0.5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal)
            return await site.dial("b", mem("a-nat"), shared_port=True)

    async def heal() -> None:
        await trio.sleep(0.1)
        site.world.heal()

    streams = await both(lambda: site.dial("a", mem("b-nat"), shared_port=True), dial_and_heal)
    assert trio.current_time() == pytest.approx(1 + 4 * HOP, abs=2 * HOP)
    await talk(*streams)


async def test_a_cancelled_dial_that_was_met_is_reset_on_the_other_side() -> None:
    site = Site()
    await site.add("p", "q")
    streams: list[MemoryStream] = []

    async def one() -> None:
        streams.append(await site.dial("p", mem("q"), shared_port=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.sleep(HOP / 4)
        with trio.move_on_after(2 * HOP) as scope:
            await site.dial("q", mem("p"), shared_port=True)
        assert scope.cancelled_caught
    with pytest.raises(trio.BrokenResourceError):
        await streams[0].receive_some()


# Changes of address


async def test_after_a_change_of_address_connections_are_silent_and_new_ones_come_from_there() -> None:
    site = Site()
    await site.add("p", "a")
    ours = await site.dial("a", mem("p"))
    theirs = await site.listeners["p"].accept()
    await talk(ours, theirs)
    site.world.readdress("a", "a2")
    await ours.send_all(b"lost")
    await theirs.send_all(b"lost")
    for stream in (ours, theirs):
        with trio.move_on_after(1000) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
    assert await site.seen("a", "p") == mem("a2", (await site.seen("a", "p")).port - 1)
    assert await site.silent("p", mem("a"))
    assert site.listeners["a"].address == mem("a2")
    assert site.world.network("a").reachable_addresses(site.listeners["a"]) == (mem("a2"),)
    ours = await site.dial("p", mem("a2"))
    await talk(ours, await site.listeners["a"].accept())
    with pytest.raises(ConfigError, match="mem://a2:PORT"):
        await site.world.network("a").listen(mem("a", 5))
    with pytest.raises(ValueError, match="'a'"):
        site.world.readdress("p", "a")


async def test_a_router_that_changes_its_address_silences_what_went_through_it() -> None:
    site = Site()
    await site.add("p", "a", "b")
    for name in ("a", "b"):
        site.world.set_nat(name, "cone", site="home")
    outside = [await site.dial("a", mem("p")), await site.listeners["p"].accept()]
    inside = [await site.dial("a", mem("b")), await site.listeners["b"].accept()]
    site.world.readdress("a", "new-nat")
    await talk(inside[0], inside[1])
    await outside[0].send_all(b"lost")
    with trio.move_on_after(1000) as scope:
        await outside[1].receive_some()
    assert scope.cancelled_caught
    assert await site.seen("b", "p", shared_port=True) == mem("new-nat")


async def test_a_machine_that_moves_while_it_connects_connects_from_its_new_address() -> None:
    site = Site()
    await site.add("p", "a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.dial, "a", mem("p"))
        await trio.sleep(HOP / 2)
        site.world.readdress("a", "a2")
        theirs = await site.listeners["p"].accept()
    assert theirs.remote.host == "a2"


async def test_an_unknown_kind_of_nat_is_refused_and_none_takes_it_away() -> None:
    site = Site()
    await site.add("p", "a")
    with pytest.raises(ValueError, match="choose one of none, cone"):
        site.world.set_nat("a", "open")  # type: ignore[arg-type]
    site.world.set_nat("a", "cone")
    assert await site.silent("p", mem("a"))
    site.world.set_nat("a", "none")
    await site.dial("p", mem("a"))


# Long fat paths


@pytest.mark.parametrize(("pipes", "share"), [(1, 0.2), (2, 0.4), (4, 0.8), (8, 1.0)])
async def test_a_long_fat_path_is_filled_by_several_connections_each_held_by_its_window(
    pipes: int, share: float
) -> None:
    """Window over latency bounds one connection: 1 MB / 50 ms of 100 MB/s."""
    route = Route(latency=0.05, bandwidth=1e8, window=1_000_000)
    world = MemoryWorld(random.Random(0), default=route)
    listener = await world.network("b").listen(mem("b"))
    received = 0

    async def send(stream: ByteStream) -> None:
        while True:
            await stream.send_all(bytes(50_000))

    async def receive(stream: ByteStream) -> None:
        nonlocal received
        while True:
            size = len(await stream.receive_some())
            received += size

    pairs = [(await world.network("a").dial(listener.address), await listener.accept()) for _ in range(pipes)]
    with trio.move_on_after(4):
        async with trio.open_nursery() as nursery:
            for ours, theirs in pairs:
                nursery.start_soon(send, ours)
                nursery.start_soon(receive, theirs)
    assert received / 4 / 1e8 == pytest.approx(share, rel=0.05)


async def test_the_memory_network_carries_no_datagrams() -> None:
    with pytest.raises(ConfigError, match="no datagrams"):
        await MemoryWorld(random.Random(0)).network("a").open_datagrams(mem("a"))
