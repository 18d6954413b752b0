"""Learning-rate schedules, with the names of PyTorch and transformers. Each is a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from .optimizer import Optimizer


class LambdaLR:
    """lr = initial lr · lr_lambda(t), where t counts the calls of `step`, from 0.

    Every schedule here is a function of t alone: nothing accumulates, so a resumed run has the same lr to the bit.
    """

    def __init__(self, optimizer: Optimizer, lr_lambda: Callable[[int], float]) -> None:
        self.optimizer, self.lr_lambda, self.last_epoch = optimizer, lr_lambda, 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._apply()

    def step(self) -> None:
        """Go on to the next t; call it after the optimizer's step."""
        self.go_to(self.last_epoch + 1)

    def go_to(self, t: int) -> None:
        """Set the lr of step t."""
        self.last_epoch = t
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.lr_lambda(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The present lr of every group."""
        return [group["lr"] for group in self.optimizer.param_groups]


class CosineAnnealingLR(LambdaLR):
    """lr(t) = eta_min + (lr − eta_min)·(1 + cos(π·t/T_max))/2. Loshchilov and Hutter 2017, eq. 5."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        if T_max < 1:
            raise ValueError(f"T_max: got {T_max}; at least 1 is accepted")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, lambda t: (1 + math.cos(math.pi * t / T_max)) / 2)

    def _apply(self) -> None:
        factor = self.lr_lambda(self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = self.eta_min + (base - self.eta_min) * factor


def get_linear_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Up linearly from 0 over the warm-up, then down linearly to 0 (the name is transformers')."""
    return LambdaLR(optimizer, lambda t: _warmup(t, num_warmup_steps, num_training_steps, lambda done: 1 - done))


def get_cosine_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Up linearly from 0 over the warm-up, then down along half a cosine to 0 (the name is transformers')."""
    half = lambda done: (1 + math.cos(math.pi * done)) / 2  # noqa: E731
    return LambdaLR(optimizer, lambda t: _warmup(t, num_warmup_steps, num_training_steps, half))


def _warmup(t: int, warmup: int, total: int, shape: Callable[[float], float]) -> float:
    if t < warmup:
        return t / max(1, warmup)
    return shape(min(1.0, (t - warmup) / max(1, total - warmup)))
