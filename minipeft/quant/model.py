"""Whole models: their Linears as codes, and back; checkpoints with codes."""

from __future__ import annotations

import numpy as np

from ..backend import Array
from ..nn import Linear, Module, Parameter
from .codes import table_of
from .int8 import quantize_int8
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
    linears = codable_linears(model)
    for ending in skip:
        found = [name for name in linears if name == ending or name.endswith("." + ending)]
        if not found:
            raise ValueError(f"skip: no Linear is called {ending!r}; there are {', '.join(list(linears)[:8])}")
        for name in found:
            del linears[name]
    if not linears:
        coded_already = any(isinstance(module, QuantizedLinear) for module in model.modules())
        why = "; its other Linears hold codes already" if coded_already else ""
        raise ValueError(f"model: it has no Linear to quantize besides its output heads{why}")
    code = code_of(quant)
    layers = {
        name: coded_layer(coded(linear.weight.data, code, blocksize, double_quant), linear.bias)
        for name, linear in linears.items()
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return frozen_in_full_precision(model)


def codable_linears(model: Module) -> dict[str, Linear]:
    """The Linears whose weight may become codes, by name: all but the output heads.

    Raises:
        ValueError: the model has adapters, whose factors are Linears too.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("model: it has adapters; quantize the base, then attach adapters with get_peft_model")
    heads = {f"{name}.{m.output_head}".lstrip(".") for name, m in model.named_modules() if m.output_head}
    return {name: m for name, m in model.named_modules() if type(m) is Linear and name not in heads}


def code_of(quant: str) -> str:
    """The table's name that a user's word means: `"int8"` is the 8-bit dynamic code. ValueError: there is none."""
    code = "dynamic" if quant == "int8" else quant
    table_of(code)
    return code


def coded(W: Array, code: str, blocksize: int = 64, double_quant: bool = True) -> QuantizedTensor:
    """W in blocks of a code; of codes up to 4 bits with `double_quant` the block maxima are codes too. What is half
    precision dequantizes to float32. Raises as `quantize`."""
    q = quantize_int8(W, blocksize) if code == "dynamic" else quantize(W, code, blocksize)
    q = double_quantize(q) if double_quant and len(q.table) <= 16 else q
    return q.to(dtype=np.float32) if q.dtype.itemsize < 4 else q


def coded_layer(q: QuantizedTensor, bias: Parameter | None = None) -> QuantizedLinear:
    """The layer that holds these codes: `Linear4bit`, `Linear8bit`, or their base for other codes."""
    kinds = {"nf4": Linear4bit, "fp4": Linear4bit, "dynamic": Linear8bit}
    return kinds.get(q.quant_type, QuantizedLinear)(q, bias)


def frozen_in_full_precision(model: Module) -> Module:
    """Freeze everything; what is half precision (norms, head, embeddings, biases, dequantized weights) becomes
    float32. The model is changed and returned."""
    for parameter in model.parameters():
        parameter.requires_grad, parameter.grad = False, None
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.astype(np.float32)
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.quantized.dtype.itemsize < 4:
            module.quantized = module.quantized.to(dtype=np.float32)
    return model


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
        layers[name.removesuffix(".weight")] = coded_layer(q, module.bias)
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
