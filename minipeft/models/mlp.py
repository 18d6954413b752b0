"""A multilayer perceptron: linear layers with ReLU between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import backend, nn, ops
from ..tensor import Tensor


class MLP(nn.Module):
    """x -> fc1 -> ReLU -> fc2 -> ReLU -> … -> head.

    Args:
        sizes: of the input, the hidden layers, and the output; (64, 128, 128, 10) has `fc1`, `fc2` and `head`.
        rng: a generator or seed for the start values.
        dtype: of the parameters; None is the default dtype (float32).

    Raises:
        ValueError: fewer than two sizes, or one below 1.
    """

    output_head = "head"

    def __init__(
        self,
        sizes: Sequence[int] = (64, 128, 128, 10),
        rng: np.random.Generator | int | None = None,
        dtype: Any = None,
    ) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: got {tuple(sizes)}; two or more sizes of at least 1 are accepted")
        self.sizes, rng = tuple(sizes), backend.generator(rng)
        for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes[:-1]), start=1):
            setattr(self, f"fc{i}", nn.Linear(d_in, d_out, dtype=dtype, rng=rng))
        self.head = nn.Linear(sizes[-2], sizes[-1], dtype=dtype, rng=rng)

    def forward(self, x: Any) -> Tensor:
        """(B, sizes[0]) -> logits (B, sizes[-1])"""
        for i in range(1, len(self.sizes) - 1):
            x = ops.relu(getattr(self, f"fc{i}")(x))  # (B, sizes[i-1]) -> (B, sizes[i])
        return self.head(x)  # (B, sizes[-2]) -> (B, sizes[-1])
