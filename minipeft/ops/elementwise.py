"""One number to one number. g is dL/d(output)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace, keep_array
from ..tensor import Tensor, joint_result, result
from ..threads import in_parts
from .inputs import floats, tensor


def astype(x: Any, dtype: Any) -> Tensor:
    """x in another dtype; dx = g in x's own. Integers have no gradient: in them it is a constant."""
    x = tensor(x)
    own, y = x.data.dtype, x.data.astype(dtype, copy=False)
    return result("astype", y, (x, lambda g: g.astype(own))) if backend.is_float(y.dtype) else Tensor(y)


def exp(x: Any) -> Tensor:
    """eˣ; dx = g·y."""
    (x,) = floats("exp", x)
    y = keep_array(get_namespace(x.data).exp(x.data))
    return result("exp", y, (x, lambda g: g * y))


def log(x: Any) -> Tensor:
    """ln x; dx = g/x."""
    (x,) = floats("log", x)
    value = x.data
    return result("log", get_namespace(value).log(value), (x, lambda g: g / value))


def sqrt(x: Any) -> Tensor:
    """√x; dx = g/(2y)."""
    (x,) = floats("sqrt", x)
    y = keep_array(get_namespace(x.data).sqrt(x.data))
    return result("sqrt", y, (x, lambda g: 0.5 * g / y))


def tanh(x: Any) -> Tensor:
    """tanh x; dx = g·(1 − y²)."""
    (x,) = floats("tanh", x)
    y = keep_array(get_namespace(x.data).tanh(x.data))
    return result("tanh", y, (x, lambda g: g * (1 - y * y)))


def sigmoid(x: Any) -> Tensor:
    """σ(x) = 1/(1 + e⁻ˣ); dx = g·y·(1 − y)."""
    (x,) = floats("sigmoid", x)
    y = keep_array(_sigmoid(x.data))
    return result("sigmoid", y, (x, lambda g: g * y * (1 - y)))


def relu(x: Any) -> Tensor:
    """max(x, 0); dx = g·(x > 0)."""
    x = tensor(x)
    y = keep_array(get_namespace(x.data).maximum(x.data, 0))
    return result("relu", y, (x, lambda g: g * (y > 0)))


def silu(x: Any) -> Tensor:
    """x·σ(x); dx = g·(σ + x·σ·(1 − σ))."""
    (x,) = floats("silu", x)
    value = x.data

    def grad(g: Array) -> Array:
        s = _sigmoid(value)
        return g * (s * (1 + value * (1 - s)))

    return result("silu", value * _sigmoid(value), (x, grad))


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """x·Φ(x) with the normal distribution's Φ, or its tanh form (`approximate="tanh"`). Hendrycks and Gimpel 2016.

    "none": y = x/2·(1 + erf(x/√2)), dx = g·(Φ + x·φ).
    "tanh": y = x/2·(1 + t) with t = tanh(√(2/π)(x + 0.044715 x³)).
    """
    (x,) = floats("gelu", x)
    value, xp = x.data, get_namespace(x.data)
    if approximate == "none":
        phi = 0.5 * (1 + backend.erf(value * 0.5**0.5))
        density = (2 * np.pi) ** -0.5
        return result("gelu", value * phi, (x, lambda g: g * (phi + value * (xp.exp(-0.5 * value * value) * density))))
    if approximate != "tanh":
        raise ValueError(f'approximate: got {approximate!r}; accepted are "none" and "tanh"')
    c = (2 / np.pi) ** 0.5
    t = xp.tanh(c * (value + 0.044715 * value**3))

    def grad(g: Array) -> Array:
        return g * (0.5 * (1 + t) + 0.5 * value * (1 - t * t) * (c * (1 + 3 * 0.044715 * value * value)))

    return result("gelu", 0.5 * value * (1 + t), (x, grad))


def swiglu(gate: Any, up: Any) -> Tensor:
    """silu(gate)·up, the gated activation of Llama's MLP (Shazeer 2020); both inputs (..., d).

    dup = g·silu(gate), dgate = g·up·silu'(gate), from one sigmoid. It takes the time of `silu(gate) * up` and keeps
    gate and up alone for backward, where that keeps silu(gate) as well; in parts its temporaries are small.
    """
    gate, up = floats("swiglu", gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape")
    xp, shape = get_namespace(gate.data), gate.shape
    x, up_data = gate.data.reshape(-1), up.data.reshape(-1)
    u = up_data if gate.requires_grad else None  # kept for dgate alone
    y = xp.empty_like(x)

    def forward(start: int, stop: int) -> None:
        part = slice(start, stop)
        silu = _sigmoid(x[part])
        silu *= x[part]
        xp.multiply(silu, up_data[part], out=y[part])

    def backward(g: Array) -> tuple[Array | None, Array]:
        g = g.reshape(-1)
        dx, du = None if u is None else xp.empty_like(x), xp.empty_like(x)

        def each(start: int, stop: int) -> None:
            part = slice(start, stop)
            sigmoid = _sigmoid(x[part])
            silu = sigmoid * x[part]
            xp.multiply(silu, g[part], out=du[part])
            if u is None:
                return
            d = xp.multiply(g[part], u[part], out=dx[part])
            d *= sigmoid + silu * (1 - sigmoid)  # silu' = σ + x·σ·(1 − σ)

        in_parts(each, x.size, xp)
        return None if dx is None else dx.reshape(shape), du.reshape(shape)

    in_parts(forward, x.size, xp)
    return joint_result("swiglu", y.reshape(shape), (gate, up), backward)


def dropout(x: Any, p: float = 0.5, training: bool = True, rng: np.random.Generator | int | None = None) -> Tensor:
    """Zero each element with probability p and divide the rest by 1 − p; the identity unless training.

    Raises:
        ValueError: p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"p: got {p}; a probability in [0, 1) is accepted")
    x = tensor(x)
    if not training or p == 0:
        return x
    (x,) = floats("dropout", x)
    xp = get_namespace(x.data)
    keep = backend.generator(rng).random(x.shape, dtype=np.float32) >= p
    mask = xp.asarray(keep).astype(x.dtype) * (1 / (1 - p))
    return result("dropout", x.data * mask, (x, lambda g: g * mask))


def _sigmoid(x: Array) -> Array:
    """1/(1 + e⁻ˣ) as ½(1 + tanh(x/2)): no overflow for large −x."""
    xp = get_namespace(x)
    y = 0.5 * x
    if y.ndim:  # in place, where there is a place
        xp.tanh(y, out=y)
        y += 1
        y *= 0.5
        return y
    return 0.5 * (1 + xp.tanh(y))
