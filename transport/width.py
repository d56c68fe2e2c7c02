"""How many connections a link needs for bulk, found by trying: a pure climb with a reason for each step.

One TCP connection carries at most a window per round trip, and on a path that loses packets much less (Mathis et al.
1997); several carry several times that, until the path itself is full. And a peer may be reached by several paths. What
helps nobody can tell beforehand, so: while bulk waits all the time, measure what leaves; open more connections; keep
them if that made it faster, else go back.
"""

from __future__ import annotations

from collections.abc import Callable

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
        self._busy = 0.0  # seconds in which the line was what held bulk back, and what left in them
        self._bytes = 0
        self._last, self._pressed = 0.0, False
        self._fresh = False  # connections have just been opened: slow start must be over

    def reset(self) -> None:
        """Nothing was sent for a while: begin anew."""
        self.wanted = self._step = self._bytes = 0
        self._before, self._busy = None, 0.0
        self._settled_until = float("-inf")

    def note(
        self, now: float, size: int, *, more: bool, rtt: float, have: int, paths: Callable[[], int] = lambda: 1
    ) -> bool:
        """``size`` bytes of bulk were taken by the network; ``more``: others wait for the line or the peer, as much is
        under way as may be. True when :attr:`wanted` changed.

        ``rtt``: of the path; ``have``: connections for bulk that are open now; ``paths``: that seem to lead to the
        peer, asked rarely. Where the round trip is short, more connections than those are not tried.
        """
        last, self._last = self._last, now
        pressed, self._pressed = self._pressed, more
        if self.opening or now < self._settled_until:
            self._busy, self._bytes = 0.0, 0
            self._fresh |= self.opening
            return False
        if not pressed or now - last > max(2 * rtt, defaults.WIDE_GAP):
            return False  # not the line was what held it back: that time does not count
        self._bytes += size
        self._busy += now - last
        if self._busy < min(max(8 * rtt, defaults.WIDE_WINDOW), defaults.WIDE_WINDOW_MAX):
            return False
        rate = self._bytes / self._busy
        self._busy, self._bytes = 0.0, 0
        if self._fresh:
            self._fresh = False
            return False
        most = defaults.WIDE_STEPS[-1]
        if rtt < defaults.WIDE_RTT:
            most = min(paths(), most)
            if most < 2:
                changed = self.wanted > 0
                self.wanted = self._step = 0
                self._before = None
                self.reason = f"one connection: a round trip of {1e3 * rtt:.1f} ms needs no more"
                return changed
        return self._judge(now, rate, have, most)

    def _judge(self, now: float, rate: float, have: int, most: int) -> bool:
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
        if steps[self._step] >= most:
            self._settled_until = now + defaults.WIDE_RETRY
            why = "the most allowed" if self._step + 1 == len(steps) else "one for each path or more"
            self.reason = f"{self.wanted} connections for bulk, {why}, move {_mb(rate)}"
            return False
        self._step += 1
        self.wanted = steps[self._step]
        self.reason = f"trying {self.wanted} connections for bulk: {steps[self._step - 1] or 'one'} moved {_mb(rate)}"
        return True


def _mb(rate: float) -> str:
    return f"{rate / 1e6:.1f} MB/s"
