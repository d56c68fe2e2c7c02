"""The waits of a round, from what was measured on the links to its voters."""

from __future__ import annotations

from collections.abc import Sequence

from ...transport import deadlines
from ...transport.endpoint import Endpoint
from ...transport.identity import PeerId
from .. import defaults
from .actions import Pace


def pace(
    endpoint: Endpoint,
    voters: Sequence[PeerId],
    size: int,
    worked: float,
    loading: Sequence[PeerId] = (),
    state: int = 0,
) -> Pace:
    """``size``: bytes that one peer sends in a bulk phase; ``worked``: seconds that training took here lately.

    ``loading``: voters that load the state, ``state`` bytes, before they can do the round.
    """
    links = [link for peer in voters if (link := endpoint.link(peer)) is not None]
    rtt = max((link.rtt for link in links), default=0.0)
    measured = [link.bandwidth for link in links if link.bandwidth]
    lag = endpoint.lag.value(endpoint.host.now())
    bulk = deadlines.bulk_phase(defaults.TRANSFER_FLOOR, size, rtt, min(measured, default=None), lag)
    grace = deadlines.stragglers(defaults.GRACE_FLOOR, worked, rtt, lag)
    for peer in loading:
        link = endpoint.link(peer)
        if link is not None:
            load = deadlines.bulk_phase(grace, state, link.rtt, link.bandwidth, lag)
            grace = max(grace, min(load, defaults.JOIN_GRACE))
    return Pace(
        grace=grace,
        suspect=deadlines.silence(defaults.SUSPECT, rtt, lag),
        scatter=bulk,
        gather=bulk,
        accept=deadlines.last_words(defaults.ACCEPT_WAIT, rtt, lag),
    )
