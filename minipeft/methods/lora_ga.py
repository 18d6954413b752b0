"""LoRA-GA: LoRA with Gradient Approximation. Wang, Yu, Li 2024 (arXiv 2407.05000).

    G = ∂L/∂W = U S Vᵀ        A₀ = c·V_1…rᵀ,   B₀ = c·U_r+1…2r,   W ← W − s·B₀A₀             (Theorem 3.1, eq. 10)

The first step of gradient descent on A and B moves W + s·BA along s²·(B₀B₀ᵀ G + G A₀ᵀA₀). With singular vectors of G
in both factors that is G's best approximation of rank 2r, up to its length: the first step of full fine-tuning, as near
as two factors of rank r can come. The name is not short for gradient accumulation, as the document has it; `fit` does
that for every method (`grad_accumulation`).

PEFT's LoRA-GA, whose directions and scales these are, leaves the singular values in B; `scale="paper"` does not.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import backend, threads
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count, check_positive, shape_or_type
from ..module import in_mode
from ..nn import Dropout, Module
from ..progress import counting_bar
from ..quant.linear import QuantizedLinear
from ..rank import energy
from ..tensor import Tensor, enable_grad
from .base import AdapterLayer
from .lora import Lora, LoraLinear, check_factors, lora_scaling

# --- formulas ---------------------------------------------------------------------------------------------------------

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit", "paper")


def lora_ga_init(
    G: Array,
    r: int,
    *,
    scaling: float,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    W: Array | None = None,
    rng: np.random.Generator | int | None = None,
) -> tuple[Array, Array]:
    """Start values A (r, in) and B (out, r) from the full gradient G (out, in) = U diag(S) Vᵀ.

    The first 2r singular vectors are shared out; A's rows are v_jᵀ, B's columns S_i·u_i:

    | direction  | i, in B         | j, in A         |
    |------------|-----------------|-----------------|
    | `"ArBr"`   | 1, 3, … 2r − 1  | 2, 4, … 2r      |
    | `"A2rBr"`  | 1 … r           | r + 1 … 2r      |
    | `"ArB2r"`  | r + 1 … 2r      | 1 … r           |
    | `"random"` | r of them       | the same r      |

    | scale          | A        | B                                                              |
    |----------------|----------|----------------------------------------------------------------|
    | `"stable"`     | as it is | · out^¼/√γ                                                     |
    | `"weight_svd"` | as it is | · σ₁(W)/S_i of the first i (as it is where that S_i is 0)      |
    | `"gd_scale"`   | · 1/s    | · 1/s                                                          |
    | `"unit"`       | as it is | as it is                                                       |
    | `"paper"`      | · out^¼/√γ | u_i · out^¼/√γ: without the singular values                  |

    All but the last are PEFT 0.21's. The paper's B has no singular values in it: outputs then have a size that does not
    depend on out (eq. 10), and the first update is G's best approximation of rank 2r, which PEFT's is not. In PEFT's, G
    times 2 gives B times 2. The caller subtracts s·B A from W. PEFT finds the vectors by a randomized SVD.

    Args:
        scaling: s.
        gamma: γ.
        W: the weight (out, in), for `"weight_svd"`.
        rng: for `"random"`.

    Raises:
        ValueError: G is no matrix or not finite, r outside 1 … min(out, in)/2, an unknown direction or scale, a
            scaling or gamma that is not positive, or W missing.
    """
    xp = _check_init(G, r, scaling, gamma, direction, scale, W)
    wide = G if G.dtype in (np.float32, np.float64) else G.astype(np.float32)  # LAPACK has no half precision
    U, S, Vt = leading_singular_vectors(wide, 2 * r)
    if direction == "random":
        in_B = in_A = backend.move(backend.generator(rng).permutation(2 * r)[:r], xp)
    else:
        first, second, odd, even = slice(0, r), slice(r, 2 * r), slice(0, 2 * r, 2), slice(1, 2 * r, 2)
        in_B, in_A = {"ArBr": (odd, even), "A2rBr": (first, second), "ArB2r": (second, first)}[direction]
    A, B, S_B = Vt[in_A], U[:, in_B], S[in_B]
    if scale != "paper":
        B = B * S_B
    size = float(G.shape[0] ** 0.25 / gamma**0.5)
    if scale == "gd_scale":
        A, B = A / float(scaling), B / float(scaling)
    elif scale == "weight_svd":
        largest = float(xp.linalg.norm(W.astype(wide.dtype), 2))
        B = B * (largest / float(S_B[0]) if float(S_B[0]) > 0 else 1.0)
    elif scale != "unit":
        A, B = A * (size if scale == "paper" else 1.0), B * size
    return A.astype(G.dtype, copy=True), B.astype(G.dtype, copy=True)  # not views: U and V would stay alive


def leading_singular_vectors(G: Array, k: int) -> tuple[Array, Array, Array]:
    """U (out, k), S (k,) and Vᵀ (k, in) of G's k largest singular values: the SVD's, up to signs and rounding.

    Of a float32 G they are eigenvectors, in float64, of G Gᵀ = U S² Uᵀ or of Gᵀ G, whichever is smaller; then
    S_i = ‖Gᵀ u_i‖. That takes a quarter of the SVD's time for 576 × 1536. Squaring magnifies float64's rounding by
    (S_1/S_k)², which float32 does not show while S_k is above 1e-4 of S_1. Else, and for a float64 G, the SVD is taken.

    Raises:
        ValueError: k outside 1 … min(out, in).
    """
    if not 1 <= k <= min(G.shape):
        raise ValueError(f"k: got {k}; 1 to {min(G.shape)} is accepted for a matrix {tuple(G.shape)}")
    xp, wide = get_namespace(G), len(G) <= G.shape[1]
    if G.dtype == np.float32:
        M = G.astype(np.float64) if wide else G.T.astype(np.float64)
        left = xp.linalg.eigh(backend.matmul(M, M.T))[1][:, : -k - 1 : -1]  # eigenvalues ascend
        right = backend.matmul(left.T, M)
        S = xp.linalg.norm(right, axis=1)
        if float(S[-1]) > 1e-4 * float(S[0]):
            right /= S[:, None]
            U, Vt = (left, right) if wide else (right.T, left.T)
            return U.astype(G.dtype), S.astype(G.dtype), Vt.astype(G.dtype)
    U, S, Vt = xp.linalg.svd(G, full_matrices=False)
    return U[:, :k], S[:k], Vt[:k]


def _check_init(G: Array, r: int, scaling: float, gamma: float, direction: str, scale: str, W: Array | None) -> Any:
    """The array library of G, once everything is what is accepted."""
    _check_gradient(G)
    check_half_rank("r", r, *G.shape)
    for name, value in (("scaling", scaling), ("gamma", gamma)):
        check_positive(name, value)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("scale", scale, SCALES)
    if scale == "weight_svd" and getattr(W, "shape", None) != G.shape:
        raise ValueError(f"W: scale 'weight_svd' needs the weight {G.shape}, got {shape_or_type(W)}")
    xp = get_namespace(G)
    if not bool(xp.isfinite(G).all()):
        raise ValueError("G: it has numbers that are not finite")
    return xp


def _check_gradient(G: Array) -> None:
    if getattr(G, "ndim", None) != 2:
        raise ValueError(f"G: expected a matrix of floats (out, in), got {shape_or_type(G)}")
    if not backend.is_float(G.dtype):
        raise ValueError(f"G: expected a matrix of floats (out, in), got dtype {G.dtype}")


def check_half_rank(argument: str, r: int, out_features: int, in_features: int) -> None:
    """Raise unless 1 ≤ r ≤ min(out, in)/2: the start takes 2r singular vectors."""
    if not isinstance(r, int | np.integer) or isinstance(r, bool):
        raise TypeError(f"{argument}: expected an int, got {type(r).__name__} {r!r}")
    most = min(out_features, in_features) // 2
    if not 1 <= r <= most:
        accepted = f"1 to {most} is accepted" if most else "no r is accepted"
        raise ValueError(
            f"{argument}: got {r}; LoRA-GA takes 2r singular vectors of a gradient ({out_features}, {in_features}), "
            f"so {accepted}"
        )


def gradient_alignment(G: Array, A: Array, B: Array, scaling: float) -> float:
    """The cosine between G (out, in) and D = s²·(B Bᵀ G + G Aᵀ A), where −η·D is gradient descent's first change of
    W + s·BA (to first order in η, since ∂L/∂A = s·Bᵀ G and ∂L/∂B = s·G Aᵀ). A (r, in), B (out, r).

    D has rank at most 2r, so the cosine is at most √(Σ_{i≤2r} S_i² / Σ S_i²): `alignment_bound`. It is 0 where D or G
    is 0, and never negative: D's inner product with G is s²·(‖Bᵀ G‖² + ‖G Aᵀ‖²). Wang et al. 2024, section 3.2.
    Computed in float64: the squares of a gradient's small numbers leave float32's range.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_gradient(G)
    check_factors(A, B)
    if G.shape != (len(B), A.shape[1]):
        raise ValueError(f"G (out, in), A (r, in), B (out, r): got {G.shape}, {A.shape} and {B.shape}")
    xp, (G, A, B) = get_namespace(G), (M.astype("float64") for M in (G, A, B))
    D = float(scaling) ** 2 * (backend.matmul(B, backend.matmul(B.T, G)) + backend.matmul(backend.matmul(G, A.T), A))
    size = float(xp.linalg.norm(D)) * float(xp.linalg.norm(G))
    return float((D * G).sum()) / size if size else 0.0


def alignment_bound(G: Array, r: int) -> float:
    """√(Σ_{i≤2r} S_i² / Σ S_i²): the largest cosine that G and a matrix of rank 2r can have. Eckart and Young 1936.

    1 for a gradient of zeros.

    Raises:
        ValueError: G is no matrix or not finite, or r outside 1 … min(out, in)/2.
    """
    _check_gradient(G)
    check_half_rank("r", r, *G.shape)
    return energy(G, 2 * r) ** 0.5


# --- full gradients, a few weights at a time --------------------------------------------------------------------------


def weight_gradients(
    model: Module, names: Sequence[str], batches: Sequence[Any], loss_fn: Callable, budget: int | None = None
) -> Iterator[tuple[str, Array]]:
    """(name, G) for every named layer: G is ∂L/∂W of the mean loss over the batches, (out, in) in W's dtype.

    Never all gradients at once. The sum over batches needs a place for every weight's gradient, so the batches are gone
    over once for each group of layers whose gradients fit into `budget` bytes, while all other weights are frozen. That
    is exact, and a pass for late layers builds no graph below them. (One pass that keeps sketches of all gradients
    would give approximate singular vectors; one that adds up on disk would need dk numbers for every layer there.)

    The model is in eval mode and its adapters are off meanwhile, so that every pass sees the same function. Modes,
    flags and gradients are as before when the iterator has ended or is closed.

    Args:
        names: of modules with a `weight`.
        loss_fn: (model, batch) -> scalar Tensor.
        budget: left out, an eighth of all gradients, but always room for the largest one.

    Raises:
        ValueError: no gradient reaches a weight, or it is not finite.
    """
    weights = {name: model.get_submodule(name).weight for name in names}
    sizes = {name: p.data.nbytes for name, p in weights.items()}
    budget = max(max(sizes.values()), -(-sum(sizes.values()) // 8)) if budget is None else budget
    with _only_base(model):
        for group in _groups(sizes, budget):
            for name in group:
                weights[name].requires_grad, weights[name].grad = True, None
            with threads.one_by_one():  # parts of a batch would each hold the group's gradients, beyond the budget
                for batch in batches:
                    loss = loss_fn(model, batch)
                    if not isinstance(loss, Tensor):
                        raise TypeError(f"loss_fn: expected a Tensor with one element, got {type(loss).__name__}")
                    if loss.requires_grad:  # else no weight of this group is in the graph, which is refused below
                        (loss * (1 / len(batches))).backward()
                    del loss
            for name in group:
                G, weights[name].grad, weights[name].requires_grad = weights[name].grad, None, False
                if G is None:
                    raise ValueError(f"target_modules: the loss does not depend on {name!r}, so it has no gradient")
                if not bool(get_namespace(G).isfinite(G).all()):
                    raise ValueError(f"batches: the gradient of {name!r} over them is not finite")
                yield name, G
                del G


def _groups(sizes: dict[str, int], budget: int) -> Iterator[list[str]]:
    """Neighbours that fit into the budget together; one that is larger is a group of its own."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > budget:
            yield group
            group = []
        group.append(name)
    yield group


@contextlib.contextmanager
def _only_base(model: Module) -> Iterator[None]:
    """The model frozen, in eval mode and without its adapters; as before at the end."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    layers = [(m, m.disabled) for m in model.modules() if hasattr(m, "disabled")]
    try:
        for layer, _ in layers:
            layer.disabled = True
        for p, _, _ in parameters:
            p.requires_grad = False
        with enable_grad(), in_mode(model, training=False):
            yield
    finally:
        for layer, disabled in layers:
            layer.disabled = disabled
        for p, requires_grad, grad in parameters:
            p.requires_grad, p.grad = requires_grad, grad


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraGAConfig:
    """LoRA-GA's choices, for `LoraConfig(init_lora_weights="lora_ga", lora_ga_config=…)`; the first three are PEFT's.

    Args:
        direction, scale: see `lora_ga_init`; `"paper"` is not PEFT's.
        stable_gamma: γ.
        gradient_batches: how many batches the gradient is the mean of: the first ones, or all where there are fewer. On
            the digits one batch of 64 did as well as eight; of batches of 8, eight did better than one.
        gradient_bytes: the most that gradients may take at one time; left out, an eighth of all of them
            (`weight_gradients`). Half as much is twice as many passes over the batches.

    Raises:
        ValueError: outside what is accepted.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    gradient_batches: int = 4
    gradient_bytes: int | None = None

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_positive("stable_gamma", self.stable_gamma)
        check_count("gradient_batches", self.gradient_batches)
        if self.gradient_bytes is not None:
            check_count("gradient_bytes", self.gradient_bytes)

    def to_dict(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json has of it."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("gradient_")}


def lora_ga_config(given: Any) -> LoraGAConfig:
    """A `LoraGAConfig`, a dictionary of one, or None for its defaults.

    Raises:
        ValueError: anything else.
    """
    try:
        return given if isinstance(given, LoraGAConfig) else LoraGAConfig(**(given or {}))
    except TypeError as error:
        raise ValueError(
            f"lora_ga_config: got {given!r}; LoraGAConfig(direction, scale, stable_gamma), or a dictionary of these, "
            "is accepted"
        ) from error


class LoraGA(Lora):
    """LoRA that starts in the singular vectors of the full gradient, with W − s·B₀A₀ beside it.

    `get_peft_model(model, config, batches, loss_fn)` looks at the gradients; training is LoRA's and costs what LoRA's
    costs. Saved as it is by `save_pretrained(path)`, the adapter has rank 2r and needs no changed base; with
    `changed_base=True` it has rank r, and belongs to the base that `unload(changed_base=True)` gives.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._starts: dict[str, tuple[Array, Array]] = {}

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError where there are no 2r singular vectors, or the weight cannot give up s·B₀A₀."""
        check_half_rank(f"r of {name!r}", self.config.rank_of(name), *linear.weight.shape)
        if isinstance(getattr(linear, "base_layer", linear), QuantizedLinear):
            raise ValueError(
                f"init_lora_weights: 'lora_ga' takes the gradient of the weight and s·B A from it, and {name!r} holds "
                "its weight as codes, which have neither; accepted are True, 'kaiming', 'gaussian' and 'gaussian_b'"
            )
        if isinstance(linear, AdapterLayer) and linear.merged:
            raise ValueError(f"target_modules: {name!r} has merged adapters; call unmerge_adapter() first")

    def prepare(self, model: Module, batches: Iterable[Any] | Callable[[int], Any] | None, loss_fn: Any) -> None:
        """A₀ and B₀ of every target, from the gradient over the first batches. On a terminal a bar counts the layers.

        Raises:
            ValueError: batches or loss_fn missing, no batch, or a gradient that is missing or not finite.
        """
        given = {"batches": batches, "loss_fn": loss_fn}
        for name in given:
            if given[name] is None:
                raise ValueError(
                    f"{name}: got None; init_lora_weights='lora_ga' starts from gradients of the loss, so "
                    "get_peft_model(model, config, batches, loss_fn) needs both"
                )
        chosen, config = lora_ga_config(self.config.lora_ga_config), self.config
        stream = map(batches, itertools.count()) if callable(batches) else batches
        taken = list(itertools.islice(stream, chosen.gradient_batches))  # each pass sees the same; some have no length
        if not taken:
            raise ValueError("batches: got none; at least one is accepted")
        gradients = weight_gradients(model, self.names, taken, loss_fn, chosen.gradient_bytes)
        bar = counting_bar("LoRA-GA: gradients", len(self.names))
        with contextlib.closing(gradients), bar as advance:  # after an error too, flags and modes are as before at once
            for name, G in gradients:
                W, r = model.get_submodule(name).weight.data, config.rank_of(name)
                G = G.astype(np.promote_types(G.dtype, np.float32), copy=False)
                self._starts[name] = lora_ga_init(
                    G, r, scaling=self.scaling_of(name), gamma=chosen.stable_gamma, direction=chosen.direction,
                    scale=chosen.scale, W=W if chosen.scale == "weight_svd" else None, rng=self.rng,
                )  # fmt: skip
                del G  # before the next gradients are made
                advance()

    def scaling_of(self, name: str) -> float:
        """s of the module with this name."""
        return lora_scaling(self.config.alpha_of(name), self.config.rank_of(name), self.config.use_rslora)

    def wrap(self, name: str, linear: Module) -> LoraLinear:
        """The Linear, less s·B₀A₀, with the adapter beside it."""
        layer = linear if isinstance(linear, LoraLinear) else LoraLinear(linear)
        A, B = self._starts.pop(name)
        dropout = Dropout(self.config.lora_dropout, rng=int(self.rng.integers(2**62)))
        layer.add(self.adapter, A, B, self.scaling_of(name), dropout, offset=True)
        return layer
