"""A node's host in virtual time."""

from __future__ import annotations

import threading

import pytest
import trio

from shoal.sim.determinism import run_virtual, seeded
from shoal.sim.virtual import EPOCH, VirtualHost
from shoal.transport.address import Address
from shoal.transport.identity import Identity
from shoal.transport.memory import MemoryWorld


def host(name: str = "n0", *, seed: int = 1, **settings: object) -> VirtualHost:
    return VirtualHost(name, MemoryWorld(seeded(seed, "world")), seed=seed, **settings)  # type: ignore[arg-type]


async def test_both_clocks_pass_together_and_the_wall_clock_may_be_skewed() -> None:
    right, fast = host(), host(skew=120.0)
    began, wall = right.now(), right.wall()
    assert wall == EPOCH + trio.current_time()
    await trio.sleep(50)
    assert right.now() - began == right.wall() - wall == 50
    assert fast.now() == right.now()
    assert fast.wall() - right.wall() == 120


def test_randomness_and_keys_come_from_seed_and_name() -> None:
    assert host().entropy(32) == host().entropy(32)
    assert host().entropy(32) != host("n1").entropy(32)
    assert host().entropy(32) != host(seed=2).entropy(32)
    assert host().random.random() == host().random.random()
    assert host().random.random() != host("n1").random.random()
    one = host()
    assert one.entropy(32) != one.entropy(32)
    assert len(one.entropy(7)) == 7
    assert one.entropy(0) == b""


def test_drawing_protocol_jitter_does_not_change_keys() -> None:
    one, other = host(), host()
    other.random.random()
    assert Identity(one.entropy(32)).peer_id == Identity(other.entropy(32)).peer_id


async def test_blocking_work_runs_inline_and_takes_no_time_by_default() -> None:
    began = trio.current_time()
    assert await host().run_blocking(threading.get_ident) == threading.get_ident()
    assert trio.current_time() == began


async def test_blocking_work_takes_its_modelled_time_and_shows_its_effects_at_the_end() -> None:
    finished: list[float] = []

    def train(steps: int) -> int:
        finished.append(trio.current_time())
        return steps

    machine = host(duration=lambda fn, args: 0.5 * args[0] if fn is train else 0.0)  # type: ignore[operator]
    began = machine.now()
    assert await machine.run_blocking(train, 4) == 4
    assert machine.now() == finished[0] == began + 2.0


async def test_blocking_work_that_began_is_not_cancelled_and_none_begins_when_cancelled() -> None:
    done: list[int] = []
    machine = host(duration=lambda fn, args: 10.0)
    with trio.move_on_after(1) as scope:
        await machine.run_blocking(done.append, 1)
        assert done == [1], "the result arrives; the next checkpoint raises"
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await machine.run_blocking(done.append, 2)
    assert done == [1]


async def test_errors_of_blocking_work_come_back() -> None:
    with pytest.raises(ZeroDivisionError):
        await host().run_blocking(divmod, 1, 0)


def test_hosts_of_one_world_reach_each_other() -> None:
    async def main() -> bytes:
        world = MemoryWorld(seeded(5, "world"))
        one, other = (VirtualHost(name, world, seed=5) for name in ("n0", "n1"))
        async with await one.network.listen(Address("mem", "n0", 0)) as listener:
            ours = await other.network.dial(listener.address)
            theirs = await listener.accept()
            async with ours, theirs:
                await ours.send_all(b"hello")
                return bytes(await theirs.receive_some())

    assert run_virtual(main, seed=5) == b"hello"
