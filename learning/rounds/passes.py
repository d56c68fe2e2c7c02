"""Passes over the numbers of a round: on the event loop when they are short, else in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...transport.host import Host
from .. import defaults

T = TypeVar("T")


class Passes:
    """Where the arithmetic of a round runs."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def run(self, elements: int, fn: Callable[..., T], *args: object) -> T:
        """``fn(*args)``, which passes over ``elements`` numbers: off the loop, unless there are few."""
        return fn(*args) if elements <= defaults.INLINE else await self._host.run_blocking(fn, *args)
