"""A result, or a part of one, from a peer that holds it: as long as bytes keep coming, and no longer."""

from __future__ import annotations

import trio

from ...transport import deadlines
from ...transport.endpoint import Endpoint
from ...transport.errors import WaitExpired
from ...transport.identity import PeerId
from .. import defaults
from .methods import WANT, Given, Want


async def download(endpoint: Endpoint, holder: PeerId, want: Want, into: memoryview) -> Given:
    """What ``holder`` gives of ``want``, written to ``into``, whose bytes it fills.

    How fast its line is nobody has measured. So every piece has the deadline of a slow line, and the whole that of all
    pieces. Raises :class:`WaitExpired` and what :meth:`Endpoint.stream` does.
    """
    link = endpoint.link(holder)
    rtt, lag = (0.0, 0.0) if link is None else (link.rtt, link.lag)
    whole = deadlines.call(rtt, lag, into.nbytes)
    async with endpoint.stream(holder, WANT, want, timeout=whole) as reply:
        for start in range(0, into.nbytes, defaults.DOWNLOAD_PIECE):
            piece = into[start : start + defaults.DOWNLOAD_PIECE]
            seconds = deadlines.progress(rtt, lag, piece.nbytes)
            with trio.move_on_after(seconds) as scope:
                await reply.read_into(piece)
            if scope.cancelled_caught:
                raise WaitExpired(f"more than {start} of {into.nbytes} bytes of a result", seconds, peer=holder.short)
        return await reply.result()
