"""Bytes that a forward pass keeps for backward, by formula: one for a Llama, one for a chain of Linear and ReLU.

They follow what the gradient functions in ops.py and `lora_linear` capture, array by array, and tests compare them with
`memory_report`. An array that two operations need counts once.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..nn import Linear, Module, ReLU, Sequential
from .shapes import LlamaShape


def block_activations(shape: LlamaShape, trained: set[str], r: int, batch: int, seq: int, live: bool) -> dict[str, int]:
    """Elements that a block's operations keep for backward; see `llama_activations`.

    Args:
        trained: the matrices that a gradient is computed for, of themselves or of their adapters.
        r: the adapters' rank; 0: there are none, the weights themselves train.
        live: whether the block's input needs a gradient. The first block's does not where the embedding is frozen, and
            then nothing before the first adapter is kept.
    """
    n, d, f = batch * seq, shape.hidden_size, shape.intermediate_size
    q, kv = shape.matrices["q_proj"][0], shape.matrices["k_proj"][0]
    attention = live or bool(trained & {"q_proj", "k_proj", "v_proj"})
    middle = attention or "o_proj" in trained
    gate, up = middle or "gate_proj" in trained, middle or "up_proj" in trained
    return {
        "norm": live * (n * d + n),
        "input of q, k, v": bool(trained & {"q_proj", "k_proj", "v_proj"}) * n * d,
        "attention q, k, v": attention * n * (q + 2 * kv),
        "attention weights": attention * batch * shape.num_attention_heads * seq * seq,
        "input of o": ("o_proj" in trained) * n * q,
        "second norm": middle * (n * d + n),
        "input of gate, up": bool(trained & {"gate_proj", "up_proj"}) * n * d,
        "swiglu": (gate or up) * n * f + gate * n * f,
        "input of down": ("down_proj" in trained) * n * f,
        "adapters": len(trained) * n * r,
    }


def llama_activations(
    shape: LlamaShape, trained: set[str], r: int, batch: int, seq: int, checkpointing: bool, dtype_bytes: int
) -> int:
    """Bytes that the forward pass of a Llama keeps for backward, with this library's operations.

    For N = batch·seq tokens, width d, inner width f, H heads and K key heads of size h, in elements:

    | array                                        | elements         | kept where                                |
    |----------------------------------------------|------------------|-------------------------------------------|
    | rms_norm, twice: x̂ and 1/√mean(x²)           | 2·(N·d + N)      | always                                    |
    | input of q, k, v; input of gate, up          | 2·N·d            | their weights or adapters train (for dW)  |
    | attention: turned q and k, and v             | N·h·(H + 2K)     | always                                    |
    | attention: softmax                           | batch·H·seq²     | always                                    |
    | input of o; input of down                    | N·H·h + N·f      | they train                                |
    | swiglu: gate, up                             | 2·N·f            | always                                    |
    | u = x Aᵀ of each adapter                     | N·r              | LoRA                                      |

    Once for the model: rotary tables seq·h, the last norm N·d + N, dx of `linear_cross_entropy` N·d (every token
    predicts), and in full training dW of the output head V·d and the embedding's ids, 8 bytes each. LoRA saves little
    here: the first block's norm, and these last two.

    With checkpointing a block keeps its input, N·d, and one block at a time is computed again.
    """
    n, d, full = batch * seq, shape.hidden_size, r == 0
    each = [block_activations(shape, trained, r, batch, seq, full or i > 0) for i in range(shape.num_hidden_layers)]
    blocks = [sum(items.values()) for items in each]
    inside = len(blocks) * n * d + max(blocks) if checkpointing else sum(blocks)
    tables = seq * shape.matrices["q_proj"][0] // shape.num_attention_heads
    ends = tables + (n * d + n) + n * d + full * shape.vocab_size * d
    return (inside + ends) * dtype_bytes + full * 8 * n


def chain_activations(model: Module, ranks: Mapping[str, int] | None, rows: int, dtype_bytes: int) -> int | None:
    """Bytes that a Sequential of Linear and ReLU, with `cross_entropy` on its output, keeps for backward.

    For N rows, in elements: N·in of a Linear whose weight or adapter trains, and N·r of its adapter; N·width of a ReLU
    that something trained precedes, which is the next Linear's input and counts once; the softmax N·classes. And 16·N
    bytes of targets and row numbers. None for any other model.

    Args:
        ranks: of the adapters, by the Linear's name; None: there are none, the weights themselves train.
    """
    names = {id(module): name for name, module in model.named_modules()}
    chain = next((module for module in model.modules() if isinstance(module, Sequential)), None)
    if chain is None or sum(p.size for p in chain.parameters()) != sum(p.size for p in model.parameters()):
        return None
    elements, width, live, kept = 0, 0, False, False
    for layer in chain:
        linear = getattr(layer, "base_layer", layer)
        if isinstance(linear, Linear):
            r = 0 if ranks is None else ranks.get(names[id(layer)], 0)
            trained = ranks is None or r > 0
            elements += trained * (not kept) * rows * linear.in_features + rows * r
            width, live, kept = linear.out_features, live or trained, False
        elif isinstance(layer, ReLU):
            elements += live * rows * width
            kept = live
        else:
            return None
    return (elements + live * rows * width) * dtype_bytes + live * 16 * rows
