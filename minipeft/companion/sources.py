"""The source of the functions that are an equation, as HTML with comments, strings and keywords marked."""

from __future__ import annotations

import functools
import html
import importlib
import inspect
import io
import keyword
import textwrap
import tokenize
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Where a function stands and what it says.

    Attributes:
        name: as it is called, `lora_delta` or `LoraLinear.merge`.
        path: of its file in the repository, `minipeft/methods/lora.py`.
        line: its first line.
        text: the source, not indented.
    """

    name: str
    path: str
    line: int
    text: str


def find(reference: str) -> Source:
    """The source of "module:name", with the module's name inside minipeft: "methods.lora:LoraLinear.merge".

    Raises:
        ImportError, AttributeError: no such module, no such name in it.
    """
    module, _, name = reference.partition(":")
    found: Any = importlib.import_module(f"minipeft.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return source_of(found, name)


def source_of(function: Any, name: str) -> Source:
    """The source of a function or class; of a class of more than 80 lines its docstring and signatures only."""
    function = inspect.unwrap(function)
    lines, start = inspect.getsourcelines(function)
    text = textwrap.dedent("".join(lines)).rstrip()
    if inspect.isclass(function) and len(lines) > 80:
        text = _outline(function)
    return Source(name, f"{function.__module__.replace('.', '/')}.py", start, text)


def _outline(cls: type) -> str:
    """`class Name(Base):` with its docstring and the first lines of its methods."""
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    parts = [f"class {cls.__name__}{f'({bases})' if bases else ''}:"]
    if cls.__doc__:
        parts.append(textwrap.indent(f'"""{inspect.cleandoc(cls.__doc__)}\n"""', "    "))
    for name, member in vars(cls).items():
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__init__"):
            doc = (inspect.getdoc(member) or "").partition("\n")[0]
            body = f'        """{doc}"""' if doc else "        ..."
            parts.append(f"\n    def {name}{_signature(member)}:\n{body}")
    return "\n".join(parts)


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


@functools.cache
def highlighted(text: str) -> str:
    """Python as HTML: comments, strings and keywords in spans of class c, s and k."""
    marks: list[tuple[int, int, str]] = []
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = {tokenize.COMMENT: "c", tokenize.STRING: "s"}.get(token.type)
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "k"
        if kind:
            marks.append((starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1], kind))
    parts, at = [], 0
    for start, end, kind in marks:
        parts.append(html.escape(text[at:start]))
        parts.append(f'<span class="{kind}">{html.escape(text[start:end])}</span>')
        at = end
    return "".join(parts) + html.escape(text[at:])
