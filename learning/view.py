"""What one peer knows of who is in a gossip swarm: the round in which each was last heard, and when; sans-IO.

A peer is a member while news of it come in: its round rises, or rose lately. Rounds alone would not do (a swarm of
fast rounds is ahead of its own gossip), nor would time (a round may take an hour). Who was lost stays lost until
somebody has heard it in a later round: otherwise the others, who have not noticed yet, would bring it back for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ..transport.identity import PeerId
from . import defaults


class SwarmView:
    """Times are seconds on the host's monotonic clock."""

    def __init__(self, me: PeerId) -> None:
        self.me = me
        self._rounds: dict[PeerId, int] = {me: 0}
        self._news: dict[PeerId, float] = {me: math.inf}
        #: The round up to which a lost peer is not believed to be here.
        self._lost: dict[PeerId, int] = {}

    @property
    def rounds(self) -> Mapping[PeerId, int]:
        """The last round of everybody we heard of, lost or not."""
        return self._rounds

    def hear(self, peer: PeerId, round: int, now: float) -> None:
        """Somebody says that ``peer`` has done ``round``. When there is no room, whoever was silent longest goes."""
        if round <= self._rounds.get(peer, -1):
            return
        if peer not in self._rounds and len(self._rounds) >= defaults.MAX_VIEW:
            oldest = min(self._rounds, key=lambda p: (p not in self._lost, self._news[p]))
            if oldest not in self._lost and now - self._news[oldest] < defaults.VIEW_SECONDS:
                return
            self._forget(oldest)
        self._rounds[peer] = round
        if peer != self.me:
            self._news[peer] = now

    def welcome(self, peer: PeerId, round: int, now: float) -> None:
        """``peer`` itself says that it is here."""
        self._lost.pop(peer, None)
        self.hear(peer, round, now)
        if peer in self._news and peer != self.me:
            self._news[peer] = now

    def lose(self, peers: Iterable[PeerId], round: int) -> None:
        """``peers`` were missing in ``round``, or left: not members until heard of in a later one."""
        for peer in peers:
            if peer in self._rounds and peer != self.me:
                self._lost[peer] = max(round, self._rounds[peer])

    def is_member(self, peer: PeerId, round: int, now: float) -> bool:
        """See :meth:`members`."""
        heard = self._rounds.get(peer, -1)
        if peer == self.me:
            return True
        if heard < 0 or heard <= self._lost.get(peer, -1):
            return False
        # Counted from our own round: a single peer that says it is far ahead must not empty the view.
        return heard >= round - defaults.VIEW_ROUNDS or now - self._news[peer] < defaults.VIEW_SECONDS

    def members(self, round: int, now: float) -> tuple[PeerId, ...]:
        """Ourselves and everybody of whom there is news, as of our ``round``, in order."""
        return tuple(sorted(peer for peer in self._rounds if self.is_member(peer, round, now)))

    def _forget(self, peer: PeerId) -> None:
        del self._rounds[peer], self._news[peer]
        self._lost.pop(peer, None)
