"""What this machine's line carries when it is busy: measured from the bulk that goes over all links together.

One link measures how fast the network takes its own records (:attr:`Link.bandwidth`). While others send as well that is
its part of the uplink, not the uplink. So all links tell one meter of every record of bulk, and it counts what leaves
in windows of time in which bulk was being sent without a break. What comes in is counted in the same way.

A window tells what passed, which is the line's capacity only where the line was what held the bytes back: on the way
out that is likely (a sender pushes as fast as it can), on the way in it takes the senders' word that they had more.

A path to one peer shows itself where the line is not full and that peer's bulk still is not through: in windows that
carry clearly less than the line has carried, each link that sends without a break moves what its own path allows. One
that pauses has nothing to send, or waits for an answer.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from . import defaults

if TYPE_CHECKING:
    from .identity import PeerId


class Direction:
    """Windows of one direction. Times in seconds; nothing here waits or costs more than a few additions.

    ``gap``: seconds without bulk after which a busy time is over.
    """

    __slots__ = (
        "_before",
        "_begin",
        "_by_peer",
        "_bytes",
        "_end",
        "_first",
        "_gap",
        "_paths",
        "_roomy",
        "_usual",
        "windows",
    )

    def __init__(self, gap: float) -> None:
        #: (when it ended, bytes per second) of the last windows that were full, as far as was known.
        self.windows: deque[tuple[float, float]] = deque(maxlen=defaults.LINE_WINDOWS)
        #: (when it ended, to how many peers) of recent windows, but for those after which there was a wider one.
        self._usual: deque[tuple[float, int]] = deque()
        self._gap = gap
        self._begin = self._end = float("-inf")
        self._bytes = 0
        self._by_peer: dict[PeerId, tuple[int, float]] = {}  # bytes, and seconds in which some were being sent
        self._before = 0  # peers of the window before
        self._first = True
        self._roomy: float = 0  # windows of this busy time that left room, as long as all did
        # Rates of paths in windows that left the line room, least recently measured first.
        self._paths: dict[PeerId, deque[tuple[float, float]]] = {}

    def note(self, began: float, now: float, size: int, peer: PeerId | None = None) -> None:
        """``size`` bytes took from ``began`` to ``now``, to ``peer`` (None: from wherever)."""
        if began > self._end + self._gap:
            self._begin, self._bytes, self._first, self._roomy = began, 0, True, 0
            self._before = len(self._by_peer)
            self._by_peer.clear()
        span = self._end - self._begin
        settled = now > self._end + defaults.LINE_INSTANT or span >= 2 * defaults.LINE_WINDOW
        if span >= defaults.LINE_WINDOW and self._bytes >= defaults.LINE_MIN_BYTES and settled:
            # The first window of a busy time is not counted: buffers on the way swallowed its first bytes at once.
            if not self._first:
                self._close(self._end, span)
            self._begin, self._bytes, self._first = self._end, 0, False
            self._before = len(self._by_peer)
            self._by_peer.clear()
        self._end = max(self._end, now)
        self._bytes += size
        if peer is not None:
            before, busy = self._by_peer.get(peer, (0, 0.0))
            self._by_peer[peer] = before + size, busy + now - max(began, self._begin)

    def _close(self, now: float, span: float) -> None:
        rate, known, peers = self._bytes / span, self.rate(now), len(self._by_peer)
        for peer, (size, _) in self._by_peer.items():
            path = self.path(peer, now)
            if path is not None and size > defaults.PATH_FASTER * path * span:
                del self._paths[peer]  # whatever held it back then
        while self._usual and self._usual[-1][1] <= peers:
            self._usual.pop()
        self._usual.append((now, peers))
        while now - self._usual[0][0] > defaults.LINE_USUAL:
            self._usual.popleft()
        if known is None or rate >= defaults.LINE_ROOM * known:
            self.windows.append((now, rate))
            self._roomy = -math.inf
            return
        # The line has room, so its capacity is not what this window shows. Unless it became slower, and all windows of
        # a busy time in which we sent to as many as lately show it, not only to those that are behind slow paths.
        self._roomy += peers > 1 and 4 * peers > 3 * self._usual[0][1]
        if self._roomy >= defaults.LINE_ROOMY:
            self.windows.clear()
            self._paths.clear()
            self.windows.append((now, rate))
            return
        for peer, (size, busy) in self._by_peer.items():
            if busy < defaults.PATH_BUSY * span:
                continue
            samples = self._paths.pop(peer, None) or deque(maxlen=defaults.PATH_WINDOWS)
            samples.append((now, size / span))
            self._paths[peer] = samples
            if len(self._paths) > defaults.LINE_PATHS:
                del self._paths[next(iter(self._paths))]

    def rate(self, now: float) -> float | None:
        """Bytes per second of the whole line: the upper quartile of the recent windows. None: not measured.

        Before more was known a window that left room may have counted: what is much less than two of them does not.
        """
        rates = sorted(rate for at, rate in self.windows if now - at < defaults.LINE_MEMORY)
        if len(rates) > 1:
            rates = [rate for rate in rates if rate >= defaults.LINE_ROOM * rates[-2]]
        return rates[3 * len(rates) // 4] if rates else None

    def path(self, peer: PeerId, now: float) -> float | None:
        """Bytes per second of the path to ``peer`` where it is known to be slower than the line; None otherwise.

        The median of its windows, of two at least. Kept for long: whoever plans by it sends nothing there any more that
        would show it anew, and what does go there faster refutes it.
        """
        rates = sorted(rate for at, rate in self._paths.get(peer, ()) if now - at < defaults.PATH_MEMORY)
        return rates[len(rates) // 2] if len(rates) > 1 else None

    @property
    def peers(self) -> int:
        """How many peers have a part of the bulk: of this window or the one before."""
        return max(len(self._by_peer), self._before)

    def busy(self, now: float) -> bool:
        """Whether bulk moved just now."""
        return now < self._end + self._gap


class LineMeter:
    """Both directions of one machine."""

    def __init__(self) -> None:
        self.up, self.down = Direction(defaults.LINE_GAP_UP), Direction(defaults.LINE_GAP_DOWN)

    def busy(self, now: float) -> bool:
        """Whether bulk moves in either direction: no time for a probe."""
        return self.up.busy(now) or self.down.busy(now)
