"""Figures of the QLoRA section: the code, its error, and when a full weight exists."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

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
        axes.annotate(f"{value:.2f}", (value, 0), (0, -14 - 15 * (i % 2)), textcoords="offset points", ha="center",
                      va="top", fontsize=11, color=BLUE)  # fmt: skip
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
        "结论 qlora.nf4-error：512² 个 N(0, 0.02²) 随机数；预训练 ViT 的十二个投影矩阵",
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
        f"结论 qlora.dynamic-dequant：NF4 方阵层，一个 float32 全精度权重为 {weight / 2**20:.0f} MiB；r = 8",
    )
