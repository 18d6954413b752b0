#!/usr/bin/env python3
"""NF4 of a matrix, here and by bitsandbytes, in turn in one run.

    python benchmarks/quant.py [--rows 4096] [--columns 4096] [--json figures/quant.json]

Goals for 4096 × 4096 float32: quantize in a third of bitsandbytes' time, dequantize in half of it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# PyTorch's threads spin for some milliseconds after their work, and whatever is timed next shares its processors with
# them: dequantizing here took 1.4 times as long right after bitsandbytes, whose own time is the same either way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import minipeft  # noqa: F401  before NumPy: OpenBLAS chooses its kernel once, and minipeft may ask for a faster one

# isort: split
import bitsandbytes.functional as bnb
import numpy as np
import torch
from step import machine

from minipeft import files
from minipeft.measure import compare_latency
from minipeft.quant import dequantize, double_quantize, quantize_nf4


def main() -> None:
    """Print the comparisons; the results are checked to be the same bits first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    W = np.random.default_rng(0).standard_normal((options.rows, options.columns)).astype(np.float32)
    W_torch = torch.from_numpy(W)
    q, (packed, state) = quantize_nf4(W), bnb.quantize_nf4(W_torch)
    assert (q.codes == packed.numpy().reshape(-1)).all()
    assert (q.absmax == state.absmax.numpy()).all()
    assert (dequantize(q) == bnb.dequantize_nf4(packed, state).numpy()).all()
    buffer = np.empty_like(W)
    threads = torch.get_num_threads()
    print(f"{options.rows} × {options.columns} float32, PyTorch on {threads} threads")
    print(f"load of the machine in the minute before: {os.getloadavg()[0]:.1f}")
    double, (packed2, state2) = double_quantize(q), bnb.quantize_nf4(W_torch, compress_statistics=True)
    report = {"machine": machine(), "torch_threads": threads, "shape": [options.rows, options.columns], "rows": []}
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
        found = compare_latency(fns, repeat=options.repeat)
        print(f"\n{title}\n{found}")
        report["rows"] += [{"what": title, "side": side, "seconds": time.median} for side, time in found.items()]
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
