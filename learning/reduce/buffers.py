"""What one peer holds during a round: its own vector, the parts it was sent, the slices that were combined.

All vectors are fp32, 1-D, on the CPU; what is coded is bytes. Inputs are kept until the round commits, so that a lost
owner or leader costs only what it alone held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
from torch import Tensor

from ...transport.identity import PeerId
from .. import exact
from ..aggregate.aggregator import Aggregator, Decision
from ..aggregate.base import Floats
from ..state import bytes_view
from .codecs import FP32, Codec, combine, resolve
from .coding import PLAIN, Coding
from .memory import RoundMemory
from .robust import Given, combine_by, fits, products_of
from .slices import Slice

#: Parts of slices that one contributor may send in a round: a slice is re-cut only when owners are lost.
MAX_PIECES = 4096


@attrs.frozen(eq=False)
class Part:
    """``data`` holds some elements in the code of ``codec``: of fp32 the ``vector`` itself."""

    codec: Codec
    data: memoryview
    vector: Tensor | None = None

    @property
    def given(self) -> Given:
        return (self.codec, self.data) if self.vector is None else self.vector


class Buffers:
    """Contributions by (contributor, start, stop, codec), and one result vector per generation (attempt, epoch)."""

    def __init__(self, max_length: int, memory: RoundMemory | None = None) -> None:
        self._memory = memory or RoundMemory()
        self.own: Tensor | None = None
        #: How our own contribution travels.
        self.coding: Coding = PLAIN
        self.result: Tensor | None = None
        self.generation: tuple[int, int] | None = None
        self.filled: dict[int, None] = {}
        #: Combined slices of ours in their code, by index, where that is not the result itself.
        self.coded: dict[int, Part] = {}
        self.parts: dict[tuple[PeerId, int, int, str], Part] = {}
        self._early: dict[tuple[int, int, int, PeerId], tuple[Slice, Part]] = {}
        self._max_length = max_length
        self._taken: dict[PeerId, int] = {}
        self._pieces: dict[PeerId, int] = {}
        self._early_size: dict[PeerId, int] = {}
        self._early_pieces: dict[PeerId, int] = {}

    def room_for(self, contributor: PeerId, start: int, stop: int, codec: Codec = FP32) -> Part | None:
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
        return self.part(stop - start, codec)

    def room(self, elements: int) -> Tensor:
        """Memory for so many."""
        return self._memory.take(elements)

    def part(self, elements: int, codec: Codec) -> Part:
        """Memory for the code of so many."""
        if codec is FP32:
            vector = self._memory.take(elements)
            return Part(codec, bytes_view(vector), vector)
        size = codec.wire_size(elements)
        return Part(codec, bytes_view(self._memory.take(-(-size // 4)))[:size])

    def keep(self, contributor: PeerId, start: int, stop: int, part: Part) -> None:
        self.parts[contributor, start, stop, part.codec.name] = part

    def own_part(self, start: int, stop: int) -> Part:
        """Elements of our own contribution in their code. Of fp32 a view, not a copy. Blocking where it is coded."""
        assert self.own is not None
        piece = self.own[start:stop]
        if self.coding.plain:
            return Part(FP32, bytes_view(piece), piece)
        part = self.part(stop - start, self.coding.codec)
        self.coding.encode(piece, start, part.data)
        return part

    def passed_on(self, piece: Slice, index: int) -> Part | None:
        """Combined slice ``index`` as somebody else combined it, in fp32, once it is here."""
        if self.result is None or index not in self.filled:
            return None
        vector = self.result[piece.start : piece.stop]
        return Part(FP32, bytes_view(vector), vector)

    def open(self, generation: tuple[int, int], length: int) -> None:
        """Begin to collect the result of a new generation; the older one is given up."""
        self.generation, self.filled, self.coded = generation, {}, {}
        self.result = None  # where it is the memory of an older generation, it may be used again
        self.result = self._memory.take(length)

    def combination(
        self,
        members: Sequence[PeerId],
        weights: Sequence[int],
        ranges: Sequence[tuple[int, int]],
        codec: Codec = FP32,
        rule: Aggregator | None = None,
        decision: Decision | None = None,
    ) -> Callable[[], list[Part]]:
        """What writes the weighted mean of exactly ``members``, in this order, into the present result. Blocking.

        Or what ``rule`` makes of them, with what was decided for it.

        Returns each range in the code of ``codec``; the result then holds what that decodes to, as it does everywhere.
        It holds what it needs: the round may end while it runs in a thread.
        """
        result = self.result
        assert result is not None
        factors = [float(weight) for weight in weights]
        work = [
            (
                [self.parts[member, start, stop, codec.name] for member in members],
                result[start:stop],
                Part(codec, memoryview(b"")) if codec is FP32 else self.part(stop - start, codec),
            )
            for start, stop in ranges
        ]

        def compute() -> list[Part]:
            coded = []
            for parts, out, part in work:
                if not parts:
                    out.zero_()
                elif rule is not None and not rule.is_mean:
                    combine_by(rule, [part.given for part in parts], decision, factors, out)
                elif codec is FP32:
                    exact.weighted_mean([part.vector for part in parts if part.vector is not None], factors, out=out)
                else:
                    combine([(part.codec, part.data) for part in parts], factors, out)
                if codec is FP32:
                    part = Part(codec, bytes_view(out), out)
                else:
                    codec.encode(out, part.data)
                    codec.decode(part.data, out)
                coded.append(part)
            return coded

        return compute

    def products(
        self, members: Sequence[PeerId], ranges: Sequence[tuple[int, int]], codec: Codec = FP32
    ) -> Callable[[], Floats]:
        """What computes the inner products of ``members``, in this order, over ``ranges``. Blocking; holds what it
        needs."""
        slices = [
            ([self.parts[member, start, stop, codec.name].given for member in members], stop - start)
            for start, stop in ranges
        ]
        return lambda: products_of(slices)

    def fit(
        self, trial: Sequence[PeerId], ranges: Sequence[tuple[int, int]], codec: Codec = FP32
    ) -> Callable[[], tuple[PeerId, ...]]:
        """What finds those of ``trial`` whose work over ``ranges`` goes where the present result goes. Blocking; holds
        what it needs."""
        result = self.result
        assert result is not None
        work = {
            peer: [(self.parts[peer, start, stop, codec.name].given, result[start:stop]) for start, stop in ranges]
            for peer in trial
        }
        return lambda: tuple(peer for peer, slices in work.items() if fits(slices))

    def room_early(self, sender: PeerId, start: int, stop: int, codec: Codec = FP32) -> Part | None:
        """Memory for a combined slice that came before its plan, bounded for each sender."""
        size, taken = stop - start, self._early_size.get(sender, 0)
        if not 0 <= start < stop <= self._max_length or taken + size > 2 * self._max_length:
            return None
        pieces = self._early_pieces[sender] = self._early_pieces.get(sender, 0) + 1
        if pieces > MAX_PIECES:
            return None
        self._early_size[sender] = taken + size
        return self.part(size, codec)

    def keep_early(self, attempt: int, epoch: int, index: int, piece: Slice, part: Part) -> None:
        """Keep what ``piece.owner`` sent as combined slice ``index`` of a generation that is not open here yet."""
        self._early[attempt, epoch, index, piece.owner] = (piece, part)

    def take_early(self, slices: Sequence[Slice], codec: str, source: Callable[[int], PeerId | None]) -> None:
        """Move early slices of the present generation that are the plan's and not there yet into the result.

        ``source``: who sends us slice number so and so.
        """
        assert self.result is not None and self.generation is not None
        for key, (piece, part) in list(self._early.items()):
            generation, index = key[:2], key[2]
            if generation > self.generation:
                continue
            del self._early[key]
            valid = 0 <= index < len(slices) and slices[index].range == piece.range and source(index) == piece.owner
            valid = valid and part.codec.name == codec
            if generation == self.generation and index not in self.filled and valid:
                resolve(codec).decode(part.data, self.result[piece.start : piece.stop])
                self.filled[index] = None

    def drop(self) -> None:
        """Nothing of the round is needed any more."""
        self.drop_inputs()
        self.result, self.generation = None, None
        self.filled.clear()

    def drop_inputs(self) -> None:
        """The round is over: contributions are no longer needed, the result still is (for those who were late)."""
        self.parts.clear()
        self.coded.clear()
        self._early.clear()
        self.own = None
