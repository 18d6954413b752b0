"""The claims about LoRA-Pro, of which the document has the heading only: what its paper says of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_sylvester

from .. import data, nn, ops, optim
from ..measure import compare_latency, peak_memory
from ..methods import lora_pro
from ..methods.lora import LoraConfig
from ..methods.lora_pro import LoraProConfig
from ..models import load_base
from ..nn import Module
from ..peft import get_peft_model
from ..tensor import Tensor
from ..train import fit
from . import Evidence, chinese_marks, claim


class Problem(NamedTuple):
    """A (r, in), B (out, r), the full gradient g (out, in), LoRA's own gradients, and s."""

    A: np.ndarray
    B: np.ndarray
    g: np.ndarray
    own_a: np.ndarray
    own_b: np.ndarray
    s: float


def _problems(count: int = 30) -> Iterator[Problem]:
    """Random ones with r well below min(out, in)."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        r = int(rng.integers(1, 4))
        out, width, s = int(rng.integers(3 * r, 13)), int(rng.integers(3 * r, 13)), float(rng.choice([0.5, 1.0, 2.0]))
        A, B, g = (rng.standard_normal(shape) for shape in ((r, width), (out, r), (out, width)))
        yield Problem(A, B, g, s * B.T @ g, s * g @ A.T, s)


def _adjusted(p: Problem, X: Any = "sylvester") -> tuple[np.ndarray, np.ndarray]:
    return lora_pro.lora_pro_gradients(p.A, p.B, p.own_a, p.own_b, p.s, X)


def _equivalent(p: Problem, X: Any = "sylvester") -> np.ndarray:
    return lora_pro.equivalent_gradient(p.A, p.B, *_adjusted(p, X), p.s)


@claim(
    "lorapro.equivalence",
    "A LoRA step changes W as full training with the equivalent gradient does, to first order in the step.",
)
def equivalence() -> Evidence:
    """s·BA after a step against W − η g̃, with η halved: what is left must fall as η²."""
    orders = []
    for p in _problems():
        g = lora_pro.equivalent_gradient(p.A, p.B, p.own_a, p.own_b, p.s)
        left = [
            np.linalg.norm(p.s * ((p.B - lr * p.own_b) @ (p.A - lr * p.own_a) - p.B @ p.A) + lr * g)
            for lr in (1e-2, 5e-3)
        ]
        orders.append(float(np.log2(left[0] / left[1])))
    return Evidence(
        f"What a step of size η leaves of ΔW + η·g̃ falls as η to the power {min(orders):.4f} … {max(orders):.4f} over "
        f"{len(orders)} random layers.",
        f"步长为 η 的一步，ΔW + η·g̃ 剩余的部分按 η 的 {min(orders):.4f} … {max(orders):.4f} 次方减小（{len(orders)} "
        "个随机层）。",
        holds=min(orders) > 1.99,
        figures={"orders": orders},
    )


def _as_trained(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """A's and B's gradients that an optimizer sees in a layer trained by LoRA-Pro with the loss Σ g ∘ (W + s·BA)."""
    (out, width), r = p.g.shape, len(p.A)
    linear = nn.Linear(width, out, bias=False, dtype="float64", rng=0)
    config = LoraProConfig(r=r, lora_alpha=p.s * r, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config)
    [(_, layer)] = model.adapter_layers()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = p.A, p.B
    (model(np.eye(width)) * p.g.T).sum().backward()
    model.method.before_step(model, 0)
    return A.grad, B.grad


@claim("lorapro.optimal", "The closed form attains the least-squares distance to the full gradient.")
def optimal() -> Evidence:
    """What layers trained by LoRA-Pro have before a step, against numpy.linalg.lstsq over the linear map
    (gA, gB) → s·(B gA + gB A); LoRA's own at its best step length."""
    excess, lora, pro = [], [], []
    for p in _problems():
        out, width = p.g.shape
        M = p.s * np.hstack([np.kron(p.B, np.eye(width)), np.kron(np.eye(out), p.A.T)])  # rows of g one after the other
        least = np.linalg.norm(M @ np.linalg.lstsq(M, p.g.ravel(), rcond=1e-10)[0] - p.g.ravel())
        own, size = lora_pro.equivalent_gradient(p.A, p.B, p.own_a, p.own_b, p.s), np.linalg.norm(p.g)
        trained = lora_pro.equivalent_gradient(p.A, p.B, *_as_trained(p), p.s)
        pro.append(float(np.linalg.norm(trained - p.g) / size))
        lora.append(float(np.linalg.norm(np.vdot(own, p.g) / np.vdot(own, own) * own - p.g) / size))
        excess.append(abs(pro[-1] - float(least / size)))
    return Evidence(
        f"‖g̃ − g‖/‖g‖ before a step of {len(excess)} random layers differs from the least-squares distance by at "
        f"most {max(excess):.1e}; it is {np.mean(pro):.3f} on average, {np.mean(lora):.3f} for LoRA's own at their "
        "best length.",
        f"{len(excess)} 个随机层在更新之前，‖g̃ − g‖/‖g‖ 与最小二乘距离最多相差 {max(excess):.1e}；"
        f"平均为 {np.mean(pro):.3f}，LoRA 自己的梯度取最佳步长时为 {np.mean(lora):.3f}。",
        holds=max(excess) < 1e-9,
        figures={"excess": excess, "lora": lora, "lora_pro": pro},
    )


@claim("lorapro.x-free", "The equivalent gradient does not depend on X.")
def x_free() -> Evidence:
    """The Sylvester X, 0 and a random X."""
    rng = np.random.default_rng(1)
    differences = []
    for p in _problems():
        r, reference = p.A.shape[0], _equivalent(p, "zero")
        for X in ("sylvester", rng.standard_normal((r, r))):
            differences.append(float(np.linalg.norm(_equivalent(p, X) - reference) / np.linalg.norm(reference)))
    return Evidence(
        f"Sylvester's X and random ones change the equivalent gradient by at most {max(differences):.1e} of its norm.",
        f"不论是 Sylvester 方程的 X 还是随机的 X，等效梯度的改变都不超过其范数的 {max(differences):.1e}。",
        holds=max(differences) < 1e-9,
        figures={"differences": differences},
    )


def _change(p: Problem, X: Any) -> float:
    """How far A's and B's adjusted gradients are from their own."""
    gA, gB = _adjusted(p, X)
    return float(np.hypot(np.linalg.norm(gA - p.own_a), np.linalg.norm(gB - p.own_b)))


@claim("lorapro.sylvester", "The Sylvester X changes A's and B's gradients least.")
def sylvester() -> Evidence:
    """Against X = 0, scipy's solution, and random steps away from it, of which none may come nearer."""
    rng = np.random.default_rng(2)
    nearer, ratios, from_scipy = 0, [], []
    for p in _problems():
        least = _change(p, "sylvester")
        K = p.B.T @ p.B
        X = solve_sylvester(K, p.A @ p.A.T, -np.linalg.solve(K, p.own_a) @ p.A.T / p.s**2)
        from_scipy.append(abs(float(_change(p, X) / least) - 1))
        ratios.append(float(least / _change(p, "zero")))
        steps = [X + 10.0 ** rng.uniform(-3, 1) * rng.standard_normal(X.shape) for _ in range(10)]
        nearer += sum(_change(p, other) < least * (1 - 1e-9) for other in [*steps, "zero"])
    tried = 11 * len(ratios)
    return Evidence(
        f"{nearer} of {tried} other X come nearer. The change is {np.mean(ratios):.3f} of that with X = 0 on average, "
        f"and differs by at most {max(from_scipy):.1e} of itself from that with scipy's X.",
        f"另外尝试的 {tried} 个 X 中，有 {nearer} 个改动更小。改动量平均是 X = 0 时的 {np.mean(ratios):.3f}，"
        f"与 scipy 求得的 X 相比，相对差不超过 {max(from_scipy):.1e}。",
        holds=nearer == 0 and max(from_scipy) < 1e-9,
        figures={"nearer": nearer, "ratio_to_zero": ratios},
    )


@claim("lorapro.descent", "The loss falls for small steps.")
def descent() -> Evidence:
    """The fall of a quadratic loss by a step of trained layers ÷ η‖g̃‖² as η shrinks, which must go to 1."""
    ratios = {lr: [] for lr in (1e-3, 1e-4, 1e-5)}
    for p in _problems():
        gA, gB = _as_trained(p)
        target = p.s * p.B @ p.A - p.g  # loss ½‖s·BA − target‖², whose gradient of W is g
        predicted = np.linalg.norm(_equivalent(p)) ** 2
        for lr, found in ratios.items():
            left = p.s * (p.B - lr * gB) @ (p.A - lr * gA) - target
            found.append(float((np.sum(p.g**2) - np.sum(left**2)) / 2 / (lr * predicted)))
    smallest, off = min(ratios), {lr: max(abs(x - 1) for x in found) for lr, found in ratios.items()}
    return Evidence(
        f"The loss falls in all of {len(ratios[smallest])} random layers at η = {smallest:g}, by η‖g̃‖² "
        f"within {off[smallest]:.1e} of it; at η = {max(ratios):g} within {off[max(ratios)]:.1e}.",
        f"η = {smallest:g} 时，{len(ratios[smallest])} 个随机层的损失全部下降，"
        f"降幅与 η‖g̃‖² 的相对差不超过 {off[smallest]:.1e}；η = {max(ratios):g} 时不超过 {off[max(ratios)]:.1e}。",
        holds=min(ratios[smallest]) > 0 and off[smallest] < off[max(ratios)] and off[smallest] < 0.1,
        figures={"fall_over_predicted": {str(lr): found for lr, found in ratios.items()}},
    )


RATES = (1e-2, 2e-2, 5e-2)  # at 1e-1 all that train adapters are worse than at 5e-2
CONFIGS: dict[str, Any] = {
    "LoRA": LoraConfig(lora_alpha=16),
    "LoRA-Pro plain": LoraProConfig(lora_alpha=16),
    "LoRA-Pro full": LoraProConfig(lora_alpha=16, variant="full"),
}


NAMES_ZH = {"LoRA": "LoRA", "LoRA-Pro plain": "LoRA-Pro 基本形式", "LoRA-Pro full": "LoRA-Pro 完整形式"}


@functools.cache
def _final_loss(name: str, lr: float, seed: int, steps: int = 60) -> float:
    """The training loss of the last ten steps on the rotated digits, from the digits' MLP."""
    task, model = data.digits.transfer(), load_base("mlp")
    if name in CONFIGS:
        model = get_peft_model(model, CONFIGS[name], seed=seed)
    else:
        model.requires_grad_(True).get_submodule(model.output_head).requires_grad_(False)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = data.digits.batches(*task.train, batch_size=64, seed=seed)
    return float(np.mean(fit(model, batches, steps=steps, optimizer=optimizer, progress=False).loss[-10:]))


@claim("lorapro.gap", "How far LoRA and LoRA-Pro stay from full training's loss.")
def gap() -> Evidence:
    """Final training losses over seeds, each at the rate that makes its own lowest."""
    every = {
        name: {lr: [_final_loss(name, lr, seed) for seed in range(3)] for lr in RATES}
        for name in ("full training", *CONFIGS)
    }
    rates = {name: min(by_rate, key=lambda lr: np.mean(by_rate[lr])) for name, by_rate in every.items()}
    losses = {name: by_rate[rates[name]] for name, by_rate in every.items()}
    full = np.array(losses["full training"])
    gaps = {name: np.array(losses[name]) - full for name in CONFIGS}
    said = {name: f"{gap.mean():+.3f} ± {gap.std():.3f} (lr {rates[name]:g})" for name, gap in gaps.items()}
    shown = ", ".join(f"{name} {gap}" for name, gap in said.items())
    shown_zh = "，".join(f"{NAMES_ZH[name]} {chinese_marks(gap)}" for name, gap in said.items())
    tried, tried_zh = (comma.join(f"{lr:g}" for lr in RATES) for comma in (", ", "、"))
    of_full = f"{full.mean():.3f}, lr {rates['full training']:g}"
    return Evidence(
        f"Loss after 60 steps minus full training's ({of_full}), each at its best of lr {tried}, 3 "
        f"seeds, r = 8: {shown}.",
        f"60 步后的损失减去全参数训练的损失（{chinese_marks(of_full)}），各用 lr {tried_zh} 中最好的，3 个种子，"
        f"r = 8：{shown_zh}。",
        figures={"losses": losses, "rates": rates},
    )


@claim("lorapro.cost", "What LoRA-Pro costs beside LoRA, in time and bytes.")
def cost(width: int = 256, rows: int = 256) -> Evidence:
    """Steps of all three in one run; what the method keeps between them, and the peak that a step adds."""
    rng = np.random.default_rng(0)
    x, steps, kept, peaks = Tensor(rng.standard_normal((rows, width), dtype=np.float32)), {}, {}, {}
    for name, config in CONFIGS.items():
        model = get_peft_model(_layers(width), config)
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model.method.start(model, optimizer)
        steps[name] = functools.partial(_step, model, optimizer, x)
        with peak_memory() as peak:
            steps[name]()
        kept[name] = optimizer.nbytes + getattr(model.method, "nbytes", 0)
        peaks[name] = peak.bytes
    ratios = compare_latency(steps, repeat=7, warmup=1).ratios
    costs = {n: (f"{ratios[n]:.2f}", f"{kept[n] / kept['LoRA']:.1f}") for n in CONFIGS if n != "LoRA"}
    shown = ", ".join(f"{name} {time} and {size}" for name, (time, size) in costs.items())
    shown_zh = "，".join(f"{NAMES_ZH[name]} {time} 与 {size}" for name, (time, size) in costs.items())
    return Evidence(
        f"Time of a step and bytes kept between steps, ÷ LoRA's, four {width}² layers, {rows} rows, r = 8: {shown}.",
        f"一步的用时与步间保留的字节数，÷ LoRA，四个 {width}² 的层，{rows} 行，r = 8：{shown_zh}。",
        figures={"time": ratios, "kept_bytes": kept, "peak_bytes": peaks},
    )


def _layers(width: int) -> Module:
    return nn.Sequential(*(nn.Linear(width, width, rng=i) for i in range(4)))


def _step(model: Module, optimizer: optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    ops.mse_loss(model(x), x).backward()
    model.method.before_step(model, 0)
    optimizer.step()
