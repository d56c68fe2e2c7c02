"""The meter of a machine's line: the sum over links while busy, slow paths only where the line has room."""

from __future__ import annotations

import pytest

from shoal.transport import defaults
from shoal.transport.identity import Identity
from shoal.transport.linemeter import Direction

PEERS = [Identity(bytes([n]) * 32).peer_id for n in range(1, 6)]
RECORD = 50_000


def send(meter: Direction, at: float, rates: list[float], seconds: float) -> float:
    """Records to each peer at its rate, side by side; returns when they end."""
    free = [at] * len(rates)
    while min(free) < at + seconds:
        index = free.index(min(free))
        began, free[index] = free[index], free[index] + RECORD / rates[index]
        meter.note(began, free[index], RECORD, PEERS[index])
    return max(free)


def test_the_line_is_the_sum_over_links_that_share_it() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, 4.0)
    assert meter.rate(end) == pytest.approx(4e6, rel=0.1)
    assert all(meter.path(peer, end) is None for peer in PEERS)


def test_before_a_second_window_nothing_is_known() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, defaults.LINE_WINDOW)
    assert meter.rate(end) is None


def test_a_path_shows_itself_once_the_line_has_room() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, 3.0)
    end = send(meter, end, [0.2e6], 3.0)  # the last one, alone
    assert meter.path(PEERS[0], end) == pytest.approx(0.2e6, rel=0.1)
    assert meter.path(PEERS[1], end) is None
    assert meter.rate(end) == pytest.approx(4e6, rel=0.1)


def test_a_line_that_became_slower_is_found_out_in_the_next_busy_time() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, 3.0)
    end = send(meter, end + 5.0, [0.25e6] * 4, 6.0)
    assert meter.rate(end) == pytest.approx(1e6, rel=0.15)


@pytest.mark.parametrize("slow", [2, 3])
def test_several_slow_paths_in_a_busy_time_of_their_own_are_no_slow_line(slow: int) -> None:
    """The others have all they wanted, there was a break, and now bulk goes to a few that are far away."""
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 5, 3.0)
    end = send(meter, end + 0.5, [0.2e6] * slow, 6.0)
    assert meter.rate(end) == pytest.approx(5e6, rel=0.1)
    for peer in PEERS[:slow]:
        assert meter.path(peer, end) == pytest.approx(0.2e6, rel=0.15)


def test_a_line_that_was_met_through_a_slow_path_first_is_known_once_it_was_full_twice() -> None:
    meter, end = Direction(0.02), 0.0
    for _ in range(2):  # fast ones are done before a window is over, nearly
        began = end
        end = send(meter, began, [0.2e6], 4.0)
        assert meter.rate(end) == pytest.approx(0.2e6, rel=0.1)
    for _ in range(3):
        end = send(meter, end, [1e6] * 4, 0.6)
        end = send(meter, end, [0.2e6], 4.0)
    assert meter.rate(end) == pytest.approx(4e6, rel=0.15)
    assert meter.path(PEERS[0], end) == pytest.approx(0.2e6, rel=0.1)


def test_a_path_whose_bulk_ends_in_the_middle_of_a_window_is_not_slow() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, 3.0)
    for _ in range(4):  # what it has leaves at once, and no more comes before the next window
        began = end
        end = send(meter, began, [0.2e6], 0.3)
        meter.note(began, began + 0.05, RECORD, PEERS[3])
    assert meter.path(PEERS[3], end) is None
    assert meter.path(PEERS[0], end) is not None


def test_a_path_that_once_was_slow_is_forgotten_when_more_gets_through() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 4, 3.0)
    end = send(meter, end, [0.2e6], 3.0)
    assert meter.path(PEERS[0], end) is not None
    end = send(meter, end, [1e6] * 4, 3.0)
    assert meter.path(PEERS[0], end) is None


def test_what_is_old_says_nothing_any_more() -> None:
    meter = Direction(0.02)
    end = send(meter, 0.0, [1e6] * 2, 3.0)
    assert meter.rate(end + defaults.LINE_MEMORY + 1.0) is None
    assert not meter.busy(end + 1.0)
