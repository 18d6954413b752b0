"""The claims of the document's QLoRA section about what QLoRA avoids: weights and products that have only 4 bits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import data, ops, optim
from ..methods.lora import LoraConfig
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..quant import quantize_model
from ..quant.codes import unpack
from ..quant.nf4 import dequantize, quantize_nf4
from ..recipes import METHODS
from ..tensor import Tensor, result
from ..train import Progress, classification_loss, fit
from . import Evidence, claim
from .qlora_training import end_of, train
from .runs import BATCH, STEPS

# --- weights in 4 bits ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StaticRun:
    """The MLP's weights themselves trained, rounded to NF4 after every step.

    Attributes:
        losses: of the steps.
        accuracy: on the shifted test set.
        vanished: every tenth step, the share of weights whose update rounding took back: their code stayed.
        small: every tenth step, the share of weights whose update was below half the step to the next code.
        lost: every tenth step, ‖rounded − (W + update)‖ ÷ ‖update‖.
    """

    losses: list[float]
    accuracy: float
    vanished: list[float]
    small: list[float]
    lost: list[float]


@functools.cache
def train_static(rounding: str | None, lr: float, seed: int = 0, steps: int = STEPS) -> StaticRun:
    """Full fine-tuning from the NF4 weights: all are rounded ("nearest", "stochastic") after each step, or not."""
    task, model = data.digits.transfer(), load_base("mlp")
    weights = [model.get_submodule(name).weight for name in ("fc1", "fc2")]
    for W in weights:
        W.data = dequantize(quantize_nf4(W.data))
    before = [W.data.copy() for W in weights]
    model.head.requires_grad_(False)
    rng = np.random.default_rng(seed)
    seen: dict[str, list[float]] = {"vanished": [], "small": [], "lost": []}

    def after_step(progress: Progress) -> None:
        shares = []
        for W, old in zip(weights, before, strict=True):
            wanted = W.data.copy()
            W.data[...] = round_to_nf4(wanted, None if rounding == "nearest" else rng)
            if progress.step % 10 == 1:
                shares.append(_lost_update(old, wanted, W.data))
            old[...] = W.data
        for name, values in zip(seen, zip(*shares, strict=True), strict=False):
            seen[name].append(float(np.average(values, weights=[W.size for W in weights])))

    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    callbacks = [after_step] if rounding else []
    history = fit(model, batches, steps=steps, optimizer=optimizer, callbacks=callbacks, progress=False)
    return StaticRun(history.loss, accuracy(model.eval(), *task.test), **seen)


def _lost_update(before: np.ndarray, wanted: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Of before → wanted, rounded to after: shares that kept their code, that were below half a step; ‖error‖."""
    update = wanted - before
    moved = update != 0
    codes_before, codes_after = (unpack(quantize_nf4(W).codes, 4, W.size) for W in (before, after))
    return (
        float((codes_before == codes_after)[moved.reshape(-1)].mean()),
        float((np.abs(update) < _half_steps(before))[moved].mean()),
        float(np.linalg.norm(after - wanted) / np.linalg.norm(update)),
    )


def round_to_nf4(W: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """W rounded to NF4's numbers in blocks of 64: to the nearest, or with a generator at random to one of the two
    neighbours, so that the mean is W (stochastic rounding: Gupta et al. 2015, section 3.1).
    """
    q = quantize_nf4(W)
    if rng is None:
        return dequantize(q)
    maxima = np.repeat(q.absmax, q.blocksize)[: W.size]
    scaled = W.reshape(-1) / np.where(maxima > 0, maxima, 1)
    below = np.clip(np.searchsorted(q.table, scaled, side="right") - 1, 0, 14)
    share = (scaled - q.table[below]) / (q.table[below + 1] - q.table[below])
    return (maxima * q.table[below + (rng.random(W.size) < share)]).reshape(W.shape).astype(W.dtype)


def _half_steps(W: np.ndarray) -> np.ndarray:
    """Half the distance from each weight's NF4 number to its nearer neighbour, in W's units."""
    q = quantize_nf4(W)
    gaps = np.diff(q.table)
    nearer = np.minimum(np.concatenate([gaps[:1], gaps]), np.concatenate([gaps, gaps[-1:]]))
    maxima = np.repeat(q.absmax, q.blocksize)[: W.size]
    return (0.5 * nearer[unpack(q.codes, 4, q.size)] * maxima).reshape(W.shape)


@claim("qlora.static-quant", "Training on statically quantized weights loses quality.")
def static_quant() -> Evidence:
    """The weights themselves trained and rounded to 4 bits after every step, to the nearest and at random; QLoRA."""
    lr = METHODS["full"].lr
    runs = {
        "not rounded": train_static(None, lr),
        "nearest": train_static("nearest", lr),
        "nearest, lr ×10": train_static("nearest", 10 * lr),
        "stochastic": train_static("stochastic", lr),
    }
    qlora = train("nf4")
    loss = {name: end_of(run.losses) for name, run in runs.items()}
    nearest, stochastic = runs["nearest"], runs["stochastic"]
    small, vanished = float(np.mean(nearest.small)), float(np.mean(nearest.vanished))
    loses = {name: loss[name] > 1.5 * loss["not rounded"] for name in ("nearest", "stochastic")}
    ends = {name: (f"{loss[name]:.2f}", f"{run.accuracy:.0%}") for name, run in runs.items()}
    ends["QLoRA"] = f"{end_of(qlora.losses):.2f}", f"{qlora.accuracy:.0%}"
    coarse, exact, random, codes = (ends[name] for name in ("nearest", "not rounded", "stochastic", "QLoRA"))
    _, large_steps = ends["nearest, lr ×10"]
    return Evidence(
        f"Rounded to the nearest code after every step, {small:.1%} of updates are below half a code step and "
        f"{vanished:.1%} vanish: loss {coarse[0]} after {STEPS} steps, accuracy {coarse[1]}; not rounded {exact[0]}, "
        f"{exact[1]}; QLoRA {codes[0]}, {codes[1]}. Steps ten times as large reach {large_steps}; stochastic rounding "
        f"keeps updates on average: {random[0]}, {random[1]}, with full fine-tuning's gradients and states.",
        f"每步之后都舍入到最近的编码时，{small:.1%} 的更新不足半个编码间隔，{vanished:.1%} 的更新消失："
        f"{STEPS} 步后损失 {coarse[0]}，准确率 {coarse[1]}；不舍入为 {exact[0]}、{exact[1]}；QLoRA 为 {codes[0]}、"
        f"{codes[1]}。步长放大十倍，准确率为 {large_steps}；随机舍入在平均意义上保住了更新（{random[0]}、"
        f"{random[1]}），但梯度和优化器状态与全参数微调一样多。",
        holds=all(loses.values()) and small > 0.5,
        within=loses["nearest"] and small > 0.5 and vanished > 0.5 and loss["nearest"] > 1.5 * end_of(qlora.losses),
        figures={
            "curves": {**{name: run.losses for name, run in runs.items()}, "QLoRA": qlora.losses},
            "accuracy": {**{name: run.accuracy for name, run in runs.items()}, "QLoRA": qlora.accuracy},
            "small": nearest.small,
            "vanished": nearest.vanished,
            "lost": {"nearest": nearest.lost, "stochastic": stochastic.lost},
        },
    )


# --- products in 4 bits -----------------------------------------------------------------------------------------------


def four_bit(x: np.ndarray, scales: str) -> np.ndarray:
    """x rounded to NF4 in "blocks" of 64, or to the 15 numbers of INT4 with one scale for the whole "tensor"."""
    if scales == "blocks":
        return dequantize(quantize_nf4(x))
    largest = np.abs(x).max()
    return np.rint(x * (7 / largest)) * (largest / 7) if largest else x


class FourBit(Module):
    """A layer as 4-bit products see it: its input and the gradient of its output rounded, as `inputs` and `gradients`
    say ("blocks", "tensor", None: not rounded; see `four_bit`).
    """

    def __init__(self, layer: Module, inputs: str | None, gradients: str | None) -> None:
        self.layer, self.inputs, self.gradients = layer, inputs, gradients

    def forward(self, x: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        x = ops.tensor(x)
        if self.inputs:
            x = result("four_bit", four_bit(x.data, self.inputs), (x, lambda g: g))
        y = self.layer(x)
        scales = self.gradients
        return y if scales is None else result("four_bit", y.data, (y, lambda g: four_bit(g, scales)))


ARITHMETIC = {  # rounding of inputs, of gradients, of the adapters after each step
    "full precision": (None, None, False),
    "gradients in blocks": (None, "blocks", False),
    "gradients, one scale": (None, "tensor", False),
    "inputs and gradients in blocks": ("blocks", "blocks", False),
    "inputs and gradients, one scale": ("tensor", "tensor", False),
    "adapters too": ("blocks", "blocks", True),
}


@functools.cache
def train_in_four_bits(arithmetic: str) -> dict[str, Any]:
    """QLoRA on the MLP with such products: losses, accuracy; at the end the error of gradients, and ‖ΔW‖.

    Of adapters in 4 bits also what became of steps from a block's maximum towards zero: how many, and how many of the
    numbers were as large as before, or larger, once they were rounded.
    """
    inputs, gradients, adapters = ARITHMETIC[arithmetic]
    task, model = data.digits.transfer(), quantize_model(load_base("mlp"))
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16), seed=0)
    for name, layer in list(model.adapter_layers()):
        model.get_base_model().set_submodule(name, FourBit(layer, inputs, gradients))
    trained = [p for p in model.parameters() if p.requires_grad]
    before, steps_down = [p.data.copy() for p in trained], np.zeros(2, int)

    def after_step(progress: Progress) -> None:
        for p, old in zip(trained, before, strict=True):
            wanted = p.data.copy()
            p.data[...] = round_to_nf4(wanted)
            steps_down[:] += _steps_down(old, wanted, p.data)
            old[...] = p.data

    optimizer, callbacks = optim.AdamW(trained, lr=METHODS["lora"].lr), [after_step] if adapters else []
    history = fit(model, batches, steps=STEPS, optimizer=optimizer, callbacks=callbacks, progress=False)
    reached = accuracy(model.eval(), *task.test)
    one_epoch = [batches[i] for i in range(math.ceil(batches.steps_per_epoch))]
    rounded = _gradients(model, one_epoch)
    for layer in model.modules():
        if isinstance(layer, FourBit):
            layer.inputs = layer.gradients = None
    exact = _gradients(model, one_epoch)
    error = float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact))
    update = max(float(np.linalg.norm(layer.delta("default"))) for _, layer in model.adapter_layers())
    found = {"curve": history.loss, "accuracy": reached, "gradient_error": error, "update": update}
    return found | ({"steps_down": int(steps_down[0]), "rounded_up": int(steps_down[1])} if adapters else {})


def _steps_down(before: np.ndarray, wanted: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Of before → wanted, rounded to after: the steps of a block's largest numbers towards zero, and how many of the
    numbers did not become smaller.
    """
    largest = np.repeat(quantize_nf4(before).absmax, 64)[: before.size].reshape(before.shape)
    down = (np.abs(before) == largest) & (np.abs(wanted) < largest)
    return int(down.sum()), int((down & (np.abs(after) >= largest)).sum())


def _gradients(model: Module, batches: Any) -> np.ndarray:
    """The gradients of all adapters on each batch, one after the other. Of a single batch the error is accidental."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for batch in batches:
        for p in trained:
            p.grad = None
        classification_loss(model, batch).backward()
        found += [p.grad.reshape(-1) for p in trained]
    return np.concatenate(found)


@claim("qlora.4bit-arithmetic", "Computing in 4 bits directly makes training fail, by the error of the gradients.")
def four_bit_arithmetic() -> Evidence:
    """QLoRA with its products' inputs and gradients rounded to 4 bits: loss, accuracy, error of the gradients."""
    found = {name: train_in_four_bits(name) for name in ARITHMETIC}
    told = {
        "full precision": "全精度",
        "gradients in blocks": "分块的梯度",
        "inputs and gradients, one scale": "共用一个缩放系数的输入和梯度",
        "adapters too": "再加上适配器",
    }
    rows, rows_zh = [], []
    for name, zh in told.items():
        loss, reached = f"{end_of(found[name]['curve']):.3g}", f"{found[name]['accuracy']:.0%}"
        off = f"{found[name]['gradient_error']:.0%}"
        rows.append(f"{name} {loss} ({reached}, {off} off)")
        rows_zh.append(f"{zh} {loss}（{reached}，误差 {off}）")
    coded = found["adapters too"]
    grown = coded["update"] / found["full precision"]["update"]
    back = f"{coded['rounded_up'] / coded['steps_down']:.1%}"
    return Evidence(
        f"Loss after {STEPS} steps (accuracy, error of the gradients at the end) by what is in 4 bits: "
        f"{'; '.join(rows)}. With the adapters in NF4 ‖ΔW‖ grows {grown:.0f} times as large: of the steps down from a "
        f"block's maximum {back} are below half a code step, and rounded up again.",
        f"{STEPS} 步后的损失（准确率，最后的梯度误差），按用 4 比特的量列出：{'；'.join(rows_zh)}。"
        f"适配器也存成 NF4 时，‖ΔW‖ 增大到 {grown:.0f} 倍：从块最大值往回走的步子中，有 {back} "
        "不足半个编码间隔，又被舍入回最大值。",
        figures=found,
    )
