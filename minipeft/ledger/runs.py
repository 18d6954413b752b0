"""Training runs that several claims read: each is done once in a process, whoever asks first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import data, optim
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..recipes import METHODS, Choice, prepared
from ..train import History, Progress, classification_loss, fit

STEPS, BATCH = 200, 64


@dataclass(frozen=True)
class Run:
    """A base before, and the model after adapting it to the shifted digits.

    Attributes:
        model: as trained (a PeftModel for LoRA).
        before: the base's arrays by name, copied.
        history: of the training.
        movement: ‖W_t − W_{t−1}‖_F over all trained weights, each step (full fine-tuning only).
        frozen_gradients: how many gradients of frozen parameters existed after any step.
        accuracy: on the shifted test set, before and after.
    """

    model: Module
    before: dict[str, Any]
    history: History
    movement: list[float]
    frozen_gradients: int
    accuracy: tuple[float, float]


@functools.cache
def adapt(method: str = "lora", base: str = "vit", r: int = 8, seed: int = 0, steps: int = STEPS) -> Run:
    """Adapt a pre-trained base to the shifted digits by one of `recipes.METHODS`, with its learning rate."""
    task, model = data.digits.transfer(), load_base(base)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    start = accuracy(model, *task.test)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    model = prepared(model, method, Choice(r, 2.0 * r, steps=steps), seed, batches, classification_loss)
    movement, seen = [], []
    watch = _watch_movement(model, movement) if method == "full" else _watch_frozen(seen)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=METHODS[method].lr)
    history = fit(model, batches, steps=steps, optimizer=optimizer, callbacks=[watch], progress=False)
    return Run(model, before, history, movement, sum(seen), (start, accuracy(model.eval(), *task.test)))


def _watch_movement(model: Module, movement: list[float]) -> Callable[[Progress], None]:
    last = {n: p.data.copy() for n, p in model.named_parameters() if p.requires_grad}

    def watch(progress: Progress) -> None:
        now = {n: p.data for n, p in model.named_parameters() if n in last}
        movement.append(float(np.sqrt(sum(np.sum((now[n] - last[n]) ** 2, dtype=np.float64) for n in last))))
        for n in last:
            last[n][...] = now[n]

    return watch


def _watch_frozen(seen: list[int]) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        seen.append(sum(p.grad is not None for p in progress.model.parameters() if not p.requires_grad))

    return watch


def weight_updates(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(W before, ΔW) of every adapted or fully trained projection: matrices of Linears, without the head."""
    if hasattr(run.model, "adapter_layers"):
        return {n: (run.before[f"{n}.weight"], layer.delta("default")) for n, layer in run.model.adapter_layers()}
    after = run.model.state_dict()
    return {
        name.removesuffix(".weight"): (run.before[name], after[name] - run.before[name])
        for name in after
        if name.endswith("proj.weight") or (name.startswith("fc") and name.endswith(".weight"))
    }
