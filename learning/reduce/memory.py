"""Memory of rounds, used again by later rounds as soon as nobody looks at it any more.

To touch memory for the first time costs more than to send it: the kernel clears every page. A reduce of 64 MiB needs
as much again and more, every round. Nobody gives a buffer back: who holds a tensor of it, or a view of one, keeps it,
and CPython's count of references tells when the last one is gone.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import defaults


class RoundMemory:
    """Hands out fp32 vectors of any content. For one thread; keeps what it gave, until :meth:`release`."""

    def __init__(self) -> None:
        self._bases: list[NDArray[np.float32]] = []

    def take(self, elements: int) -> Tensor:
        """A 1-D float32 CPU tensor of ``elements``, uninitialised: yours as long as you hold it or a view of it."""
        if elements < defaults.SMALL_BUFFER:
            return torch.from_numpy(np.empty(elements, dtype=np.float32))
        best = -1
        for index in range(len(self._bases)):
            size = self._bases[index].size
            # Twice as much as needed would be wasted for long; the smallest that fits leaves the others for others.
            if elements <= size <= 2 * elements and self._free(index) and (best < 0 or size < self._bases[best].size):
                best = index
        if best < 0:
            # numpy asks the kernel for huge pages, torch does not: 32 MiB take 3 ms to touch instead of 17.
            self._bases.append(np.empty(elements, dtype=np.float32))
        return torch.from_numpy(self._bases[best][:elements])

    def release(self) -> None:
        """Give what nobody looks at back to the system, and forget the rest: it goes with its last view."""
        self._bases.clear()

    @property
    def held(self) -> int:
        """Bytes in use and kept."""
        return sum(base.nbytes for base in self._bases)

    def _free(self, index: int) -> bool:
        return sys.getrefcount(self._bases[index]) == _ALONE


def _references_of_a_list_alone() -> int:
    bases = [np.empty(0, dtype=np.float32)]
    return sys.getrefcount(bases[0])


#: What CPython counts for an array that only a list holds (the call counts too, in a way that differs by version).
_ALONE = _references_of_a_list_alone()
