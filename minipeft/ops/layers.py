"""What layers are made of: linear, softmax, the two norms; each one node with a hand-derived backward."""

from __future__ import annotations

from typing import Any

from .. import backend
from ..backend import Array, get_namespace
from ..tensor import Tensor, result
from ..threads import in_parts
from .inputs import floats, normal_axes, operands


def linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b; x (..., in), W (out, in), b (out): (..., out). dx = g W, dW = gᵀ x, db = Σ g.

    Where W is frozen x is not kept: only dW = gᵀ x needs it.
    """
    x, weight = operands("linear", x, weight)
    w, shape = weight.data, x.shape
    if w.ndim != 2 or not shape or shape[-1] != w.shape[1]:
        raise ValueError(
            f"linear: x of shape {shape} has {shape[-1] if shape else 0} features, weight (out, in) = {w.shape} "
            f"takes {w.shape[-1]}"
        )
    rows = x.data.reshape(-1, shape[-1])  # (N, in)
    out = w.shape[0]
    y = backend.matmul(rows, w.T)  # (N, out)
    edges = [
        (x, lambda g: backend.matmul(g.reshape(-1, out), w).reshape(shape)),
        (weight, lambda g: backend.matmul(g.reshape(-1, out).T, rows)),
    ]
    if bias is not None:
        (_, bias) = operands("linear", x, bias)
        if bias.shape != (out,):
            raise ValueError(f"bias: got shape {bias.shape}, weight (out, in) = {w.shape} needs ({out},)")
        y += bias.data
        edges.append((bias, lambda g: g.reshape(-1, out).sum(axis=0)))
    return result("linear", y.reshape(*shape[:-1], out), *edges)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """eˣ/Σeˣ along an axis; dx = y·(g − Σ g·y)."""
    (x,) = floats("softmax", x)
    axis = normal_axes(x.data, axis)
    y = _softmax(x.data, axis)
    return result("softmax", y, (x, lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True))))


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """x − ln Σeˣ along an axis; dx = g − softmax(x)·Σ g."""
    (x,) = floats("log_softmax", x)
    axis = normal_axes(x.data, axis)
    xp = get_namespace(x.data)
    y = x.data - x.data.max(axis=axis, keepdims=True)
    y = y - xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return result("log_softmax", y, (x, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)))


def _softmax(x: Array, axis: tuple[int, ...]) -> Array:
    y = get_namespace(x).exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


def layer_norm(x: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = x̂·w + b with x̂ = (x − mean)/√(var + eps) over the last axis. Ba, Kiros and Hinton 2016, eq. 3.

    dx = (h − mean(h) − x̂·mean(h·x̂))/√(var + eps) with h = g·w; dw = Σ g·x̂, db = Σ g.
    """
    x, *affine = floats("layer_norm", x, *[p for p in (weight, bias) if p is not None])
    d = _check_affine("layer_norm", x, affine)
    xp = get_namespace(x.data)
    centered = x.data - x.data.mean(axis=-1, keepdims=True)
    scale = 1 / xp.sqrt((centered * centered).mean(axis=-1, keepdims=True) + eps)
    normed = centered * scale
    w = weight.data if weight is not None else None
    y = normed if w is None else normed * w

    def grad_x(g: Array) -> Array:
        h = g if w is None else g * w
        return scale * (h - h.mean(axis=-1, keepdims=True) - normed * (h * normed).mean(axis=-1, keepdims=True))

    edges = [(x, grad_x)]
    if weight is not None:
        edges.append((weight, lambda g: (g * normed).reshape(-1, d).sum(axis=0)))
    if bias is not None:
        y = y + bias.data
        edges.append((bias, lambda g: g.reshape(-1, d).sum(axis=0)))
    return result("layer_norm", y, *edges)


def rms_norm(x: Any, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """y = x̂·w with x̂ = x/√(mean(x²) + eps) over the last axis. Zhang and Sennrich 2019, eq. 4.

    dx = (h − x̂·mean(h·x̂))/√(mean(x²) + eps) with h = g·w; dw = Σ g·x̂.
    """
    x, *affine = floats("rms_norm", x, *([weight] if weight is not None else []))
    d = _check_affine("rms_norm", x, affine)
    xp, shape = get_namespace(x.data), x.shape
    rows = x.data.reshape(-1, d)
    w = weight.data if weight is not None else None
    scale, out = xp.empty((len(rows), 1), dtype=x.dtype), xp.empty(shape, dtype=x.dtype)
    y = out.reshape(-1, d)
    normed = y if w is None else xp.empty_like(y)

    def forward(start: int, stop: int) -> None:
        part = slice(start, stop)
        scale[part] = 1 / xp.sqrt(xp.einsum("ij,ij->i", rows[part], rows[part])[:, None] / d + eps)
        xp.multiply(rows[part], scale[part], out=normed[part])
        if w is not None:
            xp.multiply(normed[part], w, out=y[part])

    def grad_x(g: Array) -> Array:
        g, dx = g.reshape(-1, d), xp.empty_like(normed)

        def each(start: int, stop: int) -> None:
            part = slice(start, stop)
            h = g[part] if w is None else g[part] * w
            xp.multiply(normed[part], xp.einsum("ij,ij->i", h, normed[part])[:, None] / d, out=dx[part])
            xp.subtract(h, dx[part], out=dx[part])
            dx[part] *= scale[part]

        in_parts(each, len(dx), xp, width=d)
        return dx.reshape(shape)

    in_parts(forward, len(rows), xp, width=d)
    edges = [(x, grad_x)]
    if weight is not None:
        edges.append((weight, lambda g: (g.reshape(-1, d) * normed).sum(axis=0)))
    return result("rms_norm", out, *edges)


def _check_affine(op: str, x: Tensor, affine: list[Tensor]) -> int:
    if not x.ndim:
        raise ValueError(f"{op}: x has no axes, shape (); its last axis is what is normalized")
    for p in affine:
        if p.shape != x.shape[-1:]:
            raise ValueError(f"{op}: got weight or bias {p.shape}; x {x.shape} needs {x.shape[-1:]}")
    return x.shape[-1]
