"""P-Tuning beside PEFT: the encoder's outputs and gradients, whole models, files in both directions."""

from __future__ import annotations

import json

import llama_cases as cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minipeft import PeftModel, PromptEncoderConfig, get_peft_model
from minipeft.methods.p_tuning import PromptEncoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
KINDS = ("MLP", "LSTM")
# float64 logits of about 10 through two blocks: the same sums in another order
SAME = {"rtol": 0, "atol": 1e-9}

sizes = st.fixed_dictionaries(
    {
        "num_virtual_tokens": st.integers(1, 5),
        "token_dim": st.integers(1, 6),
        "encoder_hidden_size": st.integers(1, 5),
        "encoder_num_layers": st.integers(1, 3),
    }
)


def options(kind, **more):
    return {"num_virtual_tokens": 3, "encoder_hidden_size": 5, "encoder_reparameterization_type": kind} | more


@pytest.mark.parametrize("kind", KINDS)
@given(sizes)
def test_the_encoder_has_pefts_names_outputs_and_gradients(kind, size):
    if kind == "MLP":
        del size["encoder_num_layers"]  # has no effect; PEFT stops while it warns of that
    ours = PromptEncoder(PromptEncoderConfig(**options(kind, **size)), 0, "float64")
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(**options(kind, **size), num_transformer_submodules=1, task_type="CAUSAL_LM")
    ).double()
    theirs.load_state_dict({n: torch.from_numpy(a) for n, a in ours.state_dict().items()})
    h = ours()
    expected = theirs(torch.arange(size["num_virtual_tokens"])[None])[0]
    np.testing.assert_allclose(h.data, expected.detach().numpy(), atol=1e-13)
    g = np.random.default_rng(1).standard_normal(h.shape)
    h.backward(g)
    expected.backward(torch.from_numpy(g))
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(dict(ours.named_parameters())[name].grad, p.grad.numpy(), atol=1e-12, err_msg=name)


def test_the_starts_have_pefts_spread():
    """Each matrix and table of the encoder: the deviation of its start, in both libraries, up to sampling."""
    size = {"num_virtual_tokens": 40, "token_dim": 60, "encoder_hidden_size": 50}
    for kind in KINDS:
        ours = PromptEncoder(PromptEncoderConfig(**options(kind, **size)), 0)
        torch.manual_seed(0)
        theirs = peft.PromptEncoder(
            peft.PromptEncoderConfig(**options(kind, **size), num_transformer_submodules=1, task_type="CAUSAL_LM")
        )
        for name, p in theirs.named_parameters():
            if p.ndim == 2:
                found = dict(ours.named_parameters())[name].data.std()
                assert found == pytest.approx(p.std().item(), rel=0.06), name


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_from_here_gives_pefts_model_the_same_logits(kind, padding, tmp_path):
    ids, mask, _ = cases.batch(padding)
    ours = get_peft_model(cases.llama(), PromptEncoderConfig(**options(kind)))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(cases.exact(cases.peer()), tmp_path).double()  # it read them as float32
    peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"))
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    with torch.no_grad():
        seen = None if mask is None else torch.from_numpy(mask)
        logits = theirs(torch.from_numpy(ids), attention_mask=seen).logits.numpy()
    real = slice(None) if mask is None else mask.astype(bool)
    np.testing.assert_allclose(ours(ids, mask).data[real], logits[:, 3:][real], **SAME)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_from_peft_gives_the_same_logits_here(kind, padding, tmp_path):
    ids, mask, _ = cases.batch(padding)
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(**options(kind), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(cases.exact(cases.peer()), config).double()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(cases.llama(), tmp_path)
    with torch.no_grad():
        seen = None if mask is None else torch.from_numpy(mask)
        logits = theirs(torch.from_numpy(ids), attention_mask=seen).logits.numpy()
    real = slice(None) if mask is None else mask.astype(bool)
    np.testing.assert_allclose(ours(ids, mask).data[real], logits[:, 3:][real], **SAME)
    ours.save_pretrained(tmp_path / "again")
    kept, again = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, tmp_path / "again"))
    assert {name: again[name] for name in again if name in kept} == {name: kept[name] for name in again if name in kept}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_model_are_pefts(kind):
    """Of the real tokens' loss: PEFT's own also asks the last virtual token for the first real one."""
    ids, mask, labels = cases.batch("right")
    ours = get_peft_model(cases.llama(), PromptEncoderConfig(**options(kind)))
    config = peft.PromptEncoderConfig(**options(kind), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(cases.exact(cases.peer()), config).double()
    encoder = next(layer for _, layer in ours.adapter_layers()).prompt_encoder["default"]
    theirs.prompt_encoder["default"].load_state_dict({n: torch.from_numpy(a) for n, a in encoder.state_dict().items()})
    loss = ours.loss(ids, labels, mask)
    loss.backward()
    logits = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits[:, 3:-1]
    targets = torch.from_numpy(labels[:, 1:]).reshape(-1)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for name, p in theirs.prompt_encoder["default"].named_parameters():
        found = dict(encoder.named_parameters())[name].grad
        np.testing.assert_allclose(found, p.grad.numpy(), rtol=0, atol=1e-9, err_msg=name)
