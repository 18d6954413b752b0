"""models.llama beside transformers: logits and all gradients, generation, adapters, saved models, SmolLM2 itself."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft import ops
from minipeft.models.llama import Llama
from minipeft.models.llama_config import from_hugging_face, rotary_frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
VARIANTS = {
    "grouped": {},
    "one key and value head": {"num_key_value_heads": 1},
    "no grouping, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 10},
    "linear rope": {"rope_parameters": {**LINEAR, "rope_theta": 10000.0}},
    "llama3 rope": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
}


def peer(variant: str, dtype=None, seed=0, **more):
    """A random transformers model; every parameter is drawn wide, so that norms and biases matter too."""
    options = BASE | VARIANTS[variant] | more
    config = transformers.AutoConfig.for_model(**{"model_type": "llama"} | options)
    config._attn_implementation = "sdpa"  # the eager form takes its softmax in float32
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype or torch.float64).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3 + (p.ndim == 1))
    return model


def exact(model):
    """The same model without the steps that transformers takes in float32 whatever the dtype: angles and norms."""
    frequencies = torch.from_numpy(rotary_frequencies(from_hugging_face(model.config.to_dict())))
    rotary = model.model.rotary_emb
    np.testing.assert_allclose(rotary.inv_freq.double(), frequencies, rtol=1e-6)  # the formula is theirs

    def angles(x, position_ids):
        a = position_ids[..., None].double() * frequencies
        a = torch.cat([a, a], dim=-1)
        return a.cos().to(x.dtype), a.sin().to(x.dtype)

    rotary.forward = angles
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(x, m.weight.shape, m.weight, 1e-5)
    return model


def ours(model):
    """The same weights here."""
    dtype = str(model.dtype).removeprefix("torch.")
    llama = Llama(from_hugging_face(model.config.to_dict()), rng=0, dtype=dtype)
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    llama.load_state_dict(state)
    return llama


def batch(padding: str):
    """Ids (3, 9), a mask (or None), labels that leave padding and a few tokens out."""
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, BASE["vocab_size"], (3, 9)), np.ones((3, 9), int)
    if padding == "right":
        mask[1, 5:], mask[2, 8:] = 0, 0
    if padding == "left":
        mask[1, :4], mask[2, :1] = 0, 0
    labels = np.where((mask == 1) & (rng.random((3, 9)) > 0.2), ids, -100)
    return ids, None if padding == "none" else mask, labels


def both(model, padding):
    """(logits, loss, gradients by name) of transformers and of minipeft; logits at padding are left out."""
    ids, mask, labels = batch(padding)
    t = model(torch.from_numpy(ids), attention_mask=None if mask is None else torch.from_numpy(mask))
    targets = torch.from_numpy(labels[:, 1:]).reshape(-1)
    loss = torch.nn.functional.cross_entropy(t.logits[:, :-1].reshape(-1, BASE["vocab_size"]), targets)
    model.zero_grad()
    loss.backward()
    llama = ours(model)
    logits = llama(ids, mask)
    mine = ops.cross_entropy(logits[:, :-1].reshape(-1, BASE["vocab_size"]), labels[:, 1:].reshape(-1))
    mine.backward()
    real = slice(None) if mask is None else mask.astype(bool)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in llama.named_parameters()}
    assert theirs.keys() == grads.keys()
    return (t.logits.detach().numpy()[real], loss.item(), theirs), (logits.data[real], mine.item(), grads)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_in_float64(variant, padding):
    theirs, mine = both(exact(peer(variant)), padding)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=0, atol=1e-9)
    assert mine[1] == pytest.approx(theirs[1], abs=1e-10)
    for name, grad in theirs[2].items():
        np.testing.assert_allclose(mine[2][name], grad, rtol=0, atol=1e-9 * max(1, abs(grad).max()), err_msg=name)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_all_gradients_in_float32_to_rounding(variant, padding):
    """Against transformers as it is, its steps in float32 included; errors are measured against the largest number."""
    theirs, mine = both(peer(variant, torch.float32), padding)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=0, atol=2e-5 * abs(theirs[0]).max())
    for name, grad in theirs[2].items():
        np.testing.assert_allclose(mine[2][name], grad, rtol=0, atol=2e-5 * abs(grad).max(), err_msg=name)
