"""What one peer holds during a round: its own vector, the parts it was sent, the slices that were combined.

All vectors are fp32, 1-D, on the CPU. Inputs are kept until the round commits, so that a lost owner or leader costs
only what it alone held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...transport.identity import PeerId
from .. import exact


class Buffers:
    """Contributions by (contributor, start, stop), and one result vector per generation (attempt, epoch)."""

    def __init__(self, max_length: int) -> None:
        self.own: Tensor | None = None
        self.result: Tensor | None = None
        self.generation: tuple[int, int] | None = None
        self.filled: dict[int, None] = {}
        self.parts: dict[tuple[PeerId, int, int], Tensor] = {}
        self._early: dict[tuple[int, int, int], tuple[int, int, Tensor]] = {}
        self._max_length = max_length
        self._taken: dict[PeerId, int] = {}
        self._early_size = 0

    def room_for(self, contributor: PeerId, start: int, stop: int) -> Tensor | None:
        """Memory for a part, or None when the range is absurd or this contributor has sent too much already."""
        if not 0 <= start < stop <= self._max_length:
            return None
        # Slices are re-cut at most as often as owners are lost; twice the vector is far beyond an honest peer.
        if self._taken.get(contributor, 0) + (stop - start) > 2 * self._max_length:
            return None
        self._taken[contributor] = self._taken.get(contributor, 0) + (stop - start)
        return torch.empty(stop - start, dtype=torch.float32)

    def keep(self, contributor: PeerId, start: int, stop: int, part: Tensor) -> None:
        self.parts[contributor, start, stop] = part

    def keep_own(self, me: PeerId, start: int, stop: int) -> None:
        """Our own part of a slice we own: a view, not a copy."""
        assert self.own is not None
        self.parts[me, start, stop] = self.own[start:stop]

    def open(self, generation: tuple[int, int], length: int) -> None:
        """Begin to collect the result of a new generation; the older one is given up."""
        self.generation, self.filled = generation, {}
        self.result = torch.empty(length, dtype=torch.float32)

    def combine(self, members: Sequence[PeerId], weights: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        """Write the weighted mean of exactly ``members``, in this order, into the result. Blocking."""
        result = self.result
        assert result is not None
        for start, stop in ranges:
            if members:
                parts = [self.parts[member, start, stop] for member in members]
                exact.weighted_mean(parts, [float(weight) for weight in weights], out=result[start:stop])
            else:
                result[start:stop].zero_()

    def room_early(self, start: int, stop: int) -> Tensor | None:
        """Memory for a combined slice that came before its plan, bounded."""
        size = stop - start
        if not 0 <= start < stop <= self._max_length or self._early_size + size > 2 * self._max_length:
            return None
        self._early_size += size
        return torch.empty(size, dtype=torch.float32)

    def keep_early(self, attempt: int, epoch: int, index: int, start: int, part: Tensor) -> None:
        self._early[attempt, epoch, index] = (start, start + part.numel(), part)

    def take_early(self, valid: Callable[[int, int, int], bool]) -> None:
        """Move early slices of the present generation, with (index, start, stop) ``valid``, into the result."""
        assert self.result is not None and self.generation is not None
        for (attempt, epoch, index), (start, stop, part) in list(self._early.items()):
            if (attempt, epoch) <= self.generation:
                del self._early[attempt, epoch, index]
                self._early_size -= stop - start
                if (attempt, epoch) == self.generation and valid(index, start, stop):
                    self.result[start:stop] = part
                    self.filled[index] = None

    def drop_inputs(self) -> None:
        """The round is over: contributions are no longer needed, the result still is (for those who were late)."""
        self.parts.clear()
        self._early.clear()
        self.own = None
