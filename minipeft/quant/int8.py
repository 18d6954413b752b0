"""Eight bits: codes of blocks (Dettmers et al. 2022, "8-bit Optimizers"), and LLM.int8() with its outlier columns
(Dettmers et al. 2022, "LLM.int8()").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from . import blocks
from .blocks import check_blocksize, check_finite, flat_floats, quietly
from .blockwise import QuantizedTensor, quantize
from .codes import dynamic_table

# --- blockwise --------------------------------------------------------------------------------------------------------


def quantize_int8(W: Array, blocksize: int = 4096, code: str = "dynamic") -> QuantizedTensor:
    """W in 8-bit codes, blockwise: 8 + 32/blocksize bits an element.

    Args:
        code: `"dynamic"` (bit for bit bitsandbytes' quantize_blockwise), or `"linear"`: 255 evenly spaced numbers.

    Raises:
        TypeError: W holds no floats.
        ValueError: W is empty or not finite; a blocksize other than 32, 64 … 4096; another code.
    """
    if code not in ("dynamic", "linear"):
        raise ValueError(f"code: got {code!r}; accepted are 'dynamic' and 'linear'")
    if code == "linear":
        return quantize(W, "int8", blocksize)
    check_blocksize(blocksize)
    codes, absmax = dynamic_codes(flat_floats("W", W), blocksize)
    check_finite("W", absmax)
    return QuantizedTensor(codes, absmax, blocksize, tuple(W.shape), np.dtype(W.dtype), "dynamic")


def dynamic_codes(x: Array, blocksize: int) -> tuple[Array, Array]:
    """The 8-bit dynamic code of a flat array, and its block maxima: (n,) uint8, (⌈n/blocksize⌉,) float32.

    bitsandbytes does not search the nearest number for every element. It rounds x/c to one of 65,536 evenly spaced
    points and reads the nearest number of that point, so small numbers are off by up to 1.5e-5 of the maximum, and 0
    is one of them. What is no number after the division (0/0 in blocks of zeros) gets code 0.
    """
    xp, n = get_namespace(x), x.size
    nearest = backend.move(_nearest_on_grid(), xp)
    codes, absmax = xp.empty(n, xp.uint8), xp.empty(-(-n // blocksize), xp.float32)
    full = n - n % blocksize

    @quietly
    def code_part(start: int, stop: int) -> None:
        part = x[start:stop].reshape(-1, min(blocksize, stop - start)).astype(xp.float32, copy=False)
        largest = xp.abs(part).max(axis=1)
        absmax[start // blocksize : -(-stop // blocksize)] = largest
        scaled = (part * (1 / largest)[:, None]).reshape(-1)
        point = (xp.clip(scaled, -1, 1) + xp.float32(1)) * xp.float32(32767.5) + xp.float32(0.5)
        codes[start:stop] = nearest[xp.where(xp.isnan(scaled), 0, point).astype(xp.int32)]

    blocks.in_parts(code_part, full, xp, blocksize)
    if full < n:
        code_part(full, n)
    return codes, absmax


@cache
def _nearest_on_grid() -> np.ndarray:
    """For each of 65,536 evenly spaced points in [−1, 1] the index of the dynamic table's nearest number."""
    table, points = dynamic_table(), (np.arange(65536) / 32767.5 - 1).astype(np.float32)
    right = np.searchsorted(table, points).clip(1, 255)
    left = right - 1
    return np.where(table[right] - points < points - table[left], right, left).astype(np.uint8)


# --- LLM.int8() -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowQuantized:
    """A matrix in int8, one scale a row: row i ≈ codes[i]·absmax[i]/127.

    Attributes:
        codes: (rows, columns) int8; 0 in the outlier columns.
        absmax: (rows,) float32: the largest magnitude below the threshold.
        outliers: the columns that hold a magnitude at or above the threshold, ascending.
    """

    codes: Array
    absmax: Array
    outliers: Array

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.absmax.nbytes + self.outliers.nbytes


def quantize_rows(X: Array, threshold: float = 0.0) -> RowQuantized:
    """X (rows, columns) in int8 by rows: round(127·x/max|x|), without the columns where some |x| ≥ threshold.

    Dettmers et al. 2022 (LLM.int8), section 3.1 "vector-wise quantization" and 3.2. A threshold of 0: no column is out.

    Raises:
        TypeError: X holds no floats.
        ValueError: X is no matrix, empty or not finite; a negative threshold.
    """
    return _rows("X", X, threshold)


def _rows(argument: str, X: Array, threshold: float) -> RowQuantized:
    """See `quantize_rows`; errors name the argument."""
    flat_floats(argument, X)
    if X.ndim != 2:
        raise ValueError(f"{argument}: got shape {X.shape}; a matrix is accepted")
    if not threshold >= 0:
        raise ValueError(f"threshold: got {threshold}; at least 0 is accepted")
    xp = get_namespace(X)
    with np.errstate(over="ignore"):  # an error below
        x = X.astype(xp.float32, copy=False)
    magnitude = xp.abs(x)
    check_finite(argument, magnitude.max(axis=1), "rows")
    outlying = magnitude >= threshold if threshold else xp.zeros(x.shape, bool)
    columns = outlying.any(axis=0)
    absmax = xp.where(outlying, xp.float32(0), magnitude).max(axis=1)
    scale = xp.float32(127) / xp.where(absmax > 0, absmax, xp.float32(1))
    codes = xp.rint(xp.where(columns, xp.float32(0), x) * scale[:, None]).astype(xp.int8)
    return RowQuantized(codes, absmax, xp.flatnonzero(columns))


def dequantize_rows(q: RowQuantized) -> Array:
    """codes·absmax/127, (rows, columns) float32; the outlier columns, which hold no codes, are 0."""
    xp = get_namespace(q.codes)
    return q.codes.astype(xp.float32) * q.absmax[:, None] * xp.float32(1 / 127)


def llm_int8(X: Array, W: Array | RowQuantized, threshold: float = 6.0) -> Array:
    """Y ≈ X Wᵀ for X (N, in) and W (out, in): (N, out), in X's dtype. Dettmers et al. 2022 (LLM.int8), eq. 8:

        Y = Σ_{h∈O} X_h W_hᵀ  +  cₓ c_wᵀ/127² · Σ_{h∉O} X̂_h Ŵ_hᵀ

    O: the columns of X with a magnitude ≥ threshold, multiplied in full precision; all others as int8, exactly.

    Args:
        W: the weight, or its int8 rows (`quantize_rows(W)`), from which the outlier columns are then dequantized, as in
            bitsandbytes, which keeps no other copy of W.

    Raises:
        TypeError, ValueError: as `quantize_rows`, and X and W do not fit.
    """
    x = _rows("X", X, threshold)
    given = isinstance(W, RowQuantized)
    w = W if given else _rows("W", W, 0.0)
    if w.codes.shape[1] != X.shape[1]:
        raise ValueError(f"W: got shape {w.codes.shape} (out, in); X {X.shape} (N, in) needs in = {X.shape[1]}")
    xp = get_namespace(X)
    y = int8_matmul(x.codes, w.codes).astype(xp.float32) * (x.absmax[:, None] * w.absmax) * xp.float32(1 / 127**2)
    if x.outliers.size:
        w_outliers = dequantize_rows(RowQuantized(w.codes[:, x.outliers], w.absmax, w.outliers)) if given else None
        columns = w_outliers if given else W[:, x.outliers].astype(xp.float32)
        y += backend.matmul(X[:, x.outliers].astype(xp.float32), columns.T)
    return y.astype(X.dtype)


def int8_matmul(a: Array, b: Array) -> Array:
    """a bᵀ of int8 matrices (m, k) and (n, k), exactly, as int32 (m, n).

    Float32 holds integers up to 2²⁴ exactly, which 1,024 products of int8 numbers cannot exceed: so BLAS does the work,
    1,024 columns at a time.
    """
    xp = get_namespace(a)
    total = xp.zeros((len(a), len(b)), xp.int32)
    for start in range(0, a.shape[1], 1024):
        part = slice(start, start + 1024)
        total += backend.matmul(a[:, part].astype(xp.float32), b[:, part].astype(xp.float32).T).astype(xp.int32)
    return total
