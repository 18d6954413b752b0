"""get_peft_model and PeftModel: targets, several adapters, merging, saving and loading, and what must never change."""

import copy
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_references import CONFIG, REFERENCE, base_of, kept_in, part
from safetensors.numpy import load_file, save_file
from twins import LINEARS, Net, assert_all_close, batch, loss_curve, start_from

from minipeft import AdaLoraConfig, LoraConfig, PeftModel, Tensor, fit, get_peft_model, nn, ops, optim
from minipeft.backend import get_namespace, to_numpy
from minipeft.methods.base import AdapterLayer, Method
from minipeft.methods.lora import INITS, OFFSET_INITS
from minipeft.models import MLP
from minipeft.models.vit import ViT
from minipeft.nn import Parameter
from minipeft.targets import SavedModule, find_targets

EPS32, EPS64 = float(np.finfo("float32").eps), float(np.finfo("float64").eps)
ZERO_INITS = ["kaiming", "gaussian", "gaussian_b"]


BATCH = np.random.default_rng(1).standard_normal((4, 5))


def outputs(model, xp=np, dtype="float64"):
    return to_numpy(model(Tensor(xp.asarray(BATCH.astype(dtype)))).data)


def randomize(model, adapter="default", seed=3, scale=0.5):
    """Give an adapter values as if it were trained."""
    rng = np.random.default_rng(seed)
    for p in model.adapter_state(adapter).values():
        new = p.data + get_namespace(p.data).asarray((scale * rng.standard_normal(p.shape)).astype(p.dtype))
        p.data = new
    return model


def adapted(seed=0, dtype="float64", **options):
    options = {"r": 2, "lora_alpha": 4} | options
    return randomize(get_peft_model(Net(dtype, seed), LoraConfig(**options)))


def fingerprint(model):
    """All that a failed call must leave alone: module types and attributes, bytes, flags, gradients, modes."""
    return (
        [
            (
                name,
                type(m).__name__,
                m.training,
                [(k, sorted(v) if type(v) is dict else "") for k, v in vars(m).items()],
            )
            for name, m in model.named_modules()
        ],
        [
            (name, id(p), p.data.tobytes(), p.requires_grad, None if p.grad is None else p.grad.tobytes())
            for name, p in model.named_parameters()
        ],
        repr(model),
    )


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("init", [True, *ZERO_INITS])
def test_training_starts_from_the_base_model_bit_for_bit(xp, init, dtype):
    expected = outputs(Net(dtype).to(xp), xp, dtype)
    model = get_peft_model(Net(dtype).to(xp), LoraConfig(r=2, init_lora_weights=init, use_rslora=True))
    np.testing.assert_array_equal(outputs(model, xp, dtype), expected)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", EPS32), ("float64", EPS64)])
@pytest.mark.parametrize("init", OFFSET_INITS)
def test_two_nonzero_factors_start_from_the_base_model_to_rounding(xp, init, dtype, eps):
    base = Net(dtype).to(xp)
    before, expected = {n: to_numpy(a).copy() for n, a in base.state_dict().items()}, outputs(base, xp, dtype)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, init_lora_weights=init))
    # 100 ε: five layers, each a sum of at most 6 products of numbers up to 3, twice
    np.testing.assert_allclose(outputs(model, xp, dtype), expected, rtol=0, atol=100 * eps)
    assert np.abs(to_numpy(model.fc.weight.data) - before["fc.weight"]).max() > 0.01  # W did give something up


def test_a_model_without_training_mode_starts_the_same_with_dropout():
    base = Net().eval()
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.5))
    assert not any(m.training for m in model.modules())
    randomize(model)
    np.testing.assert_array_equal(outputs(model), outputs(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_that_of_the_config(rslora):
    model = adapted(r=4, lora_alpha=6, use_rslora=rslora)
    assert model.fc.scaling == {"default": 6 / math.sqrt(4) if rslora else 6 / 4}


def test_patterns_give_single_modules_their_rank_and_alpha():
    options = {"rank_pattern": {r"layers\.1\..*": 3, "q_proj": 1}, "alpha_pattern": {"fc": 8, "v_proj": 2}}
    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=4, **options))
    found = {name: (m.lora_A["default"].weight.shape[0], m.scaling["default"]) for name, m in model.adapter_layers()}
    assert found == {
        "fc": (2, 8 / 2),
        "layers.0.q_proj": (1, 4 / 1),
        "layers.0.v_proj": (2, 2 / 2),
        "layers.1.q_proj": (3, 4 / 3),
        "layers.1.v_proj": (3, 2 / 3),
    }


def test_the_seed_decides_the_start_values():
    starts = [get_peft_model(Net(), LoraConfig(r=2), seed=seed).fc.lora_A["default"].weight.data for seed in (0, 0, 1)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).all()


def test_layers_of_one_model_start_differently():
    model = get_peft_model(Net(), LoraConfig(r=2))
    first, second = (model.layers[i].q_proj.lora_A["default"].weight.data for i in range(2))
    assert (first != second).all()


# --- which modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (None, LINEARS),
        ("all-linear", LINEARS),
        ("ALL", LINEARS),
        ("All-Linear", LINEARS),
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (("v_proj", "fc"), ["fc", "layers.0.v_proj", "layers.1.v_proj"]),
        ({"q_proj"}, ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1.q_proj"], ["layers.1.q_proj"]),
        (["1.q_proj"], ["layers.1.q_proj"]),
        (["head"], ["head"]),
        (["q_proj", "layers.0.q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        ("head", ["head"]),
        (r".*\.(q|v)_proj", LINEARS[1:]),
        (r"layers\.0\..*_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
    ],
)
def test_targets_by_name_ending_list_and_regular_expression(target_modules, expected):
    assert find_targets(Net(), LoraConfig(target_modules=target_modules).target_modules) == expected
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=target_modules))
    assert [name for name, _ in model.adapter_layers()] == expected


def test_all_linear_finds_the_projections_of_a_vision_transformer_and_leaves_the_head_out():
    targets = find_targets(ViT(rng=0), "all-linear")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    assert sorted({name.rpartition(".")[2] for name in targets}) == sorted(names)
    assert len(targets) == 6 * len(ViT(rng=0).layers)


def test_all_linear_leaves_out_what_is_saved_whole():
    model = get_peft_model(Net(), LoraConfig(r=2, modules_to_save=["fc"]))
    assert [name for name, _ in model.adapter_layers()] == LINEARS[1:]
    assert isinstance(model.fc, SavedModule)
    model = get_peft_model(Net(), LoraConfig(r=2, modules_to_save=["layers.1"]))
    assert [name for name, _ in model.adapter_layers()] == LINEARS[:3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_prj"]}, "no module is called 'q_prj'; closest are 'q_proj'"),
        ({"target_modules": ["fc", "query"]}, "no module is called 'query'"),
        ({"target_modules": ["proj"]}, "'proj'; closest are .*'q_proj'.*"),
        ({"target_modules": "q_prj"}, r"whole name matches 'q_prj', a regular expression; \['q_prj'\] means an ending"),
        ({"target_modules": ["all-linear"]}, "'all-linear'"),
        ({"target_modules": r"("}, r"target_modules: '\(' is no regular expression"),
        ({"target_modules": ["norm"]}, "'layers.0.norm' is a LayerNorm; only Linear layers"),
        ({"target_modules": ".*"}, "only Linear layers"),
        ({"target_modules": ["fc"], "modules_to_save": ["fc"]}, "leaves no Linear"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: no module is called 'haed'; closest are 'head'"),
        ({"r": 6}, r"r of 'fc': got 6; a weight of \(6, 5\) has rank at most 5, so 1 to 5 is accepted"),
        ({"r": 2, "rank_pattern": {"v_proj": 7}}, "r of 'layers.0.v_proj': got 7; .* at most 6"),
    ],
)
def test_targets_that_do_not_exist_or_fit_are_refused_and_the_model_is_unchanged(options, words):
    model = Net()
    model.head.requires_grad_(False)
    model.layers[0].eval()
    outputs(model)
    ops.tensor(model(Tensor(BATCH))).sum().backward()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, LoraConfig(**options))
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["", "a.b", 5, None])
def test_adapter_names_without_dots_only(name):
    model = Net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="adapter_name: got"):
        get_peft_model(model, LoraConfig(r=2), adapter_name=name)
    assert fingerprint(model) == before


def test_a_failure_in_the_middle_of_attaching_leaves_the_model_unchanged():
    model = Net()
    model.layers[1].q_proj.weight.data[0, 0] = np.nan  # its SVD fails, after three layers are done
    before = fingerprint(model)
    with pytest.raises((ValueError, np.linalg.LinAlgError)):
        get_peft_model(model, LoraConfig(r=2, init_lora_weights="pissa"))
    assert fingerprint(model) == before


def test_a_failure_while_adding_a_second_adapter_leaves_the_first_unchanged():
    model = adapted(init_lora_weights="both")
    model.layers[1].q_proj.base_layer.weight.data[0, 0] = np.nan
    before = fingerprint(model)
    with pytest.raises((ValueError, np.linalg.LinAlgError)):
        model.add_adapter("second", LoraConfig(r=2, init_lora_weights="pissa", modules_to_save=["head"]))
    assert fingerprint(model) == before
    assert list(model.peft_config) == model.active_adapters == ["default"]


def test_a_model_that_has_adapters_is_refused_and_unchanged():
    base = Net()
    model = get_peft_model(base, LoraConfig(r=2))
    before = fingerprint(model)
    for again in (model, base, model.get_base_model()):  # a notebook cell that runs twice passes `base`
        with pytest.raises(TypeError, match="it has adapters already"):
            get_peft_model(again, LoraConfig(r=2))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (Net(), None, "config: got a builtins.NoneType; a config of minipeft is accepted"),
        (Net(), {"r": 8}, "config: got a builtins.dict"),
        (Net(), LoraConfig, "config: got the class minipeft.methods.lora.LoraConfig"),
        (None, LoraConfig(), "model: expected a Module, got NoneType"),
        (LoraConfig(), Net(), "model: expected a Module, got LoraConfig"),
    ],
)
def test_what_is_no_model_or_no_config_is_named(model, config, words):
    with pytest.raises(TypeError, match=words):
        get_peft_model(model, config)


# --- what trains ------------------------------------------------------------------------------------------------------


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def expected_names(modules, kinds=("lora_A", "lora_B"), adapter="default"):
    return {f"base_model.model.{module}.{kind}.{adapter}.weight" for module in modules for kind in kinds}


def test_only_the_adapter_trains():
    assert trainable(get_peft_model(Net(), LoraConfig(r=2))) == expected_names(LINEARS)


def test_bias_lora_only_trains_the_biases_of_adapted_layers():
    model = get_peft_model(Net(), LoraConfig(r=2, bias="lora_only", target_modules=["fc", "q_proj"]))
    biases = {f"base_model.model.layers.{i}.q_proj.base_layer.bias" for i in range(2)}  # fc has none
    assert trainable(model) - expected_names(["fc", "layers.0.q_proj", "layers.1.q_proj"]) == biases


def test_bias_all_trains_every_bias():
    model = get_peft_model(Net(), LoraConfig(r=2, bias="all", target_modules=["fc"]))
    found = trainable(model) - expected_names(["fc"])
    assert found == {f"base_model.model.{n}" for n, _ in Net().named_parameters() if n.endswith("bias")}


def test_modules_to_save_train_a_copy_and_the_original_stays():
    base = Net()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head", "norm"]))
    copies = {f"base_model.model.head.modules_to_save.default.{p}" for p in ("weight", "bias")} | {
        f"base_model.model.layers.{i}.norm.modules_to_save.default.{p}" for i in range(2) for p in ("weight", "bias")
    }
    assert trainable(model) - expected_names(["fc"]) == copies
    original = base.head.original_module.weight.data.copy()
    train(model)
    np.testing.assert_array_equal(base.head.original_module.weight.data, original)
    assert (base.head.modules_to_save["default"].weight.data != original).all()


def test_modules_to_save_are_all_whose_name_ends_so_as_in_peft():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc"], modules_to_save=["_proj"]))
    saved = {n for n, m in model.base_model.model.named_modules() if isinstance(m, SavedModule)}
    assert saved == {name for name in LINEARS if name.endswith("_proj")}


def test_a_module_inside_one_that_is_saved_is_saved_with_it():
    names = ["layers.0", "layers.0.norm", "norm"]
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc"], modules_to_save=names))
    assert [name for name, _ in model._saved_modules()] == ["layers.0", "layers.1.norm"]
    outputs(model)


def test_a_module_that_an_adapter_adapts_is_not_saved_whole_by_another():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = fingerprint(model)
    for saved in ("q_proj", "layers.0"):
        with pytest.raises(ValueError, match="another adapter's layers inside"):
            model.add_adapter("second", LoraConfig(r=2, target_modules=["fc"], modules_to_save=[saved]))
    assert fingerprint(model) == before


def train(model, steps=5, lr=0.05, optimizer=None):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 5)), rng.integers(0, 3, 8)
    dtype = next(model.parameters()).dtype
    optimizer = optimizer or optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return fit(model, [(Tensor(x.astype(dtype)), y)], steps=steps, optimizer=optimizer, progress=False)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"init_lora_weights": "pissa"}, {"bias": "lora_only"}])
def test_training_touches_nothing_but_what_trains(options):
    model = get_peft_model(Net(), LoraConfig(r=2, **options))
    names = trainable(model)
    before = {n: p.data.tobytes() for n, p in model.named_parameters()}
    history = train(model)
    assert history.loss[-1] < history.loss[0]
    for name, p in model.named_parameters():
        assert (p.data.tobytes() != before[name]) == (name in names), name
        assert (p.grad is not None) == (name in names), name  # no gradient of W ever exists


@pytest.mark.parametrize("init", OFFSET_INITS)
def test_what_the_start_took_from_the_weights_comes_back_after_training(init):
    """The start is kept apart from the factors, which the optimizer changes in place."""
    weights = {n: a.copy() for n, a in Net().state_dict().items()}
    model = get_peft_model(Net(), LoraConfig(r=2, init_lora_weights=init))
    train(model)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), outputs(Net()), **SAME)
    for name, a in model.unload().state_dict().items():
        np.testing.assert_allclose(a, weights[name], **SAME)


def test_gradients_of_an_earlier_training_are_gone():
    base = Net()
    base(Tensor(BATCH)).sum().backward()
    assert all(p.grad is None for p in get_peft_model(base, LoraConfig(r=2)).parameters())


def test_an_adapter_learns_what_the_frozen_base_cannot():
    model = get_peft_model(Net(), LoraConfig(r=2))
    assert train(model, steps=100).loss[-1] < 0.1


def test_the_count_of_trainable_parameters(capsys):
    model = get_peft_model(Net(), LoraConfig(r=2))
    adapter = 2 * (5 + 6) + 4 * 2 * (6 + 6)
    everything = adapter + sum(p.size for p in Net().parameters())
    assert model.get_nb_trainable_parameters() == (adapter, everything)
    model.print_trainable_parameters()
    share = 100 * adapter / everything
    assert capsys.readouterr().out == (
        f"trainable params: {adapter:,d} || all params: {everything:,d} || trainable%: {share:.4f}\n"
    )


# --- several adapters -------------------------------------------------------------------------------------------------


def two_adapters(first=None, second=None):
    model = adapted(**(first or {}))
    model.add_adapter("second", LoraConfig(**{"r": 1, "lora_alpha": 3} | (second or {})), seed=7)
    return randomize(model, "second", seed=8)


def delta(model, *adapters):
    """W + Σ s·(B A − B₀A₀) put into a plain model, as the adapters' meaning says."""
    plain = Net()
    for name, layer in model.adapter_layers():
        for adapter in adapters:
            if adapter in layer.adapters:
                change = layer.delta(adapter)
                if adapter in layer.offset:
                    A0, B0 = layer.offset[adapter]
                    change = change - layer.scaling[adapter] * B0 @ A0
                plain.get_submodule(name).weight.data = plain.get_submodule(name).weight.data + change
    return outputs(plain)


SAME = {"rtol": 0, "atol": 1e-12}  # float64, numbers of about 10 through five layers


@pytest.mark.parametrize("first", [True, *INITS])
@pytest.mark.parametrize("second", [True, *OFFSET_INITS])
def test_switching_disabling_and_unloading_with_any_pair_of_inits(first, second):
    base = outputs(Net())
    weights = {n: a.copy() for n, a in Net().state_dict().items()}
    model = two_adapters(
        {"init_lora_weights": first}, {"init_lora_weights": second, "target_modules": ["fc", "v_proj"]}
    )
    one, two, both = delta(model, "default"), delta(model, "second"), delta(model, "default", "second")
    assert min(np.abs(a - b).max() for a, b in [(one, base), (two, base), (one, two), (both, one)]) > 0.01

    np.testing.assert_allclose(outputs(model), one, **SAME)
    model.set_adapter("second")
    np.testing.assert_allclose(outputs(model), two, **SAME)
    model.set_adapter(["default", "second"])
    np.testing.assert_allclose(outputs(model), both, **SAME)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), base, **SAME)
    np.testing.assert_allclose(outputs(model), both, **SAME)
    model.set_adapter("default")
    np.testing.assert_allclose(outputs(model), one, **SAME)

    for name, a in copy.deepcopy(model).unload().state_dict().items():
        np.testing.assert_allclose(a, weights[name], **SAME)
    np.testing.assert_allclose(outputs(copy.deepcopy(model).merge_and_unload(["second"])), two, **SAME)
    np.testing.assert_allclose(outputs(copy.deepcopy(model).merge_and_unload(["default", "second"])), both, **SAME)
    model.delete_adapter("default")
    np.testing.assert_allclose(outputs(model), two, **SAME)
    for name, a in model.unload().state_dict().items():
        np.testing.assert_allclose(a, weights[name], **SAME)


def test_many_resting_adapters_give_their_share_back_in_one_order():
    """Not in a set's, which is another in each process: sums in another order have other last bits."""
    model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["fc"], init_lora_weights="both"))
    for name in "abcdefgh":
        model.add_adapter(name, LoraConfig(r=1, target_modules=["fc"], init_lora_weights="both"), seed=ord(name))
    x, layer = Tensor(BATCH), model.fc
    y = layer.base_layer(x)
    y = y + ops.linear(ops.linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight) * 8.0
    for name in "abcdefgh":
        A0, B0 = (Tensor(factor) for factor in layer.offset[name])
        y = y + ops.linear(ops.linear(x, A0), B0) * 8.0
    np.testing.assert_array_equal(layer(x).data, y.data)


def test_an_adapter_that_is_added_is_not_active_and_does_not_train():
    model = two_adapters()
    assert model.active_adapters == ["default"]
    assert trainable(model) == expected_names(LINEARS)
    model.set_adapter("second")
    assert trainable(model) == expected_names(LINEARS, adapter="second")
    model.set_adapter(["second", "default"])
    assert trainable(model) == expected_names(LINEARS) | expected_names(LINEARS, adapter="second")


def test_training_one_adapter_leaves_the_other_bit_for_bit():
    model = two_adapters()
    model.set_adapter("second")
    before = {n: p.data.tobytes() for n, p in model.named_parameters()}
    train(model)
    changed = {n for n, p in model.named_parameters() if p.data.tobytes() != before[n]}
    assert changed == expected_names(LINEARS, adapter="second")


def test_two_active_adapters_train_together():
    model = two_adapters()
    model.set_adapter(["default", "second"])
    before = {n: p.data.tobytes() for n, p in model.named_parameters()}
    train(model)
    changed = {n for n, p in model.named_parameters() if p.data.tobytes() != before[n]}
    assert changed == expected_names(LINEARS) | expected_names(LINEARS, adapter="second")


def test_of_several_active_adapters_only_the_first_may_act_between_steps():
    model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["q_proj"]))
    model.add_adapter("ada", AdaLoraConfig(init_r=3, target_r=1, total_step=5, target_modules=["fc"]))
    model.set_adapter(["default", "ada"])
    with pytest.raises(ValueError, match=r"'ada' \(AdaLora\) acts between steps, which only the first can"):
        train(model)
    model.set_adapter(["ada", "default"])
    train(model)
    assert model.method.ranks(model) == {"fc": 1}


def test_a_name_given_twice_counts_once():
    model = two_adapters()
    expected = outputs(model)
    model.set_adapter(["default", "default"])
    np.testing.assert_array_equal(outputs(model), expected)
    model.merge_adapter(["default", "default"])
    np.testing.assert_allclose(outputs(model), expected, **SAME)


def test_saved_modules_switch_with_their_adapter():
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    model.add_adapter("third", LoraConfig(r=2, target_modules=["fc"]))
    for i, name in enumerate(["default", "second"], start=1):
        for p in model.adapter_state(name).values():
            p.data = np.full_like(p.data, i)
    results = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        results[name] = outputs(model)
    base = outputs(Net())
    np.testing.assert_array_equal(results["third"], base)
    assert (results["default"] != results["second"]).all()
    model.set_adapter("second")
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), base)
    np.testing.assert_array_equal(outputs(model), results["second"])
    for name in ("default", "second"):
        merged = copy.deepcopy(model).merge_and_unload([name])
        np.testing.assert_allclose(outputs(merged), results[name], **SAME)
        assert type(merged.head) is nn.Linear
    np.testing.assert_array_equal(outputs(model.unload()), base)


NAMES = ["fc", "layers", "weight", "lora_A", "lora_B", "base_layer", "modules_to_save", "original_module", "0", "a_b-c"]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_may_be_called_as_a_module(name, tmp_path):
    options = {"r": 2, "lora_alpha": 4, "modules_to_save": ["head"], "bias": "all"}
    model = randomize(get_peft_model(Net(), LoraConfig(**options), adapter_name=name), name)
    expected = outputs(model)
    default = randomize(get_peft_model(Net(), LoraConfig(**options)))
    np.testing.assert_array_equal(expected, outputs(default))
    assert model.adapter_state(name).keys() == default.adapter_state().keys()
    model.save_pretrained(tmp_path, adapter_name=name)
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(Net(), tmp_path)), expected)


def test_names_that_begin_alike_are_kept_apart():
    model = get_peft_model(Net(), LoraConfig(r=1), adapter_name="a")
    model.add_adapter("ab", LoraConfig(r=2))
    model.add_adapter("A", LoraConfig(r=3))
    for name, r in {"a": 1, "ab": 2, "A": 3}.items():
        state = model.adapter_state(name)
        assert len(state) == 2 * len(LINEARS)
        assert state["base_model.model.fc.lora_A.weight"].shape == (r, 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.set_adapter("other"), "set_adapter: got .*other.*there are .*default.*second"),
        (lambda m: m.set_adapter(["default", "other"]), "other"),
        (lambda m: m.set_adapter([]), "set_adapter: got"),
        (lambda m: m.set_adapter(None), r"set_adapter: got \[None\]"),
        (lambda m: m.adapter_state("other"), "adapter_state: got"),
        (lambda m: m.add_adapter(LoraConfig(), "third"), "adapter_name: got LoraConfig"),
        (lambda m: m.merge_adapter(["other"]), "merge_adapter: got"),
        (lambda m: m.merge_and_unload(["other"]), "merge_adapter: got"),
        (lambda m: m.unmerge_adapter(), "nothing is merged"),
        (lambda m: m.delete_adapter("other"), "delete_adapter: got"),
        (lambda m: m.add_adapter("second", LoraConfig(r=2)), "'second' exists"),
        (lambda m: m.add_adapter("third", LoraConfig(r=9)), "r of 'fc': got 9"),
        (lambda m: m.add_adapter("third", LoraConfig(target_modules=["lora_A"])), "no module is called 'lora_A'"),
        (lambda m: m.save_pretrained("/nowhere", "other"), "save_pretrained: got"),
    ],
)
def test_a_call_that_fails_leaves_the_adapters_unchanged(call, words):
    model = two_adapters()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        call(model)
    assert fingerprint(model) == before


def test_only_one_adapter_trains_biases():
    model = adapted(bias="all")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="bias: another adapter"):
        model.add_adapter("second", LoraConfig(r=2, bias="lora_only"))
    assert fingerprint(model) == before
    model.add_adapter("second", LoraConfig(r=2))


def test_the_only_adapter_and_a_merged_one_are_not_deleted():
    model = adapted()
    with pytest.raises(ValueError, match="only adapter"):
        model.delete_adapter("default")
    model = two_adapters()
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        model.delete_adapter("default")


# --- disabling and merging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_disabling_gives_the_base_and_comes_back_after_an_error(init):
    model = adapted(init_lora_weights=init)
    expected = outputs(model)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), outputs(Net()), **SAME)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        1 / 0  # noqa: B018
    np.testing.assert_array_equal(outputs(model), expected)


def test_without_an_offset_disabling_gives_the_base_bit_for_bit():
    model = adapted()
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), outputs(Net()))


def test_disabling_inside_disabling():
    model = adapted()
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        np.testing.assert_array_equal(outputs(model), outputs(Net()))
    assert (outputs(model) != outputs(Net())).any()


def test_disabling_a_merged_model():
    model = adapted()
    expected = outputs(model)
    model.merge_adapter()
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), outputs(Net()), **SAME)
    assert model.merged_adapters == ["default"]
    np.testing.assert_allclose(outputs(model), expected, **SAME)


def test_setting_an_adapter_takes_out_what_is_merged():
    model = two_adapters()
    model.set_adapter("second")
    expected = outputs(model)
    model.set_adapter("default")
    model.merge_adapter()
    model.set_adapter("second")
    assert model.merged_adapters == []
    np.testing.assert_allclose(outputs(model), expected, **SAME)


def test_deleting_an_adapter_beside_a_merged_one_leaves_that_in_the_weights():
    model = two_adapters()
    model.merge_adapter()
    expected = outputs(model)
    model.delete_adapter("second")
    assert model.merged_adapters == ["default"]
    np.testing.assert_array_equal(outputs(model), expected)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        self.first, self.second = (nn.Linear(5, 5, False, "float64", 0) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x):
        """(B, 5) -> (B, 5)"""
        return self.second(ops.tanh(self.first(x)))


class Twice(Tied):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.second = self.first


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
@pytest.mark.parametrize(("net", "target"), [(Tied, "second"), (Twice, "first")])
def test_an_adapter_of_one_of_two_tied_layers_leaves_the_other_alone(net, target, options):
    model, base = get_peft_model(net(), LoraConfig(r=2, target_modules=[target], **options)), outputs(Tied())
    np.testing.assert_allclose(outputs(model), base, **SAME)
    expected = outputs(randomize(model))
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model), expected, **SAME)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), base, **SAME)
    np.testing.assert_allclose(outputs(copy.deepcopy(model).unload()), base, **SAME)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), expected, **SAME)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", EPS32), ("float64", EPS64)])
@pytest.mark.parametrize("init", [True, *INITS])
def test_the_merged_model_gives_the_unmerged_outputs(xp, init, dtype, eps):
    model = adapted(dtype=dtype, init_lora_weights=init, use_rslora=True, bias="all", modules_to_save=["head"]).to(xp)
    expected = outputs(model, xp, dtype)
    before = {n: to_numpy(p.data).copy() for n, p in model.named_parameters()}
    # 1000 ε: outputs up to 50, sums in another order in each of five layers
    same = {"rtol": 0, "atol": 1000 * eps}
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model, xp, dtype), expected, **same)
    model.unmerge_adapter()
    np.testing.assert_allclose(outputs(model, xp, dtype), expected, **same)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(to_numpy(p.data), before[name], rtol=0, atol=20 * eps)
    merged = model.merge_and_unload()
    assert {type(m).__name__ for m in merged.modules()} == {type(m).__name__ for m in Net().modules()}
    np.testing.assert_allclose(outputs(merged, xp, dtype), expected, **same)
    assert not any(p.requires_grad for p in merged.parameters())


def test_merging_gives_the_weights_new_arrays():
    """Whoever kept the base's arrays (another model, a graph) keeps the base's values."""
    model = adapted()
    kept = {n: (p.data, p.data.copy()) for n, p in model.named_parameters()}
    model.merge_adapter()
    for array, values in kept.values():
        np.testing.assert_array_equal(array, values)


def test_merging_twice_is_refused_and_changes_nothing():
    model = two_adapters()
    model.merge_adapter()
    before = fingerprint(model)
    for again in (
        model.merge_adapter,
        lambda: model.merge_adapter(["second"]),
        lambda: model.merge_and_unload(["second"]),
    ):
        with pytest.raises(ValueError, match=r"'default'.* merged already; call unmerge_adapter"):
            again()
    with pytest.raises(ValueError, match="adapters are merged; call unmerge_adapter"):
        model.add_adapter("third", LoraConfig(r=2))
    assert fingerprint(model) == before


def test_adapters_on_different_layers_merge_together_and_come_back_after_disabling():
    model = two_adapters({"target_modules": ["fc"]}, {"target_modules": ["q_proj"]})
    model.set_adapter(["default", "second"])
    expected = outputs(model)
    model.merge_adapter()
    assert sorted(model.merged_adapters) == ["default", "second"]
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), outputs(Net()), **SAME)
    np.testing.assert_allclose(outputs(model), expected, **SAME)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), expected, **SAME)


def test_merging_one_of_two_offset_adapters_gives_the_others_share_back():
    model = two_adapters({"init_lora_weights": "pissa"}, {"init_lora_weights": "both"})
    expected = delta(model, "second")
    model.merge_adapter(["second"])
    np.testing.assert_allclose(outputs(model), expected, **SAME)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), expected, **SAME)


def test_an_unloaded_model_can_be_adapted_again():
    model = get_peft_model(adapted().merge_and_unload(), LoraConfig(r=1))
    np.testing.assert_allclose(outputs(model), outputs(adapted()), **SAME)


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_after_unloading_there_is_nothing_to_save(unload, tmp_path):
    model = adapted()
    getattr(model, unload)()
    with pytest.raises(ValueError, match="save_pretrained: no adapters are left"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- a method of one's own --------------------------------------------------------------------------------------------


class GainLinear(AdapterLayer):
    """y = gain ∘ (W x): its delta, (gain − 1) W, is made of W."""

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.gain = {}

    @property
    def adapters(self):
        return list(self.gain)

    def delta(self, adapter):
        return (self.gain[adapter].data - 1)[:, None] * self.weight.data

    def forward(self, x):
        names = [] if self.disabled or self.merged else [name for name in self.active if name in self.gain]
        y = ops.linear(x, self.weight)
        for name in names:
            y = y * self.gain[name]
        return y if self.base_layer.bias is None else y + self.base_layer.bias


class Gain(Method):
    def wrap(self, name, linear):
        layer = linear if isinstance(linear, GainLinear) else GainLinear(linear)
        layer.gain[self.adapter] = Parameter(np.ones(layer.weight.shape[0]))
        return layer


class PlainGain(Method):
    """The same by a module that knows nothing of adapters."""

    def wrap(self, name, linear):
        module = nn.Sequential(linear)
        module.gain = Parameter(np.ones(linear.weight.shape[0]))
        module.forward = lambda x: module[0](x) * module.gain
        return module


class OwnConfig:
    """As little as a config can be."""

    target_modules = "all-linear"

    def __init__(self, method):
        self.build = lambda: method(self)


@pytest.mark.parametrize("method", [Gain, PlainGain])
def test_a_method_of_ones_own_trains_switches_and_is_taken_off(method):
    base = outputs(Net())
    model = get_peft_model(Net(), OwnConfig(method))
    np.testing.assert_array_equal(outputs(model), base)
    frozen = {n: p.data.tobytes() for n, p in model.named_parameters() if not p.requires_grad}
    train(model)
    assert {n: p.data.tobytes() for n, p in model.named_parameters() if n in frozen} == frozen
    assert len(model.adapter_state()) == len(trainable(model)) == len(LINEARS)
    first = outputs(model)
    assert (first != base).any()
    model.add_adapter("second", OwnConfig(method))
    for name, expected in {"second": base, "default": first}.items():
        model.set_adapter(name)
        np.testing.assert_array_equal(outputs(model), expected)
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), base)
    model.delete_adapter("second")
    np.testing.assert_array_equal(outputs(model), first)
    np.testing.assert_array_equal(outputs(model.unload()), base)


def test_a_delta_that_is_made_of_the_weight_is_taken_out_bit_for_bit():
    model = get_peft_model(Net(), OwnConfig(Gain))
    before = outputs(randomize(model))
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model), before, **SAME)
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), outputs(Net()))
    model.unmerge_adapter()
    np.testing.assert_array_equal(outputs(model), before)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), before, **SAME)


def test_a_module_without_delta_is_not_merged_and_not_put_around_adapters():
    model = get_peft_model(Net(), OwnConfig(PlainGain))
    with pytest.raises(ValueError, match="'fc' cannot be merged: its module says nothing of what it adds"):
        model.merge_adapter()
    model = adapted()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'fc' is a LoraLinear already, and Sequential, which PlainGain makes"):
        model.add_adapter("second", OwnConfig(PlainGain))
    assert fingerprint(model) == before
    assert list(model.peft_config) == model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (type("NoWrap", (Method,), {}), NotImplementedError, r"NoWrap has no wrap\(\)"),
        (type("Nothing", (Gain,), {"wrap": lambda *_: None}), TypeError, "expected Nothing to give a Module, got None"),
        (lambda config: 5, TypeError, r"config: build\(\) of OwnConfig gave a int, and no Method"),
    ],
)
def test_a_method_that_is_none_is_explained(method, error, words):
    with pytest.raises(error, match=words):
        get_peft_model(Net(), OwnConfig(method))


def test_a_failure_in_a_hook_leaves_the_other_adapters_as_they_were():
    class Broken(Gain):
        def trained(self, model, own):
            raise ZeroDivisionError

    model = get_peft_model(Net(), OwnConfig(Gain))
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("second", OwnConfig(Broken))
    assert fingerprint(model) == before
    assert list(model.peft_config) == list(model.methods) == model.active_adapters == ["default"]


def test_a_config_without_a_form_in_a_file_is_not_half_saved(tmp_path):
    with pytest.raises(TypeError, match=r"OwnConfig has no to_dict\(\)"):
        get_peft_model(Net(), OwnConfig(Gain)).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the model as an object -------------------------------------------------------------------------------------------


def test_unknown_attributes_are_the_models():
    model = adapted()
    assert model.layers is model.get_base_model().layers
    with pytest.raises(AttributeError, match="nonsense"):
        model.nonsense  # noqa: B018


def test_a_deep_copy_is_independent():
    model = two_adapters({"init_lora_weights": "pissa", "modules_to_save": ["head"]})
    expected = outputs(model)
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(outputs(other), expected)
    train(other)
    other.merge_and_unload()
    np.testing.assert_array_equal(outputs(model), expected)


def test_state_dict_goes_round():
    model, other = adapted(modules_to_save=["head"]), adapted(seed=1, modules_to_save=["head"])
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(outputs(other), outputs(model))


@pytest.mark.parametrize("init", ["gaussian", *OFFSET_INITS])
def test_a_model_moves_to_a_device_and_converts(xp, init):
    model = two_adapters({"init_lora_weights": init}, {"init_lora_weights": init})
    expected = outputs(model)
    model.to(xp)
    assert {get_namespace(p.data) for p in model.parameters()} == {xp}
    np.testing.assert_allclose(outputs(model, xp), expected, **SAME)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model, xp), outputs(Net()), **SAME)
    model.to("float32")
    np.testing.assert_allclose(outputs(model, xp, "float32"), expected, rtol=0, atol=1000 * EPS32)
    np.testing.assert_allclose(outputs(model.to("cpu"), np, "float32"), expected, rtol=0, atol=1000 * EPS32)


def test_training_on_a_device_gives_the_same_numbers(xp):
    losses = []
    for library in (np, xp):
        model = get_peft_model(Net(), LoraConfig(r=2, lora_dropout=0.3, init_lora_weights="pissa")).to(library)
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((8, 5)), rng.integers(0, 3, 8)
        batches = [(Tensor(library.asarray(x)), library.asarray(y))]
        optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append(fit(model, batches, steps=5, optimizer=optimizer, clip_norm=1.0, progress=False).loss)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-12)


# --- saving and loading -----------------------------------------------------------------------------------------------


def files_of(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("seed", range(12))
def test_a_saved_adapter_loads_into_the_base_with_the_same_outputs(seed, tmp_path, xp):
    rng = np.random.default_rng(seed)
    options = {
        "r": int(rng.integers(1, 4)),
        "lora_alpha": float(rng.integers(1, 9)),
        "use_rslora": bool(rng.integers(2)),
        "init_lora_weights": [True, False, *INITS][rng.integers(8)],
        "bias": ["none", "all", "lora_only"][rng.integers(3)],
        "modules_to_save": [None, ["head"], ["norm", "head"]][rng.integers(3)],
        "target_modules": ["all-linear", ["fc", "v_proj"], r".*\.[qv]_proj"][rng.integers(3)],
        "rank_pattern": [{}, {"v_proj": 1, ".*_proj": 2}][rng.integers(2)],  # the first key that matches counts
        "alpha_pattern": [{}, {r"layers\.1\..*": 5}][rng.integers(2)],
        "lora_dropout": 0.5,
    }
    model = adapted(**options).to(xp).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net().to(xp), tmp_path)
    # to rounding: what has an offset is saved as another pair of factors
    np.testing.assert_allclose(outputs(loaded, xp), outputs(model, xp), **SAME)
    assert not trainable(loaded)
    assert not any(m.training for m in loaded.modules())
    again = PeftModel.from_pretrained(Net().to(xp), tmp_path, is_trainable=True)
    np.testing.assert_array_equal(outputs(again.eval(), xp), outputs(loaded, xp))
    assert trainable(again) == trainable(get_peft_model(Net(), again.peft_config["default"]))


def test_the_files_are_pefts_format(tmp_path):
    options = {"r": 2, "bias": "lora_only", "modules_to_save": ["head"], "target_modules": ["q_proj"]}
    adapted(**options).save_pretrained(tmp_path / "deep" / "adapter")
    files = files_of(tmp_path)
    assert files.keys() == {"deep/adapter/adapter_config.json", "deep/adapter/adapter_model.safetensors"}
    config = json.loads(files["deep/adapter/adapter_config.json"])
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert {k: config[k] for k in options} == options
    tensors = load_file(tmp_path / "deep/adapter/adapter_model.safetensors")
    layers = [f"base_model.model.layers.{i}.q_proj" for i in range(2)]
    expected = {f"{n}.lora_{f}.weight" for n in layers for f in "AB"} | {f"{n}.base_layer.bias" for n in layers}
    assert tensors.keys() == expected | {"base_model.model.head.weight", "base_model.model.head.bias"}


def test_all_linear_is_saved_as_the_names_it_meant(tmp_path):
    """PEFT takes "all-linear" only on transformers' models, where it also knows another output head."""
    for target_modules in ("all-linear", "ALL", None):
        adapted(target_modules=target_modules).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == LINEARS


@pytest.mark.parametrize("init", [True, "kaiming", "gaussian", "gaussian_b"])
def test_saved_start_values_are_named_as_peft_names_them(init, tmp_path):
    adapted(init_lora_weights=init).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"]
    assert saved == ("gaussian" if init == "gaussian" else True)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 5])  # fc allows rank 5, the others 6: doubled, 3 and 5 are too large
@pytest.mark.parametrize("init", OFFSET_INITS)
def test_an_offset_adapter_is_saved_for_an_unchanged_base(init, r, rslora, tmp_path):
    options = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 7}, "use_rslora": rslora}
    model = adapted(r=r, init_lora_weights=init, **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    ranks = {name: m.lora_A["default"].weight.shape[0] for name, m in loaded.adapter_layers()}
    assert ranks["fc"] == min(2 * r, 5)
    assert ranks["layers.0.v_proj"] == 2
    for name, layer in loaded.adapter_layers():
        assert not layer.offset
        np.testing.assert_array_equal(layer.weight.data, Net().get_submodule(name).weight.data)
    np.testing.assert_allclose(outputs(loaded), outputs(model), **SAME)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_an_adapter_saved_while_merged_or_disabled_is_the_same(init, tmp_path):
    model = adapted(init_lora_weights=init)
    model.save_pretrained(tmp_path / "a")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "b")
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "c")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_a_second_adapter_loads_beside_the_first(tmp_path):
    two = two_adapters()
    for name in ("default", "second"):
        two.save_pretrained(tmp_path / name, name)
    model = PeftModel.from_pretrained(Net(), tmp_path / "default")
    first = outputs(model)
    model.load_adapter(tmp_path / "second", "other")
    np.testing.assert_array_equal(outputs(model), first)
    model.set_adapter("other")
    two.set_adapter("second")
    np.testing.assert_array_equal(outputs(model), outputs(two))
    assert not trainable(model)
    model.load_adapter(tmp_path / "second", "third", is_trainable=True)
    model.set_adapter("third")
    assert trainable(model) == expected_names(LINEARS, adapter="third")


def test_saving_replaces_an_older_adapter_whole(tmp_path):
    adapted(seed=1, r=3).save_pretrained(tmp_path)
    model = adapted()
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(Net(), tmp_path)), outputs(model))
    assert len(files_of(tmp_path)) == 2


def test_saving_over_a_file_is_refused(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is a file; a directory is accepted"):
        adapted().save_pretrained(path)
    assert path.read_text() == "mine"


def test_an_adapter_in_half_precision_loads_as_the_models_dtype(tmp_path):
    model = adapted()
    for p in model.adapter_state().values():
        p.data = p.data.astype("float16").astype("float64")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: a.astype("float16") for n, a in load_file(path).items()}, path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert {p.dtype.name for p in loaded.parameters()} == {"float64"}
    np.testing.assert_array_equal(outputs(loaded), outputs(model))


# --- bad adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    adapted(target_modules=["fc", "q_proj"], modules_to_save=["head"]).save_pretrained(directory)
    return directory


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FC_A = "base_model.model.fc.lora_A.weight"


def drop_tensor(d):
    edit_tensors(d, lambda t: t.pop(FC_A))


def add_tensor(d):
    edit_tensors(d, lambda t: t.update({"base_model.model.other.lora_A.weight": np.ones(3)}))


def rename_tensor(d):
    edit_tensors(d, lambda t: t.update({"fc.lora_A": t.pop(FC_A)}))


def transpose_tensor(d):
    edit_tensors(d, lambda t: t.update({FC_A: np.ascontiguousarray(t[FC_A].T)}))


def other_rank(d):
    edit_config(d, r=1)


def no_tensors(d):
    edit_tensors(d, lambda t: t.clear())


def truncate(d):
    path = d / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def config_text(text):
    return lambda d: (d / "adapter_config.json").write_text(text)


def pickle_only(d):
    (d / "adapter_model.safetensors").rename(d / "adapter_model.bin")


def delete(name):
    return lambda d: (d / name).unlink()


BAD_ADAPTERS = [
    (drop_tensor, ValueError, rf"does not fit the model: missing \['{re.escape(FC_A)}'\], not in the model nothing"),
    (add_tensor, ValueError, "missing nothing, not in the model .*other.lora_A"),
    (rename_tensor, ValueError, r"missing .*fc.lora_A.weight.*not in the model \['fc.lora_A'\]"),
    (transpose_tensor, ValueError, r"fc.lora_A.weight has shape \(5, 2\), the model needs \(2, 5\)"),
    (other_rank, ValueError, r"has shape \(2, 5\), the model needs \(1, 5\)"),
    (no_tensors, ValueError, "missing .* nothing .*8 and 0"),
    (truncate, ValueError, "not a whole safetensors file"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), ValueError, "not a whole safetensors file"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 99), ValueError, "not a whole safetensors"),
    (delete("adapter_model.safetensors"), FileNotFoundError, "adapter_model.safetensors: no such file"),
    (delete("adapter_config.json"), FileNotFoundError, "adapter_config.json: no such file"),
    (pickle_only, ValueError, "adapter_model.bin is a pickle, which can run code; save it as safetensors"),
    (config_text(""), ValueError, "adapter_config.json: not JSON"),
    (config_text("{'r': 2}"), ValueError, "not JSON"),
    (config_text("[1, 2]"), ValueError, "expected a JSON object, got list"),
    (config_text("3"), ValueError, "expected a JSON object, got int"),
    (config_text("{}"), ValueError, "peft_type is None; accepted are 'LORA'"),
    (config_text('{"model_type": "llama"}'), ValueError, "peft_type is None"),
    (config_text("[" * 100_000), ValueError, "not JSON"),
    (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe{}"), ValueError, "not JSON"),
    (lambda d: edit_config(d, peft_type="IA3"), ValueError, "peft_type is 'IA3'"),
    (lambda d: edit_config(d, peft_type=["LORA"]), ValueError, r"peft_type is \['LORA'\]"),
    (lambda d: edit_config(d, use_dora=True), ValueError, "missing.*lora_magnitude_vector"),
    (lambda d: edit_config(d, layers_to_transform=[1]), ValueError, r"layers_to_transform=\[1\] is not supported"),
    (lambda d: edit_config(d, fan_in_fan_out=True), ValueError, "fan_in_fan_out=True is not supported"),
    (lambda d: edit_config(d, init_lora_weights="corda"), ValueError, "init_lora_weights: got 'corda'"),
    (lambda d: edit_config(d, init_lora_weights="loftq"), ValueError, "belongs to codes that PEFT made and did not"),
    (lambda d: edit_config(d, r="2"), ValueError, "r: got '2'"),
    (lambda d: edit_config(d, r=600), ValueError, "r of 'fc': got 600"),
    (lambda d: edit_config(d, lora_alpha=None), ValueError, "lora_alpha: got None"),
    (lambda d: edit_config(d, rank_pattern=[1]), ValueError, "rank_pattern"),
    (lambda d: edit_config(d, rank_pattern={"*": 1}), ValueError, "rank_pattern"),
    (lambda d: edit_config(d, target_modules={"a": 1}), ValueError, "target_modules"),
    (lambda d: edit_config(d, target_modules=["c_attn"]), ValueError, "no module is called 'c_attn'"),
    (lambda d: edit_config(d, modules_to_save="head"), ValueError, "modules_to_save: got 'head'"),
]


@pytest.mark.parametrize(("damage", "error", "words"), BAD_ADAPTERS)
def test_a_bad_adapter_is_explained_and_nothing_is_changed(adapter, damage, error, words):
    damage(adapter)
    base, model = Net(), two_adapters()
    before, files = (fingerprint(base), fingerprint(model)), files_of(adapter)
    with pytest.raises(error, match=words):
        PeftModel.from_pretrained(base, adapter)
    with pytest.raises(error, match=words):
        model.load_adapter(adapter, "loaded")
    assert (fingerprint(base), fingerprint(model)) == before
    assert files_of(adapter) == files


def test_tensors_that_peft_writes_twice_are_passed_over(adapter):
    """bias="all" makes PEFT write the biases inside its wrappers of modules_to_save once more."""
    expected = outputs(PeftModel.from_pretrained(Net(), adapter))
    head = "base_model.model.head"
    twice = {f"{head}.original_module.bias": np.ones(3), f"{head}.modules_to_save.bias": np.ones(3)}
    edit_tensors(adapter, lambda t: t.update(twice))
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(Net(), adapter)), expected)


def test_the_whole_weight_that_peft_writes_of_an_adapted_head_is_the_bases(adapter):
    weight = np.random.default_rng(9).standard_normal(Net().fc.weight.shape)
    edit_tensors(adapter, lambda t: t.update({"base_model.model.fc.base_layer.weight": weight}))
    base = Net()
    base.fc.weight.data = weight
    model = PeftModel.from_pretrained(Net(), adapter)
    assert not trainable(model)
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), outputs(base))
    edit_tensors(adapter, lambda t: t.update({"base_model.model.fc.base_layer.weight": weight[1:]}))
    with pytest.raises(ValueError, match=r"fc.base_layer.weight has shape \(5, 5\), the model needs \(6, 5\)"):
        PeftModel.from_pretrained(Net(), adapter)


def test_targets_that_the_file_has_no_tensors_for_are_passed_over(adapter):
    """PEFT saves the names as they were given, also those that its model did not have."""
    expected = outputs(PeftModel.from_pretrained(Net(), adapter))
    edit_config(adapter, target_modules=["c_attn", "fc", "oj", "q_proj"])
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(Net(), adapter)), expected)


def test_an_adapter_of_another_model_is_explained(adapter):
    base = MLP((5, 8, 3), rng=0)
    before = fingerprint(base)
    with pytest.raises(ValueError, match=r"no module is called 'fc'; closest are .*fc1"):
        PeftModel.from_pretrained(base, adapter)
    assert fingerprint(base) == before


def test_an_adapter_is_loaded_into_a_bare_model_only(adapter):
    for model in (adapted(), adapted().get_base_model()):
        with pytest.raises(TypeError, match="model: it has adapters already"):
            PeftModel.from_pretrained(model, adapter)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        PeftModel.from_pretrained(Net(), tmp_path / "nothing")


def test_checking_an_adapter_copies_no_weight_and_no_gradient(adapter):
    import tracemalloc

    base = nn.Sequential(nn.Linear(1000, 1000, rng=0), Net())
    base[0].weight.grad = np.zeros((1000, 1000), "float32")  # 4 MB each
    tracemalloc.start()
    with pytest.raises(ValueError, match="no module is called"):
        PeftModel.from_pretrained(base[0], adapter)
    drop_tensor(adapter)
    with pytest.raises(ValueError, match="missing"):
        PeftModel.from_pretrained(base, adapter)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_loading_under_a_name_that_is_taken_changes_nothing(adapter):
    model = two_adapters()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'second' exists"):
        model.load_adapter(adapter, "second")
    assert fingerprint(model) == before


def test_loading_an_offset_adapter_that_does_not_fit_leaves_the_weights(adapter):
    edit_config(adapter, init_lora_weights="pissa")
    drop_tensor(adapter)
    base = Net()
    before = fingerprint(base)
    with pytest.raises(ValueError, match="missing"):
        PeftModel.from_pretrained(base, adapter)
    assert fingerprint(base) == before


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["fc", "(", "", "LORA", "pissa", "all"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["fc", "*", "r"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100)
@given(key=st.sampled_from(sorted(LoraConfig().to_dict())), value=JSON)
def test_any_value_in_the_config_loads_or_is_refused_with_the_model_unchanged(tmp_path, key, value):
    directory = tmp_path / "fuzz"
    if not directory.exists():
        adapted(target_modules=["fc"]).save_pretrained(directory)
        (tmp_path / "config").write_bytes((directory / "adapter_config.json").read_bytes())
    (directory / "adapter_config.json").write_bytes((tmp_path / "config").read_bytes())
    edit_config(directory, **{key: value})
    base, message = Net(), None
    before = fingerprint(base)
    try:
        model = PeftModel.from_pretrained(base, directory)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert np.isfinite(outputs(model)).all()
    else:
        assert re.search(f"{key}|does not fit|has shape|r of 'fc'", message)  # it says which
        assert fingerprint(base) == before


# --- beside PEFT, by the numbers it gave (peft_references.reference) --------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    return kept_in(REFERENCE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_adapter_that_peft_wrote_gives_the_outputs_that_peft_gave(kept, dtype, xp):
    x, _ = batch(dtype)
    model = PeftModel.from_pretrained(base_of(kept, dtype).to(xp), REFERENCE)
    found = to_numpy(model(Tensor(xp.asarray(x))).data)
    # 1e-12 and 1e-5: logits of about 5 from sums of 6 products, in float64 and in float32
    atol = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(found, kept["outputs.float64"], rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("float64", 1e-12)])
def test_thirty_steps_of_training_follow_pefts_losses(kept, dtype, rtol, tmp_path):
    """PyTorch's own float32 losses are up to 2e-5 (relative) away from its float64 ones; so may these be."""
    model = get_peft_model(base_of(kept, dtype), LoraConfig(**CONFIG))
    start = part(kept, "start.")
    assert model.adapter_state().keys() == start.keys()
    start_from(model, start)
    losses = loss_curve(model)
    np.testing.assert_allclose(losses, kept[f"losses.{dtype}"], rtol=rtol)
    assert losses[-1] < 0.2 * losses[0]
    if dtype == "float64":  # and ends at the adapter that PEFT wrote
        model.save_pretrained(tmp_path)
        found, expected = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, REFERENCE))
        assert_all_close(found, expected, atol=1e-10)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_the_weight_are_pefts(kept, init):
    """The factors' product and what is left of W; of the factors themselves a pair's common sign is free."""
    options = {"r": 2, "lora_alpha": 5, "target_modules": ["fc", "v_proj"], "init_lora_weights": init}
    model = get_peft_model(base_of(kept, "float32"), LoraConfig(**options))
    expected, found = part(kept, f"{init}."), model.state_dict()
    for name in ("base_model.model.fc.", "base_model.model.layers.0.v_proj."):
        weight, A, B = (f"{name}{p}.weight" for p in ("base_layer", "lora_A.default", "lora_B.default"))
        # 1e-6: a decomposition in float32 of numbers of about 1
        np.testing.assert_allclose(found[weight], expected[weight], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[B] @ found[A], expected[B] @ expected[A], rtol=0, atol=1e-6)
        for factor in (A, B):
            np.testing.assert_allclose(abs(found[factor]), abs(expected[factor]), rtol=0, atol=2e-6)
