"""Distances, norms and positions of vectors of which only the inner products are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Floats


def squared_distances(gram: Floats) -> Floats:
    """(n, n): ‖x_i - x_j‖² = K_ii + K_jj - 2 K_ij. Exactly 0 for vectors with equal products."""
    sizes = np.diag(gram)
    squares: Floats = np.maximum((sizes[:, None] + sizes[None, :]) - 2.0 * gram, 0.0)
    np.fill_diagonal(squares, 0.0)
    return squares


def squared_distances_to(gram: Floats, c: Floats) -> Floats:
    """(n,): ‖x_i - X c‖² for the combination X c of the rows with coefficients ``c`` (n,). Looks at the columns of rows
    that take part in it, and at the diagonal."""
    used = np.flatnonzero(c)
    products = gram[:, used] @ c[used]
    squares: Floats = np.maximum(np.diag(gram) - 2.0 * products + c @ products, 0.0)
    return squares


def norms(gram: Floats) -> Floats:
    """(n,): ‖x_i‖."""
    sizes: Floats = np.sqrt(np.maximum(np.diag(gram), 0.0))
    return sizes


def inverse(values: Floats) -> Floats:
    """1/v, and 0 for 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


def points(gram: Floats) -> tuple[Floats, Floats]:
    """Points (r, n) as far apart as the vectors, in as few dimensions as they need, and their pseudo-inverse (n, r).

    With K = U Λ Uᵀ they are Λ^½ Uᵀ: all geometry of n vectors of any length d takes place in r ≤ n dimensions.
    Directions with less than n ulps of the largest eigenvalue are rounding errors and left out.
    """
    values, vectors = np.linalg.eigh(gram)
    kept = values > len(gram) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    roots, basis = np.sqrt(values[kept]), vectors[:, kept]
    return roots[:, None] * basis.T, basis / roots


def nearest(squares: Floats, k: int) -> NDArray[np.intp]:
    """The first k of each row of ``squares`` (m, n) by distance, of equal ones by place."""
    return np.argsort(squares, axis=-1, kind="stable")[..., :k]


def choose(n: int, members: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """The mean of some of n vectors: its coefficients, and 1 for those chosen, 0 for the others."""
    chosen = np.zeros(n)
    chosen[members] = 1.0
    return chosen / len(members), chosen
