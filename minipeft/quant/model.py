"""Whole models: their Linears as codes, and back."""

from __future__ import annotations

import numpy as np

from ..nn import Linear, Module
from .linear import Linear4bit, Linear8bit, QuantizedLinear
from .nf4 import double_quantize, quantize


def quantize_model(
    model: Module,
    quant: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: tuple[str, ...] = (),
) -> Module:
    """Hold every Linear of the model as codes; freeze the rest and keep it in full precision.

    Norms, embeddings, biases and output heads become float32 where they are half precision, as bitsandbytes and PEFT's
    `prepare_model_for_kbit_training` prepare a model. The model is changed and returned.

    Args:
        quant: `"nf4"`, `"fp4"`, `"int8"` (the 8-bit dynamic code), or another of `codes.table_of` (`"nf3"`, `"int4"`).
        blocksize, double_quant: see `quantize` and `double_quantize` (of codes up to 4 bits).
        skip: names of Linears, or endings of names, to leave in full precision besides the output heads.

    Raises:
        ValueError: nothing to quantize, a name in `skip` that no Linear has, an unknown code, or weights that are not
            finite; the model is then as it was.
    """
    heads = {f"{name}.{m.output_head}".lstrip(".") for name, m in model.named_modules() if m.output_head}
    linears = {name: m for name, m in model.named_modules() if type(m) is Linear and name not in heads}
    for ending in skip:
        found = [name for name in linears if name == ending or name.endswith("." + ending)]
        if not found:
            raise ValueError(f"skip: no Linear is called {ending!r}; there are {', '.join(list(linears)[:8])}")
        for name in found:
            del linears[name]
    if not linears:
        raise ValueError("model: it has no Linear to quantize besides its output heads")
    if quant == "int8":
        quant = "dynamic"
    layers = {name: _quantized(linear, quant, blocksize, double_quant) for name, linear in linears.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for parameter in model.parameters():
        parameter.requires_grad, parameter.grad = False, None
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.astype(np.float32)
    return model


def _quantized(linear: Linear, quant: str, blocksize: int, double_quant: bool) -> QuantizedLinear:
    dtype = linear.weight.dtype if linear.weight.dtype.itemsize >= 4 else np.float32
    if quant in ("nf4", "fp4"):
        return Linear4bit.from_linear(linear, quant, blocksize, double_quant, dtype)
    if quant == "dynamic":
        return Linear8bit.from_linear(linear, blocksize, dtype)
    q = quantize(linear.weight.data, quant, blocksize)
    nested = double_quant and len(q.table) <= 16
    return QuantizedLinear((double_quantize(q) if nested else q).to(dtype=dtype), linear.bias)


def dequantize_model(model: Module) -> Module:
    """Put a plain Linear, frozen, in the place of every layer that holds codes, inside adapters too.

    The model is changed and returned. Merging an adapter then adds to the dequantized weight, in full precision.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.to_linear())
    return model
