"""Same seed, same bits: the one place that touches trio's scheduler, and the entry to virtual time.

Trio runs the tasks of one step in random order. Its scheduler can be made to draw that order from a seed, by a switch
meant for property tests and only there in private: hence the pinned version, checked here and nowhere else.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import random
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar, TypeVarTuple, Unpack

import trio
import trio.testing
from trio._core import _run as scheduler

from ..transport.errors import ConfigError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Allocations between collections of each generation. With Python's own (700, 10, 10) a world of thousands of tasks
#: spends much of its time on being traversed; most garbage is freed by reference counts anyway.
GC_THRESHOLDS = (50_000, 20, 100)

#: The trio releases whose scheduler was read for this.
TRIO = "0.35."


def run_virtual(async_fn: Callable[[Unpack[Ts]], Awaitable[T]], *args: *Ts, seed: int, limit: float = math.inf) -> T:
    """``trio.run(async_fn, *args)`` in virtual time, deterministically; returns or raises what it does.

    Time begins at 0 and jumps to the next deadline whenever nothing else can run. ``limit``: virtual seconds after
    which the run is cancelled and :class:`trio.TooSlowError` raised; without one, a run in which nothing can ever
    happen again hangs. What must not be done inside: threads, sockets, real sleeps (see ``sim.virtual``).
    """
    with deterministic(seed):
        clock = trio.testing.MockClock(autojump_threshold=0)
        return trio.run(partial(_limited, async_fn, args, limit), clock=clock)


async def _limited(async_fn: Callable[..., Awaitable[T]], args: tuple[object, ...], limit: float) -> T:
    if limit == math.inf:
        return await async_fn(*args)
    with trio.fail_after(limit):
        return await async_fn(*args)


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Within it, ``trio.run`` schedules from ``seed``, torch computes on one thread, garbage is collected less often.

    All is restored afterwards. A torch that is first imported within keeps its own settings: import it before.

    Raises :class:`ConfigError` under a trio whose scheduler is not the one this was written for.
    """
    if not trio.__version__.startswith(TRIO):
        raise ConfigError(
            f"virtual time needs trio {TRIO}x for its scheduler, this is {trio.__version__}; pip install 'trio~=0.35.0'"
        )
    thresholds = gc.get_threshold()
    switch, state = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate()
    # mypy: a Final constant, which trio's own plugin for Hypothesis sets in the same way
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    scheduler._r.seed(f"shoal scheduler {seed}")
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        with _steady_torch():
            yield
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = switch  # type: ignore[misc]
        scheduler._r.setstate(state)
        gc.set_threshold(*thresholds)


@contextlib.contextmanager
def _steady_torch() -> Iterator[None]:
    """One torch thread (sums depend on how they are split) and no denormals, if torch is loaded at all."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    threads, smallest = torch.get_num_threads(), torch.tensor(1e-39)
    kept_denormals = bool((smallest * 1).item())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(not kept_denormals)


def seeded(seed: int, *names: str) -> random.Random:
    """A generator of its own for each purpose: drawing from one never shifts another's numbers."""
    return random.Random("\0".join((str(seed), *names)))


class TraceHash:
    """The digest of all events of a :class:`~shoal.transport.memory.MemoryWorld`: equal runs have equal digests.

    Pass it as ``trace``.
    """

    def __init__(self) -> None:
        self.events = 0
        self._hash = hashlib.blake2b(digest_size=32)

    def __call__(self, time: float, what: str, source: str, target: str, size: int) -> None:
        self.events += 1
        self._hash.update(struct.pack("<dq", time, size) + f"{what}\0{source}\0{target}\n".encode())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
