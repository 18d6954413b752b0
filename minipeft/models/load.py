"""Load and save language models: Hugging Face directories, GGUF files, and SmolLM2 by its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import backend
from ..files import read_json, write_json
from ..nn import Linear, Parameter
from ..quant.linear import QuantizedLinear
from ..quant.model import (
    codable_linears,
    code_of,
    coded,
    coded_layer,
    frozen_in_full_precision,
    quantized_state_dict,
)
from ..quant.nf4 import QuantizedTensor
from ..quant.state import from_state_tensors
from .checkpoint import StoredTensor, open_directory, write_safetensors
from .download import smollm2_file
from .llama import Llama
from .llama_config import LlamaConfig, from_hugging_face, to_hugging_face
from .quantized_config import quantization_config, stored_codes


def load_model(path_or_name: str | os.PathLike, dtype: Any = None, quantization: str | None = None) -> Llama:
    """A Llama-like model with the weights of a checkpoint, in eval mode.

    Each tensor is read, converted and put in its place before the next one, so that there is never a second copy. With
    `quantization` it is coded before the next one is read: the model in full precision never exists.

    A directory whose weights are codes already, by transformers with bitsandbytes in 4 bits or by `save_model`, gives
    a model that holds those codes, bit for bit, whatever dtype they are stored under (`bnb_4bit_quant_storage`).

    Args:
        path_or_name: a Hugging Face directory (config.json with safetensors), a .gguf file, or "smollm2", which
            `minipeft download smollm2` fetches.
        dtype: of the parameters; None is the default dtype (float32). Beside codes half precision becomes float32.
        quantization: hold the weights of all Linears but the output head as codes: "nf4" or "fp4" (in blocks of 64,
            with double quantization), "int8", or another of `quant.codes.table_of`. Everything is frozen then, as for
            QLoRA.

    Raises:
        FileNotFoundError: there is no such model, or a part of it is missing.
        ValueError: the model is not Llama-like, a file is damaged, shapes disagree with the config, an unknown code, or
            weights that are codes of another kind already.
    """
    dtype = np.dtype(dtype or backend.get_default_dtype())
    if not backend.is_float(dtype):
        raise ValueError(f"dtype: got {dtype}; a float dtype is accepted")
    code = None if quantization is None else _code(quantization)
    path = find_model(path_or_name)
    if path.is_dir():
        config, stored = _config(path)
        if stored and code and stored != [code]:
            raise ValueError(
                f"quantization: got {quantization!r}; the weights in {path} are {', '.join(stored)} codes already; "
                "None is accepted"
            )
        tensors = open_directory(path, codes=bool(stored))
    else:
        from .gguf_file import llama_config, llama_tensors, open_gguf

        file = open_gguf(path)
        config = llama_config(file)
        tensors = llama_tensors(file, config)
    _check_size(config, tensors, path)
    model = Llama(config, rng=_Unfilled(), dtype=dtype)
    _fill(model, tensors, path, code)
    return model.eval()


def _code(quantization: str) -> str:
    try:
        return code_of(quantization)
    except ValueError as error:
        raise ValueError(
            f"quantization: got {quantization!r}; accepted are None, 'nf4', 'fp4', 'int8', 'nf2' to 'nf8' and 'int2' "
            "to 'int7'"
        ) from error


def save_model(model: Any, directory: str | os.PathLike, tokenizer: Any = None) -> Path:
    """Write a directory that transformers, and `load_model`, read: config.json, model.safetensors and the tokenizer.

    config.json comes last: a directory without it is no model yet. Every file is written whole or not at all.

    Weights that are codes are written as codes. NF4 and FP4 come out as transformers with bitsandbytes writes and reads
    them; other codes are read by `load_model` alone.

    Args:
        model: a Llama; of a PeftModel, save what `merge_and_unload()` or `finish_qlora` gives.
        tokenizer: from `load_tokenizer`; its files go beside the weights.

    Raises:
        TypeError: the model still has adapters, or is no Llama.
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: got {type(model).__name__}; a Llama is accepted (of a PeftModel, merge_and_unload())")
    coded_weights = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    names, model_config = model.state_dict().keys() | coded_weights, model.config
    if "lm_head.weight" in names:  # a tied head that an adapter was merged into has a weight of its own since
        model_config = replace(model_config, tie_word_embeddings=False)
    if names != _names(model_config):
        raise TypeError(
            "model: it has adapters; save what merge_and_unload() gives, or the adapter by save_pretrained()"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", quantized_state_dict(model))
    if tokenizer is not None:
        tokenizer.save(directory)
    ends = {
        name: value for name in ("bos_token_id", "eos_token_id") if (value := getattr(model.config, name)) is not None
    }
    write_json(directory / "generation_config.json", ends)
    dtype = model.model.embed_tokens.weight.dtype.name
    codes = quantization_config(model)
    config = to_hugging_face(model_config, dtype) | ({"quantization_config": codes} if codes else {})
    write_json(directory / "config.json", config)
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


def _config(path: Path) -> tuple[LlamaConfig, list[str]]:
    """The model's config, and the codes that its weights are stored in, if they are."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json; a Hugging Face model directory has one")
    try:
        data = read_json(path / "config.json")
        codes = data.pop("quantization_config", None)
        return from_hugging_face(data), [] if codes is None else stored_codes(codes)
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


def _fill(model: Llama, tensors: dict[str, StoredTensor], path: Path, code: str | None) -> None:
    """Check that names and shapes are the model's, then read tensor after tensor; with `code` each weight of a Linear
    is coded before the next is read."""
    own = dict(model.named_parameters())
    unused = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}  # of old transformers: computed here
    if model.config.tie_word_embeddings:
        unused.add("lm_head.weight")  # a second copy of the embeddings
    states = {key.partition(".quant_state.")[0] for key in tensors if ".quant_state." in key}
    groups = {name: [key for key in tensors if key == name or key.startswith(f"{name}.")] for name in states}
    plain = tensors.keys() - {key for group in groups.values() for key in group}
    missing, extra = own.keys() - plain - states, (plain | states) - own.keys() - unused
    if missing or extra:
        raise ValueError(f"{path}: tensors missing: {_few(missing)}; not in a model of this config: {_few(extra)}")
    for name in own:
        if name in states:
            continue
        if tensors[name].codes:
            raise ValueError(f"{path}: {name} holds bytes without a quantization state; floats are accepted")
        if tensors[name].shape != own[name].shape:
            raise ValueError(f"{path}: {name} has shape {tensors[name].shape}, by the config it is {own[name].shape}")
    linears = {f"{name}.weight": linear for name, linear in codable_linears(model).items()}
    if states - linears.keys():
        raise ValueError(f"{path}: {_few(states - linears.keys())}: codes, but no weight of a Linear inside the model")
    for name, parameter in own.items():
        if name in states:
            _hold(model, name, linears[name], _stored_codes(tensors, groups[name], parameter, path))
        else:
            values = tensors[name].read().astype(parameter.dtype)  # a copy in any case: the file may go
            if code and name in linears:
                _hold(model, name, linears[name], _coded(values, code, name, path))
            else:
                parameter.data = values
    if code or states:
        frozen_in_full_precision(model)


def _hold(model: Llama, name: str, linear: Linear, q: QuantizedTensor) -> None:
    model.set_submodule(name.removesuffix(".weight"), coded_layer(q, linear.bias))


def _coded(values: np.ndarray, code: str, name: str, path: Path) -> QuantizedTensor:
    try:
        return coded(values, code)
    except ValueError as error:
        raise ValueError(f"{path}: {name} cannot be quantized: {error}") from error


def _stored_codes(
    tensors: dict[str, StoredTensor], group: list[str], parameter: Parameter, path: Path
) -> QuantizedTensor:
    """The codes of one weight, read into memory; ValueError where they do not fit each other or the model.

    The codes themselves are taken as bytes: by `bnb_4bit_quant_storage` bitsandbytes keeps the same bytes as numbers of
    another dtype, (bytes ÷ itemsize, 1).
    """
    name = min(group, key=len)
    parts = {key: tensors[key].read_bytes() if key == name else tensors[key].read() for key in group}
    try:
        q = from_state_tensors({key: np.array(part) for key, part in parts.items()}, name, parameter.dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if q.shape != parameter.shape:
        raise ValueError(f"{path}: {name} has shape {q.shape}, by the config it is {parameter.shape}")
    return q


def _few(names: set[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(sorted(names)[:4]) + more if names else "none"
