"""Make the pre-trained bases that ship with the package: `python -m minipeft.models.pretrain [NAME ...]`.

Training runs in float64 and the result is stored in float32: the order in which a BLAS adds its numbers then shows
only far behind the digits that are kept, and every machine makes the same base.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from .. import backend, nn, ops, optim
from ..backend import Array
from ..data import digits
from ..tensor import no_grad
from . import BASES

SEED, STEPS, BATCH_SIZE, LR, WEIGHT_DECAY = 0, 600, 32, 3e-3, 0.05


def pretrain(name: str, steps: int = STEPS, seed: int = SEED) -> nn.Module:
    """Train a new model on the upright digits of the "pretrain" part, in float64: AdamW, cosine schedule.

    Args:
        name: "mlp" or "vit".
        steps: of `BATCH_SIZE` images.
        seed: of the start values and the order of the images.
    """
    model = BASES[name](rng=seed, dtype="float64")
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


def save_base(name: str, path: Path) -> dict[str, str]:
    """Pre-train a base and write it to `path` in float32; returns the metadata in the file's header."""
    from safetensors.numpy import save

    model = pretrain(name)
    data = digits.load("float64")
    metadata = {
        "command": f"python -m minipeft.models.pretrain {name}",
        "seed": str(SEED),
        "steps": str(STEPS),
        "test_accuracy": f"{accuracy(model, *data.test):.4f}",
    }
    weights = {key: backend.to_numpy(value).astype(np.float32) for key, value in model.state_dict().items()}
    digits.replace_file(path, save(weights, metadata))
    return metadata


if __name__ == "__main__":
    for chosen in sys.argv[1:] or BASES:
        print(chosen, save_base(chosen, Path(__file__).with_name(f"{chosen}.safetensors")))
