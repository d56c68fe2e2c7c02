"""One task waits, another wakes it."""

from __future__ import annotations

import trio

from shoal.transport.waiter import Waiter


async def test_a_waiter_goes_on_when_it_is_woken_and_only_then() -> None:
    waiter, seen = Waiter(), []

    async def wait() -> None:
        await waiter.wait()
        seen.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(3)
        assert waiter
        assert not seen
        waiter.wake()
        assert not waiter
    assert len(seen) == 1


async def test_waking_nobody_is_forgotten() -> None:
    waiter = Waiter()
    waiter.wake()
    with trio.move_on_after(1) as scope:
        await waiter.wait()
    assert scope.cancelled_caught


async def test_a_cancelled_wait_leaves_the_place_free() -> None:
    waiter = Waiter()
    with trio.move_on_after(1):
        await waiter.wait()
    assert not waiter
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter.wait)
        await trio.sleep(1)
        waiter.wake()
