"""Many numbers to few. g is dL/d(output)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, get_namespace, keep_array
from ..tensor import Tensor, result
from .inputs import floats, normal_axes, tensor


def sum(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """Σ x over `axis`; dx = g, repeated."""
    x = tensor(x)
    axes, shape, xp = normal_axes(x.data, axis), x.shape, get_namespace(x.data)
    return result(
        "sum",
        x.data.sum(axis=axes, keepdims=keepdims),
        (x, lambda g: xp.broadcast_to(_expand(g, axes, shape), shape)),
    )


def mean(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`; dx = g/n, repeated."""
    (x,) = floats("mean", x)
    axes, shape, xp = normal_axes(x.data, axis), x.shape, get_namespace(x.data)
    n = int(np.prod([shape[i] for i in axes]))
    return result(
        "mean",
        x.data.mean(axis=axes, keepdims=keepdims),
        (x, lambda g: xp.broadcast_to(_expand(g, axes, shape) / n, shape)),
    )


def max(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The largest element over `axis`; g is shared equally by equal largest elements (PyTorch's amax)."""
    x = tensor(x)
    axes, shape, value = normal_axes(x.data, axis), x.shape, x.data
    y = keep_array(value.max(axis=axes, keepdims=keepdims))

    def grad(g: Array) -> Array:
        largest = (value == _expand(y, axes, shape)).astype(value.dtype)
        return largest * (_expand(g, axes, shape) / largest.sum(axis=axes, keepdims=True))

    return result("max", y, (x, grad))


def _expand(g: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """g with the summed axes back, of length 1."""
    return g.reshape(tuple(1 if i in axes else n for i, n in enumerate(shape)))
