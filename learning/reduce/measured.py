"""What this peer reports about its lines: taken from what its links have seen anyway, nothing is sent for it."""

from __future__ import annotations

from collections.abc import Sequence

from ...transport.address import scope_of
from ...transport.endpoint import Endpoint
from ...transport.identity import PeerId
from .rates import MAX_PATHS, MAX_RATE, MAX_RTT, Path, Rates


def measured(endpoint: Endpoint, voters: Sequence[PeerId]) -> Rates:
    """Rates of our line, and of those of our paths to ``voters`` that are slower than it; see :mod:`linemeter`.

    All zero before the first bulk transfer, and no rates where all of them are on this machine: what one process gets
    through there says how busy the processors were, and slices sized by that cost time and memory.
    """
    now = endpoint.host.now()
    paths, longest, here = [], 0.0, True
    for peer in voters:
        link = endpoint.link(peer) if peer != endpoint.peer_id else None
        if link is None:
            continue
        longest, here = max(longest, link.nearest), here and scope_of(link.remote) == "loopback"
        rate = endpoint.line.up.path(peer, now)
        if rate is not None and rate >= 1.0:
            paths.append(Path(peer, _whole(rate)))
    if here:
        return Rates(rtt=min(int(longest * 1e6), MAX_RTT))
    return Rates(
        up=_whole(endpoint.line.up.rate(now)),
        down=_whole(endpoint.line.down.rate(now)),
        rtt=min(int(longest * 1e6), MAX_RTT),
        paths=tuple(sorted(paths, key=lambda path: (path.rate, path.peer))[:MAX_PATHS]),
    )


def _whole(rate: float | None) -> int:
    return 0 if rate is None else min(int(rate), MAX_RATE)
