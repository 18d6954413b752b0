"""Figures of the LoRA section: rank, initialization, merging, and what training costs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import data, nn, rank
from ..backend import count_flops
from ..ledger.runs import adapt, weight_updates
from ..measure import estimate_memory
from ..recipes import METHODS, Choice, prepared
from ..tensor import Tensor
from .evidence import figures
from .style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, fit, image, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weight_and_update() -> tuple[np.ndarray, np.ndarray]:
    """W and ΔW of the transformer's first value projection, by full fine-tuning on the rotated digits."""
    W, delta = weight_updates(adapt("full"))["layers.0.self_attn.v_proj"]
    return W.astype("float64"), delta.astype("float64")


# --- rank -------------------------------------------------------------------------------------------------------------


def spectra() -> Figure:
    """Singular values, and how much of ‖·‖² the first r hold: digits, a weight, its update, noise."""
    W, delta = weight_and_update()
    images = data.digits.load().images.astype("float64")
    noise = np.random.default_rng(0).standard_normal(W.shape)
    curves = {
        t("update ΔW", "更新量 ΔW"): (delta, VERMILION, "-"),
        t("digits, centred", "手写数字（去均值）"): (images - images.mean(axis=0), GREEN, (0, (6, 2))),
        t("weight W", "权重 W"): (W, BLUE, (0, (3, 1.5))),
        t("Gaussian noise", "高斯噪声"): (noise, GREY, (0, (1, 1))),
    }
    figure, (values, kept) = panels(2)
    for name, (matrix, colour, dashes) in curves.items():
        S = rank.singular_values(matrix)
        values.plot(np.arange(1, len(S) + 1), S / S[0], color=colour, ls=dashes, label=name)
        share = np.concatenate([[0], np.cumsum(S**2) / np.sum(S**2)])
        kept.plot(np.arange(len(share)), 100 * share, color=colour, ls=dashes)
    values.set(xlabel=t("index i", "序号 i"), ylabel=t("singular value Sᵢ/S₁", "奇异值 Sᵢ/S₁"), ylim=(0, 1.02))
    kept.set(
        xlabel=t("directions kept, r", "保留的方向数 r"),
        ylabel=t("share of ‖W‖², %", "占 ‖W‖² 的比例，%"),
    )
    kept.set(ylim=(0, 102), xlim=(0, 48))
    values.set_xlim(0, 48)
    values.legend()
    return source(
        figure,
        "1,797 digits of 64 pixels; ViT layer 0 v_proj 48×48 before, and ΔW after 200 steps of full fine-tuning",
        "1,797 个手写数字（64 像素）；ViT 第 0 层 v_proj（48×48）的预训练权重，以及全参数微调 200 步后的 ΔW",
    )


def reconstructions() -> Figure:
    """The best approximation of rank r, of a digit and of a trained weight."""
    digit = data.digits.load().images[12].reshape(8, 8).astype("float64")
    W, _ = weight_and_update()
    rows = ((digit, (1, 2, 3, 4)), (W, (1, 4, 12, 24)))
    figure, grid = _grid(2, 5, (11, 5.4))
    for axes, (matrix, ranks), cmap in zip(grid, rows, ("gray_r", "PuOr"), strict=True):
        limit = np.abs(matrix).max()
        limits = {"vmin": 0 if cmap == "gray_r" else -limit, "vmax": limit, "cmap": cmap}
        for ax, r in zip(axes, ranks, strict=False):
            kept = f"r = {r}\n{100 * rank.energy(matrix, r):.0f} %"
            image(ax, rank.best_rank_r(matrix, r), kept, **limits)
        name = t("as it is", "原矩阵")
        image(axes[-1], matrix, f"{name}\n{matrix.shape[0]} × {matrix.shape[1]}", **limits)
    return source(
        figure,
        "best rank-r approximation by SVD, with the share of ‖W‖² it keeps; a digit, and ViT layer 0 v_proj",
        "用 SVD 得到的最佳秩 r 近似及其保留的 ‖W‖² 比例；一个手写数字与 ViT 第 0 层 v_proj",
    )


def _grid(rows: int, columns: int, size: tuple[float, float]) -> Any:
    figure, axes = panels(1, size=size)
    figure.set_size_inches(fit(size, (5.8, 3.8)))
    axes.remove()
    return figure, figure.subplots(rows, columns)


# --- the start --------------------------------------------------------------------------------------------------------


def initialization() -> Figure:
    """What the first step moves, and what is learned, with B, A, both or neither at zero."""
    found = figures("lora.one-zero")
    starts = {
        "B": (t("B = 0", "B = 0"), BLUE, "-"),
        "A": (t("A = 0", "A = 0"), GREEN, (0, (5, 2))),
        "both": (t("A = B = 0", "A = B = 0"), VERMILION, (0, (1, 1))),
        "neither": (t("none is 0", "均非零"), GREY, (0, (3, 1, 1, 1))),
    }
    figure, (moves, curve) = panels(2, [1, 1.1])
    y = np.arange(len(starts))
    for offset, factor, colour, hatch in ((-0.19, "A", SKY, None), (0.19, "B", ORANGE, "//")):
        lengths = [found[key][f"moved_{factor}"] for key in starts]
        bars = moves.barh(y + offset, lengths, 0.36, color=colour, hatch=hatch, edgecolor="white", label=factor)
        moves.bar_label(bars, [t("stays", "不动") if x == 0 else "" for x in lengths], padding=4, fontsize=12)
    moves.set(yticks=y, yticklabels=[name for name, *_ in starts.values()])
    moves.set_xlabel(t("largest change in the first step", "第一步的最大变化量"))
    moves.invert_yaxis()
    moves.legend(title=t("moved", "变化的矩阵"), loc="upper right")
    for key, (name, colour, dashes) in starts.items():
        curve.plot(found[key]["loss"], color=colour, ls=dashes, label=name)
    curve.set(xlabel=t("step", "步"), ylabel=t("loss", "损失"), xticks=[0, 5, 10, 15, 19])
    curve.legend()
    return source(
        figure,
        "claim lora.one-zero: one layer 16 → 12, r = 4, gradient descent with η = 0.5 on a regression",
        "论断 lora.one-zero：单层 16 → 12，r = 4，学习率 0.5 的梯度下降，回归任务",
    )


# --- merging ----------------------------------------------------------------------------------------------------------


def merge() -> Figure:
    """Merged against unmerged outputs by the dtype that weights are stored in, beside that dtype's rounding step."""
    from ..ledger.lora import _EPS

    found = {name: figures("lora.merge")[name] for name in _EPS}
    figure, axes = panels(1, size=(9, 4.4))
    y = np.arange(len(found))
    differences = [found[name]["difference"] for name in found]
    axes.hlines(y, 1e-17, differences, color=BLUE, lw=5, alpha=0.35)
    axes.plot(
        differences, y, "o", color=BLUE, ms=13, label=t("largest difference ÷ largest output", "最大差 ÷ 最大输出")
    )
    eps = [_EPS[name] for name in found]
    axes.plot(eps, y, "|", color=VERMILION, ms=26, mew=3, label=t("the dtype's machine epsilon", "该精度的机器精度 ε"))
    axes.set(xscale="log", yticks=y, yticklabels=list(found), xlim=(1e-17, 1), ylim=(3.6, -0.6))
    axes.set_xlabel(t("relative difference, merged against apart", "合并与不合并输出的相对差"))
    figure.legend(loc="outside upper center", ncols=fit(2, 1))
    return source(
        figure,
        "claim lora.merge: 12 trained layers of the ViT, r = 8, products in float64",
        "论断 lora.merge：ViT 中训练过的 12 层，r = 8，乘积用 float64 计算",
    )


# --- what it costs ----------------------------------------------------------------------------------------------------

PARTS = {"weights": (BLUE, None), "gradients": (ORANGE, "//"), "optimizer": (GREEN, ".."), "activations": (PINK, "xx")}


def memory() -> Figure:
    """Where the bytes go: measured on a small model, and by formula for a model of 7 billion weights."""
    found = figures("lora.memory-parts")
    here = {
        t("full, SGD", "全参数，SGD"): found["full sgd"],
        t("full, AdamW", "全参数，AdamW"): found["full adamw"],
        t("LoRA, SGD", "LoRA，SGD"): found["lora sgd"],
        t("LoRA, AdamW", "LoRA，AdamW"): found["lora adamw"],
    }
    seven = {
        name: estimate_memory("7B", method, r=8, batch=1, seq=512, dtype_bytes=2, checkpointing=True).as_dict()
        for name, method in ((t("full", "全参数微调"), "full"), ("LoRA", "lora"), ("QLoRA", "qlora"))
    }
    figure, (small, large) = panels(2, size=(12, 4.8))
    _stacks(small, here, 1e6, "MB")
    _stacks(large, seven, 1e9, "GB")
    small.set_title(t("measured: four 512² layers", "实测：四层 512²"))
    large.set_title(t("by formula: 7B, AdamW", "公式计算：7B，AdamW"))
    figure.legend(*small.get_legend_handles_labels(), loc="outside upper center", ncols=fit(4, 2))
    return source(
        figure,
        "measured: live float32 arrays, batch 64, r = 8; 7B: bfloat16 (QLoRA: NF4), one sequence of 512, checkpointing",
        "实测：存活数组，float32，批大小 64，r = 8；7B：bfloat16（QLoRA 为 NF4），一条 512 词元的序列，激活重算",
    )


def _stacks(axes: Any, rows: dict[str, dict[str, Any]], unit: float, unit_name: str) -> None:
    names = {"weights": t("weights", "权重"), "gradients": t("gradients", "梯度")}
    names |= {"optimizer": t("optimizer state", "优化器状态"), "activations": t("activations", "激活值")}
    left = np.zeros(len(rows))
    for part, (colour, hatch) in PARTS.items():
        sizes = np.array([row[part] / unit for row in rows.values()])
        axes.barh(list(rows), sizes, left=left, color=colour, hatch=hatch, edgecolor="white", lw=0, label=names[part])
        left += sizes
    for i, total in enumerate(left):
        axes.text(total + left.max() * 0.02, i, f"{total:.1f}", va="center")
    axes.set(xlabel=unit_name, xlim=(0, left.max() * 1.15))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


@functools.cache
def counted_flops(method: str, width: int = 512, depth: int = 4, rows: int = 64) -> tuple[int, int]:
    """Products in forward and in backward of one step, in a chain of Linears that something trainable precedes."""
    model = nn.Sequential(*[nn.Linear(width, width, rng=i) for i in range(depth)])
    names = [str(i) for i in range(depth)]
    model = prepared(model, method, Choice(targets=names))
    x = Tensor(np.random.default_rng(0).standard_normal((rows, width)).astype("float32"), requires_grad=True)
    with count_flops() as flops:
        (model(x) ** 2).mean().backward()
    return flops.forward, flops.backward


def flops() -> Figure:
    """Counted products in forward and in backward, by method."""
    names = {"full": t("full", "全参数微调"), "lora": "LoRA", "dora": "DoRA", "lora-pro": "LoRA-Pro"}
    counted = {name: counted_flops(method) for method, name in names.items() if method in METHODS}
    unit = counted[names["full"]][0]
    figure, axes = panels(1, size=(9.5, 4.4))
    forward, backward = (np.array([c[i] / unit for c in counted.values()]) for i in range(2))
    axes.barh(list(counted), forward, color=SKY, label=t("forward", "前向"))
    axes.barh(list(counted), backward, left=forward, color=ORANGE, hatch="//", edgecolor="white", lw=0)
    axes.barh([0], [0], color=ORANGE, hatch="//", edgecolor="white", label=t("backward", "反向"))
    for i, (f, b) in enumerate(zip(forward, backward, strict=True)):
        axes.text(f / 2, i, f"{f:.2f}", va="center", ha="center")
        axes.text(f + b / 2, i, f"{b:.2f}", va="center", ha="center", bbox={"fc": "white", "ec": "none", "pad": 2})
    lora = forward[1] + backward[1]
    text = t(f"{lora / 3:.2f} of full;\nlimit in wide layers 2/3", f"全参数微调的 {lora / 3:.2f}；\n宽层极限为 2/3")
    axes.text(lora + 0.05, 1, text, va="center", color=GREY, fontsize=fit(12.5, 10))
    axes.set(xlabel=t("products ÷ those of the forward pass", "乘法次数 ÷ 一次前向的乘法次数"), xlim=(0, 3.15))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=2)
    return source(
        figure,
        "counted from the executed graph: four 512² layers, 64 rows, r = 8; gradient of the input included",
        "按实际执行的计算图计数：四层 512²，64 行，r = 8；含对输入的梯度",
    )


def movement() -> Figure:
    """Full fine-tuning: the loss, and how far each step moves the weights."""
    run = adapt("full")
    figure, axes = panels(1, size=(9, 4.4))
    steps = np.arange(1, len(run.movement) + 1)
    axes.plot(steps, run.history.loss, color=VERMILION, label=t("loss (left)", "损失（左轴）"))
    axes.set(xlabel=t("step", "步"), ylabel=t("training loss", "训练损失"), xlim=(0, len(steps)), ylim=(0, None))
    right = axes.twinx()
    right.plot(
        steps, run.movement, color=BLUE, ls=(0, (4, 2)), label=t("‖ΔW‖ of the step (right)", "该步的 ‖ΔW‖（右轴）")
    )
    right.set(ylabel="$\\|W_t - W_{t-1}\\|_F$", ylim=(0, None))
    right.spines["right"].set_visible(True)
    axes.axvspan(0, len(steps) / 10, color=GREY, alpha=0.15, lw=0)
    axes.text(len(steps) / 9, axes.get_ylim()[1] * 0.55, t("← first tenth", "← 前十分之一"), color=GREY)
    figure.legend(loc="outside upper right", ncols=2)
    return source(
        figure,
        "claim lora.early-movement: ViT on rotated digits, AdamW, constant learning rate 0.003",
        "论断 lora.early-movement：ViT，旋转的手写数字，AdamW，固定学习率 0.003",
    )


def efficiency() -> Figure:
    """Parameters that train and products that are computed, each as a share of full training's, by method."""
    found = figures("lora.not-train-efficient")
    names = {"full": t("full", "全参数微调"), "lora": "LoRA", "p-tuning": "P-Tuning", "adapter": "Adapter"}
    figure, axes = panels(1, size=(9.5, 4.6))
    y = np.arange(len(names))
    kinds = (
        ("parameters", t("parameters that train", "可训练参数"), GREEN, ".."),
        ("flops", t("products in a step", "一步的乘法次数"), BLUE, None),
    )
    for offset, (key, name, colour, hatch) in zip((-0.19, 0.19), kinds, strict=True):
        shares = [100 * found[method][key] for method in names]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "lw": 0}
        bars = axes.barh(y + offset, shares, 0.36, label=name, **style)
        axes.bar_label(bars, [f"{share:.3g}" for share in shares], padding=5, fontsize=13)
    axes.axvline(200 / 3, color=GREY, ls=":", lw=2)
    axes.set(yticks=y, yticklabels=list(names.values()), xlim=(0, 115))
    axes.set_xlabel(t("% of full training (dotted: 2/3)", "占全参数训练的百分比（点线：2/3）"))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=2)
    return source(
        figure,
        "claim lora.not-train-efficient: a Llama of 4 blocks, width 192; forward and backward, counted as executed",
        "论断 lora.not-train-efficient：4 层、宽 192 的 Llama；前向与反向，按实际执行计数",
    )


def hybrid() -> Figure:
    """Full training for a share of the steps, then LoRA: the loss with its spread, and what it costs."""
    found = figures("lora.hybrid")
    shares = list(found)
    x = np.arange(len(shares))
    figure, (loss, cost) = panels(2)
    means, spreads = ([found[share][key] for share in shares] for key in ("loss", "loss_spread"))
    loss.errorbar(x, means, spreads, fmt="o", color=BLUE, ms=11, capsize=6, lw=2.5)
    loss.set(ylabel=t("loss, last tenth", "损失（最后 1/10 步）"), ylim=(0, None))
    styles = {
        "flops": (t("products", "乘法次数"), BLUE, "o-"),
        "mean_bytes": (t("bytes, on average", "字节（平均）"), GREEN, "s--"),
        "peak_bytes": (t("bytes, at the peak", "字节（峰值）"), VERMILION, "^:"),
    }
    for key, (name, colour, line) in styles.items():
        cost.plot(x, [found[share][key] for share in shares], line, color=colour, label=name)
    cost.set(ylabel=t("÷ full training", "÷ 全参数训练"), ylim=(0, 1.05))
    cost.legend(loc="lower right")
    for ax in (loss, cost):
        ax.set(xticks=x, xticklabels=shares, xlabel=t("steps of full training first", "先做全参数训练的步数占比"))
    return source(
        figure,
        "claim lora.hybrid: MLP on rotated digits, r = 8; mean and standard deviation over seeds",
        "论断 lora.hybrid：MLP，旋转的手写数字，r = 8；对种子取平均与标准差",
    )
