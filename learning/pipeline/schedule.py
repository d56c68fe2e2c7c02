"""1F1B at one replica of one stage: what to compute next, without any IO or time.

PipeDream-flush (Narayanan et al., 2021, arXiv 2006.09503; also "1F1B" of Megatron-LM): a stage computes as many
forwards ahead as there are stages from it to the end, then a backward for each forward, so that activations of at most
so many micro-batches are held. Here micro-batches come in any order and may be given up, so the rule is said as one:
a backward that can be computed goes first; a forward may be computed as long as fewer than ``limit`` micro-batches are
between their forward and their backward.
"""

from __future__ import annotations

from collections import deque
from enum import Enum


class Kind(Enum):
    """Of a piece of work."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Schedule:
    """``stage`` of ``stages``, the last of which computes forward and backward in one go. ``limit``: micro-batches
    between the two at most (None: the stages from here to the end)."""

    def __init__(self, stage: int, stages: int, limit: int | None = None) -> None:
        if not 0 <= stage < stages or (limit is not None and limit < 1):
            raise ValueError(f"stage {stage} of {stages}, {limit} micro-batches at a time")
        self.last = stage == stages - 1
        self.limit = stages - stage if limit is None else limit
        self._forwards: deque[bytes] = deque()
        self._backwards: deque[bytes] = deque()
        self._flying: dict[bytes, None] = {}
        self._running: tuple[Kind, bytes] | None = None
        self._dropped = False

    def forward(self, key: bytes) -> None:
        """The input of ``key`` is here."""
        if (key not in self._flying or self._given_up(key)) and key not in self._forwards:
            self._forwards.append(key)

    def backward(self, key: bytes) -> None:
        """The gradient of ``key``'s output is here. Ignored for what was not computed forward."""
        runs = self._running is not None and self._running[1] == key
        if key in self._flying and key not in self._backwards and not runs:
            self._backwards.append(key)

    def _given_up(self, key: bytes) -> bool:
        """Whether ``key`` was dropped while it was running, which it is still."""
        return self._dropped and self._running is not None and self._running[1] == key

    def next(self) -> tuple[Kind, bytes] | None:
        """What to compute now, which is then running until :meth:`done`; None: nothing can be."""
        if self._running is not None:
            return None
        if self._backwards:
            self._running = (Kind.BACKWARD, self._backwards.popleft())
        elif self._forwards and len(self._flying) < self.limit:
            key = self._forwards.popleft()
            self._flying[key] = None
            self._running = (Kind.FORWARD, key)
        return self._running

    def done(self) -> None:
        """What :meth:`next` gave is computed."""
        if self._running is None:
            raise ValueError("nothing is running")
        kind, key = self._running
        if self._dropped or kind is Kind.BACKWARD or self.last:
            self._flying.pop(key, None)
        self._running, self._dropped = None, False

    def drop(self, key: bytes) -> None:
        """``key`` is given up: forgotten wherever it is; when it is running, once that is done."""
        for queue in (self._forwards, self._backwards):
            if key in queue:
                queue.remove(key)
        if self._running is not None and self._running[1] == key:
            self._dropped = True
        else:
            self._flying.pop(key, None)

    def in_flight(self) -> int:
        """Micro-batches between the beginning of their forward and the end of their backward."""
        return len(self._flying)

    @property
    def reason(self) -> str:
        """Why nothing can be computed, for people."""
        if self._running is not None:
            return f"computes a {self._running[0].value} pass"
        if self._forwards:
            return f"{len(self._flying)} micro-batches are further on, {len(self._forwards)} wait for them"
        return f"{len(self._flying)} micro-batches are further on" if self._flying else "no micro-batch is here"


def way(stages: int, index: int, swap: bool) -> tuple[int, ...]:
    """The stages that micro-batch ``index`` of a feeder passes, in order.

    With ``swap`` every second one passes the outer inner stages swapped (CheckFree+), so that each learns its
    neighbour's work.
    """
    order, last = list(range(stages)), stages - 2
    if swap and index % 2 and last >= 2:
        order[1], order[2] = order[2], order[1]
        if last > 3:
            order[last], order[last - 1] = order[last - 1], order[last]
    return tuple(order)
