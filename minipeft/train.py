"""fit: the training loop, with a method's hooks, a progress bar, checkpoints, and a resume that gives the same bits."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import backend, files, ops
from .methods.base import Method
from .nn import Module, assign
from .optim import LambdaLR, Optimizer, clip_grad_norm_
from .tensor import Tensor, no_grad

CHECKPOINT = "checkpoint.safetensors"
Loss = Callable[[Module, Any], Tensor]


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


@dataclass
class Progress:
    """What callbacks get after each step: `step` steps of `steps` are done."""

    step: int
    steps: int
    loss: float
    model: Module
    optimizer: Optimizer
    history: History


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message says at which step and in which module it began."""


def classification_loss(model: Module, batch: Any) -> Tensor:
    """cross_entropy(model(x), y) for a batch (x, y)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"batches: each must be a pair (x, y), or pass loss_fn; got one of type {type(batch).__name__}")
    x, y = batch
    return ops.cross_entropy(model(x), y)


def fit(
    model: Module,
    batches: Any,
    *,
    steps: int,
    optimizer: Optimizer,
    loss_fn: Loss | None = None,
    method: Method | None = None,
    scheduler: LambdaLR | None = None,
    clip_norm: float | None = None,
    grad_accumulation: int = 1,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[Progress], None]] = (),
    progress: bool | None = None,
) -> History:
    """Train what requires a gradient in `model` for `steps` steps; the model is in training mode meanwhile.

    Args:
        batches: a function of the batch's number, a sequence (taken round and round; without a length, endless), or an
            iterable (iterated again when it ends). For a resume that ends with the same bits it must give the same
            batches again.
        loss_fn: (model, batch) -> scalar Tensor; left out, cross entropy for batches (x, y).
        method: its hooks are called; left out, the method of a PeftModel's active adapter.
        clip_norm: scale the gradients down to this total norm.
        grad_accumulation: batches per step; the gradient is their mean.
        checkpoint_dir: where `checkpoint.safetensors` is kept: the trained parameters, the optimizer's state, the
            generators' states and the history. It is replaced whole, so a killed run leaves a whole one.
        checkpoint_every: write it after every this many steps (and always after the last); left out, a tenth of them.
        resume: go on from the checkpoint, if there is one. The end is bit for bit that of a run never stopped.
        callbacks: called with a `Progress` after each step.
        progress: show a bar; left out, on a terminal only.

    Raises:
        ValueError: an argument out of its range, nothing to train, a trainable parameter that the optimizer does not
            know, or a checkpoint of another run.
        NonFiniteLossError: the loss, or a parameter that was to be kept, is NaN or infinite. The last checkpoint stays.
    """
    loss_fn = loss_fn or classification_loss
    method = method or (getattr(model, "method", None) if hasattr(model, "peft_config") else None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check(steps, grad_accumulation, checkpoint_every, clip_norm, trained, optimizer)
    checkpoint = Path(checkpoint_dir) / CHECKPOINT if checkpoint_dir is not None else None
    identity = _identity(model, optimizer) if checkpoint is not None else {}
    every = checkpoint_every or max(1, steps // 10)
    history = History()
    first = 0
    if resume:
        if checkpoint is None:
            raise ValueError("resume: needs checkpoint_dir")
        if checkpoint.exists():
            first = _load(checkpoint, model, trained, optimizer, history, identity, steps)
            if scheduler is not None:
                scheduler.go_to(first)
    stream = _stream(batches, first * grad_accumulation)
    modes, start = [(module, module.training) for module in model.modules()], time.perf_counter()
    model.train()
    try:
        with _bar(steps, first, progress) as show:
            for step in range(first, steps):
                optimizer.zero_grad()
                loss, examples = _accumulate(model, loss_fn, method, stream, grad_accumulation, step)
                if clip_norm is not None:
                    history.grad_norm.append(clip_grad_norm_(trained.values(), clip_norm))
                if method is not None:
                    method.before_step(model, step)
                history.loss.append(loss)
                history.lr.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if method is not None:
                    method.after_step(model, step)
                done = step + 1
                history.seconds = time.perf_counter() - start
                kept = checkpoint is not None and done % every == 0
                if kept or done == steps:
                    _check_finite(trained, done)
                if checkpoint is not None and (kept or done == steps):
                    _save(checkpoint, done, model, trained, optimizer, history, identity)
                show(done, loss, examples)
                for callback in callbacks:
                    callback(Progress(done, steps, loss, model, optimizer, history))
    finally:
        for module, training in modes:
            module.training = training
    return history


def _check(steps: int, accumulation: int, every: int | None, clip: float | None, trained: dict, optimizer: Any) -> None:
    for name, value in (("steps", steps), ("grad_accumulation", accumulation), ("checkpoint_every", every)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name}: got {value!r}; an int of at least 1 is accepted")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip_norm: got {clip}; a positive number is accepted")
    if not trained:
        raise ValueError("model: no parameter requires a gradient, there is nothing to train")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in trained.items() if id(p) not in known]
    if lost:
        raise ValueError(
            f"optimizer: {len(lost)} of the model's {len(trained)} trainable parameters are not in it ({lost[0]} …); "
            "make it after get_peft_model, from model.parameters()"
        )


def _accumulate(
    model: Module, loss_fn: Loss, method: Method | None, stream: Iterator[Any], n: int, step: int
) -> tuple[float, int]:
    """Gradients of the mean loss of n batches, and of the method's penalty; (that loss, how many examples)."""
    total, examples = 0.0, 0
    for _ in range(n):
        batch = next(stream)
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn: expected a Tensor with one element, got {type(loss).__name__}")
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(_diagnose(model, loss_fn, batch, step, value))
        total += value
        examples += _examples(batch)
        (loss if n == 1 else loss * (1 / n)).backward()
        del loss
    penalty = method.penalty(model) if method is not None else None
    if penalty is not None:
        penalty.backward()
    return total / n, examples


def _examples(batch: Any) -> int:
    first = batch[0] if isinstance(batch, tuple | list) else batch
    return len(first) if hasattr(first, "__len__") else 1


def _stream(batches: Any, skip: int) -> Iterator[Any]:
    """The batches from number `skip` on, for ever."""
    if callable(batches):
        number = skip
        while True:
            yield batches(number)
            number += 1
    if hasattr(batches, "__getitem__"):
        length = len(batches) if hasattr(batches, "__len__") else None  # without one: endless, such as digits.batches
        if length == 0:
            raise ValueError("batches: got an empty sequence")
        number = skip
        while True:
            yield batches[number if length is None else number % length]
            number += 1
    while True:
        empty = True
        for batch in batches:
            empty = False
            if skip:
                skip -= 1
                continue
            yield batch
        if empty:
            raise ValueError("batches: ended before the last step; pass a sequence, a function, or more of them")


def _diagnose(model: Module, loss_fn: Loss, batch: Any, step: int, value: float) -> str:
    """Run the forward pass again and say which module's output was the first that is not finite."""
    first: list[str] = []

    def watch(name: str, forward: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            xp = backend.get_namespace(out.data) if isinstance(out, Tensor) else None
            if not first and xp is not None and not bool(xp.isfinite(out.data).all()):
                first.append(name)
            return out

        return watched

    modules = list(model.named_modules())
    own = [vars(module).get("forward") for _, module in modules]
    for name, module in modules:
        module.forward = watch(name or type(module).__name__, module.forward)  # on the instance, for this one run
    try:
        with no_grad(), np.errstate(all="ignore"):
            loss_fn(model, batch)
    finally:
        for (_, module), forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
    where = f"the first module whose output is not finite: {first[0]!r}" if first else "every module's output is finite"
    return f"loss is {value} at step {step + 1}; {where}. Try a smaller learning rate, or clip_norm"


def _check_finite(trained: dict[str, Any], done: int) -> None:
    """A finite loss may have an infinite gradient: look at the parameters before they are kept or handed back."""
    for name, p in trained.items():
        if not bool(backend.get_namespace(p.data).isfinite(p.data).all()):
            raise NonFiniteLossError(
                f"{name} is not finite after step {done}. Try a smaller learning rate, or clip_norm"
            )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _generators(model: Module) -> dict[str, np.random.Generator]:
    """The generators that training draws from: modules keep theirs as `rng`."""
    rngs = {name: getattr(module, "rng", None) for name, module in model.named_modules()}
    return {name: rng for name, rng in rngs.items() if isinstance(rng, np.random.Generator)}


def _identity(model: Module, optimizer: Optimizer) -> dict[str, str]:
    """What a run that goes on must share with the one that stopped, besides the names and shapes of what trains."""
    digest = 0
    for p in model.parameters():
        if not p.requires_grad:
            digest = zlib.crc32(np.ascontiguousarray(backend.to_numpy(p.data)).view(np.uint8), digest)
    return {"optimizer": type(optimizer).__name__, "frozen weights": f"{digest:08x}"}


def _save(
    path: Path,
    step: int,
    model: Module,
    trained: dict[str, Any],
    optimizer: Optimizer,
    history: History,
    identity: dict[str, str],
) -> None:
    """Write everything that the rest of the run depends on, to a temporary name, then rename."""
    tensors = {f"model.{name}": p.data for name, p in trained.items()}
    tensors |= {f"optimizer.{name}": array for name, array in optimizer.state_dict().items()}
    for name in ("loss", "lr", "grad_norm"):
        tensors[f"history.{name}"] = np.array(getattr(history, name), dtype=np.float64)
    states = {name: rng.bit_generator.state for name, rng in _generators(model).items()}
    generators = json.dumps(states, default=np.ndarray.tolist)  # some generators keep arrays
    files.write_tensors(path, tensors, {"step": str(step), "generators": generators, **identity})


def _load(
    path: Path,
    model: Module,
    trained: dict[str, Any],
    optimizer: Optimizer,
    history: History,
    identity: dict[str, str],
    steps: int,
) -> int:
    """Take over a checkpoint, after checking that it is this run's; returns how many steps it has done."""
    tensors, metadata = files.read_tensors(path)
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "history": {}}
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
    optimizer.load_state_dict(parts["optimizer"])
    for name, p in trained.items():
        assign(p, saved[name])
    for name, rng in generators.items():
        rng.bit_generator.state = states[name]
    for name, values in lists.items():
        setattr(history, name, values)
    return done


# --- the bar ----------------------------------------------------------------------------------------------------------


class _bar:  # noqa: N801
    """A progress bar on stderr: step, loss, examples per second, time left. Called as show(done, loss, examples)."""

    def __init__(self, steps: int, first: int, progress: bool | None) -> None:
        self.steps, self.first, self.bar = steps, first, None
        self.wanted = sys.stderr.isatty() if progress is None else progress

    def __enter__(self) -> Callable[[int, float, int], None]:
        if not self.wanted:
            return lambda done, loss, examples: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} samples/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        task = self.bar.add_task("", total=self.steps, completed=self.first, loss=float("nan"), speed=0.0)
        start, seen = time.perf_counter(), 0

        def show(done: int, loss: float, examples: int) -> None:
            nonlocal seen
            seen += examples
            self.bar.update(task, completed=done, loss=loss, speed=seen / (time.perf_counter() - start))

        return show

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
