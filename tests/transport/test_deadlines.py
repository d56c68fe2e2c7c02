"""Deadlines: floors, what raises them, and the lag of our own loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.transport import deadlines, defaults
from shoal.transport.deadlines import LoopLag

times = st.floats(0, 1e4)


def test_detection_of_a_frozen_peer_takes_about_ten_seconds_by_default() -> None:
    assert defaults.KEEPALIVE_IDLE + deadlines.sign_of_life(rtt=0.05) == pytest.approx(10.0)


def test_a_long_round_trip_raises_the_deadline_of_a_ping() -> None:
    assert deadlines.sign_of_life(rtt=3.0) == 12.0


def test_bytes_queued_before_a_ping_count_at_the_measured_bandwidth_up_to_a_bound() -> None:
    assert deadlines.sign_of_life(0.1, unheard=100_000, bandwidth=100_000.0) == pytest.approx(5.0 + 2.0)
    assert deadlines.sign_of_life(0.1, unheard=1 << 40, bandwidth=100_000.0) == pytest.approx(5.0 + 60.0)
    assert deadlines.sign_of_life(0.1, unheard=1 << 20, bandwidth=None) == pytest.approx(5.0)


def test_a_call_gets_time_for_its_body_and_a_slow_line_is_assumed_when_none_is_measured() -> None:
    assert deadlines.call(0.0, size=125_000) == pytest.approx(30 + 2)
    assert deadlines.call(0.0, size=125_000, bandwidth=1e9) == pytest.approx(30, abs=0.01)
    assert deadlines.call(0.0, size=10_000, bandwidth=1.0) == pytest.approx(30 + 2)  # 1 B/s is not believed


@given(rtt=times, lag=st.floats(0, 10), size=st.integers(0, 1 << 40))
def test_no_deadline_is_below_its_floor_and_lag_always_adds(rtt: float, lag: float, size: int) -> None:
    assert deadlines.dial(lag) == defaults.DIAL_FLOOR + lag
    assert deadlines.handshake(lag) == defaults.HANDSHAKE_FLOOR + lag
    assert deadlines.connect(lag) == defaults.CONNECT_FLOOR + lag
    assert deadlines.sign_of_life(rtt, lag) >= defaults.PING_FLOOR + lag
    assert deadlines.call(rtt, lag, size) >= defaults.CALL_FLOOR + lag
    assert deadlines.request_header(rtt, lag) >= defaults.HEADER_FLOOR + lag


def test_records_shrink_on_a_slow_line_and_at_most_double_on_a_fast_one() -> None:
    assert deadlines.record_size(1e9, defaults.FIRST_RECORD) == 2 * defaults.FIRST_RECORD
    assert deadlines.record_size(1e9, defaults.MAX_RECORD) == defaults.MAX_RECORD
    assert deadlines.record_size(400_000.0, defaults.MAX_RECORD) == 100_000
    assert deadlines.record_size(1.0, defaults.MAX_RECORD) == defaults.MIN_RECORD


def test_the_lag_of_the_loop_is_its_worst_recent_oversleep_and_fades() -> None:
    lag = LoopLag()
    assert lag.value(0.0) == 0.0
    lag.note(2.0, now=100.0)
    lag.note(0.5, now=101.0)
    assert lag.value(100.0) == 2.0
    assert lag.value(100.0 + defaults.LAG_HALF_LIFE) == pytest.approx(1.0)
    lag.note(1.5, now=100.0 + defaults.LAG_HALF_LIFE)
    assert lag.value(100.0 + defaults.LAG_HALF_LIFE) == 1.5


def test_a_laptop_that_slept_for_a_night_does_not_wait_for_one() -> None:
    lag = LoopLag()
    lag.note(30_000.0, now=0.0)
    assert lag.value(0.0) == defaults.MAX_LAG
