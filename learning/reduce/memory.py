"""Memory of rounds, used again by later rounds as soon as nobody looks at it any more.

To touch memory for the first time costs more than to send it: the kernel clears every page. A reduce of 64 MiB needs
as much again and more, every round. Nobody gives a buffer back: who holds a tensor of it, or a view of one, keeps it,
and CPython's count of references tells when the last one is gone.
"""

from __future__ import annotations

import sys
import threading

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import defaults


@attrs.define(eq=False)
class _Base:
    array: NDArray[np.float32]
    #: The last round that it was taken in.
    round: int


class RoundMemory:
    """Hands out fp32 vectors of any content. Keeps what two rounds in a row made use of, but never adds to it as long
    as something else is free to be given up instead. Passes over numbers in threads may ask too.

    Sizes differ from round to round, and others choose some of them: what does not fit any more must not pile up.
    """

    def __init__(self) -> None:
        self._bases: list[_Base] = []
        self._round = 0
        # Between a look at what is free and a view of it nobody else may look: both would get it.
        self._lock = threading.Lock()

    def take(self, elements: int) -> Tensor:
        """A 1-D float32 CPU tensor of ``elements``, uninitialised: yours as long as you hold it or a view of it."""
        if elements < defaults.SMALL_BUFFER:
            return torch.from_numpy(np.empty(elements, dtype=np.float32))
        with self._lock:
            best = -1
            for index in range(len(self._bases)):
                size = self._bases[index].array.size
                # Twice as much as needed would be wasted for long; the smallest that fits leaves the others for others.
                smaller = best < 0 or size < self._bases[best].array.size
                if elements <= size <= 2 * elements and smaller and self._free(index):
                    best = index
            if best < 0:
                self._trade(elements)
                # numpy asks the kernel for huge pages, torch does not: 32 MiB take 3 ms to touch instead of 17.
                self._bases.append(_Base(np.empty(elements, dtype=np.float32), self._round))
            self._bases[best].round = self._round
            return torch.from_numpy(self._bases[best].array[:elements])

    def next_round(self) -> None:
        """A round is over: what neither it nor the one before took is given up (or goes with its last view)."""
        with self._lock:
            self._bases = [base for base in self._bases if base.round >= self._round - 1]
            self._round += 1

    def release(self) -> None:
        """Give what nobody looks at back to the system, and forget the rest: it goes with its last view."""
        with self._lock:
            self._bases.clear()

    @property
    def held(self) -> int:
        """Bytes in use and kept."""
        return sum(base.array.nbytes for base in self._bases)

    def _trade(self, elements: int) -> None:
        """Give up as much as is asked for anew of what this round has not taken: slices of other sizes, of a plan that
        is past. To keep it as well would add one round's sizes to those of the next."""
        for index in sorted(range(len(self._bases)), key=lambda index: self._bases[index].round):
            if elements <= 0 or self._bases[index].round == self._round:
                break
            if self._free(index):
                elements -= self._bases[index].array.size
                self._bases[index].array = _NONE
        self._bases = [base for base in self._bases if base.array is not _NONE]

    def _free(self, index: int) -> bool:
        return sys.getrefcount(self._bases[index].array) == _ALONE


#: In place of memory that was given up.
_NONE = np.empty(0, dtype=np.float32)


def _references_of_a_base_alone() -> int:
    bases = [_Base(np.empty(0, dtype=np.float32), 0)]
    return sys.getrefcount(bases[0].array)


#: What CPython counts for an array that only its base holds (the call counts too, in a way that differs by version).
_ALONE = _references_of_a_base_alone()
