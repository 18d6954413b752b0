"""Which shift of the digits separates the methods? The figures in minipeft/data/digits.py come from here.

    python benchmarks/shifts.py [--base mlp] [--shift rotated] [--seeds 5]

Every row adapts a pre-trained base to the shifted digits: AdamW, a cosine schedule, the steps and batch size of
`minipeft train`. The learning rate is the one of the row's grid with the best mean accuracy on the validation digits;
accuracy and its spread over seeds are then read on the test digits.
"""

from __future__ import annotations

import argparse

from minipeft import ops, optim  # before NumPy: OpenBLAS chooses its kernel once, and minipeft may ask for a faster one

# isort: split
import numpy as np

from minipeft.data import digits
from minipeft.ledger.runs import BATCH, STEPS
from minipeft.methods.lora import LoraConfig
from minipeft.models import BASES, load_base
from minipeft.models.pretrain import accuracy
from minipeft.nn import Module
from minipeft.peft import get_peft_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GRIDS = {"head": (0.03, 0.1, 0.3), "lora": (0.01, 0.02, 0.04), "full": (0.003, 0.01, 0.03)}


def prepared(base: str, method: str, r: int | None, targets: str | list[str], seed: int) -> Module:
    """The base with what the method trains left trainable: the head alone, adapters, or all but the head."""
    model = load_base(base)
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), seed=seed)
    model.requires_grad_(method == "full")
    model.head.requires_grad_(method == "head")
    return model


def adapted(model: Module, task: digits.Task, lr: float, seed: int) -> tuple[float, float]:
    """Train the model on the task; its accuracy on the validation and on the test digits."""
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = optim.get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    batches = digits.batches(*task.train, batch_size=BATCH, seed=seed)
    for step in range(STEPS):
        x, y = batches[step]
        loss = ops.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, *task.valid), accuracy(model, *task.test)


def row(
    base: str, task: digits.Task, seeds: int, method: str, r: int | None = None, targets: str | list[str] = "all-linear"
) -> str:
    """One line of the table."""
    scores = {}
    for lr in GRIDS[method]:
        models = [prepared(base, method, r, targets, seed) for seed in range(seeds)]
        scores[lr] = np.array([adapted(model, task, lr, seed) for seed, model in enumerate(models)])
    best = max(scores, key=lambda lr: scores[lr][:, 0].mean())
    test, trained = scores[best][:, 1], sum(p.size for p in models[0].parameters() if p.requires_grad)
    name = {"head": "head only", "full": "full (head frozen)", "lora": f"LoRA r = {r}"}[method]
    where = "" if method != "lora" else "all linear" if targets == "all-linear" else "attention"
    return f"  {name:<18} {where:<10} {trained:>6,} {best:>6g}   {test.mean():.3f} ± {test.std():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("?")[0] + "?")
    parser.add_argument("--base", choices=BASES, action="append")
    parser.add_argument("--shift", choices=digits.SHIFTS, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for base in options.base or BASES:
        for shift in options.shift or digits.SHIFTS:
            task = digits.transfer(shift)
            print(f"{base}, {shift}: {STEPS} steps of {BATCH}, {options.seeds} seeds", flush=True)
            print(f"  {'':<18} {'targets':<10} {'params':>6} {'lr':>6}   test accuracy")
            print(f"  {'base':<18} {'':<10} {'':>6} {'':>6}   {accuracy(load_base(base), *task.test):.3f}")
            runs = [("head",), *(("lora", r) for r in (1, 2, 4, 8))]
            runs += [("lora", r, ATTENTION) for r in (2, 4, 8) if base == "vit"] + [("full",)]
            for run in runs:
                print(row(base, task, options.seeds, *run), flush=True)


if __name__ == "__main__":
    main()
