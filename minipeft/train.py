"""fit: the training loop, with a method's hooks, a progress bar, checkpoints, and a resume that gives the same bits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from . import backend, ops
from .checks import check_count
from .methods.base import Method
from .module import Module, in_mode
from .optim import LambdaLR, Optimizer, clip_grad_norm_
from .progress import progress_bar
from .run_state import CHECKPOINT, History, identity_of, load_run, save_run
from .tensor import Tensor, no_grad

Loss = Callable[[Module, Any], Tensor]


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
        TypeError: an argument of another kind, or a loss that is not a tensor with one element.
        ValueError: an argument out of its range, nothing to train, a trainable parameter that the optimizer does not
            know, or a checkpoint of another run.
        NonFiniteLossError: the loss, or a parameter that was to be kept, is NaN or infinite. The last checkpoint stays.
    """
    loss_fn = loss_fn or classification_loss
    callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else callbacks
    _check_kinds(model, batches, optimizer, loss_fn, scheduler, callbacks)
    method = method or (getattr(model, "method", None) if hasattr(model, "peft_config") else None) or Method(None)
    _check(steps, grad_accumulation, checkpoint_every, clip_norm, model, optimizer)
    trained = method.changed(model)
    if checkpoint_dir is None and (resume or checkpoint_every is not None):
        raise ValueError(f"{'resume' if resume else 'checkpoint_every'}: needs checkpoint_dir")
    checkpoint = Path(checkpoint_dir) / CHECKPOINT if checkpoint_dir is not None else None
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)  # what is no directory shows before the first step
    identity = identity_of(model, trained, optimizer) if checkpoint is not None else {}
    every = checkpoint_every or max(1, steps // 10)
    history, first = History(), 0
    method.run_steps = steps
    method.start(model, optimizer)
    if resume and checkpoint.exists():
        first = load_run(checkpoint, model, trained, optimizer, history, identity, steps, method)
        if scheduler is not None:
            scheduler.go_to(first)
    stream, start = _stream(batches, first * grad_accumulation), time.perf_counter()
    with in_mode(model, training=True), progress_bar(steps, first, progress) as show:
        for step in range(first, steps):
            optimizer.zero_grad()
            loss, examples = _accumulate(model, loss_fn, method, stream, grad_accumulation, step)
            if clip_norm is not None:
                history.grad_norm.append(clip_grad_norm_(trained.values(), clip_norm))
            method.before_step(model, step)
            history.loss.append(loss)
            history.lr.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            method.after_step(model, step)
            done = step + 1
            history.seconds = time.perf_counter() - start
            if done == steps or (checkpoint is not None and done % every == 0):
                _check_finite(trained, done)
                if checkpoint is not None:
                    save_run(checkpoint, done, model, trained, optimizer, history, identity, method)
            show(done, loss, examples)
            for callback in callbacks:
                callback(Progress(done, steps, loss, model, optimizer, history))
    return history


def _check_kinds(model: Any, batches: Any, optimizer: Any, loss_fn: Any, scheduler: Any, callbacks: Any) -> None:
    """Raise TypeError for an argument of another kind, ValueError where two of them do not belong together."""
    iterable = hasattr(batches, "__getitem__") or isinstance(batches, Iterable)
    kinds = [
        ("model", model, isinstance(model, Module), "a Module"),
        ("batches", batches, callable(batches) or iterable, "a function of a number, a sequence or an iterable"),
        ("optimizer", optimizer, isinstance(optimizer, Optimizer), "an optimizer of minipeft.optim"),
        ("loss_fn", loss_fn, callable(loss_fn), "a function (model, batch) -> Tensor"),
        ("scheduler", scheduler, scheduler is None or isinstance(scheduler, LambdaLR), "a schedule of minipeft.optim"),
        ("callbacks", callbacks, type(callbacks) is tuple and all(map(callable, callbacks)), "a list of functions"),
    ]
    for name, value, fits, accepted in kinds:
        if not fits:
            raise TypeError(f"{name}: got {value!r:.60}; {accepted} is accepted")
    if hasattr(batches, "__len__") and not len(batches):
        raise ValueError("batches: got an empty sequence")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: it sets the lr of another optimizer than the one that is passed here")


def _check(
    steps: int, accumulation: int, every: int | None, clip: float | None, model: Module, optimizer: Optimizer
) -> None:
    check_count("steps", steps)
    check_count("grad_accumulation", accumulation)
    if every is not None:
        check_count("checkpoint_every", every)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if clip is not None and not (isinstance(clip, Real) and clip > 0):
        raise ValueError(f"clip_norm: got {clip!r}; a positive number is accepted")
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
    model: Module, loss_fn: Loss, method: Method, stream: Iterator[Any], n: int, step: int
) -> tuple[float, int]:
    """Gradients of the mean loss of n batches, and of the method's penalty; (that loss, how many examples)."""
    total, examples = 0.0, 0
    for _ in range(n):
        batch = next(stream)
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.size != 1:
            got = f"shape {loss.shape}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn: expected a Tensor with one element, got {got}")
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(_diagnose(model, loss_fn, batch, step, value))
        total += value
        examples += _examples(batch)
        (loss if n == 1 else loss * (1 / n)).backward()
        del loss
    penalty = method.penalty(model)
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
