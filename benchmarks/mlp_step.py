#!/usr/bin/env python3
"""One step (forward, backward, Adam) of a 64-128-128-10 network at batch 64: minipeft beside its peers, in one run.

    python benchmarks/mlp_step.py [ROUNDS]

Peers that are not installed are left out. Each is timed in a process of its own (two libraries in one process disturb
each other: their idle threads wait by spinning), all in turn, ROUNDS times; a row is the median of the rounds' medians,
and its ratio to torch's step (to minipeft's where torch is missing). HIPS autograd has no optimizer, so it is timed on
the gradient alone.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np

import minipeft
from minipeft import nn, ops, optim
from minipeft.doctor import machine_summary
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


def round_of(name: str) -> float | None:
    """The median seconds of 2,000 steps in a new process; None where the library is not installed."""
    done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"left out: {name} ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    return float(done.stdout)


def main() -> None:
    """Time them and print the table."""
    if sys.argv[1:2] == ["--one"]:
        print(latency(PEERS[sys.argv[2]](), repeat=2000, warmup=300).median)
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(rounds):
        for name in list(times):
            seconds = round_of(name)
            if seconds is None:
                del times[name]
            else:
                times[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    unit = medians.get("torch, step", medians["minipeft, step"])
    print(f"minipeft {minipeft.__version__}, " + ", ".join(f"{k} {v}" for k, v in machine_summary().items() if v))
    for name, median in medians.items():
        print(f"{name:32} {median * 1e6:8.0f} µs   {median / unit:5.2f}")


if __name__ == "__main__":
    main()
