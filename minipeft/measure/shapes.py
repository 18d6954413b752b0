"""The sizes of Llama-family models, by name, by number of weights, or from a config.json."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..checks import check_count


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-family model without biases, by the names in a Hugging Face config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    tie_word_embeddings: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven matrices in a block."""
        d, f = self.hidden_size, self.intermediate_size
        head = self.head_dim or d // self.num_attention_heads
        q, kv = self.num_attention_heads * head, self.num_key_value_heads * head
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return {**attention, "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}

    @property
    def parameters(self) -> int:
        """The number of weights: embedding, blocks of seven matrices and two norms, norm, output head unless tied."""
        d = self.hidden_size
        block = sum(out * in_ for out, in_ in self.matrices.values()) + 2 * d
        return (2 - self.tie_word_embeddings) * self.vocab_size * d + self.num_hidden_layers * block + d


SIZES = {  # nominal number of parameters: the model of that size, from its config.json
    135_000_000: LlamaShape(576, 1536, 30, 9, 3, 49152, True),  # SmolLM2
    360_000_000: LlamaShape(960, 2560, 32, 15, 5, 49152, True),  # SmolLM2
    1_100_000_000: LlamaShape(2048, 5632, 22, 32, 4),  # TinyLlama
    1_700_000_000: LlamaShape(2048, 8192, 24, 32, 32, 49152, True),  # SmolLM2
    7_000_000_000: LlamaShape(4096, 11008, 32, 32, 32),  # Llama 2
    8_000_000_000: LlamaShape(4096, 14336, 32, 32, 8, 128256),  # Llama 3
    13_000_000_000: LlamaShape(5120, 13824, 40, 40, 40),  # Llama 2
    33_000_000_000: LlamaShape(6656, 17920, 60, 52, 52),  # Llama 1
    65_000_000_000: LlamaShape(8192, 22016, 80, 64, 64),  # Llama 1
    70_000_000_000: LlamaShape(8192, 28672, 80, 64, 8),  # Llama 2
}


def llama_shape(config_or_size: str | int | Mapping[str, Any] | os.PathLike[str]) -> LlamaShape:
    """The shape that this means: "7B", a number of parameters, a config dictionary, or the path of a config.json.

    Numbers in `SIZES` are those models. Any other number N takes Llama's proportions, with d the multiple of 128 whose
    number of weights is nearest to N: d/128 heads, d/128 layers, f = 8d/3 rounded up to a multiple of 256, all heads
    with their own keys and values, 32000 words, output head not tied. (Llama's 7B and 13B come out of this rule.)

    Raises:
        ValueError: a text that is no size, a number that no model has, a config without a size that is needed.
        FileNotFoundError: no such file.
        TypeError: something else.
    """
    size = config_or_size
    if isinstance(size, str) and re.fullmatch(r"\d+(\.\d+)?[MB]", size, re.IGNORECASE):
        size = round(Fraction(size[:-1]) * (10**9 if size[-1] in "bB" else 10**6))
    if isinstance(size, int | np.integer) and not isinstance(size, bool):
        return SIZES.get(size) or _scaled_shape(int(size))
    if isinstance(size, str | os.PathLike):
        path = Path(size) / "config.json" if Path(size).is_dir() else Path(size)
        if path.suffix != ".json":
            raise ValueError(
                f'config_or_size: got {os.fspath(size)!r}; accepted are texts like "7B" and "135M", and a config.json'
            )
        size = files.read_json(path)
    if not isinstance(size, Mapping):
        raise TypeError(
            f"config_or_size: got {type(size).__name__}; a text, an int, a dictionary, a path or a Module is accepted"
        )
    return _shape_of_config(size)


def _scaled_shape(n: int) -> LlamaShape:
    heads = range(1, 10**5 + 1)
    smallest, largest = _proportions(heads[0]).parameters, _proportions(heads[-1]).parameters
    if not smallest <= n <= largest:
        raise ValueError(f"config_or_size: got {n} parameters; {smallest} to {largest} are accepted")
    i = bisect.bisect_left(heads, n, key=lambda h: _proportions(h).parameters)  # the first that is not smaller
    return min(map(_proportions, heads[max(0, i - 1) : i + 1]), key=lambda shape: abs(shape.parameters - n))


def _proportions(heads: int) -> LlamaShape:
    return LlamaShape(128 * heads, 256 * -(-4 * heads // 3), heads, heads, heads)


def _shape_of_config(config: Mapping[str, Any]) -> LlamaShape:
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"config_or_size: the config has no {', '.join(missing)}")
    given = {name: config[name] for name in LlamaShape.__dataclass_fields__ if config.get(name) is not None}
    for name, value in given.items():
        if name != "tie_word_embeddings":
            check_count(f"config_or_size: {name}", value)
    return LlamaShape(**{"num_key_value_heads": config["num_attention_heads"], **given})
