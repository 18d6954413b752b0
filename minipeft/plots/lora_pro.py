"""Figures of the LoRA-Pro section: the equivalent gradient as a projection, and the gap to full training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..methods.lora_pro import equivalent_gradient, lora_pro_gradients
from .evidence import figures
from .style import BLUE, GREEN, GREY, ORANGE, VERMILION, image, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def projection() -> Figure:
    """The full gradient, what LoRA-Pro's step keeps of it, what no step of A and B can reach; distances over layers."""
    rng = np.random.default_rng(3)
    A, B, g = (rng.standard_normal(shape) for shape in ((2, 16), (12, 2), (12, 16)))
    kept = equivalent_gradient(A, B, *lora_pro_gradients(A, B, B.T @ g, g @ A.T, 1.0), 1.0)
    found = figures("lorapro.optimal")
    figure, (*pictures, scatter) = panels(4, [1, 1, 1, 1.5], size=(13, 4.2))
    limit = np.abs(g).max()
    labels = ("g", "$\\tilde g = P_B\\,g + (I-P_B)\\,g\\,P_A$", "$(I-P_B)\\,g\\,(I-P_A)$")
    titles = (
        t("full gradient", "全量梯度"),
        t("= what A, B reach", "= A、B 能达到的部分"),
        t("+ what they cannot", "+ 达不到的部分"),
    )
    for ax, matrix, label, title in zip(pictures, (g, kept, g - kept), labels, titles, strict=True):
        share = 100 * (np.linalg.norm(matrix) / np.linalg.norm(g)) ** 2
        image(ax, matrix, f"{label}\n{share:.0f} %", vmin=-limit, vmax=limit, cmap="PuOr")
        ax.set_title(title)
        ax.xaxis.label.set_size(12.5)
    scatter.plot([0, 1], [0, 1], color=GREY, ls=":", lw=2)
    scatter.plot(found["lora"], found["lora_pro"], "o", color=BLUE, ms=8, alpha=0.8)
    scatter.text(0.45, 0.52, t("equal", "相等"), color=GREY, rotation=45, rotation_mode="anchor")
    scatter.set(
        xlim=(0.4, 1),
        ylim=(0.4, 1),
        aspect="equal",
        xlabel=t("LoRA, best length", "LoRA（最佳步长）"),
        ylabel="LoRA-Pro",
    )
    scatter.set_title(t("distance ‖g̃ − g‖/‖g‖", "距离 ‖g̃ − g‖/‖g‖"))
    return source(
        figure,
        "pictures: a Gaussian gradient 12×16, r = 2, share of ‖g‖²; points: claim lorapro.optimal, 30 random layers",
        "图像：12×16 的高斯梯度，r = 2，占 ‖g‖² 的比例；散点：论断 lorapro.optimal，30 个随机层",
    )


def gap() -> Figure:
    """Losses after training, each seed a point."""
    found = figures("lorapro.gap")["losses"]
    names = {
        "full training": (t("full training", "全参数训练"), VERMILION, "s"),
        "LoRA": ("LoRA", BLUE, "o"),
        "LoRA-Pro plain": (t("LoRA-Pro, plain", "LoRA-Pro（基本）"), ORANGE, "D"),
        "LoRA-Pro full": (t("LoRA-Pro, full", "LoRA-Pro（完整）"), GREEN, "^"),
    }
    figure, axes = panels(1, size=(9, 4.2))
    for i, (key, (_, colour, marker)) in enumerate(names.items()):
        axes.plot(found[key], [i] * len(found[key]), marker, color=colour, ms=12, alpha=0.8)
        mean, paper = np.mean(found[key]), {"fc": "white", "ec": "none", "pad": 1}
        axes.text(mean, i - 0.28, f"{mean:.2f}", ha="center", color=colour, bbox=paper)
    axes.axvline(np.mean(found["full training"]), color=VERMILION, ls=":", lw=2, zorder=1)
    axes.set(yticks=range(len(names)), yticklabels=[name for name, *_ in names.values()], ylim=(3.5, -0.6))
    axes.set(xlabel=t("training loss, last 10 of 60 steps", "训练损失（60 步中的最后 10 步）"), xlim=(0, None))
    return source(
        figure,
        "claim lorapro.gap: MLP on rotated digits, r = 8, AdamW, 3 seeds; numbers: means",
        "论断 lorapro.gap：MLP，旋转的手写数字，r = 8，AdamW，3 个种子；数字为平均",
    )
