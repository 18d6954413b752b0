"""Optimizers with PyTorch's names, defaults and update rules; the schedules are in schedules.py.

optimizer = optim.AdamW(model.parameters(), lr=1e-3)
optimizer.zero_grad(); loss.backward(); optimizer.step()
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import backend
from .backend import Array
from .optimizer import UNIT, Optimizer, Unit
from .schedules import CosineAnnealingLR, LambdaLR, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from .tensor import Tensor

__all__ = [
    "SGD",
    "UNIT",
    "Adam",
    "AdamW",
    "CosineAnnealingLR",
    "LambdaLR",
    "Optimizer",
    "PagedAdamW",
    "Unit",
    "clip_grad_norm_",
    "get_cosine_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
]


class SGD(Optimizer):
    """Stochastic gradient descent: b ← μ·b + (1 − dampening)·g, θ ← θ − lr·b (Nesterov: θ − lr·(g + μ·b)).

    The first b is g itself; `weight_decay` is added to g as wd·θ; `maximize` climbs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """See the class."""
        _prepare(group, unit, g, group["weight_decay"])
        mu = group["momentum"]
        if mu:
            b = self.state(unit, "momentum_buffer")
            if unit.step == 1:
                b[...] = g
            else:
                b *= mu
                work[...] = g
                work *= 1 - group["dampening"]
                b += work
            if group["nesterov"]:
                g += mu * b
            else:
                g[...] = b
        g *= group["lr"]
        for theta, step, _ in unit.values():
            theta -= step


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1): m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
    θ ← θ − lr·m̂/(√v̂ + eps) with m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

    `weight_decay` is added to g as wd·θ; `amsgrad` divides by the largest v so far; `maximize` climbs.
    """

    decoupled = False  # AdamW: the decay acts on θ, not on g

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize
        )

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """See the class."""
        xp, (beta1, beta2), lr = backend.get_namespace(g), group["betas"], group["lr"]
        _prepare(group, unit, g, 0 if self.decoupled else group["weight_decay"])
        m, v = self.state(unit, "exp_avg"), self.state(unit, "exp_avg_sq")
        xp.subtract(g, m, out=work)
        work *= 1 - beta1
        m += work  # m ← m + (1−β₁)(g − m)
        g *= g
        g *= 1 - beta2
        v *= beta2
        v += g
        if group["amsgrad"]:
            largest = self.state(unit, "max_exp_avg_sq")
            xp.maximum(largest, v, out=largest)
            v = largest
        xp.sqrt(v, out=work)
        work *= 1 / math.sqrt(1 - beta2**unit.step)
        work += group["eps"]
        xp.divide(m, work, out=work)
        work *= lr / (1 - beta1**unit.step)
        decay = 1 - lr * group["weight_decay"] if self.decoupled else 1.0
        for theta, _, step in unit.values():
            if decay != 1.0:
                theta *= decay
            theta -= step


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov and Hutter 2019, algorithm 2): θ ← (1 − lr·wd)·θ before Adam's step."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize)


class PagedAdamW(AdamW):
    """AdamW whose state lives in memory-mapped files: the operating system keeps in memory what is being updated and
    pages the rest out when memory runs short (Dettmers et al. 2023, section 3, "paged optimizers", which page between
    GPU and CPU). The updates are AdamW's, bit for bit. Under CuPy the state is in unified memory instead.

    Args:
        page_dir: where the files go; the system's place for temporary files when left out. They are removed with the
            optimizer. `state_dict` gives copies in files as well, which go with the copies.

    Raises:
        OSError: the disk has no room; at the first step, before any parameter has changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        page_dir: str | os.PathLike | None = None,
    ) -> None:
        from .pages import Pages  # imported here: it would cost every `import minipeft` 8 ms

        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize)
        self.pages, self.copies = Pages(page_dir), Pages(page_dir)

    def step(self) -> None:
        """As AdamW; the state of all parameters is made before the first is updated."""
        for group, units in zip(self.param_groups, self.units(), strict=True):
            for unit in units:
                for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                    self.state(unit, name)
        super().step()

    def zeros(self, unit: Unit) -> Array:
        """A new state array for a unit, in a file (under CuPy: in unified memory)."""
        xp = backend.get_namespace(unit.flat)
        if xp.__name__ == "cupy":
            with xp.cuda.using_allocator(xp.cuda.malloc_managed):
                return super().zeros(unit)
        if not isinstance(unit.flat, np.ndarray):
            return super().zeros(unit)
        return self.pages.zeros(unit.size, unit.flat.dtype)

    def _lay_out(self, i: int, active: list[Tensor]) -> None:
        self.pages.begin()  # the files of the layout before go with its arrays
        super()._lay_out(i, active)

    def _collect(self, units: list[Unit]) -> dict[Tensor, tuple[int, dict[str, Array]]]:
        self.copies.begin()
        return super()._collect(units)

    def joined(self, pieces: list[Array]) -> Array:
        """The pieces as one new array, in a file too: a checkpoint of the state needs no memory for it."""
        return self.copies.joined(pieces) if isinstance(pieces[0], np.ndarray) else super().joined(pieces)


def _prepare(group: dict[str, Any], unit: Unit, g: Array, weight_decay: float) -> None:
    """g ← ±g + wd·θ"""
    if group["maximize"]:
        g *= -1
    if weight_decay:
        for theta, flat, _ in unit.values():
            flat += weight_decay * theta


def clip_grad_norm_(params: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm/(‖g‖₂ + 1e-6)); returns ‖g‖₂ over all of them, as before."""
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}; a positive number is accepted")
    params = [params] if isinstance(params, Tensor) else params
    grads = [p.grad for p in params if p.grad is not None]
    norm = math.sqrt(sum(float((g * g).sum(dtype="float64")) for g in grads))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for g in grads:
            g *= scale
    return norm
