"""Links over several pipes: upgrades, deaths, resumption, bulk pipes, and hellos of strangers."""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from shoal.transport import deadlines, defaults
from shoal.transport.aead import NOMINAL_CIPHERS
from shoal.transport.deadlines import LoopLag
from shoal.transport.errors import HandshakeError, LinkClosed, RecordError, RemoteProtocolError, WaitExpired
from shoal.transport.establish import join_pipe, open_pipe
from shoal.transport.link import Link, LinkStream, Priority
from shoal.transport.memory import Route
from shoal.transport.network import ByteStream
from shoal.transport.pipe import Pipe
from shoal.transport.pipehello import (
    ANSWER_BYTES,
    BAD_PROOF,
    HELLO_BYTES,
    UNKNOWN_SESSION,
    USED_INDEX,
    PipeGreeting,
    PipeOpening,
    PipeRefused,
    SessionSecrets,
)

from .harness import LinkPair, Real, Virtual, World, connect_bytes, link_pair
from .link_conformance import pattern, read_all


class Lab:
    """A running link, and ways to add pipes to it and to kill them."""

    def __init__(self, world: World, pair: LinkPair) -> None:
        self.world, self.pair = world, pair
        self.raw: list[tuple[ByteStream, ByteStream]] = [(pair.raw_a, pair.raw_b)]

    async def add(self, way: str = "direct", *, bulk_only: bool = False, opener: str = "a") -> None:
        """Another pipe, opened by one side."""
        here, there, out, into = await connect_bytes(self.world)
        self.raw.append((out, into))
        first, second = (self.pair.a, self.pair.b) if opener == "a" else (self.pair.b, self.pair.a)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join_pipe, there, into, b"", "direct", {second.secrets.id: second}.get, LoopLag())
            await open_pipe(here, first, out, way, bulk_only=bulk_only)

    async def cut(self, which: int = 0) -> None:
        """The connection breaks, both ends see it."""
        for end in self.raw[which]:
            await trio.aclose_forcefully(end)


@asynccontextmanager
async def lab(world: World) -> AsyncIterator[Lab]:
    async with link_pair(world) as pair:
        yield Lab(world, pair)


def by_relay(pair: LinkPair) -> None:
    """The pipe of the handshake counts as a relayed one."""
    pair.a.best.way = pair.b.best.way = "relay"


async def settled(link: Link, pipes: int = 1) -> None:
    with trio.fail_after(5):
        while len(link.pipes) != pipes or not all(pipe.usable for pipe in link.pipes):
            await trio.sleep(0.01)


async def exchange(pair: LinkPair, size: int, priority: Priority) -> None:
    """``size`` bytes each way on one stream, checked."""
    ours = await pair.a.open_stream("x", priority)
    theirs = await pair.accept()
    data = pattern(size)
    got: dict[str, bytes] = {}

    async def send(stream: LinkStream) -> None:
        for at in range(0, size, 100_000):
            await stream.send_all(memoryview(data)[at : at + 100_000])
        await stream.send_eof()

    async def receive(stream: LinkStream, name: str) -> None:
        got[name] = await read_all(stream)

    async with trio.open_nursery() as nursery:
        for name, stream in (("a", ours), ("b", theirs)):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream, name)
    assert got == {"a": data, "b": data}


WORLDS = [
    pytest.param(lambda: Virtual(Route(latency=0.02, bandwidth=50e6)), id="virtual"),
    pytest.param(Real, id="tcp", marks=pytest.mark.real),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("opener", ["a", "b"])
async def test_a_better_pipe_takes_over_and_the_worse_one_is_given_back(world: type[World], opener: str) -> None:
    async with lab(world()) as bench:
        by_relay(bench.pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, bench.pair, 3_000_000, Priority.BULK)
            while bench.pair.b.bytes_received < 500_000:
                await trio.sleep(0.001)
            await bench.add("punch", opener=opener)
            for link in (bench.pair.a, bench.pair.b):
                await settled(link)
                assert link.way == "punch"
                assert link.pipes_lost == 0
        await bench.cut(0)  # the relay is gone: nobody notices
        await exchange(bench.pair, 100_000, Priority.CONTROL)
        assert bench.pair.a.alive
        assert bench.pair.b.alive


async def test_a_worse_pipe_takes_over_nothing() -> None:
    async with lab(Virtual()) as bench:
        await bench.add("relay")
        for link in (bench.pair.a, bench.pair.b):
            await settled(link)
            assert link.way == "direct"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("opener", ["a", "b"])
async def test_a_new_pipe_counts_though_one_side_does_not_know_yet_that_the_old_one_is_dead(
    world: type[World], opener: str
) -> None:
    async with lab(world()) as bench:
        here, there = (bench.pair.a, bench.pair.b)[:: 1 if opener == "a" else -1]
        for _ in range(3):  # numbers that the other side has used count, too
            await bench.add(opener="b" if opener == "a" else "a")
            await settled(here)
            await settled(there)
        old = here.best
        aclose = old.stream.aclose

        async def stay_open() -> None:
            await trio.lowlevel.checkpoint()

        old.stream.aclose = stay_open  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            here.on_trouble = lambda: nursery.start_soon(partial(bench.add, opener=opener))
            there.on_trouble = lambda: None
            old.fail(LinkClosed("only one side has noticed"))
            with trio.fail_after(1):  # before anybody misses an answer
                while not all(link.best.usable and link.best.index > old.index for link in (here, there)):
                    await trio.sleep(0.001)
        await aclose()
        for link in (here, there):
            await settled(link)
            assert not link.interrupted
        await exchange(bench.pair, 1_000_000, Priority.BULK)


@pytest.mark.parametrize("world", WORLDS)
async def test_streams_outlive_the_death_of_every_pipe(world: type[World]) -> None:
    async with lab(world()) as bench:
        troubles = 0

        async with trio.open_nursery() as nursery:

            def trouble() -> None:
                nonlocal troubles
                troubles += 1
                if bench.pair.a.interrupted:
                    nursery.start_soon(bench.add)

            bench.pair.a.on_trouble = trouble
            bench.pair.b.on_trouble = lambda: None

            async def kill() -> None:
                for which in range(4):
                    before = bench.pair.b.bytes_received
                    while bench.pair.b.bytes_received < before + 400_000:
                        await trio.sleep(0.001)
                    await bench.cut(which)

            nursery.start_soon(kill)
            await exchange(bench.pair, 5_000_000, Priority.BULK)
            await exchange(bench.pair, 200_000, Priority.CONTROL)
        assert troubles >= 4
        assert bench.pair.a.pipes_lost >= 4


@pytest.mark.parametrize("world", WORLDS)
async def test_a_connection_that_ends_inside_a_record_is_a_pipe_lost_and_no_fault_of_the_peer(
    world: type[World],
) -> None:
    async with lab(world()) as bench:
        raw, got, troubles = bench.pair.raw_b, 0, [0]
        receive = raw.receive_some

        async def receive_some(max_bytes: int | None = None) -> bytes | bytearray:
            nonlocal got
            data = b"" if got > 200_000 else await receive(min(max_bytes or 999, 999))
            got += len(data)
            return data

        async def receive_into(buffer: memoryview) -> int:
            data = await receive_some(len(buffer))
            buffer[: len(data)] = data
            return len(data)

        raw.receive_some, raw.receive_into, raw.run = receive_some, receive_into, 0  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:

            def trouble() -> None:
                troubles[0] += 1
                nursery.start_soon(bench.add)

            bench.pair.a.on_trouble = bench.pair.b.on_trouble = lambda: None
            bench.pair.b.on_trouble = trouble
            await exchange(bench.pair, 2_000_000, Priority.BULK)
        assert troubles[0] == 1 and bench.pair.b.pipes_lost == 1
        for link in (bench.pair.a, bench.pair.b):
            assert link.alive and link.best.index == 1


@pytest.mark.parametrize("seed", range(8))
async def test_any_mixture_of_pipes_and_deaths_loses_no_byte(seed: int) -> None:
    draw = random.Random(seed)
    world = Virtual(Route(latency=0.02, bandwidth=20e6, loss=0.01 if seed % 2 else 0.0))
    async with lab(world) as bench:
        bench.pair.a.on_trouble = bench.pair.b.on_trouble = lambda: None

        async def disturb() -> None:
            while True:
                await trio.sleep(draw.random() * 0.3)
                what = draw.choice(["add", "add", "cut"])
                try:
                    if what == "add" or bench.pair.a.interrupted or bench.pair.b.interrupted:
                        way = draw.choice(["direct", "punch", "webrtc", "relay"])
                        await bench.add(way, bulk_only=draw.random() < 0.3, opener=draw.choice("ab"))
                    else:
                        await bench.cut(draw.randrange(len(bench.raw)))
                except (LinkClosed, PipeRefused, ExceptionGroup):
                    pass  # the cut hit a hello

        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb)
            for _ in range(3):
                await exchange(bench.pair, 2_000_000, Priority.BULK)
                await exchange(bench.pair, 100_000, Priority.CONTROL)
            nursery.cancel_scope.cancel()
        assert bench.pair.a.alive
        assert bench.pair.a.idle
        assert bench.pair.b.idle


async def test_an_interrupted_link_ends_at_its_deadline_with_the_reason_of_the_break() -> None:
    async with lab(Virtual()) as bench:
        bench.pair.a.on_trouble = bench.pair.b.on_trouble = lambda: None
        stream = await bench.pair.a.open_stream("x")
        await bench.pair.accept()
        began = trio.current_time()
        await bench.cut()
        await trio.sleep(0.5)
        assert bench.pair.a.interrupted
        assert bench.pair.a.alive
        with pytest.raises(LinkClosed, match="broke without a goodbye|ended without a goodbye"):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(deadlines.resume(bench.pair.a.rtt), abs=0.1)
        assert not bench.pair.a.alive


async def test_whoever_knows_that_nobody_is_there_ends_an_interrupted_link_at_once() -> None:
    async with lab(Virtual()) as bench:
        bench.pair.a.on_trouble = lambda: bench.pair.a.give_up(LinkClosed("the process is gone"))
        began = trio.current_time()
        await bench.cut()
        await bench.pair.a.closed.wait()
        assert trio.current_time() - began < 0.1
        assert "the process is gone" in str(bench.pair.a.close_reason)


async def test_a_path_that_dies_silently_is_suspected_while_somebody_waits_for_an_answer() -> None:
    world = Virtual()
    async with lab(world) as bench:
        troubled: list[float] = []
        bench.pair.a.on_trouble = lambda: troubled.append(trio.current_time())
        stream = await bench.pair.a.open_stream("x")
        await bench.pair.accept()
        await trio.sleep(1)
        world.memory.cut("here", "there")
        began = trio.current_time()
        await stream.send_all(b"anybody there?")
        await trio.sleep(4)
        lag = troubled[0] - began
        assert lag <= defaults.PROBE_FLOOR + defaults.SUSPECT_FLOOR + 0.1
        assert bench.pair.a.troubled
        assert bench.pair.a.alive


async def test_a_pipe_that_was_only_slow_is_trusted_again() -> None:
    world = Virtual()
    async with lab(world) as bench:
        bench.pair.a.on_trouble = lambda: None
        stream = await bench.pair.a.open_stream("x")
        other = await bench.pair.accept()
        world.memory.partition(["here"], ["there"])
        await stream.send_all(b"?")
        await trio.sleep(3)
        assert bench.pair.a.troubled
        world.memory.heal()
        assert await other.receive_some() == b"?"
        await other.send_all(b"!")
        assert await stream.receive_some() == b"!"
        assert not bench.pair.a.troubled


async def test_a_suspect_pipe_gives_way_to_another_of_the_same_kind() -> None:
    world = Virtual()
    async with lab(world) as bench:
        stream = await bench.pair.a.open_stream("x")
        other = await bench.pair.accept()
        bench.pair.a.on_trouble = bench.pair.b.on_trouble = lambda: None
        # Only this pipe is stuck, as after a change of address: its bytes go nowhere.
        bench.pair.raw_a._out.stall()  # type: ignore[attr-defined]
        await stream.send_all(b"?")
        await trio.sleep(3)
        assert bench.pair.a.troubled
        await bench.add()
        with trio.fail_after(1):
            assert await other.receive_some() == b"?"
        assert bench.pair.a.best.index == 1


async def test_altered_bytes_on_one_pipe_of_two_end_that_pipe_alone() -> None:
    async with lab(Virtual()) as bench:
        await bench.add(bulk_only=True)
        for link in (bench.pair.a, bench.pair.b):
            await settled(link, 2)
        await bench.raw[1][0].send_all(bytes(100))
        await settled(bench.pair.b)
        await settled(bench.pair.a)
        assert bench.pair.b.pipes_lost == 1
        await exchange(bench.pair, 1_000_000, Priority.BULK)


async def test_an_altered_body_ends_the_link_as_its_record_counts_already() -> None:
    async with lab(Virtual()) as bench:
        await bench.add(bulk_only=True)
        for link in (bench.pair.a, bench.pair.b):
            await settled(link, 2)
        for end in bench.raw[1]:
            alter(end, 300_000)
        ours = await bench.pair.a.open_stream("x", Priority.BULK)
        theirs = await bench.pair.accept()

        async def send() -> None:
            with suppress(LinkClosed):  # all of it may be on its way before the other side has met the bit
                await ours.send_all(pattern(2_000_000))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with pytest.raises(LinkClosed, match="altered"):
                await theirs.read_exactly_into(memoryview(bytearray(2_000_000)))
        assert isinstance(bench.pair.b.close_reason, RecordError)


def alter(raw: ByteStream, at: int) -> None:
    """One bit of what comes on ``raw`` is another one, ``at`` bytes from here."""
    receive, got = raw.receive_some, 0

    async def receive_some(max_bytes: int | None = None) -> bytearray:
        nonlocal got
        data = bytearray(await receive(max_bytes))
        if got <= at < got + len(data):
            data[at - got] ^= 1
        got += len(data)
        return data

    raw.receive_some = receive_some  # type: ignore[method-assign]


async def test_bulk_takes_the_bulk_pipes_and_control_the_best() -> None:
    async with lab(Virtual(Route(latency=0.02, bandwidth=50e6))) as bench:
        for _ in range(3):
            await bench.add(bulk_only=True)
        await settled(bench.pair.a, 4)
        await settled(bench.pair.b, 4)
        sent = [pipe.bytes_sent for pipe in bench.pair.a.pipes]
        await exchange(bench.pair, 4_000_000, Priority.BULK)
        first, *others = [pipe.bytes_sent - before for pipe, before in zip(bench.pair.a.pipes, sent, strict=True)]
        assert first < 20_000
        assert all(other > 500_000 for other in others)
        for which in (1, 2, 3):
            await bench.cut(which)
        await settled(bench.pair.a)
        await exchange(bench.pair, 1_000_000, Priority.BULK)
        assert bench.pair.a.pipes_lost == 3


async def test_more_pipes_than_allowed_are_refused() -> None:
    async with lab(Virtual()) as bench:
        for _ in range(defaults.MAX_PIPES - 1):
            await bench.add(bulk_only=True)
        with pytest.raises(ExceptionGroup) as caught:
            await bench.add(bulk_only=True)
        assert caught.group_contains(PipeRefused, match="too many pipes|as many pipes as it allows")
        assert bench.pair.a.alive


async def test_a_silent_answerer_is_given_up() -> None:
    async with lab(Virtual()) as bench:
        here, _, out, into = await connect_bytes(bench.world)
        with pytest.raises(WaitExpired, match="answer to a pipe's hello"):
            await open_pipe(here, bench.pair.a, out, "direct")
        assert await into.receive_some() != b""
        assert bench.pair.a.alive


# Hellos, sans-IO


def ends() -> tuple[SessionSecrets, SessionSecrets]:
    exporter, cipher = bytes(range(32)), NOMINAL_CIPHERS[-1].name
    return SessionSecrets(exporter, cipher, initiator=True), SessionSecrets(exporter, cipher, initiator=False)


def opening(secrets: SessionSecrets, fresh: int = 1) -> PipeOpening:
    return PipeOpening(secrets, "direct", bulk_only=False, entropy=lambda n: bytes([fresh]) * n, peer="bob")


def answered(hello: bytes, secrets: SessionSecrets, fresh: int = 2) -> bytes:
    answer, _ = PipeGreeting(hello).answer(secrets, lambda n: bytes([fresh]) * n)
    return answer


def test_both_ends_of_a_pipe_derive_the_same_keys_and_no_two_pipes_do() -> None:
    a, b = ends()
    wires = []
    for _ in range(2):
        ours = opening(a)
        answer, theirs = PipeGreeting(ours.hello).answer(b, lambda n: bytes(n))
        channel = ours.receive(answer)
        assert channel is not None
        for source, target in ((channel, theirs), (theirs, channel)):
            wire = source.sealer.seal((b"hello",))
            (record,) = target.receive(wire)
            assert bytes(record.data) == b"hello"
            wires.append(bytes(wire))
    # Same fresh bytes, same content: the index alone makes other keys.
    assert len(set(wires)) == 4


def test_a_hello_that_is_played_again_is_refused() -> None:
    a, b = ends()
    hello = opening(a).hello
    answered(hello, b)
    with pytest.raises(PipeRefused) as caught:
        answered(hello, b)
    assert caught.value.code == USED_INDEX


def test_a_hello_that_is_reflected_is_refused() -> None:
    a, _ = ends()
    with pytest.raises(PipeRefused) as caught:
        answered(opening(a).hello, a)
    assert caught.value.code == USED_INDEX


@pytest.mark.parametrize("at", range(0, HELLO_BYTES, 3))
def test_an_altered_hello_opens_nothing(at: int) -> None:
    a, b = ends()
    hello = bytearray(opening(a).hello)
    hello[at] ^= 1
    with pytest.raises(HandshakeError):
        answered(bytes(hello), b)
    assert b.use(1)  # and uses nothing up


@pytest.mark.parametrize("at", range(0, ANSWER_BYTES, 3))
def test_an_altered_answer_opens_nothing(at: int) -> None:
    a, b = ends()
    ours = opening(a)
    answer = bytearray(answered(ours.hello, b))
    answer[at] ^= 1
    with pytest.raises(HandshakeError):
        ours.receive(bytes(answer))


def test_a_hello_without_the_sessions_secret_is_refused() -> None:
    _, b = ends()
    stranger = SessionSecrets(bytes(32), b.cipher, initiator=True)
    stranger.id = b.id
    with pytest.raises(PipeRefused) as caught:
        answered(opening(stranger).hello, b)
    assert caught.value.code == BAD_PROOF


async def test_a_hello_for_an_unknown_session_is_answered_with_the_reason() -> None:
    async with lab(Virtual()) as bench:
        here, there, out, into = await connect_bytes(bench.world)

        async def answer() -> None:
            with pytest.raises(PipeRefused):
                await join_pipe(there, into, b"", "direct", lambda id: None, LoopLag())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(PipeRefused, match="does not know this session") as caught:
                await open_pipe(here, bench.pair.a, out, "direct")
        assert caught.value.code == UNKNOWN_SESSION


def test_pings_of_a_pipe_measure_the_round_trip_and_make_no_queue() -> None:
    pipe = Pipe.__new__(Pipe)
    stream = type("S", (), {"remote": None, "local": None})()
    Pipe.__init__(pipe, stream, None, now=0.0)  # type: ignore[arg-type]
    now = 0.0
    for sample in (0.1, 0.2):
        pipe.ping(now)
        pipe.ping(now)  # one at a time
        asked = pipe.take_frames()
        assert len(asked) == 5
        now += sample
        pipe.receive_frames(memoryview(b"\x02" + asked[1:]), now)
    assert pipe.rtt == pytest.approx(0.1 * 0.875 + 0.2 * 0.125)
    for i in range(10_000):
        pipe.receive_frames(memoryview(b"\x01" + i.to_bytes(4, "big")), now)
    assert pipe.take_frames() == b"\x02" + (9999).to_bytes(4, "big")
    assert not pipe.has_frames


@pytest.mark.parametrize("seen", [None, 0.00002, 0.3])
def test_the_nearest_is_the_least_of_what_pings_and_the_system_saw(seen: float | None) -> None:
    class Stream:
        remote = local = None
        asked = 0

        def round_trip(self) -> float | None:
            self.asked += 1
            return seen

        def allow_unsent(self, size: int) -> None:
            pass

    stream = Stream()
    pipe = Pipe(stream, None, now=0.0, rtt=0.2)  # type: ignore[arg-type]
    assert pipe.nearest == 0.2
    for now in (1.0, 1.1, 1.9, 2.5):
        pipe.note_sent(defaults.MIN_RECORD, 0.001, now)
    assert stream.asked == 2  # once a second, not for each record
    assert pipe.nearest == min(0.2, seen or 0.2)
    pipe.ping(3.0)
    pipe.receive_frames(memoryview(b"\x02" + pipe.take_frames()[1:]), 3.25)
    # A handshake was no ping: where nobody else knows better, the first ping takes its place.
    assert pipe.nearest == (0.25 if seen is None else min(0.2, seen))
    assert pipe.rtt == 0.25


@pytest.mark.real(timeout=60)
@pytest.mark.skipif(sys.platform != "linux", reason="what only Linux's kernel says")
async def test_a_busy_peer_nearby_is_no_long_path_that_needs_more_connections() -> None:
    async with lab(Real()) as bench:
        link, told = bench.pair.a, []

        def note(now: float, size: int, *, more: bool, rtt: float, have: int, paths: object) -> bool:
            told.append(rtt)
            return False

        link.on_width, link.width.note = lambda: None, note  # type: ignore[method-assign]
        link.best.rtt = link.best.nearest = 0.05  # what its handshake took while it was busy
        await exchange(bench.pair, 8_000_000, Priority.BULK)
        assert told[-1] < defaults.WIDE_RTT <= link.rtt


def test_answers_to_earlier_pings_may_still_come_others_never() -> None:
    pipe = Pipe.__new__(Pipe)
    stream = type("S", (), {"remote": None, "local": None})()
    Pipe.__init__(pipe, stream, None, now=0.0)  # type: ignore[arg-type]
    pipe.ping(0.0)
    first = pipe.take_frames()
    pipe.asked = None  # something else was heard: a sign of life
    pipe.ping(5.0)
    second = pipe.take_frames()
    pipe.receive_frames(memoryview(b"\x02" + first[1:]), 6.0)
    assert pipe.asked == 5.0  # the late answer is none to the second ping
    pipe.receive_frames(memoryview(b"\x02" + second[1:]), 6.5)
    assert pipe.rtt == pytest.approx(1.5)
    for again in (first, second, b"\x01" + (77).to_bytes(4, "big")):
        with pytest.raises(RemoteProtocolError, match="no ping of ours"):
            pipe.receive_frames(memoryview(b"\x02" + again[1:]), 7.0)
