"""How many connections bulk gets: the climb as a pure function, and on modelled paths."""

from __future__ import annotations

import pytest
import trio

from shoal.transport import defaults
from shoal.transport.memory import Route
from shoal.transport.width import Width

from .harness import Virtual, nodes
from .sinks import SINK, Size, sink


def climb(
    width: Width, rate_of: dict[int, float], *, rtt: float = 0.05, seconds: float = 30.0, most: int = 99
) -> list[int]:
    """Feeds records as a line would that moves ``rate_of[connections]``; returns what was wanted, step by step."""
    now, size, seen = 0.0, 100_000, [0]
    while now < seconds:
        have = min(width.wanted, most)
        now += size / rate_of[have]
        if width.note(now, size, more=True, rtt=rtt, have=have):
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
        assert not width.note(i * 0.01, 100_000, more=i % 10 > 0, rtt=0.05, have=0)


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
