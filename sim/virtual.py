"""A node's host in virtual time: mock clock, seeded randomness, memory network, blocking work inline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from ..transport.host import Host
from ..transport.memory import MemoryWorld
from .determinism import seeded

T = TypeVar("T")

#: Unix seconds at virtual time 0: 2027-01-15 08:00 UTC. A constant, so that signatures repeat bit for bit.
EPOCH = 1_800_000_000.0

#: Virtual seconds that one blocking call takes: ``duration(fn, args)``.
Duration = Callable[[Callable[..., object], tuple[object, ...]], float]


class VirtualHost(Host):
    """One machine of a :class:`MemoryWorld`.

    ``skew``: seconds by which its wall clock is ahead. ``slowness``: its training takes this many times as long as the
    task models. ``duration``: what blocking work costs in virtual time (default:
    nothing). ``seed``, ``name`` and ``life`` (a restarted process has another) determine all its random numbers, keys
    included: two hosts of one seed differ.
    """

    def __init__(
        self,
        name: str,
        world: MemoryWorld,
        *,
        seed: int,
        skew: float = 0.0,
        slowness: float = 1.0,
        duration: Duration | None = None,
        life: int = 0,
    ) -> None:
        self.name, self.skew, self.slowness, self.duration = name, skew, slowness, duration
        self.network = world.network(name)
        again = (str(life),) if life else ()
        self.random = seeded(seed, name, "protocol", *again)
        self._entropy = seeded(seed, name, "entropy", *again)

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return EPOCH + self.skew + trio.current_time()

    def entropy(self, n: int) -> bytes:
        return self._entropy.randbytes(n)

    async def run_blocking(self, fn: Callable[..., T], *args: object) -> T:
        """Run ``fn`` here and now, when its modelled time has passed: its effects show when it is done.

        Like a thread's, its result is not lost to a cancellation that comes once it has begun.
        """
        await trio.lowlevel.checkpoint()
        if self.duration is not None:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.duration(fn, args))
        return fn(*args)

    async def compute(self, modelled: float, fn: Callable[..., T], *args: object) -> T:
        """Run ``fn`` here and now, then let the ``modelled`` seconds pass that it takes on the machine we play."""
        await trio.lowlevel.checkpoint()
        result = fn(*args)
        if modelled > 0:
            with trio.CancelScope(shield=True):
                await trio.sleep(modelled * self.slowness)
        return result
