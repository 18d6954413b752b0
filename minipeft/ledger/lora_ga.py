"""The claims of the document's LoRA-GA section, and what the paper of that name says."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import data, nn, ops, optim
from ..measure import memory_report
from ..methods import lora_ga
from ..methods.lora import LoraConfig, init_lora
from ..methods.lora_ga import DIRECTIONS, SCALES, LoraGAConfig
from ..models import load_base
from ..models.pretrain import accuracy
from ..nn import Module
from ..peft import get_peft_model
from ..quant.model import quantize_model
from ..targets import find_targets
from ..tensor import Tensor
from ..train import Progress, classification_loss, fit
from . import Evidence, chinese_marks, claim

R, S = 8, 2.0  # what `minipeft train` has when nothing is said
BATCHES = 8  # of 64 digits, for a full gradient


def _config(chosen: LoraGAConfig | None = None, init: str | bool = True, r: int = R) -> LoraConfig:
    init = init if chosen is None else "lora_ga"
    return LoraConfig(r=r, lora_alpha=S * r, init_lora_weights=init, lora_ga_config=chosen)


def _base(name: str, dtype: str = "float64") -> Module:
    return load_base(name).to(dtype)


def _batches(size: int = 64, dtype: str = "float64", seed: int = 0) -> data.digits.Batches:
    return data.digits.batches(*data.digits.transfer(dtype=dtype).train, batch_size=size, seed=seed)


def _trained(model: Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def gradients(base: str = "vit") -> dict[str, np.ndarray]:
    """∂L/∂W of every layer that adapters go to, over the first batches of the rotated digits; all at once, as a check
    may."""
    model, stream = _base(base), _batches()
    walk = lora_ga.weight_gradients(
        model, find_targets(model, "all-linear"), [stream[i] for i in range(BATCHES)], classification_loss, 2**40
    )
    return dict(walk)


# --- the name ---------------------------------------------------------------------------------------------------------


def _overlaps(model: Module) -> list[tuple[float, float]]:
    """The share of A's squared length in G's first r right singular vectors, and of B's in the next r left ones."""
    shares = []
    for name, layer in model.adapter_layers():
        G, (A, B) = gradients("mlp")[name], layer._factors("default")
        left, right = (np.linalg.eigh(M)[1][:, ::-1] for M in (G @ G.T, G.T @ G))
        share = lambda rows, basis: float((np.linalg.norm(rows @ basis) / (np.linalg.norm(rows) or 1.0)) ** 2)  # noqa: E731
        shares.append((share(A, right[:, :R]), share(B.T, left[:, R : 2 * R])))
    return shares


@claim("loraga.name", "LoRA-GA is LoRA with gradient accumulation.")
def name() -> Evidence:
    """Where the factors start: LoRA's with accumulated gradients, and the paper's, against G's singular vectors."""
    start: dict[str, Any] = {}
    accumulated = get_peft_model(_base("mlp"), _config(init="gaussian"))
    before = [layer._factors("default") for _, layer in accumulated.adapter_layers()]
    fit(
        accumulated, _batches(16), steps=1, grad_accumulation=4, optimizer=optim.SGD(_trained(accumulated), lr=0.0),
        progress=False,
    )  # fmt: skip
    kept = all(
        np.array_equal(a, b)
        for pair, (_, layer) in zip(before, accumulated.adapter_layers(), strict=True)
        for a, b in zip(pair, layer._factors("default"), strict=True)
    )
    start["LoRA, accumulating"] = _overlaps(accumulated)
    chosen = LoraGAConfig(scale="paper", gradient_batches=BATCHES)
    start["LoRA-GA"] = _overlaps(get_peft_model(_base("mlp"), _config(chosen), _batches(), classification_loss))
    in_vectors = {name: min(min(pair) for pair in pairs) for name, pairs in start.items()}
    of_both, of_a = f"{in_vectors['LoRA-GA']:.4f}", f"{max(a for a, _ in start['LoRA, accumulating']):.2f}"
    return Evidence(
        "GA is gradient approximation (Wang et al. 2024): A and B start in the singular vectors of the first full "
        f"gradient, with at least {of_both} of their squared length in the r vectors that the paper names. "
        f"Accumulation {'leaves LoRA at its start' if kept else 'moves the start'}, with {of_a} of A's there at most, "
        "and B = 0.",
        "GA 指的是梯度近似（Wang 等，2024）：A、B 从第一步全量梯度的奇异向量出发，"
        f"其长度的平方至少有 {of_both} 落在论文所说的 r 个向量上。"
        f"梯度累积{'不改变 LoRA 的初始值' if kept else '会改变初始值'}，其中 A 最多有 {of_a} 落在这些向量上，"
        "而 B = 0。",
        holds=in_vectors["LoRA, accumulating"] > 0.999,
        instead=in_vectors["LoRA-GA"] > 0.999 and kept,
        figures={"overlap": start},
    )


# --- what the document describes: accumulation ------------------------------------------------------------------------


def _accumulated(micro: int, n: int, dtype: str, sizes: tuple[int, ...] = ()) -> list[np.ndarray]:
    """The gradients of A and B that a step of n micro-batches of `micro` (or of these sizes) sees, one batch of them
    all."""
    model = get_peft_model(_base("mlp", dtype), _config(init="both"))
    x, y = _batches(micro * n, dtype)[0]
    ends = np.cumsum(sizes or (micro,) * n)
    pieces = [(x[a:b], y[a:b]) for a, b in itertools.pairwise([0, *ends])]
    fit(
        model, pieces, steps=1, grad_accumulation=len(pieces), optimizer=optim.SGD(_trained(model), lr=0.0),
        progress=False,
    )  # fmt: skip
    return [p.grad for p in _trained(model)]


def _difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, expected, strict=True))


@claim("loraga.accumulation", "Accumulating the gradients of several small batches is as good as one large batch.")
def accumulation() -> Evidence:
    """Gradients of A and B after 2, 4, 8 and 16 micro-batches, against one batch of the same 64 digits."""
    found = {
        dtype: {n: _difference(_accumulated(64 // n, n, dtype), _accumulated(64, 1, dtype)) for n in (2, 4, 8, 16)}
        for dtype in ("float64", "float32")
    }
    unequal = _difference(_accumulated(64, 1, "float64", (48, 16)), _accumulated(64, 1, "float64"))
    worst = {dtype: max(by_n.values()) for dtype, by_n in found.items()}
    return Evidence(
        f"2 to 16 micro-batches give the gradients of one batch of 64 within {worst['float64']:.0e} of the largest "
        f"(float64) and {worst['float32']:.0e} (float32). They must be of one size: with 48 and 16 digits the mean of "
        f"the two means is off by {unequal:.0%}.",
        f"用 2 到 16 个微批次累积，与 64 个数字的一个批次相比，梯度相差不超过最大值的 {worst['float64']:.0e}（"
        f"float64）和 {worst['float32']:.0e}（float32）。微批次的大小必须相同：若是 48 个和 16 个数字，"
        f"两个平均值再取平均会偏差 {unequal:.0%}。",
        holds=worst["float64"] < 1e-12 and worst["float32"] < 1e-4,
        figures={"difference": {dtype: list(by_n.items()) for dtype, by_n in found.items()}, "unequal": unequal},
    )


def _loss(model: Module, batch: Any) -> Tensor:
    return classification_loss(model, batch)


def _activations(micro: int, n: int) -> int:
    """The most bytes that are kept for backward at any micro-batch of a step of n."""
    model, seen = get_peft_model(_base("vit", "float32"), _config()), []

    def loss_fn(model: Module, batch: Any) -> Tensor:
        loss = _loss(model, batch)
        seen.append(memory_report(model).activations)
        return loss

    fit(
        model, _batches(micro, "float32"), steps=1, grad_accumulation=n, loss_fn=loss_fn,
        optimizer=optim.SGD(_trained(model), lr=0.0), progress=False,
    )  # fmt: skip
    return max(seen)


@claim("loraga.accumulation-memory", "Gradient accumulation has to store intermediate activations: more memory.")
def accumulation_memory() -> Evidence:
    """Bytes kept for backward, at the worst micro-batch, as their number grows; and for one batch of them all."""
    numbers, micro = (1, 2, 4, 8), 8
    accumulating = {n: _activations(micro, n) for n in numbers}
    whole = {n: _activations(micro * n, 1) for n in numbers}
    same = len(set(accumulating.values())) == 1
    one, many, at_once = (f"{size / 1e6:.2f}" for size in (accumulating[1], accumulating[8], whole[8]))
    return Evidence(
        f"{one} MB with one micro-batch of {micro}, {many} MB with {numbers[-1]} accumulated "
        f"({'the same' if same else 'not the same'} at every number): each one's are freed by its backward. One batch "
        f"of {micro * numbers[-1]} keeps {at_once} MB: accumulation saves activations.",
        f"一个大小为 {micro} 的微批次占 {one} MB，累积 {numbers[-1]} 个占 {many} MB（个数不同时"
        f"{'都一样' if same else '并不一样'}）：每个微批次的激活值在其反向传播后即释放。"
        f"大小为 {micro * numbers[-1]} 的一个批次要占 {at_once} MB：累积反而节省激活值。",
        holds=max(accumulating.values()) > accumulating[1],
        instead=same and all(whole[n] > 0.9 * n * whole[1] for n in numbers),
        figures={"accumulating": list(accumulating.items()), "one batch": list(whole.items())},
    )


def _parts(kind: str, width: int, depth: int) -> dict[str, int]:
    """Bytes by part of a stack of Linears (width, width) after a step that accumulated four micro-batches."""
    model: Module = nn.Sequential(*(nn.Linear(width, width, bias=False, rng=i) for i in range(depth)))
    if kind == "4-bit LoRA":
        quantize_model(model, "nf4")
    if kind == "full":
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, _config())
    activations, parts = [], {}

    def loss_fn(model: Module, x: np.ndarray) -> Tensor:
        loss = ops.mse_loss(model(x), Tensor(x))
        activations.append(memory_report(model).activations)
        return loss

    def read(progress: Progress) -> None:
        report = memory_report(progress.model)
        parts.update(gradients=report.gradients, weights=report.weights, activations=max(activations))

    batches = [np.random.default_rng(i).standard_normal((16, width)).astype("float32") for i in range(4)]
    fit(
        model, batches, steps=1, grad_accumulation=4, loss_fn=loss_fn, optimizer=optim.SGD(_trained(model), lr=0.0),
        callbacks=[read], progress=False,
    )  # fmt: skip
    return parts


def _accumulator_bytes(d: int, k: int, r: int) -> int:
    return 4 * r * (d + k)


@claim("loraga.accumulate-adapters", "Gradients are accumulated on B and A only; 4-bit weights save more memory.")
def accumulate_adapters() -> Evidence:
    """Bytes of gradients read off the arrays against r(d + k) and dk, and of weights that are codes."""
    width, depth = 256, 4
    parts = {kind: _parts(kind, width, depth) for kind in ("full", "LoRA", "4-bit LoRA")}
    wanted = {
        "full": 4 * width**2 * depth,
        "LoRA": _accumulator_bytes(width, width, R) * depth,
        "4-bit LoRA": _accumulator_bytes(width, width, R) * depth,
    }
    exact = all(parts[kind]["gradients"] == wanted[kind] for kind in parts)
    weights = {kind: parts[kind]["weights"] for kind in parts}
    shown = ", ".join(f"{kind} {p['gradients'] / 1e3:.0f} + {p['weights'] / 1e3:.0f}" for kind, p in parts.items())
    shown_zh = chinese_marks(shown.replace("full", "全参数").replace("4-bit", "4 比特"))
    times = f"{wanted['full'] / wanted['LoRA']:.0f}"
    of_lora, of_full = (f"{parts[kind]['activations'] / 1e3:.0f}" for kind in ("LoRA", "full"))
    spared = parts["LoRA"]["activations"] < parts["full"]["activations"]
    return Evidence(
        f"Four {width}² layers, r = {R}, kB of accumulated gradients + weights: {shown}. The accumulators are "
        f"{'exactly' if exact else 'not'} 4 bytes × r(d + k) and dk, {times} times less. It "
        f"{'spares' if spared else 'does not spare the model'} activations, which the document adds: {of_lora} kB with "
        f"LoRA, {of_full} kB in full.",
        f"四个 {width}² 的层，r = {R}，累积的梯度 + 权重，单位 kB：{shown_zh}。"
        f"累积的梯度{'恰好' if exact else '并不'}是 4 字节 × r(d + k) 与 dk，后者是前者的 {times} 倍。"
        f"文档还说可以避免存储激活值，{'确实如此' if spared else '其实不然'}："
        f"LoRA 为 {of_lora} kB，全参数训练为 {of_full} kB。",
        holds=exact and wanted["LoRA"] < wanted["full"] and weights["4-bit LoRA"] < 0.4 * weights["LoRA"],
        figures={"bytes": parts},
    )


# --- what the paper claims --------------------------------------------------------------------------------------------


def _real_first_step(r: int) -> list[float]:
    """The cosine between −G and what one step of gradient descent does to W + s·BA, layer by layer of the ViT."""
    config = _config(LoraGAConfig(scale="paper", gradient_batches=BATCHES), r=r)
    model = get_peft_model(_base("vit"), config, _batches(), classification_loss).eval()
    before = {name: layer.delta("default") for name, layer in model.adapter_layers()}
    sgd = optim.SGD(_trained(model), lr=1e-6)
    fit(model, _batches(), steps=1, grad_accumulation=BATCHES, optimizer=sgd, progress=False)
    moved = {name: layer.delta("default") - before[name] for name, layer in model.adapter_layers()}
    return [
        float(-(moved[name] * G).sum() / (np.linalg.norm(moved[name]) * np.linalg.norm(G)))
        for name, G in gradients().items()
    ]


def _bound(G: np.ndarray, r: int) -> float:
    """By eigenvalues, another way than the start's singular values."""
    energies = np.linalg.eigvalsh(G @ G.T)[::-1]
    return float((energies[: 2 * r].sum() / energies.sum()) ** 0.5)


@claim("loraga.alignment", "(paper) With LoRA-GA's start the first update points along the full gradient.")
def alignment(r: int = 2) -> Evidence:
    """Cosines by layer and rank: the paper's start, PEFT's, Gaussian A with B = 0, the bound for rank 2r, real
    steps."""
    starts: dict[str, Callable[[np.ndarray, int], tuple]] = {
        "paper": lambda G, r: lora_ga.lora_ga_init(G, r, scaling=S, scale="paper"),
        "PEFT": lambda G, r: lora_ga.lora_ga_init(G, r, scaling=S, scale="stable"),
        "Gaussian": lambda G, r: init_lora(*G.shape, r, "gaussian", 0, "float64"),
    }
    all_G, ranks = gradients().values(), (1, 2, 4, 8)
    cosines = {
        name: {n: [lora_ga.gradient_alignment(G, *make(G, n), S) for G in all_G] for n in ranks}
        for name, make in starts.items()
    }
    cosines["bound"] = {n: [_bound(G, n) for G in all_G] for n in ranks}
    real, bound = _real_first_step(r), cosines["bound"][r]
    short = max(abs(b - c) for b, c in zip(bound, real, strict=True))
    formula = max(abs(a - b) for a, b in zip(cosines["paper"][r], real, strict=True))
    ordered = all(
        g < c <= b + 1e-9
        for n in ranks
        for g, c, b in zip(*(cosines[name][n] for name in ("Gaussian", "paper", "bound")), strict=True)
    )
    paper, peft, gaussian, most = (f"{np.mean(by_rank[r]):.3f}" for by_rank in cosines.values())
    return Evidence(
        f"Cosine of the first update with the gradient, mean over {len(real)} layers of the ViT, r = {r}: {paper} from "
        f"the paper's start, {gaussian} from a Gaussian A and B = 0; an update of rank 2r has at most {most}. A real "
        f"step of gradient descent is within {short:.0e} of that in every layer. PEFT's start keeps the singular "
        f"values in B: {peft}.",
        f"第一步更新与梯度的夹角余弦，ViT 的 {len(real)} 层平均，r = {r}：论文的初始化为 {paper}，高斯 A、"
        f"B = 0 为 {gaussian}；秩 2r 的更新最多为 {most}。真实的一步梯度下降，"
        f"在每一层与这个上界相差不超过 {short:.0e}。PEFT 的初始化把奇异值留在 B 中：{peft}。",
        holds=short < 1e-4 and formula < 1e-4 and ordered,
        figures={
            "layers": list(gradients()),
            "rank": r,
            "cosine": {name: {str(n): values for n, values in by_rank.items()} for name, by_rank in cosines.items()},
            "real": real,
        },
    )


def _change(model: Module, x: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(model.eval()(x).data - expected).max() / abs(expected).max())


@claim("loraga.start", "(paper) Outputs are unchanged at the start, since s·BA is subtracted from W.")
def start() -> Evidence:
    """The MLP's logits before and after attaching, for every direction and scale; and without the subtraction."""
    changes: dict[str, dict[str, float]] = {"float64": {}, "float32": {}, "not subtracted": {}}
    for dtype in ("float64", "float32"):
        x = data.digits.transfer(dtype=dtype).test.x
        expected, stream = _base("mlp", dtype).eval()(x).data, _batches(64, dtype)
        for direction, scale in itertools.product(DIRECTIONS, SCALES):
            chosen = LoraGAConfig(direction, scale, gradient_batches=1)
            model = get_peft_model(_base("mlp", dtype), _config(chosen), stream, classification_loss)
            changes[dtype][f"{direction}, {scale}"] = _change(model, x, expected)
            if dtype == "float64":
                for _, layer in model.adapter_layers():
                    layer.weight.data = layer.weight.data + layer.delta("default")
                changes["not subtracted"][f"{direction}, {scale}"] = _change(model, x, expected)
    largest = {kind: max(by_start.values()) for kind, by_start in changes.items()}
    least = min(changes["not subtracted"].values())
    double, single, most = (f"{change:.0e}" for change in largest.values())
    return Evidence(
        f"Over {len(DIRECTIONS)} directions × {len(SCALES)} scales the logits change by at most {double} of the "
        f"largest in float64, {single} in float32: rounding. Without the subtraction by {least:.0e} to {most}.",
        f"{len(DIRECTIONS)} 种方向 × {len(SCALES)} 种缩放下，logits 最多改变最大值的 {double}（float64）和 {single}（"
        f"float32），只是舍入误差。若不减去 s·BA，则改变 {least:.0e} 到 {most}。",
        holds=largest["float64"] < 1e-11 and largest["float32"] < 1e-3 and least > 1e-4,
        figures=changes,
    )


STARTS: dict[str, LoraConfig] = {
    "Gaussian": _config(init="gaussian"),
    "LoRA-GA": _config(LoraGAConfig(scale="paper")),
    "LoRA-GA, PEFT's scale": _config(LoraGAConfig()),
}
NAMES_ZH = {"Gaussian": "高斯", "LoRA-GA": "LoRA-GA", "LoRA-GA, PEFT's scale": "LoRA-GA 用 PEFT 的缩放"}
RATES, STEPS, TARGET = (5e-3, 2e-2), 100, 1.0


@functools.cache
def _training(name: str, lr: float, seed: int) -> tuple[list[float], float]:
    """Losses of AdamW on the MLP and the rotated digits, and the accuracy on the test digits."""
    task, batches = data.digits.transfer(), _batches(64, "float32", seed)
    model = get_peft_model(_base("mlp", "float32"), STARTS[name], batches, classification_loss, seed=seed)
    history = fit(model, batches, steps=STEPS, optimizer=optim.AdamW(_trained(model), lr=lr), progress=False)
    return history.loss, accuracy(model.eval(), *task.test)


def _steps_to_target(losses: list[float]) -> int:
    """The first step at which the mean of five losses is below the target; one more than all where none is."""
    means = np.convolve(losses, np.ones(5) / 5, "valid")
    reached = np.flatnonzero(means < TARGET)
    return int(reached[0]) + 5 if len(reached) else len(losses) + 1


@claim("loraga.convergence", "(paper) LoRA-GA converges faster than LoRA's Gaussian start.")
def convergence() -> Evidence:
    """Steps to a loss over seeds, at two learning rates; accuracy after all of them."""
    runs = {(name, lr): [_training(name, lr, seed) for seed in range(3)] for name in STARTS for lr in RATES}
    steps = {key: [_steps_to_target(losses) for losses, _ in pairs] for key, pairs in runs.items()}
    test = {key: [reached for _, reached in pairs] for key, pairs in runs.items()}
    taken = {
        name: ", ".join(f"{np.mean(steps[name, lr]):.0f} ± {np.std(steps[name, lr]):.0f} (lr {lr:g})" for lr in RATES)
        for name in STARTS
    }
    shown = "; ".join(f"{name} {found}" for name, found in taken.items())
    shown_zh = "；".join(f"{NAMES_ZH[name]} {chinese_marks(found)}" for name, found in taken.items())
    reached = {name: f"{np.mean(test[name, RATES[-1]]):.1%}" for name in STARTS}
    last = ", ".join(f"{name} {share}" for name, share in reached.items())
    last_zh = "，".join(f"{NAMES_ZH[name]} {share}" for name, share in reached.items())
    return Evidence(
        f"MLP on rotated digits, AdamW, 3 seeds, steps to a loss of {TARGET:g} (of {STEPS}; {STEPS + 1} is never): "
        f"{shown}. Test accuracy after {STEPS} at lr {RATES[-1]:g}: {last}.",
        f"MLP，旋转的手写数字，AdamW，3 个种子，损失降到 {TARGET:g} 所需的步数（共 {STEPS} 步，"
        f"{STEPS + 1} 表示未达到）：{shown_zh}。训练 {STEPS} 步后的测试准确率（lr {RATES[-1]:g}）：{last_zh}。",
        figures={
            f"{name}, lr {lr:g}": {
                "steps": steps[name, lr],
                "accuracy": test[name, lr],
                "losses": [losses for losses, _ in runs[name, lr]],
            }
            for name, lr in runs
        },
    )
