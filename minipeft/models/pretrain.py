"""Make the pre-trained bases that ship with the package: `python -m minipeft.models.pretrain [NAME ...]`.

Training runs in float64 and the result is stored in float32: the order in which a BLAS adds its numbers then shows
only far behind the digits that are kept, and every machine makes the same base.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import nn, ops, optim
from ..backend import Array
from ..data import digits
from ..files import write_tensors
from ..tensor import no_grad
from . import BASES, base_class, base_file

SEED, STEPS, BATCH_SIZE, LR, WEIGHT_DECAY = 0, 600, 32, 3e-3, 0.05


def pretrain(name: str, steps: int = STEPS, seed: int = SEED) -> nn.Module:
    """Train a new model on the upright digits of the "pretrain" part, in float64: AdamW, cosine schedule.

    Args:
        name: "mlp" or "vit".
        steps: of `BATCH_SIZE` images.
        seed: of the start values and the order of the images.

    Raises:
        ValueError: an unknown name.
    """
    model = base_class(name)(rng=seed, dtype="float64")
    batches = digits.batches(*digits.load("float64").pretrain, batch_size=BATCH_SIZE, seed=seed)
    optimizer = optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = optim.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in range(steps):
        x, y = batches[step]
        loss = ops.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@no_grad()
def accuracy(model: nn.Module, x: Array, y: Array) -> float:
    """The share of the images x (N, 64) whose largest logit is that of their digit y (N,)."""
    return float((model(x).data.argmax(axis=1) == y).mean())


def save_base(name: str, path: Path) -> dict[str, Any]:
    """Pre-train a base and write it to `path` in float32; returns what the file's header says of it."""
    model = pretrain(name)
    weights = {key: value.astype(np.float32) for key, value in model.state_dict().items()}
    made = {
        "command": f"python -m minipeft.models.pretrain {name}",
        "seed": SEED,
        "steps": STEPS,
        "test_accuracy": accuracy(model, *digits.load("float64").test),
    }
    write_tensors(path, weights, {"made": json.dumps(made)})  # one entry: safetensors keeps no order of several
    return made


if __name__ == "__main__":
    for chosen in sys.argv[1:] or BASES:
        print(chosen, save_base(chosen, base_file(chosen)))
