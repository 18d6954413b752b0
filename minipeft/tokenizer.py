"""Text to token ids and back, and chats to prompts: tokenizer.json or a GGUF's own vocabulary, and the chat template.

The tokenizing is done by Hugging Face's `tokenizers` library, the templates are Jinja's, run in its sandbox.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .chat_template import render_chat
from .extra import need
from .files import read_json, write_json, write_text

# How text is cut before pairs are merged, by the name that llama.cpp gave the tokenizer: (digits one by one, pattern).
# The pattern None is GPT-2's, which ByteLevel has built in.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "smollm": (True, None),
    "gpt-2": (False, None),
    "default": (False, None),
    "llama-bpe": (False, LLAMA3),
    "qwen2": (False, LLAMA3.replace("{1,3}", "")),
}
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that are never merged from text


def load_tokenizer(path_or_name: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model: of a Hugging Face directory, of a .gguf file, or of "smollm2".

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.json.
        ValueError: a damaged file, or a kind of vocabulary that is not read.
    """
    from .models.load import find_model

    need("tokenizers", "a tokenizer")
    path = find_model(path_or_name)
    return _from_directory(path) if path.is_dir() else _from_gguf(path)


class Tokenizer:
    """Token ids of a text, the text of token ids, and the prompt of a chat.

    Args:
        backend: a `tokenizers.Tokenizer`.
        chat_template: Jinja source, or None.
        bos_token, eos_token: how the special tokens are written; the template may use them.
        stop_ids: the tokens that end an answer; None is eos_token's id.

    Attributes:
        eos_token_id: the id of eos_token, or None.
        stop_ids: what to give to `generate(stop_ids=…)`.
    """

    def __init__(
        self,
        backend: Any,
        chat_template: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> None:
        self.backend, self.chat_template = backend, chat_template
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id, self.eos_token_id = (
            None if t is None else backend.token_to_id(t) for t in (bos_token, eos_token)
        )
        ends = [] if self.eos_token_id is None else [self.eos_token_id]
        self.stop_ids = ends if stop_ids is None else sorted(stop_ids)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in the text become those tokens; a start token is added where the
        model is used to one, unless `add_special_tokens=False`."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids that come one by one, in pieces, without special tokens. A character made of several tokens
        comes when it is complete."""
        kept: list[int] = []
        done = ""
        for token in ids:
            kept.append(int(token))
            text = self.decode(kept, skip_special_tokens=True)
            if len(text) > len(done) and not text.endswith("\ufffd"):
                yield text[len(done) :]
                done = text
                if text.endswith("\n"):  # a fresh start, or long texts would be decoded again and again; the last token
                    kept = kept[-1:]  # stays, for decoders that treat the first one differently
                    done = self.decode(kept, skip_special_tokens=True)
        rest = self.decode(kept, skip_special_tokens=True)[len(done) :]
        if rest:
            yield rest

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False, tokenize: bool = True
    ) -> Any:
        """The chat as the model was taught to read it: token ids, or the text with `tokenize=False`.

        Args:
            messages: `{"role": "user", "content": "…"}` and so on, in order.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            ValueError: there is no template, messages are not a chat, or the template fails or tries to leave its
                sandbox.
        """
        text = render_chat(self.chat_template, messages, add_generation_prompt, self.bos_token, self.eos_token)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
        directory = Path(directory)
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", {name: v for name, v in config.items() if v is not None})


# --- where tokenizers come from ---------------------------------------------------------------------------------------


def _from_directory(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{path}: no tokenizer.json; older formats (tokenizer.model, vocab.json) are not read")
    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path / 'tokenizer.json'}: not a tokenizer ({error})") from error
    config = _optional_json(path / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    bos, eos = (_written(config.get(name)) for name in ("bos_token", "eos_token"))
    ends = _optional_json(path / "generation_config.json").get("eos_token_id")
    stop_ids = {ends} if isinstance(ends, int) else set(ends or ())
    if eos is not None and (end := backend.token_to_id(eos)) is not None:
        stop_ids.add(end)
    return Tokenizer(backend, template, bos, eos, stop_ids)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _written(token: Any) -> str | None:
    """tokenizer_config.json has a token as text, or as an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def _from_gguf(path: Path) -> Tokenizer:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    from .models.gguf_file import open_gguf

    get = lambda name, default=None: metadata.get(f"tokenizer.ggml.{name}", default)  # noqa: E731
    metadata = open_gguf(path).metadata
    kind, cut, tokens, merges = get("model"), get("pre", "default"), get("tokens"), get("merges")
    if kind != "gpt2" or cut not in CUTS or not tokens or merges is None:
        raise ValueError(
            f"{path}: a vocabulary of kind {kind!r}, cut as {cut!r}; accepted is 'gpt2', cut as "
            f"{', '.join(map(repr, CUTS))}; for others take a directory with the model's tokenizer.json"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=cut == "llama-bpe")
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path}: its vocabulary and merges do not fit ({error})") from error
    backend = Backend(model)
    backend.pre_tokenizer, backend.decoder = _cutter(*CUTS[cut]), decoders.ByteLevel()
    types = get("token_type", [])
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        backend.add_tokens(
            [AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=False) if k == kind]
        )
    bos, eos = (_token(tokens, get(f"{name}_token_id")) for name in ("bos", "eos"))
    if bos is not None and get("add_bos_token", cut == "llama-bpe"):
        _start_with(backend, bos)
    return Tokenizer(backend, metadata.get("tokenizer.chat_template"), bos, eos)


def _token(tokens: list[str], i: Any) -> str | None:
    return tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None


def _cutter(single_digits: bool, pattern: str | None) -> Any:
    """What cuts text into the pieces inside which pairs are merged."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    return pre_tokenizers.Sequence(steps)


def _start_with(backend: Any, bos: str) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
