"""Whole models: their Linears as codes, and back; checkpoints with codes."""

from __future__ import annotations

import numpy as np

from ..backend import Array
from ..nn import Linear, Module, Parameter
from .linear import Linear4bit, Linear8bit, QuantizedLinear
from .nf4 import QuantizedTensor, double_quantize, quantize
from .state import from_state_tensors, state_tensors


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
    if quant == "dynamic":
        return Linear8bit.from_linear(linear, blocksize, dtype)
    q = quantize(linear.weight.data, quant, blocksize)
    nested = double_quant and len(q.table) <= 16
    return _layer((double_quantize(q) if nested else q).to(dtype=dtype), linear.bias)


def _layer(q: QuantizedTensor, bias: Parameter | None) -> QuantizedLinear:
    kinds = {"nf4": Linear4bit, "fp4": Linear4bit, "dynamic": Linear8bit}
    return kinds.get(q.quant_type, QuantizedLinear)(q, bias)


def dequantize_model(model: Module) -> Module:
    """Put a plain Linear, frozen, in the place of every layer that holds codes, inside adapters too.

    The model is changed and returned. Merging an adapter then adds to the dequantized weight, in full precision.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.to_linear())
    return model


# --- checkpoints ------------------------------------------------------------------------------------------------------


def quantized_state_dict(model: Module) -> dict[str, Array]:
    """All tensors of a model with codes, under the names that transformers with bitsandbytes saves them by."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state |= state_tensors(module.quantized, f"{name}.weight")
    return state


def load_quantized_state_dict(model: Module, tensors: dict[str, Array]) -> Module:
    """Take over such tensors: Linears whose weights are saved as codes hold codes from then on, of the dtype they had.

    Everything is checked before anything is changed; the model is returned.

    Raises:
        ValueError: names missing or unknown, codes for what is no Linear, shapes that differ, a damaged state.
    """
    coded = [key.partition(".quant_state.")[0] for key in tensors if ".quant_state." in key]
    layers = {}
    for name in coded:
        module = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(module, Linear):
            raise ValueError(f"{name}: saved as codes, but belongs to a {type(module).__name__}; a Linear is accepted")
        q = from_state_tensors(tensors, name, module.weight.dtype)
        if q.shape != module.weight.shape:
            raise ValueError(f"{name}: saved with shape {q.shape}, the model's is {module.weight.shape}")
        layers[name.removesuffix(".weight")] = _layer(q, module.bias)
    parts = tuple(f"{name}." for name in coded)
    rest = {key: value for key, value in tensors.items() if key not in coded and not key.startswith(parts)}
    own = {name for name, _ in model.named_parameters()} - set(coded)
    missing, extra = sorted(own - rest.keys()), sorted(rest.keys() - own)
    if missing or extra:
        raise ValueError(f"tensors: missing {missing[:4] or 'nothing'}; not in the model {extra[:4] or 'nothing'}")
    model.load_state_dict(rest, strict=False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model
