"""SCTP in batches: every byte arrives in order over a path that loses and reorders, and the window follows CUBIC."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.webrtc import WebRtcStream
from shoal.transport.webrtc_process import ChildEngine
from shoal.transport.webrtc_sctp import USERDATA_MAX_LENGTH, Cubic

from .test_webrtc import pair, receive_forever, send_forever


class OddEngine(ChildEngine):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def interpreter(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("odd_engine.py")), self.how]


@pytest.mark.process
async def test_bytes_arrive_in_order_though_one_in_25_datagrams_is_lost_or_late_in_each_direction() -> None:
    sent = os.urandom(1 << 20)
    async with pair() as made:
        made.here.webrtc, made.there.webrtc = OddEngine("lossy"), OddEngine("lossy")
        ours, theirs = await made.connect()
        async with ours, theirs:

            async def send(stream: WebRtcStream, data: bytes) -> None:
                await stream.send_all(data)
                await stream.send_eof()

            async def receive(stream: WebRtcStream, data: bytes) -> None:
                got = bytearray()
                async for chunk in stream:
                    got += chunk
                assert got == data

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, ours, sent)
                nursery.start_soon(send, theirs, sent[::-1])
                nursery.start_soon(receive, theirs, sent)
                nursery.start_soon(receive, ours, sent[::-1])


@pytest.mark.process
async def test_a_far_side_that_sends_more_than_was_asked_for_loses_the_connection() -> None:
    async with pair() as made:
        made.here.webrtc = OddEngine("greedy")
        ours, theirs = await made.connect()
        async with ours, theirs:
            with pytest.raises(trio.BrokenResourceError):
                await send_forever(ours)  # nobody reads: the window and the socket fill, and more is sent
            assert memory(theirs.engine.pid) < 200 << 20
            with pytest.raises(trio.BrokenResourceError, match="more bytes on a WebRTC channel than were asked for"):
                await receive_forever(theirs)


def memory(pid: int) -> int:
    """Resident bytes of a process; none where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def grown(cubic: Cubic, window: int, began: float, seconds: float, rtt: float) -> int:
    """The window after ``seconds`` in which a whole window is acknowledged each round trip."""
    for turn in range(int(seconds / rtt)):
        window = cubic.window(window, window, began + turn * rtt, rtt)
    return window


def test_after_a_loss_the_window_is_back_at_k_seconds_as_the_rfc_has_it() -> None:
    before = 1000 * USERDATA_MAX_LENGTH
    cubic = Cubic()
    cubic.lost(before)
    # RFC 9438, figure 2: K = cubic root of (W_max - cwnd) / C, in segments.
    back = ((1000 - 700) / 0.4) ** (1 / 3)
    window = 700 * USERDATA_MAX_LENGTH
    assert grown(cubic, window, 5.0, back * 0.5, 0.1) < 0.99 * before
    cubic.lost(before)
    assert grown(cubic, window, 5.0, back + 0.2, 0.1) == pytest.approx(before, rel=0.02)


@given(st.integers(4, 4000), st.floats(0.001, 0.5), st.lists(st.floats(0.0, 1.0), max_size=50))
def test_the_window_never_shrinks_without_a_loss_and_at_most_grows_by_half_a_round_trip(
    packets: int, rtt: float, parts: list[float]
) -> None:
    cubic, window, now = Cubic(), packets * USERDATA_MAX_LENGTH, 0.0
    cubic.lost(window)
    for part in parts:
        acknowledged = int(window * part)
        after = cubic.window(window, acknowledged, now, rtt)
        assert window <= after <= window + max(acknowledged / 2, USERDATA_MAX_LENGTH * 2)
        window, now = after, now + rtt
