"""Load and save language models: Hugging Face directories, GGUF files, and SmolLM2 by its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import backend
from ..files import read_json, write_json
from .checkpoint import StoredTensor, open_directory, write_safetensors
from .download import smollm2_file
from .llama import Llama
from .llama_config import LlamaConfig, from_hugging_face, to_hugging_face


def load_model(path_or_name: str | os.PathLike, dtype: Any = None) -> Llama:
    """A Llama-like model with the weights of a checkpoint, in eval mode.

    Each tensor is read, converted and put in its place before the next one, so that there is never a second copy.

    Args:
        path_or_name: a Hugging Face directory (config.json with safetensors), a .gguf file, or "smollm2", which
            `minipeft download smollm2` fetches.
        dtype: of the parameters; None is the default dtype (float32).

    Raises:
        FileNotFoundError: there is no such model, or a part of it is missing.
        ValueError: the model is not Llama-like, a file is damaged, or shapes disagree with the config.
    """
    dtype = np.dtype(dtype or backend.get_default_dtype())
    if not backend.is_float(dtype):
        raise ValueError(f"dtype: got {dtype}; a float dtype is accepted")
    path = find_model(path_or_name)
    if path.is_dir():
        config, tensors = _config(path), open_directory(path)
    else:
        from .gguf_file import llama_config, llama_tensors, open_gguf

        file = open_gguf(path)
        config = llama_config(file)
        tensors = llama_tensors(file, config)
    _check_size(config, tensors, path)
    model = Llama(config, rng=_Unfilled(), dtype=dtype)
    _fill(model, tensors, path)
    return model.eval()


def save_model(model: Any, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a directory that transformers, and `load_model`, read: config.json, model.safetensors and the tokenizer.

    config.json comes last: a directory without it is no model yet. Every file is written whole or not at all.

    Args:
        model: a Llama; of a PeftModel, save what `merge_and_unload()` gives.
        tokenizer: from `load_tokenizer`; its files go beside the weights.

    Raises:
        TypeError: the model still has adapters, or is no Llama.
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: got {type(model).__name__}; a Llama is accepted (of a PeftModel, merge_and_unload())")
    state = model.state_dict()
    if state.keys() != _names(model.config):
        raise TypeError(
            "model: it has adapters; save what merge_and_unload() gives, or the adapter by save_pretrained()"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", state)
    if tokenizer is not None:
        tokenizer.save(directory)
    ends = {
        name: value for name in ("bos_token_id", "eos_token_id") if (value := getattr(model.config, name)) is not None
    }
    write_json(directory / "generation_config.json", ends)
    dtype = model.model.embed_tokens.weight.dtype.name
    write_json(directory / "config.json", to_hugging_face(model.config, dtype))
    return directory


def find_model(path_or_name: str | os.PathLike) -> Path:
    """The directory or file that a path or name means.

    Raises:
        FileNotFoundError: there is none; says what to run or what is accepted.
    """
    if path_or_name == "smollm2":
        return smollm2_file()
    path = Path(path_or_name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path}: a .gguf file, or the directory with config.json, is accepted")
    raise FileNotFoundError(f'{path}: no such directory or .gguf file; "smollm2" is the one name that is known')


def _config(path: Path) -> LlamaConfig:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; a Hugging Face model directory has one")
    try:
        return from_hugging_face(read_json(path / "config.json"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a model that can be read: {error}") from error


class _Unfilled(np.random.Generator):
    """Stands where start values come from, for weights that are about to be read: shapes that take no memory."""

    class Nothing(np.ndarray):
        def astype(self, dtype: Any) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), self.shape)

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(np.zeros(()), shape).view(self.Nothing)

    def standard_normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.uniform(0, 0, shape)


def _names(config: LlamaConfig) -> set[str]:
    """The parameters' names, off a model of the same form and the smallest sizes."""
    small = dict.fromkeys(("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 1)
    return set(Llama(replace(config, hidden_size=2, head_dim=2, **small), rng=0).state_dict())


def _check_size(config: LlamaConfig, tensors: dict[str, StoredTensor], path: Path) -> None:
    """Sizes far beyond what is stored are found out before a model of that size is made."""
    table, shape = tensors.get("model.embed_tokens.weight"), (config.vocab_size, config.hidden_size)
    if table is not None and table.shape != shape:
        raise ValueError(f"{path}: model.embed_tokens.weight has shape {table.shape}, by the config it is {shape}")
    if table is None or config.num_hidden_layers > len(tensors):
        raise ValueError(f"{path}: {len(tensors)} tensors cannot be a model of {config.num_hidden_layers} layers")


def _fill(model: Llama, tensors: dict[str, StoredTensor], path: Path) -> None:
    """Check that names and shapes are the model's, then read tensor after tensor."""
    own = dict(model.named_parameters())
    unused = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # of old transformers: computed here
    if model.config.tie_word_embeddings:
        unused.add("lm_head.weight")  # a second copy of the embeddings
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys() - unused
    if missing or extra:
        raise ValueError(f"{path}: tensors missing: {_few(missing)}; not in a model of this config: {_few(extra)}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"{path}: {name} has shape {tensors[name].shape}, by the config it is {parameter.shape}")
    for name, parameter in own.items():
        parameter.data = tensors[name].read().astype(parameter.dtype)  # a copy in any case: the file may go


def _few(names: set[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(sorted(names)[:4]) + more if names else "none"
