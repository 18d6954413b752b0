"""Two inputs, broadcast: + − · / ** and the matrix product. g is dL/d(output)."""

from __future__ import annotations

import operator
from typing import Any

from .. import backend
from ..backend import Array, get_namespace
from ..tensor import Tensor, result
from .inputs import floats, operands, sum_to, tensor


def _binary(name: str, a: Any, b: Any, convert: Any = operands) -> tuple[Tensor, Tensor, Array]:
    a, b = convert(name, a, b)
    try:
        return a, b, getattr(operator, name)(a.data, b.data)
    except ValueError as error:
        if "broadcast" not in str(error):  # integers have no negative integer powers
            raise
        raise ValueError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast") from error


def add(a: Any, b: Any) -> Tensor:
    """a + b; da = g, db = g."""
    a, b, y = _binary("add", a, b)
    sa, sb = a.shape, b.shape
    return result("add", y, (a, lambda g: sum_to(g, sa)), (b, lambda g: sum_to(g, sb)))


def sub(a: Any, b: Any) -> Tensor:
    """a − b; da = g, db = −g."""
    a, b, y = _binary("sub", a, b)
    sa, sb = a.shape, b.shape
    return result("sub", y, (a, lambda g: sum_to(g, sa)), (b, lambda g: sum_to(-g, sb)))


def mul(a: Any, b: Any) -> Tensor:
    """a · b; da = g·b, db = g·a."""
    a, b, y = _binary("mul", a, b)
    xa, xb, sa, sb = a.data, b.data, a.shape, b.shape
    return result("mul", y, (a, lambda g: sum_to(g * xb, sa)), (b, lambda g: sum_to(g * xa, sb)))


def div(a: Any, b: Any) -> Tensor:
    """a / b; da = g/b, db = −g·(a/b)/b."""
    a, b, y = _binary("truediv", a, b, floats)
    xb, sa, sb = b.data, a.shape, b.shape
    return result("div", y, (a, lambda g: sum_to(g / xb, sa)), (b, lambda g: sum_to(-g * y / xb, sb)))


def power(a: Any, b: Any) -> Tensor:
    """a ** b; da = g·b·a^(b−1) (0 where b = 0), db = g·y·ln a (0 where a = 0, the limit for b > 0)."""
    a, b, y = _binary("pow", a, b)
    xa, xb, sa, sb = a.data, b.data, a.shape, b.shape
    xp = get_namespace(xa)

    def grad_b(g: Array) -> Array:
        zero = xa == 0
        return sum_to(g * y * xp.where(zero, 0, xp.log(xp.where(zero, 1, xa))).astype(xa.dtype, copy=False), sb)

    def grad_a(g: Array) -> Array:
        lower = xp.where(xb == 0, 1, xb - 1).astype(xa.dtype, copy=False)  # 0·a⁻¹ is NaN where a = 0, 0·a¹ is not
        return sum_to(g * xb * xa**lower, sa)

    return result("pow", y, (a, grad_a), (b, grad_b))


def neg(x: Any) -> Tensor:
    """−x; dx = −g."""
    x = tensor(x)
    return result("neg", -x.data, (x, lambda g: -g))


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b as NumPy defines it (leading axes broadcast, 1-D operands are a row and a column); da = g bᵀ, db = aᵀ g."""
    a, b = operands("matmul", a, b)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not fit; a's last axis meets b's last but one")
    xa = a.data[None, :] if a.ndim == 1 else a.data  # (..., m, k)
    xb = b.data[:, None] if b.ndim == 1 else b.data  # (..., k, n)
    y = backend.matmul(xa, xb)  # (..., m, n)
    sa, sb, full = a.shape, b.shape, y.shape
    squeezed = full[: len(full) - 2] + full[-2:-1] * (a.ndim > 1) + full[-1:] * (b.ndim > 1)

    def grad_a(g: Array) -> Array:
        return sum_to(backend.matmul(g.reshape(full), xb.swapaxes(-1, -2)), xa_shape).reshape(sa)

    def grad_b(g: Array) -> Array:
        return sum_to(backend.matmul(xa.swapaxes(-1, -2), g.reshape(full)), xb_shape).reshape(sb)

    xa_shape, xb_shape = xa.shape, xb.shape
    return result("matmul", y.reshape(squeezed), (a, grad_a), (b, grad_b))
