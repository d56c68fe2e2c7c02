"""The numbers that are reduced: known to everybody, different for every rank and run, exact in float32."""

from __future__ import annotations

import hashlib

# Nothing of Shoal: peers that are measured beside it run in environments of their own.
import numpy as np
import torch
from torch import Tensor

#: Elements that are checked at once: two passes in cache.
_CHUNK = 1 << 18


def base(rank: int, elements: int) -> Tensor:
    """Whole numbers from -128 to 127 as float32, shape ``(elements,)``."""
    drawn = np.random.default_rng(rank).integers(-128, 128, elements, dtype=np.int8)
    return torch.from_numpy(drawn.astype(np.float32))


def mean_base(count: int, elements: int) -> Tensor:
    """The mean of all ``count`` bases. Run ``r`` adds ``r`` to every base, hence to the mean."""
    total = base(0, elements)
    for rank in range(1, count):
        total += base(rank, elements)
    return total / count


def wrong(result: Tensor, mean: Tensor, run: int, tolerance: float = 1e-4) -> str | None:
    """None when ``result`` is the mean of this run, up to ``tolerance``: float32's rounding; else what is wrong."""
    if result.shape != mean.shape:
        return f"a result of shape {tuple(result.shape)}"
    for start in range(0, len(mean), _CHUNK):
        difference = float((result[start : start + _CHUNK] - mean[start : start + _CHUNK] - run).abs().max())
        if not difference < tolerance:
            return f"values from {start} on are off by {difference}"
    return None


def digest(result: Tensor) -> str:
    return hashlib.sha256(result.numpy()).hexdigest()
