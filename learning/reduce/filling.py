"""How far a contribution is there already, while its rest is still being copied or computed."""

from __future__ import annotations

import trio


class Filling:
    """Elements ``0..ready`` of a vector of ``length`` are final; the rest follows, or is given up."""

    def __init__(self, length: int, ready: int | None = None) -> None:
        self.length = length
        self.ready = length if ready is None else ready
        #: Why the rest will never come; empty while it may.
        self.failed = ""
        self._changed = trio.Event()

    @property
    def full(self) -> bool:
        return self.ready >= self.length

    def advance(self, stop: int) -> None:
        """Elements up to ``stop`` are final now."""
        self.ready = max(self.ready, stop)
        self._wake()

    def fail(self, why: str) -> None:
        """The rest will not come."""
        if not self.full:
            self.failed = why
            self._wake()

    async def wait(self, stop: int) -> bool:
        """Wait until elements up to ``stop`` are final; False once it is clear that they never will be."""
        while self.ready < stop and not self.failed:
            await self._changed.wait()
        return self.ready >= stop

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()
