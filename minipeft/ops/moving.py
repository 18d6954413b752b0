"""Elements put elsewhere: shapes, axes, indexing, joining, choosing. Each element's g goes back where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array, get_namespace
from ..tensor import Tensor, result
from .inputs import as_ints, normal_axes, operands, sum_to, tensor


def reshape(x: Any, *shape: Any) -> Tensor:
    """The same elements in another shape: `reshape(x, 2, 3)` or `reshape(x, (2, 3))`, one −1 allowed."""
    x = tensor(x)
    new, old = as_ints(shape[0]) if len(shape) == 1 else shape, x.shape
    try:
        return result("reshape", x.data.reshape(new), (x, lambda g: g.reshape(old)))
    except ValueError as error:
        raise ValueError(f"reshape: {x.size} elements of shape {old} do not fill {new}") from error


def transpose(x: Any, *axes: Any) -> Tensor:
    """The axes in another order, reversed when none is given: `transpose(x, 1, 0)` or `transpose(x, (1, 0))`."""
    x = tensor(x)
    order = axes[0] if len(axes) == 1 else axes or None
    order = tuple(reversed(range(x.ndim))) if order is None else normal_axes(x.data, order)
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"axes: got {order}; each of the {x.ndim} axes of shape {x.shape} once is accepted")
    back = tuple(order.index(i) for i in range(x.ndim))
    return result("transpose", x.data.transpose(order), (x, lambda g: g.transpose(back)))


def swapaxes(x: Any, a: int, b: int) -> Tensor:
    """Two axes exchanged."""
    x = tensor(x)
    normal_axes(x.data, (a, b))
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
    """An index without tensors and sequences; its arrays are copies: what is written to them later does no harm."""
    if isinstance(index, Tensor):
        index = index.data
    if isinstance(index, list | tuple | range):
        return xp.array(index) if len(index) else xp.array(index, dtype=int)
    return xp.array(index) if getattr(index, "ndim", 0) else index


def _several(op: str, tensors: Sequence[Any]) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{op}: tensors: got none; at least one is accepted")
    return operands(op, *tensors)


def concatenate(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after the other along an axis; each gets its piece of g."""
    parts = _several("concatenate", tensors)
    (axis,) = normal_axes(parts[0].data, (axis,))
    ends = np.cumsum([p.shape[axis] for p in parts]).tolist()

    def piece(start: int, end: int) -> Any:
        index = (slice(None),) * axis + (slice(start, end),)
        return lambda g: g[index]

    data = get_namespace(parts[0].data).concatenate([p.data for p in parts], axis=axis)
    return result("concatenate", data, *[(p, piece(s, e)) for p, s, e in zip(parts, [0, *ends], ends, strict=False)])


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape along a new axis."""
    parts = _several("stack", tensors)
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
        (a, lambda g: sum_to(xp.where(chosen, g, g.dtype.type(0)), sa)),  # g·chosen has NaN where g is infinite
        (b, lambda g: sum_to(xp.where(chosen, g.dtype.type(0), g), sb)),
    )


def embedding(ids: Any, weight: Tensor) -> Tensor:
    """Rows of `weight` (V, d) named by integer `ids` (...): (..., d); dweight adds every row's g.

    Raises:
        ValueError: an id outside [0, V).
    """
    weight = tensor(weight)
    xp, shape = get_namespace(weight.data), weight.shape
    if len(shape) != 2:
        raise ValueError(f"embedding: weight (V, d) has shape {shape}")
    ids, vocabulary = ids.data if isinstance(ids, Tensor) else xp.asarray(ids), shape[0]
    if ids.dtype.kind not in "iu":
        raise TypeError(f"ids: expected integers, got {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(f"ids: got {int(ids.min())} to {int(ids.max())}; weight has rows 0 to {vocabulary - 1}")

    def grad(g: Array) -> Array:
        out = xp.zeros(shape, dtype=g.dtype)
        xp.add.at(out, ids.reshape(-1), g.reshape(-1, shape[1]))
        return out

    return result("embedding", weight.data[ids], (weight, grad))
