"""What the notebooks show: a function's source, the ledger's verdicts, a figure, a figure with sliders.

Nothing here needs Jupyter to be imported: what is returned knows how to show itself, and prints as text elsewhere.
"""

from __future__ import annotations

import html
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import companion, ledger
from .plots import FIGURES, check_figures
from .plots.style import drawing, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STILL = "MINIPEFT_STILL"  # set: no sliders, as where ipywidgets is not installed; for outputs that are kept


# --- source -----------------------------------------------------------------------------------------------------------


class Source:
    """Python code that shows itself with colours."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return f"```python\n{self.text}\n```"

    def __repr__(self) -> str:
        return self.text


def source(*objects: Any) -> Source:
    """The source of functions, classes or methods as it stands in the package, each below the name of its file.

    Raises:
        TypeError: something that has no Python source, such as a built-in.
    """
    root, parts = Path(__file__).parent.parent, []
    for one in objects:
        file = Path(inspect.getsourcefile(one) or "")
        where = f"# {file.relative_to(root).as_posix()}\n" if file.is_relative_to(root) else ""
        parts.append(where + inspect.getsource(one).rstrip())
    return Source("\n\n\n".join(parts))


# --- verdicts ---------------------------------------------------------------------------------------------------------

MARKS = {  # a sign, and a colour that reads on white and on black
    "confirmed": ("✓", "#009E73"),
    "confirmed within limits": ("✓", "#2E86C1"),
    "corrected": ("✎", "#D55E00"),
    "measured": ("∿", "#8C8C8C"),
    "failed": ("✗", "#CC3311"),
}


class Verdicts(list[ledger.Verdict]):
    """Verdicts that show themselves as a table."""

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;padding:.5em .8em"
        rows, statements = [], companion.contents()["claims"]
        for v in self:
            sign, colour = MARKS[v.verdict]
            verdict = f"<b style='color:{colour}'>{sign}&nbsp;{v.verdict}<br>{companion.VERDICTS[v.verdict][0]}</b>"
            claim = f"<code>{v.id}</code><br>{_both(v.statement, statements.get(v.id, {}).get('zh', ''))}"
            cells = (claim, verdict, _both(v.found, v.found_zh))
            rows.append("<tr>" + "".join(f"<td style='{cell}'>{text}</td>" for text in cells) + "</tr>")
        names = ("the statement · 说法", "verdict · 判定", "what was found here · 本机结果")
        head = "".join(f"<th style='{cell}'>{name}</th>" for name in names)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

    def __repr__(self) -> str:
        return "\n".join(f"{v.id}: {v.verdict}. {v.found}" for v in self)


def _both(en: str, zh: str) -> str:
    """A text in English, and below it in Chinese."""
    return f"{html.escape(en)}<br><span lang='zh'>{html.escape(zh)}</span>"


def verdicts(*names: str, full: bool = False) -> Verdicts:
    """Judge claims now: of sections ("DoRA") or single ones ("lora.merge"); `full` adds those of the language model.

    Raises:
        ValueError: a name that is neither.
    """
    return Verdicts(ledger.run(names, full))


# --- pictures ---------------------------------------------------------------------------------------------------------


class Picture:
    """A drawn figure, as PNG."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name

    def _repr_png_(self) -> bytes:
        return self.data

    def __repr__(self) -> str:
        return f"<picture {self.name}>"


def picture(draw: Callable[..., Figure], lang: str = "en", **values: Any) -> Picture:
    """What `draw(**values)` draws, in the look of the project's figures, with labels in "en" or "zh"."""
    with drawing(lang):
        return Picture(png(draw(**values), dpi=80), draw.__name__)


def figure(name: str, lang: str = "en") -> Picture:
    """One of the project's own figures (`minipeft figures`), drawn now.

    Raises:
        ValueError: a name that no figure has, another language, or no font for it.
    """
    [name] = check_figures([name], lang)
    return picture(FIGURES[name], lang)


def explore(draw: Callable[..., Figure], lang: str = "en", **choices: Iterable[Any]) -> Any:
    """The picture of `draw` with a slider for each argument; without ipywidgets, the picture of its defaults.

    Args:
        choices: the values of each argument. `draw`'s own default is where its slider starts.

    Raises:
        ValueError: an argument that `draw` has not, or whose default is not among its choices.
    """
    options = {name: list(values) for name, values in choices.items()}
    start = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
    for name, values in options.items():
        if name not in start or start[name] not in values:
            raise ValueError(f"{name}: {draw.__name__}() must have it, with a default among {values}")
    widgets = None if os.environ.get(STILL) else _widgets()
    if widgets is None:
        return picture(draw, lang)
    from IPython.display import display

    sliders = {
        name: widgets.SelectionSlider(options=values, value=start[name], description=name, continuous_update=False)
        for name, values in options.items()
    }
    return widgets.interactive(lambda **values: display(picture(draw, lang, **values)), **sliders)


def _widgets() -> Any:
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets
