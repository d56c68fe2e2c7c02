"""The kernels with numpy alone: what runs without a compiler, and what the native ones are compared with, bit for bit.

``kernels.py`` says what each function does. Works in chunks that stay in cache. Flush-to-zero is the caller's: numpy
runs every operation on the calling thread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import defaults

type_float = np.dtype("<f4")

#: Blocks of 1024 that are coded in one step: 256 KiB of float32, as in exact.py.
_BLOCKS = 64
_BLOCK = defaults.CODEC_BLOCK
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITE = 0x7F800000
_LEAST = np.int32(defaults.CODEC_LEAST_BITS)

#: Value of each code of e3m0, in units of the scale: bit 3 is the sign, code 0 is zero, code 7 is 1.
_E3M0 = np.array([sign * level for sign in (1.0, -1.0) for level in (0.0, *(2.0**-i for i in range(6, -1, -1)))], "f4")


def finite(vector: NDArray[np.float32]) -> bool:
    # numpy's maximum hands on a NaN, and infinities are not below infinity.
    for start in range(0, len(vector), defaults.EXACT_CHUNK):
        bits = vector[start : start + defaults.EXACT_CHUNK].view(np.int32) & _MAGNITUDE
        if bits.max() >= _INFINITE:
            return False
    return True


def mean(vectors: tuple[NDArray[np.float32], ...], factors: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    product = np.empty(min(len(out), defaults.EXACT_CHUNK), dtype=np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(out), defaults.EXACT_CHUNK):
            end = min(start + defaults.EXACT_CHUNK, len(out))
            sums = out[start:end]
            np.multiply(vectors[0][start:end], factors[0], out=sums)
            for vector, factor in zip(vectors[1:], factors[1:], strict=True):
                np.multiply(vector[start:end], factor, out=product[: end - start])
                np.add(sums, product[: end - start], out=sums)


def fp32_put(data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
    codes = data.view(type_float)
    for start in range(0, len(out), defaults.EXACT_CHUNK):
        end = start + defaults.EXACT_CHUNK
        _put(codes[start:end].astype(np.float32), factor, out[start:end], how)


def bf16_put(data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
    codes = data.view("<u2")
    for start in range(0, len(out), defaults.EXACT_CHUNK):
        end = start + defaults.EXACT_CHUNK
        bits = codes[start:end].astype(np.uint32) << np.uint32(16)
        _put(bits.view(np.float32), factor, out[start:end], how)


def bf16_encode(vector: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    codes = out.view("<u2")
    for start in range(0, len(vector), defaults.EXACT_CHUNK):
        end = start + defaults.EXACT_CHUNK
        bits = vector[start:end].view(np.int32)
        size = np.minimum(bits & _MAGNITUDE, np.int32(0x7F7F7FFF))
        size += ((size >> 16) & 1) + np.int32(0x7FFF)
        codes[start:end] = (size >> 16) | ((bits >> 16) & np.int32(0x8000))


def block_encode(
    kind: int,
    vector: NDArray[np.float32],
    out: NDArray[np.uint8],
    residual: NDArray[np.float32] | None,
    new_residual: NDArray[np.float32] | None,
) -> int:
    done, at = 0, 0
    with np.errstate(all="ignore"):
        for blocks, length in _steps(len(vector)):
            end, stop = done + blocks * length, at + blocks * (4 + _codes(kind, length))
            values = vector[done:end] if residual is None else vector[done:end] + residual[done:end]
            wire = out[at:stop].reshape(blocks, -1)
            wrong = _encode(kind, values.reshape(blocks, length), wire)
            if wrong >= 0:
                return done // _BLOCK + wrong
            if new_residual is not None:
                back = _decode(kind, wire, length).reshape(-1)
                np.subtract(values, back, out=new_residual[done:end])
            done, at = end, stop
    return -1


def block_put(kind: int, data: NDArray[np.uint8], factor: float, out: NDArray[np.float32], how: int) -> None:
    done, at = 0, 0
    for blocks, length in _steps(len(out)):
        end, stop = done + blocks * length, at + blocks * (4 + _codes(kind, length))
        with np.errstate(all="ignore"):
            values = _decode(kind, data[at:stop].reshape(blocks, -1), length).reshape(-1)
        _put(values, factor, out[done:end], how)
        done, at = end, stop


def int8_wrong(data: NDArray[np.uint8], n: int) -> bool:
    at = 0
    for blocks, length in _steps(n):
        stop = at + blocks * (4 + length)
        if (data[at:stop].reshape(blocks, -1)[:, 4:] == 0x80).any():
            return True
        at = stop
    return False


def topk(vector: NDArray[np.float32], positions: NDArray[np.uint32]) -> None:
    k = len(positions)
    if not k:
        return
    sizes = vector.view(np.int32) & _MAGNITUDE
    least = np.partition(sizes, len(sizes) - k)[len(sizes) - k]
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: k - len(above)]
    positions[:] = np.sort(np.concatenate((above, equal)))


def middle(
    vectors: tuple[NDArray[np.float32], ...],
    network: NDArray[np.uint16],
    kind: int,
    f: int,
    factor: float,
    out: NDArray[np.float32],
) -> bool:
    n, step = len(vectors), max(1, defaults.EXACT_CHUNK // len(vectors))
    for start in range(0, len(out), step):
        end = min(start + step, len(out))
        rows = np.stack([vector[start:end] for vector in vectors])
        rows += np.float32(0.0)  # -0 becomes 0
        rows.sort(axis=0)
        with np.errstate(all="ignore"):
            if kind == 0:
                out[start:end] = _median(rows)
                continue
            chosen = rows[f : n - f]
            if kind == 2:
                low, high, median = rows[:f], rows[n - f :], _median(rows)
                chosen = np.concatenate((np.where(high - median < median - low, high, low), chosen))
            mean(tuple(chosen), np.full(len(chosen), factor, np.float32), out[start:end])
    return all(finite(vector) for vector in vectors)


def gram(vectors: tuple[NDArray[np.float32], ...], n: int, out: NDArray[np.float64]) -> None:
    out[:] = 0.0
    step = max(1, defaults.EXACT_CHUNK // len(vectors))
    with np.errstate(all="ignore"):
        for start in range(0, n, step):
            rows = np.stack([vector[start : start + step] for vector in vectors]).astype(np.float64)
            out += rows @ rows.T


def gram_row(vectors: tuple[NDArray[np.float32], ...], pivot: int, n: int, out: NDArray[np.float64]) -> None:
    # A product of matrix and vector has other bits than one of matrices.
    whole = np.empty((len(vectors), len(vectors)))
    gram(vectors, n, whole)
    out[0], out[1] = whole[pivot], np.diag(whole)


def _median(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of sorted ``rows`` (n, columns)."""
    low, high = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
    half = np.float32(0.5)
    middle: NDArray[np.float32] = low if len(rows) % 2 else low * half + high * half
    return middle


def _codes(kind: int, length: int) -> int:
    return length if kind == 0 else (length + 1) // 2


def _steps(n: int) -> list[tuple[int, int]]:
    """(blocks, their length) of each step: some whole blocks at once, the rest alone."""
    whole, rest = divmod(n, _BLOCK)
    steps = [(min(_BLOCKS, whole - first), _BLOCK) for first in range(0, whole, _BLOCKS)]
    return [*steps, (1, rest)] if rest else steps


def _encode(kind: int, values: NDArray[np.float32], wire: NDArray[np.uint8]) -> int:
    """``values`` (blocks, length) to ``wire`` (blocks, 4 + codes); the first block that is not finite, or -1."""
    sizes = (values.view(np.int32) & _MAGNITUDE).max(axis=1)
    if sizes.max() >= _INFINITE:
        return int(np.argmax(sizes >= _INFINITE))
    small = sizes < _LEAST
    top = sizes.view(np.float32)
    scale = top / np.float32(127.0) if kind == 0 else top.copy()
    inverse = np.float32(127.0 if kind == 0 else 8.0) / top
    scale[small] = inverse[small] = 0.0
    wire[:, :4] = scale.astype(type_float).view(np.uint8).reshape(-1, 4)
    scaled = values * inverse[:, None]
    if kind == 0:
        np.rint(scaled, out=scaled)
        wire[:, 4:] = scaled.astype(np.int8).view(np.uint8)
        return -1
    bits = scaled.view(np.int32)
    size = bits & _MAGNITUDE
    code = ((size + np.int32(0x00400000)) >> 23) - np.int32(123)
    code = np.maximum(code, size >= np.int32(0x3D800000))
    code |= (bits >> 28) & 8
    code[small] = 0
    half = (values.shape[1] + 1) // 2
    wire[:, 4:] = code[:, :half]
    wire[:, 4 : 4 + values.shape[1] - half] |= (code[:, half:] << 4).astype(np.uint8)
    return -1


def _decode(kind: int, wire: NDArray[np.uint8], length: int) -> NDArray[np.float32]:
    scale = wire[:, :4].copy().view(type_float).astype(np.float32)
    if kind == 0:
        return scale * wire[:, 4:].view(np.int8).astype(np.float32)
    half = (length + 1) // 2
    codes = np.empty((len(wire), length), dtype=np.uint8)
    codes[:, :half] = wire[:, 4:] & 15
    codes[:, half:] = wire[:, 4 : 4 + length - half] >> 4
    levels: NDArray[np.float32] = _E3M0[codes]
    return scale * levels


def _put(values: NDArray[np.float32], factor: float, out: NDArray[np.float32], how: int) -> None:
    with np.errstate(all="ignore"):
        if how == 0:
            out[:] = values
        elif how == 1:
            np.multiply(values, np.float32(factor), out=out)
        else:
            out += values * np.float32(factor)
