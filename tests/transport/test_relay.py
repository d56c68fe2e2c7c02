"""Links through a relay: reservations, circuits, limits, and relays that are not what they should be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from shoal.transport import defaults
from shoal.transport.address import Address
from shoal.transport.endpoint import Endpoint
from shoal.transport.errors import (
    PeerUnreachable,
    RecordError,
    RemoteError,
    RemoteRefused,
    StreamReset,
)
from shoal.transport.frames import Priority
from shoal.transport.identity import Identity
from shoal.transport.link import Link
from shoal.transport.memory import Route
from shoal.transport.planner import Reach
from shoal.transport.relay import (
    CIRCUIT_PROTOCOL,
    RELAYED_PROTOCOL,
    RESERVE_PROTOCOL,
    Circuit,
    RelayLimits,
    RelayServer,
    Reserve,
    admit,
    request,
)
from shoal.transport.rpc import Call, Method
from shoal.transport.stream import LinkStream
from shoal.transport.traversal import Traversal

from .harness import Nodes, Real, Virtual, nodes

RELAY_ONLY = Traversal(ways=("direct", "relay"))


@attrs.frozen
class Text:
    text: str


@attrs.frozen
class Size:
    size: int


ECHO = Method("echo", Text, Text)
TAKE = Method("take", Size, Size, Priority.BULK)


async def echo(call: Call[Text]) -> Text:
    return call.request


async def take(call: Call[Size]) -> Size:
    """Reads its body, which must be what :func:`payload` makes."""
    buffer = bytearray(call.request.size)
    await call.read_into(memoryview(buffer))
    assert bytes(buffer) == payload(len(buffer))
    return Size(len(buffer))


def payload(size: int) -> bytes:
    return (b"the secret of the shoal " * (size // 24 + 1))[:size]


async def upload(one: Endpoint, other: Endpoint, size: int) -> None:
    assert await one.call(other.peer_id, TAKE, Size(size), body=[payload(size)], timeout=300) == Size(size)


def server(relay: Endpoint) -> RelayServer:
    assert relay.traversal is not None
    return relay.traversal.relay


@asynccontextmanager
async def hidden_pair(
    *, limits: RelayLimits | None = None, route: Route | None = None, kind: str = "symmetric", real: bool = False
) -> AsyncIterator[tuple[Nodes, Endpoint, Endpoint, Endpoint]]:
    """(nodes, a, relay, b): ``a`` and ``b`` behind NATs, linked with the relay, where both hold reservations.

    ``real``: over TCP; there they are hidden because they do not listen.
    """
    world = Real() if real else Virtual(route)
    async with nodes(world) as n:
        relay = await n.add("relay", traversal=Traversal(relay=True, limits=limits or RelayLimits()))
        found = []
        for name in ("a", "b"):
            endpoint = await n.add(name, listen=not real, traversal=RELAY_ONLY)
            if isinstance(world, Virtual):
                world.memory.set_nat(name, kind)  # type: ignore[arg-type]
            endpoint.serve(ECHO, echo)
            endpoint.serve(TAKE, take)
            await endpoint.connect(relay.peer_id, relay.addresses())
            found.append(endpoint)
        a, b = found
        with trio.fail_after(60):
            while not all(e.traversal and e.traversal.relays for e in found):
                await trio.sleep(0.1)
        yield n, a, relay, b


async def test_two_peers_behind_symmetric_nats_meet_through_a_relay() -> None:
    async with hidden_pair() as (_, a, relay, b):
        for endpoint in (a, b):
            assert endpoint.traversal is not None
            assert endpoint.traversal.reach().state is Reach.UNREACHABLE
            assert [found.peer for found in endpoint.traversal.relays] == [relay.peer_id]
        a.learn(b.record())
        began = trio.current_time()
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")
        # six hops of 10 ms and three round trips of them, beside the head starts
        assert trio.current_time() - began < 0.8
        link = a.link(b.peer_id)
        assert link is not None
        assert link.way == "relay"
        assert link.remote == relay.addresses()[0]
        assert await b.call(a.peer_id, ECHO, Text("back")) == Text("back")
        assert [c.way for c in a.connections() if c.peer == b.peer_id] == ["relay"]
        assert relay.traversal is not None
        assert relay.traversal.relay.circuits == 1


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({}, ""),
        ({"reserved": False}, "no_reservation"),
        ({"linked": False}, "not_linked"),
        ({"circuits": 4}, "busy"),
        ({"of_initiator": 2}, "busy"),
        ({"of_target": 2}, "busy"),
        ({"of_source": 3}, "busy"),
    ],
)
def test_who_gets_a_circuit(counts: dict[str, int], code: str) -> None:
    limits = RelayLimits(circuits=4, circuits_per_peer=2, circuits_per_source=3)
    usual = {"reserved": True, "linked": True, "circuits": 3, "of_initiator": 1, "of_target": 1, "of_source": 2}
    got, reason = admit(limits, **(usual | counts))  # type: ignore[arg-type]
    assert got == code
    assert bool(reason) == bool(code)


async def test_a_relay_refuses_with_a_code() -> None:
    limits = RelayLimits(reservations=2, reservations_per_source=1, circuits_per_peer=1)
    async with hidden_pair(limits=limits) as (n, a, relay, b):
        stranger = Identity(b"s" * 32).peer_id
        to_relay = a.link(relay.peer_id)
        assert to_relay is not None

        async def refusal(link: Link, protocol: str, message: object) -> str:
            with pytest.raises(RemoteRefused) as caught:
                await request(link, protocol, message)
            return caught.value.code

        assert await refusal(to_relay, CIRCUIT_PROTOCOL, Circuit(stranger)) == "no_reservation"
        assert await refusal(to_relay, CIRCUIT_PROTOCOL, Circuit(a.peer_id)) == "no_reservation"
        await request(to_relay, CIRCUIT_PROTOCOL, Circuit(b.peer_id))
        assert await refusal(to_relay, CIRCUIT_PROTOCOL, Circuit(b.peer_id)) == "busy"
        c = await n.add("c", traversal=RELAY_ONLY)
        link = await c.connect(relay.peer_id, relay.addresses())
        assert await refusal(link, RESERVE_PROTOCOL, Reserve()) == "busy"
        # who does not relay says so, and who has never heard of it as well
        link = await c.connect((await n.add("d", traversal=Traversal(relay=False))).peer_id, [Address("mem", "d", 1)])
        assert await refusal(link, RESERVE_PROTOCOL, Reserve()) == "no_relay"
        assert await refusal(link, CIRCUIT_PROTOCOL, Circuit(b.peer_id)) == "no_relay"
        link = await c.connect((await n.add("e")).peer_id, [Address("mem", "e", 1)])
        assert await refusal(link, RESERVE_PROTOCOL, Reserve()) == "unknown_protocol"


async def test_nobody_comes_through_a_relay_where_we_hold_no_place() -> None:
    async with hidden_pair() as (n, a, _, __):
        other = await n.add("other", traversal=RELAY_ONLY)
        await a.connect(other.peer_id, other.addresses())
        link = other.link(a.peer_id)
        assert link is not None
        stream = await link.open_stream(RELAYED_PROTOCOL, Priority.BULK)
        with pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_circuit_that_has_carried_its_share_is_replaced_and_the_link_goes_on() -> None:
    async with hidden_pair(limits=RelayLimits(circuit_bytes=1 << 20)) as (_, a, relay, b):
        a.learn(b.record())
        link = await a.connect(b.peer_id)
        for _ in range(4):
            await upload(a, b, 400_000)
        assert a.link(b.peer_id) is link
        assert link.pipes_lost >= 1
        assert server(relay).opened >= 2


async def test_a_peer_gets_no_more_than_its_rate_and_what_was_saved_up() -> None:
    async with hidden_pair(limits=RelayLimits(rate=1e6, burst=1e6)) as (_, a, relay, b):
        a.learn(b.record())
        await a.connect(b.peer_id)
        began = trio.current_time()
        await upload(a, b, 5_000_000)
        assert 3.5 < trio.current_time() - began < 8
        assert server(relay).relayed > 5_000_000


async def test_bulk_through_a_relay_does_not_keep_its_own_calls_waiting() -> None:
    route = Route(latency=0.01, bandwidth=4e6)
    async with hidden_pair(route=route) as (_, a, relay, b):
        relay.serve(ECHO, echo)
        a.learn(b.record())
        await a.connect(b.peer_id)
        slowest = 0.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload, a, b, 20_000_000)
            for _ in range(20):
                began = trio.current_time()
                await a.call(relay.peer_id, ECHO, Text("hi"))
                slowest = max(slowest, trio.current_time() - began)
                await trio.sleep(0.1)
        # one record of bulk may be on the line: a quarter of a second of it at most
        assert slowest < 0.6


async def test_a_relay_that_stops_or_dies_leaves_the_other_one() -> None:
    async with hidden_pair() as (n, a, relay, b):
        second = await n.add("second", traversal=Traversal(relay=True))
        for endpoint in (a, b):
            await endpoint.connect(second.peer_id, second.addresses())
        with trio.fail_after(60):
            while not all(e.traversal and len(e.traversal.relays) == 2 for e in (a, b)):
                await trio.sleep(0.1)
        await a.connect(second.peer_id)
        a.learn(b.record())
        link = await a.connect(b.peer_id)
        used, spare = (relay, second) if server(relay).circuits else (second, relay)
        server(used).active = False
        await upload(a, b, 100_000)
        assert a.link(b.peer_id) is link
        assert server(spare).circuits == 1
        with trio.fail_after(30):
            while len(a.traversal.relays if a.traversal else ()) != 1:
                await trio.sleep(0.1)


async def test_the_next_relay_is_told_to_others() -> None:
    async with hidden_pair() as (n, a, relay, b):
        second = await n.add("second", traversal=Traversal(relay=True))
        await b.connect(second.peer_id, second.addresses())
        with trio.fail_after(30):
            while (record := relay.contact(b.peer_id)) is None or len(record.open(b.host.wall()).relays) < 2:
                await trio.sleep(0.1)
        await n.stop("relay")
        with trio.fail_after(60):
            while (record := second.contact(b.peer_id)) is None or len(record.open(b.host.wall()).relays) != 1:
                await trio.sleep(0.1)
        a.learn(b.record())
        assert await a.call(b.peer_id, ECHO, Text("hi")) == Text("hi")


async def test_an_unreachable_peer_is_reported_with_every_way_and_its_reason() -> None:
    async with hidden_pair() as (n, a, relay, b):
        a.learn(b.record())
        await n.stop("b")
        await trio.sleep(1)
        with pytest.raises(PeerUnreachable) as caught:
            await a.connect(b.peer_id)
        said = dict(caught.value.attempts)
        assert "no reservation" in said[f"relay through {relay.peer_id.short}"]
        assert said[str(b.own_addresses()[0] if b.own_addresses() else Address("mem", "b", 1))]


# Relays that are not what they should be: the two ends run their own handshake and records inside.

Change = Callable[[int, bytes], list[bytes]]


def make_hostile(relay: Endpoint, change: Change, seen: list[bytes] | None = None) -> None:
    """``relay`` passes on ``change(piece number, piece)`` instead of each piece that the initiator sends."""
    honest = server(relay)

    async def pump(source: LinkStream, sink: LinkStream, carried: list[int], scope: trio.CancelScope) -> None:
        number = 0
        while data := await source.receive_some(defaults.RELAY_CHUNK):
            if seen is not None:
                seen.append(data)
            towards_target = source.protocol == CIRCUIT_PROTOCOL
            for piece in change(number, data) if towards_target else [data]:
                await sink.send_all(piece)
            number += 1
        await sink.send_eof()

    honest._pump = pump  # type: ignore[method-assign]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "change",
    [
        lambda number, data: [flipped(data)] if number == 8 else [data],
        lambda number, data: [data, data] if number == 8 else [data],
        lambda number, data: [] if number == 8 else [data],
        lambda number, data: [data[::-1]] if number == 8 else [data],
    ],
    ids=["alters", "replays", "drops", "reverses"],
)
async def test_a_hostile_relay_can_end_a_link_and_nothing_else(change: Change) -> None:
    async with hidden_pair() as (_, a, relay, b):
        make_hostile(relay, change)
        heard: list[Text] = []

        async def note(call: Call[Text]) -> Text:
            heard.append(call.request)
            return call.request

        b.serve(ECHO, note)
        a.learn(b.record())
        lost: list[Link] = []
        b.on_link_lost.append(lambda link: lost.append(link) if link.peer == a.peer_id else None)
        sent = []
        for i in range(40):
            sent.append(Text(f"message {i}"))
            try:
                await a.call(b.peer_id, ECHO, sent[-1], timeout=5)
            except RemoteError:
                break
        else:
            pytest.fail("the link went on as if nothing had happened")
        await trio.sleep(1)
        # Nothing that was not sent, nothing twice, nothing out of order.
        assert heard == sent[: len(heard)]
        assert lost
        assert isinstance(lost[0].close_reason, RecordError)


@pytest.mark.parametrize("at", [0, 1])
async def test_a_hostile_relay_cannot_stand_between_two_peers_in_the_handshake(at: int) -> None:
    async with hidden_pair() as (_, a, relay, b):
        make_hostile(relay, lambda number, data: [flipped(data)] if number == at else [data])
        a.learn(b.record())
        with pytest.raises(RemoteError):
            await a.call(b.peer_id, ECHO, Text("hi"), timeout=20)
        assert b.link(a.peer_id) is None


async def test_a_relay_reads_nothing() -> None:
    async with hidden_pair() as (_, a, relay, b):
        seen: list[bytes] = []
        make_hostile(relay, lambda number, data: [data], seen)
        a.learn(b.record())
        await upload(a, b, 100_000)
        everything = b"".join(seen)
        assert len(everything) > 100_000
        for secret in (b"the secret of the shoal", a.peer_id.key, b.peer_id.key, b"take"):
            assert secret not in everything


# The same over TCP


@pytest.mark.real
async def test_over_tcp_bulk_passes_a_relay_and_circuits_are_replaced() -> None:
    async with hidden_pair(real=True, limits=RelayLimits(circuit_bytes=8 << 20)) as (_, a, relay, b):
        a.learn(b.record())
        link = await a.connect(b.peer_id)
        assert link.way == "relay"
        assert link.remote == relay.addresses()[0]
        for _ in range(3):
            await upload(a, b, 5_000_000)
        assert a.link(b.peer_id) is link
        assert server(relay).opened >= 2


@pytest.mark.real
async def test_over_tcp_a_peer_gets_its_rate() -> None:
    async with hidden_pair(real=True, limits=RelayLimits(rate=4e6, burst=1e6)) as (_, a, relay, b):
        a.learn(b.record())
        await a.connect(b.peer_id)
        began = trio.current_time()
        await upload(a, b, 5_000_000)
        assert trio.current_time() - began > 0.8
        assert server(relay).relayed > 5_000_000


@pytest.mark.real
async def test_over_tcp_a_hostile_relay_reads_nothing_and_can_only_end_the_link() -> None:
    async with hidden_pair(real=True) as (_, a, relay, b):
        seen: list[bytes] = []
        make_hostile(relay, lambda number, data: [flipped(data)] if number == 12 else [data], seen)
        a.learn(b.record())
        lost: list[Link] = []
        b.on_link_lost.append(lambda link: lost.append(link) if link.peer == a.peer_id else None)
        with pytest.raises(RemoteError):  # noqa: PT012
            for _ in range(40):
                await a.call(b.peer_id, ECHO, Text("the secret of the shoal"), timeout=5)
        await trio.sleep(0.5)
        assert lost
        assert isinstance(lost[0].close_reason, RecordError)
        everything = b"".join(seen)
        for secret in (b"the secret", a.peer_id.key, b.peer_id.key):
            assert secret not in everything
