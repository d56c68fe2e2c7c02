"""Inner products as they travel between owners, leader and members: the upper triangle of a Gram matrix as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import defaults
from .base import Floats
from .linear import fault

#: The largest square of a float32.
_SQUARE = float(np.finfo(np.float32).max) ** 2


def triangle_size(p: int) -> int:
    """Bytes of the products of ``p`` vectors."""
    return 4 * p * (p + 1)


def pack_triangle(gram: Floats) -> bytes:
    """``gram`` (p, p), symmetric: its upper triangle row by row, little-endian float64."""
    return gram[np.triu_indices(len(gram))].astype("<f8").tobytes()


def unpack_triangle(data: bytes, p: int) -> Floats:
    """The matrix (p, p), symmetric to the bit. Raises ``ValueError`` when ``data`` is of another size."""
    if len(data) != triangle_size(p):
        raise ValueError(f"{len(data)} bytes are not the inner products of {p} vectors: {triangle_size(p)}")
    gram = np.empty((p, p))
    rows, columns = np.triu_indices(p)
    gram[rows, columns] = gram[columns, rows] = np.frombuffer(data, dtype="<f8")
    return gram


def add_triangles(parts: Sequence[bytes], p: int) -> Floats:
    """The sum (p, p) of ``parts`` in their order: the same bits on every machine. Raises ``ValueError`` as above."""
    total = unpack_triangle(parts[0], p)
    for part in parts[1:]:
        total += unpack_triangle(part, p)
    return total


def triangle_fault(data: bytes, p: int, elements: int) -> str | None:
    """Why ``data`` is not the products of ``p`` finite vectors of ``elements`` float32 each; None when it may be."""
    try:
        gram = unpack_triangle(data, p)
    except ValueError as error:
        return str(error)
    if float(np.diag(gram).max()) > elements * _SQUARE:
        return f"a square beyond that of any {elements} numbers"
    try:
        with np.errstate(all="ignore"):
            return fault(gram, p, spectrum=p <= defaults.PARTS_SPECTRUM)
    except ValueError as error:  # of linear algebra that does not converge: these are a stranger's numbers
        return str(error)
