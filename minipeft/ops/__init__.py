"""The differentiable operations: each computes its value and, beside it, the gradient of every input.

In every docstring g is dL/d(output). A gradient function captures arrays, never tensors, and never writes to g.
Operations on several inputs keep one dtype: Python numbers take the tensor's, integer tensors are converted, and
float32 with float64 is an error rather than a silent float64.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ..tensor import Tensor
from .arithmetic import add, div, matmul, mul, neg, power, sub
from .attention import rope, rope_table, scaled_dot_product_attention
from .elementwise import astype, dropout, exp, gelu, log, relu, sigmoid, silu, sqrt, swiglu, tanh
from .inputs import operands, sum_to, tensor
from .layers import layer_norm, linear, log_softmax, rms_norm, softmax
from .losses import cross_entropy, linear_cross_entropy, mse_loss
from .moving import concatenate, embedding, getitem, reshape, stack, swapaxes, transpose, where
from .reductions import max, mean, sum

__all__ = [
    "add",
    "astype",
    "concatenate",
    "cross_entropy",
    "div",
    "dropout",
    "embedding",
    "exp",
    "gelu",
    "getitem",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "mean",
    "mse_loss",
    "mul",
    "neg",
    "operands",
    "power",
    "relu",
    "reshape",
    "rms_norm",
    "rope",
    "rope_table",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "sqrt",
    "stack",
    "sub",
    "sum",
    "sum_to",
    "swapaxes",
    "swiglu",
    "tanh",
    "tensor",
    "transpose",
    "where",
]

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
Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh, Tensor.astype = exp, log, sqrt, tanh, astype
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
