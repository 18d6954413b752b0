"""The figure of `minipeft compare`: loss curves with their spread, and quality against memory."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import files
from .comparison import PANELS, STYLES, name_of
from .style import INK, drawing, fit, panels, png, source, svg, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR = 15  # points below the middle one's accuracy
LABELS = {
    "accuracy": ("test accuracy, %", "测试准确率，%"),
    "named": ("held-out questions answered with the new name, %", "用新名字回答的未见问题，%"),
}


def write_comparison(directory: str | os.PathLike, report: dict[str, Any], lang: str = "en") -> list[Path]:
    """Draw a report of `minipeft compare` (compare.json) as compare.svg and compare.png, or compare.zh.….

    Raises:
        ValueError: another language than "en" and "zh", or no font for it.
    """
    with drawing(lang):
        figure = comparison(report)
        text, image = svg(figure), png(figure)
    path = Path(directory) / ("compare" if lang == "en" else f"compare.{lang}")
    return [
        files.write_text(f"{path}.svg", text),
        files.write_whole(f"{path}.png", partial(Path.write_bytes, data=image)),
    ]


def comparison(report: dict[str, Any]) -> Figure:
    """Losses in two panels, so that lines can be told apart, and the first metric against a step's peak of bytes."""
    found = {method: row for method, row in report["methods"].items() if "loss" in row}
    first, second = PANELS.values()
    groups = dict(zip(PANELS, (list(first), [*second, *(m for m in found if m not in (*first, *second))]), strict=True))
    figure, (*curves, points) = panels(3, [1.1, 1.1, 1.2], size=(18, 6))
    for ax, (title, methods) in zip(curves, groups.items(), strict=True):
        _curves(ax, {method: found[method] for method in methods if method in found}, report["curve_steps"])
        ax.set(title=t(*title), xlabel=t("step", "步"), yscale="log", xlim=(0, report["setting"]["steps"]))
        if report["target_loss"] is not None:
            ax.axhline(report["target_loss"], color=INK, lw=0.9, ls=":")
    if found:
        low = min(min(row["curve"]["low"]) for row in found.values())
        high = max(max(row["curve"]["high"][:1]) for row in found.values())
        for ax in curves:
            ax.set_ylim(max(low, high * 1e-5) * 0.8, high * 8)  # room for the legend
    curves[0].set_ylabel(t("training loss, smoothed", "训练损失（平滑）"))
    _quality(points, found, report["metrics"][0])
    setting, seeds = report["setting"], report["seeds"]
    what = f"{setting['base']}, {setting['shift'] if setting['task'] == 'digits' else setting['task']}"
    chosen = (
        ("chosen on validation data", "在验证集上选取") if report["swept"] else ("its recipe's", "取各方法的默认值")
    )
    return source(
        figure,
        f"minipeft compare: {what}, parameters matched to LoRA r = 8, each method's learning rate {chosen[0]}; "
        f"{seeds} seeds, bands and whiskers: range",
        f"minipeft compare：{what}，可训练参数与 LoRA r = 8 相当，学习率{chosen[1]}；{seeds} 个种子，色带与须线为范围",
    )


def _style(method: str) -> tuple[str, Any, str]:
    return STYLES.get(method, (INK, (0, (1, 1)), "8"))


def _curves(axes: Any, rows: dict[str, Any], steps: list[int]) -> None:
    for method, row in rows.items():
        colour, dashes, _ = _style(method)
        axes.plot(steps, row["curve"]["mean"], color=colour, ls=dashes, label=name_of(method))
        axes.fill_between(steps, row["curve"]["low"], row["curve"]["high"], color=colour, alpha=0.15, lw=0)
    if rows:
        axes.legend(ncols=2, fontsize=fit(11.5, 9), loc="upper right")


def _quality(axes: Any, rows: dict[str, Any], metric: str) -> None:
    """One point a method, whiskers over seeds; names beside the axes, since points lie close together.

    Methods far below the middle one stand at the lower edge with their value, so that the others can be told apart.
    """
    rows = {method: row for method, row in rows.items() if row["bytes"]}
    if not rows:
        return
    size, unit = (2**20, "MiB") if max(row["bytes"]["peak"] for row in rows.values()) >= 1 << 20 else (2**10, "KiB")
    means = {method: 100 * row[metric]["mean"] for method, row in rows.items()}
    near = [method for method in rows if means[method] >= np.median(list(means.values())) - FAR]
    lowest = min(min(rows[method][metric]["values"]) for method in near) * 100
    edge = lowest - 0.12 * (max(means.values()) - lowest) - 0.1
    for method, row in rows.items():
        colour, _, marker = _style(method)
        x, mean, values = row["bytes"]["peak"] / size, means[method], [100 * value for value in row[metric]["values"]]
        y = mean if method in near else edge
        spread = [[mean - min(values)], [max(values) - mean]] if method in near else None
        style = {"fmt": marker, "color": colour, "ms": 10, "mew": 1.6, "capsize": 3, "lw": 1.6}
        axes.errorbar(x, y, spread, **style, label=name_of(method))
        if method not in near:
            axes.annotate(f"{mean:.1f} ↓", (x, y), (9, -5), textcoords="offset points", fontsize=fit(12, 9))
    axes.set(xlabel=t(f"peak of a training step, {unit}", f"训练一步的内存峰值，{unit}"), ylabel=t(*LABELS[metric]))
    axes.legend(fontsize=fit(11.5, 8.5), loc="center left", bbox_to_anchor=(1.0, 0.5))
