#!/usr/bin/env python3
"""One step (forward, backward, Adam) of a 64-128-128-10 network at batch 64: minipeft beside its peers, in one run.

    python benchmarks/mlp_step.py [--rounds 5] [--json figures/mlp-step.json]

Peers that are not installed are left out. Each is timed in a process of its own (two libraries in one process disturb
each other: their idle threads wait by spinning), with a thread a processor and with one, all in turn, `--rounds` times;
a row is the median of the rounds' medians, and its ratio to torch's step (to minipeft's where torch is missing). HIPS
autograd has no optimizer, so it is timed on the gradient alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minipeft  # before NumPy: OpenBLAS chooses its kernel once, and minipeft may ask for a faster one

# isort: split
import numpy as np
from step import kernel, machine

from minipeft import files, nn, ops, optim
from minipeft.doctor import machine_summary, usable_cpus
from minipeft.measure import latency

SIZES, BATCH = (64, 128, 128, 10), 64
LAYERS = list(itertools.pairwise(SIZES))
rng = np.random.default_rng(0)
X = rng.standard_normal((BATCH, SIZES[0])).astype(np.float32)
Y = rng.integers(0, SIZES[-1], BATCH)
WEIGHTS = [(rng.standard_normal((o, i)) / i**0.5).astype(np.float32) for i, o in LAYERS]


def minipeft_step() -> Callable[[], None]:
    """The library as its users write it."""
    layers: list[nn.Module] = []
    for W in WEIGHTS:
        linear = nn.Linear(W.shape[1], W.shape[0], rng=0)
        linear.weight.data = W.copy()
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        ops.cross_entropy(model(X), Y).backward()
        optimizer.step()

    return step


def torch_step() -> Callable[[], None]:
    """torch, eager, with as many threads as minipeft's BLAS."""
    import torch

    torch.set_num_threads(machine_summary()["threads"] or 1)
    layers: list[torch.nn.Module] = []
    for W in WEIGHTS:
        linear = torch.nn.Linear(W.shape[1], W.shape[0])
        linear.weight.data = torch.from_numpy(W.copy())
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.from_numpy(X), torch.from_numpy(Y)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def autograd_gradient() -> Callable[[], None]:
    """HIPS autograd, the gradient without an optimizer."""
    import autograd.numpy as anp
    from autograd import grad

    def loss(params: list) -> float:
        h = X
        for W, b in params[:-1]:
            h = anp.maximum(anp.dot(h, W.T) + b, 0)
        W, b = params[-1]
        z = anp.dot(h, W.T) + b
        z = z - anp.max(z, axis=1, keepdims=True)
        return anp.mean(anp.log(anp.sum(anp.exp(z), axis=1)) - z[np.arange(BATCH), Y])

    params, gradient = [(W, np.zeros(len(W), np.float32)) for W in WEIGHTS], grad(loss)
    return lambda: gradient(params)


def numpy_floor() -> Callable[[], None]:
    """Forward and backward by hand, no optimizer and no checks."""
    (W1, W2, W3), rows = WEIGHTS, np.arange(BATCH)
    b1, b2, b3 = (np.zeros(len(W), np.float32) for W in WEIGHTS)

    def step() -> None:
        h1 = np.maximum(X @ W1.T + b1, 0)
        h2 = np.maximum(h1 @ W2.T + b2, 0)
        z = h2 @ W3.T + b3
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        p /= p.sum(axis=1, keepdims=True)
        p[rows, Y] -= 1
        p /= BATCH
        _ = p.T @ h2, p.sum(axis=0)
        g = (p @ W3) * (h2 > 0)
        _ = g.T @ h1, g.sum(axis=0)
        g = (g @ W2) * (h1 > 0)
        _ = g.T @ X, g.sum(axis=0)

    return step


PEERS = {
    "minipeft, step": minipeft_step,
    "torch, step": torch_step,
    "HIPS autograd, gradient alone": autograd_gradient,
    "NumPy by hand, gradient alone": numpy_floor,
}


def round_of(name: str, threads: int) -> dict[str, Any] | None:
    """The median seconds of 2,000 steps in a new process, and its kernel; None where the library is not installed."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and name.startswith("minipeft"):
        raise SystemExit(done.stderr)
    if done.returncode:
        print(f"left out: {name} ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def main() -> None:
    """Time them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        step = PEERS[options.one]()
        seconds = latency(step, repeat=2000, warmup=300).median
        print(json.dumps({"seconds": seconds, "kernel": kernel(options.one)}))
        return
    counts = sorted({usable_cpus(), 1}, reverse=True)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {pair: [] for pair in itertools.product(PEERS, counts)}
    for _ in range(options.rounds):
        for pair in list(found):
            timed = round_of(*pair)
            if timed is None:
                del found[pair]
            else:
                found[pair].append(timed)
    rows = [
        {
            "side": name,
            "threads": threads,
            "seconds": statistics.median(run["seconds"] for run in runs),
            "kernel": runs[0]["kernel"],
        }
        for (name, threads), runs in found.items()
    ]
    report = {"machine": machine(), "rounds": options.rounds, "rows": rows}
    print(f"minipeft {minipeft.__version__}, " + ", ".join(f"{k} {v}" for k, v in report["machine"].items() if v))
    medians = {(row["side"], row["threads"]): row["seconds"] for row in rows}
    for (name, threads), seconds in medians.items():
        unit = medians.get(("torch, step", threads), medians["minipeft, step", threads])
        print(f"{name:32} {threads} thread{'s' * (threads > 1):1} {seconds * 1e6:8.0f} µs   {seconds / unit:5.2f}")
    if options.json:
        files.write_json(options.json, report)


if __name__ == "__main__":
    main()
