"""Adapter: Parameter-Efficient Transfer Learning for NLP. Houlsby et al. 2019 (arXiv 1902.00751), section 2.

    h' = h + W_up f(W_down h + b_down) + b_up        W_down (m, d), W_up (d, m), m much smaller than d

A bottleneck behind each block's attention and each block's MLP (figure 2), before their output is added to the stream.
It starts near the identity: W_up is 0, or both are tiny. Since f is not linear no weight can take it over: unlike LoRA
it cannot be merged, and it makes every forward pass longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .. import backend, ops
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count
from ..nn import Linear, Module
from ..tensor import Tensor, no_grad
from .base import AdapterLayer, Method
from .lora import _names

# --- formulas ---------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "relu": ops.relu,
    "gelu": ops.gelu,
    "silu": ops.silu,
    "tanh": ops.tanh,
}


def bottleneck(h: Array, W_down: Array, b_down: Array, W_up: Array, b_up: Array, activation: str = "gelu") -> Array:
    """h + W_up f(W_down h + b_down) + b_up for h (..., d), W_down (m, d), W_up (d, m): (..., d).

    Houlsby et al. 2019, section 2.1. f is one of `ACTIVATIONS`; the paper says "a nonlinearity", its code has GELU.

    Raises:
        ValueError: shapes that do not fit, or an activation that is not there.
    """
    m, d = W_down.shape if W_down.ndim == 2 else (0, 0)
    if not m or W_up.shape != (d, m) or b_down.shape != (m,) or b_up.shape != (d,) or h.shape[-1:] != (d,):
        shapes = ", ".join(str(a.shape) for a in (h, W_down, b_down, W_up, b_up))
        raise ValueError(f"bottleneck: h (..., d), W_down (m, d), b_down (m,), W_up (d, m), b_up (d,): got {shapes}")
    check_choice("activation", activation, ACTIVATIONS)
    with no_grad():
        return _bottleneck(Tensor(h), *map(Tensor, (W_down, b_down, W_up, b_up)), activation).data


def _bottleneck(h: Tensor, W_down: Tensor, b_down: Tensor, W_up: Tensor, b_up: Tensor, activation: str) -> Tensor:
    return h + ops.linear(ACTIVATIONS[activation](ops.linear(h, W_down, b_down)), W_up, b_up)


INITS = ("zero", "tiny")


def init_bottleneck(
    d: int, m: int, init: str = "zero", rng: np.random.Generator | int | None = None, dtype: Any = None
) -> tuple[Array, Array]:
    """Start values for W_down (m, d) and W_up (d, m); both biases start at 0.

    | init     | W_down                      | W_up   | the start is                                  |
    |----------|-----------------------------|--------|-----------------------------------------------|
    | `"zero"` | uniform in ±1/√d            | 0      | the identity, to the bit                      |
    | `"tiny"` | N(0, 10⁻⁴), cut off at 2σ   | as it  | near the identity: Houlsby et al., section 3.6 |

    Raises:
        ValueError: sizes below 1, or an unknown init.
    """
    if min(d, m) < 1:
        raise ValueError(f"d, m: got {d}, {m}; at least 1 is accepted")
    check_choice("init", init, INITS)
    dtype, rng = np.dtype(dtype or backend.get_default_dtype()), backend.generator(rng)
    if init == "zero":
        return rng.uniform(-(d**-0.5), d**-0.5, (m, d)).astype(dtype), np.zeros((d, m), dtype)
    return _truncated(rng, (m, d)).astype(dtype), _truncated(rng, (d, m)).astype(dtype)


def _truncated(rng: np.random.Generator, shape: tuple[int, int], sigma: float = 1e-2) -> np.ndarray:
    """Normal with deviation `sigma`; what lies beyond two deviations is drawn again."""
    values = rng.standard_normal(shape)
    while (far := abs(values) > 2).any():
        values[far] = rng.standard_normal(int(far.sum()))
    return sigma * values


# --- the layer --------------------------------------------------------------------------------------------------------


class BottleneckLinear(AdapterLayer):
    """h = base(x), then h + Σ W_up f(W_down h + b_down) + b_up over the active adapters.

    Attributes:
        adapter_down, adapter_up: by adapter name, Linears with weights (m, d) and (d, m).
        activation: the name of f, by adapter name.
    """

    unmergeable = "W_up f(W_down h) is not linear in h, so no weight can take it over; keep the adapter, or unload() it"

    def __init__(self, base_layer: Linear) -> None:
        super().__init__(base_layer)
        self.adapter_down: dict[str, Linear] = {}
        self.adapter_up: dict[str, Linear] = {}
        self.activation: dict[str, str] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        return list(self.adapter_down)

    def add(self, adapter: str, down: Linear, up: Linear, activation: str) -> None:
        """Add an adapter that is made of these."""
        self.adapter_down[adapter], self.adapter_up[adapter] = down, up
        self.activation[adapter] = activation

    def forward(self, x: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        h = y = self.base_layer(x)  # (..., in) -> (..., d)
        for name in self.active if not self.disabled else ():
            if name in self.adapter_down:
                down = ACTIVATIONS[self.activation[name]](self.adapter_down[name](h))  # (..., d) -> (..., m)
                y = y + self.adapter_up[name](down)  # (..., m) -> (..., d)
        return y

    def extra_repr(self) -> str:
        sizes = {name: down.out_features for name, down in self.adapter_down.items()}
        return f"bottleneck_size={sizes}, activation={self.activation}, active={self.active}"


# --- the method -------------------------------------------------------------------------------------------------------

OUTPUTS = ("o_proj", "down_proj")  # what attention and MLP end with, in Llama and in the vision transformer here


@dataclass
class BottleneckAdapterConfig:
    """Where the bottlenecks stand and how wide they are.

    Args:
        bottleneck_size: m; the paper tries 8, 64 and 256 on layers of 1,024.
        activation: one of `ACTIVATIONS`.
        target_modules: the Linears that a bottleneck follows, as in `LoraConfig`. Left out: the output projections of
            attention and MLP; in a model without such names every Linear but the output head.
        init_adapter_weights: `"zero"`, which leaves outputs as they are, or the paper's `"tiny"`.
        modules_to_save: modules that are trained and saved whole (the paper trains the layer norms too).

    Raises:
        ValueError: at once, for a value outside what is accepted.
    """

    bottleneck_size: int = 64
    activation: str = "gelu"
    target_modules: str | list[str] | None = None
    init_adapter_weights: str = "zero"
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    peft_type: str = "BOTTLENECK_ADAPTER"

    def __post_init__(self) -> None:
        self.bottleneck_size = check_count("bottleneck_size", self.bottleneck_size)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("init_adapter_weights", self.init_adapter_weights, INITS)
        if not isinstance(self.target_modules, str | None):
            self.target_modules = _names("target_modules", self.target_modules)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save) if self.modules_to_save else None

    def build(self) -> BottleneckAdapter:
        """The method that this config describes."""
        return BottleneckAdapter(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json. The peft_type is not PEFT's: PEFT has no such method."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BottleneckAdapterConfig:
        """The config in an adapter_config.json.

        Raises:
            ValueError: an entry that is not known.
        """
        extra = data.keys() - {f.name for f in fields(cls)}
        if extra:
            raise ValueError(f"adapter config: {', '.join(sorted(extra))} is not supported here")
        return cls(**data)


class BottleneckAdapter(Method):
    """Wraps Linears in `BottleneckLinear`."""

    layer = BottleneckLinear

    def targets(self, model: Module) -> str | list[str]:
        """The config's target modules; left out, those that end attention and MLP, or all Linears but the head."""
        if self.config.target_modules is not None:
            return self.config.target_modules
        endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return [name for name in OUTPUTS if name in endings] or "all-linear"

    def wrap(self, name: str, linear: Module) -> BottleneckLinear:
        """The Linear with a new bottleneck behind it; a BottleneckLinear gets one more."""
        layer = linear if isinstance(linear, BottleneckLinear) else BottleneckLinear(linear)
        config, W = self.config, layer.weight
        d, m = W.shape[0], config.bottleneck_size
        dtype = W.dtype if W.dtype in (np.float32, np.float64) else np.float32
        xp = get_namespace(W.data)
        down, up = (Linear(i, o, dtype=dtype, rng=0) for i, o in ((d, m), (m, d)))
        starts = init_bottleneck(d, m, config.init_adapter_weights, self.rng, dtype)
        for made, start in zip((down, up), starts, strict=True):
            made.weight.data = backend.move(start, xp)
            made.bias.data = xp.zeros(made.out_features, dtype=dtype)
        layer.add(self.adapter, down, up, config.activation)
        return layer
