"""Rank and low rank: exact elimination, singular values, and the best approximation of rank r.

W is any real matrix (m, n); U diag(S) Vᵀ its singular value decomposition with S₁ ≥ S₂ ≥ … ≥ 0.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from .backend import Array, get_namespace, is_float, to_numpy


def _matrix(W: Array) -> Array:
    """W, in float32 where it is in half precision, which LAPACK does not have."""
    if getattr(W, "ndim", None) != 2 or not W.size:
        kind = f"shape {W.shape}" if hasattr(W, "shape") else type(W).__name__
        raise ValueError(f"W: expected a matrix, an array with two axes and at least one element, got {kind}")
    if not is_float(W.dtype) and W.dtype.kind not in "biu":
        raise TypeError(f"W: expected real numbers, got dtype {W.dtype}")
    if not bool(get_namespace(W).isfinite(W).all()):  # LAPACK fails on NaN, and answers infinity with NaN
        raise ValueError("W: it has numbers that are not finite")
    return W.astype(np.float32) if W.dtype.itemsize == 2 and is_float(W.dtype) else W


def _check_rank(r: int, W: Array) -> None:
    if not isinstance(r, int | np.integer) or isinstance(r, bool):
        raise TypeError(f"r: expected an int, got {type(r).__name__} {r!r}")
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"r: got {r}; W {W.shape} has at most rank {min(W.shape)}, 1 to {min(W.shape)} is accepted")


def truncated_svd(W: Array, r: int) -> tuple[Array, Array, Array]:
    """The r largest singular values with their vectors: W ≈ U diag(S) Vᵀ.

    Args:
        W: (m, n).
        r: 1 to min(m, n).

    Returns:
        U (m, r), S (r,) in falling order, Vt (r, n). U and Vt have orthonormal columns and rows. In W's dtype; float32
        for half precision, float64 for integers.

    Raises:
        ValueError: W is not a matrix or not finite, or r is out of range.
        TypeError: W holds no real numbers, or r is no int.
    """
    W = _matrix(W)
    _check_rank(r, W)
    U, S, Vt = get_namespace(W).linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r]


def best_rank_r(W: Array, r: int) -> Array:
    """The matrix of rank at most r nearest to W: W_r = Σ_{i≤r} Sᵢ uᵢ vᵢᵀ.

    No other is nearer in the Frobenius or the spectral norm; ‖W − W_r‖_F² = Σ_{i>r} Sᵢ². Eckart and Young 1936.
    """
    U, S, Vt = truncated_svd(W, r)
    return (U * S) @ Vt


def matrix_rank(W: Array, tol: float | None = None) -> int:
    """How many singular values are above `tol`; left out: S₁ · max(m, n) · machine epsilon, as NumPy has it."""
    S = singular_values(W)
    if tol is None:
        tol = float(S.max()) * max(W.shape) * float(np.finfo(S.dtype).eps)
    return int((tol < S).sum())


def singular_values(W: Array) -> Array:
    """S of W, (min(m, n),), in falling order."""
    W = _matrix(W)
    return get_namespace(W).linalg.svd(W, compute_uv=False)


def row_rank_exact(M: Any) -> int:
    """The number of linearly independent rows of an integer or rational matrix, by Gaussian elimination in fractions.

    Raises:
        TypeError: an entry is a float: it has no exact rank (convert with Fraction if its very bits are meant).
        ValueError: M is no matrix.
    """
    rows = _fractions(M)
    rank = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column] != 0), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] / rows[rank][column]
            rows[i] = [x - factor * p for x, p in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


def column_rank_exact(M: Any) -> int:
    """The number of linearly independent columns: the row rank of the transpose."""
    return row_rank_exact(list(zip(*_fractions(M), strict=True)))


def _fractions(M: Any) -> list[list[Fraction]]:
    rows: Any = to_numpy(M).tolist() if hasattr(M, "ndim") else M
    rows = [list(row) if hasattr(row, "__iter__") else row for row in rows] if hasattr(rows, "__iter__") else [rows]
    if any(not isinstance(row, list) for row in rows) or len({len(row) for row in rows}) > 1:
        raise ValueError("M: expected a matrix, rows of one length")
    for row in rows:
        for x in row:
            if not isinstance(x, int | Fraction | np.integer):
                raise TypeError(f"M: expected integers or Fractions, got {type(x).__name__} {x!r}")
    return [[Fraction(x) if isinstance(x, Fraction) else Fraction(int(x)) for x in row] for row in rows]


def effective_rank(W: Array) -> float:
    """exp(H) with H = −Σ pᵢ ln pᵢ and pᵢ = Sᵢ/ΣS: 1 for rank one, min(m, n) when all are equal. Roy and Vetterli 2007.

    0 for a matrix of zeros.
    """
    S = singular_values(W)
    if float(S[0]) == 0:
        return 0.0
    p = S / S[0]  # divided first: the sum itself may leave the dtype's range
    p = p[p > 0] / p.sum()
    return float(np.exp(-float((p * get_namespace(p).log(p)).sum())))


def stable_rank(W: Array) -> float:
    """‖W‖_F²/‖W‖₂² = Σ Sᵢ²/S₁²: at most the rank, and untouched by tiny singular values. 0 for a matrix of zeros."""
    S = singular_values(W)
    top = float(S[0])
    return 0.0 if top == 0 else float(((S / top) ** 2).sum())


def energy(W: Array, r: int) -> float:
    """Σ_{i≤r} Sᵢ²/Σ Sᵢ²: the share of ‖W‖_F² that the best approximation of rank r keeps. 1 for a matrix of zeros."""
    _check_rank(r, _matrix(W))
    S = singular_values(W)
    top = float(S[0])
    if top == 0:
        return 1.0
    squares = (S / top) ** 2  # divided first: the squares themselves may leave the dtype's range
    return float(squares[:r].sum()) / float(squares.sum())
