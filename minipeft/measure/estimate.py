"""Bytes by formula: the parts of `memory_report` for models that need not be here, or do not fit here.

With P all weights, T the trained ones, Q the quantized matrices (numbers of elements), b bytes a number, and t bytes a
number of an adapter (of what trains, where that is no adapter, b):

    weights     = (P − Σ Q)·b + Σ nf4_bytes(Q) + adapters·t
    gradients   = T·t
    optimizer   = k·T·t                      k states a number: 0 (SGD), 1 (momentum), 2 (Adam, AdamW), 3 (amsgrad)
    activations = see activations.py

    full    T = P
    lora    T = adapters = Σ r·(in + out) over the targeted matrices
    qlora   as lora, and Q the matrices in the blocks; embeddings, norms and the output head keep b
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..checks import check_choice, check_count
from ..nn import Linear, Module
from ..quant.linear import QuantizedLinear
from .activations import chain_activations, llama_activations
from .memory import MemoryReport
from .shapes import LlamaShape, llama_shape

METHODS = ("full", "lora", "qlora")
STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "amsgrad": 3}  # arrays of a parameter's size


# --- what is frozen, trained and quantized ----------------------------------------------------------------------------


class Counts(NamedTuple):
    """Numbers of elements: frozen ones in full precision, trained ones, and those of each quantized matrix."""

    frozen: int
    trained: int
    quantized: list[int]


def _counts(parameters: int, matrices: list[int], adapters: int, method: str) -> Counts:
    if method == "full":
        return Counts(0, parameters, [])
    quantized = matrices if method == "qlora" else []
    return Counts(parameters - sum(quantized), adapters, quantized)


def _shape_counts(shape: LlamaShape, method: str, r: int, targets: str | Iterable[str]) -> Counts:
    matrices, layers = shape.matrices, shape.num_hidden_layers
    chosen = _chosen(list(matrices), targets)
    adapters = layers * sum(r * sum(matrices[name]) for name in chosen)
    return _counts(shape.parameters, [out * in_ for out, in_ in matrices.values()] * layers, adapters, method)


def _module_counts(model: Module, method: str, r: int, targets: str | Iterable[str]) -> Counts:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "config_or_size: the Module holds weights as codes, whose bytes `memory_report` reads off; accepted is "
            'the Module before it was quantized, with method="qlora"'
        )
    parameters = list(model.parameters())
    total = sum(p.size for p in parameters)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        if method != "lora":
            raise ValueError(
                f'method: got {method!r} for a model with adapters; "lora" is accepted, or the model without'
            )
        trained = sum(p.size for p in parameters if p.requires_grad)
        return Counts(total - trained, trained, [])
    linears = _linears(model)
    adapters = sum(r * sum(linears[name].weight.shape) for name in _chosen(list(linears), targets))
    return _counts(total, [linear.weight.size for linear in linears.values()], adapters, method)


def _module_ranks(model: Module, method: str, r: int, targets: str | Iterable[str]) -> dict[str, int] | None:
    """The ranks of adapters by their layer's name: those that are there, or that `method` would add. None: full."""
    if method == "full":
        return None
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    if layers:
        ranks = {name: getattr(layer, "lora_A", {}).values() for name, layer in layers.items()}
        return {name: sum(A.out_features for A in adapters) for name, adapters in ranks.items()}
    return dict.fromkeys(_chosen(list(_linears(model)), targets), r)


def _linears(model: Module) -> dict[str, Linear]:
    """The Linears by name, without the output head."""
    modules = dict(model.named_modules())
    heads = {f"{name}.{m.output_head}".lstrip(".") for name, m in modules.items() if m.output_head}
    return {name: m for name, m in modules.items() if isinstance(m, Linear) and name not in heads}


def _chosen(names: list[str], targets: str | Iterable[str]) -> list[str]:
    """The names that `targets` means: all, or those that are or end in one of them."""
    if isinstance(targets, str):
        if targets.lower() not in ("all-linear", "all"):
            raise ValueError(f'targets: got {targets!r}; "all-linear" or a list of names is accepted')
        return names
    targets = list(targets)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"targets: there is no {target!r}; accepted are {', '.join(names[:8])}")
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


# --- the parts --------------------------------------------------------------------------------------------------------


def nf4_bytes(n: int, blocksize: int = 64, second_blocksize: int = 256) -> int:
    """Bytes of n weights in NF4 with double quantization (Dettmers et al. 2023, section 3).

    ⌈n/2⌉ of codes, one byte for the maximum of each block of 64, four bytes for each 256 of those, four for their mean:
    4 + 8/64 + 32/(64·256) = 4.127 bits a weight.
    """
    blocks = math.ceil(n / blocksize)
    return math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / second_blocksize) + 4


def weight_bytes(counts: Counts, dtype_bytes: int, trained_bytes: int) -> int:
    """frozen·b + trained·t + Σ nf4_bytes(Q)."""
    return counts.frozen * dtype_bytes + counts.trained * trained_bytes + sum(map(nf4_bytes, counts.quantized))


def gradient_bytes(counts: Counts, trained_bytes: int) -> int:
    """T·t: a frozen weight has no gradient."""
    return counts.trained * trained_bytes


def optimizer_bytes(counts: Counts, trained_bytes: int, optimizer: str) -> int:
    """k·T·t with k = `STATES[optimizer]`: states have the dtype of their parameter."""
    return STATES[optimizer] * counts.trained * trained_bytes


# --- the estimate -----------------------------------------------------------------------------------------------------


def estimate_memory(
    config_or_size: str | int | Mapping[str, Any] | os.PathLike[str] | LlamaShape | Module,
    method: str = "lora",
    *,
    r: int = 8,
    batch: int = 1,
    seq: int = 512,
    dtype_bytes: int = 4,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    targets: str | Iterable[str] = "all-linear",
    adapter_bytes: int | None = None,
) -> MemoryReport:
    """The parts of `memory_report` by formula (see the top of this file): nothing of the model's size is allocated.

    Args:
        config_or_size: "7B", a number of parameters, the dictionary in or the path of a config.json (see
            `llama_shape`); or a Module: as it is where adapters are attached, otherwise as `method` would make it.
        method: "full", "lora" or "qlora".
        r: the adapters' rank.
        batch, seq: sequences, and tokens of each. A Module that is no language model has `batch` rows.
        dtype_bytes: of a weight, gradient, state and activation alike: 4 is float32, 2 is bfloat16.
        optimizer: "sgd", "momentum", "adam", "adamw" or "amsgrad".
        checkpointing: blocks keep only their input.
        targets: "all-linear", or names of the matrices that get adapters, such as `["q_proj", "v_proj"]`.
        adapter_bytes: of an adapter's weight, its gradient and states; None: `dtype_bytes`.

    Returns:
        The parts in bytes. `activations` of a Module is None unless it is a chain of Linear and ReLU.

    Raises:
        ValueError, TypeError: an argument outside what is accepted.
    """
    check_choice("method", method, METHODS)
    check_choice("optimizer", optimizer, STATES)
    trained_bytes = dtype_bytes if adapter_bytes is None or method == "full" else adapter_bytes
    sizes = {"r": r, "batch": batch, "seq": seq, "dtype_bytes": dtype_bytes, "adapter_bytes": trained_bytes}
    for name, value in sizes.items():
        check_count(name, value)
    if isinstance(config_or_size, Module):
        model = config_or_size
        if checkpointing:
            raise ValueError("checkpointing: True is for language models, whose blocks are known; a Module was given")
        counts = _module_counts(model, method, r, targets)
        activations = chain_activations(model, _module_ranks(model, method, r, targets), batch, dtype_bytes)
    else:
        shape = config_or_size if isinstance(config_or_size, LlamaShape) else llama_shape(config_or_size)
        counts = _shape_counts(shape, method, r, targets)
        trained, r = (set(shape.matrices), 0) if method == "full" else (set(_chosen(list(shape.matrices), targets)), r)
        activations = llama_activations(shape, trained, r, batch, seq, checkpointing, dtype_bytes)
    return MemoryReport(
        weights=weight_bytes(counts, dtype_bytes, trained_bytes),
        gradients=gradient_bytes(counts, trained_bytes),
        optimizer=optimizer_bytes(counts, trained_bytes, optimizer),
        activations=activations,
        trainable_weights=counts.trained * trained_bytes,
    )


def memory_parts(
    config_or_size: str | int | Mapping[str, Any] | os.PathLike[str] | LlamaShape,
    method: str = "lora",
    *,
    dtype_bytes: int = 2,
    adapter_bytes: int | None = 4,
    **options: Any,
) -> dict[str, int]:
    """The table of `minipeft memory`: the estimate for a language model, part by part, with its weights by kind.

    Beside the parts of `estimate_memory`, whose arguments these are, QLoRA needs room for one dequantized weight. By
    default adapters train in 32 bits beside 16-bit weights, as PEFT keeps them.
    """
    shape = config_or_size if isinstance(config_or_size, LlamaShape) else llama_shape(config_or_size)
    sizes = {"dtype_bytes": dtype_bytes, "adapter_bytes": adapter_bytes}
    report = estimate_memory(shape, method, **sizes, **options)
    matrices = [out * in_ for out, in_ in shape.matrices.values()] if method == "qlora" else []
    codes = shape.num_hidden_layers * sum(map(nf4_bytes, matrices))
    adapters = 0 if method == "full" else report.trainable_weights
    return {
        "weights in 4.127 bits": codes,
        f"weights in {8 * dtype_bytes} bits": report.weights - adapters - codes,
        "adapters": adapters,
        "gradients": report.gradients,
        "optimizer": report.optimizer,
        "activations": report.activations,
        "one weight dequantized": dtype_bytes * max(matrices, default=0),
    }
