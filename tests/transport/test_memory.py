"""The memory network: conformance, its model of lines, and its faults."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.address import Address
from shoal.transport.errors import ConfigError, PeerUnreachable
from shoal.transport.memory import BACKLOG, MemoryListener, MemoryStream, MemoryWorld, Route
from shoal.transport.memory_flow import SEGMENT, retry_time
from shoal.transport.network import Network

from .stream_conformance import StreamConformance

SLOW = Route(latency=0.05, bandwidth=1e6)


class TestConformance(StreamConformance):
    route = Route()

    def networks(self) -> tuple[Network, Network]:
        world = MemoryWorld(random.Random(0), default=self.route)
        return world.network("here"), world.network("there")

    def bind(self) -> Address:
        return Address("mem", "there", 0)


class TestConformanceOnASmallWindow(TestConformance):
    route = Route(window=1000, buffer=100)


async def listen(world: MemoryWorld, name: str = "b") -> MemoryListener:
    return await world.network(name).listen(Address("mem", name, 1))


async def join(world: MemoryWorld, one: str = "a", listener: MemoryListener | None = None) -> tuple[MemoryStream, ...]:
    """A connection from ``one`` to the listener (default: to b), once it is accepted."""
    at = await listen(world) if listener is None else listener
    ours = await world.network(one).dial(at.address)
    theirs = await at.accept()
    if listener is None:
        await at.aclose()
    return ours, theirs


@asynccontextmanager
async def connected(
    route: Route = SLOW, **settings: object
) -> AsyncIterator[tuple[MemoryWorld, MemoryStream, MemoryStream]]:
    world = MemoryWorld(random.Random(1), default=route, **settings)  # type: ignore[arg-type]
    ours, theirs = await join(world)
    yield world, ours, theirs


async def receive_all(stream: MemoryStream) -> bytes:
    received = b""
    while chunk := await stream.receive_some():
        received += chunk
    return received


async def silent(stream: MemoryStream, seconds: float) -> bool:
    """Whether nothing is received for so long."""
    with trio.move_on_after(seconds) as scope:
        await stream.receive_some()
    return scope.cancelled_caught


# The model of a line


async def test_connecting_takes_one_round_trip_and_half_a_one_more_until_it_is_accepted() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    listener, began = await listen(world), trio.current_time()
    await world.network("a").dial(listener.address)
    assert trio.current_time() - began == pytest.approx(0.1)
    await listener.accept()
    assert trio.current_time() - began == pytest.approx(0.15)


async def test_bytes_arrive_after_their_time_on_the_line_and_the_latency() -> None:
    async with connected() as (_, ours, theirs):
        began = trio.current_time()
        await ours.send_all(bytes(10_000))
        assert trio.current_time() == began, "they fit into the buffer"
        assert len(await theirs.receive_some()) == 10_000
        assert trio.current_time() - began == pytest.approx(0.01 + 0.05)


async def test_a_sender_is_held_to_the_bandwidth_but_for_the_buffer() -> None:
    async with connected(Route(latency=0.05, bandwidth=1e6, buffer=100_000)) as (_, ours, _theirs):
        began = trio.current_time()
        for _ in range(10):
            await ours.send_all(bytes(100_000))
        assert trio.current_time() - began == pytest.approx(0.9)


async def test_two_streams_share_the_line_between_two_machines() -> None:
    world = MemoryWorld(random.Random(0), default=Route(bandwidth=1e6))
    listener = await listen(world)
    pairs = [await join(world, "a", listener) for _ in range(2)]
    began = trio.current_time()
    for ours, _ in pairs:
        await ours.send_all(bytes(50_000))
    for _, theirs in pairs:
        await theirs.receive_some()
    assert trio.current_time() - began == pytest.approx(0.1)


async def test_all_streams_of_a_machine_share_its_uplink_at_no_cost_to_slow_lines() -> None:
    world = MemoryWorld(random.Random(0), default=Route(bandwidth=1e6))
    world.set_uplink("a", 2e6)
    pairs = [await join(world, "a", await listen(world, name)) for name in ("b", "c", "d", "e")]
    began = trio.current_time()
    for ours, _ in pairs[:2]:
        await ours.send_all(bytes(50_000))
    for _, theirs in pairs[:2]:
        await theirs.receive_some()
    assert trio.current_time() - began == pytest.approx(0.075), "the uplink takes them one after the other"
    began = trio.current_time()
    for ours, _ in pairs:
        await ours.send_all(bytes(50_000))
    for _, theirs in pairs:
        await theirs.receive_some()
    assert trio.current_time() - began == pytest.approx(0.125), "four lines of 1 MB/s, one uplink of 2 MB/s"


async def test_a_machine_talks_to_itself_without_latency_or_uplink() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    world.set_uplink("a", 1.0)
    ours, theirs = await join(world, "a", await listen(world, "a"))
    await ours.send_all(bytes(100_000))
    await theirs.receive_some()
    assert trio.current_time() == 0


async def test_routes_may_differ_by_direction_and_change() -> None:
    async with connected(Route()) as (world, ours, theirs):
        world.set_route("a", "b", Route(latency=1.0), one_way=True)
        began = trio.current_time()
        await ours.send_all(b"slow")
        await theirs.receive_some()
        assert trio.current_time() - began == 1.0
        await theirs.send_all(b"fast")
        await ours.receive_some()
        assert trio.current_time() - began == 1.0


async def test_jitter_never_reorders() -> None:
    async with connected(Route(latency=0.01, jitter=1.0)) as (_, ours, theirs):
        for i in range(50):
            await ours.send_all(bytes([i]))
        await ours.aclose()
        assert await receive_all(theirs) == bytes(range(50))


async def test_the_window_bounds_what_is_unread_and_reading_opens_it() -> None:
    async with connected(Route(window=1000)) as (_, ours, theirs):
        await ours.send_all(bytes(1000))
        with trio.move_on_after(100) as scope:
            await ours.send_all(b"x")
        assert scope.cancelled_caught
        await theirs.receive_some(1)
        with trio.fail_after(1):
            await ours.wait_send_all_might_not_block()


async def test_bytes_pass_by_reference_and_come_as_they_were_sent() -> None:
    async with connected(Route()) as (_, ours, theirs):
        whole = bytes(1 << 20)
        await ours.send_all(whole)
        assert await theirs.receive_some() is whole
        await ours.send_all(memoryview(whole))
        assert await theirs.receive_some() is whole
        await ours.send_all(memoryview(whole)[5:9])
        assert await theirs.receive_some() == bytes(4)


async def test_loss_delays_bytes_and_bounds_the_rate() -> None:
    lossless, lossy = Route(latency=0.05, bandwidth=1e8), Route(latency=0.05, bandwidth=1e8, loss=0.01)
    assert lossless.rate == 1e8
    assert lossy.rate == pytest.approx(1.22 * SEGMENT / 0.1 / 0.1)
    elapsed = []
    for route in (lossless, lossy):
        async with connected(route) as (_, ours, theirs):
            began = trio.current_time()
            for i in range(200):
                await ours.send_all(bytes([i]) * 2000)
            await ours.aclose()
            assert await receive_all(theirs) == b"".join(bytes([i]) * 2000 for i in range(200))
            elapsed.append(trio.current_time() - began)
    assert elapsed[1] > 2 * elapsed[0]


@given(st.integers(1, 10**7), st.floats(0, 0.5), st.integers(0, 1000))
def test_a_retransmission_delay_is_bounded_and_zero_without_loss(size: int, loss: float, seed: int) -> None:
    late = Route(latency=0.1, loss=loss).retransmission(size, random.Random(seed).random)
    assert 0 <= late < 1000
    assert loss > 0 or late == 0


@given(st.floats(0, 1e4), st.floats(0.2, 3), st.floats(0, 1e4))
def test_a_retry_comes_after_healing_and_no_later_than_the_longest_pause(
    began: float, timeout: float, wait: float
) -> None:
    now = began + wait
    at = retry_time(began, timeout, now)
    assert now <= at <= now + min(max(timeout, now - began + timeout), 120) + 1e-6


# Ends


async def test_end_of_file_arrives_behind_the_bytes() -> None:
    async with connected() as (_, ours, theirs):
        began = trio.current_time()
        await ours.send_all(bytes(50_000))
        await ours.aclose()
        assert len(await receive_all(theirs)) == 50_000
        assert trio.current_time() - began == pytest.approx(0.1)


async def test_sending_to_a_closed_end_breaks_after_a_round_trip() -> None:
    async with connected(Route(latency=0.5)) as (_, ours, theirs):
        await theirs.aclose()
        await ours.send_all(b"too late")
        await trio.sleep(0.99)
        await ours.send_all(b"still unknown here")
        await trio.sleep(0.02)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"now it is known")


async def test_a_blocked_sender_learns_of_the_reset_when_it_arrives() -> None:
    async with connected(Route(latency=0.5, window=1000)) as (_, ours, theirs):
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await ours.send_all(bytes(5000))
                assert trio.current_time() - began == pytest.approx(2.5)

            await trio.sleep(2)
            await theirs.aclose()


async def test_a_reset_comes_behind_what_was_sent_before() -> None:
    async with connected() as (_, ours, theirs):
        await ours.send_all(b"never read")
        await trio.sleep(1)
        await theirs.send_all(b"goodbye")
        await theirs.aclose()
        assert await ours.receive_some() == b"goodbye"


async def test_closing_a_listener_resets_who_was_not_accepted() -> None:
    world = MemoryWorld(random.Random(0))
    listener = await listen(world)
    ours = await world.network("a").dial(listener.address)
    await listener.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await ours.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await ours.send_all(b"x")


async def test_a_full_backlog_lets_dials_wait() -> None:
    world = MemoryWorld(random.Random(0))
    listener = await listen(world)
    for _ in range(BACKLOG):
        await world.network("a").dial(listener.address)
    with trio.move_on_after(10) as scope:
        await world.network("a").dial(listener.address)
    assert scope.cancelled_caught
    await listener.accept()
    await world.network("a").dial(listener.address)


async def test_a_machine_listens_only_at_its_own_name() -> None:
    world = MemoryWorld(random.Random(0))
    with pytest.raises(ConfigError, match="mem://a:PORT"):
        await world.network("a").listen(Address("mem", "b", 1))


async def test_an_unknown_machine_has_no_route() -> None:
    with pytest.raises(PeerUnreachable, match="no route to host"):
        await MemoryWorld(random.Random(0)).network("a").dial(Address("mem", "nobody", 1))


async def test_nothing_is_remembered_of_connections_that_are_over() -> None:
    async with connected() as (world, ours, theirs):
        await ours.send_all(b"unread")
        await ours.aclose()
        await theirs.aclose()
        assert not world._flows
        assert not world.network("a").streams
        assert not world.network("b").streams


# Faults


async def test_of_a_killed_machine_all_it_sent_arrives_and_then_the_end() -> None:
    async with connected() as (world, ours, theirs):
        await theirs.send_all(b"last words")
        world.kill("b")
        assert await receive_all(ours) == b"last words"
        await ours.send_all(b"anyone?")
        await trio.sleep(1)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"anyone?")


async def test_a_machine_killed_with_bytes_unread_breaks_its_streams() -> None:
    async with connected() as (world, ours, _):
        await ours.send_all(b"x")
        await trio.sleep(1)
        world.kill("b")
        await trio.sleep(1)
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"x")


async def test_a_killed_machine_refuses_dials_and_its_own_calls_never_return() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    listener = await listen(world)
    ours, theirs = await join(world, "a", listener)
    world.kill("b")
    with pytest.raises(PeerUnreachable, match="connection refused"):
        await world.network("a").dial(listener.address)
    for call in (listener.accept, theirs.receive_some, lambda: theirs.send_all(b"x")):
        with trio.move_on_after(1e4) as scope:
            await call()
        assert scope.cancelled_caught
    await theirs.aclose()
    await listener.aclose()
    await ours.aclose()


async def test_after_a_kill_a_new_process_may_listen_at_the_same_port() -> None:
    async with connected() as (world, _, _theirs):
        old = world.network("b")
        world.kill("b")
        assert world.network("b") is not old
        ours, theirs = await join(world)
        await theirs.send_all(b"reborn")
        assert await ours.receive_some() == b"reborn"


async def test_a_frozen_machine_takes_bytes_up_to_the_window_and_answers_nothing_until_it_goes_on() -> None:
    async with connected(Route(latency=0.05, window=1000)) as (world, ours, theirs), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            while data := await theirs.receive_some():
                await theirs.send_all(data)
            await theirs.aclose()

        await ours.send_all(b"before")
        assert await ours.receive_some() == b"before"
        world.freeze("b")
        await ours.send_all(bytes(1000))
        with trio.move_on_after(100) as scope:
            await ours.send_all(b"more")
        assert scope.cancelled_caught
        assert await silent(ours, 100)
        world.unfreeze("b")
        assert await ours.receive_some() == bytes(1000)
        assert await ours.receive_some() == b"more"
        await ours.send_eof()
        assert await ours.receive_some() == b""


async def test_a_frozen_machine_completes_connections_but_accepts_them_later() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    listener = await listen(world)
    world.freeze("b")
    ours = await world.network("a").dial(listener.address)
    await ours.send_all(b"hello")
    with trio.move_on_after(100) as scope:
        await listener.accept()
    assert scope.cancelled_caught
    world.unfreeze("b")
    theirs = await listener.accept()
    assert await theirs.receive_some() == b"hello"


async def test_what_a_frozen_machine_closes_ends_for_others_when_it_goes_on() -> None:
    async with connected() as (world, ours, theirs):
        world.freeze("b")
        await theirs.aclose()
        assert await silent(ours, 100)
        world.unfreeze("b")
        assert await ours.receive_some() == b""


async def test_a_frozen_machine_can_be_killed() -> None:
    async with connected() as (world, ours, _):
        world.freeze("b")
        world.kill("b")
        assert await ours.receive_some() == b""


async def test_a_partition_stalls_streams_silently_and_healing_loses_nothing() -> None:
    async with connected() as (world, ours, theirs):
        await ours.send_all(b"in flight;")
        world.partition(["a"])
        await ours.send_all(b"during;")
        assert await silent(theirs, 30)
        healed = trio.current_time()
        world.heal()
        await ours.send_all(b"after")
        await ours.aclose()
        assert await receive_all(theirs) == b"in flight;during;after"
        assert trio.current_time() - healed < 30, "TCP repeats after at most as long as it was cut off"


async def test_what_had_arrived_before_a_partition_can_be_read_during_it() -> None:
    async with connected() as (world, ours, theirs):
        await ours.send_all(b"here")
        await trio.sleep(1)
        world.partition(["a"], ["b"])
        assert await theirs.receive_some() == b"here"


async def test_a_sender_into_a_partition_is_held_by_the_buffer() -> None:
    async with connected(Route(latency=0.05, buffer=1000)) as (world, ours, theirs):
        world.partition(["a"])
        await ours.send_all(bytes(1000))
        with trio.move_on_after(100) as scope:
            await ours.send_all(bytes(1000))
        assert scope.cancelled_caught
        world.heal()
        await ours.aclose()
        assert len(await receive_all(theirs)) == 2000


async def test_dials_into_a_partition_hang_until_it_heals_or_the_kernel_gives_up() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    listener, network = await listen(world), world.network("a")
    world.partition(["a"], ["b"])
    with trio.move_on_after(60) as scope:
        await network.dial(listener.address)
    assert scope.cancelled_caught
    began = trio.current_time()
    with pytest.raises(PeerUnreachable, match="timed out"):
        await network.dial(listener.address)
    assert 60 < trio.current_time() - began < 130
    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.dial, listener.address)
        await trio.sleep(5)
        world.heal()
        began = trio.current_time()
    assert trio.current_time() - began < 5


async def test_machines_of_one_group_still_reach_each_other() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    b, d = await listen(world, "b"), await listen(world, "d")
    world.partition(["a", "b"])
    await world.network("a").dial(b.address)
    await world.network("c").dial(d.address)
    with trio.move_on_after(10) as scope:
        await world.network("a").dial(d.address)
    assert scope.cancelled_caught


async def test_a_cut_may_be_one_way() -> None:
    async with connected() as (world, ours, theirs):
        world.cut("a", "b", one_way=True)
        await theirs.send_all(b"you hear me")
        assert await ours.receive_some() == b"you hear me"
        await ours.send_all(b"but I do not hear you")
        assert await silent(theirs, 10)
        world.heal()
        assert await theirs.receive_some() == b"but I do not hear you"


async def test_a_kill_behind_a_partition_is_not_noticed_before_it_heals() -> None:
    async with connected() as (world, ours, _):
        world.partition(["a"])
        world.kill("b")
        assert await silent(ours, 1000)
        world.heal()
        assert await ours.receive_some() == b""


async def test_healing_delays_no_other_stream() -> None:
    async with connected() as (world, ours, theirs):
        world.partition(["a"])
        await ours.send_all(b"x")
        await trio.sleep(100)
        world.heal()
        healed = trio.current_time()
        other, there = await join(world)
        await other.send_all(b"fresh")
        assert await there.receive_some() == b"fresh"
        assert trio.current_time() - healed < 1
        assert await theirs.receive_some() == b"x"


async def test_closing_the_world_ends_everything() -> None:
    world = MemoryWorld(random.Random(0), default=SLOW)
    listener = await listen(world)
    ours, theirs = await join(world, "a", listener)
    world.freeze("b")

    async def ended(call: object) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await call()  # type: ignore[operator]

    async with trio.open_nursery() as nursery:
        for call in (listener.accept, theirs.receive_some, ours.receive_some):
            nursery.start_soon(ended, call)
        await trio.sleep(1)
        world.close()
    with pytest.raises(PeerUnreachable):
        await world.network("a").dial(listener.address)


# Watching


async def test_bytes_are_counted_per_pair_and_events_are_traced() -> None:
    events: list[tuple[float, str, str, str, int]] = []

    def trace(*event: object) -> None:
        events.append(event)  # type: ignore[arg-type]

    async with connected(trace=trace) as (world, ours, theirs):
        await ours.send_all(bytes(700))
        await ours.send_all(bytes(300))
        await theirs.send_all(bytes(5))
        await receive_once(theirs, 1000)
        assert world.traffic() == {("a", "b"): 1000, ("b", "a"): 5}
    kinds = [(what, source, target, size) for _, what, source, target, size in events]
    assert kinds[:2] == [("dial", "a", "b", 0), ("connect", "a", "b", 0)]
    assert ("send", "a", "b", 700) in kinds
    assert ("receive", "a", "b", 300) in kinds
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(events))


async def receive_once(stream: MemoryStream, size: int) -> None:
    while size > 0:
        size -= len(await stream.receive_some())


async def test_an_idle_stream_costs_no_task_and_no_timer() -> None:
    async with connected(Route()) as (world, _, _theirs):
        listener = await listen(world)
        before = trio.lowlevel.current_statistics()
        for _ in range(500):
            await join(world, "a", listener)
        after = trio.lowlevel.current_statistics()
        assert after.tasks_living == before.tasks_living
        assert after.seconds_to_next_deadline == before.seconds_to_next_deadline or math.isinf(
            after.seconds_to_next_deadline
        )
