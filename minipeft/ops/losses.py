"""Losses: one number, the mean over examples."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .. import backend, threads
from ..backend import Array, get_namespace
from ..tensor import Tensor, result
from .inputs import operands, tensor


def cross_entropy(logits: Any, targets: Any, ignore_index: int = -100) -> Tensor:
    """The mean of −log softmax(logits)[target]; logits (N, V), integer targets (N,). dlogits = (softmax − onehot)·g/n.

    Targets equal to `ignore_index` count neither in the sum nor in n.

    Raises:
        ValueError: shapes that do not fit, a target outside [0, V), or nothing left to average.
    """
    logits = tensor(logits)
    xp = get_namespace(logits.data)
    targets, kept, n = _check_targets(xp, logits.shape, targets, ignore_index)
    shifted = logits.data - logits.data.max(axis=1, keepdims=True)
    p = xp.exp(shifted)
    total = p.sum(axis=1, keepdims=True)
    rows = xp.arange(len(targets))
    losses = xp.log(total[:, 0]) - shifted[rows, targets]
    p /= total
    if kept is not None:
        losses *= kept

    def grad(g: Array) -> Array:
        d = p * (g / n)
        d[rows, targets] -= g / n
        return d if kept is None else d * kept[:, None]

    return result("cross_entropy", losses.sum() / n, (logits, grad))


def _check_targets(xp: Any, shape: tuple[int, ...], targets: Any, ignore_index: int) -> tuple[Array, Array | None, int]:
    """(targets with 0 for ignored ones, which are kept (None: all), how many are)."""
    targets = targets.data if isinstance(targets, Tensor) else xp.asarray(targets)
    if len(shape) != 2 or targets.shape != shape[:1]:
        raise ValueError(f"cross_entropy: logits (N, V) = {shape} and targets (N,) = {targets.shape} do not fit")
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer class numbers, got {targets.dtype}")
    vocabulary = shape[1]
    # one look for both ends: a negative number is a huge one when read as unsigned
    if targets.size and int(targets.astype(xp.int64, copy=False).view(xp.uint64).max()) < vocabulary:
        return targets, None, len(targets)
    kept = targets != ignore_index
    n = int(kept.sum())
    if n == 0:
        raise ValueError("cross_entropy: every target is ignore_index, there is nothing to average")
    targets = xp.where(kept, targets, 0)
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"targets: got classes from {low} to {high}; logits have classes 0 to {vocabulary - 1}")
    return targets, kept, n


def linear_cross_entropy(x: Any, weight: Tensor, targets: Any, ignore_index: int = -100, chunk: int = 128) -> Tensor:
    """cross_entropy(x Wᵀ, targets) for x (N, d) and W (V, d), `chunk` rows at a time: the (N, V) logits never exist.

    With z = e^(logits − max), Z = Σ z and the one-hot target t, dx = (z − Z·t) W / Z and dW = (z − Z·t)ᵀ x / Z: rows of
    d numbers are divided instead of rows of V. They are formed in the same pass, while z is at hand, and only scaled in
    backward. Rows whose target is ignored cost nothing.
    """
    x, weight = operands("linear_cross_entropy", x, weight)
    xp, rows, w = get_namespace(x.data), x.data, weight.data
    if rows.ndim != 2 or w.ndim != 2 or rows.shape[1] != w.shape[1]:
        raise ValueError(f"linear_cross_entropy: x (N, d) = {rows.shape} and weight (V, d) = {w.shape} do not fit")
    targets, kept, n = _check_targets(xp, (rows.shape[0], w.shape[0]), targets, ignore_index)
    if kept is not None:
        kept = xp.nonzero(kept)[0]
        rows, targets = rows[kept], targets[kept]
    dx = xp.empty_like(rows) if x.requires_grad else None
    dw = xp.zeros_like(w) if weight.requires_grad else None

    def each(start: int, stop: int) -> Array:
        """The sum of these rows' losses; their dx is written to its place, their dW added."""
        loss = xp.zeros((), dtype=rows.dtype)
        buffer = xp.empty((min(chunk, stop - start), len(w)), dtype=rows.dtype)
        for a in range(start, stop, chunk):
            part = slice(a, min(stop, a + chunk))
            z = backend.matmul(rows[part], w.T, out=buffer[: part.stop - a])  # (chunk, V)
            Z, picked = _exponentials(z, targets[part])
            loss = loss + (xp.log(Z[:, 0]) - picked).sum()
            if dx is not None:
                backend.matmul(z, w, out=dx[part])
                dx[part] /= Z
            if dw is not None:
                xp.add(dw, backend.matmul(z.T, rows[part] / Z), out=dw)
        return loss

    alone = dw is not None or xp is not np or len(rows) < 2 * chunk  # all rows add to one dW
    count = 1 if alone else threads.available()
    ends = [len(rows) * (i + 1) // count for i in range(count)]
    tasks = [partial(each, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    loss = sum(threads.side_by_side(tasks))

    def grad_x(g: Array) -> Array:
        scaled = dx * (g / n)
        if kept is None:
            return scaled
        everywhere = xp.zeros(shape, dtype=dx.dtype)
        everywhere[kept] = scaled
        return everywhere

    shape = x.shape
    return result("linear_cross_entropy", loss / n, (x, grad_x), (weight, lambda g: dw * (g / n)))


def _exponentials(z: Array, targets: Array) -> tuple[Array, Array]:
    """Logits z (n, V) ← e^(z − max) − Z·onehot(target), in place: (Z = Σ e^(z − max) (n, 1), z − max at the target)."""
    xp = get_namespace(z)
    Z, picked = xp.empty((len(z), 1), dtype=z.dtype), xp.empty(len(z), dtype=z.dtype)

    def each(start: int, stop: int) -> None:
        part, rows = z[start:stop], xp.arange(stop - start)
        part -= part.max(axis=1, keepdims=True)
        picked[start:stop] = part[rows, targets[start:stop]]
        xp.exp(part, out=part)
        Z[start:stop] = part.sum(axis=1, keepdims=True)
        part[rows, targets[start:stop]] -= Z[start:stop, 0]

    threads.in_parts(each, len(z), xp, width=z.shape[1])
    return Z, picked


def mse_loss(input: Any, target: Any) -> Tensor:
    """The mean of (input − target)²; dinput = 2·(input − target)·g/n, and the opposite for a target that trains."""
    input, target = operands("mse_loss", input, target)
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: input {input.shape} and target {target.shape} must have one shape")
    difference = input.data - target.data
    n = difference.size
    return result(
        "mse_loss",
        (difference * difference).mean(),
        (input, lambda g: difference * (2 * g / n)),
        (target, lambda g: difference * (-2 * g / n)),
    )
