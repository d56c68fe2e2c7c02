"""How many requests a peer may send us: token buckets, sans-IO."""

from __future__ import annotations

from ...transport.identity import PeerId
from ...transport.throttle import TokenBucket
from . import defaults


class RequestLimits:
    """Peers of the routing table have a generous bucket each; strangers a small one each and one in common.

    Keys cost nothing, so without the common bucket a flood would only need many of them; with it the flood
    does not touch the peers we know.
    """

    def __init__(self, now: float) -> None:
        self._friends: dict[PeerId, TokenBucket] = {}
        self._strangers: dict[PeerId, TokenBucket] = {}
        self._all_strangers = TokenBucket(defaults.STRANGERS_RATE, defaults.STRANGERS_BURST, now)

    def allow(self, peer: PeerId, friend: bool, now: float) -> tuple[bool, str]:
        """May ``peer`` be served now? Returns (decision, reason)."""
        buckets = self._friends if friend else self._strangers
        bucket = buckets.pop(peer, None)
        if bucket is None:
            if friend:
                bucket = TokenBucket(defaults.FRIEND_RATE, defaults.FRIEND_BURST, now)
            else:
                bucket = TokenBucket(defaults.STRANGER_RATE, defaults.STRANGER_BURST, now)
        buckets[peer] = bucket  # most recently used last
        if len(buckets) > defaults.MAX_STRANGERS:
            del buckets[next(iter(buckets))]
        if not bucket.take(now):
            return False, f"more than {bucket.rate:.0f} requests per second"
        if not friend and not self._all_strangers.take(now):
            return False, "too many requests from peers we do not know"
        return True, "within limits"
