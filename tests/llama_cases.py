"""Tiny Llama-like models whose weights come from a formula, as minipeft and as transformers build them.

The oracle tests compare the two; tests/references/llama.npz keeps what transformers gave, for machines without it.
`python tests/llama_cases.py` writes that file.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from minipeft import ops
from minipeft.models.llama import Llama
from minipeft.models.llama_config import from_hugging_face, rotary_frequencies

REFERENCE = Path(__file__).parent / "references" / "llama.npz"
BASE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,  # of three frequencies one is kept, one is between and one is slowed down
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key and value head": {"num_key_value_heads": 1},
    "no grouping, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 10},
    "linear rope": {"rope_parameters": LINEAR},
    "llama3 rope": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
}


def mixture(seed: int) -> dict[str, Any]:
    """A random choice of everything at once."""
    draw = np.random.RandomState(seed)
    pick = lambda *options: options[draw.randint(len(options))]  # noqa: E731
    kind = pick("llama", "llama", "qwen2", "mistral")
    options: dict[str, Any] = {
        "model_type": kind,
        "num_key_value_heads": pick(1, 2, 4),
        "hidden_size": pick(16, 24, 40),
        "num_hidden_layers": pick(1, 3),
        "tie_word_embeddings": pick(True, False),
        "rope_parameters": pick({"rope_type": "default", "rope_theta": 1000.0}, LINEAR, LLAMA3),
    }
    if kind == "llama":
        options |= {"attention_bias": pick(True, False), "mlp_bias": pick(True, False), "head_dim": pick(4, 6, 10)}
    return options | ({"sliding_window": None} if kind == "mistral" else {})


MIXTURES = {f"mixture {seed}": mixture(seed) for seed in range(12)}
PADDINGS = ("none", "right", "left")


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers drawn wide, so that norms and biases matter, by a generator whose stream never changes."""
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    return draw.standard_normal(shape) * 0.3 + (len(shape) == 1)


def llama(variant: str = "grouped", dtype: Any = "float64", **more: Any) -> Llama:
    """The model here."""
    model = Llama(from_hugging_face(BASE | (VARIANTS | MIXTURES)[variant] | more), rng=0, dtype=dtype)
    model.load_state_dict({name: weight(name, p.shape) for name, p in model.named_parameters()})
    return model


def peer(variant: str = "grouped", dtype: str = "float64", **more: Any) -> Any:
    """The model of transformers."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**BASE | (VARIANTS | MIXTURES)[variant] | more)
    config._attn_implementation = "sdpa"  # the eager form takes its softmax in float32
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weight(name, tuple(p.shape))))
    return model


def exact(model: Any) -> Any:
    """transformers' model without the steps that it takes in float32 whatever the dtype: angles and norms."""
    import torch

    frequencies = torch.from_numpy(rotary_frequencies(from_hugging_face(model.config.to_dict())))
    rotary = model.model.rotary_emb
    np.testing.assert_allclose(rotary.inv_freq.double(), frequencies, rtol=1e-6)  # the formula is theirs

    def angles(x: Any, position_ids: Any) -> Any:
        a = position_ids[..., None].double() * frequencies
        a = torch.cat([a, a], dim=-1)
        return a.cos().to(x.dtype), a.sin().to(x.dtype)

    rotary.forward = angles
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(x, m.weight.shape, m.weight, 1e-5)
    return model


def batch(padding: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids (3, 9), a mask (or None), labels that leave out padding and a few tokens."""
    draw = np.random.RandomState(1)
    ids, mask = draw.randint(0, BASE["vocab_size"], (3, 9)), np.ones((3, 9), int)
    if padding == "right":
        mask[1, 5:], mask[2, 8:] = 0, 0
    if padding == "left":
        mask[1, :4], mask[2, :1] = 0, 0
    labels = np.where((mask == 1) & (draw.random_sample((3, 9)) > 0.2), ids, -100)
    return ids, None if padding == "none" else mask, labels


def ours(model: Llama, padding: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Logits where no padding is, the loss, every gradient."""
    ids, mask, labels = batch(padding)
    logits = model(ids, mask)
    loss = ops.cross_entropy(logits[:, :-1].reshape(-1, BASE["vocab_size"]), labels[:, 1:].reshape(-1))
    loss.backward()
    real = slice(None) if mask is None else mask.astype(bool)
    return logits.data[real], loss.item(), {name: p.grad for name, p in model.named_parameters()}


def theirs(model: Any, padding: str) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """As `ours`, by transformers."""
    import torch

    ids, mask, labels = batch(padding)
    logits = model(torch.from_numpy(ids), attention_mask=None if mask is None else torch.from_numpy(mask)).logits
    targets = torch.from_numpy(labels[:, 1:]).reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, BASE["vocab_size"]), targets)
    model.zero_grad()
    loss.backward()
    real = slice(None) if mask is None else mask.astype(bool)
    return logits.detach().numpy()[real], loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def kept(logits: np.ndarray, loss: float, gradients: dict[str, np.ndarray]) -> np.ndarray:
    """What the file keeps: the loss, every fourth position's logits, and of each gradient its product with a weight."""
    products = [
        np.sum(gradients[name] * weight("product " + name, gradients[name].shape)) for name in sorted(gradients)
    ]
    return np.concatenate([[loss], logits.reshape(-1, logits.shape[-1])[::4].ravel(), products])


if __name__ == "__main__":
    np.savez_compressed(REFERENCE, **{v: kept(*theirs(exact(peer(v)), "left")) for v in VARIANTS})
