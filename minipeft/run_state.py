"""A training run on disk: everything that the rest of it depends on, in one safetensors file, replaced whole."""

from __future__ import annotations

import json
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import backend, blas, files, threads
from .methods.base import Method
from .module import Module, assign
from .optimizer import Optimizer

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class History:
    """What a run was like, one entry a step.

    Attributes:
        loss: the mean loss of the step's batches, without the method's penalty.
        lr: the first parameter group's learning rate.
        grad_norm: ‖g‖₂ before clipping, where `clip_norm` was given.
        seconds: the wall-clock time of the whole run in this process.
    """

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: float = 0.0


def _generators(model: Module) -> dict[str, np.random.Generator]:
    """The generators that training draws from: modules keep theirs as `rng`."""
    rngs = {name: getattr(module, "rng", None) for name, module in model.named_modules()}
    return {name: rng for name, rng in rngs.items() if isinstance(rng, np.random.Generator)}


def identity_of(model: Module, trained: dict[str, Any], optimizer: Optimizer) -> dict[str, str]:
    """What a run that goes on must share with the one that stopped, besides the names and shapes of what trains."""
    digest, changing = 0, set(map(id, trained.values()))
    for p in model.parameters():
        if id(p) not in changing:
            digest = zlib.crc32(np.ascontiguousarray(backend.to_numpy(p.data)).view(np.uint8), digest)
    return {"optimizer": type(optimizer).__name__, "frozen weights": f"{digest:08x}"}


def _arithmetic() -> str:
    """What the last bits of a product depend on, besides the numbers."""
    return f"NumPy {np.__version__}, BLAS kernel {blas.running_kernel()}, {threads.threads()} threads"


def save_run(
    path: Path,
    step: int,
    model: Module,
    trained: dict[str, Any],
    optimizer: Optimizer,
    history: History,
    identity: dict[str, str],
    method: Method,
) -> None:
    """Write everything that the rest of the run depends on, to a temporary name, then rename."""
    tensors = {f"model.{name}": p.data for name, p in trained.items()}
    tensors |= {f"optimizer.{name}": array for name, array in optimizer.state_dict().items()}
    tensors |= {f"method.{name}": array for name, array in method.state_dict().items()}
    for name in ("loss", "lr", "grad_norm"):
        tensors[f"history.{name}"] = np.array(getattr(history, name), dtype=np.float64)
    states = {name: rng.bit_generator.state for name, rng in _generators(model).items()}
    generators = json.dumps(states, default=np.ndarray.tolist)  # some generators keep arrays
    metadata = {"step": str(step), "generators": generators, "arithmetic": _arithmetic(), **identity}
    files.write_tensors(path, tensors, metadata)


def load_run(
    path: Path,
    model: Module,
    trained: dict[str, Any],
    optimizer: Optimizer,
    history: History,
    identity: dict[str, str],
    steps: int,
    method: Method,
) -> int:
    """Take over a checkpoint, after checking that it is this run's; returns how many steps it has done.

    Warns where the products of the steps to come may round differently from those that were done.
    """
    tensors, metadata = files.read_tensors(path)
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "history": {}, "method": {}}
    for key, array in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = array
    try:
        done, states = int(metadata["step"]), json.loads(metadata["generators"])
        lists = {name: parts["history"][name].tolist() for name in ("loss", "lr", "grad_norm")}
        kinds = {name: state["bit_generator"] for name, state in states.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint that fit wrote ({error!r})") from error
    saved, generators = parts["model"], _generators(model)
    here = {f"parameter {name}": p.shape for name, p in trained.items()} | identity
    here |= {f"generator {name}": rng.bit_generator.state["bit_generator"] for name, rng in generators.items()}
    there = {f"parameter {name}": array.shape for name, array in saved.items()}
    there |= {f"generator {name}": kind for name, kind in kinds.items()}
    there |= {name: metadata.get(name, "") for name in identity}
    if here != there:
        key = next(key for key in here | there if here.get(key) != there.get(key))
        raise ValueError(
            f"{path}: a checkpoint of another run: {key} is {there.get(key)} there and {here.get(key)} here"
        )
    if done > steps:
        raise ValueError(f"steps: got {steps}; the checkpoint {path} has done {done} already")
    arithmetic = metadata.get("arithmetic", _arithmetic())
    if arithmetic != _arithmetic():
        warnings.warn(
            f"{path}: written with {arithmetic}; going on with {_arithmetic()}: the last bits may differ from those of "
            "a run never stopped",
            stacklevel=3,
        )
    method.load_state_dict(parts["method"])
    optimizer.load_state_dict(parts["optimizer"])
    for name, p in trained.items():
        assign(p, saved[name])
    for name, rng in generators.items():
        rng.bit_generator.state = states[name]
    for name, values in lists.items():
        setattr(history, name, values)
    return done
