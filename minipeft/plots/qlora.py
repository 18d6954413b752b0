"""Figures of the QLoRA section: the code, its error, and when a full weight exists."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from ..ledger.qlora_cost import PARTS_ZH
from ..quant.codes import nf4_table, normal_float_steps
from .evidence import figures
from .style import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILION, fit, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def nf4() -> Figure:
    """The sixteen numbers on the normal density that they were made for, and the cells that round to each."""
    table, scale = nf4_table().astype("float64"), float(normal_float_steps(4).values.max())
    x = np.linspace(-1.15, 1.15, 600)
    density = np.exp(-((x * scale) ** 2) / 2) / np.sqrt(2 * np.pi) * scale
    edges = np.concatenate([[-1.15], (table[:-1] + table[1:]) / 2, [1.15]])
    figure, axes = panels(1, size=(11, 5))
    for i, (left, right) in enumerate(itertools.pairwise(edges)):
        inside = (x >= left) & (x <= right)
        axes.fill_between(x[inside], density[inside], color=(SKY, ORANGE)[i % 2], alpha=0.45, lw=0)
    axes.plot(x, density, color=INK, lw=2)
    height = np.exp(-((table * scale) ** 2) / 2) / np.sqrt(2 * np.pi) * scale
    axes.vlines(table, 0, height, color=BLUE, lw=2)
    axes.plot(table, np.zeros(16), "o", color=BLUE, ms=8, clip_on=False, zorder=5)
    for i, value in list(enumerate(table))[:: fit(1, 3)]:
        text, below = f"{value:.2f}".replace("-", "−"), (0, -14 - 15 * (i % 2))
        place = {"textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(text, (value, 0), below, fontsize=11, color=BLUE, **place)
    axes.set(
        xlim=(-1.16, 1.16),
        ylim=(0, None),
        xticks=[],
        ylabel=t("density of N(0, 1), rescaled", "N(0, 1) 的密度（缩放后）"),
    )
    axes.set_xlabel(t("weight ÷ its block's largest magnitude", "权重 ÷ 所在块的最大绝对值"), labelpad=48)
    return source(
        figure,
        "minipeft.quant.nf4_table: Dettmers et al. 2023, appendix E; colours: the cell that rounds to each number",
        "minipeft.quant.nf4_table：Dettmers 等 2023，附录 E；颜色：舍入到同一数值的区间",
    )


def quantization_error() -> Figure:
    """The squared error of three 4-bit codes and of the best one, by block size, on normal and on trained weights."""
    found = figures("qlora.nf4-error")
    styles = {"nf4": ("NF4", BLUE, "o-"), "fp4": ("FP4", VERMILION, "s--"), "int4": ("INT4", GREEN, "^-.")}
    figure, axes = panels(2)
    titles = {"normal": t("normal weights", "正态权重"), "trained": t("trained weights", "训练过的权重")}
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        sizes = [int(size) for size in found[kind]]
        for code, (name, colour, line) in styles.items():
            ax.plot(sizes, [case["error"][code] for case in found[kind].values()], line, color=colour, label=name)
        best = [case["lloyd_max"] for case in found[kind].values()]
        ax.plot(sizes, best, ":", color=INK, label=t("Lloyd–Max (best)", "Lloyd–Max（最优）"))
        ax.set(xscale="log", xticks=sizes, xticklabels=sizes, ylim=(0, 0.035), title=title)
        ax.set_xlabel(t("block size", "块大小"))
        ax.minorticks_off()
    axes[0].set_ylabel(t("squared error ÷ ‖W‖²", "平方误差 ÷ ‖W‖²"))
    axes[0].legend(ncols=2, loc="upper left")
    return source(
        figure,
        "claim qlora.nf4-error: 512² numbers from N(0, 0.02²); the twelve projections of the pre-trained ViT",
        "论断 qlora.nf4-error：512² 个 N(0, 0.02²) 随机数；预训练 ViT 的十二个投影矩阵",
    )


def dequantization() -> Figure:
    """Live bytes at each dequantization of one training step; the step's peak by depth."""
    found = figures("qlora.dynamic-dequant")
    weight, timeline = found["weight_bytes"], found["timeline"]
    figure, (step, depth) = panels(2, [1.25, 1])
    full = np.array([moment["full_weights"] * weight for moment in timeline]) / 2**20
    live = np.array([moment["live_bytes"] for moment in timeline]) / 2**20
    step.bar(range(len(timeline)), full, color=BLUE, label=t("the one full weight", "唯一的全精度权重"))
    rest = {"color": ORANGE, "hatch": "//", "edgecolor": "white", "lw": 0}
    step.bar(range(len(timeline)), live - full, bottom=full, label=t("activations, gradients", "激活值、梯度"), **rest)
    first_backward = sum(moment["pass"] == "forward" for moment in timeline) - 0.5
    step.axvline(first_backward, ymax=0.82, color=GREY, ls=":", lw=2)
    top = live.max() * 1.5
    step.text(first_backward - 0.1, top * 0.7, t("forward", "前向"), ha="right", color=GREY)
    step.text(first_backward + 0.1, top * 0.7, t("backward", "反向"), color=GREY)
    step.set(xticks=range(len(timeline)), xticklabels=[moment["layer"] for moment in timeline], ylim=(0, top))
    step.set(
        xlabel=t("layer whose weight is dequantized", "正在反量化的层"),
        ylabel=t("live MiB in the step", "该步存活的 MiB"),
    )
    step.legend(loc="upper left", ncols=2, fontsize=12.5)
    names = {
        "kept": (t("all dequantized and kept", "全部反量化并保留"), VERMILION, "s--"),
        "qlora": ("QLoRA", BLUE, "o-"),
        "lora": ("LoRA", GREY, "^:"),
    }
    depths = [int(d) for d in found["peaks"]]
    for kind, (name, colour, line) in names.items():
        depth.plot(depths, [peak[kind] / 2**20 for peak in found["peaks"].values()], line, color=colour, label=name)
    depth.set(
        xlabel=t("layers", "层数"), ylabel=t("peak MiB of a step", "一步的峰值 MiB"), xticks=depths, ylim=(0, None)
    )
    depth.legend()
    return source(
        figure,
        f"claim qlora.dynamic-dequant: square layers in NF4, a full float32 weight has {weight / 2**20:.0f} MiB; r = 8",
        f"论断 qlora.dynamic-dequant：NF4 方阵层，一个 float32 全精度权重为 {weight / 2**20:.0f} MiB；r = 8",
    )


def static_quantization() -> Figure:
    """Loss curves with weights that are rounded to codes after each step, and of QLoRA, whose codes stay."""
    found = figures("qlora.static-quant")
    styles = {
        "nearest": (t("rounded to the nearest code", "舍入到最近的编码"), VERMILION, (0, (5, 2))),
        "stochastic": (t("rounded at random, mean kept", "随机舍入（期望不变）"), GREEN, (0, (3, 1, 1, 1))),
        "QLoRA": ("QLoRA", BLUE, "-"),
        "not rounded": (t("not rounded", "不舍入"), GREY, (0, (1, 1))),
    }
    figure, axes = panels(1, size=(9.5, 4.6))
    for key, (name, colour, dashes) in styles.items():
        losses = np.convolve(found["curves"][key], np.ones(10) / 10, mode="valid")
        label = f"{name}{t(': ', '：')}{100 * found['accuracy'][key]:.0f} %"
        axes.plot(np.arange(len(losses)) + 10, losses, color=colour, ls=dashes, label=label)
    axes.set(
        xlabel=t("step", "步"),
        ylabel=t("training loss, mean of 10", "训练损失（10 步平均）"),
        yscale="log",
        xlim=(0, None),
    )
    figure.legend(
        loc="outside upper center", ncols=fit(2, 1), title=t("weights, and the accuracy reached", "权重，及最终准确率")
    )
    return source(
        figure,
        "claim qlora.static-quant: MLP on rotated digits; all but QLoRA train every weight",
        "论断 qlora.static-quant：MLP，旋转的手写数字；除 QLoRA 外均训练全部权重",
    )


def seven_billion() -> Figure:
    """What a 7B model needs with QLoRA, part by part, against the document's 5 to 6 GB."""
    parts = figures("qlora.7b")["parts"]
    figure, axes = panels(1, size=(9.5, 4.6))
    names = [t(name, PARTS_ZH[name]) for name in parts]
    sizes = np.array(list(parts.values())) / 1e9
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    axes.axvspan(5, 6, color=ORANGE, alpha=0.35, lw=0)
    axes.text(5.5, -0.8, t("the document: 5–6", "文档：5–6"), ha="center", va="bottom", fontsize=fit(13, 10))
    axes.barh(names, sizes, left=starts, color=BLUE)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        axes.text(start + size + 0.06, i, f"{size:.2f}", va="center", fontsize=13)
    axes.set(xlabel="GB", xlim=(0, 6.6), ylim=(len(sizes) - 0.4, -0.7))
    axes.tick_params(axis="y", length=0)
    return source(
        figure,
        f"claim qlora.7b: by formula, batch 1, 512 tokens, r = 16, checkpointing; sum {sizes.sum():.2f} GB",
        f"论断 qlora.7b：按公式，批大小 1，512 词元，r = 16，激活重算；合计 {sizes.sum():.2f} GB，不含 GPU 运行时",
    )


def low_bits() -> Figure:
    """Accuracy by the bits that the frozen weights are held in: before adapting, and after, on two tasks."""
    found = figures("qlora.low-bits")
    bits = list(found)
    styles = {
        "own_accuracy": (t("digits that it knows", "原任务"), GREY, "^:"),
        "easy_accuracy": (t("adapted to mirrored digits", "适配镜像数字"), GREEN, "s--"),
        "hard_accuracy": (t("adapted to rotated digits", "适配旋转数字"), VERMILION, "o-"),
    }
    figure, (errors, accuracy) = panels(2)
    errors.bar(bits, [100 * found[b]["weight_error"] for b in bits], color=BLUE)
    errors.set(xlabel=t("bits a weight", "每个权重的比特数"), ylabel=t("error of the weights, %", "权重误差，%"))
    for key, (name, colour, line) in styles.items():
        accuracy.plot(bits, [100 * found[b][key] for b in bits], line, color=colour, label=name)
    accuracy.set(xlabel=t("bits a weight", "每个权重的比特数"), ylabel=t("test accuracy, %", "测试准确率，%"))
    accuracy.set_ylim(80, 100)
    accuracy.legend(loc="lower left", fontsize=12.5)
    return source(
        figure,
        "claim qlora.low-bits: MLP with weights in normal floats, adapters of r = 8, 200 steps",
        "论断 qlora.low-bits：权重为正态浮点编码的 MLP，适配器 r = 8，200 步",
    )
