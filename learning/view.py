"""What one peer knows of who is in a gossip swarm: the last round that each was heard to have done; sans-IO.

Groups are drawn from the view, so two peers that disagree about one member disagree about every group. Hence members
go by a rule that all apply alike, at the same round, long after the news have reached everybody: a fixed number of
rounds after the last one they did. Until then the dead are drawn into groups, which costs the exchange with them but no
time: who cannot be reached is not waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..transport.identity import PeerId
from . import defaults


class SwarmView:
    """Rounds by peer, ourselves (``me``) among them."""

    def __init__(self, me: PeerId) -> None:
        self.me = me
        self._rounds: dict[PeerId, int] = {me: 0}

    @property
    def rounds(self) -> Mapping[PeerId, int]:
        """The last round of everybody we heard of, gone or not."""
        return self._rounds

    def hear(self, peer: PeerId, round: int) -> None:
        """Somebody says that ``peer`` has done ``round``. When there is no room, whoever is furthest behind goes."""
        if round <= self._rounds.get(peer, -1):
            return
        if peer not in self._rounds and len(self._rounds) >= defaults.MAX_VIEW:
            last = min((other for other in self._rounds if other != self.me), key=lambda other: self._rounds[other])
            if self._rounds[last] >= round:
                return
            del self._rounds[last]
        self._rounds[peer] = round

    def members(self, round: int) -> tuple[PeerId, ...]:
        """Ourselves and everybody who is not gone, as of our ``round``, in order."""
        # Counted from our own round: a single peer that says it is far ahead must not empty the view.
        fresh = round - defaults.VIEW_ROUNDS
        return tuple(sorted(peer for peer, heard in self._rounds.items() if heard >= fresh or peer == self.me))
