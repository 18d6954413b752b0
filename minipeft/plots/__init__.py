"""The figures, one function each, from the same runs and the same claims' numbers as the ledger.

`minipeft figures` writes them all; `minipeft verify --html` puts them beside the claims.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from . import adalora, comparison, dora, lora, lora_ga, lora_pro, qlora
from .style import LANGUAGES, drawing, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "LANGUAGES", "check_figures", "draw_svg", "write_figures"]

FIGURES: dict[str, Callable[[], Figure]] = {
    "adaptation": comparison.adaptation,
    "spectra": lora.spectra,
    "reconstructions": lora.reconstructions,
    "initialization": lora.initialization,
    "merge": lora.merge,
    "memory": lora.memory,
    "flops": lora.flops,
    "efficiency": lora.efficiency,
    "movement": lora.movement,
    "hybrid": lora.hybrid,
    "nf4-table": qlora.nf4,
    "quantization-error": qlora.quantization_error,
    "dequantization": qlora.dequantization,
    "static-quantization": qlora.static_quantization,
    "seven-billion": qlora.seven_billion,
    "low-bits": qlora.low_bits,
    "adalora-ranks": adalora.ranks,
    "importance": adalora.importance,
    "orthogonality": adalora.orthogonality,
    "accumulation": lora_ga.accumulation,
    "alignment": lora_ga.alignment,
    "convergence": lora_ga.convergence,
    "magnitude-direction": dora.magnitude_direction,
    "projection": lora_pro.projection,
    "lora-pro-gap": lora_pro.gap,
    "methods": comparison.methods,
    "quality-memory": comparison.quality_memory,
    "update-rank": comparison.update_rank,
}


def check_figures(names: list[str] | None = None, lang: str = "en") -> list[str]:
    """The figures that `names` means (all when none is named), before any is drawn.

    Raises:
        ValueError: a name that no figure has, another language than "en" and "zh", or no font for it.
    """
    unknown = [name for name in names or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"figure: got {unknown[0]!r}; accepted are {', '.join(FIGURES)}")
    with drawing(lang):
        return list(names or FIGURES)


def write_figures(directory: str | os.PathLike, names: list[str] | None = None, lang: str = "en") -> list[Path]:
    """Write figures (all when none is named) as SVG and PNG; returns the files. Chinese ones are named NAME.zh.svg.

    Raises:
        ValueError: as `check_figures`.
    """
    written = []
    for name in check_figures(names, lang):
        with drawing(lang):
            figure = FIGURES[name]()
            text, image = svg(figure), png(figure)
        path = Path(directory) / (name if lang == "en" else f"{name}.{lang}")
        written.append(files.write_text(f"{path}.svg", text))
        written.append(files.write_whole(f"{path}.png", partial(Path.write_bytes, data=image)))
    return written


def draw_svg(name: str, lang: str = "en", layout: str = "page") -> tuple[str, str]:
    """A figure for a page that has fonts of its own: SVG with real text, and where its numbers come from.

    Args:
        layout: "page", or "phone" with the panels below each other.
    """
    with drawing(lang, layout), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # here; the reader's fonts will have it
        figure = FIGURES[name]()
        return svg(figure), figure.get_label()
