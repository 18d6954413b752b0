"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al. 2024 (arXiv 2402.09353).

    W' = m · V/‖V‖,   V = W + s·B A        W (out, in) frozen, m, A, B trained        (paper eq. 5)

The paper writes weights as (in, out) and norms its columns; here a weight is (out, in), so that its columns are rows:
one norm for every output. Formulas first, as functions of plain arrays; then one operation; then layer and method.
"""

from __future__ import annotations

from typing import Any

from .. import backend, ops
from ..backend import Array, get_namespace
from ..checks import check_choice, shape_or_type
from ..nn import Module, Parameter
from ..quant.linear import QuantizedWeight, quantized_linear
from ..tensor import Tensor, joint_result
from .base import AdapterLayer
from .lora import _DORA_CHOICES, Lora, LoraLinear, check_factors, lora_delta

# --- formulas ---------------------------------------------------------------------------------------------------------

MAGNITUDES, NORMS = _DORA_CHOICES["dora_magnitude"], _DORA_CHOICES["dora_norm"]


def dora_magnitude(W: Array, kind: str = "column") -> Array:
    """m = ‖W‖ for W (out, in). Liu et al. 2024, eq. 2.

    `"column"`: the norm of each output's weights, (out,), the paper's ‖·‖_c. `"scalar"`: the one norm of the whole
    matrix, (1,), as the document has it.
    """
    _check_matrix("W", W)
    return _as_kind(get_namespace(W).sqrt(_row_norms_squared(W)), kind)


def dora_weight(W: Array, A: Array, B: Array, m: Array, scaling: float) -> Array:
    """W' = m · V/‖V‖ with V = W + s·B A; m (out,) or (1,), A (r, in), B (out, r): (out, in). Liu et al. 2024, eq. 5.

    A row of V that is zero has no direction; it stays zero.
    """
    V = W + _fitting_delta(W, A, B, scaling)
    _check_magnitude(W, m)
    return (m / _or_one(dora_magnitude(V, _kind_of(W, m))))[:, None] * V


def dora_gradients(V: Array, m: Array, G: Array, norm: str = "graph") -> tuple[Array, Array]:
    """(∂L/∂m, ∂L/∂V) of W' = m · V/‖V‖ from G = ∂L/∂W'; V and G (out, in), m (out,) or (1,). Liu et al. 2024:

        ∂L/∂m = ⟨G, V⟩/‖V‖                               a row at a time, or over the matrix        (eq. 7)
        ∂L/∂V = m/‖V‖ · (G − ⟨G, V⟩/‖V‖² · V)            `"graph"`: G's part along V is taken out   (eq. 6)
        ∂L/∂V = m/‖V‖ · G                                `"constant"`: ‖V‖ held constant            (eq. 11)

    A and B get ∂L/∂A = s·Bᵀ ∂L/∂V and ∂L/∂B = s·∂L/∂V Aᵀ.
    """
    _check_matrix("V", V)
    check_choice("norm", norm, NORMS)
    if getattr(G, "shape", None) != V.shape:
        raise ValueError(f"G: got {shape_or_type(G)}; the shape of V, {V.shape}, is accepted")
    _check_magnitude(V, m)
    xp, kind = get_namespace(V), _kind_of(V, m)
    n = _or_one(dora_magnitude(V, kind))
    along = xp.einsum("ij,ij->i", G, V)  # (out,)
    along = along if kind == "column" else along.sum(keepdims=True)
    dV = G if norm == "constant" else G - (along / n**2)[:, None] * V
    return along / n, (m / n)[:, None] * dV


def weight_decomposition(W0: Array, W1: Array) -> tuple[float, float]:
    """(ΔM, ΔD): how far training moved the magnitudes and the directions of W0 (out, in) to those of W1.

        ΔM = mean |m₁ − m₀|        ΔD = mean (1 − cos(row of W1, row of W0))        over outputs

    Liu et al. 2024, eqs. 3 and 4. Rows that are zero before or after have no direction and are left out of ΔD.
    """
    _check_matrix("W0", W0)
    if getattr(W1, "shape", None) != W0.shape:
        raise ValueError(f"W1: got {shape_or_type(W1)}; the shape of W0, {W0.shape}, is accepted")
    xp = get_namespace(W0)
    W0, W1 = W0.astype("float64"), W1.astype("float64")  # 1 − cos of weights that hardly moved is all cancellation
    m0, m1 = dora_magnitude(W0), dora_magnitude(W1)
    there = (m0 > 0) & (m1 > 0)
    unit0, unit1 = W0[there] / m0[there][:, None], W1[there] / m1[there][:, None]
    turned = 0.5 * _row_norms_squared(unit1 - unit0)  # 1 − cos = ‖u₁ − u₀‖²/2, without cancellation
    return float(xp.abs(m1 - m0).mean()), float(turned.mean()) if turned.size else 0.0


def dora_norm(
    W: Array, A: Array, B: Array, scaling: float, row_norms_squared: Array | None = None, kind: str = "column"
) -> Array:
    """‖W + s·B A‖ of each row, (out,), or of the whole matrix, (1,), without forming W + s·B A. For each row

        ‖W + sBA‖² = ‖W‖² + 2s·⟨W Aᵀ, B⟩ + s²·⟨B (A Aᵀ), B⟩

    It costs 2·out·in·r flops (W Aᵀ) and arrays of (out, r) instead of the same flops and two arrays of (out, in).
    `row_norms_squared` is ‖W‖², where it is known already.

    Where the update nearly cancels the row, the three terms nearly cancel too, and the sum keeps few digits: rows whose
    square is under 1/16 of the squares' sum ‖W‖² + ‖sBA‖² are formed after all (few: an update as large as the weight
    and against it). Elsewhere at most 16 times the rounding of the terms is lost.
    """
    _check_matrix("W", W)
    _check_factors(W, A, B)
    squared, _ = _expanded(W, A, B, float(scaling), row_norms_squared)
    return _as_kind(get_namespace(W).sqrt(squared), kind)


def _expanded(W: Array, A: Array, B: Array, s: float, row_norms_squared: Array | None = None) -> tuple[Array, Array]:
    """(‖V‖² by row, V Aᵀ (out, r)) of V = W + s·B A; the second is a by-product that the backward can use."""
    xp = get_namespace(W)
    rows = _row_norms_squared(W) if row_norms_squared is None else row_norms_squared
    cross, own = backend.matmul(W, A.T), s * backend.matmul(B, backend.matmul(A, A.T))  # W Aᵀ, sBAAᵀ: (out, r)
    update = s * xp.einsum("ij,ij->i", own, B)
    squared = rows + 2 * s * xp.einsum("ij,ij->i", cross, B) + update
    few = squared < (rows + update) / 16
    if few.any():
        squared[few] = _row_norms_squared(W[few] + s * backend.matmul(B[few], A))
    cross += own
    return squared, cross


def _row_norms_squared(W: Array) -> Array:
    """Σ_j W_ij² without an array of W's size."""
    return get_namespace(W).einsum("ij,ij->i", W, W)


def _as_kind(norms: Array, kind: str) -> Array:
    """The norms of rows, or, for `"scalar"`, their norm: the matrix's."""
    check_choice("kind", kind, MAGNITUDES)
    return norms if kind == "column" else (norms * norms).sum(keepdims=True) ** 0.5


def _kind_of(W: Array, m: Array) -> str:
    return "scalar" if m.shape == (1,) and W.shape[0] != 1 else "column"


def _or_one(norms: Array) -> Array:
    """The norms, with 1 in place of 0: a row of zeros divided by it is a row of zeros, not of NaN."""
    return get_namespace(norms).where(norms > 0, norms, norms.dtype.type(1))


def _check_matrix(argument: str, W: Array) -> None:
    if getattr(W, "ndim", None) != 2:
        raise ValueError(f"{argument}: got {shape_or_type(W)}; a matrix (out, in) is accepted")


def _check_factors(W: Array, A: Array, B: Array) -> None:
    check_factors(A, B)
    if (B.shape[0], A.shape[1]) != W.shape:
        raise ValueError(f"A (r, in) and B (out, r): got {A.shape} and {B.shape}; W (out, in) is {W.shape}")


def _fitting_delta(W: Array, A: Array, B: Array, scaling: float) -> Array:
    _check_matrix("W", W)
    _check_factors(W, A, B)
    return lora_delta(A, B, scaling)


def _check_magnitude(W: Array, m: Array) -> None:
    if getattr(m, "shape", None) not in ((W.shape[0],), (1,)):
        raise ValueError(f"m: got {shape_or_type(m)}; ({W.shape[0]},), one for each output, or (1,) is accepted")


# --- the operation ----------------------------------------------------------------------------------------------------


def dora_linear(
    x: Any, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float, norm: str = "constant"
) -> Tensor:
    """y = g ∘ z + b, z = x Vᵀ, V = W + s·B A, g = m/‖V‖, as one node that never forms V; x (..., in): (..., out).

    With u = x Aᵀ, h = G ∘ g and v = s·h B, where G = ∂L/∂y:

        dm = Σ G ∘ z/‖V‖,  dx = h W + v A,  dA = vᵀ x,  dB = s·hᵀ u,  db = Σ G          the norm constant (eq. 11)
        dV −= c ∘ V, c = m·dm/‖V‖²:  dA −= s·(c ∘ B)ᵀ V,  dB −= s·c ∘ (V Aᵀ)            `norm="graph"` (eq. 6)

    The same as `dora_composed`; one node saves its arrays of y's size, and V and what comes of it. W may be codes
    (QDoRA): dequantized for each use, as in `lora_linear`.
    """
    check_choice("norm", norm, NORMS)
    x, W, A, B, m, stored, full = _operands(x, W, A, B, m)
    xp, s, kind, in_graph = get_namespace(x.data), float(scaling), _kind_of(W, m.data), norm == "graph"
    rows, a, b, magnitude = x.data.reshape(-1, W.shape[1]), A.data, B.data, m.data  # (N, in), (r, in), (out, r)
    z, u, v_at, size = _forward(rows, full(stored), a, b, s, kind)
    n = _or_one(size)
    # a row of zeros gives z = 0 whatever its gain; 1 leaves it to learn as LoRA's would
    g = xp.where(size > 0, magnitude / n, size.dtype.type(1))  # m/‖V‖
    if bias is None and bool((magnitude != 0).all() & (size > 0).all()):
        y = z
        y *= g
        kept, divisor = y, magnitude  # z/‖V‖ = y/m: what comes next often keeps y anyway, z would be one array more
    else:
        y, kept, divisor = z * g, z, n
        if bias is not None:
            y += bias.data

    parents = (x, W, A, B, m) if bias is None else (x, W, A, B, m, bias)
    need_x, need_w, need_a, need_b, need_m, *need_bias = [p.requires_grad for p in parents]
    rows = rows if need_w or need_a else None
    kept = kept if need_m or in_graph else None
    v_at = v_at if in_graph else None
    shape = x.shape

    def backward(G: Array) -> list[Array | None]:
        G = G.reshape(-1, len(b))  # (N, out)
        dm = dx = None
        if kept is not None:
            along = xp.einsum("ij,ij->j", G, kept)
            dm = (along if kind == "column" else along.sum(keepdims=True)) / divisor
        h = G * g  # (N, out)
        v = s * backend.matmul(h, b) if need_x or need_a else None  # (N, r)
        w = full(stored) if need_x or (in_graph and (need_w or need_a)) else None
        if need_x:
            dx = backend.matmul(h, w)
            dx += backend.matmul(v, a)
            dx = dx.reshape(shape)
        dW = backend.matmul(h.T, rows) if need_w else None
        dA = backend.matmul(v.T, rows) if need_a else None
        dB = s * backend.matmul(h.T, u) if need_b else None
        if in_graph:
            _take_out_along(dW, dA, dB, (magnitude * dm / n**2)[:, None], w, a, b, v_at, s)
        return [dx, dW, dA, dB, dm if need_m else None, *(G.sum(axis=0) if need else None for need in need_bias)]

    return joint_result("dora_linear", y.reshape(*shape[:-1], len(b)), parents, backward)


def _operands(x: Any, W: Tensor, A: Tensor, B: Tensor, m: Tensor) -> tuple[Any, ...]:
    """The operands as tensors, checked; what is stored of W, and the function that makes W (out, in) of that."""
    x, A, B, m = ops.operands("dora_linear", x, A, B, m)
    if isinstance(W, QuantizedWeight):
        stored, full = W.stored("dora_linear", x)
    else:
        (_, W) = ops.operands("dora_linear", x, W)
        stored, full = W.data, lambda w: w
    if x.shape[-1:] != W.shape[1:]:
        raise ValueError(f"dora_linear: x {x.shape}; W (out, in) = {W.shape} takes {W.shape[1]} features")
    _check_factors(W, A.data, B.data)
    _check_magnitude(W, m.data)
    return x, W, A, B, m, stored, full


def _forward(x: Array, W: Array, A: Array, B: Array, s: float, kind: str) -> tuple[Array, Array, Array, Array]:
    """z = x Vᵀ (N, out), u = x Aᵀ (N, r), V Aᵀ (out, r) and ‖V‖ for x (N, in)."""
    u = backend.matmul(x, A.T)
    z = backend.matmul(x, W.T)
    z += backend.matmul(u * s, B.T)
    squared, v_at = _expanded(W, A, B, s)
    return z, u, v_at, _as_kind(get_namespace(x).sqrt(squared), kind)


def _take_out_along(
    dW: Array | None, dA: Array | None, dB: Array | None,
    c: Array, W: Array | None, A: Array, B: Array, v_at: Array, s: float,
) -> None:  # fmt: skip
    """dV −= c ∘ V, in place, as W, A and B see it; c (out, 1) or (1, 1)."""
    if dW is not None:
        dW -= c * (W + s * backend.matmul(B, A))
    if dA is not None:
        cB = s * c * B  # (out, r)
        dA -= backend.matmul(cB.T, W) + s * backend.matmul(backend.matmul(cB.T, B), A)
    if dB is not None:
        dB -= s * c * v_at


def dora_composed(
    x: Any, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float, norm: str = "constant"
) -> Tensor:
    """What `dora_linear` computes, of simple operations: the reference in tests, and easier to read."""
    z = _product(x, W) + ops.linear(ops.linear(x, A), B) * float(scaling)
    y = z * _gain(W, A, B, m, scaling, norm)
    return y if bias is None else y + bias


def _gain(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float, norm: str) -> Tensor:
    """m/‖W + s·B A‖, (out,) or (1,); with `norm="constant"` no gradient goes through the norm."""
    kind = _kind_of(W, m.data)
    if norm == "constant":
        n = dora_norm(W.data, A.data, B.data, scaling, kind=kind)
        return m * (1 / _or_one(n)) if (n == 0).any() else m / n
    V = B @ A * float(scaling) + (Tensor(W.data) if isinstance(W, QuantizedWeight) else W)
    squared = (V * V).sum(axis=1)
    return m / ops.sqrt(squared if kind == "column" else squared.sum().reshape(1))


def _product(x: Any, W: Tensor) -> Tensor:
    return quantized_linear(x, W) if isinstance(W, QuantizedWeight) else ops.linear(x, W)


# --- the layer --------------------------------------------------------------------------------------------------------


class Magnitude(Module):
    """Holds m, so that it is called `lora_magnitude_vector.default.weight` as in PEFT.

    Attributes:
        weight: m, (out,) or (1,).
        norm: `"constant"` or `"graph"`: whether gradients go through ‖V‖.
    """

    def __init__(self, m: Array, norm: str) -> None:
        self.weight, self.norm = Parameter(m), norm

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, norm={self.norm!r}"


class DoraLinear(LoraLinear):
    """y = x W'ᵀ + b with W' = m · (W + s·B A)/‖W + s·B A‖, for each active adapter on what the one before it made.

    Adapters without a magnitude are LoRA's; both kinds can be in one layer. With dropout, base and adapter see the same
    dropped input where the magnitude changes it, as in PEFT: y = W x + (g − 1)·W x̃ + g·s·B A x̃.

    Attributes:
        lora_magnitude_vector: by adapter name, m.
    """

    def __init__(self, layer: LoraLinear) -> None:
        vars(self).update(vars(layer))
        self.lora_magnitude_vector: dict[str, Magnitude] = {}

    def add_magnitude(self, adapter: str, kind: str, norm: str) -> None:
        """Give an adapter the magnitude with which it starts as the identity: ‖W + s·B A‖ (Liu et al. 2024, eq. 5)."""
        W = self._without(adapter)
        A, B = self._factors(adapter)
        wide = W if W.dtype == A.dtype else W.astype(A.dtype)
        self.lora_magnitude_vector[adapter] = Magnitude(dora_norm(wide, A, B, self.scaling[adapter], kind=kind), norm)

    def _without(self, *active: str) -> Array:
        """W as these adapters see it: with what the resting ones took from it."""
        W = self.weight.data
        for name in [name for name in self.offset if name not in active]:
            W = W + lora_delta(*self.offset[name], self.scaling[name]).astype(W.dtype)
        return W

    def _adapted(self, W: Array, name: str, base: Array) -> Array:
        """W with one more adapter; the norm is that of the weight without any other, `base`, as in forward."""
        A, B = self._factors(name)
        V = W + lora_delta(A, B, self.scaling[name])
        if name not in self.lora_magnitude_vector:
            return V
        m = self.lora_magnitude_vector[name].weight.data
        n = dora_norm(base.astype(A.dtype, copy=False), A, B, self.scaling[name], kind=_kind_of(V, m))
        return (m / _or_one(n))[:, None] * V

    def delta(self, adapter: str) -> Array:
        """W' − W, (out, in)."""
        W = self.weight.data if self.unmerged is None else self.unmerged
        return self._adapted(W, adapter, W) - W

    def merge(self, adapters: list[str]) -> None:
        """W ← W' of each adapter in turn, rounded once to W's dtype."""
        names = [name for name in adapters if name in self.lora_A]
        if not names:
            return
        W = self.weight.data
        base = whole = self._without(*names)
        for name in names:
            whole = self._adapted(whole, name, base)
        self.weight.data = (whole - (base - W)).astype(W.dtype, copy=False) if base is not W else whole.astype(W.dtype)
        self.unmerged = W
        self.merged.extend(names)

    def unmerge(self) -> None:
        """W as it was, bit for bit: dividing by m would not give it back."""
        AdapterLayer.unmerge(self)

    def projection(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """LoRA's, where no magnitude takes part; else None: layers of one x must not be computed as LoRA's are."""
        return None if any(name in self.lora_magnitude_vector for name in self._active()) else super().projection()

    def forward(self, x: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        active = self._active()
        if not any(name in self.lora_magnitude_vector for name in active):
            return super().forward(x)
        W, bias, resting = self.base_layer.weight, self.base_layer.bias, self.offset.keys() - set(active)
        if len(active) == 1 and not resting and not (self.training and self.lora_dropout[active[0]].p):
            magnitude, A, B = self._tensors(active[0])
            return dora_linear(x, W, bias, A, B, magnitude.weight, self.scaling[active[0]], magnitude.norm)
        if resting:
            W = Tensor(self._without(*active))
        x = ops.tensor(x)
        y = _product(x, W)
        for name in active:
            y = self._with(name, y, x, W)
        return y if bias is None else y + bias

    def _tensors(self, name: str) -> tuple[Magnitude | None, Tensor, Tensor]:
        return self.lora_magnitude_vector.get(name), self.lora_A[name].weight, self.lora_B[name].weight

    def _with(self, name: str, y: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """y (without bias) and one more adapter."""
        magnitude, A, B = self._tensors(name)
        s, dropout = self.scaling[name], self.lora_dropout[name]
        dropped = dropout(x)
        update = ops.linear(ops.linear(dropped, A), B) * s
        if magnitude is None:
            return y + update
        gain = _gain(W, A, B, magnitude.weight, s, magnitude.norm)
        if not (dropout.training and dropout.p):
            return (y + update) * gain
        return y + _product(dropped, W) * (gain - 1.0) + update * gain

    def saved_name(self, name: str) -> str:
        """PEFT's files have m without `.weight`."""
        return "lora_magnitude_vector" if name == "lora_magnitude_vector.weight" else name


# --- the method -------------------------------------------------------------------------------------------------------


class Dora(Lora):
    """Wraps Linears in `DoraLinear`: LoRA's factors, and a magnitude."""

    def wrap(self, name: str, linear: Module) -> DoraLinear:
        """The Linear with a new adapter beside it; a layer that has adapters gets one more."""
        layer = super().wrap(name, linear)
        layer = layer if isinstance(layer, DoraLinear) else DoraLinear(layer)
        layer.add_magnitude(self.adapter, self.config.dora_magnitude, self.config.dora_norm)
        return layer
