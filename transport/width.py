"""How many connections a path needs for bulk, found by trying: a pure climb with a reason for each step.

One TCP connection carries at most a window per round trip, and on a path that loses packets much less (Mathis et al.
1997); several carry several times that, until the path itself is full. Nobody can tell beforehand, so: while bulk waits
all the time, measure what leaves; open more connections; keep them if that made it faster, else go back.
"""

from __future__ import annotations

from . import defaults


class Width:
    """The climb of one link, in the direction in which we send. Times in seconds, rates in bytes per second."""

    def __init__(self) -> None:
        #: Connections wanted for bulk beside the one that carries control.
        self.wanted = 0
        self.reason = "one connection until bulk has kept it busy"
        #: Connections are being opened; measuring waits for them.
        self.opening = False
        self._step = 0
        self._before: float | None = None  # the rate one step below
        self._settled_until = float("-inf")
        self._begin: float | None = None
        self._bytes = 0
        self._last = 0.0

    def reset(self) -> None:
        """Nothing was sent for a while: begin anew."""
        self.wanted = self._step = 0
        self._before = self._begin = None
        self._settled_until = float("-inf")

    def note(self, now: float, size: int, *, more: bool, rtt: float, have: int) -> bool:
        """``size`` bytes of bulk were taken by the network; ``more``: others wait. True when :attr:`wanted` changed.

        ``rtt``: of the path; ``have``: connections for bulk that are open now.
        """
        if rtt < defaults.WIDE_RTT:
            self.reason = f"one connection: a round trip of {1e3 * rtt:.1f} ms needs no more"
            return False
        gap = now - self._last > max(2 * rtt, defaults.WIDE_GAP)
        self._last = now
        if self._begin is None or gap or not more or self.opening:
            # Not the line was what held it back.
            self._begin, self._bytes = now, 0
            return False
        self._bytes += size
        span = now - self._begin
        if now < self._settled_until or span < min(max(8 * rtt, defaults.WIDE_WINDOW), defaults.WIDE_WINDOW_MAX):
            return False
        rate = self._bytes / span
        self._begin, self._bytes = now, 0
        return self._judge(now, rate, have)

    def _judge(self, now: float, rate: float, have: int) -> bool:
        before, self._before = self._before, rate
        steps = defaults.WIDE_STEPS
        if have < self.wanted:
            self._settled_until = now + defaults.WIDE_RETRY
            self.reason = f"{have} connections for bulk: no more could be opened"
            self._before = None
            return False
        if self._step and before is not None and rate < defaults.WIDE_GAIN * before:
            self._step -= 1
            self._settled_until = now + defaults.WIDE_RETRY
            self._before = None
            self.wanted = steps[self._step]
            self.reason = (
                f"{self.wanted or 'no'} connections for bulk: {steps[self._step + 1]} moved {_mb(rate)} "
                f"instead of {_mb(before)}"
            )
            return True
        if self._step + 1 == len(steps):
            self._settled_until = now + defaults.WIDE_RETRY
            self.reason = f"{self.wanted} connections for bulk, the most allowed, move {_mb(rate)}"
            return False
        self._step += 1
        self.wanted = steps[self._step]
        self.reason = f"trying {self.wanted} connections for bulk: {steps[self._step - 1] or 'one'} moved {_mb(rate)}"
        return True


def _mb(rate: float) -> str:
    return f"{rate / 1e6:.1f} MB/s"
