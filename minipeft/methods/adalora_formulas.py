"""AdaLoRA's formulas, as functions of plain arrays, in the order of the paper. Zhang et al. 2023 (arXiv 2303.10512).

    ΔW = P Λ Q, with PᵀP ≈ I ≈ QQᵀ           (eqs. 3, 4)
    S, a score for every direction           (eqs. 7 to 11)
    b(t), how many directions may stay       (eqs. 6, 12)

P is (out, r), λ (r,), Q (r, in). methods/adalora.py trains with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, get_namespace, matmul
from ..checks import check_count, shape_or_type
from ..nn import Parameter
from ..tensor import Tensor, joint_result

# --- the update and its orthogonal factors ----------------------------------------------------------------------------


def adalora_delta(P: Array, lam: Array, Q: Array) -> Array:
    """ΔW = P diag(λ) Q for P (out, r), λ (r,), Q (r, in): (out, in). Zhang et al. 2023, eq. 3.

    LoRA's B A with B = P and A = diag(λ) Q. The singular value decomposition of ΔW, up to signs and order, where P's
    columns and Q's rows are orthonormal.
    """
    _check_triplets(P, lam, Q)
    return matmul(P, lam[:, None] * Q)


def orthogonality_penalty(P: Array, Q: Array) -> Array:
    """R = ‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F² for P (out, r), Q (r, in): one number. Zhang et al. 2023, eq. 4."""
    if getattr(P, "ndim", None) != 2 or getattr(Q, "ndim", None) != 2 or P.shape[1] != Q.shape[0]:
        raise ValueError(f"P (out, r) and Q (r, in): got {shape_or_type(P)} and {shape_or_type(Q)}")
    return sum((M * M).sum() for M in (_gram_minus_one(P.T), _gram_minus_one(Q)))


def _penalty(Ps: list[Parameter], Qs: list[Parameter], weight: float) -> Tensor:
    """γ·Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²) as one node, for all layers. dP = 4γ·P (PᵀP − I), dQ = 4γ·(QQᵀ − I) Q."""
    rows = [P.data.T for P in Ps] + [Q.data for Q in Qs]  # (r, n) each
    count = len(Ps)
    left = [_gram_minus_one(M) for M in rows]  # (r, r) each
    value = weight * sum((M * M).sum() for M in left)

    def backward(g: Array) -> list[Array]:
        scale = 4 * weight * g
        return [
            matmul(M.T, scale * R) if i < count else matmul(scale * R, M)
            for i, (M, R) in enumerate(zip(rows, left, strict=True))
        ]

    return joint_result("orthogonality_penalty", value, (*Ps, *Qs), backward)


def _gram_minus_one(M: Array) -> Array:
    """M Mᵀ − I, (r, r), for M (r, n)."""
    gram = matmul(M, M.T)
    gram -= get_namespace(M).eye(M.shape[0], dtype=M.dtype)
    return gram


def orthonormalize(P: Array) -> Array:
    """P (out, r) with orthonormal columns: Gram–Schmidt, so that the first i columns span what P's first i spanned.

    It is the Q of P = QR with a positive diagonal of R, which Householder reflections give without Gram–Schmidt's loss
    of orthogonality; a column that depends on those before it becomes some direction orthogonal to all others. The
    document projects P and Q so after each step; the paper has the penalty instead.

    Raises:
        ValueError: more columns than rows cannot be orthonormal.
    """
    if getattr(P, "ndim", None) != 2 or P.shape[0] < P.shape[1]:
        raise ValueError(f"P: got {shape_or_type(P)}; a matrix (out, r) with r ≤ out is accepted")
    xp = get_namespace(P)
    basis, R = xp.linalg.qr(P)
    return basis * xp.where(xp.diagonal(R) < 0, -1, 1).astype(P.dtype)


# --- how much a direction matters -------------------------------------------------------------------------------------


def importance_magnitude(P: Array, lam: Array, Q: Array) -> Array:
    """Sᵢ = λᵢ²·‖P_:i‖²·‖Q_i:‖², (r,): the document's score, ‖λᵢ P_:i Q_i:‖_F² (Zhang et al. 2023 compare with λᵢ²)."""
    _check_triplets(P, lam, Q)
    einsum = get_namespace(P).einsum
    return lam * lam * einsum("ij,ij->j", P, P) * einsum("ij,ij->i", Q, Q)


class Averages(NamedTuple):
    """What `importance_sensitivity` carries from step to step, for one array w: Ī and Ū, of w's shape."""

    importance: Array
    uncertainty: Array

    @classmethod
    def before(cls, w: Array) -> Averages:
        """Before the first step: Ī = Ū = 0."""
        zeros = get_namespace(w).zeros_like
        return cls(zeros(w), zeros(w))


def importance_sensitivity(
    P: Array,
    lam: Array,
    Q: Array,
    gP: Array,
    glam: Array,
    gQ: Array,
    state: tuple[Averages, Averages, Averages] | None = None,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> tuple[Array, tuple[Averages, Averages, Averages]]:
    """(S, state): the score of every direction, (r,), and the averages for the next step. Zhang et al. 2023, sec. 3.2:

        I(w) = |w·g|                                              what setting w to 0 changes the loss by    (eq. 8)
        Ī ← β₁Ī + (1−β₁)I,   Ū ← β₂Ū + (1−β₂)|I − Ī|              smoothed, and how uncertain          (eqs. 9, 10)
        s(w) = Ī·Ū                                                                                         (eq. 11)
        Sᵢ = s(λᵢ) + mean_j s(P_ji) + mean_j s(Q_ij)                                                        (eq. 7)

    Args:
        P, lam, Q: (out, r), (r,), (r, in).
        gP, glam, gQ: the loss's gradients of them.
        state: what the step before gave, for P, λ, Q; None at the first, where Ī = Ū = 0. It is not changed.

    Raises:
        ValueError: shapes that do not fit, or a β outside (0, 1).
    """
    _check_triplets(P, lam, Q)
    _check_fraction("beta1", beta1)
    _check_fraction("beta2", beta2)
    pairs = (("P", P, gP), ("lam", lam, glam), ("Q", Q, gQ))
    for name, w, g in pairs:
        if getattr(g, "shape", None) != w.shape:
            raise ValueError(f"g{name}: got {shape_or_type(g)}; the shape of {name}, {w.shape}, is accepted")
    if state is None:
        state = tuple(Averages.before(w) for _, w, _ in pairs)
    else:
        state = tuple(Averages(old.importance.copy(), old.uncertainty.copy()) for old in state)
    for (_, w, g), averages in zip(pairs, state, strict=True):
        _smooth(averages, w, g, beta1, beta2)
    return _combined(*state), state


def _smooth(averages: Averages, w: Array, g: Array, beta1: float, beta2: float) -> None:
    """Ī and Ū of one more step, in place."""
    mean, uncertainty = averages
    xp = get_namespace(w)
    now = xp.abs(w * g)
    mean *= beta1
    mean += (1 - beta1) * now
    now -= mean
    uncertainty *= beta2
    uncertainty += (1 - beta2) * xp.abs(now)


def _combined(P: Averages, lam: Averages, Q: Averages) -> Array:
    """S (r,) from the averages of P (out, r), λ (r,) and Q (r, in)."""
    einsum = get_namespace(lam.importance).einsum  # no array of P's size for Ī·Ū
    of_P = einsum("ji,ji->i", *P) / P.importance.shape[0]
    of_Q = einsum("ij,ij->i", *Q) / Q.importance.shape[1]
    return lam.importance * lam.uncertainty + (of_P + of_Q)


# --- how many directions there are ------------------------------------------------------------------------------------


def rank_budget(step: int, *, total_step: int, tinit: int, tfinal: int, init_budget: int, target_budget: int) -> int:
    """How many directions all modules together may have after `step` = 1 … total_step steps. Zhang et al. 2023, eq. 12:

        b(t) = b₀                                                     t ≤ tᵢ           warm-up
             = b_T + (b₀ − b_T)·(1 − (t − tᵢ)/(T − t_f − tᵢ))³        tᵢ < t ≤ T − t_f   a cubic down to the target
             = b_T                                                    t > T − t_f      ranks are settled

    rounded down (as PEFT does). The paper prints t − tᵢ − t_f for t − tᵢ: it would begin above b₀, and jump to b_T at
    the end. The authors' code and PEFT have t − tᵢ.

    Raises:
        ValueError: tinit + tfinal leaves no step to prune in, the target is above the start, or a number is no int.
    """
    check_count("step", step, least=0)
    _check_schedule(total_step, tinit, tfinal)
    check_count("init_budget", init_budget, least=0)
    if check_count("target_budget", target_budget, least=0) > init_budget:
        raise ValueError(f"target_budget: got {target_budget}; 0 to init_budget, {init_budget}, is accepted")
    if step <= tinit:
        return int(init_budget)
    if step > total_step - tfinal:
        return int(target_budget)
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int((init_budget - target_budget) * left**3 + target_budget)


def kept_directions(scores: Sequence[Array], budget: int) -> list[Array]:
    """Which λ stay, (r,) bools a module, from S (r,) of each: the `budget` highest of all. Zhang et al. 2023, eq. 6.

        λᵢ ← λᵢ if Sᵢ is among the b(t) highest scores of all modules, else 0

    Directions whose scores are equal at that border all go (as in PEFT).
    """
    xp = get_namespace(scores[0])
    every = xp.concatenate(scores)
    if budget >= every.size:
        return [xp.ones(S.shape, dtype=bool) for S in scores]
    highest_that_goes = xp.sort(every)[every.size - budget - 1]
    return [highest_that_goes < S for S in scores]


def _check_triplets(P: Array, lam: Array, Q: Array) -> None:
    r = P.shape[1:] if getattr(P, "ndim", None) == 2 else None
    if r is None or getattr(Q, "ndim", None) != 2 or getattr(lam, "shape", None) != r or Q.shape[:1] != r:
        got = f"{shape_or_type(P)}, {shape_or_type(lam)} and {shape_or_type(Q)}"
        raise ValueError(f"P (out, r), λ (r,) and Q (r, in): got {got}")


def _check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, int | float | np.number) or not 0 < value < 1:
        raise ValueError(f"{name}: got {value!r}; a number in (0, 1) is accepted")


def _check_schedule(total_step: Any, tinit: Any, tfinal: Any) -> None:
    if total_step is None:
        raise ValueError(
            "total_step: got None; an int of at least 1 is accepted: how many steps the training will have"
        )
    check_count("total_step", total_step)
    check_count("tinit", tinit, least=0)
    check_count("tfinal", tfinal, least=0)
    if tinit + tfinal >= total_step:
        raise ValueError(
            f"tinit + tfinal: got {tinit} + {tfinal}, and total_step is {total_step}: no step is left to prune in; "
            f"a sum of at most {total_step - 1} is accepted"
        )
