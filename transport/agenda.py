"""What is to happen at which time, in the memory network: callbacks in one queue, run by one task."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import trio

from .memory_flow import Sleeper


class Agenda:
    """Callbacks by time, those of one time in the order in which they were put in.

    ``tick``: times are rounded up to multiples of so many seconds (0: not at all). With thousands of nodes something
    happens at every moment; a millisecond then takes one turn of the event loop instead of dozens.

    One task for all of them, which exists while anything is to happen: thousands of events cost no task each. It is
    a system task of ``trio.run``: what a callback raises ends the run.
    """

    def __init__(self, tick: float = 0.0) -> None:
        self.tick = tick
        self._due: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._running = False
        self._sleeper = Sleeper()

    def at(self, time: float, act: Callable[..., None], *arguments: object) -> None:
        """Call ``act(*arguments)`` at ``time`` (trio's clock), or as soon as possible when that has passed."""
        self._count += 1
        if self.tick:
            time = math.ceil(time / self.tick - 1e-6) * self.tick
        heapq.heappush(self._due, (time, self._count, act, arguments))
        if not self._running:
            self._running = True
            trio.lowlevel.spawn_system_task(self._run)
        elif self._due[0][1] == self._count:
            self._sleeper.wake_at(time)

    async def _run(self) -> None:
        try:
            while self._due:
                now = trio.current_time()
                while self._due and self._due[0][0] <= now:
                    _, _, act, arguments = heapq.heappop(self._due)
                    act(*arguments)
                if self._due:
                    await self._sleeper.sleep(self._due[0][0])
        finally:
            self._running = False
