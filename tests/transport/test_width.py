"""How many connections bulk gets: the climb as a pure function, and on modelled paths."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import trio

from shoal.transport import deadlines, defaults, pump
from shoal.transport.address import Address, SignedPeerRecord
from shoal.transport.frames import Priority
from shoal.transport.memory import Route
from shoal.transport.mux import Mux
from shoal.transport.network import ByteStream
from shoal.transport.output import SendsRecords
from shoal.transport.pipe import Pipe
from shoal.transport.pipeset import PipeSet
from shoal.transport.records import RecordSealer, SealedRun
from shoal.transport.session import Session
from shoal.transport.width import Width

from .harness import Real, Virtual, nodes
from .sinks import SINK, Size, sink


def climb(
    width: Width,
    rate_of: dict[int, float],
    *,
    rtt: float = 0.05,
    seconds: float = 30.0,
    most: int = 99,
    paths: int = 1,
    now: float = 0.0,
) -> list[int]:
    """Feeds records as a line would that moves ``rate_of[connections]``; returns what was wanted, step by step."""
    size, seen, ends = 100_000, [width.wanted], now + seconds
    while now < ends:
        have = min(width.wanted, most)
        now += size / rate_of[have]
        if width.note(now, size, more=True, rtt=rtt, have=have, paths=lambda: paths):
            seen.append(width.wanted)
    return seen


def test_a_path_that_gives_each_connection_its_share_gets_the_most() -> None:
    width = Width()
    assert climb(width, {n: 10e6 * max(1, n) for n in defaults.WIDE_STEPS}) == list(defaults.WIDE_STEPS)
    assert "the most allowed" in width.reason


def test_a_path_that_is_full_goes_back_to_what_was_as_fast() -> None:
    width = Width()
    assert climb(width, {0: 10e6, 2: 20e6, 4: 21e6, 8: 0.0, 15: 0.0}) == [0, 2, 4, 2]
    assert "instead of" in width.reason


def test_a_path_that_one_connection_fills_stays_with_it() -> None:
    width = Width()
    assert climb(width, {0: 10e6, 2: 10.5e6}) == [0, 2, 0]


def test_a_settled_width_is_tried_again_after_a_while() -> None:
    width = Width()
    assert climb(width, {0: 10e6, 2: 10e6}, seconds=defaults.WIDE_RETRY + 10) == [0, 2, 0, 2, 0]


def test_without_delay_one_connection_is_enough() -> None:
    width = Width()
    assert climb(width, {0: 10e6}, rtt=0.0005) == [0]
    assert "needs no more" in width.reason


def test_a_sender_that_has_nothing_more_to_send_proves_nothing() -> None:
    width = Width()
    for i in range(10_000):
        assert not width.note(i * 0.01, 100_000, more=False, rtt=0.05, have=0)
    for i in range(10_000):
        assert not width.note(1000.0 + i * 0.3, 100_000, more=True, rtt=0.05, have=0)


def test_bulk_in_short_bursts_is_measured_over_many_of_them() -> None:
    """Each is too short to be measured by itself once there are more connections: only slow ones would count."""
    for gain, expected in ((2.0, [2, 4]), (1.0, [2, 0])):
        width, now, seen = Width(), 0.0, []
        while now < 30.0 and len(seen) < 2:
            rate = 10e6 * (gain if width.wanted else 1.0)
            for i in range(40):
                now += 100_000 / rate
                if width.note(now, 100_000, more=i < 39, rtt=0.05, have=width.wanted):
                    seen.append(width.wanted)
            now += 0.2
        assert seen == expected


def test_where_the_round_trip_is_short_there_is_one_connection_for_each_path() -> None:
    width = Width()
    assert climb(width, {0: 10e6, 2: 20e6, 4: 99e6}, rtt=0.0005, paths=2) == [0, 2]
    assert "one for each path" in width.reason
    width = Width()
    assert climb(width, {0: 10e6, 2: 20e6, 4: 40e6, 8: 99e6}, rtt=0.0005, paths=3) == [0, 2, 4]
    width = Width()
    assert climb(width, {0: 10e6, 2: 10e6}, rtt=0.0005, paths=2) == [0, 2, 0]
    assert "instead of" in width.reason
    # However many there are said to be.
    width = Width()
    assert climb(width, {n: 10e6 * max(1, n) for n in defaults.WIDE_STEPS}, rtt=0.0005, paths=40) == [0, 2, 4, 8, 15]
    # The other path is gone: no second connection is of use on the one that is left.
    width = Width()
    assert climb(width, {0: 10e6, 2: 20e6}, rtt=0.0005, paths=2) == [0, 2]
    assert climb(width, {0: 10e6, 2: 20e6}, rtt=0.0005, paths=1, now=100.0) == [2, 0]
    assert "needs no more" in width.reason


def test_connections_that_could_not_be_opened_end_the_climb() -> None:
    width = Width()
    assert climb(width, {0: 10e6, 2: 20e6}, most=2) == [0, 2, 4]
    assert "no more could be opened" in width.reason


@pytest.mark.parametrize("dialler", ["a", "b"])
async def test_pipes_fill_nine_tenths_of_a_long_fat_path(dialler: str) -> None:
    # 1 Gbit/s, 50 ms each way; the kernel of either end lets 1 MiB be under way per connection: 10 MB/s of 125.
    route = Route(latency=0.05, bandwidth=125e6, window=1 << 20)
    async with nodes(Virtual(route)) as n:
        a, b = await n.add("a"), await n.add("b")
        b.serve(SINK, sink)
        if dialler == "a":
            await a.connect(b.peer_id, b.addresses())
        else:
            await b.connect(a.peer_id, a.addresses())
        part = bytes(32 << 20)

        async def upload(parts: int) -> None:
            for _ in range(parts):
                await a.call(b.peer_id, SINK, Size(len(part)), body=[part], timeout=600)

        async with trio.open_nursery() as nursery:  # climbs
            for _ in range(6):
                nursery.start_soon(upload, 3)
        link = a.link(b.peer_id)
        assert link is not None
        assert len(link.bulk_pipes) >= 8, link.width.reason
        began, before = trio.current_time(), link.bytes_sent
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(upload, 2)
        rate = (link.bytes_sent - before) / (trio.current_time() - began)
        assert rate >= 0.9 * 125e6
        await trio.sleep(20)
        assert not link.bulk_pipes  # given back
        assert link.alive


async def test_a_peer_that_takes_no_more_connections_gets_its_bulk_through_the_mux(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(defaults, "MAX_PIPES", 1)
    route = Route(latency=0.05, bandwidth=125e6, window=1 << 20)
    async with nodes(Virtual(route)) as n:
        a, b = await n.add("a"), await n.add("b")
        b.serve(SINK, sink)
        await a.connect(b.peer_id, b.addresses())
        part = bytes(4 << 20)
        for _ in range(10):
            await a.call(b.peer_id, SINK, Size(len(part)), body=[part, part], timeout=600)
        link = a.link(b.peer_id)
        assert link is not None
        assert not link.bulk_pipes
        assert link.alive


@pytest.mark.real(timeout=60)
@pytest.mark.skipif(sys.platform != "linux", reason="what has more than one loopback address")
async def test_pipes_are_dealt_out_to_all_addresses_of_the_peer_and_those_that_lead_nowhere_are_left_out() -> None:
    async with nodes(Real()) as n, trio.open_nursery() as nursery:
        a, b = await n.add("a"), n.make("b")
        here = [Address("tcp", host, 0) for host in ("127.0.0.1", "127.0.0.2")]
        await nursery.start(b.run, here)
        link = await a.connect(b.peer_id, b.addresses()[:1])

        async def until(done: Callable[[], bool]) -> None:
            with trio.fail_after(20):
                while not done():
                    await trio.sleep(0.01)

        await until(lambda: a.contact(b.peer_id) is not None and b.link(a.peer_id) is not None)
        back = b.link(a.peer_id)
        assert back is not None
        assert link.paths() == back.paths() == 2

        def carrying() -> list[str]:
            return sorted(pipe.remote.host for pipe in link.bulk_pipes)

        for end, on in ((link, a), (back, b)):
            for wanted, expected in ((2, [1, 2]), (4, [1, 1, 2, 2])):
                end.width.wanted = wanted
                on._widening.wanted(end)
                await until(lambda expected=expected: carrying() == [f"127.0.0.{n}" for n in expected])  # type: ignore[misc]
                await until(lambda: not a._widening._busy and not b._widening._busy)
            link.narrow()
            await until(lambda: len(link.pipes) == len(back.pipes) == 1)
        # Another address, where nobody listens: what is near by needs no second pipe on one path instead.
        more = (*b.addresses(), Address("tcp", "127.0.0.3", 9), Address("tcp", "10.77.0.1", 9))
        wall = a.host.wall()
        a.learn(SignedPeerRecord.sign(b.identity, more, seq=int(wall * 1000) + 10_000, expires=wall + 600))
        assert link.paths() == 3  # the private one is none that leads to where the loopback does
        link.best.nearest, link.width.wanted = 0.0001, 3
        a._widening.wanted(link)
        await until(lambda: not link.width.opening and carrying() == ["127.0.0.1", "127.0.0.2"])
        assert link.paths() == 2
        # However often it says something else, it has us dial few addresses that lead nowhere.
        dialled: list[str] = []
        real = a._widening._dial

        async def counted(address: Address) -> ByteStream:
            dialled.append(address.host)
            return await real(address)

        a._widening._dial = counted
        for turn in range(3):
            liar = tuple(Address("tcp", f"127.0.{turn + 1}.{n + 1}", 9) for n in range(12))
            a.learn(SignedPeerRecord.sign(b.identity, liar, seq=int(wall * 1000) + 20_000 + turn, expires=wall + 600))
            link.width.wanted = 15
            a._widening.wanted(link)
            await until(lambda: not a._widening._busy)
        assert len(set(dialled) - {"127.0.0.1", "127.0.0.2"}) == 2  # one was known before
        assert link.paths() == 1
        nursery.cancel_scope.cancel()


def test_each_pipe_has_its_part_of_what_is_under_way() -> None:
    def pipe(index: int, bandwidth: float | None, *, bulk_only: bool) -> Pipe:
        stream = type("S", (), {"remote": None, "local": None, "run": 0})()
        made = Pipe(stream, None, index=index, bulk_only=bulk_only, now=0.0)  # type: ignore[arg-type]
        made.confirmed, made.bandwidth = True, bandwidth
        return made

    pipes = PipeSet(pipe(0, 9e6, bulk_only=False), "x", lambda: None)
    assert pipes.share(pipes.best) == 1.0
    fast, slow, new = (pipe(1, 4e6, bulk_only=True), pipe(3, 1e6, bulk_only=True), pipe(5, None, bulk_only=True))
    pipes.all.append(fast)
    assert pipes.share(fast) == 1.0
    pipes.all += [slow, new]
    assert [pipes.share(each) for each in (fast, slow, new)] == [0.8, 0.2, 0.0]
    fast.bandwidth = slow.bandwidth = None
    assert pipes.share(fast) == 1.0  # nothing is measured yet


class _Slow:
    """A byte stream that takes whole runs, each within ``seconds``."""

    run = defaults.RUN_BYTES
    remote = local = Address("tcp", "127.0.0.1", 1)

    def __init__(self) -> None:
        self.seconds = 0.25

    def round_trip(self) -> float:
        return 0.001

    def allow_unsent(self, size: int) -> None: ...

    def launch(
        self, sealer: RecordSealer, head: tuple[int, int, int], stretch: pump.Stretch
    ) -> tuple[SealedRun, int, int]:
        return sealer.launch(-1, head, stretch)

    async def send_run(self, wires: object) -> bool:
        await trio.sleep(self.seconds)
        return True


class _Writers(SendsRecords):
    """The writing side of a link, without the rest of it."""

    on_width = None

    def __init__(self, pipes: PipeSet) -> None:
        self._mux, self._pipes = Mux(initiator=True), pipes
        self._session = Session((8 << 20, 32 << 20))
        self._host = Virtual().host("a")

    bulk_pipes = property(lambda self: [])  # type: ignore[assignment]

    def _composed(self) -> None: ...

    def _sent(self, pipe: Pipe, size: int, seconds: float, now: float) -> None:
        pipe.note_sent(size, seconds, now)
        self._session.bound_bulk(deadlines.under_way(self._pipes.bandwidth, pipe.nearest, 8))


@pytest.mark.skipif(pump.active is None, reason=f"no native helper: {pump.which()}")
async def test_a_pipe_whose_share_has_grown_takes_it_though_nothing_is_acknowledged() -> None:
    """Else the peer, which acknowledges every 1 MiB, may wait for more while each writer waits for its peer."""

    def pipe(index: int, bandwidth: float) -> Pipe:
        channel = type("C", (), {"sealer": RecordSealer("chacha20-poly1305", bytes([index]) * 32), "opener": None})()
        made = Pipe(_Slow(), channel, index=index, bulk_only=index > 0, now=0.0)  # type: ignore[arg-type]
        made.confirmed, made.nearest = True, 0.001
        made._pace, made.bandwidth = 1.0 / bandwidth, bandwidth
        made.record_limit = deadlines.record_size(bandwidth, 1 << 20)
        return made

    fast, slow = pipe(1, 5e6), pipe(3, 0.4e6)
    pipes = PipeSet(pipe(0, 5e6), "x", lambda: None)
    pipes.all += [fast, slow]
    link = _Writers(pipes)
    link._session.bound_bulk(deadlines.under_way(pipes.bandwidth, 0.001, 8))
    link._mux.send(link._mux.open("x", Priority.BULK), bytes(7 << 20))
    fast.stream.seconds = 3.0  # type: ignore[attr-defined]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link._write, slow)
        nursery.start_soon(link._write, fast)
        await trio.sleep(60.0)
        nursery.cancel_scope.cancel()
    bulk = link._session.out[Priority.BULK]
    assert link._mux.has(Priority.BULK) and bulk.full
    assert set(bulk.kept_on) == {1, 3}
