"""Figures that put all methods side by side: loss curves, quality against memory, the rank of what was learned."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import data, rank
from ..ledger.runs import STEPS, Run, adapt, weight_updates
from ..measure import memory_report
from ..peft import PeftModel
from ..recipes import METHODS
from .style import BLUE, GREEN, GREY, INK, ORANGE, PINK, SKY, VERMILION, fit, image, panels, source, t

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = range(3)
STYLES = {  # colour, dashes, marker: distinct without colour too
    "full": (VERMILION, (0, (6, 2)), "s"),
    "lora": (BLUE, "-", "o"),
    "rslora": (SKY, (0, (1, 1)), "v"),
    "qlora": (ORANGE, (0, (5, 1, 1, 1)), "P"),
    "dora": (GREEN, (0, (3, 1.5)), "^"),
    "qdora": (GREEN, (0, (1, 2)), "<"),
    "adalora": (PINK, (0, (8, 2, 2, 2)), "X"),
    "lora-ga": (INK, (0, (2, 1)), "D"),
    "lora-pro": (GREY, (0, (4, 1, 1, 1, 1, 1)), "*"),
    "lora-pro-full": (VERMILION, (0, (5, 1.5, 1, 1.5)), "H"),
    "pissa": (PINK, (0, (1, 1)), "h"),
    "loftq": (ORANGE, (0, (1, 1)), "p"),
    "full-then-lora": (VERMILION, (0, (1, 1)), "d"),
    "adapter": (SKY, (0, (6, 2)), ">"),
    "p-tuning": (GREY, (0, (1, 2)), "x"),
}
NAMES = {
    "full": ("full", "全参数微调"),
    "full-then-lora": ("full, then LoRA", "先全参数后 LoRA"),
    "lora-pro-full": ("LoRA-Pro, full", "LoRA-Pro（完整）"),
}
SPELLED = {"lora": "LoRA", "rslora": "rsLoRA", "qlora": "QLoRA", "dora": "DoRA", "qdora": "QDoRA", "adalora": "AdaLoRA"}
SPELLED |= {
    "lora-ga": "LoRA-GA",
    "lora-pro": "LoRA-Pro",
    "pissa": "PiSSA",
    "loftq": "LoftQ",
    "adapter": "Adapter",
    "p-tuning": "P-Tuning",
}


def name_of(method: str) -> str:
    """How the method is written."""
    return t(*NAMES[method]) if method in NAMES else SPELLED.get(method, method)


def smoothed(run: Run, width: int = 10) -> np.ndarray:
    """Means of `width` neighbouring losses."""
    return np.convolve(run.history.loss, np.ones(width) / width, mode="valid")


def adaptation() -> Figure:
    """A base trained on upright digits meets rotated ones: the digits, the loss of full fine-tuning and LoRA, accuracy.

    Lines and bars are means over the seeds, bands and whiskers the smallest and largest.
    """
    full, lora = t("full", "全参数微调"), t("LoRA, r = {}", "LoRA，r = {}")
    rows = {full: ("full", 8, VERMILION, (0, (5, 2)))}
    rows |= {lora.format(r): ("lora", r, c, d) for r, c, d in ((8, GREEN, "-"), (2, BLUE, (0, (3, 1))), (1, SKY, "-."))}
    runs = {name: [adapt(m, r=r, seed=seed) for seed in SEEDS] for name, (m, r, *_) in rows.items()}
    figure, (picture, curve, bars) = panels(3, [0.8, 1.5, 1.4], size=(14, 4.6))
    _digits(picture)
    for name, (_, _, colour, dashes) in rows.items():
        _band(curve, [smoothed(run) for run in runs[name]], colour, dashes, name)
    curve.set(
        xlabel=t("step", "步"),
        ylabel=t("training loss, mean of 10", "训练损失（10 步平均）"),
        yscale="log",
        xlim=(0, STEPS),
    )
    curve.legend()
    before = 100 * runs[full][0].accuracy[0]
    reached = {name: [100 * run.accuracy[1] for run in found] for name, found in runs.items()}
    reached = {t("before", "微调前"): [before], **reached}
    for i, (name, values) in enumerate(reached.items()):
        mean = float(np.mean(values))
        colour = rows[name][2] if name in rows else GREY
        bars.barh([i], [mean], color=colour, xerr=[[mean - min(values)], [max(values) - mean]], capsize=4)
        bars.text(103, i, f"{mean:.1f}", va="center")
    bars.set(yticks=range(len(reached)), yticklabels=list(reached), xlim=(0, 120), xticks=[0, 25, 50, 75, 100])
    bars.set_xlabel(t("accuracy on rotated test digits, %", "旋转测试集准确率，%"))
    bars.invert_yaxis()
    bars.tick_params(axis="y", length=0)
    return source(
        figure,
        f"ViT pre-trained on upright digits, adapted to rotated ones; AdamW, {len(SEEDS)} seeds, bands: their range",
        f"在正立数字上预训练的 ViT，适配旋转的数字；AdamW，{len(SEEDS)} 个种子，色带为最小到最大",
    )


def _band(axes: Any, curves: list[np.ndarray], colour: str, dashes: Any, name: str) -> None:
    x = np.arange(len(curves[0])) + STEPS - len(curves[0]) + 1
    axes.plot(x, np.mean(curves, axis=0), color=colour, ls=dashes, label=name)
    few = slice(None, None, 4)  # corners of the band: more make a large file and no other picture
    axes.fill_between(x[few], np.min(curves, axis=0)[few], np.max(curves, axis=0)[few], color=colour, alpha=0.2, lw=0)


def _digits(axes: Any) -> None:
    """A digit as the base knows it, above the same as it is to be adapted to."""
    task = data.digits.transfer()
    upright, rotated = (examples.x[3].reshape(8, 8) for examples in (task.original_test, task.test))
    gap = np.full((2, 8), np.nan)
    image(axes, np.vstack([upright, gap, rotated]), cmap="gray_r", vmin=0, vmax=1)
    axes.set(yticks=[3.5, 13.5], yticklabels=[t("pre-trained\non", "预训练"), t("adapted\nto", "适配到")])
    axes.tick_params(length=0)


# --- all methods ------------------------------------------------------------------------------------------------------


@functools.cache
def _runs(method: str) -> list[Run]:
    """The MLP adapted by one method: quick, and the rank of the update counts there."""
    return [adapt(method, "mlp", seed=seed) for seed in SEEDS]


PANELS = {  # no panel with more lines than can be told apart; LoRA is in both, as the one to compare with
    ("LoRA and its variants", "LoRA 及其变体"): [
        "lora", "rslora", "dora", "adalora", "lora-ga", "lora-pro", "lora-pro-full", "pissa",
    ],
    ("other methods", "其他方法"): ["lora", "full", "full-then-lora", "qlora", "qdora", "loftq", "adapter"],
}  # fmt: skip


def _compared() -> list[str]:
    """All methods but P-Tuning: an MLP has no place for virtual tokens."""
    return [method for method in STYLES if method in METHODS and method != "p-tuning"]


def methods() -> Figure:
    """The loss of every method, means and spread over seeds, and the accuracy reached."""
    figure, (*curves, points) = panels(3, [1.2, 1.2, 1], size=(15, 6.2))
    for ax, (title, shown) in zip(curves, PANELS.items(), strict=True):
        for method in shown:
            colour, dashes, _ = STYLES[method]
            _band(ax, [smoothed(run) for run in _runs(method)], colour, dashes, name_of(method))
        ax.set(title=t(*title), xlabel=t("step", "步"), yscale="log", xlim=(0, STEPS), ylim=(0.008, 90))
        ax.legend(ncols=2, fontsize=12, loc="upper right")
    curves[0].set_ylabel(t("training loss, mean of 10", "训练损失（10 步平均）"))
    for i, method in enumerate(_compared()):
        colour, _, marker = STYLES[method]
        reached = [100 * run.accuracy[1] for run in _runs(method)]
        points.plot(reached, [i] * len(reached), marker, color=colour, ms=8, mew=1.5, alpha=0.5)
        points.plot(np.mean(reached), i, "|", color=colour, ms=18, mew=3)
    points.set(yticks=range(len(_compared())), yticklabels=[name_of(method) for method in _compared()])
    points.tick_params(axis="y", labelsize=fit(13, 10))
    points.set_xlabel(t("test accuracy, %", "测试准确率，%"))
    points.invert_yaxis()
    return source(
        figure,
        f"MLP on rotated digits, r = 8, AdamW, each method's own learning rate, {len(SEEDS)} seeds; bar: mean",
        f"MLP，旋转的手写数字，r = 8，AdamW，各方法用各自的学习率，{len(SEEDS)} 个种子；竖线为平均",
    )


def training_bytes(run: Run) -> int:
    """What stays between steps: weights as they are stored, gradient and AdamW's two states of what trains, and what
    the method carries (LoRA-Pro's full form: the moments of the whole weights' gradients)."""
    trained = sum(p.data.nbytes for p in run.model.parameters() if p.requires_grad)
    carried = run.model.method.state_dict().values() if isinstance(run.model, PeftModel) else ()
    return memory_report(run.model).weights + 3 * trained + sum(np.asarray(state).nbytes for state in carried)


def quality_memory() -> Figure:
    """Accuracy against bytes: all methods at r = 8, LoRA at smaller ranks too."""
    figure, axes = panels(1, size=(10, 5))
    for r in (1, 2, 4):
        _point(axes, [adapt("lora", "mlp", r=r, seed=seed) for seed in SEEDS], "lora", f"r = {r}")
    for method in _compared():
        _point(axes, _runs(method), method)
    axes.set(xlabel=t("weights, gradients and optimizer state, kB", "权重、梯度与优化器状态，kB"), xlim=(0, None))
    axes.set_ylabel(t("test accuracy, %", "测试准确率，%"))
    axes.legend(loc="lower right", ncols=fit(3, 2), fontsize=fit(12.5, 9))
    return source(
        figure,
        f"MLP on rotated digits, float32, AdamW, r = 8 where nothing else is said; {len(SEEDS)} seeds, whiskers: range",
        f"MLP，旋转的手写数字，float32，AdamW，未注明处 r = 8；{len(SEEDS)} 个种子，须线为范围",
    )


def _point(axes: Any, runs: list[Run], method: str, label: str = "") -> None:
    colour, _, marker = STYLES[method]
    dearest = _runs("full") if method == "full-then-lora" else runs  # its first phase is full training
    added, reached = training_bytes(dearest[0]) / 1e3, [100 * run.accuracy[1] for run in runs]
    mean = float(np.mean(reached))
    spread = [[mean - min(reached)], [max(reached) - mean]]
    name = None if label else name_of(method)
    axes.errorbar(added, mean, spread, fmt=marker, color=colour, ms=11, mew=2, capsize=4, lw=2, label=name)
    if label:
        axes.annotate(label, (added, mean), (12, -5), textcoords="offset points", fontsize=12.5)


def update_rank() -> Figure:
    """The singular values of what each method learned in one layer, and their effective rank."""
    figure, (values, ranks) = panels(2, [1.3, 1])
    shown = [m for m in _compared() if m in ("full", "lora", "dora", "lora-pro", "adalora", "lora-ga")]
    for i, method in enumerate(shown):
        colour, dashes, marker = STYLES[method]
        delta = np.asarray(weight_updates(_runs(method)[0])["fc1"][1], "float64")
        S = rank.singular_values(delta)
        S = S[S[0] * 1e-6 < S]
        values.plot(np.arange(1, len(S) + 1), S / S[0], color=colour, ls=dashes, label=name_of(method))
        ranks.plot(rank.effective_rank(delta), i, marker, color=colour, ms=12)
        ranks.text(rank.effective_rank(delta), i - 0.22, f"{rank.effective_rank(delta):.1f}", ha="center", fontsize=13)
    values.set(xlabel=t("index i", "序号 i"), ylabel=t("Sᵢ/S₁ of ΔW", "ΔW 的 Sᵢ/S₁"), xlim=(0, 32), ylim=(0, 1.02))
    values.legend()
    ranks.set(yticks=range(len(shown)), yticklabels=[name_of(m) for m in shown], ylim=(len(shown) - 0.5, -0.7))
    ranks.set(xlabel=t("effective rank of ΔW", "ΔW 的有效秩"), xlim=(0, None))
    return source(
        figure,
        "MLP fc1 (128×64) after 200 steps on rotated digits, r = 8; effective rank: Roy and Vetterli 2007",
        "MLP fc1（128×64），旋转的手写数字训练 200 步后，r = 8；有效秩：Roy 与 Vetterli 2007",
    )
