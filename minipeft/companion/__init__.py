"""The reading companion: one self-contained page with every claim, its equation, verdict, evidence, picture and code.

`minipeft verify --html FILE` writes it from the verdicts that were just found. The texts are in contents.json, the page
in page.html, page.css, page.js and widgets.html; nothing on it is fetched from anywhere.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files as resources
from pathlib import Path
from string import Template
from typing import Any

from .. import __version__, files, ledger
from ..plots import FIGURES, draw_svg, evidence
from ..plots.style import numbered
from . import sources, widgets
from .equations import mathml

VERDICTS = {  # the word in Chinese, and the class of its mark
    "confirmed": ("证实", "confirmed"),
    "confirmed within limits": ("在限定条件下成立", "within"),
    "corrected": ("更正", "corrected"),
    "measured": ("实测", "measured"),
    "failed": ("未通过", "failed"),
}
LEAD = {
    "en": "What a Chinese introduction to parameter-efficient fine-tuning says, and the papers behind it, in {count} "
    "statements that a computer can check. Here is each of them, in the document's order: the equation, what was "
    "found, and the code that found it.",
    "zh": "一份介绍参数高效微调（PEFT）的文档以及它所依据的论文中，有 {count} 条说法可以用计算来检验。"
    "这里按文档的顺序逐条列出：公式、检验结果，以及得出结果的代码。",
}


def write_page(
    path: str | os.PathLike, verdicts: Sequence[ledger.Verdict], machine: str = "", seconds: float = 0.0
) -> Path:
    """Write the companion of these verdicts, whole or not at all; returns the file.

    Args:
        machine: one line about the machine that found them.
        seconds: that it took.
    """
    return files.write_text(path, page(verdicts, machine, seconds))


def contents() -> dict[str, Any]:
    """The texts: of sections an introduction, of claims the Chinese statement, equation, figure and functions, of
    figures what they show, in Chinese."""
    return json.loads(_part("contents.json"))


def page(verdicts: Sequence[ledger.Verdict], machine: str = "", seconds: float = 0.0) -> str:
    """The companion as HTML."""
    evidence.remember(verdicts)
    texts = contents()
    sections = list(dict.fromkeys(verdict.section for verdict in verdicts))
    by_section = {name: [v for v in verdicts if v.section == name] for name in sections}
    drawn: set[str] = set()
    body = [_section(name, by_section[name], texts, drawn) for name in sections]
    counts = Counter(verdict.verdict for verdict in verdicts)
    data = json.dumps(widgets.embedded(), separators=(",", ":"), allow_nan=False)
    return Template(_part("page.html")).substitute(
        version=__version__,
        css=_part("page.css"),
        js=_part("page.js"),
        data=data.replace("</", "<\\/"),
        nav="".join(f'<a href="#{anchor(name)}">{name}</a>' for name in sections),
        lead_en=LEAD["en"].format(count=len(verdicts)),
        lead_zh=LEAD["zh"].format(count=len(verdicts)),
        tally="".join(_tally(name, counts[name]) for name in VERDICTS if counts[name]),
        seconds=f"{seconds:.0f}",
        machine=html.escape(machine),
        sections="\n".join(body),
    )


def anchor(section: str) -> str:
    """A section's id on the page: "lora-pro"."""
    return section.lower()


# --- parts of the page ------------------------------------------------------------------------------------------------


def _part(name: str) -> str:
    return (resources(__name__) / name).read_text(encoding="utf-8")


def _both(en: str, zh: str) -> str:
    """A text in both languages, of which the page shows one."""
    return f'<span lang="en">{html.escape(en)}</span><span lang="zh">{html.escape(zh)}</span>'


def _tally(verdict: str, count: int) -> str:
    zh, mark = VERDICTS[verdict]
    label = f'<b class="{mark}">{count}</b> {_both(verdict, zh)}'
    return f'<li><button type="button" aria-pressed="false" data-verdict="{mark}">{label}</button></li>'


def _section(name: str, verdicts: list[ledger.Verdict], texts: dict[str, Any], drawn: set[str]) -> str:
    about = texts["sections"][name]
    figures = [_figure(figure, drawn) for figure in about["figures"] if _has_evidence(figure, verdicts)]
    live = [_widget(widget) for widget in about["widgets"]]
    claims = [_claim(v, texts["claims"].get(v.id, {}), drawn) for v in verdicts]
    count = f'<span class="count">{_both(f"{len(verdicts)} claims", f"{len(verdicts)} 条")}</span>'
    return (
        f'<section id="{anchor(name)}" aria-labelledby="h-{anchor(name)}">'
        f'<h2 id="h-{anchor(name)}">{count}{name}</h2>'
        f'<p class="intro">{_both(about["en"], about["zh"])}</p>'
        f"{mathml(about['tex'])}{''.join(figures)}{''.join(live)}{''.join(claims)}</section>"
    )


def _has_evidence(figure: str, verdicts: Iterable[ledger.Verdict]) -> bool:
    return figure in FIGURES and any(v.verdict != "failed" for v in verdicts)


def _claim(v: ledger.Verdict, text: dict[str, Any], drawn: set[str]) -> str:
    zh, mark = VERDICTS[v.verdict]
    figure = text.get("figure", "")
    picture = ""
    if figure in FIGURES and v.verdict != "failed":
        picture = _see(figure) if figure in drawn else _figure(figure, drawn)
    return (
        f'<article class="claim" id="{v.id}" data-verdict="{mark}" aria-labelledby="s-{v.id}">'
        f'<div class="margin"><div class="verdict {mark}">{_both(v.verdict, zh)}</div>'
        f'<a class="id" href="#{v.id}">{v.id}</a></div>'
        f'<div><h3 id="s-{v.id}">{_both(v.statement, text.get("zh", v.statement))}</h3>{mathml(text.get("tex", ""))}'
        f'<p class="found"><span class="label">{_both("Found", "检验结果")}</span>'
        f"{_both(v.found, v.found_zh)}</p>"
        f"{picture}{_code(v.id, text.get('code', ()))}</div></article>"
    )


def _code(id: str, references: Iterable[str]) -> str:
    """The functions that are the equation, and the check itself, folded."""
    found = []
    for reference in references:
        try:
            found.append(sources.find(reference))
        except (ImportError, AttributeError):  # a method that this version lacks
            continue
    [claim] = ledger.claims([id]) or ledger.claims([id], full=True)
    blocks = [("The formula in code: ", "公式对应的代码：", found)] if found else []
    blocks.append(("How it is checked: ", "如何检验：", [sources.source_of(claim.check, claim.check.__name__)]))
    return "".join(_folded(_both(en, zh), group) for en, zh, group in blocks)


def _folded(title: str, group: list[sources.Source]) -> str:
    names = ", ".join(f"<code>{html.escape(s.name)}</code>" for s in group)
    return f"<details><summary>{title}{names}</summary>{''.join(map(_source, group))}</details>"


def _source(s: sources.Source) -> str:
    link = f'<a class="path" href="{s.path}#L{s.line}">{s.path}:{s.line}</a>'
    return f'{link}<pre tabindex="0"><code>{sources.highlighted(s.text)}</code></pre>'


def _widget(name: str) -> str:
    parts = dict(re.findall(r"<!-- widget (\w+) -->\n(.*?)(?=<!-- widget|\Z)", _part("widgets.html"), re.DOTALL))
    return parts[name].replace("$sizes", _sizes())


def _sizes() -> str:
    options = []
    for number in widgets.model_sizes():
        n = int(number)
        label = f"{n / 1e9:g}B" if n >= 1e9 else f"{n / 1e6:g}M"
        options.append(f'<option value="{n}"{" selected" if n == 7_000_000_000 else ""}>{label}</option>')
    return "".join(options)


# --- figures ----------------------------------------------------------------------------------------------------------

COLOURS = {  # what figures are drawn in, as the page's own colours, which follow its theme
    "#1a1a1a": "ink", "#8c8c8c": "soft", "#ffffff": "paper", "#0072b2": "blue", "#d55e00": "vermilion",
    "#009e73": "green", "#e69f00": "orange", "#56b4e9": "sky", "#cc79a7": "pink",
}  # fmt: skip


def _figure(name: str, drawn: set[str]) -> str:
    """A figure in both languages, for wide and for narrow screens, with its source as the caption."""
    drawn.add(name)
    titles = {"en": (FIGURES[name].__doc__ or name).strip().partition("\n")[0], "zh": contents()["figures"][name]}
    pictures, captions = [], {}
    for lang, title in titles.items():
        for layout in ("page", "phone"):
            svg, captions[lang] = draw_svg(name, lang, layout)
            pictures.append(inline(svg, f"{name}-{lang}-{layout}-", f'lang="{lang}" class="{layout}"', title))
    caption = f"<figcaption>{_both(captions['en'], captions['zh'])}</figcaption>"
    return f'<figure class="plotted" id="fig-{name}">{"".join(pictures)}{caption}</figure>'


def _see(name: str) -> str:
    return f'<p class="small"><a href="#fig-{name}">{_both("See the figure above", "见前面的图")}</a></p>'


def inline(svg: str, prefix: str, attributes: str, title: str) -> str:
    """A figure's SVG as part of a page: ids of its own, the page's colours and fonts, as wide as its column."""
    svg = numbered(svg[svg.index("<svg") :], prefix)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub("#[0-9a-f]{6}", lambda m: f"var(--{COLOURS[m[0]]})" if m[0] in COLOURS else m[0], svg)
    svg = re.sub(r' (?:d|x|y|points)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)  # 0.01 of a point
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    svg = re.sub(r"font: ([^;\"]*?)((?:[\d.]+px) )[^;\"]*", r"font: \1\2var(--sans)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    head = f'<svg {attributes} role="img" aria-label="{html.escape(title, quote=True)}" '
    return svg.replace("<svg ", head, 1)
