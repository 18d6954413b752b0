"""The claims of the document's QLoRA section about cost: time, batches, the sum for 7B."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .. import nn, ops, optim
from ..measure import compare_latency, estimate_memory, llama_shape, memory_report, nf4_bytes
from ..methods.lora import LoraConfig
from ..models.llama import Llama, LlamaConfig
from ..nn import Module
from ..peft import get_peft_model
from ..quant import linear as coded
from ..quant import quantize_model
from . import Evidence, claim
from .qlora_steps import chain, chain_loss, dequantizations

# --- time -------------------------------------------------------------------------------------------------------------


@claim("qlora.speed", "QLoRA trains at about 61 % of LoRA's speed.")
def speed() -> Evidence:
    """Time of a step, LoRA's ÷ QLoRA's, in alternating runs, by width of the layers and rows in a batch."""
    found = {}
    for width in (256, 1024):
        models = {kind: chain(kind, 2, width) for kind in ("lora", "qlora")}
        for rows in (16, 256):
            steps = {kind: _step(model, rows, width) for kind, model in models.items()}
            times = compare_latency(steps, repeat=7, warmup=1)
            found[f"{width} × {rows}"] = {
                "speed": times["lora"].median / times["qlora"].median,
                **{kind: latency.median for kind, latency in times.items()},
            }
    text = ", ".join(f"{case['speed']:.0%} ({name})" for name, case in found.items())
    return Evidence(
        f"QLoRA's speed as a share of LoRA's, a step of two layers (width × rows): {text}. A weight is dequantized "
        "once a product, however many rows that has.",
        figures=found,
    )


def _step(model: Module, rows: int, width: int) -> Callable[[], None]:
    """One step of training: forward, backward, AdamW."""
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        chain_loss(model, rows, width).backward()
        optimizer.step()

    return step


# --- batches ----------------------------------------------------------------------------------------------------------

DEPTH, WIDTH = 4, 512
GPU = 24_000_000_000


@claim("qlora.batch", "The memory that is saved allows a larger batch, which repays part of the time.")
def batch() -> Evidence:
    """The largest batch in a byte budget by formula and by live bytes; throughput there by formula and by the clock."""
    models = {kind: chain(kind, DEPTH, WIDTH) for kind in ("lora", "qlora")}
    budget = int(1.5 * chain_bytes("lora", 1))
    rows = {kind: largest_batch(functools.partial(chain_bytes, kind), budget) for kind in models}
    live = {kind: _live_bytes(kind, models[kind], rows[kind]) for kind in models}
    steps = {
        "LoRA": _step(models["lora"], rows["lora"], WIDTH),
        "QLoRA, same batch": _step(models["qlora"], rows["lora"], WIDTH),
        "QLoRA": _step(models["qlora"], rows["qlora"], WIDTH),
    }
    times = compare_latency(steps, repeat=5, warmup=1)
    throughput = {name: rows["qlora" if name == "QLoRA" else "lora"] / t.median for name, t in times.items()}
    predicted = _predicted_throughput(models["qlora"], rows, times["LoRA"].median)
    big = {kind: largest_batch(functools.partial(_llama_bytes, kind), GPU) for kind in models}
    return Evidence(
        f"{DEPTH} layers of {WIDTH}² in {budget / 1e6:.1f} MB: {rows['lora']} rows with LoRA, {rows['qlora']} with "
        f"QLoRA by formula, {live['lora'] / 1e6:.1f} and {live['qlora'] / 1e6:.1f} MB live. Rows a second: LoRA "
        f"{throughput['LoRA']:,.0f}, QLoRA {throughput['QLoRA, same batch']:,.0f} with the same batch and "
        f"{throughput['QLoRA']:,.0f} with its own ({predicted:,.0f} by formula). 7B in 24 GB (16 bits, 512 tokens, "
        f"checkpointing): {big['lora']} and {big['qlora']} sequences.",
        figures={
            "budget": budget,
            "rows": rows,
            "live_bytes": live,
            "rows_per_second": throughput,
            "predicted": predicted,
            "sequences_7b_24gb": big,
        },
    )


def largest_batch(bytes_of: Callable[[int], int], budget: int) -> int:
    """The largest n (a batch, a length) with bytes_of(n) ≤ budget, 0 where there is none; bytes_of grows."""
    low, high = 0, 1
    while bytes_of(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= budget else (low, middle)
    return low


@functools.cache
def _plain_chain() -> Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, rng=i) for i in range(DEPTH)])


def chain_bytes(kind: str, rows: int) -> int:
    """Training a chain, by formula: all parts, and for QLoRA the buffer that holds one full weight."""
    return estimate_memory(_plain_chain(), kind, batch=rows).total + (kind == "qlora") * 4 * WIDTH**2


def _live_bytes(kind: str, model: Module, rows: int) -> int:
    """The same from live arrays, between forward and backward of a second step."""
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype("float32")
    for _ in range(2):
        loss = ops.cross_entropy(model(x), np.zeros(rows, "int64"))
        report = memory_report(model, optimizer)
        loss.backward()
        optimizer.step()
    return report.total + (kind == "qlora") * 4 * WIDTH**2


def _predicted_throughput(model: Module, rows: dict[str, int], lora_seconds: float) -> float:
    """QLoRA's rows a second: its products at the rate of LoRA's step, and a dequantization for each that needs W."""
    with dequantizations() as seen:
        chain_loss(model, rows["lora"], WIDTH).backward()
    once = compare_latency({"q": lambda: coded.in_buffer(seen[0])}, repeat=5)["q"].median
    products = lora_seconds * rows["qlora"] / rows["lora"]  # both grow with the rows
    return rows["qlora"] / (products + len(seen) * once)


def _llama_bytes(kind: str, batch: int) -> int:
    return estimate_memory("7B", kind, batch=batch, seq=512, dtype_bytes=2, checkpointing=True).total


# --- the sum for 7B ---------------------------------------------------------------------------------------------------

SEQUENCES, RANKS = (256, 512, 1024, 2048), (8, 16, 64)


@claim("qlora.7b", "A 7B model is fine-tuned in 5 to 6 GB.")
def seven_billion() -> Evidence:
    """The sum part by part, batch 1; which lengths and ranks fit; the formula against live bytes of a small Llama."""
    parts = qlora_parts("7B", 16, 512, checkpointing=True)
    fits = {
        f"r={r} seq={seq} {'checkpointed' if checkpointing else 'kept'}": sum(
            qlora_parts("7B", r, seq, checkpointing).values()
        )
        for checkpointing in (True, False)
        for r in RANKS
        for seq in SEQUENCES
    }
    within = {limit: [name for name, size in fits.items() if size <= limit * 1e9] for limit in (5, 6)}
    longest = {
        r: largest_batch(lambda seq, r=r: sum(qlora_parts("7B", r, seq, True).values()), 6 * 10**9) for r in RANKS
    }
    kept = largest_batch(lambda seq: sum(qlora_parts("7B", 16, seq, False).values()), 6 * 10**9)
    others = {size: sum(qlora_parts(size, 16, 512, True).values()) / 1e9 for size in ("13B", "33B", "65B")}
    formula, live = _small_llama()
    return Evidence(
        "Batch 1, 512 tokens, r = 16, checkpointing, in GB: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        + f"; sum {sum(parts.values()) / 1e9:.2f}, without a GPU's runtime. 6 GB hold r = "
        + ", ".join(f"{r} {f'up to {seq} tokens' if seq else 'not at all'}" for r, seq in longest.items())
        + f"; without checkpointing r = 16 up to {kept}. Of {len(fits)} settings 5 GB hold {len(within[5])}, "
        f"6 GB {len(within[6])}.",
        holds=formula == live and len(within[6]) == len(fits),
        within=formula == live and len(within[6]) > 0,
        figures={
            "parts": parts,
            "assumptions": {"batch": 1, "seq": 512, "r": 16, "targets": "all-linear", "checkpointing": True},
            "settings": fits,
            "longest_in_6gb": {str(r): seq for r, seq in longest.items()},
            "longest_in_6gb_kept": kept,
            "other_sizes_gb": others,
            "small_llama": {"formula": formula, "live": live},
        },
    )


def _total_7b(r: int, checkpointing: bool, seq: int) -> int:
    return sum(qlora_parts("7B", r, seq, checkpointing).values())


def qlora_parts(size: str, r: int, seq: int, checkpointing: bool, batch: int = 1) -> dict[str, int]:
    """Bytes of QLoRA by part: NF4 with double quantization, what is left in 16 bits, adapters trained in 32 bits."""
    shape = llama_shape(size)
    half = estimate_memory(shape, "qlora", r=r, batch=batch, seq=seq, dtype_bytes=2, checkpointing=checkpointing)
    full = estimate_memory(shape, "qlora", r=r, dtype_bytes=4)
    matrices = [out * in_ for out, in_ in shape.matrices.values()]
    codes = shape.num_hidden_layers * sum(map(nf4_bytes, matrices))
    return {
        "weights in 4.127 bits": codes,
        "embeddings, head, norms": half.weights - half.trainable_weights - codes,
        "adapters": full.trainable_weights,
        "gradients": full.gradients,
        "AdamW": full.optimizer,
        "activations": half.activations,
        "one weight dequantized": 2 * max(matrices),
    }


def _small_llama() -> tuple[int, int]:
    """Weights of a small Llama under QLoRA, adapters included: by the formula, and its live bytes."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = get_peft_model(quantize_model(Llama(LlamaConfig(**sizes), rng=0)), LoraConfig(r=4))
    return estimate_memory(sizes, "qlora", r=4).weights, memory_report(model).weights
