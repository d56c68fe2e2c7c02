"""How much each author may add: token buckets for envelopes and for bytes, told the time; sans-IO."""

from __future__ import annotations

from ...transport.identity import PeerId
from ...transport.throttle import TokenBucket
from . import defaults


class Rates:
    """A pair of buckets per author who wrote lately. Only authentic envelopes draw from them."""

    def __init__(self) -> None:
        self._buckets: dict[PeerId, tuple[TokenBucket, TokenBucket]] = {}  # who wrote last stands last

    def allow(self, author: PeerId, size: int, now: float, *, always: bool = False) -> tuple[bool, str]:
        """May ``author`` add an envelope with an update of ``size`` bytes now? Returns (decision, reason).

        ``always``: it is ourselves; what we add counts, but is not refused.
        """
        pair = self._buckets.pop(author, None)
        if pair is None:
            pair = (
                TokenBucket(defaults.AUTHOR_RATE, defaults.AUTHOR_BURST, now),
                TokenBucket(defaults.AUTHOR_BYTE_RATE, defaults.AUTHOR_BYTE_BURST, now),
            )
            if len(self._buckets) >= defaults.MAX_AUTHORS:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[author] = pair
        count, size_bucket = pair
        if not count.holds(now) and not always:
            return False, f"{author.short} writes more than {count.rate:g} envelopes per second"
        size_bucket.holds(now)
        if size_bucket.tokens < size and not always:
            return False, f"{author.short} writes more than {size_bucket.rate:g} bytes per second"
        count.tokens = max(0.0, count.tokens - 1)
        size_bucket.tokens = max(0.0, size_bucket.tokens - size)
        return True, ""
