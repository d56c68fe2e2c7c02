"""What one peer has measured on its lines, as it tells the leader of a round: a claim like any other, bounded."""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId

#: Bytes per second, and microseconds, that anybody may claim: 1 TB/s, ten minutes.
MAX_RATE, MAX_RTT = 10**12, 600 * 10**6

#: Paths in one report, the slowest: 42 bytes each.
MAX_PATHS = 64


@attrs.frozen
class Path:
    """Bytes per second from the one who reports to ``peer``, where that is slower than the line of the former."""

    peer: PeerId
    rate: int

    def __attrs_post_init__(self) -> None:
        if not 0 < self.rate <= MAX_RATE:
            raise ValueError(f"a path of {self.rate} bytes per second")


@attrs.frozen
class Rates:
    """``up``, ``down``: bytes per second of the whole line while it was busy with bulk; 0: not measured.

    ``rtt``: µs, the longest round trip to a voter when nothing else was on the way. ``paths``: those that are slower
    than the line, the slowest first, at most :data:`MAX_PATHS`.
    """

    up: int = 0
    down: int = 0
    rtt: int = 0
    paths: tuple[Path, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.up <= MAX_RATE and 0 <= self.down <= MAX_RATE and 0 <= self.rtt <= MAX_RTT):
            raise ValueError("rates out of range")
        if len(self.paths) > MAX_PATHS:
            raise ValueError(f"{len(self.paths)} paths in one report")


NOTHING = Rates()
