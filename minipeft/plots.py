"""One function a figure, from the same runs that the ledger reads. `minipeft figures` writes them all.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; sizes are for a projector.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import data, files
from .ledger.runs import STEPS, Run, adapt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"full": "#D55E00", 1: "#56B4E9", 2: "#0072B2", 8: "#009E73", "before": "#999999"}
STYLE = {"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "minipeft"}


def _figure(width: float, height: float, columns: int, ratios: list[float]) -> tuple[Any, Any]:
    """An empty figure with `columns` axes, drawn without a screen."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(1, columns, width_ratios=ratios)


SEEDS = range(5)


def adaptation() -> Figure:
    """A base trained on upright digits meets rotated ones: the digits, the loss of full fine-tuning and LoRA, accuracy.

    Lines and bars are means over the seeds, bands and whiskers the smallest and largest.
    """
    names = {"full": "full fine-tuning", **{r: f"LoRA, r = {r}" for r in (8, 2, 1)}}
    runs = {key: [_run(key, seed) for seed in SEEDS] for key in names}
    figure, (picture, curve, bars) = _figure(15, 4.6, 3, [0.9, 1.5, 1.5])
    _digits(picture)
    for key, name in names.items():
        smooth = [np.convolve(run.history.loss, np.ones(10) / 10, mode="valid") for run in runs[key]]
        x, dashes = np.arange(len(smooth[0])) + 10, (4, 2) if key == "full" else ()
        curve.plot(x, np.mean(smooth, axis=0), color=COLOURS[key], label=name, lw=2.5, dashes=dashes)
        curve.fill_between(x, np.min(smooth, axis=0), np.max(smooth, axis=0), color=COLOURS[key], alpha=0.25, lw=0)
    curve.set(xlabel="step", ylabel="training loss (mean of 10 steps)", yscale="log", xlim=(0, STEPS))
    curve.legend(frameon=False, fontsize=12)
    bars.barh(["base, before"], [runs["full"][0].accuracy[0]], color=COLOURS["before"])
    for key, name in names.items():
        values = [run.accuracy[1] for run in runs[key]]
        mean = float(np.mean(values))
        bars.barh([name], [mean], color=COLOURS[key], xerr=[[mean - min(values)], [max(values) - mean]], capsize=4)
    for i, mean in enumerate(
        [runs["full"][0].accuracy[0], *(np.mean([r.accuracy[1] for r in runs[k]]) for k in names)]
    ):
        bars.text(1.02, i, f"{mean:.1%}", va="center")
    bars.set(
        xlabel=f"accuracy on rotated test digits, {len(SEEDS)} seeds", xlim=(0, 1.2), xticks=[0, 0.25, 0.5, 0.75, 1]
    )
    bars.invert_yaxis()
    return figure


def _run(key: Any, seed: int) -> Run:
    return adapt("full", seed=seed) if key == "full" else adapt("lora", r=key, seed=seed)


def _digits(axes: Any) -> None:
    """A digit as the base knows it, and as it is to be adapted to."""
    task = data.digits.transfer()
    pair = [examples.x[3].reshape(8, 8) for examples in (task.original_test, task.test)]
    gap = np.full((8, 1), np.nan)
    axes.imshow(np.hstack([pair[0], gap, pair[1]]), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[3.5, 12.5], xticklabels=["pre-trained\non", "adapted\nto"], yticks=[])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


FIGURES: dict[str, Callable[[], Any]] = {"adaptation": adaptation}


def write_figures(directory: str | os.PathLike, names: list[str] | None = None) -> list[Path]:
    """Write figures (all when none is named) as SVG and PNG; returns the files.

    Raises:
        ValueError: a name that no figure has.
    """
    unknown = [name for name in names or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"figure: got {unknown[0]!r}; accepted are {', '.join(FIGURES)}")
    import matplotlib

    written = []
    for name in names or FIGURES:
        with matplotlib.rc_context(STYLE):
            figure = FIGURES[name]()
            svg, png = (Path(directory) / f"{name}.{kind}" for kind in ("svg", "png"))
            save = figure.savefig
            written.append(files.write_whole(svg, partial(save, format="svg", metadata={"Date": None})))
            written.append(files.write_whole(png, partial(save, format="png", dpi=110)))
    return written
