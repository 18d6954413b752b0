"""The claims of the document's QLoRA section about cost: time, batches, the sum for 7B."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .. import nn, ops, optim
from ..measure import compare_latency, estimate_memory, memory_parts, memory_report
from ..methods.lora import LoraConfig
from ..models.llama import Llama, LlamaConfig
from ..nn import Module
from ..peft import get_peft_model
from ..quant import linear as coded
from ..quant import quantize_model, release_buffers
from . import Evidence, chinese_marks, claim
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
        f"两层网络的一步，QLoRA 的速度与 LoRA 之比（宽度 × 行数）：{chinese_marks(text)}。每次乘法只反量化一次权重，"
        "与行数多少无关。",
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
    live = {kind: _live_bytes(models[kind], rows[kind]) for kind in models}
    steps = {
        "LoRA": _step(models["lora"], rows["lora"], WIDTH),
        "QLoRA, same batch": _step(models["qlora"], rows["lora"], WIDTH),
        "QLoRA": _step(models["qlora"], rows["qlora"], WIDTH),
    }
    times = compare_latency(steps, repeat=5, warmup=1)
    throughput = {name: rows["qlora" if name == "QLoRA" else "lora"] / t.median for name, t in times.items()}
    predicted = _predicted_throughput(models["qlora"], rows, times["LoRA"].median)
    big = {kind: largest_batch(functools.partial(_llama_bytes, kind), GPU) for kind in models}
    room, live_lora, live_qlora = (f"{size / 1e6:.1f}" for size in (budget, live["lora"], live["qlora"]))
    of_lora, of_same, of_own, expected = (f"{rate:,.0f}" for rate in (*throughput.values(), predicted))
    return Evidence(
        f"{DEPTH} layers of {WIDTH}² in {room} MB: {rows['lora']} rows with LoRA, {rows['qlora']} with QLoRA by "
        f"formula, {live_lora} and {live_qlora} MB live. Rows a second: LoRA {of_lora}, QLoRA {of_same} with the same "
        f"batch and {of_own} with its own ({expected} by formula). 7B in 24 GB (16 bits, 512 tokens, checkpointing): "
        f"{big['lora']} and {big['qlora']} sequences.",
        f"{room} MB 中训练 {DEPTH} 个 {WIDTH}² 的层：按公式，LoRA 的批大小为 {rows['lora']} 行，"
        f"QLoRA 为 {rows['qlora']} 行，实际占用 {live_lora} 与 {live_qlora} MB。每秒行数：LoRA {of_lora}；"
        f"QLoRA 用同样的批大小为 {of_same}，用自己的为 {of_own}（公式预计 {expected}）。24 GB 中的 7B（16 比特，"
        f"512 词元，激活重算）：{big['lora']} 与 {big['qlora']} 条序列。",
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


def _live_bytes(model: Module, rows: int) -> int:
    """The same from live arrays, between forward and backward of a second step."""
    release_buffers()  # larger ones of models before
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = np.random.default_rng(0).standard_normal((rows, WIDTH)).astype("float32")
    for _ in range(2):
        loss = ops.cross_entropy(model(x), np.zeros(rows, "int64"))
        report = memory_report(model, optimizer)
        loss.backward()
        optimizer.step()
    return report.total + coded.buffer_bytes()


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
    shown = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    shown_zh = "，".join(f"{PARTS_ZH[name]} {size / 1e9:.2f}" for name, size in parts.items())
    hold = ", ".join(f"{r} {f'up to {seq} tokens' if seq else 'not at all'}" for r, seq in longest.items())
    hold_zh = "，".join(f"{r} 时{f'最多 {seq} 词元' if seq else '放不下'}" for r, seq in longest.items())
    total = f"{sum(parts.values()) / 1e9:.2f}"
    return Evidence(
        f"Batch 1, 512 tokens, r = 16, checkpointing, in GB: {shown}; sum {total}, without a GPU's runtime. 6 GB hold "
        f"r = {hold}; without checkpointing r = 16 up to {kept}. Of {len(fits)} settings 5 GB hold {len(within[5])}, "
        f"6 GB {len(within[6])}.",
        f"批大小 1，512 词元，r = 16，激活重算，单位 GB：{shown_zh}；合计 {total}，不含 GPU 运行时。6 GB 能放下："
        f"r = {hold_zh}；不用激活重算，r = 16 时最多 {kept}。{len(fits)} 种设置中，5 GB 放得下 {len(within[5])} 种，"
        f"6 GB 放得下 {len(within[6])} 种。",
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


def qlora_parts(size: str, r: int, seq: int, checkpointing: bool) -> dict[str, int]:
    """Bytes of QLoRA by part, batch 1: what is not quantized in 16 bits, adapters trained in 32."""
    return memory_parts(size, "qlora", r=r, seq=seq, checkpointing=checkpointing)


PARTS_ZH = {
    "weights in 4.127 bits": "4.127 比特的权重",
    "weights in 16 bits": "16 比特的权重",
    "adapters": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器状态",
    "activations": "激活值",
    "one weight dequantized": "一个反量化的权重",
}


def _small_llama() -> tuple[int, int]:
    """Weights of a small Llama under QLoRA, adapters included: by the formula, and its live bytes."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = get_peft_model(quantize_model(Llama(LlamaConfig(**sizes), rng=0)), LoraConfig(r=4))
    return estimate_memory(sizes, "qlora", r=4).weights, memory_report(model).weights
