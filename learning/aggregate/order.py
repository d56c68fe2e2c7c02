"""Sorting the columns of a few rows by a network of compare-and-swaps, the same for every column."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import exact
from ..reduce import kernels


def middle(rows: Sequence[Tensor], wanted: range, kind: int, f: int, parts: int, out: Tensor) -> bool:
    """``kernels.middle`` over ``rows``: ``wanted`` are the places, in order, that it looks at; it adds up ``parts`` of
    them with the factor 1/parts. Whether all values are finite."""
    arrays = tuple(exact.array_of(row) for row in rows)
    exact.flush_denormals()
    return kernels.active.middle(arrays, network(len(rows), wanted), kind, f, 1.0 / parts, exact.array_of(out))


@functools.lru_cache(maxsize=256)
def network(n: int, wanted: range) -> NDArray[np.uint16]:
    """Pairs (i, j), i < j: swap so that row i holds the smaller. Then the rows ``wanted`` stand where sorting puts
    them.

    Batcher's merge exchange (Knuth 5.2.2, Algorithm M), which takes any n; less what the wanted rows do not depend on.
    Returns (pairs, 2).
    """
    pairs = []
    p = top = 1 << max(0, (n - 1).bit_length() - 1)
    while p > 0 and n > 1:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(n - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    needed, kept = set(wanted), []
    for i, j in reversed(pairs):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return np.array(kept[::-1], dtype=np.uint16).reshape(-1, 2)
