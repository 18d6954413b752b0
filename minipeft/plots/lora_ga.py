"""The figure of the LoRA-GA section: how the first update is aligned with the full gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import data
from ..ledger.runs import BATCH
from ..methods.lora import init_lora
from ..methods.lora_ga import alignment_bound, gradient_alignment, lora_ga_init, weight_gradients
from ..models import load_base
from ..train import classification_loss
from .style import BLUE, GREY, INK, ORANGE, fit, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 4, 8, 16)
LAYERS = ("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")


def alignment() -> Figure:
    """The cosine between the first update of the weight and the full gradient, by rank and by start values."""
    task = data.digits.transfer(dtype="float64")
    batches = data.digits.batches(*task.train, batch_size=BATCH)
    gradients = dict(weight_gradients(load_base("vit", dtype="float64"), LAYERS, [batches[0]], classification_loss))
    styles = {
        "bound": (t("the most that rank 2r allows", "秩 2r 的上界"), INK, ":", ""),
        "paper": (t("LoRA-GA, the paper's scale", "LoRA-GA（论文的缩放）"), BLUE, "-", "o"),
        "stable": (t("LoRA-GA, PEFT's “stable”", "LoRA-GA（PEFT 的 stable）"), ORANGE, (0, (5, 2)), "s"),
        "gaussian": (t("Gaussian A, B = 0", "高斯 A，B = 0"), GREY, (0, (3, 1, 1, 1)), "^"),
    }
    figure, axes = panels(2, size=(12, 4.8))
    for ax, (name, G) in zip(axes, gradients.items(), strict=True):
        for kind, (label, colour, dashes, marker) in styles.items():
            values = [_alignment(G, r, kind) for r in RANKS]
            ax.plot(RANKS, values, color=colour, ls=dashes, marker=marker, label=label if ax is axes[0] else None)
        ax.set(xscale="log", xticks=RANKS, xticklabels=RANKS, xlabel=t("rank r", "秩 r"), ylim=(0, 1.04))
        ax.set_title(f"{name.rpartition('.')[2]}, {G.shape[0]} × {G.shape[1]}")
        ax.minorticks_off()
    axes[0].set_ylabel(t("cos(first update, gradient)", "cos（第一步更新，梯度）"))
    figure.legend(loc="outside upper center", ncols=fit(2, 1))
    return source(
        figure,
        f"minipeft.methods.lora_ga.gradient_alignment: ViT, first batch of {BATCH} rotated digits; s = 1",
        f"minipeft.methods.lora_ga.gradient_alignment：ViT，旋转的手写数字的第一个批次（{BATCH} 个）；s = 1",
    )


def _alignment(G: np.ndarray, r: int, kind: str) -> float:
    if kind == "bound":
        return alignment_bound(G, r)
    if kind == "gaussian":
        return float(np.mean([gradient_alignment(G, *init_lora(*G.shape, r, "gaussian", rng, "float64"), 1.0)
                              for rng in range(5)]))  # fmt: skip
    return gradient_alignment(G, *lora_ga_init(G, r, scaling=1.0, scale=kind), 1.0)
