"""The claims of the document's DoRA section."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import data, optim
from ..backend import count_flops
from ..measure import peak_memory
from ..methods.dora import (
    dora_composed,
    dora_gradients,
    dora_linear,
    dora_magnitude,
    dora_norm,
    dora_weight,
    weight_decomposition,
)
from ..methods.lora import LoraConfig
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..recipes import METHODS
from ..tensor import Tensor, no_grad
from ..train import Progress, fit
from . import Evidence, chinese_marks, claim
from .runs import BATCH, adapt, weight_updates


@dataclass(frozen=True)
class DoraRun:
    """A small network adapted to the shifted digits: the model, its base's arrays, and what was seen on the way."""

    model: Module
    before: dict[str, np.ndarray]
    losses: list[float]
    accuracy: float
    valid: float
    norm_errors: list[float]
    frozen_gradients: int


SEEDS = range(3)


def train(
    r: int = 8, seed: int = 0, base: str = "mlp", steps: int = 100, lr: float | None = None, **options: Any
) -> DoraRun:
    """Adapt a base with LoRA, or with `use_dora=True` and its options, as `runs.adapt` does; left out, at the recipe's
    learning rate."""
    lr = METHODS["dora" if options.get("use_dora") else "lora"].lr if lr is None else lr
    return _train(r, seed, base, steps, lr, **options)


@functools.cache
def _train(r: int, seed: int, base: str, steps: int, lr: float, **options: Any) -> DoraRun:
    task, model = data.digits.transfer(), load_base(base)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, **options), seed=seed)
    errors: list[float] = []
    frozen: list[int] = []
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = data.digits.batches(*task.train, batch_size=BATCH, seed=seed)
    watch = _watch(errors, frozen)
    history = fit(model, batches, steps=steps, optimizer=optimizer, callbacks=[watch], progress=False)
    reached, valid = accuracy(model.eval(), *task.test), accuracy(model, *task.valid)
    return DoraRun(model, before, history.loss, reached, valid, errors, sum(frozen))


def _watch(errors: list[float], frozen: list[int]) -> Callable[[Progress], None]:
    """Every tenth step: | ‖row of W'‖/|m| − 1 |, the largest; after every step: gradients of frozen parameters.

    W' is what forward applies, read off its outputs for the unit vectors.
    """

    def watch(progress: Progress) -> None:
        frozen.append(sum(p.grad is not None for p in progress.model.parameters() if not p.requires_grad))
        layers = [m for _, m in progress.model.adapter_layers() if hasattr(m, "lora_magnitude_vector")]
        for layer in layers if progress.step % 10 == 0 else []:
            m, base = layer.lora_magnitude_vector["default"].weight.data, layer.base_layer
            with no_grad():
                applied = layer(np.eye(base.in_features, dtype=m.dtype)).data - base.bias.data  # W'ᵀ
            norms = np.linalg.norm(applied, axis=0 if m.size > 1 else None)
            errors.append(float(abs(norms / abs(m) - 1).max()))

    return watch


def _example(dtype: str = "float64") -> tuple[np.ndarray, ...]:
    """W (48, 32), A, B with r = 4."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((48, 32), (4, 32), (48, 4)))


@claim("dora.decompose", "W = m · V/‖V‖: a weight is a magnitude times a unit direction.")
def decompose() -> Evidence:
    """Composing again what was decomposed, on trained weights; outputs of a model whose layers were just wrapped."""
    model = load_base("vit").eval()
    weights = [W for name, W in model.state_dict().items() if name.endswith("weight") and W.ndim == 2]
    units = [W / dora_magnitude(W)[:, None] for W in weights]
    largest = max(
        float(np.abs(dora_magnitude(W)[:, None] * unit - W).max() / np.abs(W).max())
        for W, unit in zip(weights, units, strict=True)
    )
    length = max(float(np.abs(np.linalg.norm(unit, axis=1) - 1).max()) for unit in units)
    x = data.digits.transfer().test.x
    expected = model(x).data
    model = get_peft_model(model, LoraConfig(use_dora=True)).eval()
    wrapped = sum(hasattr(layer, "lora_magnitude_vector") for _, layer in model.adapter_layers())
    same = model(x).data.tobytes() == expected.tobytes()
    return Evidence(
        f"{len(weights)} trained float32 weights come back within {largest:.1e} of their largest number; directions "
        f"have length 1 within {length:.1e}. A model with {wrapped} layers just wrapped gives its base's logits "
        f"{'to the bit' if same else 'changed'}.",
        f"{len(weights)} 个训练过的 float32 权重分解后可以复原，误差不超过其最大数的 {largest:.1e}；方向的长度为 1，"
        f"误差不超过 {length:.1e}。{wrapped} 层刚套上 DoRA 的模型，"
        f"logits 与原模型{'逐位相同' if same else '有所不同'}。",
        holds=largest < 1e-6 and length < 1e-6 and same and wrapped > 0,
        figures={"largest": largest, "length": length, "same": same, "wrapped": wrapped},
    )


@claim("dora.scalar", "The magnitude m is a scalar, and ‖V‖ is the norm of the matrix.")
def scalar() -> Evidence:
    """The document's one magnitude beside the paper's one for each output: counts, what each keeps, training."""
    W, A, B = _example()
    lengths = lambda W: np.linalg.norm(W, axis=1)  # noqa: E731
    moved = {
        kind: float(np.abs(lengths(dora_weight(W, A, B, dora_magnitude(W, kind), 1.0)) / lengths(W) - 1).max())
        for kind in ("column", "scalar")
    }
    layers = {
        kind: [layer for _, layer in train(use_dora=True, **own).model.adapter_layers()] for kind, own in _KINDS.items()
    }
    counts = {
        kind: sum(layer.lora_magnitude_vector["default"].weight.size for layer in own) for kind, own in layers.items()
    }
    asked = {
        "column": sum(layer.base_layer.out_features for layer in layers["column"]), "scalar": len(layers["scalar"])
    }  # fmt: skip
    loss = {kind: _losses(**own) for kind, own in _KINDS.items()}
    by_scalar, by_column = f"{moved['scalar']:.0%}", f"{moved['column']:.0e}"
    columns, scalars = (f"{np.mean(own):.3f} ± {np.std(own):.3f}" for own in loss.values())
    return Evidence(
        f"The paper (eq. 2, 5) has one magnitude for each column, which is an output here: {counts['column']} in the "
        f"MLP against {counts['scalar']}. With a scalar an update at fixed m changes single outputs' lengths by up to "
        f"{by_scalar}, with columns by {by_column}. Loss after training at one rate, {len(SEEDS)} seeds: columns "
        f"{columns}, scalar {scalars}.",
        f"论文（式 2、5）中幅度是每列一个，这里的一列对应一个输出：MLP 里有 {counts['column']} 个，而不是 "
        f"{counts['scalar']} 个。用标量时，即使 m 固定，更新也会使单个输出的权重长度最多改变 {by_scalar}；"
        f"每列一个时只有 {by_column}。学习率相同，训练后的损失（{len(SEEDS)} 个种子）：每列一个 {columns}，"
        f"标量 {scalars}。",
        holds=moved["scalar"] < 1e-9,
        instead=moved["column"] < 1e-9 < moved["scalar"] and counts == asked,
        figures={"moved": moved, "magnitudes": counts, "loss": loss},
    )


_KINDS: dict[str, dict[str, str]] = {"column": {}, "scalar": {"dora_magnitude": "scalar"}}


def _losses(**options: Any) -> list[float]:
    """DoRA's loss over the last ten steps, by seed."""
    return [float(np.mean(train(seed=seed, use_dora=True, **options).losses[-10:])) for seed in SEEDS]


@claim("dora.update", "W' = m(V + BA)/‖V + BA‖: after the update the direction is still a unit vector.")
def update() -> Evidence:
    """Norms of the adapted rows against m along training; the cheap norm against the direct one."""
    run = train(use_dora=True)
    largest = max(run.norm_errors)
    cheap = []
    for _, layer in run.model.adapter_layers():
        (A, B), s = layer._factors("default"), layer.scaling["default"]
        direct = dora_magnitude((layer.weight.data + s * B @ A).astype("float64"))
        cheap.append(float(np.abs(dora_norm(layer.weight.data, A, B, s) / direct - 1).max()))
    return Evidence(
        f"In {len(run.norm_errors)} looks along {len(run.losses)} float32 steps every row of W' had length |m| within "
        f"{largest:.1e}. The norm without forming V + BA is the direct one within {max(cheap):.1e}.",
        f"float32 训练 {len(run.losses)} 步，途中检查 {len(run.norm_errors)} 次，W' 每一行的长度都是 |m|，"
        f"相对误差不超过 {largest:.1e}。不构造 V + BA 也能算出范数，与直接计算相差不超过 {max(cheap):.1e}。",
        holds=largest < 1e-5 and max(cheap) < 1e-5,
        figures={"norm_error": largest, "cheap_norm_error": max(cheap)},
    )


@claim("dora.trainable", "m and the low-rank A, B train; the direction's V is frozen.")
def trainable() -> Evidence:
    """Bytes of the base after training; which parameters trained and moved."""
    run = train(use_dora=True)
    names = {n for n, p in run.model.named_parameters() if p.requires_grad}
    kinds = sorted({n.split(".")[-3] for n in names})
    start = dict(
        get_peft_model(load_base("mlp"), LoraConfig(r=8, lora_alpha=16, use_dora=True), seed=0).named_parameters()
    )
    moved = sum((p.data != start[n].data).any() for n, p in run.model.named_parameters() if n in names)
    now = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in run.model.named_parameters()}
    same = sum(now[name].data.tobytes() == array.tobytes() for name, array in run.before.items())
    return Evidence(
        f"Trained: {', '.join(kinds)}; {moved} of {len(names)} arrays moved. {same} of {len(run.before)} pre-trained "
        f"arrays are unchanged to the bit, and {run.frozen_gradients} gradients of frozen weights ever existed.",
        f"参与训练的是 {'、'.join(kinds)}，{len(names)} 个数组中有 {moved} 个改变。"
        f"预训练的 {len(run.before)} 个数组中有 {same} 个逐位未变，冻结权重上出现过的梯度有 {run.frozen_gradients} "
        "个。",
        holds=same == len(run.before)
        and moved == len(names)
        and not run.frozen_gradients
        and kinds == ["lora_A", "lora_B", "lora_magnitude_vector"],
        figures={"unchanged": int(same), "arrays": len(run.before), "moved": int(moved)},
    )


@claim("dora.gradient", "The paper's gradients of m and V, and its cheaper form with the norm held constant.")
def gradient() -> Evidence:
    """Closed form against backward and central differences; what holding the norm constant saves and changes."""
    W, A, B = _example()
    rng = np.random.default_rng(1)
    V, G, m = W + B @ A, rng.standard_normal(W.shape), dora_magnitude(W)
    closed = {norm: dora_gradients(V, m, G, norm) for norm in ("graph", "constant")}
    dm, dV = closed["graph"]
    direction, h = rng.standard_normal(V.shape), 1e-6
    loss = lambda V, m: float(((m / dora_magnitude(V))[:, None] * V * G).sum())  # noqa: E731
    differences = [
        abs((loss(V + h * direction, m) - loss(V - h * direction, m)) / (2 * h) - (dV * direction).sum()),
        abs((loss(V, m + h) - loss(V, m - h)) / (2 * h) - dm.sum()),
    ]
    backward = max(_off_backward(W, A, B, m, G, norm, *own) for norm, own in closed.items())
    peaks = {norm: _peak(norm) for norm in ("constant", "graph")}
    finals = {"constant": _losses(), "graph": _losses(dora_norm="graph")}
    small, large = (f"{peak / 1e6:.1f}" for peak in peaks.values())
    constant, graph = (f"{np.mean(own):.3f} ± {np.std(own):.3f}" for own in finals.values())
    return Evidence(
        f"Closed form − backward, of both: at most {backward:.1e}; − central differences: {max(differences):.1e}. Of "
        f"simple operations a 512² layer peaks at {small} MB with the norm constant, {large} MB with it in the graph. "
        f"Loss after training at one rate, {len(SEEDS)} seeds: {constant} and {graph}.",
        f"两种形式的闭式梯度与反向传播最多相差 {backward:.1e}，与中心差分最多相差 {max(differences):.1e}。"
        f"用基本运算搭成的 512² 层，范数视为常数时内存峰值为 {small} MB，范数也进入计算图时为 {large} MB。"
        f"学习率相同，训练后的损失（{len(SEEDS)} 个种子）分别为 {constant} 和 {graph}。",
        holds=backward < 1e-9 and max(differences) < 1e-5 and peaks["constant"] < peaks["graph"],
        figures={"backward": backward, "differences": differences, "peak": peaks, "loss": finals},
    )


def _off_backward(
    W: np.ndarray, A: np.ndarray, B: np.ndarray, m: np.ndarray, G: np.ndarray, norm: str, dm: np.ndarray, dV: np.ndarray
) -> float:
    """How far the layer's gradients of A, B and m are from those that ∂L/∂m and ∂L/∂V make; G = ∂L/∂W'."""
    factors = [Tensor(f, requires_grad=True) for f in (A, B, m)]
    dora_linear(Tensor(np.eye(W.shape[1])), Tensor(W), None, *factors, 1.0, norm).backward(G.T)
    pairs = zip(factors, (B.T @ dV, dV @ A.T, dm), strict=True)
    return max(float(np.abs(t.grad - expected).max()) for t, expected in pairs)


def _peak(norm: str) -> int:
    rng = np.random.default_rng(0)
    x, W, A, B = (Tensor(rng.standard_normal(s).astype("float32")) for s in ((64, 512), (512, 512), (8, 512), (512, 8)))
    trained = [Tensor(t.data, requires_grad=True) for t in (A, B, Tensor(dora_magnitude(W.data)))]
    with peak_memory() as peak:
        dora_composed(x, W, None, *trained, 1.0, norm).sum().backward()
    return int(peak.bytes)


@claim("dora.decoupled", "Magnitude and direction are decoupled.")
def decoupled() -> Evidence:
    """The correlation of ΔM and ΔD over layers, after full fine-tuning, LoRA and DoRA (Liu et al. 2024, figure 2)."""
    by_seed = [_moves(seed) for seed in range(2)]
    correlation = {
        name: [float(np.corrcoef(np.array(moves[name]).T)[0, 1]) for moves in by_seed] for name in by_seed[0]
    }
    shown = ", ".join(f"{name} {' and '.join(f'{c:+.2f}' for c in own)}" for name, own in correlation.items())
    shown_zh = chinese_marks(shown.replace("full", "全参数微调").replace(" and ", "、"))
    return Evidence(
        f"Correlation of ΔM and ΔD over the ViT's {len(by_seed[0]['DoRA'])} projections after 50 steps, by seed: "
        f"{shown}. The paper finds it negative for full fine-tuning and DoRA, positive for LoRA (VL-BART's query "
        "weights).",
        f"训练 50 步后，ViT 的 {len(by_seed[0]['DoRA'])} 个投影矩阵的 ΔM 与 ΔD 的相关系数，逐个种子列出：{shown_zh}。"
        "论文在 VL-BART 的 query 权重上得到：全参数微调和 DoRA 为负，LoRA 为正。",
        figures={
            "correlation": {name: own[0] for name, own in correlation.items()},
            "moves": by_seed[0],
            "by_seed": correlation,
        },
    )


def _moves(seed: int, steps: int = 50) -> dict[str, list[tuple[float, float]]]:
    """(ΔM, ΔD) of the ViT's projections after as many steps of each."""
    dora = train(use_dora=True, base="vit", seed=seed, steps=steps).model
    updates = {
        "full": weight_updates(adapt("full", seed=seed, steps=steps)).values(),
        "LoRA": weight_updates(adapt("lora", seed=seed, steps=steps)).values(),
        "DoRA": [(layer.weight.data, layer.delta("default")) for _, layer in dora.adapter_layers()],
    }
    return {name: [weight_decomposition(W, W + delta) for W, delta in own] for name, own in updates.items()}


RATES = (1e-2, 2e-2, 5e-2)


def _best(r: int, use_dora: bool) -> tuple[float, list[DoraRun]]:
    """The rate of `RATES` with the best mean accuracy on the validation digits, and its runs over seeds."""
    options = {"use_dora": True} if use_dora else {}
    runs = {lr: [train(r, seed, lr=lr, **options) for seed in SEEDS] for lr in RATES}
    lr = max(RATES, key=lambda lr: np.mean([run.valid for run in runs[lr]]))
    return lr, runs[lr]


@claim("dora.better", "DoRA learns better than LoRA.")
def better() -> Evidence:
    """Accuracy and loss by rank over seeds, each at its own learning rate."""
    found: dict[str, dict[str, Any]] = {}
    for r in (2, 8):
        for name, use_dora in (("LoRA", False), ("DoRA", True)):
            lr, runs = _best(r, use_dora)
            found[f"{name} r={r}"] = {
                "lr": lr,
                "accuracy": [run.accuracy for run in runs],
                "loss": [float(np.mean(run.losses[-10:])) for run in runs],
            }
    shown = ", ".join(
        f"{k} {np.mean(v['accuracy']):.1%} ± {np.std(v['accuracy']):.1%} (lr {v['lr']:g})" for k, v in found.items()
    )
    *rates, last = [f"{lr:g}" for lr in RATES]
    return Evidence(
        f"MLP on rotated digits, 100 steps, {len(SEEDS)} seeds, lr {', '.join(rates)} or {last}, chosen for each on "
        f"validation digits; test accuracy ± deviation: {shown}.",
        f"MLP，旋转的手写数字，100 步，{len(SEEDS)} 个种子，lr 为 {'、'.join(rates)} 或 {last}，各自在验证集上选取；"
        f"测试准确率 ± 标准差：{chinese_marks(shown)}。",
        figures=found,
    )


@claim("dora.merge", "The weight is merged before use: no latency is left.")
def merge() -> Evidence:
    """Outputs and numbers of products of the merged model against the unmerged and the base."""
    x = data.digits.transfer().test.x
    run = train(use_dora=True)
    outputs, products = {}, {}
    for state, change in (("apart", None), ("merged", run.model.merge_adapter), ("again", run.model.unmerge_adapter)):
        if change is not None:
            change()
        with count_flops() as flops:
            outputs[state] = run.model(x).data
        products[state] = flops.forward
    with count_flops() as flops:
        load_base("mlp").eval()(x)
    alone = products["merged"] == flops.forward < products["apart"]
    difference = float(np.abs(outputs["merged"] - outputs["apart"]).max() / np.abs(outputs["apart"]).max())
    back = bool((outputs["again"] == outputs["apart"]).all())
    extra = f"{products['apart'] / flops.forward:.2f}"
    return Evidence(
        f"Merged and unmerged float32 logits differ by up to {difference:.1e} of the largest. Merged, the model counts "
        f"{'exactly the' if alone else 'other'} products of its base; unmerged, {extra} times those. Unmerged again "
        f"the logits are {'the same bits: W is kept' if back else 'changed'}.",
        f"合并与不合并的 float32 logits 最多相差最大值的 {difference:.1e}。合并后，模型的乘法次数"
        f"{'与原模型完全相同' if alone else '仍多于原模型'}；不合并时是原模型的 {extra} 倍。取消合并后，"
        f"logits 与合并前{'逐位相同：W 一直留着' if back else '有所不同'}。",
        holds=difference == 0 and back and alone,
        within=difference < 1e-5 and back and alone,
        figures={"difference": difference, "returned": back, "products": {**products, "base": flops.forward}},
    )
