"""Layers, with PyTorch's names; `Module` and `Parameter` come from module.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import backend, ops
from .checks import check_count
from .module import Module, Parameter, assign, closest
from .tensor import Tensor

__all__ = [
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "assign",
    "closest",
    "project",
    "uniform",
]


def uniform(rng: np.random.Generator, bound: float, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
    """Numbers in ±bound, drawn in float64 so that float32 and float64 models of one seed agree to rounding."""
    return rng.uniform(-bound, bound, shape).astype(dtype or backend.get_default_dtype())


class Linear(Module):
    """y = x Wᵀ + b.

    Args:
        in_features, out_features: the sizes of x's and y's last axis.
        bias: whether there is a b.
        rng: a generator or seed for the start values, uniform in ±1/√in_features as in PyTorch; None: unpredictable.

    Attributes:
        weight: W, (out_features, in_features).
        bias: b, (out_features,), or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: Any = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.in_features = check_count("in_features", in_features)
        self.out_features = check_count("out_features", out_features)
        rng, bound = backend.generator(rng), in_features**-0.5
        self.weight = Parameter(uniform(rng, bound, (out_features, in_features), dtype))
        self.bias = Parameter(uniform(rng, bound, (out_features,), dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def project(x: Tensor, *layers: Module) -> list[Tensor]:
    """The outputs of several layers for one x; layers of one kind that can share work (`together`) do."""
    kind = type(layers[0])
    shared = kind.together(x, layers) if hasattr(kind, "together") and all(type(m) is kind for m in layers) else None
    return [layer(x) for layer in layers] if shared is None else shared


class Embedding(Module):
    """Rows of a table: ids (...) -> (..., embedding_dim). Start values are normal with deviation 1, as in PyTorch.

    Attributes:
        weight: (num_embeddings, embedding_dim).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Any = None,
        rng: np.random.Generator | int | None = None,
    ) -> None:
        self.num_embeddings = check_count("num_embeddings", num_embeddings)
        self.embedding_dim = check_count("embedding_dim", embedding_dim)
        values = backend.generator(rng).standard_normal((num_embeddings, embedding_dim))
        self.weight = Parameter(values.astype(dtype or backend.get_default_dtype()))

    def forward(self, ids: Any) -> Tensor:
        """(...) integers -> (..., embedding_dim)"""
        return ops.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LayerNorm(Module):
    """(x − mean)/√(var + eps)·weight + bias over the last axis.

    Attributes:
        weight, bias: (normalized_shape,); start at 1 and 0.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, dtype: Any = None) -> None:
        self.normalized_shape, self.eps = normalized_shape, eps
        dtype = dtype or backend.get_default_dtype()
        self.weight = Parameter(np.ones(normalized_shape, dtype))
        self.bias = Parameter(np.zeros(normalized_shape, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class RMSNorm(Module):
    """x/√(mean(x²) + eps)·weight over the last axis.

    Attributes:
        weight: (normalized_shape,); starts at 1.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-6, dtype: Any = None) -> None:
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = Parameter(np.ones(normalized_shape, dtype or backend.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class Dropout(Module):
    """Zero each element with probability p while training, divide the rest by 1 − p.

    Attributes:
        rng: the generator the masks come from; a checkpoint keeps its state.
    """

    def __init__(self, p: float = 0.5, rng: np.random.Generator | int | None = None) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"p: got {p}; a probability in [0, 1) is accepted")
        self.p, self.rng = p, backend.generator(rng)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return ops.dropout(x, self.p, self.training, self.rng)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return ops.relu(x)


class Sequential(Module):
    """Modules one after the other; their names are "0", "1" …"""

    def __init__(self, *layers: Module) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"layers: number {i} is a {type(layer).__name__}; modules are accepted")
            setattr(self, str(i), layer)

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self.named_children() if isinstance(child, Module))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, index: int) -> Module:
        return list(iter(self))[index]

    def forward(self, x: Any) -> Any:
        """The last layer's output."""
        for layer in vars(self).values():
            if isinstance(layer, Module):
                x = layer(x)
        return x
