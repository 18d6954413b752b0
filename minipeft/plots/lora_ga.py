"""Figures of the LoRA-GA section: the first update's direction, convergence, and what accumulation keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .evidence import figures
from .style import BLUE, GREY, INK, ORANGE, VERMILION, fit, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def alignment() -> Figure:
    """The cosine between the first update of a weight and its full gradient, by rank and by start values."""
    found = figures("loraga.alignment")["cosine"]
    styles = {
        "bound": (t("the most that rank 2r allows", "秩 2r 的上界"), INK, "_", 26),
        "paper": (t("LoRA-GA, the paper's scale", "LoRA-GA（论文的缩放）"), BLUE, "o", 11),
        "PEFT": (t("LoRA-GA, PEFT's scale", "LoRA-GA（PEFT 的缩放）"), ORANGE, "s", 10),
        "Gaussian": (t("Gaussian A, B = 0", "高斯 A，B = 0"), GREY, "^", 11),
    }
    figure, axes = panels(1, size=(10, 4.8))
    places = {"bound": -0.15, "paper": -0.15, "PEFT": 0.05, "Gaussian": 0.22}
    for kind, (name, colour, marker, size) in styles.items():
        values = np.array(list(found[kind].values()))  # (ranks, layers)
        x, mean = np.arange(len(values)) + places[kind], values.mean(axis=1)
        if kind != "bound":
            axes.vlines(x, values.min(axis=1), values.max(axis=1), color=colour, lw=3, alpha=0.5)
        axes.plot(x, mean, marker, color=colour, ms=size, mew=2.5 if kind == "bound" else 1, label=name)
    axes.set(xticks=range(len(found["paper"])), xticklabels=list(found["paper"]), ylim=(0, 1.04))
    axes.set(xlabel=t("rank r", "秩 r"), ylabel=t("cosine", "余弦"))
    figure.legend(loc="outside upper center", ncols=fit(2, 1))
    return source(
        figure,
        "claim loraga.alignment: first update against gradient, 12 projections of the ViT; means, lines: the range",
        "论断 loraga.alignment：第一步更新与梯度的夹角余弦，ViT 的十二个投影矩阵；点为平均，线为范围",
    )


def convergence() -> Figure:
    """The loss from LoRA's Gaussian start and from LoRA-GA's, at two learning rates."""
    found = figures("loraga.convergence")
    styles = {
        "Gaussian": (t("Gaussian A, B = 0", "高斯 A，B = 0"), GREY, (0, (3, 1, 1, 1))),
        "LoRA-GA": (t("LoRA-GA, the paper's scale", "LoRA-GA（论文的缩放）"), BLUE, "-"),
        "LoRA-GA, PEFT's scale": (t("LoRA-GA, PEFT's scale", "LoRA-GA（PEFT 的缩放）"), ORANGE, (0, (5, 2))),
    }
    rates = list(dict.fromkeys(key.rpartition(", ")[2] for key in found))
    figure, axes = panels(len(rates), size=(12, 4.6))
    for ax, rate in zip(axes, rates, strict=True):
        for kind, (name, colour, dashes) in styles.items():
            curves = [np.convolve(c, np.ones(5) / 5, mode="valid") for c in found[f"{kind}, {rate}"]["losses"]]
            x = np.arange(len(curves[0])) + 5
            ax.plot(x, np.mean(curves, axis=0), color=colour, ls=dashes, label=name if ax is axes[0] else None)
            ax.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.2, lw=0)
        ax.set(xlabel=t("step", "步"), yscale="log", xlim=(0, None), title=rate.replace("lr", "η ="))
    axes[0].set_ylabel(t("training loss, mean of 5", "训练损失（5 步平均）"))
    figure.legend(loc="outside upper center", ncols=fit(3, 1))
    return source(
        figure,
        "claim loraga.convergence: MLP on rotated digits, AdamW, 3 seeds; bands from smallest to largest",
        "论断 loraga.convergence：MLP，旋转的手写数字，AdamW，3 个种子；色带为最小到最大",
    )


def accumulation() -> Figure:
    """Activations that are held at one time, by how many micro-batches are accumulated, and in one large batch."""
    found = figures("loraga.accumulation-memory")
    figure, axes = panels(1, size=(9, 4.4))
    styles = {
        "one batch": (t("one large batch", "一个大批次"), VERMILION, "s--"),
        "accumulating": (t("accumulated, one after the other", "逐个微批次累积"), BLUE, "o-"),
    }
    for kind, (name, colour, line) in styles.items():
        counts, held = zip(*found[kind], strict=True)
        axes.plot(counts, np.array(held) / 1e6, line, color=colour, label=name)
    axes.set(
        xlabel=t("micro-batches", "微批次数"), ylabel=t("activations, MB", "激活值，MB"), xticks=counts, ylim=(0, None)
    )
    axes.legend()
    return source(
        figure,
        "claim loraga.accumulation-memory: live arrays; each micro-batch's activations are freed by its backward",
        "论断 loraga.accumulation-memory：存活数组；每个微批次的激活值在其反向传播后即释放",
    )
