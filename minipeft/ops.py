"""The differentiable operations: each computes its value and, beside it, the gradient of every input.

In every docstring g is dL/d(output). A gradient function captures arrays, never tensors, and never writes to g.
Operations on several inputs keep one dtype: Python numbers take the tensor's, integer tensors are converted, and
float32 with float64 is an error rather than a silent float64.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import backend
from .backend import Array, get_namespace
from .tensor import Tensor, joint_result, result

# --- helpers ----------------------------------------------------------------------------------------------------------


def tensor(x: Any) -> Tensor:
    """`x` itself, or a constant made of it."""
    return x if isinstance(x, Tensor) else Tensor(x)


def operands(op: str, *inputs: Any) -> list[Tensor]:
    """The inputs as tensors of one dtype and one array library.

    Raises:
        TypeError: two float dtypes, or two array libraries.
    """
    like = None
    for x in inputs:
        if isinstance(x, Tensor):
            if backend.is_float(x.data.dtype):
                like = x
                break
            like = x if like is None else like
    else:
        like = _float_among(inputs, like)
    return [_operand(op, x, like) for x in inputs]


def _float_among(inputs: Sequence[Any], like: Tensor | None) -> Tensor | None:
    """What sets the dtype where no tensor has floats: an array that has, else a fraction, of the default dtype."""
    for x in inputs:
        if hasattr(x, "dtype") and not isinstance(x, Tensor | np.generic) and backend.is_float(x.dtype):
            return Tensor(x)
    if like is not None and any(isinstance(x, float | np.floating) for x in inputs):
        return Tensor(like.data, dtype=backend.get_default_dtype())
    return like


def _operand(op: str, x: Any, like: Tensor | None) -> Tensor:
    if x is like or like is None:
        return tensor(x)
    xp, dtype = get_namespace(like.data), like.data.dtype
    if isinstance(x, (int, float, np.generic)):
        keep = backend.is_float(dtype) or isinstance(x, int | np.integer)
        return Tensor(xp.asarray(x, dtype=dtype if keep else backend.get_default_dtype()))
    x = tensor(x)
    if get_namespace(x.data) is not xp:
        other = get_namespace(x.data).__name__
        raise TypeError(f"{op}: one operand is {xp.__name__}'s, the other {other}'s; use .to()")
    if x.data.dtype == dtype:
        return x
    if not backend.is_float(x.data.dtype):
        return Tensor(x.data, dtype=dtype)
    raise TypeError(f"{op}: {dtype} and {x.data.dtype} do not mix; convert one with .astype()")


def sum_to(g: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum g over the axes along which an input of this shape was repeated."""
    if g.shape == shape:
        return g
    new = g.ndim - len(shape)
    repeated = [i + new for i, n in enumerate(shape) if n == 1 and g.shape[i + new] != 1]
    return g.sum(axis=(*range(new), *repeated)).reshape(shape)


def _binary(name: str, a: Any, b: Any) -> tuple[Tensor, Tensor, Array]:
    a, b = operands(name, a, b)
    try:
        return a, b, getattr(operator, name)(a.data, b.data)
    except ValueError as error:
        raise ValueError(f"{name}: shapes {a.shape} and {b.shape} do not broadcast") from error


def _axes(x: Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """`axis` as a tuple of non-negative axes; None is all of them."""
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    for i in axes:
        if not -x.ndim <= i < x.ndim:
            raise ValueError(f"axis: got {i}, the tensor has {x.ndim} axes, shape {x.shape}")
    return tuple(i % x.ndim for i in axes)


# --- arithmetic -------------------------------------------------------------------------------------------------------


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
    a, b, y = _binary("truediv", a, b)
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


# --- one number to one number -----------------------------------------------------------------------------------------


def exp(x: Any) -> Tensor:
    """eˣ; dx = g·y."""
    x = tensor(x)
    y = _array(get_namespace(x.data).exp(x.data))
    return result("exp", y, (x, lambda g: g * y))


def log(x: Any) -> Tensor:
    """ln x; dx = g/x."""
    x = tensor(x)
    value = x.data
    return result("log", get_namespace(value).log(value), (x, lambda g: g / value))


def sqrt(x: Any) -> Tensor:
    """√x; dx = g/(2y)."""
    x = tensor(x)
    y = _array(get_namespace(x.data).sqrt(x.data))
    return result("sqrt", y, (x, lambda g: 0.5 * g / y))


def tanh(x: Any) -> Tensor:
    """tanh x; dx = g·(1 − y²)."""
    x = tensor(x)
    y = _array(get_namespace(x.data).tanh(x.data))
    return result("tanh", y, (x, lambda g: g * (1 - y * y)))


def sigmoid(x: Any) -> Tensor:
    """σ(x) = 1/(1 + e⁻ˣ); dx = g·y·(1 − y)."""
    x = tensor(x)
    y = _array(_sigmoid(x.data))
    return result("sigmoid", y, (x, lambda g: g * y * (1 - y)))


def relu(x: Any) -> Tensor:
    """max(x, 0); dx = g where x > 0."""
    x = tensor(x)
    y = _array(get_namespace(x.data).maximum(x.data, 0))
    return result("relu", y, (x, lambda g: g * (y > 0)))


def silu(x: Any) -> Tensor:
    """x·σ(x); dx = g·(σ + x·σ·(1 − σ))."""
    x = tensor(x)
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
    x = tensor(x)
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
    """silu(gate)·up, the gated activation of Llama's MLP (Shazeer 2020); both inputs (..., d)."""
    gate, up = operands("swiglu", gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {gate.shape} and up {up.shape} must have one shape")
    x, u = gate.data, up.data

    def grad_gate(g: Array) -> Array:
        s = _sigmoid(x)
        return g * u * (s * (1 + x * (1 - s)))

    return result("swiglu", x * _sigmoid(x) * u, (gate, grad_gate), (up, lambda g: g * (x * _sigmoid(x))))


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
    xp = get_namespace(x.data)
    keep = backend.generator(rng).random(x.shape, dtype=np.float32) >= p
    mask = xp.asarray(keep).astype(x.dtype) * (1 / (1 - p))
    return result("dropout", x.data * mask, (x, lambda g: g * mask))


def _sigmoid(x: Array) -> Array:
    """1/(1 + e⁻ˣ) as ½(1 + tanh(x/2)): no overflow for large −x."""
    return 0.5 * (1 + get_namespace(x).tanh(0.5 * x))


def _array(x: Array) -> Array:
    return np.asarray(x) if isinstance(x, np.generic) else x


# --- many to few ------------------------------------------------------------------------------------------------------


def sum(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """Σ x over `axis`; dx = g, repeated."""
    x = tensor(x)
    axes, shape, xp = _axes(x.data, axis), x.shape, get_namespace(x.data)
    return result(
        "sum",
        x.data.sum(axis=axes, keepdims=keepdims),
        (x, lambda g: xp.broadcast_to(_expand(g, axes, shape), shape)),
    )


def mean(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis`; dx = g/n, repeated."""
    x = tensor(x)
    axes, shape, xp = _axes(x.data, axis), x.shape, get_namespace(x.data)
    n = int(np.prod([shape[i] for i in axes]))
    return result(
        "mean",
        x.data.mean(axis=axes, keepdims=keepdims),
        (x, lambda g: xp.broadcast_to(_expand(g, axes, shape) / n, shape)),
    )


def max(x: Any, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The largest element over `axis`; g is shared equally by equal largest elements (PyTorch's amax)."""
    x = tensor(x)
    axes, shape, value = _axes(x.data, axis), x.shape, x.data
    y = _array(value.max(axis=axes, keepdims=keepdims))

    def grad(g: Array) -> Array:
        largest = (value == _expand(y, axes, shape)).astype(value.dtype)
        return largest * (_expand(g, axes, shape) / largest.sum(axis=axes, keepdims=True))

    return result("max", y, (x, grad))


def _expand(g: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """g with the summed axes back, of length 1."""
    return g.reshape(tuple(1 if i in axes else n for i, n in enumerate(shape)))


# --- moving elements --------------------------------------------------------------------------------------------------


def reshape(x: Any, *shape: Any) -> Tensor:
    """The same elements in another shape: `reshape(x, 2, 3)` or `reshape(x, (2, 3))`, one −1 allowed."""
    x = tensor(x)
    new = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    old = x.shape
    try:
        return result("reshape", x.data.reshape(tuple(new)), (x, lambda g: g.reshape(old)))
    except ValueError as error:
        raise ValueError(f"reshape: {x.size} elements of shape {old} do not fill {tuple(new)}") from error


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in another order, reversed when none is given: `transpose(x, 1, 0)` or `transpose(x, (1, 0))`."""
    x = tensor(x)
    order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
    order = tuple(i % x.ndim for i in order) if order else tuple(reversed(range(x.ndim)))
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"axes: got {order}; each of the {x.ndim} axes of shape {x.shape} once is accepted")
    back = tuple(order.index(i) for i in range(x.ndim))
    return result("transpose", x.data.transpose(order), (x, lambda g: g.transpose(back)))


def swapaxes(x: Any, a: int, b: int) -> Tensor:
    """Two axes exchanged."""
    x = tensor(x)
    _axes(x.data, (a, b))
    return result("swapaxes", x.data.swapaxes(a, b), (x, lambda g: g.swapaxes(a, b)))


def getitem(x: Any, index: Any) -> Tensor:
    """x[index] by NumPy's rules (slices, integers, integer and boolean arrays); dx = g added where it was taken."""
    x = tensor(x)
    shape, xp = x.shape, get_namespace(x.data)
    index = tuple(_plain(i, xp) for i in index) if isinstance(index, tuple) else _plain(index, xp)
    parts = index if isinstance(index, tuple) else (index,)
    repeats = any(hasattr(i, "dtype") and i.dtype.kind in "iu" and i.ndim for i in parts)

    def grad(g: Array) -> Array:
        out = xp.zeros(shape, dtype=g.dtype)
        if repeats:  # an integer array may name an element twice: add, do not assign
            xp.add.at(out, index, g)
        else:
            out[index] = g
        return out

    return result("getitem", x.data[index], (x, grad))


def _plain(index: Any, xp: Any) -> Any:
    """An index without tensors and lists; its arrays are copies (what the caller writes to them later does no harm)."""
    if isinstance(index, Tensor):
        index = index.data
    return xp.array(index) if isinstance(index, list) or getattr(index, "ndim", 0) else index


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after the other along an axis; each gets its piece of g."""
    parts = operands("concatenate", *tensors)
    (axis,) = _axes(parts[0].data, axis)
    ends = np.cumsum([p.shape[axis] for p in parts]).tolist()

    def piece(start: int, end: int) -> Any:
        index = (slice(None),) * axis + (slice(start, end),)
        return lambda g: g[index]

    data = get_namespace(parts[0].data).concatenate([p.data for p in parts], axis=axis)
    return result("concatenate", data, *[(p, piece(s, e)) for p, s, e in zip(parts, [0, *ends], ends, strict=False)])


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    parts = operands("stack", *tensors)
    data = get_namespace(parts[0].data).stack([p.data for p in parts], axis=axis)
    before = (slice(None),) * (axis % data.ndim)

    def layer(i: int) -> Any:
        return lambda g: g[(*before, i)]

    return result("stack", data, *[(p, layer(i)) for i, p in enumerate(parts)])


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition holds, else b; each gets g there and 0 elsewhere."""
    a, b = operands("where", a, b)
    xp, sa, sb = get_namespace(a.data), a.shape, b.shape
    chosen = xp.asarray(condition.data if isinstance(condition, Tensor) else condition).astype(bool, copy=False)
    return result(
        "where",
        xp.where(chosen, a.data, b.data),
        (a, lambda g: sum_to(g * chosen, sa)),
        (b, lambda g: sum_to(g * ~chosen, sb)),
    )


def embedding(ids: Any, weight: Tensor) -> Tensor:
    """Rows of `weight` (V, d) named by integer `ids` (...): (..., d); dweight adds every row's g.

    Raises:
        ValueError: an id outside [0, V).
    """
    ids = ids.data if isinstance(ids, Tensor) else get_namespace(weight.data).asarray(ids)
    vocabulary, xp = weight.shape[0], get_namespace(weight.data)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(f"ids: got {int(ids.min())} to {int(ids.max())}; weight has rows 0 to {vocabulary - 1}")
    shape = weight.shape

    def grad(g: Array) -> Array:
        out = xp.zeros(shape, dtype=g.dtype)
        xp.add.at(out, ids.reshape(-1), g.reshape(-1, shape[1]))
        return out

    return result("embedding", weight.data[ids], (weight, grad))


# --- fused: one node with a hand-derived backward ---------------------------------------------------------------------


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
    x = tensor(x)
    _axes(x.data, axis)
    y = _softmax(x.data, axis)
    return result("softmax", y, (x, lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True))))


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """x − ln Σeˣ along an axis; dx = g − softmax(x)·Σ g."""
    x = tensor(x)
    _axes(x.data, axis)
    xp = get_namespace(x.data)
    y = x.data - x.data.max(axis=axis, keepdims=True)
    y = y - xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return result("log_softmax", y, (x, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)))


def _softmax(x: Array, axis: int) -> Array:
    y = get_namespace(x).exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


def layer_norm(x: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = x̂·w + b with x̂ = (x − mean)/√(var + eps) over the last axis. Ba, Kiros and Hinton 2016, eq. 3.

    dx = (h − mean(h) − x̂·mean(h·x̂))/√(var + eps) with h = g·w; dw = Σ g·x̂, db = Σ g.
    """
    x, *affine = operands("layer_norm", x, *[p for p in (weight, bias) if p is not None])
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
    x, *affine = operands("rms_norm", x, *([weight] if weight is not None else []))
    d = _check_affine("rms_norm", x, affine)
    xp = get_namespace(x.data)
    scale = 1 / xp.sqrt((x.data * x.data).mean(axis=-1, keepdims=True) + eps)
    normed = x.data * scale
    w = weight.data if weight is not None else None

    def grad_x(g: Array) -> Array:
        h = g if w is None else g * w
        return scale * (h - normed * (h * normed).mean(axis=-1, keepdims=True))

    edges = [(x, grad_x)]
    if weight is not None:
        edges.append((weight, lambda g: (g * normed).reshape(-1, d).sum(axis=0)))
    return result("rms_norm", normed if w is None else normed * w, *edges)


def _check_affine(op: str, x: Tensor, affine: list[Tensor]) -> int:
    for p in affine:
        if p.shape != x.shape[-1:]:
            raise ValueError(f"{op}: got weight or bias {p.shape}; x {x.shape} needs {x.shape[-1:]}")
    return x.shape[-1]


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
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return get_namespace(x).concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


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
    scores = backend.matmul(q, k.swapaxes(-1, -2)).reshape(batch, heads, t, s)
    scores *= scale
    if is_causal:
        scores += xp.triu(xp.full((t, s), -xp.inf, dtype=q.dtype), k=s - t + 1)
    if attn_mask is not None:
        mask = attn_mask.data if isinstance(attn_mask, Tensor) else attn_mask
        scores += xp.where(mask, 0, -xp.inf).astype(q.dtype) if mask.dtype.kind == "b" else mask
    p = _attention_weights(scores).reshape(batch, kv_heads, -1, s)  # (B, K, H/K·T, S)
    y = backend.matmul(p, v).reshape(batch, heads, t, d)

    def backward(g: Array) -> tuple:
        g = g.reshape(batch, kv_heads, -1, d)
        dp = backend.matmul(g, v.swapaxes(-1, -2))  # (B, K, H/K·T, S)
        dp -= (dp * p).sum(axis=-1, keepdims=True)
        dp *= p
        dp *= scale
        return (
            backend.matmul(dp, k).reshape(batch, heads, t, d) if need_q else None,
            backend.matmul(dp.swapaxes(-1, -2), q) if need_k else None,
            backend.matmul(p.swapaxes(-1, -2), g) if need_v else None,
        )

    need_q, need_k, need_v = query.requires_grad, key.requires_grad, value.requires_grad
    return joint_result("attention", y, (query, key, value), backward)


def _attention_weights(scores: Array) -> Array:
    """Softmax over the last axis; a query that may attend to nothing (all −inf) gets zeros, as in PyTorch, not NaN."""
    xp = get_namespace(scores)
    p = xp.exp(scores - xp.maximum(scores.max(axis=-1, keepdims=True), xp.finfo(scores.dtype).min))
    p /= xp.maximum(p.sum(axis=-1, keepdims=True), 1)  # the largest score adds e⁰ = 1: only empty sums are below
    return p


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

    The gradients are formed in the same pass, while a chunk's probabilities are at hand, and only scaled in backward.
    """
    x, weight = operands("linear_cross_entropy", x, weight)
    xp, rows, w = get_namespace(x.data), x.data, weight.data
    if rows.ndim != 2 or w.ndim != 2 or rows.shape[1] != w.shape[1]:
        raise ValueError(f"linear_cross_entropy: x (N, d) = {rows.shape} and weight (V, d) = {w.shape} do not fit")
    targets, kept, n = _check_targets(xp, (rows.shape[0], w.shape[0]), targets, ignore_index)
    dx = xp.empty_like(rows) if x.requires_grad else None
    dw = xp.zeros_like(w) if weight.requires_grad else None
    loss = xp.zeros((), dtype=rows.dtype)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        z = backend.matmul(rows[part], w.T)  # (chunk, V)
        z -= z.max(axis=1, keepdims=True)
        each = xp.arange(len(z))
        picked = z[each, targets[part]]
        xp.exp(z, out=z)
        total = z.sum(axis=1, keepdims=True)
        losses = xp.log(total[:, 0]) - picked
        z /= total
        z[each, targets[part]] -= 1
        if kept is not None:
            losses *= kept[part]
            z *= kept[part, None]
        loss = loss + losses.sum()
        if dx is not None:
            backend.matmul(z, w, out=dx[part])
        if dw is not None:
            dw += backend.matmul(z.T, rows[part])
    return result("linear_cross_entropy", loss / n, (x, lambda g: dx * (g / n)), (weight, lambda g: dw * (g / n)))


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


# --- what a Tensor can do ---------------------------------------------------------------------------------------------


def _compare(name: str) -> Any:
    def compare(a: Tensor, b: Any) -> Tensor:
        a, b = operands(name, a, b)
        return Tensor(getattr(operator, name)(a.data, b.data))

    return compare


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _compare(_name))

Tensor.__add__, Tensor.__radd__ = add, add
Tensor.__sub__, Tensor.__rsub__ = sub, lambda a, b: sub(b, a)
Tensor.__mul__, Tensor.__rmul__ = mul, mul
Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda a, b: div(b, a)
Tensor.__pow__, Tensor.__rpow__ = power, lambda a, b: power(b, a)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda a, b: matmul(b, a)
Tensor.__neg__, Tensor.__getitem__ = neg, getitem
Tensor.sum, Tensor.mean, Tensor.max = sum, mean, max
Tensor.reshape, Tensor.transpose, Tensor.swapaxes = reshape, transpose, swapaxes
Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh = exp, log, sqrt, tanh
Tensor.T = property(transpose, doc="The axes reversed.")

_UFUNCS = {
    "add": add, "subtract": sub, "multiply": mul, "divide": div, "power": power, "matmul": matmul, "negative": neg,
    "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh,
    "equal": Tensor.__eq__, "not_equal": Tensor.__ne__, "less": Tensor.__lt__, "less_equal": Tensor.__le__,
    "greater": Tensor.__gt__, "greater_equal": Tensor.__ge__,
}  # fmt: skip


def _array_ufunc(self: Tensor, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Tensor:
    """`np.exp(t)`, `array * t`: NumPy's functions on a tensor are the operations here."""
    op = _UFUNCS.get(ufunc.__name__)
    if op is None or method != "__call__" or options:
        raise TypeError(f"np.{ufunc.__name__} has no gradient here; use minipeft.ops, or t.numpy() for plain values")
    return op(*[tensor(x) if isinstance(x, np.ndarray) else x for x in inputs])


Tensor.__array_ufunc__ = _array_ufunc
