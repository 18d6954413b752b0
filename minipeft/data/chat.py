"""Chats as training data: JSONL files, tokens with the loss on the assistant's words alone, batches of like lengths.

A file has one JSON object on each line: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..tensor import Tensor

ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and where they come from: "chats.jsonl, line 3"."""

    messages: list[dict[str, str]]
    source: str

    @property
    def question(self) -> list[dict[str, str]]:
        """What stands before the first answer: the prompt that the answer belongs to."""
        return self.messages[: [m["role"] for m in self.messages].index("assistant")]


class Example(NamedTuple):
    """A conversation in tokens: ids (T,), and labels (T,), which are the ids again where the assistant speaks."""

    ids: np.ndarray
    labels: np.ndarray


# --- reading ----------------------------------------------------------------------------------------------------------


def read_chats(path: str | os.PathLike) -> list[Conversation]:
    """The conversations of a JSONL file, in UTF-8. Blank lines are passed over, other keys beside "messages" too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no conversation at all, or a line that is not one: the message has the file, the line, and why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    chats = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        source = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()  # Windows' editors put a mark in front
            if text:
                chats.append(Conversation(_messages(json.loads(text)), source))
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not JSON ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{source}: not JSON that can be read (nested too deeply)") from error
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if not chats:
        raise ValueError(f"{path}: no conversation in it; one JSON object a line is accepted")
    return chats


def _messages(data: Any) -> list[dict[str, str]]:
    """The messages of one line's object, checked."""
    if not isinstance(data, dict):
        raise ValueError(f'{_kind(data)}; an object {{"messages": [...]}} is accepted')
    if "messages" not in data:
        raise ValueError(f'no "messages"; the keys are {", ".join(map(repr, data)) or "none"}')
    messages = data["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"messages": {_kind(messages)}; a list with one message at least is accepted')
    checked = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f'message {i}: {_kind(message)}; {{"role": ..., "content": ...}} is accepted')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {i}: role {role!r}; accepted are {', '.join(ROLES)}")
        if "content" not in message:
            raise ValueError(f'message {i}: no "content"; its keys are {", ".join(map(repr, message))}')
        if not isinstance(content, str):
            raise ValueError(f"message {i}: content is {_kind(content)}; text is accepted")
        if not content.strip():
            raise ValueError(f"message {i}: content is empty")
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise ValueError("no assistant message: there is nothing to learn")
    if roles[0] == "assistant":
        raise ValueError("message 1: the assistant speaks first; something to answer must stand before")
    return checked


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if isinstance(value, list) and not value:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode(chats: Sequence[Conversation], tokenizer: Any, context: int | None = None) -> list[Example]:
    """The conversations in tokens, as the chat template writes them.

    Labels are the ids on what the assistant says, the token that ends its turn included, since generation must learn to
    stop; everywhere else they are −100, which the loss leaves out.

    Args:
        tokenizer: from `load_tokenizer`.
        context: the model's longest input.

    Raises:
        ValueError: the template does not accept a conversation, it is longer than the context, or the template
            rewrites earlier messages, so that answers cannot be told apart. The message says which line.
    """
    examples = []
    for chat in chats:
        try:
            example = _encode(chat.messages, tokenizer)
        except ValueError as error:
            raise ValueError(f"{chat.source}: {error}") from error
        if context is not None and len(example.ids) > context:
            raise ValueError(f"{chat.source}: {len(example.ids)} tokens; the model's context has {context}")
        examples.append(example)
    return examples


def _encode(messages: list[dict[str, str]], tokenizer: Any) -> Example:
    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], prompt, tokenize=False)

    text = render(len(messages))
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)  # with the place of each token in the text
    ids, labels = np.array(encoded.ids), np.full(len(encoded.ids), IGNORED)
    starts, ends = np.array(encoded.offsets).reshape(-1, 2).T
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        before, through = render(i, prompt=True), render(i + 1) if i + 1 < len(messages) else text
        if not text.startswith(through) or not through.startswith(before):
            raise ValueError("chat_template: it writes earlier messages anew for later ones; one turn is accepted")
        (said,) = np.nonzero((starts >= len(before)) & (ends <= len(through)))
        (stops,) = np.nonzero(np.isin(ids[said], tokenizer.stop_ids))
        said = said[: stops[-1] + 1] if len(stops) else said  # a newline after the end of the turn is never generated
        labels[said] = ids[said]
    return Example(ids, labels)


# --- batches ----------------------------------------------------------------------------------------------------------


class ChatBatches:
    """An endless sequence of batches: `batches[step] -> (ids (B, T), labels (B, T))`.

    Batch i is a function of (seed, i) alone, so a resumed run sees what the run it resumes would have seen. Each epoch
    holds every example once, in a new random order: shuffled, put in order of length (up to `BUCKET` tokens), cut into
    batches whose sizes differ by one at most, and the batches shuffled.

    A batch is filled up on the right, to its own longest example: a few tokens in a hundred are padding (`padding`), so
    packing several chats into a row, with masks that keep them apart, would gain nothing. What a real token sees stands
    left of it, so no attention mask is needed either.

    Args:
        examples: from `encode`.
        batch_size: examples in a batch, at most.
        seed: of the orders.

    Raises:
        ValueError: no examples, or a batch size below 1.
    """

    BUCKET = 4  # within this many tokens lengths count as equal, so that who meets whom changes between epochs

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int = 0) -> None:
        if not examples:
            raise ValueError("examples: got none; at least 1 is accepted")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; at least 1 is accepted")
        self.examples, self.batch_size, self.seed = list(examples), batch_size, seed
        self.lengths = np.array([len(example.ids) for example in self.examples])
        self.steps_per_epoch = -(-len(self.examples) // batch_size)
        self._order: tuple[int, list[np.ndarray]] = (-1, [])

    def rows(self, step: int) -> np.ndarray:
        """Which examples batch `step` holds."""
        if step < 0:
            raise IndexError(f"step: got {step}; 0 or more is accepted (the sequence has no end to count from)")
        epoch, number = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._epoch(epoch)
        return self._order[1][number]

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.examples))
        by_length = shuffled[np.argsort(self.lengths[shuffled] // self.BUCKET, kind="stable")]
        parts = np.array_split(by_length, self.steps_per_epoch)
        return [parts[i] for i in rng.permutation(len(parts))]

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return pad([self.examples[i] for i in self.rows(step)])

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batch 0, 1, 2 … without end."""
        step = 0
        while True:
            yield self[step]
            step += 1

    def tokens(self, step: int) -> int:
        """How many tokens batch `step` has, padding left out."""
        return int(self.lengths[self.rows(step)].sum())

    @property
    def padding(self) -> float:
        """The share of padding among the positions of the first epoch's batches."""
        rows = [self.lengths[self.rows(step)] for step in range(self.steps_per_epoch)]
        return 1 - self.lengths.sum() / sum(len(lengths) * lengths.max() for lengths in rows)


def pad(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """ids and labels (B, T) of examples of different lengths, filled up on the right with id 0 and label −100."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)], labels[row, : len(example.ids)] = example
    return ids, labels


def chat_loss(model: Any, batch: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """The mean cross-entropy of a batch's labelled tokens, for `fit(loss_fn=chat_loss)`."""
    ids, labels = batch
    return model.loss(ids, labels)
