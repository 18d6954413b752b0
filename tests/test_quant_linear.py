"""Layers and models that hold their weights as codes: products, gradients, memory, LoRA on top."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest

from minipeft import gradcheck, nn, ops, quant, threads
from minipeft.backend import to_numpy
from minipeft.measure import memory_report
from minipeft.methods.lora import LoraConfig, lora_linear
from minipeft.models import load_base
from minipeft.peft import get_peft_model
from minipeft.quant import Linear4bit, Linear8bit, QuantizedLinear
from minipeft.quant.linear import buffer_bytes
from minipeft.tensor import Held, Tensor


def linear(out_features: int = 24, in_features: int = 40, bias: bool = True, dtype: str = "float32") -> nn.Linear:
    """A Linear with start values."""
    return nn.Linear(in_features, out_features, bias, dtype=dtype, rng=0)


def inputs(*shape: int, dtype: str = "float32") -> Tensor:
    """Normal numbers that want a gradient."""
    return Tensor(np.random.default_rng(1).standard_normal(shape).astype(dtype), requires_grad=True)


LAYERS = {
    "nf4": Linear4bit.from_linear,
    "fp4": lambda layer: Linear4bit.from_linear(layer, "fp4"),
    "nf4 single": lambda layer: Linear4bit.from_linear(layer, double_quant=False),
    "int8": Linear8bit.from_linear,
    "nf3": lambda layer: QuantizedLinear(quant.quantize(layer.weight.data, "nf3"), layer.bias),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dequantized_weight(make, bias):
    layer = make(linear(bias=bias))
    plain, x, x_plain = layer.to_linear(), inputs(2, 5, 40), inputs(2, 5, 40)
    y, y_plain = layer(x), plain(x_plain)
    np.testing.assert_array_equal(y.data, y_plain.data)
    g = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
    y.backward(g), y_plain.backward(g)
    np.testing.assert_array_equal(x.grad, x_plain.grad)
    if bias:
        assert layer.bias.grad is not None


def test_quantized_linear_passes_gradcheck():
    weight = Linear4bit.from_linear(linear(dtype="float64")).weight
    x, bias = inputs(3, 40, dtype="float64"), inputs(24, dtype="float64")
    gradcheck(lambda x, bias: quant.quantized_linear(x, weight, bias), [x, bias])


def test_the_graph_holds_codes_and_not_the_weight():
    layer, x = Linear4bit.from_linear(linear()), inputs(5, 40)
    y = layer(x)
    held = [array for array, *_ in Held.live.values()]
    assert any(array is layer.quantized.codes for array in held)
    assert not any(array.size == 24 * 40 for array in held)
    with pytest.raises(ValueError, match="read-only"):
        layer.quantized.codes[0] = 0
    y.sum().backward()
    assert layer.quantized.codes.flags.writeable


def test_the_weight_is_no_parameter_and_cannot_be_unfrozen_or_assigned():
    layer = Linear4bit.from_linear(linear())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer.requires_grad_(True)
    assert layer.weight.requires_grad is False
    with pytest.raises(ValueError, match=r"^requires_grad: a weight held as codes has no gradient"):
        layer.weight.requires_grad = True
    with pytest.raises(ValueError, match=r"^weight: it is held as codes .*dequantize_model"):
        layer.weight.data = np.zeros((24, 40), np.float32)


def test_what_the_weight_tells_of_itself_is_the_full_weights():
    layer = Linear4bit.from_linear(linear())
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.size, weight.ndim) == ((24, 40), np.float32, 960, 2)
    np.testing.assert_array_equal(weight.data, quant.dequantize(layer.quantized))
    assert "nf4" in repr(weight)
    assert "nf4" in repr(layer)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further thread takes 1 MiB for its look-ups."""
    monkeypatch.setattr(threads, "threads", lambda: 1)


@pytest.mark.usefixtures("one_thread")
def test_backward_makes_no_gradient_of_the_weight_and_at_most_one_full_weight_exists():
    """Four layers of 1024 × 1024 (4 MiB each in float32): one buffer, and no gradient of a weight."""
    layers = [Linear4bit.from_linear(linear(1024, 1024, bias=False)) for _ in range(4)]
    model, x = nn.Sequential(*layers), inputs(1, 1024)
    quant.release_buffers()
    tracemalloc.start()
    model(x).sum().backward()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    weight = 1024 * 1024 * 4
    assert weight <= peak < 1.5 * weight  # the buffer and 1 MiB of work


@pytest.mark.usefixtures("one_thread")
def test_the_buffer_is_used_again():
    layer, x = Linear4bit.from_linear(linear(1024, 1024)), inputs(1, 1024)
    quant.release_buffers()
    assert buffer_bytes() == 0
    layer(x)
    assert buffer_bytes() == 1024 * 1024 * 4
    tracemalloc.start()
    layer(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 1024 * 1024 * 4


def test_other_dtypes_and_widths_are_refused():
    layer = Linear4bit.from_linear(linear())
    with pytest.raises(TypeError, match=r"^quantized_linear: x is float64 .* dequantizes to float32"):
        layer(inputs(2, 40, dtype="float64"))
    with pytest.raises(ValueError, match=r"^quantized_linear: x \(2, 41\); .* takes 40 features"):
        layer(inputs(2, 41))
    with pytest.raises(ValueError, match=r"^quant_type: got 'int4'; accepted are 'nf4' and 'fp4'"):
        Linear4bit.from_linear(linear(), "int4")
    with pytest.raises(ValueError, match=r"^quantized: got shape \(64,\)"):
        QuantizedLinear(quant.quantize_nf4(np.ones(64, np.float32)))
    with pytest.raises(ValueError, match=r"^bias: got shape \(40,\); \(24,\) is accepted"):
        QuantizedLinear(layer.quantized, nn.Parameter(np.ones(40, np.float32)))


def test_a_half_precision_layer_can_compute_in_float32():
    layer = Linear4bit.from_linear(linear(dtype="float16"), dtype="float32")
    layer.bias.data = layer.bias.data.astype(np.float32)
    assert layer(inputs(2, 40)).dtype == np.float32


def test_layers_move_between_array_libraries_and_dtypes(xp):
    layer, x = Linear4bit.from_linear(linear()), inputs(5, 40)
    expected = layer(x).data
    layer.to(xp)
    y = layer(Tensor(xp.asarray(x.data)))
    np.testing.assert_allclose(to_numpy(y.data), expected, rtol=1e-5, atol=1e-6)
    layer.to(dtype="float64")
    assert layer(Tensor(xp.asarray(x.data.astype(np.float64)))).dtype == np.float64
    assert layer.quantized.nested_absmax.dtype == np.float32  # scales keep the precision that they were made in


def test_copies_share_the_codes():
    layer = Linear4bit.from_linear(linear())
    assert copy.deepcopy(layer).quantized is layer.quantized


# --- LoRA on top ------------------------------------------------------------------------------------------------------


def test_one_fused_node_equals_the_base_and_the_adapter_apart():
    layer, rng = Linear4bit.from_linear(linear(dtype="float64")), np.random.default_rng(3)
    layer.bias.requires_grad = True
    A, B = (Tensor(rng.standard_normal(shape), requires_grad=True) for shape in ((4, 40), (24, 4)))
    x, g = inputs(2, 5, 40, dtype="float64"), rng.standard_normal((2, 5, 24))
    grads = []
    for fused in (True, False):
        for t in (x, A, B, layer.bias):
            t.grad = None
        if fused:
            y = lora_linear(x, layer.weight, layer.bias, A, B, 0.5)
        else:
            y = layer(x) + ops.linear(ops.linear(x, A), B) * 0.5
        y.backward(g)
        grads.append([y.data, x.grad, A.grad, B.grad, layer.bias.grad])
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_fused_node_holds_codes_too():
    layer = Linear4bit.from_linear(linear())
    A, B = inputs(4, 40), inputs(24, 4)
    y = lora_linear(inputs(5, 40), layer.weight, layer.bias, A, B, 0.5)
    held = [array for array, *_ in Held.live.values()]
    assert any(array is layer.quantized.codes for array in held)
    assert not any(array.size == 24 * 40 for array in held)
    y.sum().backward()


@pytest.fixture
def digits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((32, 64), dtype=np.float32), rng.integers(0, 10, 32)


@pytest.mark.parametrize("code", ["nf4", "fp4", "int8", "nf3", "int4"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_trains_beside_codes_that_never_change(code, dropout, digits):
    model = quant.quantize_model(load_base("mlp"), code)
    layer = model.get_submodule("fc1")
    before = layer.quantized.codes.copy(), layer.quantized.absmax.copy()
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout)).train()
    x, targets = digits
    trained = [p for p in adapted.parameters() if p.requires_grad]
    losses = []
    for _ in range(20):
        loss = ops.cross_entropy(adapted(Tensor(x)), targets)
        loss.backward()
        losses.append(loss.item())
        for p in trained:
            p.data = p.data - 0.1 * p.grad
            p.grad = None
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(layer.quantized.codes, before[0])
    np.testing.assert_array_equal(layer.quantized.absmax, before[1])


def test_gradients_of_the_adapters_are_those_on_the_dequantized_model(digits):
    x, targets = digits
    grads = []
    for codes in (True, False):
        model = quant.quantize_model(load_base("mlp"))
        adapted = get_peft_model(model if codes else quant.dequantize_model(model), LoraConfig(r=4))
        ops.cross_entropy(adapted(Tensor(x)), targets).backward()
        grads.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(grads[0]) > 2
    for a, b in zip(*grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_merging_into_codes_is_refused_and_merging_after_dequantizing_works(digits):
    x, _ = digits
    adapted = get_peft_model(quant.quantize_model(load_base("mlp")), LoraConfig(r=4, init_lora_weights=False)).eval()
    expected = adapted(Tensor(x)).data
    with pytest.raises(ValueError, match=r"^merge_adapter: 2 layers hold their weights as codes .*finish_qlora"):
        adapted.merge_adapter()
    np.testing.assert_array_equal(adapted(Tensor(x)).data, expected)  # the refusal changed nothing
    quant.dequantize_model(adapted)
    np.testing.assert_allclose(adapted.merge_and_unload()(Tensor(x)).data, expected, rtol=1e-4, atol=1e-4)


def test_a_refused_merge_leaves_layers_without_codes_unmerged_too():
    model = quant.quantize_model(load_base("mlp"), skip=("fc1",))
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    W = model.get_submodule("fc1").weight.data.copy()
    with pytest.raises(ValueError, match=r"^merge_adapter: 1 layers hold"):
        adapted.merge_adapter()
    np.testing.assert_array_equal(model.get_submodule("fc1").weight.data, W)
    assert adapted.merged_adapters == []


def test_codes_count_as_the_weights_they_stand_for():
    counts = [get_peft_model(m, LoraConfig(r=4)).get_nb_trainable_parameters()
              for m in (load_base("mlp"), quant.quantize_model(load_base("mlp")))]  # fmt: skip
    assert counts[0] == counts[1]


@pytest.mark.parametrize("init", ["pissa", "olora", "both"])
def test_start_values_that_change_the_weight_are_refused_before_anything_is_changed(init):
    model = quant.quantize_model(load_base("mlp"))
    with pytest.raises(ValueError, match=rf"^init_lora_weights: '{init}' .* holds its weight as codes"):
        get_peft_model(model, LoraConfig(r=4, init_lora_weights=init))
    assert isinstance(model.get_submodule("fc1"), Linear4bit)


def test_adapters_are_saved_and_loaded_as_on_a_plain_base(tmp_path, digits):
    from minipeft.peft import PeftModel

    x, _ = digits
    config = LoraConfig(r=4, init_lora_weights=False)
    adapted = get_peft_model(quant.quantize_model(load_base("mlp")), config).eval()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quant.quantize_model(load_base("mlp")), tmp_path).eval()
    np.testing.assert_array_equal(again(Tensor(x)).data, adapted(Tensor(x)).data)
    plain = PeftModel.from_pretrained(load_base("mlp"), tmp_path)  # QLoRA's adapters fit LoRA's base
    assert plain(Tensor(x)).shape == (32, 10)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["mlp", "vit"])
def test_every_linear_but_the_head_holds_codes_and_the_rest_is_frozen_float32(base):
    model = quant.quantize_model(load_base(base).to(dtype="float16"))
    head = model.get_submodule(model.output_head)
    assert type(head) is nn.Linear
    others = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    assert others
    assert all(isinstance(m, Linear4bit) and m.weight.dtype == np.float32 for m in others)
    assert all(p.dtype == np.float32 and not p.requires_grad for p in model.parameters())


def test_skipped_layers_keep_their_weights():
    model = quant.quantize_model(load_base("mlp"), skip=("fc2",))
    assert type(model.get_submodule("fc2")) is nn.Linear
    assert type(model.get_submodule("fc1")) is Linear4bit


def test_a_refused_model_is_as_it_was():
    model = load_base("mlp")
    for options, message in (
        ({"quant": "nf9"}, "quant_type: got 'nf9'"),
        ({"blocksize": 63}, "blocksize: got 63"),
        ({"skip": ("fc9",)}, "skip: no Linear is called 'fc9'"),
    ):
        with pytest.raises(ValueError, match=message):
            quant.quantize_model(model, **options)
    model.get_submodule("fc2").weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"^W: 1 of .* finite"):
        quant.quantize_model(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"^model: it has no Linear"):
        quant.quantize_model(nn.Sequential(nn.ReLU()))


def test_dequantizing_gives_plain_layers_with_the_same_outputs(digits):
    x, _ = digits
    model = quant.quantize_model(load_base("mlp"))
    expected = model(Tensor(x)).data
    quant.dequantize_model(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    np.testing.assert_array_equal(model(Tensor(x)).data, expected)


def test_the_memory_report_counts_codes_and_scales():
    layer = Linear4bit.from_linear(linear(64, 64, bias=False))
    y = layer(inputs(1, 64))
    report = memory_report(layer)
    assert report.weights == layer.quantized.nbytes == 64 * 64 // 2 + 64 + 4 + 4
    assert report.activations == 0  # dX = dY · W needs codes that the model has anyway
    del y


def test_digits_keep_their_answers_at_four_bits():
    from minipeft.data import digits

    x = Tensor(digits.load().test.x)
    model, coded = load_base("mlp"), quant.quantize_model(load_base("mlp"))
    assert np.mean(model(x).data.argmax(1) == coded(x).data.argmax(1)) > 0.97  # a few images lie near a border
