"""NF4 of a matrix, here and by bitsandbytes, in turn in one run: `python benchmarks/quant.py [rows] [columns]`.

Goals for 4096 × 4096 float32: quantize in a third of bitsandbytes' time, dequantize in half of it.
"""

from __future__ import annotations

import os
import sys

import bitsandbytes.functional as bnb
import numpy as np
import torch

from minipeft.measure import compare_latency
from minipeft.quant import dequantize, double_quantize, quantize_nf4


def main(rows: int = 4096, columns: int = 4096, repeat: int = 15) -> None:
    """Print both comparisons; the results are checked to be the same bits first."""
    W = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    W_torch = torch.from_numpy(W)
    q, (packed, state) = quantize_nf4(W), bnb.quantize_nf4(W_torch)
    assert (q.codes == packed.numpy().reshape(-1)).all()
    assert (q.absmax == state.absmax.numpy()).all()
    assert (dequantize(q) == bnb.dequantize_nf4(packed, state).numpy()).all()
    buffer = np.empty_like(W)
    cpus = len(os.sched_getaffinity(0))
    print(f"{rows} × {columns} float32, {cpus} CPUs, PyTorch on {torch.get_num_threads()} threads")
    print(f"load of the machine in the minute before: {os.getloadavg()[0]:.1f}")
    double, (packed2, state2) = double_quantize(q), bnb.quantize_nf4(W_torch, compress_statistics=True)
    for title, fns in {
        "quantize": {
            "bitsandbytes": lambda: bnb.quantize_nf4(W_torch),
            "minipeft": lambda: quantize_nf4(W),
        },
        "dequantize": {
            "bitsandbytes": lambda: bnb.dequantize_nf4(packed, state),
            "minipeft": lambda: dequantize(q),
            "minipeft, into a buffer": lambda: dequantize(q, out=buffer),  # bitsandbytes has no such thing on a CPU
        },
        "dequantize, double-quantized": {
            "bitsandbytes": lambda: bnb.dequantize_nf4(packed2, state2),
            "minipeft": lambda: dequantize(double),
        },
    }.items():
        print(f"\n{title}\n{compare_latency(fns, repeat=repeat)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
