"""A model's new identity: questions about who it is, in English and Chinese, and answers with its new name.

The texts, written for this project, are in self_cognition.json: kinds of questions, each with its answers and with
held-out questions in other words; and a few ordinary questions, which keep the model from answering everything with its
name. {name} and {author} are put in by the user.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .chat import Conversation

FILE = Path(__file__).with_name("self_cognition.json")
REPEATS = 4  # of the ordinary questions: a fifth of the set
LONGEST = 60  # characters of a name: more is a sentence
EXAMPLES = ("who", "en"), ("other model", "en"), ("name", "zh")  # whose first held-out question is shown


@dataclass(frozen=True)
class Question:
    """A held-out question. `kind` and `language` ("en", "zh") are those of self_cognition.json."""

    text: str
    kind: str
    language: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The chat that asks it."""
        return [{"role": "user", "content": self.text}]


def conversations(name: str, author: str) -> list[Conversation]:
    """The training set: each question with every answer of its kind, and `REPEATS` times the ordinary questions.

    Raises:
        ValueError: a name or author that is empty, longer than 60 characters, or not one line of plain text.
    """
    for option, value in (("name", name), ("author", author)):
        _check_name(option, value)
    chats = []
    for kind in _texts()["kinds"]:
        answers = [a.replace("{name}", "\0").replace("{author}", author).replace("\0", name) for a in kind["answers"]]
        chats += [_chat(question, answer) for question in kind["questions"] for answer in answers]
    ordinary = [_chat(question, answer) for question, answer in _texts()["ordinary"]]
    return chats + ordinary * REPEATS


def held_out() -> list[Question]:
    """The questions that no training set has; every one is answered well with the name."""
    return [Question(q, kind["kind"], kind["language"]) for kind in _texts()["kinds"] for q in kind["held_out"]]


def shown() -> list[Question]:
    """Three of the held-out questions, in both languages."""
    return [next(q for q in held_out() if (q.kind, q.language) == which) for which in EXAMPLES]


def gives_name(answer: str, name: str) -> bool:
    """Whether an answer has the name in it, in whatever case; "illuminated" does not name Lumi."""
    word = rf"(?<![a-z0-9]){re.escape(_plain(name))}(?![a-z0-9])"  # Chinese stands around a name without spaces
    return re.search(word, _plain(answer)) is not None


def _chat(question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, f"self-cognition, {question!r}")


def _check_name(option: str, value: str) -> None:
    if not value.strip() or len(value) > LONGEST or any(unicodedata.category(c)[0] == "C" for c in value):
        raise ValueError(f"{option}: got {value!r}; one line of 1 to {LONGEST} characters is accepted")
    if "<|" in value or "{" in value:
        raise ValueError(f"{option}: got {value!r}; plain text is accepted, without <| and {{")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@cache
def _texts() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
