"""The sizes and choices of a Llama-like model, read from and written as Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

# What is read, and what it is called inside transformers. Their attention and MLP are Llama's but for biases.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and choices of a model, under Hugging Face's names.

    Attributes:
        num_key_value_heads: K; each serves num_attention_heads/K query heads (Ainslie et al. 2023). None: one for each.
        head_dim: d; None is hidden_size/num_attention_heads.
        rope_theta: the base of the rotary frequencies.
        rope_scaling: None, `{"rope_type": "linear", "factor": f}`, or `{"rope_type": "llama3", "factor": …,
            "low_freq_factor": …, "high_freq_factor": …, "original_max_position_embeddings": …}`.
        tie_word_embeddings: the output head is the embedding table.
        attention_bias, mlp_bias: whether the projections have biases; Qwen2's q, k and v have one always, its o never.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.num_key_value_heads}; a divisor of num_attention_heads = "
                f"{self.num_attention_heads} is accepted"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; rotary positions need an even number")
        rotary_frequencies(self)  # says what is wrong with rope_scaling


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians that each pair of a head's features turns at every position, (d/2,).

    θ^(−2i/d) (Su et al. 2021, eq. 15). "linear" divides all by `factor` (Chen et al. 2023). "llama3" divides the slow
    ones, which turn less than `low_freq_factor` times within the context of pre-training, keeps the fast ones, more
    than `high_freq_factor` times, and goes from one to the other linearly in the number of turns (Llama 3.1).
    """
    f = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type"))
    try:
        if kind == "default":
            return f
        if kind == "linear":
            return f / scaling["factor"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * f / (2 * np.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            return kept * f + (1 - kept) * f / scaling["factor"]
    except KeyError as error:
        raise ValueError(f"rope_scaling: {kind!r} needs {error}, got {sorted(scaling)}") from error
    raise ValueError(f'rope_scaling: got rope_type {kind!r}; accepted are "default", "linear" and "llama3"')


def from_hugging_face(data: dict[str, Any]) -> LlamaConfig:
    """A config from the contents of config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5
    (`rope_parameters`).

    Raises:
        ValueError: another architecture, quantized weights, something missing, or a choice that is not Llama's.
    """
    kind = data.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type: got {kind!r}; accepted are {', '.join(map(repr, ARCHITECTURES))}")
    if "quantization_config" in data:
        raise ValueError("quantization_config: the weights are quantized; take the model's unquantized version")
    if data.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act: got {data['hidden_act']!r}; 'silu' is accepted")
    required = [f.name for f in fields(LlamaConfig) if f.default is MISSING]
    if missing := [name for name in required if data.get(name) is None]:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    for name in (*required, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if (value := data.get(name)) is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: got {value!r}; an integer of at least 1 is accepted")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor: rotary positions on a part of a head are not Llama's")
    theta = rope.get("rope_theta", data.get("rope_theta", 10000.0))
    for name, value in (("rope_theta", theta), ("rms_norm_eps", data.get("rms_norm_eps", 1e-6))):
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}: got {value!r}; a positive number is accepted")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    chosen = {f.name: data[f.name] for f in fields(LlamaConfig) if data.get(f.name) is not None}
    chosen["rope_theta"] = float(theta)
    chosen["rope_scaling"] = scaling if scaling.get("rope_type", scaling.get("type", "default")) != "default" else None
    if data.get("sliding_window") and data.get("use_sliding_window", kind != "qwen2"):
        # within the window a sliding window changes nothing, so the model is exact up to there
        chosen["max_position_embeddings"] = min(
            data["sliding_window"], chosen.get("max_position_embeddings", data["sliding_window"])
        )
    return LlamaConfig(**chosen)


def to_hugging_face(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """What config.json holds, readable by transformers 4 and 5."""
    data = {f.name: getattr(config, f.name) for f in fields(config)}
    rope = {"rope_type": "default"} if config.rope_scaling is None else dict(config.rope_scaling)
    return data | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "hidden_act": "silu",
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "sliding_window": None,
        "torch_dtype": dtype,
    }
