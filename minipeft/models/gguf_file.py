"""Read GGUF files, llama.cpp's format: the metadata, the tensors as floats, the config, Hugging Face's names.

The layout (github.com/ggml-org/ggml, docs/gguf.md): "GGUF", version, counts, then metadata as (name, type, value), then
for every tensor (name, shape with the fastest axis first, type, place), then the values. Only the header is read here
itself: the `gguf` package's reader takes four seconds for a vocabulary of 49,152 entries, this one 0.2 s, and this one
notices a file that is cut short. The quantized values are decoded by the package.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..extra import need
from .checkpoint import StoredTensor, from_bfloat16, map_file
from .llama_config import LlamaConfig, rotary_frequencies

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
DECODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CHUNK = 1 << 20  # elements decoded at a time: the package makes several copies on its way

NAMES = {  # llama.cpp's names, and Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUF(NamedTuple):
    """What a file says: its metadata, and its tensors under their own names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_gguf(path: Path) -> GGUF:
    """Read the header; the values stay in the file until they are asked for.

    Raises:
        FileNotFoundError, ValueError: no such file; not GGUF, cut short, or of a quantization that is not known.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    need("gguf", "a .gguf file")
    header = _Header(path, map_file(path, np.uint8, 0, (path.stat().st_size,)))
    if header.take(4) != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    version, tensors, entries = header.number("I"), header.number("Q"), header.number("Q")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}; 2 and 3 (little-endian) are accepted")
    metadata = {}
    for _ in range(entries):
        name = header.string()
        metadata[name] = header.value(header.number("I"))
    places = {}
    for _ in range(tensors):
        name = header.string()
        shape = header.numbers(header.number("I"), "Q")[::-1]  # here the fastest axis comes last
        places[name] = shape, header.number("I"), header.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or not all(shape and min(shape) for shape, _, _ in places.values()):
        raise ValueError(f"{path}: damaged: alignment {alignment!r}, or a tensor without elements")
    base = -(-header.at // alignment) * alignment
    return GGUF(path, metadata, {n: _stored(path, n, s, kind, base + at) for n, (s, kind, at) in places.items()})


class _Header:
    """Bytes taken one after the other."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, memoryview(data), 0

    def take(self, n: int) -> bytes:
        self.at += n
        if self.at > len(self.data):
            raise ValueError(f"{self.path}: cut short in its header, at {len(self.data)} bytes; download it again")
        return bytes(self.data[self.at - n : self.at])

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def numbers(self, n: int, kind: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{kind}", self.take(n * struct.calcsize("<" + kind)))

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"{self.path}: damaged: metadata of unknown type {kind}")
        kind, length = self.number("I"), self.number("Q")
        if kind in SCALARS:
            return list(self.numbers(length, SCALARS[kind]))
        return [self.value(kind) for _ in range(length)]


def _stored(path: Path, name: str, shape: tuple[int, ...], kind: int, at: int) -> StoredTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(t): t.name for t in GGMLQuantizationType}.get(kind, f"number {kind}")
    if known not in (*PLAIN, *DECODED):
        raise ValueError(f"{path}: {name} has quantization {known}; accepted are {', '.join((*PLAIN, *DECODED))}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # elements and bytes of a block
    if shape[-1] % block:
        raise ValueError(f"{path}: damaged: rows of {name} have {shape[-1]} elements, blocks of {known} have {block}")
    end, whole = at + math.prod(shape) // block * size, path.stat().st_size
    if end > whole:
        raise ValueError(f"{path}: cut short: {name} ends at byte {end}, the file has {whole}; download it again")
    if known in PLAIN:
        read = lambda: _plain(map_file(path, PLAIN[known], at, shape), known)  # noqa: E731
    else:
        read = lambda: _decode(map_file(path, np.uint8, at, (*shape[:-1], shape[-1] // block * size)), kind, shape)  # noqa: E731
    return StoredTensor(shape, read)


def _plain(values: np.ndarray, kind: str) -> np.ndarray:
    return from_bfloat16(values) if kind == "BF16" else values


def _decode(blocks: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """Quantized rows as float32, some rows at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    blocks = blocks.reshape(len(out), -1)
    rows = max(1, CHUNK // shape[-1])
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        out[part] = dequantize(blocks[part], GGMLQuantizationType(kind))
    return out.reshape(shape)


# --- as a Llama -------------------------------------------------------------------------------------------------------


def llama_config(file: GGUF) -> LlamaConfig:
    """The sizes and choices of the model in the file.

    Raises:
        ValueError: another architecture, or a choice that is not Llama's.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"{file.path}: architecture {kind!r}; 'llama' and 'qwen2' are accepted")
    get = lambda key, default=None: file.metadata.get(f"{kind}.{key}", default)  # noqa: E731
    try:
        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length", hidden // heads)
        config = {
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length", 2048),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": get("rope.freq_base", 10000.0),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file.path}: its metadata does not describe a {kind} model ({error})") from error
    if bad := [name for name, value in config.items() if not isinstance(value, int | float) or value <= 0]:
        raise ValueError(f"{file.path}: {bad[0]} = {config[bad[0]]!r}; one positive number is accepted")
    if get("expert_count", 0) or get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{file.path}: experts, and rotary positions on a part of a head, are not Llama's")
    theirs = {name: file.metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    return LlamaConfig(
        **config,
        **theirs,
        rope_scaling=_rope_scaling(file, get, config),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=kind == "llama" and "blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        model_type=kind,
    )


def _rope_scaling(file: GGUF, get: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    """Linear scaling is metadata; Llama 3's is stored as what it divides each frequency by."""
    kind = get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": get("rope.scaling.factor", 1.0)}
    if kind != "none":
        raise ValueError(f"{file.path}: rope scaling {kind!r}; 'none' and 'linear' are accepted")
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.tensors["rope_freqs.weight"].read()
    llama3 = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (rotary_frequencies(LlamaConfig(**config, rope_scaling=scaling)) for scaling in (None, llama3))
    if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError(f"{file.path}: rope_freqs are not those of Llama 3 with factor {llama3['factor']:g}")
    return llama3


def llama_tensors(file: GGUF, config: LlamaConfig) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face's names, in its order of rows."""
    return dict(_renamed(name, stored, config) for name, stored in file.tensors.items() if name != "rope_freqs.weight")


def _renamed(name: str, stored: StoredTensor, config: LlamaConfig) -> tuple[str, StoredTensor]:
    *block, name, kind = name.removeprefix("blk.").rsplit(".", 2)
    new = ".".join([*(f"model.layers.{i}" for i in block), NAMES.get(name, name), kind])
    if config.model_type != "llama" or name not in ("attn_q", "attn_k"):
        return new, stored
    return new, StoredTensor(stored.shape, lambda: split_pairs(stored.read(), config.head_dim))


def split_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp turns features (0, 1), (2, 3), … of a head, Hugging Face (0, d/2), (1, d/2 + 1), …: the rows of
    Llama's q and k, (heads·d, …), from the first order to the second."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
