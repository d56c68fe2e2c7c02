"""Where the nodes of a virtual world stand, on which lines, and so how long messages between them take."""

from __future__ import annotations

import math
import random

from ..transport.memory_flow import Route
from . import defaults


class Places:
    """A point for each machine in the plane of a Vivaldi map, and a height above it: the delay of its own access line.

    Dabek et al. 2004 (Vivaldi, section 5.4): two dimensions and a height describe measured round trips between hosts of
    the Internet well. Points lie around a few centres, as hosts do around continents; heights are log-normal. The
    figures in ``defaults`` give a median round trip of 140 ms and 1 % beyond 300 ms, as among the DNS servers of the
    King data (Gummadi et al. 2002), whose median is 159 ms.
    """

    def __init__(self, rng: random.Random, *, loss: float = 0.0, jitter: float = 0.0) -> None:
        """``loss``: of one segment, the same everywhere; ``jitter``: up to this part of the latency on top of it."""
        self._rng, self._loss, self._jitter = rng, loss, jitter
        self._points: dict[str, tuple[float, float, float]] = {}
        self._routes: dict[int, Route] = {}
        self._centres = [(rng.random() * defaults.MAP_SIDE, rng.random() * defaults.MAP_SIDE) for _ in range(5)]

    def add(self, name: str) -> None:
        """Draw a place for machine ``name``."""
        rng = self._rng
        x, y = rng.choice(self._centres)
        spread = defaults.MAP_SPREAD
        height = rng.lognormvariate(math.log(defaults.ACCESS_DELAY), defaults.ACCESS_SIGMA)
        self._points[name] = (rng.gauss(x, spread), rng.gauss(y, spread), min(height, defaults.ACCESS_MAX))

    def uplink(self) -> float:
        """Draw the bytes per second that a machine can send: from a poor DSL line to fibre, evenly in the logarithm."""
        low, high = defaults.UPLINKS
        return math.exp(self._rng.uniform(math.log(low), math.log(high)))

    def latency(self, source: str, target: str) -> float:
        """Seconds one way."""
        a, b = self._points[source], self._points[target]
        return math.hypot(a[0] - b[0], a[1] - b[1]) + a[2] + b[2]

    def route(self, source: str, target: str) -> Route:
        """For :class:`~shoal.transport.memory.MemoryWorld`: latency in whole milliseconds: routes are shared."""
        milliseconds = max(1, round(self.latency(source, target) * 1e3))
        route = self._routes.get(milliseconds)
        if route is None:
            latency = milliseconds / 1e3
            route = self._routes[milliseconds] = Route(latency, loss=self._loss, jitter=self._jitter * latency)
        return route
