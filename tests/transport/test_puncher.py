"""Hole punching in virtual time: through every pair of NATs, with bad timing, and with peers that do not mean it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio

from shoal.transport import deadlines, defaults
from shoal.transport.address import Address
from shoal.transport.errors import PeerUnreachable, ProtocolMisuse, RemoteProtocolError, RemoteRefused
from shoal.transport.identity import Identity, PeerId
from shoal.transport.memory import MemoryListener, MemoryWorld, Route
from shoal.transport.memory_nat import Kind
from shoal.transport.network import ByteStream
from shoal.transport.punch import NONCE_SIZE, PunchGo, PunchOffer
from shoal.transport.puncher import Claims, Puncher
from shoal.transport.wire import pack

from .harness import VirtualHost

HOP = 0.02  #: seconds between the two sides
SIGNAL = 0.05  #: seconds of a signal by way of the common peer, one way


def mem(host: str, port: int = 1) -> Address:
    return Address("mem", host, port)


class Side:
    """One node with the parts of an endpoint that punching touches."""

    def __init__(self, lab: Lab, name: str, seed: int) -> None:
        self.lab, self.name = lab, name
        self.host = VirtualHost(lab.world.network(name), name)
        self.peer_id = Identity(bytes([seed]) * 32).peer_id
        self.addresses: Sequence[Address] = (mem(f"{name}-nat"), mem(name))
        self.puncher = Puncher(self.host, self.peer_id, lambda: self.addresses, self.incoming)
        self.punched: list[ByteStream] = []
        self.accepted: list[ByteStream] = []
        self.listener: MemoryListener | None = None

    async def incoming(self, stream: ByteStream, way: str) -> None:
        assert way == "punch"
        self.punched.append(stream)

    async def serve(self) -> None:
        self.listener = await self.lab.world.network(self.name).listen(mem(self.name))
        self.puncher.nursery = self.lab.nursery
        self.lab.nursery.start_soon(self.accept, self.listener)

    async def accept(self, listener: MemoryListener) -> None:
        while True:
            stream = await listener.accept()
            if not self.puncher.claims.take(stream):
                self.accepted.append(stream)

    async def ask(self, kind: str, body: bytes) -> bytes:
        return await self.lab.signal(self, kind, body)

    async def punch(self) -> ByteStream | None:
        return await self.puncher.punch(self.lab.other(self).peer_id, self.ask)


class Lab:
    """Two sides, and the signals between them."""

    def __init__(self, nursery: trio.Nursery, one: Kind, other: Kind, route: Route, **nat: bool) -> None:
        self.nursery = nursery
        self.world = MemoryWorld(random.Random(3), default=route)
        self.sides = (Side(self, "a", 1), Side(self, "b", 2))
        for side, kind in zip(self.sides, (one, other), strict=True):
            self.world.set_nat(side.name, kind, **nat)
        self.late = {"punch": 0.0, "punch-go": 0.0}
        self.signals: list[tuple[str, str]] = []

    def other(self, side: Side) -> Side:
        return self.sides[1 - self.sides.index(side)]

    async def signal(self, side: Side, kind: str, body: bytes) -> bytes:
        self.signals.append((side.name, kind))
        to = self.other(side).puncher
        await trio.sleep(SIGNAL + self.late[kind])
        handler = {"punch": to.handle_offer, "punch-go": to.handle_go}[kind]
        try:
            answer = await handler(side.peer_id, PeerId(bytes(32)), body)
        finally:
            await trio.sleep(SIGNAL)
        return answer


class lab:
    def __init__(self, one: Kind = "cone", other: Kind = "cone", route: Route | None = None, **nat: bool) -> None:
        self._arguments = one, other, route or Route(latency=HOP)
        self._nat = nat

    async def __aenter__(self) -> tuple[Lab, Side, Side]:
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        made = Lab(nursery, *self._arguments, **self._nat)
        for side in made.sides:
            await side.serve()
        return made, *made.sides

    async def __aexit__(self, *error: object) -> None:
        self._manager._nursery.cancel_scope.cancel()
        await self._manager.__aexit__(*error)


async def heard(stream: ByteStream) -> bytes:
    """What comes first; nothing if the stream ends or breaks before."""
    try:
        return await stream.receive_some()
    except trio.BrokenResourceError:
        return b""


async def talk(ours: ByteStream, theirs: Sequence[ByteStream]) -> None:
    """The offerer speaks first; of what the answerer has, one stream speaks and the others end without a byte."""
    await ours.send_all(b"hello")
    with trio.fail_after(10):
        chosen = [stream for stream in theirs if await heard(stream) == b"hello"]
    assert len(chosen) == 1
    await chosen[0].send_all(b"hello yourself")
    with trio.fail_after(10):
        assert await ours.receive_some() == b"hello yourself"


async def test_two_cones_meet_after_two_round_trips_of_signals() -> None:
    async with lab() as (_, a, b):
        began = trio.current_time()
        stream = await a.punch()
        assert stream is not None
        assert trio.current_time() - began == pytest.approx(2 * SIGNAL + SIGNAL + 2 * HOP, abs=HOP)
        assert stream.remote == mem("b-nat")
        await trio.sleep(1)
        await talk(stream, b.punched)
        assert not a.accepted and not b.accepted


@pytest.mark.parametrize(
    ("one", "other"), [("none", "cone"), ("blocked", "cone"), ("blocked", "blocked"), ("cone", "blocked")]
)
async def test_firewalls_are_punched_too(one: Kind, other: Kind) -> None:
    async with lab(one, other) as (_, a, b):
        stream = await a.punch()
        assert stream is not None
        await trio.sleep(1)
        await talk(stream, b.punched)


@pytest.mark.parametrize("go", [0.0, 0.01, 0.1, 0.3, 0.7, 2.0])
async def test_a_go_that_comes_late_is_made_good_by_the_next_attempt(go: float) -> None:
    async with lab() as (made, a, b):
        made.late["punch-go"] = go
        began = trio.current_time()
        stream = await a.punch()
        assert stream is not None
        assert trio.current_time() - began < 3 * SIGNAL + go + 2 * defaults.PUNCH_ATTEMPT
        await trio.sleep(1)
        await talk(stream, b.punched + b.accepted)


@pytest.mark.parametrize("offer", [0.01, 0.3, 1.0])
async def test_an_offer_that_travels_slower_than_the_go_makes_us_late_and_does_no_harm(offer: float) -> None:
    async with lab() as (made, a, b):
        made.late["punch"] = offer
        stream = await a.punch()
        assert stream is not None
        await trio.sleep(1)
        await talk(stream, b.punched + b.accepted)


@pytest.mark.parametrize(
    ("hop", "late"), [(0.0002, 0.0), (0.0002, 0.02), (0.002, 0.02), (0.002, 0.1), (0.02, 0.0), (0.02, 0.2), (0.08, 0.2)]
)
async def test_routers_that_answer_with_resets_are_punched_by_quick_repetition(hop: float, late: float) -> None:
    async with lab(route=Route(latency=hop), resets=True) as (made, a, b):
        made.late["punch-go"] = late
        began = trio.current_time()
        stream = await a.punch()
        assert stream is not None
        assert trio.current_time() - began < 3 * SIGNAL + late + 1.0
        await trio.sleep(1)
        await talk(stream, b.punched + b.accepted)


@pytest.mark.parametrize("seed", range(8))
async def test_lost_requests_are_repeated_long_before_the_kernel_would(seed: int) -> None:
    async with lab(route=Route(latency=HOP, loss=0.3)) as (made, a, b):
        made.world.random.seed(seed)
        stream = await a.punch()
        assert stream is not None
        assert trio.current_time() < 3.0
        await trio.sleep(1)
        await talk(stream, b.punched + b.accepted)


@pytest.mark.parametrize(("one", "other"), [("symmetric", "cone"), ("cone", "symmetric"), ("symmetric", "symmetric")])
async def test_a_symmetric_nat_is_given_up_in_seconds_with_a_reason_for_every_address(one: Kind, other: Kind) -> None:
    async with lab(one, other) as (_, a, b):
        with pytest.raises(PeerUnreachable, match=f"{b.peer_id.short}: hole punching failed") as caught:
            await a.punch()
        assert trio.current_time() < 3 * SIGNAL + deadlines.punch(2 * SIGNAL) + 0.1
        assert [address for address, _ in caught.value.attempts] == ["mem://b-nat:1", "mem://b:1"]
        assert all("no answer to" in reason and "drops them" in reason for _, reason in caught.value.attempts)
        await trio.sleep(10)
        assert not b.puncher._answering and not b.puncher.claims._wanted and not a.puncher.claims._wanted
        assert not b.punched and not a.punched


async def test_a_peer_that_refuses_is_given_up_after_some_refusals() -> None:
    async with lab("none", "none") as (_, a, b):
        assert b.listener is not None
        b.addresses = (mem("b", 7),)
        b.puncher.handle_go = lambda *_: trio.sleep(0)  # type: ignore[method-assign,assignment]
        with pytest.raises(PeerUnreachable, match=f"{defaults.MAX_PUNCH_REFUSALS} times connection refused"):
            await a.punch()


async def test_two_machines_of_one_site_meet_inside() -> None:
    async with lab() as (made, a, b):
        for name in ("a", "b"):
            made.world.set_nat(name, "cone", site="home")
        a.addresses, b.addresses = (mem("home-nat"), mem("a")), (mem("home-nat", 5), mem("b"))
        stream = await a.punch()
        assert stream is not None
        assert stream.remote == mem("b")
        await trio.sleep(1)
        await talk(stream, b.punched)


async def test_of_several_streams_the_first_at_the_offerer_counts_and_the_others_end_silently() -> None:
    async with lab("none", "none") as (made, a, b):
        second = await made.world.network("b").listen(mem("b", 2))
        made.nursery.start_soon(b.accept, second)
        b.addresses = (mem("b", 1), mem("b", 2))
        stream = await a.punch()
        assert stream is not None
        await trio.sleep(3)
        await talk(stream, b.punched + b.accepted)


async def test_a_request_that_meets_the_listener_between_two_attempts_is_claimed() -> None:
    """The answerer's SYN comes while the offerer's socket is closed for its next attempt."""
    async with lab("none", "none") as (_, a, b):
        went = trio.Event()

        async def dial(address: Address, *, shared_port: bool = False) -> ByteStream:
            went.set()
            await trio.sleep_forever()  # as a socket that is never answered, and was closed when the SYN came
            raise AssertionError

        a.host.network.dial = dial  # type: ignore[method-assign,assignment]
        stream = await a.punch()
        assert went.is_set()
        assert stream is not None
        assert not a.accepted
        await talk(stream, b.punched)


async def test_when_both_offer_at_once_one_offer_counts() -> None:
    async with lab() as (_, a, b):
        results: dict[str, ByteStream | None] = {}

        async def punch(side: Side) -> None:
            results[side.name] = await side.punch()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch, a)
            nursery.start_soon(punch, b)
        first, second = (a, b) if a.peer_id < b.peer_id else (b, a)
        ours = results[first.name]
        assert ours is not None
        assert results[second.name] is None
        await trio.sleep(1)
        await talk(ours, second.punched)


async def test_who_has_answered_an_offer_does_not_make_its_own() -> None:
    async with lab() as (made, a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.punch)
            await trio.sleep(1.5 * SIGNAL)
            assert await b.punch() is None, "before the go"
            await trio.sleep(2 * SIGNAL)
            assert await b.punch() is None, "after it"
        assert {name for name, _ in made.signals} == {"a"}


async def test_a_cancelled_punch_leaves_nothing_behind() -> None:
    async with lab() as (made, a, b):
        for seconds in (0.01, 2.5 * SIGNAL, 3 * SIGNAL + 1.5 * HOP):
            with trio.move_on_after(seconds) as scope:
                await a.punch()
            assert scope.cancelled_caught
            assert not a.puncher.claims._wanted and not a.puncher._offering
            assert not made.world.network("a").knocks
            await trio.sleep(20)
        for stream in a.accepted:  # what came after we had given up is the acceptor's
            await stream.aclose()
        with trio.fail_after(10):
            assert [await heard(stream) for stream in b.punched] == [b""] * len(b.punched)


# Peers that do not mean it


async def test_a_peer_that_refuses_the_go_ends_the_punch_with_its_reason() -> None:
    async with lab() as (_, a, b):

        async def refuse(*_: object) -> bytes:
            raise RemoteRefused("busy", "enough")

        b.puncher.handle_go = refuse  # type: ignore[method-assign]
        with pytest.raises(RemoteRefused, match="enough"):
            await a.punch()
        assert trio.current_time() < 1


async def test_without_addresses_nobody_is_asked() -> None:
    async with lab() as (made, a, b):
        a.addresses = ()
        with pytest.raises(PeerUnreachable, match="no address of our own"):
            await a.punch()
        assert not made.signals
        a.addresses, b.addresses = (mem("a"),), ()
        with pytest.raises(RemoteRefused, match="no address of our own"):
            await a.punch()
        b.addresses = (mem("a"),)
        with pytest.raises(RemoteRefused, match="the peer offers our own addresses"):
            await a.punch()


async def test_a_go_without_an_offer_is_refused_and_an_offer_goes_once() -> None:
    async with lab() as (_, a, b):
        via, nonce = PeerId(bytes(32)), bytes(NONCE_SIZE)
        with pytest.raises(RemoteRefused, match="no_offer"):
            await b.puncher.handle_go(a.peer_id, via, pack(PunchGo(nonce, 0.1)))
        await b.puncher.handle_offer(a.peer_id, via, pack(PunchOffer(nonce, (mem("a-nat"),))))
        with pytest.raises(RemoteRefused, match="no_offer"):
            await b.puncher.handle_go(b.peer_id, via, pack(PunchGo(nonce, 0.1)))
        assert await b.puncher.handle_go(a.peer_id, via, pack(PunchGo(nonce, 1e300))) == b""
        with pytest.raises(RemoteRefused, match="busy"):
            await b.puncher.handle_go(a.peer_id, via, pack(PunchGo(nonce, 0.1)))
        await trio.sleep(deadlines.punch(defaults.MAX_PUNCH_RTT) + 0.1)
        assert not b.puncher._answering, "a round trip of 1e300 s is not believed"
        with pytest.raises(RemoteRefused, match="no_offer"):
            await b.puncher.handle_go(a.peer_id, via, pack(PunchGo(nonce, 0.1)))


async def test_a_common_peer_that_invents_origins_makes_us_knock_at_few_doors() -> None:
    """Sixty offers within a minute: 8 at once and one every other second, whoever they say sent them."""
    async with lab() as (_, _a, b):
        via, answered = PeerId(bytes(32)), 0
        for number in range(60):
            origin = Identity(number.to_bytes(32, "big")).peer_id
            try:
                offer = PunchOffer(number.to_bytes(NONCE_SIZE, "big"), (mem("victim"),))
                await b.puncher.handle_offer(origin, via, pack(offer))
                answered += 1
            except RemoteRefused as error:
                assert error.code == "rate"
            await trio.sleep(1.0)
        assert answered <= 8 + 30


async def test_offers_are_bounded_in_number_and_time() -> None:
    async with lab() as (_, _a, b):
        via = PeerId(bytes(32))
        peers = [Identity(bytes([9, i]) + bytes(30)).peer_id for i in range(defaults.MAX_PUNCHES + 1)]
        for again in (peers[:-1], peers[:8]):
            for i, peer in enumerate(again):
                await b.puncher.handle_offer(peer, peer, pack(PunchOffer(bytes([i]) * NONCE_SIZE, (mem("x"),))))
        assert len(b.puncher._answers._waiting) == defaults.MAX_PUNCHES
        last = pack(PunchOffer(bytes(NONCE_SIZE), (mem("x"),)))
        with pytest.raises(RemoteRefused, match="busy"):
            await b.puncher.handle_offer(peers[-1], via, last)
        await trio.sleep(deadlines.punch_go() + 0.1)
        await b.puncher.handle_offer(peers[-1], via, last)
        assert len(b.puncher._answers._waiting) == 1


@pytest.mark.parametrize("body", [b"", b"\x80", b"\xc1", pack(PunchOffer(b"short", ()))])
async def test_garbage_is_answered_with_a_typed_error(body: bytes) -> None:
    async with lab() as (_, a, b):
        for handler in (b.puncher.handle_offer, b.puncher.handle_go):
            with pytest.raises((RemoteProtocolError, RemoteRefused)):
                await handler(a.peer_id, PeerId(bytes(32)), body)


async def test_a_node_that_does_not_run_refuses_and_one_punch_per_peer_is_made() -> None:
    async with lab() as (_, a, b):
        b.puncher.nursery = None
        with pytest.raises(RemoteRefused, match="stopped"):
            await a.punch()
        async with trio.open_nursery() as nursery:
            b.puncher.nursery = nursery
            nursery.start_soon(a.punch)
            await trio.sleep(SIGNAL / 2)
            with pytest.raises(ProtocolMisuse):
                await a.punch()


async def test_an_address_is_claimed_by_one_and_only_streams_from_there_are_taken() -> None:
    world = MemoryWorld(random.Random(0))
    listener = await world.network("b").listen(mem("b"))
    claims = Claims()
    async with await world.network("a").dial(mem("b")) as ours, await listener.accept() as theirs:
        taken: list[ByteStream] = []
        assert not claims.take(theirs)
        with claims.claim(ours.local, taken.append):
            with pytest.raises(ProtocolMisuse), claims.claim(ours.local, taken.append):
                pass
            assert claims.take(theirs)
        assert taken == [theirs]
        assert not claims.take(theirs)
