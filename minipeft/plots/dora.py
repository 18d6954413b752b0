"""The figure of the DoRA section: how magnitudes and directions move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .evidence import figures
from .style import BLUE, GREEN, VERMILION, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def magnitude_direction() -> Figure:
    """ΔM against ΔD, a point for each projection, after full fine-tuning, LoRA and DoRA."""
    found = figures("dora.decoupled")
    styles = {
        "full": (t("full fine-tuning", "全参数微调"), VERMILION, "s"),
        "LoRA": ("LoRA", BLUE, "o"),
        "DoRA": ("DoRA", GREEN, "^"),
    }
    figure, axes = panels(3, size=(12, 4.4))
    for ax, (kind, (name, colour, marker)) in zip(axes, styles.items(), strict=True):
        magnitude, direction = np.array(found["moves"][kind]).T
        ax.plot(direction, magnitude, marker, color=colour, ms=10, alpha=0.85)
        slope, start = np.polyfit(direction, magnitude, 1)
        ends = np.array([direction.min(), direction.max()])
        ax.plot(ends, slope * ends + start, color=colour, lw=2, ls="--")
        ax.set_title(
            f"{name}\n" + t("correlation", "相关系数") + f" {found['correlation'][kind]:+.2f}".replace("-", "−")
        )
        ax.set_xlabel(t("change of direction ΔD", "方向变化 ΔD"))
        ax.locator_params(nbins=4)
    axes[0].set_ylabel(t("change of magnitude ΔM", "幅度变化 ΔM"))
    return source(
        figure,
        "claim dora.decoupled: twelve projections of the ViT trained on rotated digits; as Liu et al. 2024, figure 2",
        "论断 dora.decoupled：ViT 的十二个投影矩阵，在旋转的手写数字上训练后；对照 Liu 等 2024，图 2",
    )
