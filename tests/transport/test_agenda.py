"""The agenda: callbacks at their times, in order, by one task."""

from __future__ import annotations

import random

import pytest
import trio

from shoal.transport.agenda import Agenda


async def test_callbacks_happen_at_their_times_and_in_order() -> None:
    agenda, happened = Agenda(), []
    rng = random.Random(0)
    times = [rng.choice([1.0, 2.0, 2.5, 7.0]) for _ in range(100)]
    for number, time in enumerate(times):
        agenda.at(time, lambda n: happened.append((trio.current_time(), n)), number)
    await trio.sleep(10)
    assert happened == sorted((time, number) for number, time in enumerate(times))


async def test_an_earlier_one_is_not_kept_waiting_and_a_callback_may_add_more() -> None:
    agenda, happened = Agenda(), []
    agenda.at(100.0, happened.append, "late")
    await trio.sleep(1)
    agenda.at(5.0, agenda.at, 6.0, happened.append, "early")
    await trio.sleep(10)
    assert happened == ["early"]
    await trio.sleep(100)
    assert happened == ["early", "late"]


async def test_what_is_past_happens_at_once_and_no_task_stays_behind() -> None:
    agenda, happened = Agenda(), []
    await trio.sleep(5)
    before = trio.lowlevel.current_statistics().tasks_living
    agenda.at(1.0, happened.append, "past")
    await trio.sleep(0.001)
    assert happened == ["past"]
    assert trio.lowlevel.current_statistics().tasks_living == before


@pytest.mark.parametrize(("time", "rounded"), [(1.0, 1.0), (1.0004, 1.001), (1.001, 1.001), (1.00199, 1.002)])
async def test_times_are_rounded_up_to_ticks(time: float, rounded: float) -> None:
    agenda, happened = Agenda(tick=0.001), []
    agenda.at(time, lambda: happened.append(trio.current_time()))
    await trio.sleep(3)
    assert happened == [pytest.approx(rounded, abs=1e-9)]
