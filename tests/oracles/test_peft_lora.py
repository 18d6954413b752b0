"""LoRA beside PEFT on the same PyTorch weights: names, files in both directions, merging, start values, training."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import peft_references
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import LINEARS, assert_all_close, base, kinds, loss_curve, outputs, peft_state, randomize, start_from, values

from minipeft import LoraConfig, PeftModel, get_peft_model, nn

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not this project's to mend
# float64 outputs of about 10: the same sums in another order, five layers deep
SAME = {"rtol": 0, "atol": 1e-12}

configs = st.fixed_dictionaries(
    {
        "r": st.integers(1, 5),
        "lora_alpha": st.sampled_from([1, 3, 8, 16]),
        "lora_dropout": st.sampled_from([0.0, 0.4]),
        "use_rslora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([None, ["head"], ["norm"], ["orm", "head"], ["layers.1"]]),
        "target_modules": st.sampled_from(
            [
                LINEARS,
                ["fc"],
                ["q_proj", "fc"],
                ["layers.0.v_proj", "q_proj"],
                r".*\.[qv]_proj",
                r"layers\.0\..*_proj|fc",
            ]
        ),
        "rank_pattern": st.sampled_from([{}, {"v_proj": 1}, {r"layers\.\d\.v_proj": 2, "_proj": 9, ".*q_proj": 4}]),
        "alpha_pattern": st.sampled_from([{}, {"fc": 5}, {r"layers\.0\..*": 2, r"layers\.1\.v_proj": 7}]),
    }
)


@settings(max_examples=40)
@given(configs)
def test_parameter_names_shapes_flags_and_counts_are_pefts(config):
    ours, theirs = base()
    ours, theirs = get_peft_model(ours, LoraConfig(**config)), peft.get_peft_model(theirs, peft.LoraConfig(**config))
    assert kinds(ours) == kinds(theirs)
    printed = []
    for model in (ours, theirs):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        printed.append(out.getvalue())
    assert printed[0] == printed[1]


@settings(max_examples=25)
@given(configs)
def test_an_adapter_saved_here_loads_in_peft_with_the_same_outputs(tmp_path, config):
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, LoraConfig(**config))).eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    np.testing.assert_allclose(outputs(theirs), outputs(ours), **SAME)
    assert_all_close(values(ours), values(theirs))


@settings(max_examples=25)
@given(configs)
def test_an_adapter_saved_by_peft_loads_here_with_the_same_outputs(tmp_path, config):
    ours, theirs = base()
    theirs = randomize(peft.get_peft_model(theirs, peft.LoraConfig(**config))).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(ours, tmp_path)
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    assert_all_close(values(ours), values(theirs))


def test_an_adapter_that_named_modules_pefts_model_did_not_have_loads_here(tmp_path):
    ours, theirs = base()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj", "c_attn"]))
    randomize(theirs).save_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(PeftModel.from_pretrained(ours, tmp_path)), outputs(theirs), **SAME)


@settings(max_examples=10)
@given(configs)
def test_a_file_goes_through_both_libraries_and_comes_back_the_same(tmp_path, config):
    ours = randomize(get_peft_model(base()[0], LoraConfig(**config)))
    ours.save_pretrained(tmp_path / "ours")
    peft.PeftModel.from_pretrained(base()[1], tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(base()[0], tmp_path / "theirs")
    np.testing.assert_array_equal(outputs(back), outputs(ours.eval()))


def test_patterns_that_overlap_keep_their_order_in_the_file(tmp_path):
    """The first key that matches counts. PEFT sorts the keys when it saves, and then cannot load its own file."""
    ours, theirs = base()
    patterns = {"rank_pattern": {"v_proj": 2, ".*_proj": 4}, "alpha_pattern": {"layers.1.v_proj": 9, ".*v_proj": 3}}
    ours = randomize(get_peft_model(ours, LoraConfig(r=3, **patterns)))
    ours.save_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(peft.PeftModel.from_pretrained(theirs, tmp_path)), outputs(ours), **SAME)
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(base()[0], tmp_path)), outputs(ours))


def test_all_linear_saved_here_means_the_same_layers_in_peft(tmp_path):
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, LoraConfig(r=2, target_modules="all-linear")))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert kinds(ours).keys() == kinds(theirs).keys()
    np.testing.assert_allclose(outputs(theirs), outputs(ours), **SAME)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("init", ["kaiming", "gaussian_b", "both", "pissa", "olora"])
def test_every_init_here_is_saved_so_that_peft_needs_no_changed_base(init, r, rslora, tmp_path):
    ours, theirs = base()
    patterns = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 7}}
    ours = get_peft_model(ours, LoraConfig(r=r, init_lora_weights=init, use_rslora=rslora, **patterns))
    randomize(ours).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    np.testing.assert_allclose(outputs(theirs), outputs(ours), **SAME)
    expected = base()[1].state_dict()
    for name, weight in theirs.state_dict().items():
        if "base_layer.weight" in name:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
            np.testing.assert_array_equal(weight.numpy(), expected[plain].numpy())


# --- start values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_inits_from_the_weight_are_pefts(init, r):
    ours, theirs = base("float32")
    options = {"r": r, "lora_alpha": 3, "init_lora_weights": init, "target_modules": LINEARS}
    ours = get_peft_model(ours, LoraConfig(**options))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    found, expected = ours.state_dict(), {n: t.numpy() for n, t in theirs.state_dict().items()}
    for layer in LINEARS:
        weight, A, B = (
            f"base_model.model.{layer}.{p}.weight" for p in ("base_layer", "lora_A.default", "lora_B.default")
        )
        # 2e-6: decompositions in float32 of 6 × 6 matrices; the sign of a pair of singular vectors is free
        np.testing.assert_allclose(found[weight], expected[weight], rtol=0, atol=2e-6)
        np.testing.assert_allclose(found[B] @ found[A], expected[B] @ expected[A], rtol=0, atol=2e-6)
        np.testing.assert_allclose(abs(found[A]), abs(expected[A]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("converted", [False, True])
def test_an_adapter_that_changed_pefts_base_loads_here(init, converted, tmp_path):
    """As PEFT saves it, to be taken from a base decomposed again; or converted by PEFT to twice the rank."""
    ours, theirs = base("float32")
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=LINEARS)
    )
    if converted:
        theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide does before it saves the start
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
        randomize(theirs)
        theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    else:
        randomize(theirs).save_pretrained(tmp_path / "end")
    ours = PeftModel.from_pretrained(ours, tmp_path / "end")
    # 1e-4: outputs of about 10 in float32, through a decomposition and back
    np.testing.assert_allclose(outputs(ours), outputs(theirs), rtol=0, atol=1e-4)


def test_random_starts_have_pefts_distribution():
    from scipy.stats import ks_2samp

    for init in (True, "gaussian"):
        torch.manual_seed(0)
        options = {"r": 16, "target_modules": ["fc"], "init_lora_weights": init}
        theirs = peft.get_peft_model(
            torch.nn.ModuleDict({"fc": torch.nn.Linear(200, 300)}), peft.LoraConfig(**options)
        ).state_dict()
        model = nn.Sequential()
        model.fc = nn.Linear(200, 300, rng=0)
        ours = get_peft_model(model, LoraConfig(**options)).state_dict()
        name = "base_model.model.fc.lora_A.default.weight"
        assert ks_2samp(ours[name].ravel(), theirs[name].numpy().ravel()).pvalue > 0.01  # seeded on both sides
        assert not ours[name.replace("lora_A", "lora_B")].any()
        assert not theirs[name.replace("lora_A", "lora_B")].any()


# --- several adapters, merging ----------------------------------------------------------------------------------------


def pair(tmp_path):
    """The same two adapters in both libraries."""
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, LoraConfig(r=2, lora_alpha=3)))
    ours.add_adapter("second", LoraConfig(r=3, lora_alpha=4, target_modules=["fc", "v_proj"], modules_to_save=["head"]))
    ours.set_adapter("second")
    randomize(ours, seed=4)
    for name in ("default", "second"):
        ours.save_pretrained(tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "default", is_trainable=True)
    theirs.load_adapter(tmp_path / "second", "second", is_trainable=True)
    ours.set_adapter("default")
    return ours, theirs


def test_two_adapters_switch_and_add_up_as_pefts(tmp_path):
    ours, theirs = pair(tmp_path)
    for names in ("default", "second", ["default", "second"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    ours.set_adapter("default")
    theirs.set_adapter("default")
    assert kinds(ours) == kinds(theirs)
    with ours.disable_adapter(), theirs.disable_adapter():
        np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)


@pytest.mark.parametrize("names", [["default"], ["second"], ["default", "second"]])
def test_merged_weights_are_pefts(names, tmp_path):
    ours, theirs = pair(tmp_path)
    ours.merge_adapter(names)
    theirs.merge_adapter(names)
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)
    assert_all_close(values(ours), values(theirs), atol=1e-14)  # one sum, one rounding
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    np.testing.assert_allclose(outputs(ours), outputs(theirs), **SAME)


@settings(max_examples=10)
@given(configs)
def test_the_merged_and_unloaded_model_is_pefts(tmp_path, config):
    ours, theirs = base()
    ours = randomize(get_peft_model(ours, LoraConfig(**config)))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload()
    assert_all_close(ours.merge_and_unload().state_dict(), theirs.state_dict(), atol=1e-14)


# --- training ---------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(configs, st.sampled_from([("float32", 1e-4), ("float64", 1e-11)]))
def test_thirty_steps_follow_pefts_losses_to_rounding(config, precision):
    """The same start, data and AdamW. Thirty steps that divide loss by ten make of float32's 6e-8 up to 1e-4."""
    torch.manual_seed(0)
    (dtype, rtol), config = precision, config | {"lora_dropout": 0.0}
    ours, theirs = base(dtype)
    ours, theirs = get_peft_model(ours, LoraConfig(**config)), peft.get_peft_model(theirs, peft.LoraConfig(**config))
    start_from(ours, peft_state(theirs))
    losses = loss_curve(ours)
    np.testing.assert_allclose(losses, loss_curve(theirs), rtol=rtol)
    assert losses[-1] < losses[0]
    if dtype == "float64":
        assert_all_close(values(ours), values(theirs), atol=1e-9)


def test_the_kept_numbers_are_what_peft_gives_now(tmp_path):
    directories = (tmp_path, peft_references.REFERENCE)
    peft_references.reference(tmp_path)
    now, kept = ({n: abs(a) for n, a in peft_references.kept_in(d).items()} for d in directories)
    # another processor rounds otherwise: float32 sums to 2e-5, in a trained network's outputs as well
    assert_all_close(now, kept, rtol=2e-5, atol=2e-5)
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in directories]
    for config in configs:
        config["target_modules"].sort()
        config["auto_mapping"] = config["peft_version"] = None
    assert configs[0] == configs[1]
