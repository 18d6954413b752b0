"""What operations do with their inputs: one dtype, one array library, broadcasting undone, axes counted from 0."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from ..tensor import Tensor


def tensor(x: Any) -> Tensor:
    """`x` itself, or a constant made of it."""
    return x if isinstance(x, Tensor) else Tensor(x)


def operands(op: str, *inputs: Any) -> list[Tensor]:
    """The inputs as tensors of one dtype and one array library.

    Raises:
        TypeError: two float dtypes, or two array libraries.
    """
    if _alike(inputs):  # the common case, at a third of the time
        return list(inputs)
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


def floats(op: str, *inputs: Any) -> list[Tensor]:
    """`operands` for an operation that has no meaning in integers: they take the default dtype, as in PyTorch."""
    inputs = operands(op, *inputs)
    if inputs[0].data.dtype.kind in "biu":
        return [Tensor(x.data, dtype=backend.get_default_dtype()) for x in inputs]
    return inputs


def _alike(inputs: Sequence[Any]) -> bool:
    """Whether all are tensors of one dtype and one library."""
    if not isinstance(inputs[0], Tensor):
        return False
    dtype, library = inputs[0].data.dtype, type(inputs[0].data)
    for x in inputs:
        if not isinstance(x, Tensor) or x.data.dtype is not dtype or type(x.data) is not library:
            return False
    return True


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


def normal_axes(x: Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """`axis` as a tuple of non-negative axes; None is all of them."""
    try:
        axes = range(x.ndim) if axis is None else as_ints(axis)
    except TypeError as error:
        raise TypeError(f"axis: got {axis!r}; an int, a tuple of ints or None is accepted") from error
    for i in axes:
        if not -x.ndim <= i < x.ndim:
            raise ValueError(f"axis: got {i}, the tensor has {x.ndim} axes, shape {x.shape}")
    return tuple([i % x.ndim for i in axes])


def as_ints(x: Any) -> tuple[int, ...]:
    """One integer or several, NumPy's too, as a tuple."""
    return tuple(map(operator.index, x)) if hasattr(x, "__iter__") else (operator.index(x),)
