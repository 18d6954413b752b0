"""Figures of the AdaLoRA section: ranks over time, what scores are worth, how orthogonal the factors stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .evidence import figures
from .style import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, fit, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEEPING = {  # what keeps P and Q orthogonal
    "Gram–Schmidt": (("Gram–Schmidt", "Gram–Schmidt 投影"), BLUE, "-"),
    "penalty": (("penalty (paper)", "惩罚项（论文）"), ORANGE, (0, (5, 2))),
    "neither": (("neither", "都不用"), GREY, (0, (1, 1))),
}


def ranks() -> Figure:
    """The rank of each module as the budget falls, against the rank that was planted there."""
    found = figures("adalora.reallocate")
    names = {
        "English–French": (t("English–French", "英–法"), VERMILION, "-", 1.6),
        "English–German": (t("English–German", "英–德"), GREEN, (0, (5, 2)), 0.8),
        "English–Russian": (t("English–Russian", "英–俄"), ORANGE, (0, (3, 1, 1, 1)), 0),
        "English–Icelandic": (t("English–Icelandic", "英–冰岛语"), BLUE, (0, (1, 1)), 0),
    }
    figure, axes = panels(2, size=(11.5, 4.8))
    for ax, keeping in zip(axes, ("Gram–Schmidt", "penalty"), strict=True):
        record = found["record"][keeping]
        steps = [step for step, _ in record]
        for module, (name, colour, dashes, _) in names.items():
            values = [by_module[module] for _, by_module in record]
            ax.step(steps, values, where="post", color=colour, ls=dashes, label=name if ax is axes[0] else None)
            ax.plot(steps[-1] + 6, found["planted"][module], "<", color=colour, ms=11, clip_on=False)
        ax.set(xlabel=t("step", "步"), ylim=(0, 12.6), yticks=[0, 3, 6, 9, 12], title=t(*KEEPING[keeping][0]))
    axes[0].set_ylabel(t("rank of the module", "模块的秩"))
    figure.legend(loc="outside upper center", ncols=fit(4, 2))
    return source(
        figure,
        "claim adalora.reallocate: four modules that need ranks 12, 6, 3, 3 (triangles); all start with 12",
        "论断 adalora.reallocate：四个模块实际需要的秩为 12、6、3、3（三角标记）；均从 12 开始",
    )


def importance() -> Figure:
    """The loss when the least important directions are taken away, by the score that says which they are."""
    seeds = figures("adalora.importance")["seeds"]
    styles = {
        "at random": (t("at random", "随机"), GREY, "x:"),
        "magnitude": (t("the document's score", "文档的评分"), VERMILION, "s--"),
        "sensitivity": (t("the paper's score", "论文的评分"), BLUE, "o-"),
        "cost": (t("what removal costs", "逐个移除的真实代价"), INK, "^-."),
    }
    figure, axes = panels(1, size=(9, 4.6))
    for key, (name, colour, line) in styles.items():
        losses = np.mean([seed["pruned"][key] for seed in seeds], axis=0)
        shares = 100 * np.arange(len(losses)) / len(losses)
        axes.plot(shares, losses, line, color=colour, label=name)
    axes.set(
        xlabel=t("directions pruned, %", "裁剪的方向，%"),
        ylabel=t("training loss", "训练损失"),
        yscale="log",
        xticks=shares,
    )
    axes.legend()
    return source(
        figure,
        f"claim adalora.importance: MLP on rotated digits, 24 directions, no training after it, {len(seeds)} seeds",
        f"论断 adalora.importance：MLP，旋转的手写数字，24 个方向，裁剪后不再训练，{len(seeds)} 个种子",
    )


def orthogonality() -> Figure:
    """How far P is from orthogonal along training, by what keeps it so."""
    found = figures("adalora.orthogonal")["distances"]
    figure, axes = panels(1, size=(9, 4.4))
    for key, (name, colour, dashes) in KEEPING.items():
        if key not in found:
            continue
        curves = np.array(found[key])
        steps = 10 * np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.mean(axis=0), color=colour, ls=dashes, label=t(*name))
    axes.set(xlabel=t("step", "步"), ylabel="$\\|P^\\top P - I\\|_F$", yscale="log")
    figure.legend(loc="outside upper center", ncols=fit(3, 2))
    return source(
        figure,
        "claim adalora.orthogonal: the largest over all modules, mean over seeds",
        "论断 adalora.orthogonal：各模块中的最大值，对种子取平均",
    )
