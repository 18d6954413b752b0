"""The claims of the document's QLoRA section about a step: what is dequantized, when, and what a gradient needs."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import data, nn
from ..backend import count_flops
from ..measure import peak_memory
from ..measure.memory import captured_arrays
from ..methods.lora import LoraConfig, LoraLinear, init_lora
from ..nn import Module
from ..peft import get_peft_model
from ..quant import Linear4bit, QuantizedTensor, dequantize_model, quantize_model, release_buffers
from ..quant import linear as coded
from ..quant.blockwise import dequantize, quantize
from ..quant.codes import unpack
from ..tensor import Tensor, no_grad
from . import Evidence, claim
from .qlora_training import coded_bytes, coded_layers, train

WIDTH, ROWS = 1024, 32  # of the chains: a weight has 4 MiB, an activation a thirty-second of that


def chain(kind: str, depth: int, width: int = WIDTH, r: int = 8) -> Module:
    """`depth` Linears of one width with an adapter each; "qlora" holds their weights as codes."""
    model: Module = nn.Sequential(*[nn.Linear(width, width, rng=i) for i in range(depth)])
    if kind == "qlora":
        quantize_model(model)
    return get_peft_model(model, LoraConfig(r=r, target_modules=[str(i) for i in range(depth)]), seed=0)


def chain_loss(model: Module, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    """A scalar that needs every layer."""
    x = np.random.default_rng(0).standard_normal((rows, width)).astype("float32")
    return (model(x) ** 2).mean()


@contextmanager
def dequantizations(note: Any = None) -> Iterator[list[Any]]:
    """What `note(codes)` says each time a product has its weight dequantized (by itself: the codes).

    It stands in for the one function through which every product gets a full weight from codes.
    """
    seen: list[Any] = []
    original = coded.in_buffer

    def watched(q: QuantizedTensor) -> Any:
        full = original(q)
        seen.append(q if note is None else note(q))
        return full

    coded.in_buffer = watched
    try:
        yield seen
    finally:
        coded.in_buffer = original


# --- bytes along a step -----------------------------------------------------------------------------------------------


@claim("qlora.dynamic-dequant", "High precision exists only during a product; memory always holds 4 bits.")
def dynamic_dequant() -> Evidence:
    """Peak bytes of a step beside LoRA's, over depths; all live arrays at every moment that a weight is in full."""
    weight = 4 * WIDTH**2
    peaks = {depth: {kind: _step_peak(kind, depth) for kind in ("lora", "qlora", "kept")} for depth in (2, 4, 8)}
    extra = {depth: (peak["qlora"] - peak["lora"]) / weight for depth, peak in peaks.items()}
    kept = {depth: (peak["kept"] - peak["lora"]) / weight for depth, peak in peaks.items()}
    timeline, captured, released = _timeline(4)
    at_once = max(moment["full_weights"] for moment in timeline)
    depths = [str(depth) for depth in peaks]
    above, above_kept = [f"{e:.2f}" for e in extra.values()], [f"{k:.1f}" for k in kept.values()]
    return Evidence(
        f"A step's peak lies {', '.join(above)} full weights above LoRA's in chains of {', '.join(depths)} layers of "
        f"{WIDTH}² (one weight, and the dequantizer's scratch; all kept: {', '.join(above_kept)}). At each of "
        f"{len(timeline)} dequantizations in a step {at_once} array of a weight's size is alive, a buffer that the "
        f"next one overwrites; {captured} are kept for backward.",
        f"{'、'.join(depths)} 个 {WIDTH}² 的层相连时，一步的内存峰值比 LoRA 高 {'、'.join(above)} 个完整权重（一个是权"
        f"重本身，其余是反量化的临时空间；若全部保留则高 {'、'.join(above_kept)} 个）。"
        f"一步中的 {len(timeline)} 次反量化，每次都只有 {at_once} 个权重大小的数组存在，下一次会覆盖这块缓冲区；"
        f"为反向传播保留的有 {captured} 个。",
        # Scratch is an index for each code that a thread is at: up to a weight's bytes where threads are many
        holds=max(extra.values()) < 2.25
        and max(extra.values()) - min(extra.values()) < 0.75
        and (at_once, captured, released) == (1, 0, 0),
        figures={
            "weight_bytes": weight,
            "peaks": {str(depth): peak for depth, peak in peaks.items()},
            "extra_weights": {str(depth): e for depth, e in extra.items()},
            "kept_weights": {str(depth): k for depth, k in kept.items()},
            "timeline": timeline,
            "after_release": released,
        },
    )


def _step_peak(kind: str, depth: int) -> int:
    """Peak bytes above the model's own; "kept": from codes, but all weights are dequantized first and stay."""
    model = chain("lora" if kind == "lora" else "qlora", depth)
    release_buffers()
    with peak_memory() as peak:
        chain_loss(dequantize_model(model) if kind == "kept" else model).backward()
    release_buffers()
    return peak.bytes


def _timeline(depth: int) -> tuple[list[dict[str, Any]], int, int]:
    """Each dequantization of a step with the live bytes then; full-size arrays held between the passes; and at the end.

    Bytes are those allocated since the step began; a full weight is any allocation of at least a weight's bytes.
    """
    model, weight = chain("qlora", depth), 4 * WIDTH**2
    names = {id(layer.quantized.codes): name for name, layer in coded_layers(model).items()}
    release_buffers()
    tracemalloc.start()
    try:
        with dequantizations(
            lambda q: (names[id(q.codes)], tracemalloc.get_traced_memory()[0], _large(weight))
        ) as seen:
            loss = chain_loss(model)
            forward = len(seen)
            floats = [a for a in captured_arrays() if a.dtype.kind == "f"]
            captured = sum(a.nbytes >= weight for a in floats)
            loss.backward()
        release_buffers()
        released = _large(weight)
    finally:
        tracemalloc.stop()
    timeline = [
        {"pass": "forward" if i < forward else "backward", "layer": name, "live_bytes": live, "full_weights": full}
        for i, (name, live, full) in enumerate(seen)
    ]
    return timeline, captured, released


def _large(size: int) -> int:
    """How many allocations of at least this size are alive."""
    return sum(trace.size >= size for trace in tracemalloc.take_snapshot().traces)


# --- the two passes ---------------------------------------------------------------------------------------------------


@claim("qlora.forward", "h = dequant(W₄)x + BAx.")
def forward() -> Evidence:
    """A trained QLoRA model against LoRA on the dequantized weights, and its layers against the formula in float64."""
    x = data.digits.transfer().test.x
    model = copy.deepcopy(train("nf4").model)
    errors = [_formula_error(layer) for _, layer in model.adapter_layers()]
    with no_grad():
        through_codes = model(x).data
        dequantized = dequantize_model(model)(x).data
    difference = float(np.abs(through_codes - dequantized).max() / np.abs(dequantized).max())
    differ, differ_zh = "are the same bits", "逐位相同"
    if difference:
        differ, differ_zh = f"differ by {difference:.1e} of the largest", f"最多相差最大值的 {difference:.1e}"
    return Evidence(
        f"Logits of {len(x)} images by a trained QLoRA model and by LoRA on its dequantized weights {differ}; each "
        f"layer is within {max(errors):.1e} of the formula in float64 (with the scale s = α/r, which the document "
        "leaves out).",
        f"训练好的 QLoRA 模型，与在其反量化后的权重上做 LoRA 相比，{len(x)} 张图像的 logits {differ_zh}；"
        f"每一层与 float64 计算的公式相差不超过 {max(errors):.1e}（公式含缩放系数 s = α/r，文档中省略了）。",
        holds=difference < 1e-5 and max(errors) < 1e-5,
        figures={"difference": difference, "formula": errors},
    )


def _formula_error(layer: LoraLinear) -> float:
    """Largest |layer(x) − (dequant(W₄)x + s·BAx + b)| ÷ the largest output."""
    q, s = layer.base_layer.quantized, layer.scaling["default"]
    W, A, B = dequantize(q.to(dtype="float64")), *(f["default"].weight.data.astype("float64") for f in _factors(layer))
    x = np.random.default_rng(0).standard_normal((32, q.shape[1])).astype("float32")
    expected = x @ W.T + s * (x @ A.T) @ B.T + layer.base_layer.bias.data
    return float(np.abs(layer(x).data - expected).max() / np.abs(expected).max())


def _factors(layer: LoraLinear) -> tuple[Any, Any]:
    return layer.lora_A, layer.lora_B


@claim("qlora.backward", "Backward dequantizes again and computes the gradient of W to update A and B.")
def backward() -> Evidence:
    """Products and dequantizations counted in backward; gradients of A and B against differences and through ∇W."""
    counted = {kind: _backward_flops(kind) for kind in ("lora", "qlora")}
    depth, n, w, r = 4, ROWS, WIDTH, 8
    needed = (depth - 1) * (2 * n * w * w + 2 * n * w * r) + depth * (2 * n * w * r) * 3
    with_gradient_of_w = needed + depth * 2 * n * w * w
    model = chain("qlora", depth)
    with dequantizations() as seen:
        loss = chain_loss(model)
        forward_count = len(seen)
        loss.backward()
    again = len(seen) - forward_count
    full_size = [p for p in model.parameters() if p.grad is not None and p.grad.size >= w * w]
    of_weights = sum(layer.weight.grad is not None for layer in coded_layers(model).values())
    differences, through_w = _gradient_errors()
    nothing = not full_size and not of_weights and counted["qlora"] == counted["lora"] == needed
    return Evidence(
        f"A and B need no ∇W: backward dequantizes again ({again} of {depth} layers; the first needs no dx), but its "
        f"products are LoRA's, {counted['qlora'] / 1e6:.0f} Mflop (with ∇W they would be "
        f"{with_gradient_of_w / 1e6:.0f}), and no gradient of W's size exists. Gradients of A and B are within "
        f"{differences:.1e} of central differences, and equal to those through ∇W within {through_w:.1e}.",
        f"更新 A、B 用不到 ∇W：反向传播会再次反量化（{depth} 层中的 {again} 层；第一层不需要 dx），"
        f"但乘法与 LoRA 一样，是 {counted['qlora'] / 1e6:.0f} Mflop（计算 ∇W 则要 {with_gradient_of_w / 1e6:.0f}），"
        f"也没有任何与 W 同样大的梯度。A、B 的梯度与中心差分相差不超过 {differences:.1e}，"
        f"与经过 ∇W 算出的相差不超过 {through_w:.1e}。",
        holds=counted["qlora"] >= with_gradient_of_w,
        instead=nothing and again == depth - 1 and differences < 1e-6 and through_w < 1e-12,
        figures={
            "flops": counted,
            "needed": needed,
            "with_gradient_of_w": with_gradient_of_w,
            "dequantizations": {"forward": forward_count, "backward": again},
            "differences": differences,
            "through_w": through_w,
        },
    )


def _backward_flops(kind: str, depth: int = 4) -> int:
    model = chain(kind, depth)
    with count_flops() as flops:
        chain_loss(model).backward()
    # Two passes over elements aside, the products of the layers are all there is
    return int(flops.backward)


def _gradient_errors() -> tuple[float, float]:
    """Gradients of A and B in float64: largest difference to central differences, and to s·Bᵀ∇W and s·∇W Aᵀ."""
    rng = np.random.default_rng(0)
    linear = nn.Linear(24, 32, rng=0, dtype="float64")
    layer = LoraLinear(Linear4bit.from_linear(linear))
    s = 2.0
    layer.add("default", *init_lora(32, 24, 4, "both", rng, "float64"), s, nn.Dropout(0.0), offset=False)
    layer.active = ["default"]
    x, G = rng.standard_normal((10, 24)), rng.standard_normal((10, 32))
    layer(Tensor(x)).backward(G)
    A, B = (f["default"].weight for f in _factors(layer))
    gradient_of_w = G.T @ x  # the product that is saved
    through_w = max(
        float(np.abs(A.grad - s * B.data.T @ gradient_of_w).max()),
        float(np.abs(B.grad - s * gradient_of_w @ A.data.T).max()),
    )
    differences = max(
        float(np.abs(f.grad - _central_differences(lambda: float((layer(x).data * G).sum()), f)).max()) for f in (A, B)
    )
    return differences, through_w


def _central_differences(value: Any, parameter: nn.Parameter, h: float = 1e-5) -> np.ndarray:
    start, gradient = parameter.data, np.zeros(parameter.shape)
    for index in np.ndindex(*parameter.shape):
        ends = []
        for sign in (1, -1):
            parameter.data = start.copy()
            parameter.data[index] += sign * h
            with no_grad():
                ends.append(value())
        gradient[index] = (ends[0] - ends[1]) / (2 * h)
    parameter.data = start
    return gradient


@claim("qlora.requantize", "After each product the weight is quantized again.")
def requantize() -> Evidence:
    """Bytes of codes and scales before and after training; what quantizing again would have changed."""
    run = train("nf4")
    after = {name: coded_bytes(layer.quantized) for name, layer in coded_layers(run.model).items()}
    same = sum(after[name] == run.codes[name] for name in after)
    again = [_changed_by_requantizing(layer.quantized) for layer in coded_layers(run.model).values()]
    size, steps = sum(map(len, after.values())), len(run.losses)
    return Evidence(
        f"The codes are never written again: codes and scales of {same} of {len(after)} layers ({size:,} bytes) are "
        f"the same before and after {steps} steps. The full weight is dropped; quantizing it again would change "
        f"{np.mean(again):.2%} of the codes.",
        f"编码自始至终没有改写过：训练 {steps} 步前后，{len(after)} 层中有 {same} 层的编码与块最大值（共 {size:,} 字"
        f"节）完全相同。高精度的权重用完即丢弃；如果再量化一次，会有 {np.mean(again):.2%} 的编码改变。",
        holds=same < len(after),
        instead=same == len(after),
        figures={"layers": len(after), "unchanged": same, "changed_by_requantizing": again},
    )


def _changed_by_requantizing(q: QuantizedTensor) -> float:
    again = quantize(dequantize(q), q.quant_type, q.blocksize)
    return float((unpack(again.codes, 4, q.size) != unpack(q.codes, 4, q.size)).mean())
