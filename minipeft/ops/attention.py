"""Rotary positions and scaled dot-product attention, each one node with a hand-derived backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from ..tensor import Tensor, joint_result, result
from ..threads import in_parts
from .inputs import floats


def rope_table(length: int, dim: int, theta: float = 10000.0, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position·θ^(−2i/dim), each (length, dim/2). Su et al. 2021, eq. 15."""
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, dim, 2) / dim))
    dtype = dtype or backend.get_default_dtype()
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Any, cos: Array, sin: Array) -> Tensor:
    """Rotary positions: the pairs (xᵢ, xᵢ₊d/₂) turned by their angle, Hugging Face's "rotate half" order.

    x (..., T, d), cos and sin (T, d/2), see `rope_table`. The gradient is the rotation by the opposite angle.
    """
    (x,) = floats("rope", x)
    if x.ndim < 2 or x.shape[-1] % 2 or not cos.shape == sin.shape == (x.shape[-2], x.shape[-1] // 2):
        raise ValueError(f"rope: x {x.shape} must end in (T, d), d even; cos {cos.shape}, sin {sin.shape} be (T, d/2)")
    return result("rope", _rotate(x.data, cos, sin), (x, lambda g: _rotate(g, cos, -sin)))


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x·(cos, cos) + (x₂, x₁)·(−sin, sin), with x₁ and x₂ the halves of the last axis."""
    xp, half = get_namespace(x), x.shape[-1] // 2
    twice = xp.concatenate([cos, cos], axis=-1)  # (T, d)
    signed = xp.stack([-sin, sin], axis=-2)  # (T, 2, d/2)
    y = xp.empty_like(x)  # in x's order in memory: heads that are views of (B, T, H·d) stay so
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

    With p = softmax(…), dp = g vᵀ and ds = p·(dp − Σ dp·p):  dq = ds k·scale,  dk = dsᵀ q·scale,  dv = pᵀ g; for dk and
    dv summed over the heads that share them.

    Args:
        query: (B, H, T, d).
        key, value: (B, K, S, d) with H a multiple of K: H/K query heads share one key and value head.
        attn_mask: broadcasts to (B, H, T, S); booleans (True: may attend) or floats added to the scores.
        is_causal: query t sees keys up to t + S − T (the last query sees all); none at all: its output is 0.
        scale: 1/√d when left out.
    """
    query, key, value = floats("attention", query, key, value)
    q, k, v, xp = query.data, key.data, value.data, get_namespace(query.data)
    fit = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fit or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: query (B, H, T, d) = {q.shape}, key {k.shape} and value {v.shape} (B, K, S, d) do not fit; "
            "H must be a multiple of K"
        )
    (batch, heads, t, d), (kv_heads, s) = q.shape, k.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    mask = None if attn_mask is None else _added(xp, attn_mask, (batch, heads, t, s), q.dtype)
    blocks = _blocks(t, s) if is_causal else [(slice(0, t), s)]
    scaled, weights = [], []  # q·scale and p, block by block
    y = _zeros_by_token(xp, q)
    for rows, seen in blocks:
        grouped = (q[:, :, rows] * scale).reshape(batch, kv_heads, -1, d)  # (B, K, H/K·n, d): more rows of one product
        p = backend.matmul(grouped, k[:, :, :seen].swapaxes(-1, -2))  # (B, K, H/K·n, seen)
        scores = p.reshape(batch, heads, -1, seen)
        if mask is not None:
            scores += mask[:, :, rows, :seen]
        _softmax(scores.reshape(batch * heads, -1, seen), is_causal)
        y[:, :, rows] = backend.matmul(p, v[:, :, :seen]).reshape(batch, heads, -1, d)
        scaled.append(grouped)
        weights.append(p)

    def backward(g: Array) -> tuple:
        dq, dk, dv = (_zeros_by_token(xp, x) if need else None for x, need in zip((g, k, v), needs, strict=True))
        for (rows, seen), grouped, p in zip(blocks, scaled, weights, strict=True):
            dy = g[:, :, rows].reshape(batch, kv_heads, -1, d)
            ds = backend.matmul(dy, v[:, :, :seen].swapaxes(-1, -2))  # dp, (B, K, H/K·n, seen)
            _softmax_backward(ds.reshape(-1, seen), p.reshape(-1, seen))
            if dq is not None:
                xp.multiply(backend.matmul(ds, k[:, :, :seen]).reshape(batch, heads, -1, d), scale, out=dq[:, :, rows])
            if dk is not None:
                dk[:, :, :seen] += backend.matmul(ds.swapaxes(-1, -2), grouped)
            if dv is not None:
                dv[:, :, :seen] += backend.matmul(p.swapaxes(-1, -2), dy)
        return dq, dk, dv

    needs = query.requires_grad, key.requires_grad, value.requires_grad
    return joint_result("attention", y, (query, key, value), backward)


def _added(xp: ModuleType, mask: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """The mask as numbers to add to the scores (B, H, T, S)."""
    if isinstance(mask, Tensor) and mask.requires_grad:
        raise ValueError("attn_mask: got a tensor that requires a gradient, which a mask is not given; pass .detach()")
    mask = xp.asarray(mask.data if isinstance(mask, Tensor) else mask)
    if mask.dtype.kind == "b":
        mask = xp.where(mask, 0, -xp.inf).astype(dtype)
    if not backend.is_float(mask.dtype):
        raise TypeError(f"attn_mask: got {mask.dtype}; booleans (True: may attend) and floats (added) are accepted")
    try:
        return xp.broadcast_to(mask, shape)
    except ValueError as error:
        raise ValueError(f"attn_mask: shape {mask.shape} does not broadcast to (B, H, T, S) = {shape}") from error


QUERIES = 64  # in a block of causal attention


def _blocks(t: int, s: int) -> list[tuple[slice, int]]:
    """Of t queries that end where s keys end, slices of `QUERIES`, and how many keys the last of each slice sees.

    No product and no exponential is spent on keys that a whole block does not see, nor are their weights kept for
    backward: of 256 tokens that is 3/8 of all.
    """
    stops = [min(start + QUERIES, t) for start in range(0, t, QUERIES)]
    blocks = [(slice(i * QUERIES, stop), stop + s - t) for i, stop in enumerate(stops)]
    return [(rows, seen) for rows, seen in blocks if seen > 0]


def _zeros_by_token(xp: ModuleType, like: Array) -> Array:
    """(B, H, T, d) of zeros that lie as (B, T, H, d), so that heads become features without a copy."""
    batch, heads, t, d = like.shape
    return xp.zeros((batch, t, heads, d), dtype=like.dtype).swapaxes(1, 2)


def _softmax(scores: Array, is_causal: bool) -> None:
    """scores (N, n, S) ← softmax over the last axis, in place; causal: the last of the n queries sees all S keys, each
    other one key less than the next.

    A query that may attend to nothing (all −inf) gets zeros, as in PyTorch, not NaN.
    """
    xp, (n, s) = get_namespace(scores), scores.shape[1:]
    lowest, tail = xp.finfo(scores.dtype).min, max(0, s - n + 1)  # all see the keys before the tail
    future = xp.triu(xp.full((n, s - tail), -xp.inf, dtype=scores.dtype), k=s - n + 1 - tail) if is_causal else None

    def each(start: int, stop: int) -> None:
        p = scores[start:stop]
        if future is not None:
            p[:, :, tail:] += future
        p -= xp.maximum(p.max(axis=-1, keepdims=True), lowest)
        xp.exp(p, out=p)
        p /= xp.maximum(p.sum(axis=-1, keepdims=True), 1)  # the largest adds e⁰ = 1: only empty sums are below

    in_parts(each, len(scores), xp, width=n * s)


def _softmax_backward(dp: Array, p: Array) -> None:
    """dp (N, S) ← p·(dp − Σ dp·p), in place."""
    xp = get_namespace(dp)

    def each(start: int, stop: int) -> None:
        d, w = dp[start:stop], p[start:stop]
        d -= xp.einsum("ij,ij->i", d, w)[:, None]
        d *= w

    in_parts(each, len(dp), xp, width=dp.shape[-1])
