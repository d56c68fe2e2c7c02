"""What one peer has measured on its lines, as it tells the leader of a round: a claim like any other, bounded."""

from __future__ import annotations

import attrs

from ...transport.identity import PeerId

#: Bytes per second, and microseconds, that anybody may claim: 1 TB/s, ten minutes.
MAX_RATE, MAX_RTT = 10**12, 600 * 10**6

#: Paths in one report, the slowest: 45 bytes each. Those left out are taken to be as fast as the usual one.
MAX_PATHS = 64


@attrs.frozen
class Path:
    """From the one who reports to ``peer``: bytes per second at which bulk went lately (0: unknown), round trip in µs."""

    peer: PeerId
    rate: int
    rtt: int

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.rate <= MAX_RATE and 0 <= self.rtt <= MAX_RTT):
            raise ValueError(f"a path of {self.rate} bytes per second and {self.rtt} µs")


@attrs.frozen
class Rates:
    """Bytes per second: ``up`` and ``down`` of the whole line while it was busy with bulk, and of the ``usual`` path.

    0: not measured. ``usual``: the median over all measured paths. ``paths``: the slowest of them, at most
    :data:`MAX_PATHS`. ``rtt``: µs, the longest round trip to a voter.
    """

    up: int = 0
    down: int = 0
    usual: int = 0
    rtt: int = 0
    paths: tuple[Path, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not all(0 <= rate <= MAX_RATE for rate in (self.up, self.down, self.usual)) or not 0 <= self.rtt <= MAX_RTT:
            raise ValueError("rates out of range")
        if len(self.paths) > MAX_PATHS:
            raise ValueError(f"{len(self.paths)} paths in one report")


NOTHING = Rates()
