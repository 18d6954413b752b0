"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized? Wang et al. 2025 (ICLR; arXiv 2407.18242).

    g̃ = s·(B gA + gB A)        the gradient of W that a LoRA step amounts to    (definition 1, equivalent gradient)
    min ‖g̃ − g‖_F over gA, gB    solved in closed form without g = ∂L/∂W       (theorem 2.1)

W is (out, in), A (r, in), B (out, r), s = α/r. LoRA's own gradients are gA = s·Bᵀg and gB = s·g Aᵀ; LoRA-Pro replaces
them before the step. Formulas first, as functions of plain arrays; then the method and its config. The layer is LoRA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace, matmul
from ..checks import check_choice, shape_or_type
from ..nn import Module, Parameter
from ..optim import Adam, Optimizer
from .lora import Lora, LoraConfig, LoraLinear, check_factors

# --- formulas ---------------------------------------------------------------------------------------------------------


def equivalent_gradient(A: Array, B: Array, gA: Array, gB: Array, scaling: float) -> Array:
    """g̃ = s·(B gA + gB A), (out, in), for A and gA (r, in), B and gB (out, r). Wang et al. 2025, definition 1.

    A ← A − η gA, B ← B − η gB changes W + s·B A by −η g̃ + s·η² gB gA: to first order in η the step of full training
    with the gradient g̃, whose rank is at most 2r.
    """
    _check(A, B, gA, gB, scaling)
    return float(scaling) * (matmul(B, gA) + matmul(gB, A))


XS = ("sylvester", "zero")


def lora_pro_gradients(
    A: Array,
    B: Array,
    gA: Array,
    gB: Array,
    scaling: float,
    X: str | Array = "sylvester",
    rtol: float | None = None,
) -> tuple[Array, Array]:
    """(gA*, gB*) whose equivalent gradient is as near to full training's g as any. Wang et al. 2025, theorem 2.1:

        gA* = (BᵀB)⁻¹ gA/s² + X A                                (r, in)
        gB* = (I − B(BᵀB)⁻¹Bᵀ) gB (AAᵀ)⁻¹/s² − B X               (out, r)

    for any X (r, r): s·(B gA* + gB* A) = P_B g + (I − P_B) g P_A, with P_B and P_A the projections onto B's columns and
    A's rows. g itself is not needed: gA = s·Bᵀg and gB = s·g Aᵀ hold what the formula asks of it. No (out, in) matrix
    is formed; the work is of order (out + in)·r² + r³.

    Args:
        X: `"sylvester"` takes the X with BᵀB X + X AAᵀ = −(BᵀB)⁻¹ gA Aᵀ/s², for which ‖gA* − gA‖² + ‖gB* − gB‖² is
            least (theorem 2.3); `"zero"` takes 0; or an array (r, r).
        rtol: eigenvalues of BᵀB and of AAᵀ up to rtol times their largest count as zero; left out, 10·r·eps, under
            which rounding hides them.

    Where B or A has no full rank (at the first step B = 0) the inverses are pseudo-inverses, and in the directions that
    are left out the plain gradients stay. So with B = 0: gA* = gA (which is 0, since it is s·Bᵀg) and
    gB* = gB (AAᵀ)⁻¹/s²; and gB* = gB with A = 0. Nothing is damped: what is kept is inverted exactly, and so is at most
    1/(rtol·λ_max) large.

    Raises:
        ValueError, TypeError: shapes that do not fit, a dtype other than float32 and float64, a scaling of 0, an
            unknown X, or rtol outside [0, 1).
    """
    _check(A, B, gA, gB, scaling)
    _check_options(X, rtol, A, B)
    s2 = float(scaling) ** 2
    rtol = 10 * A.shape[0] * float(np.finfo(A.dtype).eps) if rtol is None else float(rtol)
    lam_B, V, inverse_B, rest_B = _pseudo_inverse(matmul(B.T, B), rtol)
    lam_A, U, inverse_A, rest_A = _pseudo_inverse(matmul(A, A.T), rtol)
    down = matmul(inverse_B, gA) / s2  # (BᵀB)⁻¹ gA/s²  [r, in]
    up = matmul(gB, inverse_A) / s2  # gB (AAᵀ)⁻¹/s²  [out, r]
    inside = matmul(inverse_B, matmul(B.T, up))  # (I − P_B) up = up − B·inside  [r, r]
    if isinstance(X, str):
        X = _sylvester(lam_B, V, lam_A, U, -matmul(down, A.T)) if X == "sylvester" else None
    if X is None:
        gA_star, gB_star = down, up - matmul(B, inside)
    else:
        X = X.astype(A.dtype, copy=False)
        gA_star, gB_star = down + matmul(X, A), up - matmul(B, inside + X)
    if rest_B is not None:
        gA_star = gA_star + matmul(rest_B, gA)
    if rest_A is not None:
        gB_star = gB_star + matmul(gB, rest_A)
    return gA_star, gB_star


def _pseudo_inverse(M: Array, rtol: float) -> tuple[Array, Array, Array, Array | None]:
    """(λ, V, M⁺, I − M⁺M) of a symmetric M (r, r) = V diag(λ) Vᵀ; the last is None where M has full rank.

    Decomposed in float64, where it costs nothing: M's own rounding is error enough.
    """
    xp = get_namespace(M)
    lam, V = xp.linalg.eigh(M.astype("float64"))
    kept = lam > rtol * abs(lam[-1])  # ascending: the last is the largest
    lam = xp.where(kept, lam, 0.0)
    inverse = matmul(V * xp.where(kept, 1 / xp.where(kept, lam, 1.0), 0.0), V.T)
    rest = None if bool(kept.all()) else matmul(V * xp.where(kept, 0.0, 1.0), V.T).astype(M.dtype)
    return lam, V, inverse.astype(M.dtype), rest


def _sylvester(lam_B: Array, V: Array, lam_A: Array, U: Array, C: Array) -> Array:
    """X with K X + X M = C for K = V diag(lam_B) Vᵀ and M = U diag(lam_A) Uᵀ: (Vᵀ X U)ᵢⱼ = (Vᵀ C U)ᵢⱼ/(λᵢ + μⱼ).

    Both are symmetric and decomposed already, so the general method (Bartels and Stewart's, scipy's
    `solve_sylvester`) has nothing left to do. Where λᵢ = 0 C has no part, and X gets none.
    """
    xp = get_namespace(C)
    sums = lam_B[:, None] + lam_A[None, :]
    Y = matmul(matmul(V.T, C.astype("float64")), U)
    Y = xp.where(lam_B[:, None] > 0, Y / xp.where(sums > 0, sums, 1.0), 0.0)
    return matmul(matmul(V, Y), U.T).astype(C.dtype)


def adam_direction(m: Array, v: Array, g: Array, t: int, betas: tuple[float, float], eps: float) -> Array:
    """m̂/(√v̂ + eps) at step t = 1, 2, …, with m ← β₁m + (1−β₁)g and v ← β₂v + (1−β₂)g² updated in place.

    Kingma and Ba 2015, algorithm 1; in LoRA-Pro's full form g is the equivalent gradient and all are (out, in).
    """
    xp, (beta1, beta2) = get_namespace(m), betas
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * (g * g)
    denominator = xp.sqrt(v)
    denominator *= (1 - beta2**t) ** -0.5
    denominator += eps
    return m / denominator * (1 / (1 - beta1**t))


def _check(A: Array, B: Array, gA: Array, gB: Array, scaling: float) -> None:
    check_factors(A, B)
    for name, g, like in (("gA", gA, A), ("gB", gB, B)):
        if getattr(g, "shape", None) != like.shape:
            raise ValueError(f"{name}: got {shape_or_type(g)}; the shape of {name[1]}, {like.shape}, is accepted")
    if not 0 < abs(float(scaling)) < float("inf"):
        raise ValueError(f"scaling: got {scaling}; a finite number other than 0 is accepted")


def _check_options(X: Any, rtol: float | None, A: Array, B: Array) -> None:
    r = A.shape[0]
    for name, factor in (("A", A), ("B", B)):
        if factor.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name}: got dtype {factor.dtype}; float32 and float64 are accepted")
    if X not in XS if isinstance(X, str) else getattr(X, "shape", None) != (r, r):
        given = repr(X) if isinstance(X, str) else shape_or_type(X)
        raise ValueError(f'X: got {given}; "sylvester", "zero" and an array ({r}, {r}) are accepted')
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol: got {rtol}; a number in [0, 1) is accepted")


# --- the method -------------------------------------------------------------------------------------------------------

VARIANTS = ("plain", "full")


@dataclass
class LoraProConfig(LoraConfig):
    """LoRA's config, trained by LoRA-Pro. It is saved as the ordinary LoRA adapter that it is.

    Args:
        variant: `"plain"` adjusts the gradients of A and B, and any optimizer goes on from there. `"full"` is the
            paper's algorithm for AdamW: Adam's moments are those of the equivalent gradient, (out, in) for every
            adapted layer, and it is Adam's direction that is turned into a step of A and B. It costs as much optimizer
            memory as full fine-tuning and needs an AdamW, whose lr, betas and eps it takes.
        X: `"sylvester"`, the X that changes A's and B's gradients least, or `"zero"`.
        rtol: see `lora_pro_gradients`.
    """

    variant: str = "plain"
    X: str = "sylvester"
    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.use_dora:
            raise ValueError("use_dora: LoRA-Pro's formulas are for W + s·B A; False is accepted")
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        check_choice("X", self.X, XS)
        if self.rtol is not None and not (isinstance(self.rtol, int | float | np.number) and 0 <= self.rtol < 1):
            raise ValueError(f"rtol: got {self.rtol!r}; a number in [0, 1), or None, is accepted")

    def build(self) -> LoraPro:
        """The method that this config describes."""
        return LoraPro(self) if self.variant == "plain" else FullLoraPro(self)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json: how it was trained is not in it."""
        return {name: value for name, value in super().to_dict().items() if name not in ("variant", "X", "rtol")}


class LoraPro(Lora):
    """LoRA whose gradients are adjusted before the optimizer's step.

    `fit` clips before it: `clip_norm` bounds LoRA's own gradients. As long as B is near 0 the adjusted gradients of A
    are large, as (BᵀB)⁻¹B is, so a rule that takes over their size (SGD) needs a small rate; Adam's divides it out.
    """

    def before_step(self, model: Module, step: int) -> None:
        """gA, gB ← gA*, gB* for every layer that has this adapter active and a gradient."""
        for _, A, B, scaling in self.factors(model):
            A.grad, B.grad = self.adjusted(A, B, A.grad, B.grad, scaling)
        _credit()

    def adjusted(self, A: Parameter, B: Parameter, gA: Array, gB: Array, scaling: float) -> tuple[Array, Array]:
        """`lora_pro_gradients` with the config's X and rtol."""
        return lora_pro_gradients(A.data, B.data, gA, gB, scaling, self.config.X, self.config.rtol)

    def factors(self, model: Module) -> Iterator[tuple[str, Parameter, Parameter, float]]:
        """(name, A, B, s) of the layers that have this adapter active and gradients of both."""
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLinear) and self.adapter in layer.lora_A and self.adapter in layer.active:
                A, B = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
                if A.grad is not None and B.grad is not None:
                    yield name, A, B, layer.scaling[self.adapter]


def _credit() -> None:
    """The products since backward are this method's, not the next operation's."""
    if backend.flop_counter is not None:
        backend.flop_counter.credit("lora_pro")


class FullLoraPro(LoraPro):
    """The paper's LoRA-Pro with AdamW: the moments of the equivalent gradient, then a step of A and B along them.

        g̃ = s·(B gA* + gB* A);   d = Adam's direction for g̃;   A, B ← A, B − η·(the adjusted s·Bᵀd, s·d Aᵀ)

    The optimizer's own step leaves these A and B out, since their gradients are None by then, and trains the rest.
    Decay is AdamW's on ΔW: A and B each shrink by √(1 − η·wd).

    Attributes:
        moments: m and v by layer, (out, in) each in A's dtype: 2·out·in numbers, as full fine-tuning with Adam has.
        steps: how many steps they have had.
    """

    def __init__(self, config: LoraProConfig) -> None:
        super().__init__(config)
        self.optimizer: Optimizer | None = None
        self.moments: dict[str, tuple[Array, Array]] = {}
        self.steps = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the moments, read off the arrays."""
        return sum(m.nbytes + v.nbytes for m, v in self.moments.values())

    def start(self, model: Module, optimizer: Optimizer) -> None:
        """Moments at zero for an optimizer that is new here.

        Raises:
            ValueError: an optimizer whose rule this is not.
        """
        group = optimizer.param_groups[0]
        if not isinstance(optimizer, Adam) or group["amsgrad"] or group["maximize"]:
            raise ValueError(
                f'optimizer: variant "full" is AdamW\'s rule; got {type(optimizer).__name__}'
                f"{' with amsgrad or maximize' if isinstance(optimizer, Adam) else ''}; a plain AdamW is accepted"
            )
        if not optimizer.decoupled and any(group["weight_decay"] for group in optimizer.param_groups):
            raise ValueError("optimizer: Adam's weight_decay is not in variant \"full\"; AdamW's is")
        if optimizer is not self.optimizer:
            self.optimizer, self.moments, self.steps = optimizer, {}, 0

    def before_step(self, model: Module, step: int) -> None:
        """The whole step of A and B, with the optimizer's lr, betas, eps and weight_decay."""
        if self.optimizer is None:
            raise ValueError('before_step: variant "full" needs start(model, optimizer) first; `fit` calls it')
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.steps += 1
        for name, A, B, s in self.factors(model):
            group = groups[id(A)]
            gA, gB = lora_pro_gradients(A.data, B.data, A.grad, B.grad, s, "zero", self.config.rtol)
            g = equivalent_gradient(A.data, B.data, gA, gB, s)  # (out, in), the same for every X
            xp = get_namespace(g)
            m, v = self.moments.get(name) or (xp.zeros_like(g), xp.zeros_like(g))
            self.moments[name] = backend.move(m, xp), backend.move(v, xp)  # a checkpoint's come from the host
            d = adam_direction(*self.moments[name], g, self.steps, group["betas"], group["eps"])
            dA, dB = self.adjusted(A, B, s * matmul(B.data.T, d), s * matmul(d, A.data.T), s)
            lr = float(group["lr"])
            shrink = float(1 - lr * group["weight_decay"]) ** 0.5
            A.data, B.data = shrink * A.data - lr * dA, shrink * B.data - lr * dB
            A.grad = B.grad = None
        _credit()

    def state_dict(self) -> dict[str, Array]:
        """The moments, and how many steps they have had."""
        state = {f"{name}.{kind}": a for name, pair in self.moments.items() for kind, a in zip("mv", pair, strict=True)}
        return {"steps": np.array([self.steps]), **state}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: state that it did not give.
        """
        names = {key[:-2] for key in state if key.endswith((".m", ".v"))}
        if state.keys() != {"steps"} | {f"{name}.{kind}" for name in names for kind in "mv"}:
            raise ValueError(
                f'method state: got {sorted(state)}; the moments of variant "full" and "steps" are accepted'
            )
        self.steps = int(state["steps"][0])
        self.moments = {name: (state[f"{name}.m"].copy(), state[f"{name}.v"].copy()) for name in sorted(names)}
