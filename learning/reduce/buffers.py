"""What one peer holds during a round: its own vector, the parts it was sent, the slices that were combined.

All vectors are fp32, 1-D, on the CPU. Inputs are kept until the round commits, so that a lost owner or leader costs
only what it alone held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...transport.identity import PeerId
from .. import exact
from .memory import RoundMemory
from .slices import Slice

#: Parts of slices that one contributor may send in a round: a slice is re-cut only when owners are lost.
MAX_PIECES = 4096


class Buffers:
    """Contributions by (contributor, start, stop), and one result vector per generation (attempt, epoch)."""

    def __init__(self, max_length: int, memory: RoundMemory | None = None) -> None:
        self._memory = memory or RoundMemory()
        self.own: Tensor | None = None
        self.result: Tensor | None = None
        self.generation: tuple[int, int] | None = None
        self.filled: dict[int, None] = {}
        self.parts: dict[tuple[PeerId, int, int], Tensor] = {}
        self._early: dict[tuple[int, int, int, PeerId], tuple[Slice, Tensor]] = {}
        self._max_length = max_length
        self._taken: dict[PeerId, int] = {}
        self._pieces: dict[PeerId, int] = {}
        self._early_size: dict[PeerId, int] = {}

    def room_for(self, contributor: PeerId, start: int, stop: int) -> Tensor | None:
        """Memory for a part, or None when the range is absurd or this contributor has sent too much already."""
        if not 0 <= start < stop <= self._max_length:
            return None
        # Slices are re-cut at most as often as owners are lost; twice the vector is far beyond an honest peer.
        if self._taken.get(contributor, 0) + (stop - start) > 2 * self._max_length:
            return None
        if self._pieces.get(contributor, 0) >= MAX_PIECES:
            return None
        self._pieces[contributor] = self._pieces.get(contributor, 0) + 1
        self._taken[contributor] = self._taken.get(contributor, 0) + (stop - start)
        return self._memory.take(stop - start)

    def room(self, elements: int) -> Tensor:
        """Memory for so many."""
        return self._memory.take(elements)

    def keep(self, contributor: PeerId, start: int, stop: int, part: Tensor) -> None:
        self.parts[contributor, start, stop] = part

    def keep_own(self, me: PeerId, start: int, stop: int) -> None:
        """Our own part of a slice we own: a view, not a copy."""
        assert self.own is not None
        self.parts[me, start, stop] = self.own[start:stop]

    def open(self, generation: tuple[int, int], length: int) -> None:
        """Begin to collect the result of a new generation; the older one is given up."""
        self.generation, self.filled = generation, {}
        self.result = None  # where it is the memory of an older generation, it may be used again
        self.result = self._memory.take(length)

    def combination(
        self, members: Sequence[PeerId], weights: Sequence[int], ranges: Sequence[tuple[int, int]]
    ) -> Callable[[], None]:
        """What writes the weighted mean of exactly ``members``, in this order, into the present result. Blocking.

        It holds what it needs: the round may end while it runs in a thread.
        """
        result = self.result
        assert result is not None
        factors = [float(weight) for weight in weights]
        work = [([self.parts[member, start, stop] for member in members], result[start:stop]) for start, stop in ranges]

        def combine() -> None:
            for parts, out in work:
                if parts:
                    exact.weighted_mean(parts, factors, out=out)
                else:
                    out.zero_()

        return combine

    def room_early(self, sender: PeerId, start: int, stop: int) -> Tensor | None:
        """Memory for a combined slice that came before its plan, bounded for each sender."""
        size, taken = stop - start, self._early_size.get(sender, 0)
        if not 0 <= start < stop <= self._max_length or taken + size > 2 * self._max_length:
            return None
        self._early_size[sender] = taken + size
        return self._memory.take(size)

    def keep_early(self, attempt: int, epoch: int, index: int, piece: Slice, part: Tensor) -> None:
        """Keep what ``piece.owner`` sent as combined slice ``index`` of a generation that is not open here yet."""
        self._early[attempt, epoch, index, piece.owner] = (piece, part)

    def take_early(self, valid: Callable[[int, Slice], bool]) -> None:
        """Move early slices of the present generation that are ``valid`` and not there yet into the result."""
        assert self.result is not None and self.generation is not None
        for key, (piece, part) in list(self._early.items()):
            generation, index = key[:2], key[2]
            if generation > self.generation:
                continue
            del self._early[key]
            if generation == self.generation and index not in self.filled and valid(index, piece):
                self.result[piece.start : piece.stop] = part
                self.filled[index] = None

    def drop(self) -> None:
        """Nothing of the round is needed any more."""
        self.drop_inputs()
        self.result, self.generation = None, None
        self.filled.clear()

    def drop_inputs(self) -> None:
        """The round is over: contributions are no longer needed, the result still is (for those who were late)."""
        self.parts.clear()
        self._early.clear()
        self.own = None
