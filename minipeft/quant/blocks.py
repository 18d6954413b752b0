"""What quantization stands on: long arrays in cache-sized parts over threads, checks, and PyTorch's float32 mean."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import backend, threads
from ..backend import Array, get_namespace
from ..tensor import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# A decorator: no warnings for NaN and infinity on the way to `check_finite`.
quietly = np.errstate(invalid="ignore", over="ignore", divide="ignore")
PART = threads.PART


def in_parts(work: Callable[[int, int], None], n: int, xp: object, blocksize: int, part: int = PART) -> None:
    """Call work(start, stop) on parts of 0 … n, over all threads: NumPy releases the GIL while it computes.

    The parts are whole blocks, of about `part` elements or one for each thread if that is less. On a device there is
    one part; inside `threads.side_by_side`, whose tasks have a processor each, one thread.
    """
    count = threads.threads() if xp is np and not threads.inside() else 1
    length = max(PART, min(part, n // count)) if xp is np else max(n, 1)
    length += -length % blocksize
    threads.run_all([partial(work, start, min(n, start + length)) for start in range(0, n, length)])


def take(table: Array, index: Array, out: Array) -> None:
    """out ← table[index], where every index is in range."""
    if get_namespace(table) is np:
        np.take(table, index, out=out, mode="clip")  # "raise" would go through a buffer
    else:
        out[...] = table[index]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_blocksize(blocksize: Any) -> None:
    """ValueError unless it is one of `BLOCKSIZES`."""
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize!r}; accepted are {', '.join(map(str, BLOCKSIZES))}")


def flat_floats(argument: str, W: Any) -> Array:
    """W as a flat array; TypeError or ValueError unless it holds floats, at least one."""
    if isinstance(W, Tensor) or not hasattr(W, "dtype") or not hasattr(W, "reshape"):
        raise TypeError(f"{argument}: expected an array of floats, got {type(W).__name__}; of a tensor pass its .data")
    if not backend.is_float(W.dtype):
        raise TypeError(f"{argument}: expected float16, bfloat16, float32 or float64, got {W.dtype}")
    if not W.size:
        raise ValueError(f"{argument}: got shape {W.shape}, which has no elements; at least one is accepted")
    return W.reshape(-1)


def check_finite(argument: str, absmax: Array, parts: str = "blocks") -> None:
    """ValueError unless all maxima, of blocks or other `parts`, are finite: exactly then all elements are."""
    bad = ~get_namespace(absmax).isfinite(absmax)
    if bad.any():
        raise ValueError(
            f"{argument}: {int(bad.sum())} of {absmax.size} {parts} hold NaN, or numbers beyond float32's range; "
            "finite numbers are accepted"
        )


# --- the mean, as PyTorch rounds it -----------------------------------------------------------------------------------

LANES, COLUMNS, LEVELS = 8, 4, 4  # float32 numbers in a vector of AVX2, vectors summed side by side, levels of sums
GRAIN = 32768  # the fewest elements that PyTorch gives a thread


def torch_mean(x: Array, threads: int | None = None) -> Array:
    """The mean of a float32 array (n,), bit for bit as PyTorch computes it on an x86 CPU with that many threads.

    A float32 sum depends on the order of its additions. bitsandbytes subtracts such a mean before it codes the block
    maxima, so a different last bit here could give a different code there.
    """
    xp, x = get_namespace(x), backend.to_numpy(x)
    threads = _torch_threads() if threads is None else threads
    if x.size < GRAIN or threads == 1:
        total = _torch_sum(x)
    else:
        length = -(-x.size // min(threads, -(-x.size // GRAIN)))
        sums = np.zeros(threads, np.float32)
        for i in range(-(-x.size // length)):
            sums[i] = _torch_sum(x[i * length : (i + 1) * length])
        total = _torch_sum(sums)
    return xp.asarray(total / np.float32(x.size))


def _torch_threads() -> int:
    """How many threads PyTorch uses here: what OMP_NUM_THREADS says, else one for each CPU."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else threads.affinity()


def _torch_sum(x: np.ndarray) -> np.float32:
    """One thread's sum: vectors in four columns, added up in levels (a cascade) to keep rounding errors small."""
    lanes = LANES if x.size >= LANES else 1
    vectors = x[: x.size - x.size % lanes].reshape(-1, lanes)
    rest = x[vectors.size :]
    rows = len(vectors) // COLUMNS
    columns = _cascade(vectors[: rows * COLUMNS].reshape(rows, COLUMNS, lanes))
    for vector in vectors[rows * COLUMNS :]:
        columns[0] += vector
    for column in columns[1:]:
        columns[0] += column
    return functools.reduce(np.add, [*rest, *columns[0]], np.float32(0))


def _cascade(rows: np.ndarray) -> np.ndarray:
    """Σ rows: runs of 2ᵖ rows, then runs of 2ᵖ sums of runs, and so on."""
    power = max(4, (len(rows) - 1).bit_length() // LEVELS) if len(rows) > 1 else 4
    run = 1 << power
    sums = [np.zeros(rows.shape[1:], np.float32) for _ in range(LEVELS)]
    whole = len(rows) - len(rows) % run
    for stop in range(run, whole + 1, run):
        for row in rows[stop - run : stop]:
            sums[0] += row
        for level in range(1, LEVELS):
            sums[level] += sums[level - 1]
            sums[level - 1][...] = 0
            if stop & ((run - 1) << (level * power)):
                break
    for row in rows[whole:]:
        sums[0] += row
    for level in sums[1:]:
        sums[0] += level
    return sums[0]
