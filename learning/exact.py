"""Replicated arithmetic: what all members compute alike, bit for bit, on unlike machines.

Outer steps and the combination of contributions run here. The rules that make the bits agree:

* float32 on the CPU, one IEEE operation per kernel: a product is rounded before it is added, there is no fused
  multiply-add, no ``alpha=``, no ``foreach`` form, no reduction whose order a library may choose;
* a canonical order: the caller passes contributions in PeerId order and they are added in that order;
* one setting of flush-to-zero on every thread. The processor holds it per thread, so each function here sets it on the
  thread that it runs on. (x86 and ARM differ in one case: results that round up to the smallest normal number, 1e-38.)

``reduce/kernels.py`` and numpy carry the loops, not torch: they run on the calling thread alone, while torch may hand
parts to OpenMP threads whose flush-to-zero nobody set. The tensors are viewed, never copied.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..transport.errors import ProtocolMisuse
from .reduce import kernels

_thread = threading.local()


def prepare_torch(threads: int = 1) -> None:
    """Set torch up on the calling thread: ``threads`` threads within an operation, denormals flushed to zero.

    Call once at the start of a process and on each thread of one's own; functions of this module and the worker's
    slices see to flush-to-zero themselves.
    """
    torch.set_num_threads(threads)
    flush_denormals()


def flush_denormals() -> None:
    """Flush denormals to zero on the calling thread. After the first call on a thread it costs nothing."""
    if not getattr(_thread, "flushed", False):
        torch.set_flush_denormal(True)
        _thread.flushed = True


def factors(weights: Sequence[float]) -> list[float]:
    """``c_i = float32(w_i / sum w)``; ``weights``: finite numbers, none negative, not all zero."""
    total = math.fsum(weights)
    if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
        raise ProtocolMisuse(
            f"the weights {list(weights)} have no mean: they must be finite, not negative, not all zero"
        )
    return [float(np.float32(weight / total)) for weight in weights]


def weighted_mean(contributions: Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """``sum_i c_i x_i`` with ``c_i = float32(w_i / sum w)``, products and sums rounded to float32, in the given order.

    ``contributions``: at least one 1-D float32 CPU tensor of shape ``(n,)``; ``weights``: as many finite numbers, none
    negative, not all zero. Writes to ``out`` (which may be one of the contributions only if it is the first) or a new
    tensor. Works in chunks that stay in cache; the chunks do not change the bits, so neither does slicing the vectors.
    """
    if not contributions or len(contributions) != len(weights):
        raise ProtocolMisuse(f"{len(contributions)} contributions with {len(weights)} weights have no mean")
    shares = factors(weights)
    arrays = [array_of(tensor) for tensor in contributions]
    if out is None:
        out = torch.empty(arrays[0].shape[0], dtype=torch.float32)
    result = array_of(out)
    if any(array.shape != result.shape for array in arrays):
        raise ProtocolMisuse(f"contributions of unlike sizes: {[len(array) for array in arrays]}, result {len(result)}")
    flush_denormals()
    kernels.active.mean(tuple(arrays), np.array(shares, dtype=np.float32), result)
    return out


def add_(target: Tensor, other: Tensor) -> Tensor:
    """``target += other``, in place; returns ``target``."""
    left, right = _pair(target, other)
    with np.errstate(all="ignore"):
        np.add(left, right, out=left)
    return target


def sub_(target: Tensor, other: Tensor) -> Tensor:
    """``target -= other``, in place; returns ``target``."""
    left, right = _pair(target, other)
    with np.errstate(all="ignore"):
        np.subtract(left, right, out=left)
    return target


def add(left: Tensor, right: Tensor) -> Tensor:
    """``left + right`` as a new tensor."""
    return add_(left.clone(), right)


def sub(left: Tensor, right: Tensor) -> Tensor:
    """``left - right`` as a new tensor."""
    return sub_(left.clone(), right)


def scale_(target: Tensor, factor: float) -> Tensor:
    """``target *= float32(factor)``, in place; returns ``target``."""
    array = array_of(target)
    flush_denormals()
    with np.errstate(all="ignore"):
        np.multiply(array, np.float32(factor), out=array)
    return target


def scale(source: Tensor, factor: float) -> Tensor:
    """``source * float32(factor)`` as a new tensor."""
    return scale_(source.clone(), factor)


def check_finite(vector: Tensor, name_at: Callable[[int], str] | None = None, first_index: int = 0) -> str | None:
    """None when every value is finite, else a phrase naming the first that is not and how many there are.

    ``vector``: 1-D float32 on the CPU. ``name_at`` turns an index into the name of a parameter (``Layout.name_at``).
    ``first_index``: that of the first value, for a vector that is part of a longer one.
    """
    array = array_of(vector)
    if kernels.active.finite(array):
        return None
    wrong = np.flatnonzero(~np.isfinite(array))
    first = int(wrong[0])
    index = first_index + first
    where = f"at {index}" if name_at is None else f"at {index} ({name_at(index)})"
    what = "NaN" if np.isnan(array[first]) else "infinity"
    return f"{what} {where}; {len(wrong)} of {len(array)} values are not finite"


def array_of(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's memory as an array; refuses what is no contiguous 1-D float32 CPU tensor."""
    if tensor.dtype != torch.float32 or tensor.dim() != 1 or not tensor.is_cpu or not tensor.is_contiguous():
        raise ProtocolMisuse(
            f"arithmetic and codecs take contiguous 1-D float32 CPU tensors, got {tuple(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}"
        )
    array: NDArray[np.float32] = tensor.detach().numpy()
    return array


def _pair(left: Tensor, right: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    one, two = array_of(left), array_of(right)
    if one.shape != two.shape:
        raise ProtocolMisuse(f"vectors of unlike sizes: {len(one)} and {len(two)}")
    flush_denormals()
    return one, two
