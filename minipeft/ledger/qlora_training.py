"""The claims of the document's QLoRA section about training: what 4 bits change in what is learned."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .. import data, ops, optim
from ..methods.lora import LoraConfig
from ..methods.qlora import loftq_init
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..quant import QuantizedLinear, QuantizedTensor, quantize_model
from ..recipes import METHODS
from ..tensor import Tensor, no_grad
from ..train import fit
from . import Evidence, chinese_marks, claim
from .runs import BATCH, STEPS, adapt


@dataclass(frozen=True)
class QloraRun:
    """The MLP adapted to the shifted digits on codes, or on full weights.

    Attributes:
        model: as trained.
        codes: the bytes of all codes and scales by layer, before training.
        losses: of the steps.
        accuracy: on the shifted test set.
    """

    model: Module
    codes: dict[str, bytes]
    losses: list[float]
    accuracy: float


@functools.cache
def train(quant: str | None = "nf4", seed: int = 0, shift: str = "rotated") -> QloraRun:
    """LoRA on the MLP whose weights are held in `quant` (None: in full precision), as `runs.adapt` trains it."""
    task, model = data.digits.transfer(shift), load_base("mlp")
    if quant is not None:
        quantize_model(model, quant)
    codes = {name: coded_bytes(layer.quantized) for name, layer in coded_layers(model).items()}
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16), seed=seed)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=METHODS["lora"].lr)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    history = fit(model, batches, steps=STEPS, optimizer=optimizer, progress=False)
    return QloraRun(model, codes, history.loss, accuracy(model.eval(), *task.test))


def coded_layers(model: Module) -> dict[str, QuantizedLinear]:
    """The layers that hold codes, under the names that they have without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def coded_bytes(q: QuantizedTensor) -> bytes:
    """All bytes that the codes consist of."""
    return b"".join(x.tobytes() for x in (q.codes, q.absmax, q.nested_absmax, q.offset) if x is not None)


def end_of(losses: list[float]) -> float:
    """The mean of the last ten losses."""
    return float(np.mean(losses[-10:]))


# --- what is lost, and what training brings back ----------------------------------------------------------------------


@claim("qlora.quality", "QLoRA comes close to full fine-tuning.")
def quality() -> Evidence:
    """Final loss and accuracy of full fine-tuning, LoRA and QLoRA on the same task, over seeds."""
    seeds = range(3)
    methods = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
    runs = {name: [adapt(method, "mlp", seed=seed) for seed in seeds] for method, name in methods.items()}
    loss = {name: [end_of(run.history.loss) for run in each] for name, each in runs.items()}
    reached = {name: [run.accuracy[1] for run in each] for name, each in runs.items()}
    text = "; ".join(
        f"{name} {np.mean(loss[name]):.3f} ± {np.std(loss[name]):.3f}, {np.mean(reached[name]):.1%} ± "
        f"{np.std(reached[name]):.1%}"
        for name in runs
    )
    gap = float(np.mean(reached["full"]) - np.mean(reached["QLoRA"]))
    of_codes = float(np.mean(reached["LoRA"]) - np.mean(reached["QLoRA"]))
    return Evidence(
        f"MLP on rotated digits, r = 8, {STEPS} steps, {len(seeds)} seeds, loss and accuracy: {text}. QLoRA's accuracy "
        f"is {100 * gap:.1f} points below full fine-tuning's, of which 4 bits make {100 * of_codes:.1f}.",
        f"MLP，旋转的手写数字，r = 8，{STEPS} 步，{len(seeds)} 个种子，损失与准确率："
        f"{chinese_marks(text).replace('full', '全参数微调')}。QLoRA 的准确率比全参数微调低 {100 * gap:.1f} 个百分点，"
        f"其中 {100 * of_codes:.1f} 个来自 4 比特量化。",
        figures={
            "loss": loss,
            "accuracy": reached,
            "curves": {name: each[0].history.loss for name, each in runs.items()},
        },
    )


@claim("qlora.low-bits", "Very low precision hurts, on hard tasks most.")
def low_bits() -> Evidence:
    """32, 8, 4, 3 and 2 bits: weight error; loss on the base's own task; loss and accuracy after adapting to two."""
    own, base, found = data.digits.load().test, load_base("mlp"), {}
    for quant, bits in ((None, 32), ("int8", 8), ("nf4", 4), ("nf3", 3), ("nf2", 2)):
        model = load_base("mlp") if quant is None else quantize_model(load_base("mlp"), quant)
        pairs = [(getattr(base, n).weight.data, getattr(model, n).weight.data) for n in ("fc1", "fc2")]
        runs = {"hard": train(quant), "easy": train(quant, shift="mirrored")}
        found[bits] = {
            "weight_error": float(np.sqrt(np.mean([((W - Q) ** 2).sum() / (W**2).sum() for W, Q in pairs]))),
            "own_loss": _loss(model, *own),
            "own_accuracy": accuracy(model, *own),
            **{f"{task}_before": run.losses[0] for task, run in runs.items()},
            **{f"{task}_loss": end_of(run.losses) for task, run in runs.items()},
            **{f"{task}_accuracy": run.accuracy for task, run in runs.items()},
        }
    shown = {"weight_error": ".1%", "own_loss": ".3f", "easy_accuracy": ".1%", "hard_accuracy": ".1%"}
    rows = [list(map(str, found)), *([format(f[key], form) for f in found.values()] for key, form in shown.items())]
    bits, off, loss, easy, hard = map(", ".join, rows)
    bits_zh, off_zh, loss_zh, easy_zh, hard_zh = map("、".join, rows)
    return Evidence(
        f"At {bits} bits the MLP's weights are {off} off; loss on the digits that it knows {loss}; accuracy after "
        f"adapting to mirrored digits (easy) {easy}, to rotated ones (hard) {hard}.",
        f"{bits_zh} 比特时，MLP 的权重误差依次为 {off_zh}；在原任务的数字上，损失为 {loss_zh}；适配镜像数字（易）后，"
        f"准确率为 {easy_zh}；适配旋转数字（难）后为 {hard_zh}。",
        figures={str(bits): f for bits, f in found.items()},
    )


@no_grad()
def _loss(model: Module, x: np.ndarray, y: np.ndarray) -> float:
    return ops.cross_entropy(model(x), y).item()


@claim("qlora.error-compensation", "The adapter compensates the quantization error.")
def error_compensation() -> Evidence:
    """Output error of the coded model before and after training: for the task, for the base's outputs; and LoftQ."""
    base, (x, y) = load_base("mlp"), data.digits.load().test
    with no_grad():
        outputs = base(x).data
    found = {}
    for quant in ("nf4", "nf2"):
        models = {objective: _compensating(quant, objective) for objective in OBJECTIVES}
        found[quant] = {
            objective: {"output_error": _relative(model(x).data, outputs), "loss": _loss(model, x, y)}
            for objective, model in models.items()
        }
    error = {quant: {name: f["output_error"] for name, f in by.items()} for quant, by in found.items()}
    by_training = all(e["task"] < e["nothing"] for e in error.values())
    possible = all(max(e["outputs"], e["loftq"]) < e["nothing"] for e in error.values())
    two = found["nf2"]
    rows, rows_zh = [], []
    for name, (label, label_zh) in OBJECTIVES.items():
        four, coarse = f"{error['nf4'][name]:.1%}", f"{error['nf2'][name]:.0%}"
        rows.append(f"{label} {four} and {coarse}")
        rows_zh.append(f"{label_zh} {four} 与 {coarse}")
    before, after, of_base = (
        f"{loss:.3f}" for loss in (two["nothing"]["loss"], two["task"]["loss"], _loss(base, x, y))
    )
    return Evidence(
        f"Output error against the base on the digits that it knows, in 4 and 2 bits: {'; '.join(rows)}. Training for "
        f"labels compensates the loss, not the outputs: in 2 bits {before} before, {after} after (base {of_base}).",
        f"在原任务的数字上，4 比特与 2 比特时输出与原模型的相对误差：{'；'.join(rows_zh)}。按标签训练补偿的是损失，"
        f"而不是输出：2 比特时，损失由 {before} 变为 {after}（原模型 {of_base}）。",
        holds=by_training and possible,
        within=possible and two["task"]["loss"] < two["nothing"]["loss"],
        figures={**found, "base_loss": _loss(base, x, y)},
    )


OBJECTIVES = {
    "nothing": ("with B = 0", "B = 0 时"),
    "loftq": ("with LoftQ's start", "LoftQ 初始化"),
    "task": ("trained for the labels", "按标签训练后"),
    "outputs": ("trained for the base's outputs", "按原模型的输出训练后"),
}


def _relative(outputs: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))


def _compensating(quant: str, objective: str) -> Module:
    """The coded MLP with adapters that did "nothing" yet, start as "loftq" says, or were trained on the digits that it
    knows: for their labels ("task"), or for the base's "outputs".
    """
    model = get_peft_model(quantize_model(load_base("mlp"), quant), LoraConfig(r=8, lora_alpha=16), seed=0).eval()
    base = load_base("mlp")
    if objective == "loftq":
        for name, layer in model.adapter_layers():
            s = layer.scaling["default"]
            W = base.get_submodule(name).weight.data
            q, A, B = loftq_init(W, 8, quant_type=quant, scaling=s, double_quant=True)
            layer.base_layer.quantized = q
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    if objective in ("nothing", "loftq"):
        return model

    def distance(model: Module, batch: tuple[np.ndarray, np.ndarray]) -> Tensor:
        with no_grad():
            wanted = base(batch[0]).data
        return ops.mse_loss(model(batch[0]), wanted)

    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=METHODS["lora"].lr)
    batches = data.digits.batches(*data.digits.load().pretrain, batch_size=BATCH, seed=0)
    loss_fn = distance if objective == "outputs" else None
    fit(model, batches, steps=STEPS, optimizer=optimizer, loss_fn=loss_fn, progress=False)
    return model.eval()
