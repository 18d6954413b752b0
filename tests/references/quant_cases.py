"""The weights that quantization is tried on, here and by bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KEPT = Path(__file__).with_name("quant.npz")
KINDS = ("normal", "zeros", "negative zeros", "denormal", "tiny", "ties", "huge")
# (kind, shape, dtype, quant_type, blocksize): what quant.npz keeps; between them every rule of rounding is met.
KEPT_CASES = (
    ("normal", (24, 64), "float32", "nf4", 64),
    ("normal", (24, 64), "float32", "fp4", 64),
    ("normal", (9, 101), "float32", "nf4", 128),
    ("normal", (5, 130), "float16", "fp4", 32),
    ("zeros", (777,), "float32", "nf4", 64),
    ("zeros", (65,), "float32", "nf4", 64),
    ("negative zeros", (4, 64), "float32", "fp4", 64),
    ("denormal", (300,), "float32", "nf4", 64),
    ("ties", (512,), "float32", "nf4", 64),
    ("huge", (256,), "float32", "nf4", 64),
    ("normal", (1,), "float32", "nf4", 4096),
    ("normal", (2, 3, 100), "float16", "nf4", 4096),
    ("normal", (1300,), "float32", "dynamic", 256),
    ("zeros", (1300,), "float16", "dynamic", 64),
)


def name(case: tuple) -> str:
    """The case's name in quant.npz."""
    return " ".join(map(str, case))


def weights(kind: str, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Normal numbers of deviation 0.05 and what a kind makes of them."""
    from minipeft.quant import nf4_table

    rng = np.random.default_rng([seed, KINDS.index(kind), *shape])
    w = (rng.standard_normal(shape) * 0.05).astype(np.float32).reshape(-1)
    if kind == "zeros":  # whole blocks of them, and half of the rest
        w[rng.random(w.size) < 0.5] = 0
        w[:200] = 0
    elif kind == "negative zeros":
        w[rng.random(w.size) < 0.5] = -0.0
    elif kind == "denormal":  # below 1.2e-38
        w *= np.float32(1e-38)
    elif kind == "tiny":
        w *= np.float32(1e-36 if dtype == "float32" else 1e-4)
    elif kind == "huge":
        w *= np.float32(1e38 if dtype == "float32" else 1e5)
    elif kind == "ties":  # exactly between two numbers of the table
        table = nf4_table()
        w[...] = rng.choice((table[1:] + table[:-1]) / 2, w.size)
        w[::64] = 1
    return w.reshape(shape).astype(dtype)
