"""Same seed, same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import trio
from trio._core import _run as scheduler

from shoal.sim.determinism import TraceHash, deterministic, run_virtual, seeded
from shoal.transport.errors import ConfigError

#: 200 machines in a ring of chatter: random sleeps, random sizes, lossy lines, a partition, a kill.
PROGRAM = """
import contextlib, sys, trio
from shoal.sim.determinism import TraceHash, run_virtual, seeded
from shoal.transport.address import Address
from shoal.transport.errors import PeerUnreachable
from shoal.transport.memory import MemoryWorld, Route

SEED = int(sys.argv[1])
N = 200
trace = TraceHash()

async def serve(stream):
    async with stream:
        try:
            while data := await stream.receive_some():
                await stream.send_all(data[: len(data) // 2 + 1])
        except trio.BrokenResourceError:
            pass

async def machine(world, i):
    rng = seeded(SEED, f"n{i}")
    network = world.network(f"n{i}")
    async with trio.open_nursery() as nursery:
        listener = await network.listen(Address("mem", f"n{i}", 1))
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        await trio.sleep(rng.random())
        for _ in range(3):
            with trio.move_on_after(20), contextlib.suppress(trio.BrokenResourceError, PeerUnreachable):
                async with await network.dial(Address("mem", f"n{rng.randrange(N)}", 1)) as stream:
                    for _ in range(4):
                        await trio.sleep(rng.choice([0, 0.1, rng.random()]))
                        await stream.send_all(bytes(rng.randrange(1, 100_000)))
                        await stream.receive_some()
        await trio.sleep_until(200)
        nursery.cancel_scope.cancel()

async def main():
    default = Route(latency=0.02, bandwidth=1e6, loss=0.01, jitter=0.005)
    world = MemoryWorld(seeded(SEED, "world"), default=default, trace=trace)
    async with trio.open_nursery() as nursery:
        for i in range(N):
            nursery.start_soon(machine, world, i)
        await trio.sleep(1)
        world.partition([f"n{i}" for i in range(N // 2)])
        await trio.sleep(1)
        world.heal()
        world.kill("n7")
        await trio.sleep_until(200)
        nursery.cancel_scope.cancel()

run_virtual(main, seed=SEED)
print(trace.events, trace.hexdigest())
"""


def trace_of(seed: int, hash_seed: str) -> tuple[int, str]:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    events, digest = answer.stdout.split()
    return int(events), digest


def test_a_seed_gives_the_same_events_in_every_process_and_another_seed_others() -> None:
    first = trace_of(1, "0")
    assert first[0] > 2000, "the scenario is worth comparing"
    assert trace_of(1, "12345") == first
    assert trace_of(2, "0")[1] != first[1]


async def interleaving() -> list[int]:
    order: list[int] = []

    async def step(i: int) -> None:
        for _ in range(3):
            await trio.sleep(1)
            order.append(i)

    async with trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(step, i)
    return order


def test_the_seed_decides_who_runs_first() -> None:
    assert run_virtual(interleaving, seed=3) == run_virtual(interleaving, seed=3)
    assert run_virtual(interleaving, seed=3) != run_virtual(interleaving, seed=4)


def test_virtual_time_passes_at_once_and_results_come_back() -> None:
    async def sleep(seconds: float) -> float:
        began = trio.current_time()
        await trio.sleep(seconds)
        return trio.current_time() - began

    assert run_virtual(sleep, 1e6, seed=0) == 1e6


def test_a_run_that_goes_on_too_long_is_ended() -> None:
    with pytest.raises(trio.TooSlowError):
        run_virtual(trio.sleep_forever, seed=0, limit=100)


def test_errors_leave_and_what_was_patched_is_restored() -> None:
    async def fail() -> None:
        assert scheduler._ALLOW_DETERMINISTIC_SCHEDULING
        raise KeyError("out")

    switch, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    with pytest.raises(KeyError):
        run_virtual(fail, seed=0)
    assert switch == scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    assert scheduler._r.getstate() == state


def test_torch_runs_on_one_thread_without_denormals_and_gets_its_settings_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)
    try:
        with deterministic(0):
            assert torch.get_num_threads() == 1
            assert (torch.full((8,), 1e-38) * 0.01).sum().item() == 0
        assert torch.get_num_threads() == 2
        assert (torch.full((8,), 1e-38) * 0.01).sum().item() != 0
    finally:
        torch.set_num_threads(before)


def test_another_trio_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio, "__version__", "0.36.1")
    with pytest.raises(ConfigError, match=r"trio 0\.35\.x .* this is 0\.36\.1"), deterministic(0):
        pass


def test_generators_of_different_purposes_are_independent() -> None:
    assert seeded(1, "a").random() == seeded(1, "a").random()
    draws = {seeded(*key).random() for key in ((1, "a"), (1, "b"), (2, "a"), (1, "a", "b"), (1, "ab"))}
    assert len(draws) == 5
    assert isinstance(seeded(0), random.Random)


def test_a_trace_hash_depends_on_every_field_and_the_order() -> None:
    events = [(0.0, "send", "a", "b", 1), (0.5, "send", "a", "b", 1), (0.0, "receive", "a", "b", 1)]
    events += [(0.0, "send", "b", "a", 1), (0.0, "send", "a", "b", 2)]
    digests = []
    for some in ([], *([event] for event in events), events, events[::-1]):
        trace = TraceHash()
        for event in some:
            trace(*event)
        assert trace.events == len(some)
        digests.append(trace.hexdigest())
    assert len(set(digests)) == len(digests)
