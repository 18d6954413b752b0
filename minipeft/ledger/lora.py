"""The claims of the document's LoRA section, with its introduction to rank and SVD."""

from __future__ import annotations

import copy
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import data, files, nn, ops, optim, rank
from ..backend import count_flops
from ..measure import compare_latency, estimate_memory, memory_report, peak_memory
from ..methods.lora import LoraConfig, LoraLinear, init_lora, lora_delta, merge_lora, unmerge_lora
from ..models import load_base
from ..peft import get_peft_model
from ..tensor import Tensor, no_grad
from . import Evidence, chinese_marks, claim
from .runs import adapt, weight_updates

# --- the idea ---------------------------------------------------------------------------------------------------------


@claim("lora.low-rank", "The update is the product of two small matrices, ΔW = BA.")
def low_rank() -> Evidence:
    """The rank of s·BA against r over many shapes and in trained layers; r(d+k) against dk."""
    rng = np.random.default_rng(0)
    shapes = [(int(rng.integers(1, 200)), int(rng.integers(1, 200))) for _ in range(60)]
    tried = [(d, k, int(rng.integers(1, min(d, k) + 1))) for d, k in shapes]
    exact = sum(_product_rank(d, k, r, rng) == r for d, k, r in tried)
    learned = [rank.matrix_rank(delta) for _, delta in weight_updates(adapt("lora")).values()]
    d = k = 4096
    share = 8 * (d + k) / (d * k)
    return Evidence(
        f"rank(BA) = r in {exact} of {len(tried)} random shapes, and at most {max(learned)} in {len(learned)} layers "
        f"trained with r = 8. r(d+k) numbers instead of dk: {share:.2%} of a {d}×{k} weight at r = 8.",
        f"随机抽取的 {len(tried)} 种形状中有 {exact} 种满足 rank(BA) = r；用 r = 8 训练过的 {len(learned)} 层，"
        f"ΔW 的秩最高为 {max(learned)}。参数从 dk 个减到 r(d+k) 个：r = 8 时只有 {d}×{k} 权重的 {share:.2%}。",
        holds=exact == len(tried) and 0 < min(learned) <= max(learned) <= 8 and share < 1,
        figures={"shapes": len(tried), "trained_ranks": learned, "share_4096_r8": share},
    )


def _product_rank(d: int, k: int, r: int, rng: np.random.Generator) -> int:
    A, B = init_lora(d, k, r, "both", rng, "float64")
    return rank.matrix_rank(lora_delta(A, B, 2.0))


@claim("lora.frozen", "The pre-trained weights are frozen and stay as they are.")
def frozen() -> Evidence:
    """The bytes of every frozen array before and after training that moved the adapters; gradients of frozen parameters
    at any step."""
    run = adapt("lora")
    now = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in run.model.named_parameters()}
    same = [now[name].data.tobytes() == array.tobytes() for name, array in run.before.items()]
    steps, size = len(run.history.loss), sum(array.nbytes for array in run.before.values())
    learned = [bool(layer.delta("default").any()) for _, layer in run.model.adapter_layers()]
    return Evidence(
        f"After {steps} steps that gave {sum(learned)} of {len(learned)} layers a ΔW, {sum(same)} of {len(same)} "
        f"pre-trained arrays ({size:,} bytes in all) are unchanged to the bit. Gradients of frozen weights that ever "
        f"existed: {run.frozen_gradients}.",
        f"训练 {steps} 步后，{len(learned)} 层中有 {sum(learned)} 层学到了 ΔW，而预训练的 {len(same)} 个数组（共 "
        f"{size:,} 字节）中有 {sum(same)} 个逐位未变。冻结权重上出现过的梯度：{run.frozen_gradients} 个。",
        holds=all(same) and all(learned) and run.frozen_gradients == 0,
        figures={"arrays": len(same), "unchanged": sum(same), "frozen_gradients": run.frozen_gradients},
    )


# --- initialization ---------------------------------------------------------------------------------------------------


@claim("lora.identity-at-init", "Gaussian A and zero B: training starts from the pre-trained model.")
def identity_at_init() -> Evidence:
    """Outputs before and after attaching, to the bit, for B = 0 and for A = 0; and once neither is zero."""
    found = {(init, dtype): _start(init, dtype) for init in ("gaussian", "kaiming", "gaussian_b") for dtype in _DTYPES}
    same, count = {case: start.same for case, start in found.items()}, len(data.digits.transfer().test.y)
    least = min(start.with_both for start in found.values())
    return Evidence(
        f"Logits of {count} images equal to the bit in {sum(same.values())} of {len(same)} cases (B = 0 with Gaussian "
        "or uniform A, A = 0 with Gaussian B; float32 and float64). With numbers in place of the zeros they change by "
        f"at least {least:.1f} of the largest: the adapters are attached.",
        f"{count} 张图像的 logits，{len(same)} 种情形中有 {sum(same.values())} 种逐位相同（B = 0，A 取高斯或均匀分布；"
        f"A = 0，B 取高斯分布；float32 与 float64）。把全零的因子换成非零常数，logits 至少改变最大值的 "
        f"{least:.1f}：适配器确实接上了。",
        holds=all(same.values()) and least > 0,
        figures={f"{init} {dtype}": equal for (init, dtype), equal in same.items()},
    )


_DTYPES = ("float32", "float64")


class Start(NamedTuple):
    """Logits of a model just attached against its base's: equal to the bit; largest difference ÷ largest logit; the
    same once a factor that was zero is all ones."""

    same: bool
    difference: float
    with_both: float


def _start(init: str, dtype: str) -> Start:
    x, model = data.digits.transfer(dtype=dtype).test.x, load_base("vit", dtype=dtype)
    with no_grad():
        before = model(x).data
        model = get_peft_model(model, LoraConfig(init_lora_weights=init), seed=1)
        after = model(x).data
        for p in model.parameters():
            if p.requires_grad and not p.data.any():
                p.data = np.ones_like(p.data)
        with_both = model(x).data
    apart = [float(np.abs(logits - before).max() / np.abs(before).max()) for logits in (after, with_both)]
    return Start(before.tobytes() == after.tobytes(), *apart)


@claim("lora.one-zero", "At least one of A and B must be zero, so that the first output is the base model's.")
def one_zero() -> Evidence:
    """Output, gradients and learning with B, A, both or neither at zero."""
    start = {zero: _first_steps(zero) for zero in ("B", "A", "both", "neither")}
    b, a, both, neither = (start[zero] for zero in ("B", "A", "both", "neither"))
    keeps = b["output_change"] == a["output_change"] == both["output_change"] == 0 < neither["output_change"]
    first = b["moved_A"] == 0 < b["moved_B"] and a["moved_B"] == 0 < a["moved_A"]
    down, up = both["around"]
    stuck = both["gradient"] == 0 and both["loss"][0] == both["loss"][-1] and down < both["loss"][0] < up
    learns = b["loss"][-1] < b["loss"][0] and a["loss"][-1] < a["loss"][0]
    below, above = f"{down:.3f}", f"{up:.3f}"
    change, gradient = f"{neither['output_change']:.2f}", f"{both['gradient']:.0f}"
    stays, falls = f"{both['loss'][-1]:.3f}", f"{b['loss'][-1]:.3f}"
    return Evidence(
        f"With one of them zero the output is the base's to the bit; with none it differs by up to {change}. But not "
        f"with both: their gradients are {gradient} and the loss stays {stays} for ever, on a saddle ({below} and "
        f"{above} beside it), where B = 0 falls to {falls}. With B = 0 the first step moves B alone.",
        f"其中一个为零时，输出与原模型逐位相同；两个都不为零时，最多相差 {change}。但两个也不能同为零："
        f"那样梯度为 {gradient}，"
        f"损失始终停在鞍点 {stays}（旁边有 {below}，也有 {above}），"
        f"而 B = 0 时能降到 {falls}。B = 0 时，第一步只更新 B。",
        holds=keeps and learns and not stuck,
        within=keeps and first and stuck and learns,
        figures=start,
    )


def _first_steps(zero: str, steps: int = 20) -> dict[str, Any]:
    """Gradient descent on a regression by one LoRA layer that starts with A, B, both or neither at zero."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 16)), rng.standard_normal((64, 12))
    layer = LoraLinear(nn.Linear(16, 12, bias=False, dtype="float64", rng=0))
    layer.base_layer.requires_grad_(False)
    A, B = init_lora(12, 16, 4, "both", rng, "float64")
    A, B = A * (zero not in ("A", "both")), B * (zero not in ("B", "both"))
    layer.add("default", A, B, 1.0, nn.Dropout(0.0), offset=False)
    layer.active = ["default"]
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with no_grad():
        base = layer.base_layer(Tensor(x)).data
        change = float(np.abs(layer(x).data - base).max())
    # beside A = B = 0: a short way along the steepest ΔW of rank 1, and as far the other way
    U, _, Vt = np.linalg.svd((y - base).T @ x)
    around = [float(((base + 0.1 * sign * np.outer(x @ Vt[0], U[:, 0]) - y) ** 2).mean()) for sign in (1, -1)]
    optimizer, losses, start = optim.SGD(factors, lr=0.5), [], [f.data.copy() for f in factors]
    for step in range(steps):
        optimizer.zero_grad()
        loss = ops.mse_loss(layer(x), y)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradient = float(max(np.abs(f.grad).max() for f in factors))
        optimizer.step()
        if step == 0:
            moved = [float(np.abs(f.data - s).max()) for f, s in zip(factors, start, strict=True)]
    return {
        "output_change": change,
        "gradient": gradient,
        "moved_A": moved[0],
        "moved_B": moved[1],
        "loss": losses,
        "around": around,
    }


@claim("lora.two-nonzero", "Two non-zero matrices work too, if their product is first subtracted from W (Su Jianlin).")
def two_nonzero() -> Evidence:
    """Outputs at the start with both Gaussian and s·BA subtracted from W, in float64 and float32."""
    found = {dtype: _start("both", dtype) for dtype in _DTYPES}
    limit = {dtype: 1e3 * float(np.finfo(dtype).eps) for dtype in _DTYPES}
    double, single = (f"{found[dtype].difference:.1e}" for dtype in ("float64", "float32"))
    return Evidence(
        f"Outputs at the start equal the base model's to rounding, not to the bit: largest difference ÷ largest logit "
        f"{double} in float64, {single} in float32 (W − BA + BA rounds twice).",
        f"初始输出与原模型只差舍入误差，并非逐位相同：最大差 ÷ 最大 logit，float64 为 {double}，"
        f"float32 为 {single}（W − BA + BA 舍入两次）。",
        holds=all(start.same for start in found.values()),
        within=all(0 < start.difference < limit[dtype] for dtype, start in found.items()),
        figures={dtype: start.difference for dtype, start in found.items()},
    )


# --- inference --------------------------------------------------------------------------------------------------------


@claim("lora.latency", "Unmerged inference costs extra time; merging removes it.")
def latency() -> Evidence:
    """Time of one layer alone, with an adapter, and merged, over widths."""
    ratios = {}
    for size in (256, 1024, 2048):
        layers = {kind: _latency_layer(size, kind) for kind in ("base", "unmerged", "merged")}
        x = np.random.default_rng(1).standard_normal((16, size)).astype("float32")

        def forward(layer: nn.Module, x: np.ndarray = x) -> None:
            with no_grad():
                layer(x)

        times = compare_latency({kind: (lambda layer=layer: forward(layer)) for kind, layer in layers.items()})
        ratios[size] = {kind: times[kind].median / times["base"].median for kind in ("unmerged", "merged")}
    text = "; ".join(f"{n}: {r['unmerged']:.2f} and {r['merged']:.2f}" for n, r in ratios.items())
    return Evidence(
        f"One layer, 16 rows, r = 8, unmerged and merged time ÷ the base layer's, by width — {text}.",
        "单层，16 行输入，r = 8，不合并与合并后的用时 ÷ 原来那一层的用时，"
        f"按宽度列出——{chinese_marks(text).replace(' and ', ' 与 ')}。",
        figures={str(size): r for size, r in ratios.items()},
    )


def _latency_layer(size: int, kind: str) -> nn.Module:
    base = nn.Linear(size, size, rng=0)
    if kind == "base":
        return base
    layer = LoraLinear(base)
    layer.add("default", *init_lora(size, size, 8, "both", 0, "float32"), 1.0, nn.Dropout(0.0), offset=False)
    layer.active = ["default"]
    if kind == "merged":
        layer.merge(["default"])
    return layer


@claim("lora.merge", "The merged model is identical to base and adapters kept apart.")
def merge() -> Evidence:
    """Outputs merged and apart: of integers, of weights stored in four dtypes, of the model that merge_and_unload
    leaves; what unmerging gives back."""
    model, x = copy.deepcopy(adapt("lora").model), data.digits.transfer().test.x
    layers = [layer for _, layer in model.adapter_layers()]
    exact = _merges_exactly()
    found = {name: _merge_errors(layers, name) for name in _EPS}
    apart, alone = model(x).data, model.merge_and_unload()
    whole = float(np.abs(alone(x).data - apart).max() / np.abs(apart).max())
    bare = not any(isinstance(module, LoraLinear) for module in alone.modules())
    text = ", ".join(f"{f['difference']:.0e} in {name}" for name, f in found.items())
    text_zh = "，".join(f"{name} 为 {f['difference']:.0e}" for name, f in found.items())
    returned = found["float32"]["returned"]
    return Evidence(
        f"Identical in exact arithmetic (integers); in floating point merged and unmerged outputs of {len(layers)} "
        f"trained layers differ by up to {text} (÷ largest output). merge_and_unload leaves a plain model, whose "
        f"float32 logits differ by {whole:.0e}. Unmerging does not give W back: {returned:.1%} of its float32 numbers "
        "are as before.",
        f"精确运算（整数）下完全相同；浮点运算下，{len(layers)} 个训练过的层合并与不合并的输出最多相差（÷ 最大输出）"
        f"{text_zh}。merge_and_unload 之后是一个普通模型，float32 的 logits 相差 {whole:.0e}。"
        f"取消合并并不能还原 W：float32 下有 {returned:.1%} 的数与原来相同。",
        holds=exact and bare and whole == 0 and all(f["difference"] == 0 for f in found.values()) and returned == 1,
        within=exact
        and bare
        and whole < 1e3 * _EPS["float32"]
        and all(found[name]["difference"] < 8 * _EPS[name] for name in _EPS),
        figures={**found, "merge_and_unload": whole},
    )


def _merges_exactly() -> bool:
    """Whether merged and apart are equal to the bit on integers, whose products and sums float64 holds exactly."""
    rng = np.random.default_rng(0)
    x, W, A, B = (rng.integers(-9, 10, shape).astype(float) for shape in ((16, 48), (32, 48), (4, 48), (32, 4)))
    merged = merge_lora(W, A, B, 2.0)
    back = unmerge_lora(merged, A, B, 2.0)
    return np.array_equal(x @ merged.T, x @ W.T + 2 * (x @ A.T) @ B.T) and np.array_equal(back, W)


_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def _merge_errors(layers: list[LoraLinear], name: str) -> dict[str, float]:
    """Over all layers: the largest output difference, and the share of W's numbers that come back when unmerged.

    Weights are stored in the dtype and products formed in float64, so that only the storage's rounding is seen.
    """
    x = np.random.default_rng(0).standard_normal((64, max(layer.base_layer.in_features for layer in layers)))
    pairs = [_merge_error(layer, x[:, : layer.base_layer.in_features], name) for layer in layers]
    differences, returned = zip(*pairs, strict=True)
    return {"difference": max(differences), "returned": float(np.mean(returned))}


def _merge_error(layer: LoraLinear, x: np.ndarray, name: str) -> tuple[float, float]:
    factors = layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    (W, A, B), scaling = (_rounded(w.data, name) for w in factors), layer.scaling["default"]
    apart = x @ W.T + scaling * (x @ A.T) @ B.T
    merged = _rounded(merge_lora(W, A, B, scaling), name)
    back = _rounded(unmerge_lora(merged, A, B, scaling), name)
    difference = np.abs(x @ merged.T - apart).max() / np.abs(apart).max()
    return float(difference), float((back == W).mean())


def _rounded(x: np.ndarray, name: str) -> np.ndarray:
    """x rounded to a dtype's nearest number (ties to even), kept in float64; bfloat16 is float32's upper half."""
    if name != "bfloat16":
        return x.astype(name).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


# --- rank and SVD -----------------------------------------------------------------------------------------------------


@claim("lora.row-column-rank", "A matrix's row rank and column rank are equal.")
def row_column_rank() -> Evidence:
    """Exact elimination on rows and on columns; singular values of them, and of products whose rank is known."""
    rng = np.random.default_rng(0)
    integers = [_integer_matrix(rng) for _ in range(100)]
    rationals = [
        [[Fraction(int(x), int(rng.integers(1, 9))) for x in row] for row in m.tolist()] for m in integers[:50]
    ]
    matrices = [*integers, *rationals]
    pairs = [(rank.row_rank_exact(m), rank.column_rank_exact(m)) for m in matrices]
    by_svd = sum(rank.matrix_rank(np.array(m, float)) == row for m, (row, _) in zip(matrices, pairs, strict=True))
    shapes = [tuple(shape) for shape in rng.integers(1, 30, (50, 3))]
    real = [rng.standard_normal((m, k)) @ rng.standard_normal((k, n)) for m, k, n in shapes]
    svd = sum(rank.matrix_rank(m) == rank.matrix_rank(m.T) == min(shape) for m, shape in zip(real, shapes, strict=True))
    equal = sum(row == column for row, column in pairs)
    return Evidence(
        f"Equal for {equal} of {len(pairs)} integer and rational matrices by exact elimination "
        f"(ranks {min(pairs)[0]} to {max(pairs)[0]}; SVD finds the same for {by_svd}), and for {svd} of {len(real)} "
        "real products of known rank by SVD.",
        f"用精确消元检验 {len(pairs)} 个整数与有理数矩阵，{equal} 个行秩等于列秩（秩从 {min(pairs)[0]} 到 "
        f"{max(pairs)[0]}；其中 {by_svd} 个的秩与 SVD 一致）；用 SVD 检验 {len(real)} 个秩已知的实数矩阵，"
        f"{svd} 个相等。",
        holds=equal == by_svd == len(pairs) and svd == len(real),
        figures={
            "exact": len(pairs),
            "exact_equal": equal,
            "exact_as_svd": by_svd,
            "real": len(real),
            "real_equal": svd,
        },
    )


def _integer_matrix(rng: np.random.Generator) -> np.ndarray:
    m, k, n = rng.integers(1, 8, 3)
    return rng.integers(-3, 4, (m, k)) @ rng.integers(-3, 4, (k, n))


@claim("lora.svd-low-dim", "A low-rank approximation (SVD, PCA) keeps most of the information.")
def svd_low_dim() -> Evidence:
    """Eckart and Young: SVD against optimized and random factors; the spectra of digits and of trained weights."""
    rng = np.random.default_rng(0)
    images = data.digits.load().images.astype("float64")
    centered = images - images.mean(axis=0)
    weights = {n: W.astype("float64") for n, (W, _) in weight_updates(adapt("full")).items()}
    best = _approximation_errors(centered, 10, rng)
    tail = float(np.sqrt((rank.singular_values(centered)[10:] ** 2).sum()) / np.linalg.norm(centered))
    optimal = best["svd"] <= min(best["optimized"], best["random"]) + 1e-9 and abs(best["svd"] - tail) < 1e-9
    kept = rank.energy(centered, 10)
    r = {n: max(1, min(W.shape) // 4) for n, W in weights.items()}
    of_weights = float(np.mean([rank.energy(W, r[n]) for n, W in weights.items()]))
    flat = float(np.mean([_gaussian_energy(W.shape, r[n], rng) for n, W in weights.items()]))
    svd, optimized, random = (f"{best[how]:.4f}" for how in ("svd", "optimized", "random"))
    return Evidence(
        f"Ten of 64 directions keep {kept:.0%} of the digits' variance. No other rank-10 factors are nearer: error "
        f"{svd} by SVD, {optimized} by alternating least squares from a random start, {random} with a random basis. "
        f"Trained weights: a quarter of the directions keeps {of_weights:.0%} (Gaussian matrices of their shapes: "
        f"{flat:.0%}).",
        f"64 个方向取其中十个，就保留了手写数字 {kept:.0%} 的方差。没有其他秩 10 的分解更接近：SVD 的误差为 {svd}，"
        f"从随机起点做交替最小二乘为 {optimized}，随机基为 {random}。训练过的权重："
        f"四分之一的方向保留 {of_weights:.0%}（同样形状的高斯矩阵：{flat:.0%}）。",
        holds=optimal and kept > 0.5 and of_weights > flat,
        figures={
            "digits_energy_10": kept,
            "weights_energy_quarter": of_weights,
            "gaussian_energy_quarter": flat,
            **best,
        },
    )


def _approximation_errors(W: np.ndarray, r: int, rng: np.random.Generator) -> dict[str, float]:
    """‖W − W_r‖_F/‖W‖_F for rank-r matrices by SVD, alternating least squares, and in a random basis."""
    norm, L = np.linalg.norm(W), rng.standard_normal((W.shape[0], r))
    random_basis = np.linalg.qr(rng.standard_normal((W.shape[1], r)))[0]
    for _ in range(30):
        R = np.linalg.lstsq(L, W, rcond=None)[0]
        L = np.linalg.lstsq(R.T, W.T, rcond=None)[0].T
    approximations = {
        "svd": rank.best_rank_r(W, r),
        "optimized": L @ R,
        "random": W @ random_basis @ random_basis.T,
    }
    return {name: float(np.linalg.norm(W - approximation) / norm) for name, approximation in approximations.items()}


def _gaussian_energy(shape: tuple[int, int], r: int, rng: np.random.Generator) -> float:
    return rank.energy(rng.standard_normal(shape), r)


@claim("lora.overparameterized", "Dense layers are over-parameterized: an update has low intrinsic rank.")
def overparameterized() -> Evidence:
    """The effective rank of the ΔW that full fine-tuning makes, beside that of W."""
    ranks = {
        name: (rank.effective_rank(W), rank.effective_rank(delta), min(W.shape))
        for name, (W, delta) in weight_updates(adapt("full")).items()
    }
    weight, update, full = (float(np.mean([r[i] for r in ranks.values()])) for i in range(3))
    updates, rng = [delta for _, delta in weight_updates(adapt("full")).values()], np.random.default_rng(0)
    kept = float(np.mean([rank.energy(delta, 8) for delta in updates]))
    flat = float(np.mean([_gaussian_energy(delta.shape, 8, rng) for delta in updates]))
    return Evidence(
        f"Full fine-tuning of the ViT, {len(ranks)} projections: effective rank of ΔW {update:.1f} on average, of W "
        f"{weight:.1f}, of {full:.0f} possible; the first 8 directions hold {kept:.0%} of ‖ΔW‖² "
        f"(Gaussian matrices of their shapes: {flat:.0%}).",
        f"对 ViT 做全参数微调，{len(ranks)} 个投影矩阵平均：ΔW 的有效秩为 {update:.1f}，W 为 {weight:.1f}，"
        f"最大可能为 {full:.0f}；前 8 个方向占 ‖ΔW‖² 的 {kept:.0%}（同样形状的高斯矩阵：{flat:.0%}）。",
        figures={"update": update, "weight": weight, "possible": full, "energy_8": kept, "gaussian_energy_8": flat},
    )


# --- what it costs ----------------------------------------------------------------------------------------------------


def _wide(width: int = 512, depth: int = 4) -> nn.Sequential:
    """Linear layers of one width, for counting: small enough to be quick, wide enough for r = 8 to be little."""
    return nn.Sequential(*[nn.Linear(width, width, rng=i) for i in range(depth)])


def _step_model(kind: str, width: int = 512) -> nn.Module:
    model = _wide(width)
    names = [str(i) for i in range(len(model))]
    return model if kind == "full" else get_peft_model(model, LoraConfig(r=8, target_modules=names))


def _loss(model: nn.Module, width: int, batch: int = 64) -> Tensor:
    x = Tensor(np.random.default_rng(0).standard_normal((batch, width)).astype("float32"), requires_grad=True)
    return (model(x) ** 2).mean()


@claim(
    "lora.memory-parts",
    "Memory is weights, gradients, activations and optimizer state; LoRA shrinks gradients and optimizer state.",
)
def memory_parts() -> Evidence:
    """Live bytes of the four parts, full against LoRA, with two optimizers; the formula against them."""
    found: dict[str, dict[str, int]] = {}
    formula = []
    for kind in ("full", "lora"):
        for name, optimizer_class in (("sgd", optim.SGD), ("adamw", optim.AdamW)):
            model = _step_model(kind)
            optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            for _ in range(2):  # the second forward has gradients and optimizer state beside its activations
                loss = _loss(model, 512)
                report = memory_report(model, optimizer)
                loss.backward()
                optimizer.step()
            found[f"{kind} {name}"] = _parts(report)
            estimate = estimate_memory(model, kind, optimizer=name)
            formula.append(all(getattr(estimate, part) == getattr(report, part) for part in _FORMULA_PARTS))
    full, lora = found["full adamw"], found["lora adamw"]
    shrink = {part: lora[part] / full[part] for part in full}
    shrink_zh = "，".join(f"{PARTS_ZH[part]} {ratio:.3f}" for part, ratio in shrink.items())
    return Evidence(
        "LoRA's bytes ÷ full fine-tuning's (four 512² layers, batch 64, AdamW, r = 8): "
        + ", ".join(f"{part} {ratio:.3f}" for part, ratio in shrink.items())
        + f". The formula gives the measured bytes in {sum(formula)} of {len(formula)} cases.",
        f"LoRA 的字节数 ÷ 全参数微调的字节数（四个 512² 的层，批大小 64，AdamW，r = 8）：{shrink_zh}。"
        f"{len(formula)} 种情形中有 {sum(formula)} 种，公式与实测的字节数相等。",
        holds=shrink["gradients"] < 0.1 and shrink["optimizer"] < 0.1 and all(formula),
        figures={**found, "ratio": shrink},
    )


_FORMULA_PARTS = ("weights", "gradients", "optimizer")
PARTS_ZH = {"weights": "模型参数", "gradients": "梯度", "optimizer": "优化器状态", "activations": "激活值"}


def _parts(report: Any) -> dict[str, int]:
    return {part: int(getattr(report, part)) for part in PARTS_ZH}


def _flops(kind: str, width: int) -> tuple[int, int]:
    model = _step_model(kind, width)
    with count_flops() as flops:
        _loss(model, width).backward()
    return flops.forward, flops.backward


@claim("lora.forward-flops", "The forward pass still computes xW: it is not cheaper.")
def forward_flops() -> Evidence:
    """Products counted in forward, LoRA against full, and against those of xW and of the factors."""
    counted = {width: (_flops("full", width)[0], _flops("lora", width)[0]) for width in (64, 256, 1024)}
    exact = all(
        full == 4 * 2 * 64 * width**2 and lora - full == 4 * 2 * 64 * 8 * (width + width)
        for width, (full, lora) in counted.items()
    )
    ratios = {width: f"{lora / full:.3f}" for width, (full, lora) in counted.items()}
    return Evidence(
        f"Counted products, LoRA (r = 8) ÷ full fine-tuning: {_by_width(ratios)}. xW is there in both; BAx is "
        f"{'exactly what comes on top' if exact else 'not all that differs'}.",
        f"实际计数的乘法次数，LoRA（r = 8）÷ 全参数微调：{_by_width(ratios, zh=True)}。两者都要算 xW，"
        f"{'多出来的恰好是 BAx' if exact else '差别不只是 BAx'}。",
        holds=exact and all(lora >= full for full, lora in counted.values()),
        figures={str(width): {"full": full, "lora": lora} for width, (full, lora) in counted.items()},
    )


def _by_width(found: dict[int, str], zh: bool = False) -> str:
    if zh:
        return "，".join(f"宽度 {width} 时 {value}" for width, value in found.items())
    return ", ".join(f"{value} at width {width}" for width, value in found.items())


@claim("lora.backward-flops", "The backward pass is saved only in part.")
def backward_flops() -> Evidence:
    """Products counted in backward, LoRA against full, towards the limit of wide layers."""
    counted = {width: (_flops("full", width), _flops("lora", width)) for width in (64, 256, 1024)}
    backward = {width: lora[1] / full[1] for width, (full, lora) in counted.items()}
    total = {width: sum(lora) / sum(full) for width, (full, lora) in counted.items()}
    widest = max(total)
    both = {width: f"{share:.3f}" for width, share in total.items()}
    return Evidence(
        f"The products dW of frozen weights are gone: backward falls to {backward[widest]:.2f} of full fine-tuning's "
        f"at width {widest}. Forward and backward together: {_by_width(both)}; the limit for wide layers is 2/3.",
        f"冻结的权重不再需要 dW 这次乘法：宽度 {widest} 时，反向传播降到全参数微调的 {backward[widest]:.2f}。"
        f"前向与反向合计：{_by_width(both, zh=True)}；层越宽，越接近 2/3。",
        holds=all(b < 1 for b in backward.values()) and 2 / 3 < total[widest] < 0.7,
        figures={"backward": {str(w): b for w, b in backward.items()}, "total": {str(w): t for w, t in total.items()}},
    )


# --- training ---------------------------------------------------------------------------------------------------------


@claim("lora.early-movement", "Parameters move most, and the loss falls fastest, in the first steps.")
def early_movement() -> Evidence:
    """‖ΔW‖ of each step, and how soon the loss falls, in full fine-tuning."""
    run = adapt("full")
    loss, movement = run.history.loss, run.movement
    tenth = len(loss) // 10
    fall = loss[0] - float(np.mean(loss[-tenth:]))
    early = (loss[0] - float(np.mean(loss[tenth : 2 * tenth]))) / fall
    moved = [float(np.mean(movement[i * tenth : (i + 1) * tenth])) for i in range(10)]
    return Evidence(
        f"Full fine-tuning, {len(loss)} steps of AdamW at a constant learning rate: the first tenth brings {early:.0%} "
        f"of the whole fall of the loss; a step moves the weights by {moved[0]:.3f} (‖ΔW‖) in the first tenth, "
        f"{moved[-1]:.3f} in the last.",
        f"全参数微调，固定学习率的 AdamW，{len(loss)} 步：前十分之一的步数完成了损失总降幅的 {early:.0%}；"
        f"每步对权重的改动（‖ΔW‖）在最初的十分之一为 {moved[0]:.3f}，在最后的十分之一为 {moved[-1]:.3f}。",
        figures={"share_of_fall": early, "movement_by_tenth": moved, "loss": loss},
    )


@claim("lora.smaller-faster", "Training is smaller and faster than full fine-tuning.")
def smaller_faster() -> Evidence:
    """File, step time and peak memory, LoRA against full."""
    width, models = 1024, {kind: _step_model(kind, 1024) for kind in ("full", "lora")}
    steps, peaks = {}, {}
    for kind, model in models.items():
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            _loss(model, width, 128).backward()
            optimizer.step()

        with peak_memory() as peak:
            step()
        steps[kind], peaks[kind] = step, peak.bytes
    times = compare_latency(steps)
    with tempfile.TemporaryDirectory() as directory:
        models["lora"].save_pretrained(directory)
        adapter = (Path(directory) / "adapter_model.safetensors").stat().st_size
        checkpoint = files.write_tensors(Path(directory) / "full.safetensors", models["full"].state_dict())
        size = checkpoint.stat().st_size
    time = times["lora"].median / times["full"].median
    memory = peaks["lora"] / peaks["full"]
    return Evidence(
        f"Four {width}² layers, batch 128, r = 8, LoRA ÷ full: file {adapter / size:.3f} ({adapter:,} and {size:,} "
        f"bytes), time of a step {time:.2f}, peak memory that the first step adds (gradients, optimizer state, "
        f"activations) {memory:.2f}.",
        f"四个 {width}² 的层，批大小 128，r = 8，LoRA ÷ 全参数微调：文件 {adapter / size:.3f}（{adapter:,} 与 {size:,} "
        f"字节），一步的用时 {time:.2f}，第一步增加的内存峰值（梯度、优化器状态、激活值）{memory:.2f}。",
        figures={"file": adapter / size, "time": time, "peak": memory},
    )
