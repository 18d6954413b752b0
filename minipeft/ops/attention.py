"""Rotary positions and scaled dot-product attention, each one node with a hand-derived backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from ..tensor import Tensor, joint_result, result
from ..threads import in_parts
from .inputs import operands, tensor


def rope_table(length: int, dim: int, theta: float = 10000.0, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position·θ^(−2i/dim), each (length, dim/2). Su et al. 2021, eq. 15."""
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, dim, 2) / dim))
    dtype = dtype or backend.get_default_dtype()
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Any, cos: Array, sin: Array) -> Tensor:
    """Rotary positions: the pairs (xᵢ, xᵢ₊d/₂) turned by their angle, Hugging Face's "rotate half" order.

    x (..., T, d), cos and sin (T, d/2), see `rope_table`. The gradient is the rotation by the opposite angle.
    """
    x = tensor(x)
    if x.ndim < 2 or x.shape[-1] % 2 or cos.shape[-1] * 2 != x.shape[-1]:
        raise ValueError(f"rope: x {x.shape} must end in an even d, cos {cos.shape} in d/2")
    return result("rope", _rotate(x.data, cos, sin), (x, lambda g: _rotate(g, cos, -sin)))


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x·(cos, cos) + (x₂, x₁)·(−sin, sin), with x₁ and x₂ the halves of the last axis."""
    xp, half = get_namespace(x), x.shape[-1] // 2
    twice = xp.concatenate([cos, cos], axis=-1)  # (T, d)
    signed = xp.stack([-sin, sin], axis=-2)  # (T, 2, d/2)
    y = xp.empty(x.shape, dtype=x.dtype)
    source, target = (x, y) if x.ndim > 2 else (x[None], y[None])

    def each(start: int, stop: int) -> None:
        part, out = source[start:stop], target[start:stop]
        xp.multiply(part, twice, out=out)
        swapped = part.reshape(*part.shape[:-1], 2, half)[..., ::-1, :]
        out += (swapped * signed).reshape(out.shape)

    in_parts(each, len(source), xp, width=x.size // max(1, len(source)))
    return y


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ·scale + mask) v. Vaswani et al. 2017, eq. 1; grouped query heads: Ainslie et al. 2023.

    Args:
        query: (B, H, T, d).
        key, value: (B, K, S, d) with H a multiple of K: H/K query heads share one key and value head.
        attn_mask: broadcasts to (B, H, T, S); booleans (True: may attend) or floats added to the scores.
        is_causal: query t sees keys up to t + S − T (the last query sees all); none at all: its output is 0.
        scale: 1/√d when left out.
    """
    query, key, value = operands("attention", query, key, value)
    q, k, v, xp = query.data, key.data, value.data, get_namespace(query.data)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: query (B, H, T, d) = {q.shape}, key {k.shape} and value {v.shape} (B, K, S, d) do not fit; "
            "H must be a multiple of K"
        )
    (batch, heads, t, d), (kv_heads, s) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    q = q.reshape(batch, kv_heads, -1, d)  # (B, K, H/K·T, d): grouped heads are more rows of one product
    p = backend.matmul(q, k.swapaxes(-1, -2)).reshape(batch, heads, t, s)
    if attn_mask is not None:
        mask = attn_mask.data if isinstance(attn_mask, Tensor) else attn_mask
        p *= scale
        p += xp.where(mask, 0, -xp.inf).astype(q.dtype) if mask.dtype.kind == "b" else mask
    future = xp.triu(xp.full((t, s), -xp.inf, dtype=q.dtype), k=s - t + 1) if is_causal else None
    _attention_weights(p.reshape(-1, t, s), future, 1 if attn_mask is not None else scale)
    p = p.reshape(batch, kv_heads, -1, s)  # (B, K, H/K·T, S)
    y = backend.matmul(p, v).reshape(batch, heads, t, d)

    def backward(g: Array) -> tuple:
        g = g.reshape(batch, kv_heads, -1, d)
        dp = backend.matmul(g, v.swapaxes(-1, -2))  # (B, K, H/K·T, S)
        weights, dscores = p.reshape(-1, s), dp.reshape(-1, s)

        def each(start: int, stop: int) -> None:
            w, d = weights[start:stop], dscores[start:stop]
            d -= xp.einsum("ij,ij->i", d, w)[:, None]
            d *= w
            d *= scale

        in_parts(each, len(dscores), xp, width=s)
        return (
            backend.matmul(dp, k).reshape(batch, heads, t, d) if need_q else None,
            backend.matmul(dp.swapaxes(-1, -2), q) if need_k else None,
            backend.matmul(p.swapaxes(-1, -2), g) if need_v else None,
        )

    need_q, need_k, need_v = query.requires_grad, key.requires_grad, value.requires_grad
    return joint_result("attention", y, (query, key, value), backward)


def _attention_weights(scores: Array, future: Array | None, scale: float) -> None:
    """scores (N, T, S) ← softmax(scores·scale + future) over the last axis, in place.

    A query that may attend to nothing (all −inf) gets zeros, as in PyTorch, not NaN.
    """
    xp = get_namespace(scores)
    lowest = xp.finfo(scores.dtype).min

    def each(start: int, stop: int) -> None:
        p = scores[start:stop]
        if scale != 1:
            p *= scale
        if future is not None:
            p += future
        p -= xp.maximum(p.max(axis=-1, keepdims=True), lowest)
        xp.exp(p, out=p)
        p /= xp.maximum(p.sum(axis=-1, keepdims=True), 1)  # the largest adds e⁰ = 1: only empty sums are below

    in_parts(each, len(scores), xp, width=scores[0].size)
