"""The ledger in the terminal: every claim with what was found, in English or in Chinese."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import companion
from .ledger import Verdict

LANGUAGES = ("en", "zh")
WIDE = 120  # columns from which the claim and its statement stand side by side
COLOURS = {
    "confirmed": "green",
    "confirmed within limits": "yellow",
    "corrected": "magenta",
    "measured": "cyan",
    "failed": "bold red",
}
HEADINGS = {
    "en": ("section", "claim", "the document says", "found", "verdict"),
    "zh": ("章节", "论断", "文档的说法", "检验结果", "判定"),
}


def check_language(lang: str) -> None:
    """Raises ValueError for another than "en" and "zh"."""
    if lang not in LANGUAGES:
        raise ValueError(f"lang: got {lang!r}; accepted are 'en' and 'zh'")


def table(verdicts: Sequence[Verdict], width: int, lang: str = "en") -> Table:
    """Section, claim, the document's statement, what was found, verdict; narrow terminals stack the first three."""
    zh, wide = lang == "zh", width >= WIDE
    statements = companion.contents()["claims"] if zh else {}
    section, claim, says, found, verdict = HEADINGS[lang]
    shown = Table(expand=True, show_lines=True)
    for name, ratio in ((section, None), (claim, None), (says, 4)) if wide else ((claim, 4),):
        shown.add_column(name, ratio=ratio, no_wrap=wide and ratio is None)
    shown.add_column(found, ratio=5)
    shown.add_column(verdict, min_width=9, max_width=12 if zh else 13)  # 在限定条件下, "within limits"
    previous = None
    for v in verdicts:
        statement = statements.get(v.id, {}).get("zh", v.statement)
        text = ChineseText if zh else Text
        first = [Text(v.section if v.section != previous else ""), Text(v.id, style="bold"), text(statement)]
        if not wide:
            first = [Group(first[1], text(f"{v.section}{'：' if zh else ': '}{statement}"))]
        word = text(verdict_word(v.verdict, lang), style=COLOURS.get(v.verdict, ""))
        shown.add_row(*first, text(v.found_zh if zh else v.found), word)
        previous = v.section
    return shown


def summary(verdicts: Sequence[Verdict], seconds: float, lang: str = "en") -> Text:
    """How many claims there are and of each verdict, and the time that they took."""
    counts = Counter(v.verdict for v in verdicts)
    seen = [name for name in COLOURS if counts[name]]
    if lang == "zh":
        words = [Text(f"{verdict_word(name, lang)} {counts[name]}", style=COLOURS[name]) for name in seen]
        return Text(f"{len(verdicts)} 条论断：").append(Text("，").join([*words, Text(f"用时 {seconds:.1f} 秒")]))
    claims = Text(f"{len(verdicts)} claim{'s' * (len(verdicts) != 1)}")
    words = [Text(f"{counts[name]} {name}", style=COLOURS[name]) for name in seen]
    return Text(", ").join([claims, *words, Text(f"{seconds:.1f} s")])


def verdict_word(verdict: str, lang: str) -> str:
    """The verdict in the language."""
    return companion.VERDICTS[verdict][0] if lang == "zh" else verdict


# --- lines of Chinese -------------------------------------------------------------------------------------------------

OPENING, CLOSING, CHARACTERS = "（“《", "，。；：、）”》—…", "\u3400-\u9fff"
WORD = rf"[^\s{OPENING}{CLOSING}{CHARACTERS}]+"
UNIT = re.compile(  # what no line may break: a character or a word, or "r = 8", with the marks that belong to it
    rf"(?=.)[{OPENING}]*(?:[{CHARACTERS}]|{WORD}(?: [=×±÷≤] {WORD})*)?[{CLOSING}]*\s*", re.DOTALL
)


def wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` terminal cells.

    Chinese has no spaces: rich would break only where there is one, and leave half of the lines empty.
    """
    lines = [""]
    for unit in UNIT.findall(text):
        if lines[-1] and cell_len(lines[-1] + unit.rstrip()) > width:
            lines.append("")
        *folded, rest = chop_cells(unit, width) if cell_len(unit.rstrip()) > width else [unit]
        lines[-1:] = [*folded, rest] if folded else [lines[-1] + rest]
    return [line.rstrip() for line in lines]


class ChineseText:
    """Text whose lines end where Chinese lines may."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text, self.style = text, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(wrap(self.text, options.max_width)), style=self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(2, cell_len(self.text))  # from one character in a line to one line
