"""DoRA beside PEFT on the same PyTorch weights: outputs, gradients, files in both directions, merging, training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import (
    LINEARS,
    assert_all_close,
    base,
    batch,
    gradients,
    kinds,
    loss_curve,
    outputs,
    peft_state,
    randomize,
    start_from,
    values,
)

from minipeft import LoraConfig, PeftModel, Tensor, get_peft_model, nn

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
X, _ = batch()
# float64 outputs of about 10: the same sums in another order, five layers deep
SAME = {"rtol": 0, "atol": 1e-12}

configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.sampled_from([1, 3, 8, 16]),
        "use_dora": st.just(True),
        "use_rslora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, ["head"]]),
        "target_modules": st.sampled_from([LINEARS, ["fc"], ["q_proj", "fc"], r".*\.[qv]_proj"]),
        "rank_pattern": st.sampled_from([{}, {"v_proj": 1}]),
        "alpha_pattern": st.sampled_from([{}, {"fc": 5}]),
    }
)


def pair(config, directory, trained=True):
    """The same adapter in both libraries, by a file from here."""
    ours, theirs = base()
    ours = get_peft_model(ours, LoraConfig(**config))
    ours = randomize(ours) if trained else ours
    ours.save_pretrained(directory)
    return ours, peft.PeftModel.from_pretrained(theirs, directory, is_trainable=True)


@settings(max_examples=15)
@given(configs)
def test_names_shapes_and_flags_are_pefts(config):
    ours, theirs = base()
    ours, theirs = get_peft_model(ours, LoraConfig(**config)), peft.get_peft_model(theirs, peft.LoraConfig(**config))
    assert kinds(ours) == kinds(theirs)


def test_magnitudes_start_as_pefts():
    ours, theirs = base()
    config = {"r": 2, "use_dora": True, "target_modules": LINEARS}
    ours, theirs = get_peft_model(ours, LoraConfig(**config)), peft.get_peft_model(theirs, peft.LoraConfig(**config))
    found, expected = ({n: a for n, a in values(m).items() if "magnitude" in n} for m in (ours, theirs))
    assert len(found) == len(LINEARS)
    assert_all_close(found, expected, rtol=1e-14)


@settings(max_examples=20)
@given(configs)
def test_outputs_and_gradients_of_a_file_from_here_are_pefts(tmp_path, config):
    ours, theirs = pair(config, tmp_path)
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    assert_all_close(gradients(ours), gradients(theirs), rtol=1e-9, atol=1e-11)


@settings(max_examples=15)
@given(configs)
def test_a_file_from_peft_gives_the_same_outputs_here(tmp_path, config):
    ours, theirs = base()
    theirs = randomize(peft.get_peft_model(theirs, peft.LoraConfig(**config))).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(ours, tmp_path)
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    assert_all_close(values(ours), values(theirs))


@pytest.mark.parametrize("init", ["both", "pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_saved_so_that_peft_needs_no_changed_base(init, tmp_path):
    ours, theirs = pair({"r": 2, "use_dora": True, "init_lora_weights": init}, tmp_path)
    np.testing.assert_allclose(outputs(theirs), outputs(ours), rtol=0, atol=1e-11)


@settings(max_examples=10)
@given(configs)
def test_the_merged_and_unloaded_weights_are_pefts(tmp_path, config):
    ours, theirs = pair(config, tmp_path)
    found, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert_all_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("second_dora", [False, True])
def test_two_adapters_together_and_merged_are_pefts(second_dora, tmp_path):
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, LoraConfig(r=2, lora_alpha=3, use_dora=True)))
    ours.add_adapter("second", LoraConfig(r=3, lora_alpha=4, target_modules=["fc", "v_proj"], use_dora=second_dora))
    ours.set_adapter("second")
    randomize(ours, seed=4)
    for name in ("default", "second"):
        ours.save_pretrained(tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "default", is_trainable=True)
    theirs.load_adapter(tmp_path / "second", "second", is_trainable=True)
    for names in ("default", "second", ["default", "second"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    ours.merge_adapter()
    theirs.merge_adapter(["default", "second"])
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)


def test_dropout_with_the_same_mask_gives_pefts_outputs_and_gradients(tmp_path):
    config = {"r": 2, "lora_dropout": 0.5, "use_dora": True, "target_modules": ["fc", "q_proj"], "bias": "all"}
    ours, theirs = pair(config, tmp_path)
    rng = np.random.default_rng(0)
    masks = {width: 2.0 * (rng.random((len(X), width)) < 0.5) for width in (5, 6)}

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(masks[x.shape[-1]])

    class OurMasked(nn.Module):
        p = 0.5

        def forward(self, x):
            return x * masks[x.shape[-1]]

    for layer in theirs.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = Masked()
    for _, layer in ours.adapter_layers():
        layer.lora_dropout["default"] = OurMasked()
    ours.train()
    theirs.train()
    y, expected = ours(Tensor(X)), theirs(torch.from_numpy(X))
    np.testing.assert_allclose(y.data, expected.detach().numpy(), **SAME)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    found, expected = (
        {n: np.asarray(p.grad) for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)
    )
    assert_all_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("float64", 1e-11)])
def test_thirty_steps_follow_pefts_losses_to_rounding(dtype, rtol):
    torch.manual_seed(0)
    ours, theirs = base(dtype)
    config = {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": LINEARS}
    ours, theirs = get_peft_model(ours, LoraConfig(**config)), peft.get_peft_model(theirs, peft.LoraConfig(**config))
    start_from(ours, peft_state(theirs))
    losses = loss_curve(ours)
    np.testing.assert_allclose(losses, loss_curve(theirs), rtol=rtol)
    assert losses[-1] < losses[0]
