"""How figures look: large type, colours that colour-blind readers can tell apart, labels in two languages.

Colours are Okabe and Ito's (2008). Where lines carry meaning, dashes or markers carry it too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LANGUAGES = ("en", "zh")
BLUE, VERMILION, GREEN, ORANGE, SKY, PINK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
GREY, INK = "#8C8C8C", "#1A1A1A"

_language: ContextVar[str] = ContextVar("language", default="en")
_layout: ContextVar[str] = ContextVar("layout", default="slide")
LAYOUTS = ("slide", "page", "phone")


def t(en: str, zh: str) -> str:
    """The label in the language that is being drawn."""
    return zh if _language.get() == "zh" else en


def fit(wide: Any, narrow: Any) -> Any:
    """`narrow` where a figure is drawn for a phone, else `wide`."""
    return narrow if _layout.get() == "phone" else wide


# --- fonts ------------------------------------------------------------------------------------------------------------

CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Microsoft YaHei",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Heiti SC", "Hiragino Sans GB", "SimHei", "Noto Serif CJK SC",
    "Songti SC", "SimSun", "Noto Sans CJK JP",
)  # fmt: skip
INSTALL = (
    "no Chinese font was found; install one (Debian, Ubuntu: apt-get install fonts-noto-cjk; Fedora: dnf install "
    "google-noto-sans-cjk-fonts), or draw with --lang en"
)


@functools.cache
def chinese_font() -> str | None:
    """The name of a font with Chinese characters, or None. Fonts installed after matplotlib's list was made count."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    found = next((name for name in CHINESE if name in known), None)
    if found:
        return found
    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        if re.search(r"cjk|han|hei|song|ming|wqy|yahei|pingfang", path, re.IGNORECASE):
            font_manager.fontManager.addfont(path)
    known = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CHINESE if name in known), None)


@contextmanager
def drawing(language: str = "en", layout: str = "slide") -> Iterator[None]:
    """Figures made and saved in this block have these labels, this look, and the same bytes every time.

    Args:
        language: "en" or "zh".
        layout: "slide": panels side by side, the source below them, text in SVG as outlines that look the same
            everywhere. "page": text that the reader's own fonts show, which needs no Chinese font here, and the source
            left to the page's caption. "phone": as "page", panels below each other.

    Raises:
        ValueError: another language; Chinese outlines are wanted and no font here has them.
    """
    if language not in LANGUAGES:
        raise ValueError(f"lang: got {language!r}; accepted are 'en' and 'zh'")
    font = chinese_font() if language == "zh" else None
    if language == "zh" and font is None and layout == "slide":
        raise ValueError(f"lang: {INSTALL}")
    import matplotlib

    look = {
        "font.family": ["DejaVu Sans", *([font] if font else [])],
        "font.size": 15,
        "axes.titlesize": 16,
        "axes.unicode_minus": font is not None or language == "en",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 1.1,
        "lines.linewidth": 2.6,
        "lines.markersize": 8,
        "legend.frameon": False,
        "legend.fontsize": 13.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "minipeft",
        "svg.fonttype": "path" if layout == "slide" else "none",
    }
    token, layout_token = _language.set(language), _layout.set(layout)
    try:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **look, "backend": "agg"}):
            yield
    finally:
        _language.reset(token)
        _layout.reset(layout_token)


# --- a figure's frame -------------------------------------------------------------------------------------------------


def panels(columns: int, ratios: Sequence[float] | None = None, size: tuple[float, float] = (11, 4.6)) -> Any:
    """An empty figure with `columns` axes side by side: (figure, axes), or (figure, the one axes).

    On a phone they stand below each other, four of them in two rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = fit(1, 2 if columns == 4 else columns)
    height = fit(size[1], 3.3 * rows + 0.9)
    figure = Figure(figsize=(fit(size[0], 5.8), height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04, hspace=0.06)
    axes = figure.subplots(rows, columns // rows, width_ratios=ratios if rows == 1 else None)
    return figure, axes if columns == 1 else axes.reshape(-1)


def source(figure: Figure, en: str, zh: str) -> Figure:
    """One grey line below the figure that says where the numbers come from, also as its label; returns the figure."""
    figure.set_label(t(en, zh))
    if _layout.get() == "slide":
        figure.supxlabel(t(en, zh), fontsize=11.5, color=GREY, x=0.01, ha="left")
    return figure


def image(axes: Any, pixels: Any, label: str = "", **options: Any) -> None:
    """A matrix as a picture, with a label below and no axes."""
    axes.imshow(pixels, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[], xlabel=label)
    for spine in axes.spines.values():
        spine.set_visible(False)


# --- bytes that do not change -----------------------------------------------------------------------------------------


def svg(figure: Figure) -> str:
    """The figure as SVG whose ids are numbers in order of appearance: the same figure gives the same text."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "minipeft"})
    return numbered(buffer.getvalue().decode())


def numbered(text: str, prefix: str = "m") -> str:
    """SVG with its ids renamed to prefix0, prefix1 …: matplotlib's follow memory addresses in some versions."""
    names = dict.fromkeys(re.findall(r'\bid="([^"]+)"', text))
    new = {name: f"{prefix}{i}" for i, name in enumerate(names)}
    pattern = re.compile(r'(\bid="|href="#|url\(#)([^")]+)')
    return pattern.sub(lambda match: match[1] + new.get(match[2], match[2]), text)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "minipeft"})
    return buffer.getvalue()
