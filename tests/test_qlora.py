"""QLoRA: LoftQ's start, k-bit preparation, training beside codes on every model, and three ways to finish."""

from __future__ import annotations

import copy
import itertools
import json

import llama_cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import (
    LoftQConfig,
    LoraConfig,
    PeftModel,
    Tensor,
    finish_qlora,
    fit,
    get_peft_model,
    gradcheck,
    load_model,
    nn,
    optim,
    prepare_model_for_kbit_training,
    quant,
    rank,
    save_model,
)
from minipeft.backend import get_namespace, to_numpy
from minipeft.data import digits
from minipeft.methods.lora import LoraLinear
from minipeft.methods.qlora import FinishReport, _best_factors, loftq_init
from minipeft.models import load_base
from minipeft.quant import Linear4bit, QuantizedLinear, dequantize
from minipeft.recipes import METHODS, Choice, prepared
from minipeft.train import classification_loss

IDS = llama_cases.batch("none")[0]


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def base(kind: str, dtype="float32"):
    """One of the models here, and a batch that it takes."""
    if kind == "llama":
        return llama_cases.llama("biases", dtype), IDS
    return load_base(kind, dtype=dtype), digits.load().test.x[:3].astype(dtype)


def adapted(kind: str, quantization="nf4", dtype="float32", **config):
    """A base held as codes with adapters that do something."""
    model, x = base(kind, dtype)
    config = {"r": 2, "lora_alpha": 4, "init_lora_weights": False} | config
    return get_peft_model(quant.quantize_model(model, quantization), LoraConfig(**config)).eval(), x


BASES = ("mlp", "vit", "llama")

# --- training beside codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_through_codes_are_finite_differences(kind, use_dora):
    config = {"use_dora": True, "dora_norm": "graph"} if use_dora else {}
    model, x = adapted(kind, dtype="float64", r=1, **config)
    layers = dict(model.adapter_layers())
    assert all(isinstance(layer.base_layer, Linear4bit) for layer in layers.values())
    layer = next(iter(layers.values()))  # its gradients have come through all the others
    assert gradcheck(lambda *_: model(x[:1]), [factors["default"].weight for factors in (layer.lora_A, layer.lora_B)])


@pytest.mark.parametrize("kind", BASES)
def test_outputs_are_loras_on_the_dequantized_weights(kind):
    model, x = adapted(kind)
    plain = base(kind)[0]
    quant.dequantize_model(quant.quantize_model(plain))
    plain = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)).eval()  # the same seed
    np.testing.assert_array_equal(model(x).data, plain(x).data)


@pytest.mark.parametrize("method", ["qlora", "qdora", "pissa", "loftq"])
@pytest.mark.parametrize("kind", BASES)
def test_the_recipes_train_and_change_no_code(method, kind):
    model, x = base(kind)
    heads = {id(p) for p in model.get_submodule(model.output_head).parameters()}
    model = prepared(model, method, Choice(r=4, alpha=8.0), seed=0)
    coded = {n: m.quantized.codes.copy() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(coded) == (0 if method == "pissa" else len(dict(model.adapter_layers())))
    assert all(p.dtype == np.float32 for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters() if id(p) in heads)
    trained = [p for p in model.parameters() if p.requires_grad]
    y = np.arange(len(x)) % 10
    batches, loss_fn = ([(x, y)], classification_loss) if kind != "llama" else ([x], lambda m, ids: m.loss(ids))
    history = fit(
        model, batches, steps=5, optimizer=optim.AdamW(trained, lr=METHODS[method].lr), loss_fn=loss_fn, progress=False
    )
    assert history.loss[-1] < history.loss[0]
    for name, codes in coded.items():
        np.testing.assert_array_equal(model.get_submodule(name).quantized.codes, codes)


def test_a_recipe_keeps_codes_that_are_there_and_full_training_refuses_them():
    model = quant.quantize_model(load_base("mlp"), "fp4")
    with pytest.raises(ValueError, match=r"^method: 'full' trains the weights, and these are codes; 'qlora'"):
        prepared(model, "full", Choice())
    model = prepared(model, "qlora", Choice())
    assert {m.quantized.quant_type for m in model.modules() if isinstance(m, QuantizedLinear)} == {"fp4"}


def test_a_model_with_adapters_is_not_quantized():
    """Its factors are Linears too."""
    model = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"^model: it has adapters; quantize the base, then attach"):
        quant.quantize_model(model)


# --- k-bit preparation ------------------------------------------------------------------------------------------------


def test_preparation_freezes_everything_and_makes_half_precision_full():
    model = quant.quantize_model(load_base("vit").to(dtype="float16"))
    for p in model.parameters():
        p.data, p.requires_grad = p.data.astype("float16"), True
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    layer.quantized = layer.quantized.to(dtype="float16")
    codes = layer.quantized.codes
    assert prepare_model_for_kbit_training(model) is model
    assert all(p.dtype == np.float32 and not p.requires_grad for p in model.parameters())
    assert layer.weight.dtype == np.float32
    assert layer.quantized.codes is codes
    model(digits.load().test.x[:2])


def test_preparation_leaves_wider_numbers_and_turns_checkpointing_on_where_asked():
    model = prepare_model_for_kbit_training(llama_cases.llama("grouped"))
    assert {p.dtype.name for p in model.parameters()} == {"float64"}
    assert not model.model.checkpointing
    assert prepare_model_for_kbit_training(model, use_gradient_checkpointing=True).model.checkpointing


def test_preparation_refuses_to_freeze_adapters():
    model = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    with pytest.raises(TypeError, match=r"^model: it has adapters, which would be frozen"):
        prepare_model_for_kbit_training(model)
    assert any(p.requires_grad for p in model.parameters())


# --- three ways to finish ---------------------------------------------------------------------------------------------


def error_of(y, expected):
    off = np.abs(y.astype("float64") - expected)
    return off.max() / np.abs(expected).max(), np.sqrt((off**2).mean() / (expected.astype("float64") ** 2).mean())


@pytest.mark.parametrize("kind", BASES)
def test_kept_apart_nothing_moves(kind):
    model, x = adapted(kind)
    finished, report = finish_qlora(model, "keep", inputs=x)
    assert finished is model
    assert (report.max_error, report.rms_error) == (0.0, 0.0)
    assert report.bytes_after == report.bytes_before


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_in_full_precision_only_rounding_moves_the_outputs(kind, use_dora):
    model, x = adapted(kind, use_dora=use_dora)
    expected = model(x).data
    finished, report = finish_qlora(model, "merge", inputs=x)
    assert not any(isinstance(m, QuantizedLinear | LoraLinear) for m in finished.modules())
    assert report.bytes_after > report.bytes_before
    assert report.rms_error < 1e-5
    np.testing.assert_allclose((report.max_error, report.rms_error), error_of(finished(x).data, expected), rtol=1e-9)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "nf3"])
def test_merged_into_new_codes_the_report_is_what_the_outputs_show(kind, quantization):
    model, x = adapted(kind, quantization)
    expected = model(x).data
    kinds = {n: m.base_layer.quantized.quant_type for n, m in model.adapter_layers()}
    finished, report = finish_qlora(model, "requantize", inputs=x)
    assert {n: finished.get_submodule(n).quantized.quant_type for n in kinds} == kinds
    assert report.bytes_after < report.bytes_before  # the factors are gone
    assert report.max_error > 1e-3
    np.testing.assert_allclose((report.max_error, report.rms_error), error_of(finished(x).data, expected), rtol=1e-9)


def test_new_codes_are_those_of_the_merged_weight():
    model, x = adapted("mlp")
    layer = dict(model.adapter_layers())["fc1"]
    W = dequantize(layer.base_layer.quantized) + layer.delta("default")
    expected = quant.double_quantize(quant.quantize_nf4(W))
    q = finish_qlora(model, "requantize", inputs=x)[0].get_submodule("fc1").quantized
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.absmax, expected.absmax)


def test_layers_without_adapters_become_plain_or_keep_their_codes():
    for how, kind in (("merge", nn.Linear), ("requantize", Linear4bit)):
        model, x = adapted("mlp", target_modules=["fc1"])
        codes = model.get_submodule("base_model.model.fc2").quantized
        finished, _ = finish_qlora(model, how, inputs=x)
        fc2 = finished.get_submodule("fc2")
        assert type(fc2) is kind
        np.testing.assert_array_equal(fc2.weight.data, dequantize(codes))


def test_adapters_beside_whole_weights_and_saved_modules_go_in_too():
    model = quant.quantize_model(load_base("mlp"), skip=("fc2",))
    head = model.output_head
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, modules_to_save=[head]))
    model.adapter_state()[f"base_model.model.{head}.bias"].data += 1
    x = digits.load().test.x[:3]
    expected = model(x).data
    finished, report = finish_qlora(model, "merge", inputs=x)
    assert report.rms_error < 1e-5
    np.testing.assert_allclose(finished(x).data, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["merge", "requantize"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_head_tied_to_the_embeddings_is_merged_apart_from_them(tmp_path, how, use_dora):
    """The head's update stays out of the embeddings, whose weight it had: else the inputs would change with it."""
    model = quant.quantize_model(llama_cases.llama("no grouping, tied", "float32"))
    embeddings = model.model.embed_tokens.weight.data.copy()
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(model, config).eval()
    apart = copy.deepcopy(dict(model.adapter_layers())["lm_head"])
    apart.merge(["default"])
    head, expected = apart.weight.data, model(IDS).data
    finished, report = finish_qlora(model, how, inputs=IDS)
    np.testing.assert_array_equal(finished.model.embed_tokens.weight.data, embeddings)
    np.testing.assert_array_equal(finished.lm_head.weight.data, head)
    assert report.rms_error < 1e-5 or how == "requantize"  # 1.5 where the embeddings change too
    np.testing.assert_allclose(report.rms_error, error_of(finished(IDS).data, expected)[1], rtol=1e-9)
    again = load_model(save_model(finished, tmp_path))
    np.testing.assert_array_equal(again(IDS).data, finished(IDS).data)


def test_a_tied_head_whose_adapter_is_not_active_stays_tied():
    base = quant.quantize_model(llama_cases.llama("no grouping, tied", "float32"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.add_adapter("head", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    finished, report = finish_qlora(model, "merge", inputs=IDS)
    assert finished.lm_head.weight is finished.model.embed_tokens.weight
    assert report.rms_error < 1e-5


def test_a_report_speaks_and_modes_stay():
    model, x = adapted("mlp")
    model.train()
    _, report = finish_qlora(model, "keep", inputs=(x,))
    assert model.training
    assert str(report).startswith("keep: outputs off by 0.0e+00 (rms)")
    assert f"{report.bytes_before / 1e6:.2f} MB before" in str(report)
    assert "0.00 MB" not in str(report)
    assert isinstance(report, FinishReport)


def test_finishing_twice_or_what_is_merged_or_plain_is_refused():
    model, x = adapted("mlp")
    with pytest.raises(ValueError, match=r"^how: got 'melt'; accepted are 'keep', 'merge', 'requantize'"):
        finish_qlora(model, "melt", inputs=x)
    finished, _ = finish_qlora(model, "requantize", inputs=x)
    with pytest.raises(ValueError, match=r"^peft_model: it has no adapters beside weights that are codes \(any more\)"):
        finish_qlora(model, "merge", inputs=x)
    with pytest.raises(TypeError, match=r"^peft_model: got MLP; a PeftModel is accepted"):
        finish_qlora(finished, "merge", inputs=x)
    plain = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"with merge_and_unload\(\)"):
        finish_qlora(plain, "merge", inputs=x)
    plain.merge_adapter()
    with pytest.raises(ValueError, match=r"^peft_model: \['default'\] are merged; call unmerge_adapter"):
        finish_qlora(plain, "merge", inputs=x)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_codes_without_a_way_names_the_ways(call):
    model, x = adapted("mlp")
    before = model(x).data
    with pytest.raises(ValueError, match=r"^merge_adapter: .*finish_qlora.*'keep'.*'merge'.*'requantize'"):
        getattr(model, call)()
    np.testing.assert_array_equal(model(x).data, before)


def test_unloading_a_merge_twice_is_refused():
    model = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"^merge_and_unload: no adapters are left; .* unloaded already"):
        model.merge_and_unload()


def test_quantizing_twice_says_that_there_are_codes_already():
    model = quant.quantize_model(load_base("mlp"))
    with pytest.raises(ValueError, match=r"^model: it has no Linear .*; its other Linears hold codes already"):
        quant.quantize_model(model)


def test_finishing_works_on_every_array_library(xp):
    model, x = adapted("mlp")
    expected = model(x).data
    model = model.to(xp)
    finished, report = finish_qlora(model, "requantize", inputs=xp.asarray(x))
    y = finished(xp.asarray(x)).data
    assert get_namespace(y) is xp
    np.testing.assert_allclose(report.max_error, error_of(to_numpy(y), expected)[0], rtol=1e-3)


@pytest.mark.parametrize("how", ["merge", "requantize"])
def test_a_merge_that_fails_at_a_whole_weight_changes_nothing(how):
    model = get_peft_model(
        quant.quantize_model(load_base("mlp"), skip=("fc2",)), LoraConfig(r=2, init_lora_weights=False)
    ).eval()
    x = digits.load().test.x[:3]
    expected = model(x).data
    factor = dict(model.adapter_layers())["fc2"].lora_B["default"].weight
    whole, factor.data = factor.data, np.full_like(factor.data, np.nan)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"^peft_model: fc2 with .* is not finite"):
        finish_qlora(model, how, inputs=x)
    factor.data = whole
    assert model.merged_adapters == []
    np.testing.assert_array_equal(model(x).data, expected)


@pytest.mark.parametrize("how", ["merge", "requantize"])
def test_a_merge_that_fails_changes_nothing(how):
    model, x = adapted("mlp")
    factor = dict(model.adapter_layers())["fc2"].lora_B["default"].weight
    whole, factor.data = factor.data, factor.data.copy()
    factor.data[0] = np.nan
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=r"^peft_model: fc2 with .* is not finite"):
        finish_qlora(model, how, inputs=x)
    factor.data = whole
    assert all(isinstance(layer.base_layer, Linear4bit) for _, layer in model.adapter_layers())
    assert model.merged_adapters == []
    assert finish_qlora(model, "merge", inputs=x)[1].rms_error < 1e-5


# --- LoftQ ------------------------------------------------------------------------------------------------------------


def distance(W, q, A, B, scaling):
    return np.linalg.norm(W - dequantize(q).astype("float64") - scaling * B.astype("float64") @ A)


@given(
    st.integers(8, 70), st.integers(8, 70), st.integers(1, 8), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 2**16)
)
def test_loftq_is_nearer_than_codes_alone_and_than_codes_with_the_best_factors_soon(out, width, r, scaling, seed):
    """One step is W's own codes with the best B A beside them; five are no worse (0.1 % is left for the roundings)."""
    W = normal(out, width, seed=seed)
    plain = np.linalg.norm(W - dequantize(quant.quantize_nf4(W)))
    one, five = (distance(W, *loftq_init(W, r, iterations=n, scaling=scaling), scaling) for n in (1, 5))
    assert one < plain
    assert five < 1.05 * one
    assert five < plain


def test_loftqs_error_falls_over_its_first_steps_on_a_matrix_of_some_size():
    """Algorithm 1 has no guarantee in every step; on 256 × 256 each of the first five is better than the one before."""
    for seed in range(2):
        W = normal(256, 256, seed=seed)
        errors = [distance(W, *loftq_init(W, 16, iterations=n), 1.0) for n in range(1, 6)]
        assert all(after < before for before, after in itertools.pairwise(errors)), errors


def test_the_scaling_goes_into_the_factors_and_not_into_the_codes():
    W = normal(64, 48)
    q1, A1, B1 = loftq_init(W, 4, scaling=1.0)
    q4, A4, B4 = loftq_init(W, 4, scaling=4.0)  # 4^−½ is exact
    np.testing.assert_array_equal(q1.codes, q4.codes)
    np.testing.assert_allclose(4.0 * B4 @ A4, B1 @ A1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_factors_are_the_truncated_svd(xp, shape, dtype):
    R = normal(*shape, dtype=dtype)
    B, A = _best_factors(xp.asarray(R), 5)
    assert get_namespace(A) is get_namespace(B) is xp
    assert A.dtype == B.dtype == dtype
    atol = 1e-5 if dtype == "float32" else 1e-12  # of numbers of order 1
    np.testing.assert_allclose(to_numpy(B) @ to_numpy(A), rank.best_rank_r(R, 5), rtol=0, atol=atol)
    np.testing.assert_allclose(np.linalg.norm(to_numpy(A), axis=1), np.linalg.norm(to_numpy(B), axis=0), rtol=1e-5)
    assert all(float(abs(to_numpy(zeros)).max()) < 1e-70 for zeros in _best_factors(xp.asarray(0 * R), 2))


def test_loftq_runs_on_every_array_library(xp):
    W = normal(32, 64)
    q, A, B = loftq_init(xp.asarray(W), 4, scaling=2.0)
    assert get_namespace(q.codes) is get_namespace(A) is get_namespace(B) is xp
    expected = loftq_init(W, 4, scaling=2.0)
    np.testing.assert_array_equal(to_numpy(q.codes), expected[0].codes)


@pytest.mark.parametrize(("bits", "name"), [(2, "nf2"), (4, "nf4"), (8, "nf8"), (None, "nf4")])
def test_bits_choose_the_code_of_the_kind(bits, name):
    W = normal(16, 32, dtype="float16")
    q, A, _ = loftq_init(W, 2, bits=bits)
    assert (q.quant_type, q.dtype.name, A.dtype.name) == (name, "float16", "float32")
    assert loftq_init(W, 2, quant_type="int4", bits=3)[0].quant_type == "int3"


def test_loftq_refuses_what_it_cannot_do():
    W = normal(8, 16)
    for words, arguments in (
        (r"r: got 9; .* rank at most 8", {"r": 9}),
        (r"iterations: got 0; an int of at least 1", {"iterations": 0}),
        (r"scaling: got 0; a positive number", {"scaling": 0}),
        (r"quant_type: got 'nf9'", {"bits": 9}),
        (r"blocksize: got 63", {"blocksize": 63}),
        (r"W: expected a matrix", {"W": W[0]}),
        (r"W: 1 of 2 blocks hold NaN", {"W": np.where(np.arange(128) == 3, np.inf, W.reshape(-1)).reshape(8, 16)}),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            loftq_init(**{"W": W, "r": 2} | arguments)
    with pytest.raises(TypeError, match=r"^W: expected float"):
        loftq_init(np.ones((4, 4), "int32"), 1)


def test_a_config_with_loftq_makes_codes_and_starts_near_the_weight():
    model, plain = load_base("mlp"), load_base("mlp")
    x = digits.load().test.x
    expected = plain(x).data
    config = LoraConfig(r=8, lora_alpha=16, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=5))
    started = get_peft_model(model, config)
    assert all(isinstance(m.base_layer, Linear4bit) for _, m in started.adapter_layers())
    coded = quant.quantize_model(plain)(x).data
    assert error_of(started(x).data, expected)[1] < 0.8 * error_of(coded, expected)[1]


@pytest.mark.parametrize("way", ["unquantized base", "saved base"])
def test_a_saved_loftq_adapter_loads_into_either_base(tmp_path, way):
    model = llama_cases.llama("grouped", "float32")
    config = LoraConfig(
        r=2, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 3}, rank_pattern={"v_proj": 1}
    )
    model = get_peft_model(model, config).eval()
    for p in model.adapter_state().values():
        p.data = p.data + 0.1 * normal(*p.shape)
    expected = model(IDS).data
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert written["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 3}
    save_model(model.unload(), tmp_path / "base")
    model = load_model(tmp_path / "base") if way == "saved base" else llama_cases.llama("grouped", "float32")
    again = PeftModel.from_pretrained(model, tmp_path / "adapter")
    np.testing.assert_array_equal(again(IDS).data, expected)


def test_loftq_refuses_codes_and_other_adapters_and_leaves_all_as_it_was():
    config = LoraConfig(r=2, init_lora_weights="loftq")
    coded = quant.quantize_model(load_base("mlp"))
    with pytest.raises(ValueError, match=r"^init_lora_weights: 'loftq' quantizes the weight itself, and 'fc1' holds"):
        get_peft_model(coded, config)
    model = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"^init_lora_weights: 'loftq' changes the weight of 'fc1' under its adapters"):
        model.add_adapter("second", config)
    broken = load_base("mlp")
    W = broken.get_submodule("fc2").weight.data
    W[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^W: 1 of .* finite"):
        get_peft_model(broken, config)
    assert not any(isinstance(m, QuantizedLinear | LoraLinear) for m in broken.modules())
    assert broken.get_submodule("fc2").weight.data is W


def test_a_wrong_loftq_config_is_refused():
    for wrong, words in (
        ({"loftq_bits": 1}, "loftq_bits: got 1; 2 to 8"),
        ({"loftq_iter": 0}, "loftq_iter: got 0; an int of at least 1"),
        ({"bits": 4}, r"loftq_config: got \{'bits': 4\}; LoftQConfig\(loftq_bits, loftq_iter\)"),
        (4, "loftq_config: got 4"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            LoraConfig(init_lora_weights="loftq", loftq_config=wrong)
    with pytest.raises(ValueError, match=r"^use_dora: got True with init_lora_weights='loftq'"):
        LoraConfig(init_lora_weights="loftq", use_dora=True)


# --- bad input that other files do not show ---------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "dynamic"])
def test_one_element_is_coded_exactly(quant_type):
    """It is its block's maximum, and ±1 is in every table but for FP4's, whose scale then takes it up."""
    W = np.array([-0.3], np.float32)
    q = quant.quantize_int8(W) if quant_type == "dynamic" else quant.quantize(W, quant_type)
    assert q.size == 1
    np.testing.assert_allclose(dequantize(q), W, rtol=1e-6 if quant_type != "dynamic" else 0.01)
    assert Linear4bit.from_linear(nn.Linear(1, 1, rng=0))(Tensor(np.ones((1, 1), np.float32))).shape == (1, 1)


NESTED = {
    "absmax": np.zeros(1, "uint8"),
    "nested_absmax": np.ones(1, "float32"),
    "offset": np.float32(0),
    "nested_blocksize": 256,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (8, 9)}, r"codes: got 32 × uint8; nf4 of shape \(8, 9\) in blocks of 64 needs 36 × uint8"),
        ({"codes": np.zeros(32, "int8")}, "codes: got 32 × int8"),
        ({"absmax": np.zeros(2, "float32")}, r"absmax: got 2 × float32; .* needs 1 × float32"),
        ({"absmax": np.zeros(1, "float64")}, "absmax: got 1 × float64"),
        ({"blocksize": 48}, "blocksize: got 48"),
        ({"quant_type": "nf9"}, "quant_type: got 'nf9'"),
        ({"codes": np.zeros((32, 1), "uint8")}, "codes: got 32 × 1 × uint8; .* needs 32 × uint8"),
        ({"codes": np.zeros(0, "uint8"), "absmax": np.zeros(0, "float32"), "shape": (0, 8)}, r"shape: got \(0, 8\)"),
        ({"nested_absmax": np.ones(1, "float32")}, "offset, nested_absmax, nested_blocksize: got some of them"),
        (NESTED | {"nested_blocksize": 0}, "nested_blocksize: got 0; an int of at least 1"),
        (NESTED | {"nested_absmax": np.ones(2, "float32")}, "nested_absmax: got 2 × float32; .* needs 1 × float32"),
        (NESTED | {"offset": np.zeros(1, "float32")}, "offset: got 1 × float32; .* needs float32"),
    ],
)
def test_a_state_whose_shapes_do_not_match_its_codes_is_refused(changes, words):
    q = quant.quantize_nf4(normal(8, 8))
    parts = {name: getattr(q, name) for name in ("codes", "absmax", "blocksize", "shape", "dtype", "quant_type")}
    with pytest.raises(ValueError, match=f"^{words}"):
        quant.QuantizedTensor(**parts | changes)
