"""The claims about what LoRA is compared with: Adapter, P-Tuning, and full training before LoRA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import data, optim
from ..backend import count_flops
from ..measure import compare_latency
from ..methods.hybrid import FullThenLoraConfig, Phase
from ..models import load_base
from ..models.llama import Llama
from ..models.llama_config import LlamaConfig
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..recipes import Choice, prepared
from ..train import classification_loss, fit
from . import Evidence, claim
from .runs import BATCH

# --- few parameters, a whole backward pass ----------------------------------------------------------------------------

EFFICIENT = {"adapter": "Adapter", "p-tuning": "P-Tuning", "lora": "LoRA"}
ROWS, TOKENS = 2, 128


def _language_model(method: str) -> Module:
    """Four blocks, wide enough that products are nearly all of a step and eight virtual tokens are few."""
    config = LlamaConfig(256, 192, 512, 4, 6, max_position_embeddings=2 * TOKENS)
    return prepared(Llama(config, rng=0), method, Choice())


@claim(
    "lora.not-train-efficient",
    "Adapter and P-Tuning are parameter-efficient, not training-efficient: backward still crosses the whole model.",
)
def not_train_efficient() -> Evidence:
    """Trained parameters, counted products and measured time of a step, each ÷ full training's.

    A backward pass that crosses the whole model and computes no dW has as many products as the forward pass of the
    model alone: dX = g W for every y = x Wᵀ.
    """
    models = {method: _language_model(method) for method in ("full", *EFFICIENT)}
    ids = np.random.default_rng(0).integers(0, 256, (ROWS, TOKENS))
    counted, trained = {}, {}
    for method, model in models.items():
        trained[method] = sum(p.size for p in model.parameters() if p.requires_grad)
        with count_flops() as flops:
            model.loss(ids).backward()
        counted[method] = flops.forward, flops.backward
    times = compare_latency({method: _step(model, ids) for method, model in models.items()}, repeat=6, warmup=1)
    full = counted["full"]
    figures = {
        method: {
            "parameters": trained[method] / trained["full"],
            "crossed": counted[method][1] / full[0],
            "flops": sum(counted[method]) / sum(full),
            "time": times[method].minimum / times["full"].minimum,
        }
        for method in models
    }
    shown, shown_zh = [], []
    for method, name in EFFICIENT.items():
        parameters = f"{figures[method]['parameters']:.1%}"
        flops, time, across = (f"{figures[method][part]:.2f}" for part in ("flops", "time", "crossed"))
        shown.append(
            f"{name} {parameters} of the parameters, {flops} of the products, {time} of the time, backward {across} of "
            "the model's forward"
        )
        shown_zh.append(f"{name} 的参数 {parameters}，乘法 {flops}，用时 {time}，反向的乘法为模型前向的 {across}")
    few = all(figures[method]["parameters"] < 0.1 for method in EFFICIENT)
    crossed = all(figures[method]["crossed"] > 0.8 for method in EFFICIENT)
    return Evidence(
        f"A step of a Llama (4 blocks of 192) on {ROWS} × {TOKENS} tokens, ÷ full training, AdamW's update in the "
        f"time: {'; '.join(shown)}. Only the products dW of frozen weights are saved, a third of all at most.",
        f"Llama（4 层，宽 192）在 {ROWS} × {TOKENS} 个词元上训练一步，÷ 全参数训练（用时含 AdamW 的更新）："
        f"{'；'.join(shown_zh)}。省下的只是冻结权重的 dW，最多占全部乘法的三分之一。",
        holds=few and crossed,
        figures=figures,
    )


def _step(model: Module, ids: np.ndarray) -> Callable[[], None]:
    """A whole training step: gradients, then AdamW."""
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        optimizer.zero_grad()
        model.loss(ids).backward()
        optimizer.step()

    return step


# --- full training first ----------------------------------------------------------------------------------------------

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 1.0)
SEEDS, STEPS = range(4), 100
LR = 2e-2  # for every share; LoRA alone has its best on the validation digits with it, of 5, 10, 20, 50 ·1e-3


@dataclass(frozen=True)
class HybridRun:
    """One run of full-then-LoRA on the MLP and the rotated digits.

    Attributes:
        loss: of each step.
        accuracy: on the test digits.
        flops: of all products of the run.
        phases: what "full" and "lora" held.
        weights: bytes of the whole model.
    """

    loss: list[float]
    accuracy: float
    flops: int
    phases: dict[str, Phase]
    weights: int

    @property
    def held(self) -> list[tuple[int, int]]:
        """(steps, bytes of weights, gradients and optimizer state) of the phases that there were."""
        return [(p.steps, self.weights + p.gradients + p.optimizer) for p in self.phases.values() if p.steps]


@functools.cache
def hybrid(fraction: float, seed: int, steps: int = STEPS) -> HybridRun:
    """LoRA at 0, full training at 1, between them the one after the other; only the share differs."""
    task, config = data.digits.transfer(), Choice(steps=steps)
    options = {"r": config.r, "lora_alpha": config.alpha, "train_head": False}
    model = get_peft_model(load_base("mlp"), FullThenLoraConfig(fraction=fraction, **options), seed=seed)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    with count_flops() as flops:
        history = fit(model, batches, steps=steps, optimizer=optimizer, loss_fn=classification_loss, progress=False)
    weights = sum(p.data.nbytes for p in model.parameters())
    return HybridRun(history.loss, accuracy(model.eval(), *task.test), flops.total, model.method.record, weights)


@claim(
    "lora.hybrid",
    "Full training for the first 10–30 % of steps, then LoRA: steadier than LoRA alone, cheaper than full training.",
)
def hybrid_training() -> Evidence:
    """Loss and accuracy with their spread over seeds, products and bytes, for shares of full training from 0 to 1."""
    runs = {fraction: [hybrid(fraction, seed) for seed in SEEDS] for fraction in FRACTIONS}
    dearest = runs[1.0][0]
    figures = {f"{fraction:.0%}": _summary(found, dearest) for fraction, found in runs.items()}
    listed = [
        [f"{name} {f['loss']:.3f} ± {f['loss_spread']:.3f}" for name, f in figures.items()],
        [f"{f['accuracy']:.1%} ± {f['accuracy_spread']:.1%}" for f in figures.values()],
        *([f"{f[part]:.2f}" for f in figures.values()] for part in ("flops", "mean_bytes", "peak_bytes")),
    ]
    losses, accuracies, flops, mean_bytes, peak = map(", ".join, listed)
    losses_zh, accuracies_zh, flops_zh, mean_zh, peak_zh = map("、".join, listed)
    return Evidence(
        f"MLP on rotated digits, {STEPS} steps, lr {LR:g}, {len(SEEDS)} seeds, by the share of full training. Loss of "
        f"the last tenth: {losses}; test accuracy {accuracies}. ÷ full training: products {flops}; bytes of weights, "
        f"gradients and optimizer state on average {mean_bytes}, at their peak {peak}.",
        f"MLP，旋转的手写数字，{STEPS} 步，lr {LR:g}，{len(SEEDS)} 个种子，按全参数训练的步数占比列出。"
        f"最后十分之一步的损失：{losses_zh}；测试准确率：{accuracies_zh}。÷ 全参数训练：乘法 {flops_zh}；"
        f"参数、梯度与优化器状态的字节数，平均 {mean_zh}，峰值 {peak_zh}。",
        figures=figures,
    )


def _summary(runs: list[HybridRun], full: HybridRun) -> dict[str, float]:
    """Means, standard deviations over seeds, and costs ÷ those of full training."""
    ends = [float(np.mean(run.loss[-STEPS // 10 :])) for run in runs]
    reached, (whole,) = [run.accuracy for run in runs], {held for _, held in full.held}
    steps, held = zip(*runs[0].held, strict=True)
    return {
        "loss": float(np.mean(ends)),
        "loss_spread": float(np.std(ends)),
        "accuracy": float(np.mean(reached)),
        "accuracy_spread": float(np.std(reached)),
        "flops": runs[0].flops / full.flops,
        "mean_bytes": float(np.average(held, weights=steps)) / whole,
        "peak_bytes": max(held) / whole,
    }
