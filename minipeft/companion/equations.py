"""Equations as MathML, which browsers show without a library, from the little of TeX that the contents use.

Known: letters and numbers, ^ _ { }, \\frac \\norm \\op \\text \\bar \\tilde \\left \\right, spaces, and the symbols in
`SYMBOLS`. Anything else is an error here rather than a gap on the page.
"""

from __future__ import annotations

import html
import re

SYMBOLS = {
    "alpha": "α", "beta": "β", "eta": "η", "lambda": "λ", "Lambda": "Λ", "Delta": "Δ", "Phi": "Φ", "nabla": "∇",
    "R": "ℝ", "infty": "∞", "sum": "∑", "min": "min", "max": "max", "exp": "exp", "ln": "ln", "cos": "cos",
    "in": "∈", "le": "≤", "ge": "≥", "ll": "≪", "approx": "≈", "leftarrow": "←", "Rightarrow": "⇒", "cdot": "·",
    "times": "×",
    "odot": "⊙", "top": "⊤", "ldots": "…", "langle": "⟨", "rangle": "⟩",
}  # fmt: skip
NAMED = {"min", "max", "exp", "ln", "cos"}  # upright words
LIMITS = {"sum", "min", "max"}  # their subscript stands below
IDENTIFIERS = {"alpha", "beta", "eta", "lambda", "Lambda", "Delta", "Phi", "R", "infty", "nabla", "top", "ldots"}
SPACES = {",": "0.17em", ";": "0.28em"}
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_]|\d+(?:\.\d+)?|.")


def mathml(tex: str) -> str:
    """A displayed equation, each part between \\quad a formula of its own so that lines can break; "" for an empty one.

    Raises:
        ValueError: a command that is not known, or braces that do not match.
    """
    if not tex:
        return ""
    tex = re.sub(r"\\text\{([^}]*)\}", lambda match: match[0].replace(" ", "\u00a0"), tex)
    formulas = map(_formula, tex.split(r"\quad"))
    return f'<div class="equation">{"".join(formulas)}</div>'


def _formula(tex: str) -> str:
    tokens = [token for token in TOKEN.findall(tex) if token != " "]
    parts, rest = _row(tokens, 0)
    if rest < len(tokens):
        raise ValueError(f"tex: a brace too many in {tex!r}")
    return f'<math display="block"><mrow>{parts}</mrow></math>'


def _row(tokens: list[str], i: int) -> tuple[str, int]:
    """What follows up to the closing brace or the end, and where that is."""
    parts = []
    while i < len(tokens) and tokens[i] != "}":
        part, i = _scripted(tokens, i)
        parts.append(part)
    return "".join(parts), i


def _scripted(tokens: list[str], i: int) -> tuple[str, int]:
    """An atom with its subscript and superscript."""
    limits = tokens[i].lstrip("\\") in LIMITS
    atom, i = _atom(tokens, i)
    scripts: dict[str, str] = {}
    if tokens[i : i + 1] == ["'"]:
        atom, i = f'<msup>{atom}<mo lspace="0" rspace="0">′</mo></msup>', i + 1
    while i < len(tokens) and tokens[i] in "^_":
        scripts[tokens[i]], i = _argument(tokens, i + 1)
    if len(scripts) == 2:
        return f"<msubsup>{atom}{scripts['_']}{scripts['^']}</msubsup>", i
    if "_" in scripts:
        tag = "munder" if limits else "msub"
        return f"<{tag}>{atom}{scripts['_']}</{tag}>", i
    return (f"<msup>{atom}{scripts['^']}</msup>" if scripts else atom), i


def _argument(tokens: list[str], i: int) -> tuple[str, int]:
    """A group in braces, or one atom. Words (4bit, LoRA) are set upright."""
    if i >= len(tokens):
        raise ValueError("tex: an argument is missing")
    if tokens[i] != "{":
        return _atom(tokens, i)
    word, end = _verbatim(tokens, i)
    if re.fullmatch(r"\d*[A-Za-z]{2,}", word):
        return f"<mtext>{word}</mtext>", end
    inside, i = _row(tokens, i + 1)
    if i >= len(tokens):
        raise ValueError("tex: a brace is not closed")
    return f"<mrow>{inside}</mrow>", i + 1


def _verbatim(tokens: list[str], i: int) -> tuple[str, int]:
    """The tokens in a group as they are, and where the group has ended."""
    if "}" not in tokens[i:]:
        raise ValueError("tex: a brace is not closed")
    end = tokens.index("}", i)
    return "".join(tokens[i + 1 : end]), end + 1


def _atom(tokens: list[str], i: int) -> tuple[str, int]:
    token = tokens[i]
    if token.startswith("\\"):
        return _command(tokens, i, token[1:])
    if token == "{":
        return _argument(tokens, i)
    if token[0].isdigit():
        return f"<mn>{token}</mn>", i + 1
    if token.isalpha():
        return f"<mi>{token}</mi>", i + 1
    if token in "|‖":
        return f'<mo stretchy="false" lspace="0" rspace="0">{token}</mo>', i + 1
    if token in "()":
        return f'<mo stretchy="false">{token}</mo>', i + 1
    return f"<mo>{html.escape(token.replace('-', '−'))}</mo>", i + 1


def _command(tokens: list[str], i: int, name: str) -> tuple[str, int]:
    if name in SPACES:
        return f'<mspace width="{SPACES[name]}"/>', i + 1
    if name == "frac":
        numerator, i = _argument(tokens, i + 1)
        denominator, i = _argument(tokens, i)
        return f"<mfrac>{numerator}{denominator}</mfrac>", i
    if name == "norm":
        inside, i = _argument(tokens, i + 1)
        bar = '<mo stretchy="false" lspace="0" rspace="0">‖</mo>'
        return f"<mrow>{bar}{inside}{bar}</mrow>", i
    if name in ("bar", "tilde"):
        inside, i = _argument(tokens, i + 1)
        return f'<mover accent="true">{inside}<mo stretchy="false">{"¯" if name == "bar" else "~"}</mo></mover>', i
    if name in ("op", "text"):
        word, end = _verbatim(tokens, i + 1)
        return _word(word) if name == "op" else _text(word), end
    if name in ("left", "right"):
        return f'<mo stretchy="true">{tokens[i + 1]}</mo>', i + 2
    if name not in SYMBOLS:
        raise ValueError(f"tex: \\{name} is not known; known are {', '.join(sorted(SYMBOLS))}")
    if name in NAMED:
        return (f"<mo>{name}</mo>" if name in LIMITS else _word(name)), i + 1
    if name in IDENTIFIERS:
        return (f"<mi>{SYMBOLS[name]}</mi>" if SYMBOLS[name].islower() else _word(SYMBOLS[name])), i + 1
    return f"<mo>{SYMBOLS[name]}</mo>", i + 1


def _text(words: str) -> str:
    """Upright words; `or|或` gives each language its own."""
    english, _, chinese = words.partition("|")
    if not chinese:
        return f"<mtext>{words}</mtext>"
    return f'<mtext lang="en">{english}</mtext><mtext lang="zh">{chinese}</mtext>'


def _word(word: str) -> str:
    return f'<mi mathvariant="normal">{word}</mi>' if len(word) == 1 else f"<mi>{word}</mi>"
