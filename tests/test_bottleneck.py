"""Bottleneck adapters: the formula, the layer behind a Linear, models of three kinds, files, and no merging."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import batch as llama_batch
from llama_cases import llama
from safetensors.numpy import load_file
from scipy.special import erf
from twins import Net, batch

from minipeft import (
    BottleneckAdapterConfig,
    LoraConfig,
    PeftModel,
    Tensor,
    fit,
    get_peft_model,
    gradcheck,
    ops,
    optim,
)
from minipeft.backend import count_flops, get_namespace, to_numpy
from minipeft.methods.bottleneck import ACTIVATIONS, INITS, BottleneckLinear, bottleneck, init_bottleneck
from minipeft.models import MLP, ViT
from minipeft.nn import Linear
from minipeft.quant import quantize_model

FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def weights(d, m, dtype="float64"):
    """W_down, b_down, W_up, b_up."""
    return [gaussian(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(m, d), (m,), (d, m), (d,)])]


def randomize(model, adapter="default", seed=3):
    rng = np.random.default_rng(seed)
    for p in model.adapter_state(adapter).values():
        xp = get_namespace(p.data)
        p.data = p.data + xp.asarray((0.3 * rng.standard_normal(p.shape)).astype(p.dtype))
    return model


def adapted(model=None, **options):
    return randomize(get_peft_model(model or Net(), BottleneckAdapterConfig(**{"bottleneck_size": 3} | options)))


def outputs(model):
    return model(Tensor(batch(seed=9)[0])).data


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([(), (2,), (2, 3)]))
def test_the_formula_row_by_row(activation, d, m, lead):
    W_down, b_down, W_up, b_up = weights(d, m)
    h = gaussian(*lead, d, seed=7)
    y = bottleneck(h, W_down, b_down, W_up, b_up, activation)
    for row, out in zip(h.reshape(-1, d), y.reshape(-1, d), strict=True):
        np.testing.assert_allclose(out, row + W_up @ FORMULAS[activation](W_down @ row + b_down) + b_up, atol=1e-12)


def test_the_formula_is_not_linear_so_it_cannot_be_merged():
    parts, h = weights(4, 2), 3 * gaussian(4, seed=6)
    there, back, between = (bottleneck(c * h, *parts) for c in (1, -1, 0))
    assert abs(there + back - 2 * between).max() > 0.1  # 0 for a weight and a bias


@given(st.integers(1, 6), st.integers(1, 5))
def test_the_start_is_the_identity_or_near_it(d, m):
    h = gaussian(3, d)
    down, up = init_bottleneck(d, m, "zero", 0, "float64")
    assert bottleneck(h, down, np.zeros(m), up, np.zeros(d)).tobytes() == h.tobytes()
    assert down.any()
    down, up = init_bottleneck(d, m, "tiny", 0, "float64")
    assert down.any()
    assert up.any()
    assert max(abs(down).max(), abs(up).max()) <= 0.02
    assert abs(bottleneck(h, down, np.zeros(m), up, np.zeros(d)) - h).max() <= 0.02**2 * d * m * abs(h).max() * 1.13


def test_the_tiny_start_is_a_normal_distribution_cut_off_at_two_deviations():
    down, _ = init_bottleneck(300, 200, "tiny", 0, "float64")
    assert down.std() == pytest.approx(0.8796e-2, rel=0.01)  # of a standard normal within ±2
    assert down.mean() == pytest.approx(0, abs=2e-4)


def test_the_formula_keeps_the_library_and_dtype(xp):
    h, parts = gaussian(3, 4, dtype="float32"), weights(4, 2, "float32")
    y = bottleneck(xp.asarray(h), *map(xp.asarray, parts))
    assert get_namespace(y) is xp
    assert y.dtype == np.float32
    np.testing.assert_allclose(to_numpy(y), bottleneck(h, *parts), rtol=1e-6)


# --- the layer --------------------------------------------------------------------------------------------------------


def layer(activation="gelu", d=4, m=2, width=3):
    made = BottleneckLinear(Linear(width, d, dtype="float64", rng=0))
    made.base_layer.requires_grad_(False)
    down, up = Linear(d, m, dtype="float64", rng=1), Linear(m, d, dtype="float64", rng=2)
    made.add("a", down, up, activation)
    made.active = ["a"]
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_gradients_are_central_differences(activation, d, m, width, seed):
    made = layer(activation, d, m, width)
    x = Tensor(gaussian(2, width, seed=seed), requires_grad=True)
    parameters = [p for p in made.parameters() if p.requires_grad]
    assert len(parameters) == 4
    kink = activation == "relu" and abs(made.adapter_down["a"](made.base_layer(x)).data).min() < 1e-4
    assert kink or gradcheck(lambda *_: made(x), [x, *parameters])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_layer_is_the_formula_behind_the_linear(activation):
    made, x = layer(activation), gaussian(2, 5, 3)
    down, up = made.adapter_down["a"], made.adapter_up["a"]
    parts = [p.data for p in (down.weight, down.bias, up.weight, up.bias)]
    expected = bottleneck(made.base_layer(Tensor(x)).data, *parts, activation)
    np.testing.assert_array_equal(made(Tensor(x)).data, expected)


def test_only_the_bottleneck_has_gradients_and_flops_of_weights():
    made, x = layer(d=64, m=4, width=64), Tensor(gaussian(8, 64), requires_grad=True)
    with count_flops() as flops:
        (made(x) ** 2).sum().backward()
    product = 2 * 8 * 64 * 64
    small = 2 * 8 * 64 * 4
    assert flops.forward == product + 2 * small
    assert flops.backward == product + 4 * small  # dx through the frozen weight, dx and dW of both small ones
    assert made.weight.grad is None


# --- models -----------------------------------------------------------------------------------------------------------

PLACES = {
    "vit": (lambda: ViT(rng=0), [f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")]),
    "mlp": (lambda: MLP(rng=0), ["fc1", "fc2"]),
    "llama": (llama, [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")]),
}


@pytest.mark.parametrize("kind", PLACES)
def test_left_out_the_places_are_the_ends_of_attention_and_mlp(kind):
    make, places = PLACES[kind]
    model = get_peft_model(make(), BottleneckAdapterConfig(bottleneck_size=4))
    assert [name for name, _ in model.adapter_layers()] == places
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"base_model.model.{place}.adapter_{way}.default.{kind}"
        for place in places
        for way in ("down", "up")
        for kind in ("weight", "bias")
    }
    dims = [layer.weight.shape[0] for _, layer in model.adapter_layers()]
    assert model.get_nb_trainable_parameters()[0] == sum(2 * 4 * d + 4 + d for d in dims)


def test_targets_are_chosen_as_for_lora():
    model = adapted(target_modules=r".*\.q_proj")
    assert [name for name, _ in model.adapter_layers()] == ["layers.0.q_proj", "layers.1.q_proj"]
    with pytest.raises(ValueError, match=r"no module is called 'q_prj'; closest are 'q_proj'"):
        adapted(target_modules=["q_prj"])


@pytest.mark.parametrize("init", INITS)
def test_attached_it_leaves_the_outputs_as_they_are_or_nearly(init):
    before = outputs(Net())
    model = get_peft_model(Net(), BottleneckAdapterConfig(bottleneck_size=3, init_adapter_weights=init))
    np.testing.assert_allclose(outputs(model), before, rtol=0, atol=0 if init == "zero" else 0.02)
    assert (outputs(adapted()) != before).all()


@pytest.mark.parametrize("init", INITS)
def test_it_trains_and_the_base_stays(init):
    model = get_peft_model(Net(), BottleneckAdapterConfig(bottleneck_size=3, init_adapter_weights=init))
    x, y = batch()
    before = {n: p.data.copy() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = fit(model, [(Tensor(x), y)], steps=40, optimizer=optimizer, progress=False)
    assert history.loss[-1] < history.loss[0] / 2
    after = dict(model.named_parameters())
    assert [n for n in before if before[n].tobytes() != after[n].data.tobytes()] == []


def test_it_trains_a_language_model_on_weights_held_as_codes():
    ids, labels, mask = llama_batch("right")
    base = quantize_model(llama(dtype="float32", hidden_size=64, intermediate_size=64))
    model = get_peft_model(base, BottleneckAdapterConfig(bottleneck_size=4))
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss = lambda model, _: model.loss(ids, labels, mask)  # noqa: E731
    history = fit(model, [0], steps=8, optimizer=optimizer, loss_fn=loss, progress=False)
    assert history.loss[-1] < history.loss[0]


def test_several_adapters_are_chosen_switched_off_added_and_deleted():
    model = adapted()
    first = outputs(model)
    model.add_adapter("second", BottleneckAdapterConfig(bottleneck_size=2))
    randomize(model, "second", seed=5)
    np.testing.assert_array_equal(outputs(model), first)
    model.set_adapter("second")
    second = outputs(model)
    assert (second != first).all()
    with model.disable_adapter():
        np.testing.assert_array_equal(outputs(model), outputs(Net()))
    model.delete_adapter("second")
    np.testing.assert_array_equal(outputs(model), first)
    np.testing.assert_array_equal(outputs(model.unload()), outputs(Net()))


def test_it_runs_on_other_array_libraries(xp):
    ours, theirs = adapted(), adapted(Net().to(xp))
    x, y = batch()
    for model, library in ((ours, np), (theirs, xp)):
        ops.cross_entropy(model(Tensor(library.asarray(x))), library.asarray(y)).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(to_numpy(grads[name]), p.grad, atol=1e-12)


# --- files and merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLACES)
def test_a_saved_adapter_gives_the_same_outputs(kind, tmp_path):
    make, places = PLACES[kind]
    x = llama_batch("none")[0] if kind == "llama" else Tensor(gaussian(3, 64, dtype="float32"))
    model = adapted(make(), activation="relu")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    np.testing.assert_array_equal(loaded(x).data, model(x).data)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bottleneck_size"], config["activation"]) == ("BOTTLENECK_ADAPTER", 3, "relu")
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {n for n in names if "up.weight" in n} == {f"base_model.model.{p}.adapter_up.weight" for p in places}


def test_saved_modules_train_with_it(tmp_path):
    model = adapted(modules_to_save=["norm"])
    assert sum(".norm." in n for n in model.adapter_state()) == 4
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(outputs(PeftModel.from_pretrained(Net(), tmp_path)), outputs(model))


def test_merging_is_refused_with_the_reason_and_changes_nothing():
    model = adapted()
    before = outputs(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'fc' cannot be merged: W_up f\(W_down h\) is not linear in h"):
            merge()
    with pytest.raises(ValueError, match="is not linear in h"):
        layer().merge(["a"])
    np.testing.assert_array_equal(outputs(model), before)


def test_an_adapter_beside_it_is_merged():
    model = adapted()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    model.set_adapter("lora")
    expected = outputs(model)
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model), expected, atol=1e-12)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 0}, r"bottleneck_size: got 0; an int of at least 1"),
        ({"bottleneck_size": 2.5}, r"bottleneck_size: got 2.5"),
        ({"activation": ["relu"]}, r"activation: got \['relu'\]; accepted are 'relu', 'gelu'"),
        ({"activation": "sine"}, r"activation: got 'sine'; accepted are 'relu', 'gelu'"),
        ({"init_adapter_weights": True}, r"init_adapter_weights: got True; accepted are 'zero', 'tiny'"),
        ({"target_modules": []}, r"target_modules: got \[\]; a list of names"),
    ],
)
def test_a_wrong_option_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapterConfig(**options)


def test_shapes_that_do_not_fit_and_unknown_entries_of_a_file_are_refused():
    with pytest.raises(ValueError, match=r"bottleneck: h \(..., d\).*got \(3, 5\), \(2, 4\)"):
        bottleneck(gaussian(3, 5), *weights(4, 2))
    with pytest.raises(ValueError, match="init: got 'none'"):
        init_bottleneck(3, 2, "none")
    with pytest.raises(ValueError, match="adapter config: scaling is not supported here"):
        BottleneckAdapterConfig.from_dict({"scaling": 2.0})
