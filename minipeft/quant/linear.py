"""Linear layers that hold their weight as codes: it exists in full only while a product needs it.

    forward   Y  = X · dequant(codes)ᵀ + b
    backward  dX = dY · dequant(codes)          the weight is dequantized again; it has no gradient

Dettmers et al. 2023, eq. 5 and the text below it. The codes are no parameter: nothing can unfreeze them, no optimizer
sees them, and the graph keeps them instead of the weight.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from .. import backend, ops
from ..backend import Array, get_namespace
from ..nn import Linear, Parameter
from ..tensor import Tensor, result
from .int8 import quantize_int8
from .nf4 import QuantizedTensor, bits_per_parameter, dequantize, double_quantize, quantize

_buffers = threading.local()  # .arrays: (library, dtype) -> a flat array as large as the largest weight so far


def in_buffer(q: QuantizedTensor) -> Array:
    """dequant(q) in a buffer that the next call overwrites: for one product, at once.

    Fresh memory of this size costs more than the dequantizing: the system maps and clears every page of it anew.
    """
    xp = get_namespace(q.codes)
    arrays = vars(_buffers).setdefault("arrays", {})
    key = (xp.__name__, q.dtype)
    if key not in arrays or arrays[key].size < q.size:
        arrays.pop(key, None)  # the smaller one goes first
        arrays[key] = xp.empty(q.size, q.dtype)
    return dequantize(q, out=arrays[key][: q.size])


def release_buffers() -> None:
    """Give back this thread's buffers; the next product makes a new one."""
    vars(_buffers).pop("arrays", None)


def buffer_bytes() -> int:
    """Bytes of this thread's buffers."""
    return sum(array.nbytes for array in vars(_buffers).get("arrays", {}).values())


class QuantizedWeight(Tensor):
    """What `layer.weight` is in a layer that holds codes: looks like W, is read-only, never trains.

    Attributes:
        quantized: the codes.
        data: W dequantized into a new array at every look. `shape`, `dtype` and `size` cost nothing.
    """

    __slots__ = ("quantized",)

    def __init__(self, quantized: QuantizedTensor) -> None:
        self.quantized, self.grad, self._node = quantized, None, None

    @property
    def data(self) -> Array:  # type: ignore[override]
        """W, (out, in), in an array of its own."""
        return dequantize(self.quantized)

    @data.setter
    def data(self, value: Array) -> None:
        raise ValueError(
            "weight: it is held as codes and cannot be changed in place; make the layer a plain one with to_linear() "
            "or dequantize_model(model), or finish adapters with methods.qlora.finish_qlora"
        )

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Always False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise ValueError("requires_grad: a weight held as codes has no gradient; train an adapter beside it")

    shape = property(lambda self: self.quantized.shape)
    dtype = property(lambda self: self.quantized.dtype)
    size = property(lambda self: self.quantized.size)
    ndim = property(lambda self: len(self.quantized.shape))

    def __repr__(self) -> str:
        q = self.quantized
        return f"QuantizedWeight({q.quant_type}, shape={q.shape}, {q.dtype}, {bits_per_parameter(q):.3f} bits a weight)"

    def stored(self, op: str, x: Tensor) -> tuple[Array, Any]:
        """(codes, full): an array for a gradient function to capture, and a function from it to W, in a buffer.

        Raises:
            TypeError: x has another dtype, or belongs to another array library, than W.
        """
        q = self.quantized
        if x.dtype != q.dtype or get_namespace(x.data) is not get_namespace(q.codes):
            raise TypeError(
                f"{op}: x is {x.dtype} of {get_namespace(x.data).__name__}, the weight dequantizes to {q.dtype} of "
                f"{get_namespace(q.codes).__name__}; convert with .astype() or .to()"
            )
        return q.codes, lambda codes: in_buffer(q if codes is q.codes else replace(q, codes=codes))


def quantized_linear(x: Any, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x dequant(codes)ᵀ + b; x (..., in): (..., out). dx = g dequant(codes), db = Σ g.

    The gradient function captures the codes: between forward and backward the full weight does not exist.
    """
    x = ops.tensor(x)
    shape, (out, width) = x.shape, weight.shape
    if not shape or shape[-1] != width:
        raise ValueError(f"quantized_linear: x {shape}; weight (out, in) = {weight.shape} takes {width} features")
    codes, full = weight.stored("quantized_linear", x)
    y = backend.matmul(x.data.reshape(-1, width), full(codes).T)  # (N, out)
    edges = [(x, lambda g: backend.matmul(g.reshape(-1, out), full(codes)).reshape(shape))]
    if bias is not None:
        y += bias.data
        edges.append((bias, lambda g: g.reshape(-1, out).sum(axis=0)))
    return result("quantized_linear", y.reshape(*shape[:-1], out), *edges)


class QuantizedLinear(Linear):
    """y = x Wᵀ + b with W held as codes of any kind.

    Attributes:
        quantized: the codes of W, (out_features, in_features).
        weight: a view of them, see `QuantizedWeight`; not a parameter.
        bias: b, (out_features,), or None.
    """

    def __init__(self, quantized: QuantizedTensor, bias: Parameter | None = None) -> None:
        if len(quantized.shape) != 2:
            raise ValueError(f"quantized: got shape {quantized.shape}; a matrix (out, in) is accepted")
        self.out_features, self.in_features = quantized.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias: got shape {bias.shape}; ({self.out_features},) is accepted")
        self.quantized, self.bias = quantized, bias

    @property
    def weight(self) -> QuantizedWeight:
        """W as a read-only tensor that is dequantized when it is looked at."""
        return QuantizedWeight(self.quantized)

    def forward(self, x: Any) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return quantized_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        q = self.quantized
        return f"{super().extra_repr()}, {q.quant_type}, {bits_per_parameter(q):.3f} bits a weight"

    def to_linear(self) -> Linear:
        """A plain Linear with the dequantized weight, and the same bias."""
        return _plain(Parameter(dequantize(self.quantized), requires_grad=False), self.bias)


class Linear4bit(QuantizedLinear):
    """A Linear with its weight in NF4 or FP4."""

    @classmethod
    def from_linear(
        cls, linear: Linear, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True, dtype: Any = None
    ) -> Linear4bit:
        """The layer's weight in codes; its bias is kept, the layer is not changed.

        Args:
            double_quant: quantize the block maxima as well.
            dtype: of the dequantized weight; None: the weight's.
        """
        if quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type: got {quant_type!r}; accepted are 'nf4' and 'fp4'")
        q = quantize(linear.weight.data, quant_type, blocksize)
        return cls((double_quantize(q) if double_quant else q).to(dtype=dtype), linear.bias)


class Linear8bit(QuantizedLinear):
    """A Linear with its weight in the 8-bit dynamic code."""

    @classmethod
    def from_linear(cls, linear: Linear, blocksize: int = 256, dtype: Any = None) -> Linear8bit:
        """The layer's weight in codes; its bias is kept, the layer is not changed."""
        return cls(quantize_int8(linear.weight.data, blocksize).to(dtype=dtype), linear.bias)


def _plain(weight: Parameter, bias: Parameter | None) -> Linear:
    linear = Linear.__new__(Linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = weight, bias
    return linear
