"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021 (arXiv 2106.09685).

    h = W x + s·B A x        W (out, in) frozen, A (r, in), B (out, r), s = α/r        (paper eq. 3)

Formulas first, as functions of plain arrays; then the layer that uses them; then the method and its config.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .. import backend, ops
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count, check_flag, check_positive, shape_or_type
from ..nn import Dropout, Linear, Module, Parameter
from ..quant.linear import QuantizedLinear, QuantizedWeight
from ..tensor import Tensor, multi_result
from .base import AdapterLayer, Method, with_own_weight

# --- formulas ---------------------------------------------------------------------------------------------------------


def lora_scaling(alpha: float, r: int, rslora: bool = False) -> float:
    """s = α/r (Hu et al. 2021, section 4.1), or α/√r (rank-stabilized: Kalajdzievski 2023, eq. 8).

    With α/r an update of rank r shrinks as r grows; with α/√r its size does not depend on r.

    Raises:
        ValueError: α is no positive number, or r no int of at least 1.
    """
    alpha, r = check_positive("alpha", alpha), check_count("r", r)
    return float(alpha / (r**0.5 if rslora else r))  # a NumPy number would turn float32 products into float64


def lora_delta(A: Array, B: Array, scaling: float) -> Array:
    """ΔW = s·B A for A (r, in) and B (out, r): (out, in), of rank at most r. Hu et al. 2021, eq. 3."""
    check_factors(A, B)
    return float(scaling) * backend.matmul(B, A)


def merge_lora(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """W + s·B A, in W's dtype (Hu et al. 2021, section 4.1, "no additional inference latency").

    The sum is formed in A's and B's precision where that is wider than W's, and rounded once.
    """
    return _add_delta(W, A, B, scaling)


def unmerge_lora(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """W − s·B A: undoes `merge_lora` up to rounding, not bit for bit."""
    return _add_delta(W, A, B, -scaling)


def _add_delta(W: Array, A: Array, B: Array, scaling: float) -> Array:
    delta = lora_delta(A, B, scaling)
    if getattr(W, "shape", None) != delta.shape:
        raise ValueError(f"W: got {shape_or_type(W)}; A {A.shape} and B {B.shape} make {delta.shape}")
    return (W + delta).astype(W.dtype, copy=False)


def check_factors(A: Array, B: Array) -> None:
    """Raise ValueError unless A and B are matrices (r, in) and (out, r)."""
    if getattr(A, "ndim", None) != 2 or getattr(B, "ndim", None) != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"A (r, in) and B (out, r): got {shape_or_type(A)} and {shape_or_type(B)}")


INITS = ("kaiming", "gaussian", "gaussian_b", "both", "pissa", "olora")
OFFSET_INITS = ("both", "pissa", "olora")  # B A ≠ 0 at the start: W gives up s·B A, so that outputs stay


def init_lora(
    out_features: int,
    in_features: int,
    r: int,
    init: str = "gaussian",
    rng: np.random.Generator | int | None = None,
    dtype: Any = None,
    W: Array | None = None,
    scaling: float = 1.0,
) -> tuple[Array, Array]:
    """Start values for A (r, in) and B (out, r).

    | init           | A                        | B            | source                                        |
    |----------------|--------------------------|--------------|-----------------------------------------------|
    | `"gaussian"`   | N(0, 1/r²)               | 0            | Hu et al. 2021, section 4.1; PEFT "gaussian"  |
    | `"kaiming"`    | uniform in ±1/√in        | 0            | PEFT's default                                |
    | `"gaussian_b"` | 0                        | N(0, 1/r²)   | the other way round                           |
    | `"both"`       | N(0, 1/r²)               | N(0, 1/r²)   | the caller subtracts s·B A from W             |
    | `"pissa"`      | √(S_r/s) V_rᵀ            | U_r √(S_r/s) | W's first r singular directions: Meng 2024    |
    | `"olora"`      | R's first r rows         | Q's columns  | W = Q R: Büyükakyüz 2024                      |

    For the last three the caller subtracts s·B A from W; `"pissa"` and `"olora"` take that W (and `scaling`, s), and
    its dtype where none is given.

    Raises:
        ValueError: r outside 1 … min(out, in), an unknown init, W missing, or a scaling that is not positive.
        TypeError: r is no int, or dtype not one of floats.
    """
    check_r("r", r, out_features, in_features)
    if dtype is not None and not backend.is_float(dtype):
        raise TypeError(f"dtype: got {np.dtype(dtype)}; float32, float64 and half precision are accepted")
    if init in ("pissa", "olora"):
        if getattr(W, "shape", None) != (out_features, in_features):
            raise ValueError(
                f"W: init {init!r} needs the weight ({out_features}, {in_features}), got {shape_or_type(W)}"
            )
        W = W if W.dtype in (np.float32, np.float64) else W.astype(np.float32)  # LAPACK has no half precision
        A, B = _pissa(W, r, check_positive("scaling", scaling)) if init == "pissa" else _olora(W, r)
        dtype = W.dtype if dtype is None else dtype
        return A.astype(dtype), B.astype(dtype)
    dtype = np.dtype(dtype or backend.get_default_dtype())
    rng = backend.generator(rng)
    gaussian = lambda *shape: (rng.standard_normal(shape) / r).astype(dtype)  # noqa: E731
    zeros = lambda *shape: np.zeros(shape, dtype)  # noqa: E731
    a, b = (r, in_features), (out_features, r)
    if init == "kaiming":
        return rng.uniform(-(in_features**-0.5), in_features**-0.5, a).astype(dtype), zeros(*b)
    if init == "gaussian":
        return gaussian(*a), zeros(*b)
    if init == "gaussian_b":
        return zeros(*a), gaussian(*b)
    if init == "both":
        return gaussian(*a), gaussian(*b)
    raise ValueError(f"init: got {init!r}; accepted are {', '.join(map(repr, INITS))}")


def _pissa(W: Array, r: int, scaling: float) -> tuple[Array, Array]:
    from .lora_ga import leading_singular_vectors  # LoRA-GA is built on LoRA

    U, S, Vt = leading_singular_vectors(W, r)  # a quarter of the whole SVD's time in float32, and as near
    root = (S / scaling) ** 0.5
    return root[:, None] * Vt, U * root


def _olora(W: Array, r: int) -> tuple[Array, Array]:
    Q, R = get_namespace(W).linalg.qr(W)
    return R[:r], Q[:, :r]


def check_r(argument: str, r: int, out_features: int, in_features: int) -> None:
    """Raise ValueError unless 1 ≤ r ≤ min(out, in): a larger r adds parameters and no rank."""
    if not isinstance(r, int | np.integer) or isinstance(r, bool):
        raise TypeError(f"{argument}: expected an int, got {type(r).__name__} {r!r}")
    most = min(out_features, in_features)
    if not 1 <= r <= most:
        raise ValueError(
            f"{argument}: got {r}; a weight of ({out_features}, {in_features}) has rank at most {most}, "
            f"so 1 to {most} is accepted"
        )


def lora_linear(x: Any, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y = x Wᵀ + b + s·(x Aᵀ) Bᵀ as one node; x (..., in): (..., out).

    With u = x Aᵀ and v = s·g B:  dx = g W + v A,  dA = vᵀ x,  dB = s·gᵀ u,  db = Σ g,  dW = gᵀ x unless frozen.

    The same as `linear(x, W, b) + s·linear(linear(x, A), B)`; one node saves three arrays of y's size and the passes
    over them. A weight that is held as codes is dequantized for each of its two products (QLoRA: Dettmers et al. 2023,
    eq. 5); between them only the codes are kept.
    """
    return lora_linears(x, (W, bias, A, B, scaling))[0]


def lora_linears(x: Any, *projections: tuple[Tensor, Tensor | None, Tensor, Tensor, float]) -> list[Tensor]:
    """`lora_linear` of one x for several (W, b, A, B, s): attention's q, k and v, or an MLP's gate and up.

    A product with a side of r = 8 runs at a third of the speed of a large one. With all A on top of each other, one
    product gives every u, one every dA, and one the share v A of dx: 0.6 of the time of one of each a projection.
    """
    parts = [_Projection(x, *projection) for projection in projections]
    x, xp = parts[0].x, get_namespace(parts[0].a)
    shape, rows = x.shape, x.data.reshape(-1, x.shape[-1])  # (N, in)
    a = parts[0].a if len(parts) == 1 else xp.concatenate([p.a for p in parts])  # (Σr, in)
    b, s, weights, full = ([getattr(p, name) for p in parts] for name in ("b", "s", "kept", "full"))
    ends = list(itertools.accumulate(len(p.a) for p in parts))
    columns = [slice(end - len(p.a), end) for p, end in zip(parts, ends, strict=True)]  # each projection's share of Σr
    u = backend.matmul(rows, a.T)  # (N, Σr)
    outputs = []
    for p, column in zip(parts, columns, strict=True):
        y = backend.matmul(rows, p.full(p.kept).T)  # (N, out)
        y += backend.matmul(p.s * u[:, column], p.b.T)
        if p.bias is not None:
            y += p.bias.data
        outputs.append(y.reshape(*shape[:-1], len(p.b)))
    need_x = x.requires_grad
    needs = [[t is not None and t.requires_grad for t in (p.W, p.A, p.B, p.bias)] for p in parts]
    need_v = need_x or any(A for _, A, _, _ in needs)
    kept = rows if any(W or A for W, A, _, _ in needs) else None

    def backward(gradients: list[Array | None]) -> list[Array | None]:
        dx, v, grads = None, xp.zeros_like(u) if need_v else None, []
        for i, g in enumerate(gradients):
            need_w, _, need_b, need_bias = needs[i] if g is not None else [False] * 4
            g = None if g is None else g.reshape(-1, len(b[i]))  # (N, out)
            if need_v and g is not None:
                v[:, columns[i]] = s[i] * backend.matmul(g, b[i])
            if need_x and g is not None:
                product = backend.matmul(g, full[i](weights[i]))
                dx = product if dx is None else xp.add(dx, product, out=dx)
            grads.append(
                [
                    backend.matmul(g.T, kept) if need_w else None,
                    s[i] * backend.matmul(g.T, u[:, columns[i]]) if need_b else None,
                    g.sum(axis=0) if need_bias else None,
                ]
            )
        if need_x:
            dx += backend.matmul(v, a)
            dx = dx.reshape(shape)
        da = backend.matmul(v.T, kept) if kept is not None and need_v else None  # (Σr, in)
        answers = [dx]
        for (dw, db, dbias), (_, need_a, _, _), column in zip(grads, needs, columns, strict=True):
            answers += [dw, da[column] if need_a else None, db, dbias]
        return answers

    parents = [x, *[t for p in parts for t in (p.W, p.A, p.B, p.bias)]]
    return multi_result("lora_linear", outputs, parents, backward)


class _Projection:
    """A weight and its adapter, checked: what `lora_linears` computes with."""

    def __init__(self, x: Any, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> None:
        if isinstance(W, QuantizedWeight):
            x, A, B = ops.operands("lora_linear", x, A, B)
            self.kept, self.full = W.stored("lora_linear", x)
        else:
            x, W, A, B = ops.operands("lora_linear", x, W, A, B)
            self.kept, self.full = W.data, lambda w: w
        shape, (out, width) = x.shape, W.shape
        self.a, self.b, self.s = A.data, B.data, float(scaling)
        if not shape or shape[-1] != width or self.a.shape[1:] != (width,) or self.b.shape != (out, len(self.a)):
            raise ValueError(
                f"lora_linear: x {shape}, W (out, in) {W.shape}, A (r, in) {self.a.shape}, B (out, r) {self.b.shape}"
            )
        self.x, self.W, self.bias, self.A, self.B = x, W, bias, A, B


# --- the layer --------------------------------------------------------------------------------------------------------
class LoraLinear(AdapterLayer):
    """y = base(x) + Σ s·B A dropout(x) over the active adapters.

    Attributes:
        lora_A, lora_B: by adapter name, Linears without bias with weights A (r, in) and B (out, r).
        scaling: s, by adapter name.
        lora_dropout: by adapter name.
        offset: (A₀, B₀) of adapters that did not start at B A = 0; their s·B₀ A₀ is subtracted from W.
    """

    def __init__(self, base_layer: Linear) -> None:
        super().__init__(base_layer)
        self.lora_A: dict[str, Linear] = {}
        self.lora_B: dict[str, Linear] = {}
        self.lora_dropout: dict[str, Dropout] = {}
        self.scaling: dict[str, float] = {}
        self.offset: dict[str, tuple[Array, Array]] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        return list(self.lora_A)

    def add(self, adapter: str, A: Array, B: Array, scaling: float, dropout: Dropout, offset: bool) -> None:
        """Add an adapter with these start values; with `offset` W gives up s·B A."""
        xp = get_namespace(self.weight.data)
        A, B = backend.move(A, xp), backend.move(B, xp)
        self.lora_A[adapter], self.lora_B[adapter] = _bare_linear(A), _bare_linear(B)
        self.scaling[adapter], self.lora_dropout[adapter] = scaling, dropout
        if offset:
            self.offset[adapter] = A.copy(), B.copy()
            self.base_layer = with_own_weight(self.base_layer, unmerge_lora(self.weight.data, A, B, scaling))

    def remove(self, adapter: str) -> None:
        """Forget an adapter; what it took from W is given back."""
        if adapter in self.offset:
            self.weight.data = merge_lora(self.weight.data, *self.offset.pop(adapter), self.scaling[adapter])
        super().remove(adapter)

    def delta(self, adapter: str) -> Array:
        """ΔW = s·B A, (out, in)."""
        return lora_delta(*self._factors(adapter), self.scaling[adapter])

    def merge(self, adapters: list[str]) -> None:
        """W ← W + Σ s·B A. Nothing else is kept."""
        for name in adapters:
            if name in self.lora_A:
                self.weight.data = merge_lora(self.weight.data, *self._factors(name), self.scaling[name])
                self.merged.append(name)

    def unmerge(self) -> None:
        """W ← W − Σ s·B A: up to rounding, not bit for bit."""
        while self.merged:
            name = self.merged.pop()
            self.weight.data = unmerge_lora(self.weight.data, *self._factors(name), self.scaling[name])

    def _active(self) -> list[str]:
        return [] if self.disabled or self.merged else [name for name in self.active if name in self.lora_A]

    def projection(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """(W, b, A, B, s) where that is all there is to forward now: one adapter, and no dropout; else None."""
        active = self._active()
        if len(active) != 1 or self.offset.keys() - set(active) or (self.training and self.lora_dropout[active[0]].p):
            return None
        (name,), base = active, self.base_layer
        return base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    @classmethod
    def together(cls, x: Any, layers: Sequence[LoraLinear]) -> list[Tensor] | None:
        """The outputs of several layers for one x, by `lora_linears`; None where one of them needs its own way."""
        projections = [layer.projection() for layer in layers]
        return None if None in projections else lora_linears(x, *projections)

    def _factors(self, name: str) -> tuple[Array, Array]:
        return self.lora_A[name].weight.data, self.lora_B[name].weight.data

    def forward(self, x: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        projection = self.projection()
        if projection is not None:
            return lora_linear(x, *projection)
        active = self._active()
        y = self.base_layer(x)
        for name in active:
            down = self.lora_A[name](self.lora_dropout[name](ops.tensor(x)))  # (..., r)
            y = y + self.lora_B[name](down) * self.scaling[name]
        for name, factors in self.offset.items():
            if name in active or name in self.merged:
                continue
            A0, B0 = (Tensor(factor) for factor in factors)  # W lacks s·B₀A₀ of this one: give it back
            y = y + ops.linear(ops.linear(x, A0), B0) * self.scaling[name]
        return y

    def extra_repr(self) -> str:
        ranks = {name: A.out_features for name, A in self.lora_A.items()}
        return f"r={ranks}, scaling={self.scaling}, active={self.active}"


def _bare_linear(weight: Array) -> Linear:
    """A Linear without bias around an array that is there already."""
    linear = Linear.__new__(Linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = Parameter(weight), None
    return linear


# --- the method -------------------------------------------------------------------------------------------------------

BIASES = ("none", "all", "lora_only")


@dataclass
class LoraConfig:
    """What to adapt and how; names and defaults are PEFT's.

    Args:
        r: the rank of ΔW.
        lora_alpha: α in s = α/r.
        lora_dropout: the probability of dropping an element of the adapter's input while training.
        target_modules: `"all-linear"` (or the document's `"ALL"`: every Linear but the output head), a regular
            expression that a whole name must match, or names and endings of names. Left out, "all-linear"; PEFT has a
            choice of its own for each kind of model then.
        init_lora_weights: True (PEFT's default, `"kaiming"`), False (A and B both random: not the identity, for tests),
            one of `INITS`; `"loftq"`: the weight becomes codes, and A and B start as what these lack; or `"lora_ga"`:
            A and B start in the full gradient's singular vectors (methods/lora_ga.py).
        loftq_config: `LoftQConfig(loftq_bits, loftq_iter)` for `"loftq"`.
        lora_ga_config: `LoraGAConfig(direction, scale, stable_gamma)` for `"lora_ga"`.
        use_rslora: s = α/√r.
        use_dora: DoRA, a magnitude for every output beside the factors (methods/dora.py).
        dora_magnitude: "column" (PEFT's) or "scalar" (the document's one magnitude for a matrix).
        dora_norm: "constant" (PEFT's, no gradient through the norm) or "graph". These two are not PEFT's.
        rank_pattern, alpha_pattern: r and α of single modules, by name, ending or regular expression.
        modules_to_save: modules that are trained and saved whole: all whose name ends so, as in PEFT.
        bias: which biases train: "none", "all", "lora_only" (those of adapted layers).

    Raises:
        ValueError, TypeError: at once, for a value outside what is accepted.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    init_lora_weights: bool | str = True
    loftq_config: Any = None
    lora_ga_config: Any = None
    use_rslora: bool = False
    use_dora: bool = False
    dora_magnitude: str = "column"
    dora_norm: str = "constant"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    peft_type: str = "LORA"

    def __post_init__(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"
        elif not isinstance(self.target_modules, str):
            self.target_modules = _names("target_modules", self.target_modules)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save) if self.modules_to_save else None
        self.r, self.lora_alpha = check_count("r", self.r), check_positive("lora_alpha", self.lora_alpha)
        self.rank_pattern = _checked_pattern("rank_pattern", self.rank_pattern, check_count)
        self.alpha_pattern = _checked_pattern("alpha_pattern", self.alpha_pattern, check_positive)
        if not isinstance(self.lora_dropout, int | float | np.number) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout!r}; a probability in [0, 1) is accepted")
        self.lora_dropout = float(self.lora_dropout)
        check_choice("bias", self.bias, BIASES)
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in (*INITS, "loftq", "lora_ga"):
            accepted = f"True, False, {', '.join(map(repr, INITS))}, 'loftq', 'lora_ga'"
            raise ValueError(f"init_lora_weights: got {self.init_lora_weights!r}; accepted are {accepted}")
        for name in ("use_rslora", "use_dora", "inference_mode"):
            check_flag(name, getattr(self, name))
        check_choice("peft_type", self.peft_type, (type(self).peft_type,))  # a file of another type is not read again
        if self.init_lora_weights in ("loftq", "lora_ga"):
            self._check_start(self.init_lora_weights)
        if self.init_lora_weights == "loftq" or self.loftq_config:
            from .qlora import loftq_config  # QLoRA is built on LoRA

            self.loftq_config = loftq_config(self.loftq_config)
        if self.init_lora_weights == "lora_ga" or self.lora_ga_config:
            from .lora_ga import lora_ga_config  # LoRA-GA is built on LoRA

            self.lora_ga_config = lora_ga_config(self.lora_ga_config)
        for name, accepted in _DORA_CHOICES.items():
            check_choice(name, getattr(self, name), accepted)
            if not self.use_dora and getattr(self, name) != accepted[0]:
                raise ValueError(f"{name}: got {getattr(self, name)!r} without use_dora; use_dora=True is accepted")

    def _check_start(self, init: str) -> None:
        """Refuse what cannot be with a start that is a method of its own."""
        if self.use_dora:
            raise ValueError(f"use_dora: got True with init_lora_weights={init!r}; False is accepted")
        if type(self) is not LoraConfig:
            raise ValueError(f"init_lora_weights: {type(self).__name__} has no {init!r}; LoraConfig has it")

    def build(self) -> Lora:
        """The method that this config describes."""
        if self.use_dora:
            from .dora import Dora  # DoRA is built on LoRA

            return Dora(self)
        if self.init_lora_weights == "loftq":
            from .qlora import LoftQ

            return LoftQ(self)
        if self.init_lora_weights == "lora_ga":
            from .lora_ga import LoraGA

            return LoraGA(self)
        return Lora(self)

    def rank_of(self, name: str) -> int:
        """r of the module with this name."""
        return _pattern(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """α of the module with this name."""
        return _pattern(self.alpha_pattern, name, self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json; what is not in it has PEFT's default."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        if not self.loftq_config:
            del data["loftq_config"]
        del data["lora_ga_config"]
        if self.init_lora_weights == "lora_ga":
            data["lora_ga_config"] = self.lora_ga_config.to_dict()
        return {k: v for k, v in data.items() if k not in _DORA_CHOICES or v != _DORA_CHOICES[k][0]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoraConfig:
        """The config in PEFT's adapter_config.json.

        Raises:
            ValueError: it uses a feature of PEFT's that is not here.
        """
        known = {f.name for f in fields(cls)}
        extra = {key: value for key, value in data.items() if key not in known | _NO_EFFECT and value}
        if extra:
            raise ValueError(
                f"adapter config: {', '.join(f'{k}={v!r}' for k, v in extra.items())} is not supported here"
            )
        own = {key: value for key, value in data.items() if key in known and key != "lora_ga_config"}
        if own.get("init_lora_weights") in _TRUE_WHEN_READ:
            own["init_lora_weights"] = True
        if own.get("loftq_config") and own.get("init_lora_weights") is True:
            own["init_lora_weights"] = "loftq"  # as `adapter_files.portable` writes it
        return cls(**own)


# What use_dora offers beyond PEFT, the first as in PEFT; the file names only what differs from that
_DORA_CHOICES = {"dora_magnitude": ("column", "scalar"), "dora_norm": ("constant", "graph")}
# PEFT's inits of which a saved adapter needs no more: they left W as it is, or ("lora_ga") changed it once and for all,
# and the adapter is for the base that was saved then; no gradients are there to change it again
_TRUE_WHEN_READ = ("eva", "orthogonal", "lora_ga")
# PEFT's fields that are set without changing what a LoRA adapter computes
_NO_EFFECT = {"auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "revision"}


def _names(argument: str, names: Any) -> list[str]:
    """A list of names, sorted; a single string is taken for a mistake."""
    listed = [] if isinstance(names, str) or not hasattr(names, "__iter__") else list(names)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{argument}: got {names!r}; a list of names is accepted")
    return sorted(set(listed))


def _checked_pattern(argument: str, pattern: Any, check: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A dictionary from regular expressions to values that pass `check`."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{argument}: expected a dictionary from names to numbers, got {pattern!r}")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{argument}: {key!r} is no regular expression ({error})") from error
    return {key: check(f"{argument}[{key!r}]", value) for key, value in pattern.items()}


def _pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the name or its ending, as PEFT matches them."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


class Lora(Method):
    """Wraps Linears in `LoraLinear`."""

    layer = LoraLinear

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError where r does not fit the layer, or the start values would change a weight held as codes."""
        out_features, in_features = linear.weight.shape
        check_r(f"r of {name!r}", self.config.rank_of(name), out_features, in_features)
        init = self.config.init_lora_weights
        if init in OFFSET_INITS and isinstance(getattr(linear, "base_layer", linear), QuantizedLinear):
            raise ValueError(
                f"init_lora_weights: {init!r} takes s·B A from the weight, and {name!r} holds its weight as codes; "
                "accepted are True, 'kaiming', 'gaussian' and 'gaussian_b'"
            )

    def wrap(self, name: str, linear: Module) -> LoraLinear:
        """The Linear with a new adapter beside it; a LoraLinear gets one more."""
        layer = linear if isinstance(linear, LoraLinear) else LoraLinear(linear)
        config, W = self.config, layer.weight
        r = config.rank_of(name)
        scaling = lora_scaling(
            config.lora_alpha if not config.alpha_pattern else config.alpha_of(name), r, config.use_rslora
        )
        dtype = W.dtype if W.dtype in (np.float32, np.float64) else np.float32
        init = config.init_lora_weights
        if init is False:
            A = init_lora(*W.shape, r, "kaiming", self.rng, dtype)[0]
            B = self.rng.uniform(-(r**-0.5), r**-0.5, (W.shape[0], r)).astype(dtype)
        else:
            init = "kaiming" if init is True else init
            A, B = init_lora(
                *W.shape, r, init, self.rng, dtype, W.data if init in ("pissa", "olora") else None, scaling
            )
        dropout = Dropout(config.lora_dropout, rng=int(self.rng.integers(2**62)))
        layer.add(self.adapter, A, B, scaling, dropout, offset=init in OFFSET_INITS)
        return layer
