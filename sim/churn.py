"""How long nodes stay: session times as they were measured in real swarms."""

from __future__ import annotations

import math
import random

from . import defaults


class Sessions:
    """Session times of ``mean`` seconds from a Weibull distribution of the given ``shape``.

    Stutzbach & Rejaie 2006, "Understanding Churn in Peer-to-Peer Networks", section 4: sessions in Gnutella, Kad and
    BitTorrent are neither exponential nor heavy-tailed; Weibull fits, with shapes of 0.34, 0.38 and 0.59 for three
    BitTorrent swarms. A shape below 1 means many short visits and few that last: most of those present will stay.
    """

    def __init__(self, mean: float, rng: random.Random, *, shape: float = defaults.SESSION_SHAPE) -> None:
        self.mean, self.shape, self._rng = mean, shape, rng
        self.scale = mean / math.gamma(1 + 1 / shape)

    def length(self) -> float:
        """Seconds that a node which arrives now will stay."""
        return self._rng.weibullvariate(self.scale, self.shape)

    def rest(self) -> float:
        """Seconds that a node which is found present will still stay, in a swarm that has long been as it is.

        Long sessions are met in proportion to their length (X = scale · G^(1/shape) with G from a gamma distribution of
        order 1 + 1/shape), and at a uniform moment within.
        """
        whole: float = self.scale * self._rng.gammavariate(1 + 1 / self.shape, 1.0) ** (1 / self.shape)
        return whole * self._rng.random()
