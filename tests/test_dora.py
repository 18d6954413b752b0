"""DoRA's formulas, its fused operation, its layer, and models that it adapts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import llama
from peft_references import DORA_CONFIG, DORA_REFERENCE, base_of, kept_in, part
from safetensors.numpy import load_file
from twins import Net, assert_all_close, batch, gradients, loss_curve, outputs, randomize, start_from

from minipeft import LoraConfig, PeftModel, Tensor, backend, fit, get_peft_model, gradcheck, optim
from minipeft.backend import get_namespace, to_numpy
from minipeft.methods.dora import (
    Dora,
    DoraLinear,
    dora_composed,
    dora_gradients,
    dora_linear,
    dora_magnitude,
    dora_norm,
    dora_weight,
    weight_decomposition,
)
from minipeft.quant import Linear4bit

FLOATS = ["float32", "float64"]
EPS = 2.0**-52
KINDS = st.sampled_from(["column", "scalar"])
NORMS = st.sampled_from(["constant", "graph"])


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def factors(out=6, width=5, r=2, dtype="float64"):
    return (
        gaussian(out, width, dtype=dtype),
        gaussian(r, width, seed=1, dtype=dtype),
        gaussian(out, r, seed=2, dtype=dtype),
    )


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_magnitude_is_a_norm_for_each_output_or_for_the_matrix(xp, dtype):
    W = gaussian(6, 5, dtype=dtype)
    column, scalar = dora_magnitude(xp.asarray(W)), dora_magnitude(xp.asarray(W), "scalar")
    assert get_namespace(column) is get_namespace(scalar) is xp
    assert column.dtype == scalar.dtype == dtype
    rtol = 10 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(to_numpy(column), np.linalg.norm(W, axis=1), rtol=rtol)
    np.testing.assert_allclose(to_numpy(scalar), [np.linalg.norm(W)], rtol=rtol)


@given(st.integers(2, 9), st.integers(2, 9), KINDS)
def test_decomposing_and_composing_gives_the_weight_back(out, width, kind):
    W, A, B = factors(out, width)
    np.testing.assert_allclose(dora_weight(W, A, 0 * B, dora_magnitude(W, kind), 2.0), W, atol=1e-14)


@given(st.integers(2, 9), st.integers(2, 9), st.floats(-3, 3))
def test_the_weight_has_the_magnitudes_given_whatever_the_update(out, width, scaling):
    W, A, B = factors(out, width)
    m = 0.5 + np.abs(gaussian(out, seed=3))
    adapted = dora_weight(W, A, B, m, scaling)
    np.testing.assert_allclose(dora_magnitude(adapted), m, rtol=1e-12)
    V = W + scaling * B @ A
    cosines = (adapted * V).sum(1) / np.linalg.norm(adapted, axis=1) / np.linalg.norm(V, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-12)
    np.testing.assert_allclose(dora_magnitude(dora_weight(W, A, B, m[:1], scaling), "scalar"), m[:1], rtol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(-3, 3), KINDS)
def test_the_expanded_norm_is_that_of_the_sum(out, width, r, scaling, kind):
    W, A, B = factors(out, width, r)
    expected = dora_magnitude(W + scaling * B @ A, kind)
    np.testing.assert_allclose(dora_norm(W, A, B, scaling, kind=kind), expected, rtol=1e-12)
    known = np.linalg.norm(W, axis=1) ** 2
    np.testing.assert_allclose(dora_norm(W, A, B, scaling, known, kind), expected, rtol=1e-12)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-6, 1e-10])
def test_the_norm_keeps_its_digits_where_the_update_cancels_the_weight(left):
    W, A, B = factors(8, 6)
    W[::2] = -2.0 * (B @ A)[::2] + left * W[::2]  # in every other row
    expected = dora_magnitude(W + 2.0 * B @ A)
    # the sum itself rounds to ε of numbers of about 10
    np.testing.assert_allclose(dora_norm(W, A, B, 2.0), expected, rtol=0, atol=100 * EPS)
    naive = (W**2).sum(1) + 4 * ((W @ A.T) * B).sum(1) + 4 * ((B @ (A @ A.T)) * B).sum(1)
    if left <= 1e-6:  # what the plain expansion would give
        assert np.abs(np.sqrt(np.abs(naive)) - expected)[::2].max() > 1e5 * EPS


def test_the_norm_forms_no_array_of_the_weights_size(xp):
    W, A, B = (xp.asarray(f) for f in factors(64, 48))
    with backend.count_flops() as flops:
        norm = dora_norm(W, A, B, 0.5)
    assert get_namespace(norm) is xp
    r, out, width = 2, 64, 48
    assert flops.forward == 0
    assert flops.uncredited == 2 * out * width * r + 2 * r * width * r + 2 * out * r * r


@given(st.integers(2, 6), st.integers(1, 6), KINDS, NORMS)
def test_closed_form_gradients_are_those_of_backward_and_of_differences(out, width, kind, norm):
    W, A, B = factors(out, width)
    V, G = W + 0.5 * B @ A, gaussian(out, width, seed=4)
    m = dora_magnitude(V, kind) * (1.0 + 0.1 * np.abs(gaussian(1, seed=5)))
    dm, dV = dora_gradients(V, m, G, norm)
    held = dora_magnitude(V, kind)

    def loss(V, m):
        return ((m / (held if norm == "constant" else dora_magnitude(V, kind)))[:, None] * V * G).sum()

    for array, gradient, arguments in ((m, dm, lambda p: (V, p)), (V, dV, lambda p: (p, m))):
        differences = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            step = np.zeros_like(array)
            step[i] = 1e-6
            differences[i] = (loss(*arguments(array + step)) - loss(*arguments(array - step))) / 2e-6
        np.testing.assert_allclose(gradient, differences, atol=1e-7)  # 1e-16 ÷ 1e-6 of numbers of about 10
    tensors = [Tensor(f, requires_grad=True) for f in (A, B, m)]
    # x = I gives y = W'ᵀ, so ∂L/∂y = Gᵀ is ∂L/∂W' = G
    dora_linear(Tensor(np.eye(width)), Tensor(W), None, *tensors, 0.5, norm).backward(G.T)
    for tensor, expected in zip(tensors, (0.5 * B.T @ dV, 0.5 * dV @ A.T, dm), strict=True):
        np.testing.assert_allclose(tensor.grad, expected, atol=1e-11)


@given(st.integers(2, 6), st.integers(2, 6))
def test_the_papers_gradient_is_orthogonal_to_the_direction(out, width):
    """Liu et al. 2024, section 4.2: the projection takes out what would change the length."""
    V, G = gaussian(out, width), gaussian(out, width, seed=1)
    _, dV = dora_gradients(V, dora_magnitude(V), G)
    np.testing.assert_allclose((dV * V).sum(1), 0, atol=1e-12)


def test_the_decomposition_tells_longer_from_turned():
    W = gaussian(7, 5)
    moved, turned = weight_decomposition(W, 1.5 * W)
    assert (moved, turned) == (pytest.approx(0.5 * dora_magnitude(W).mean()), pytest.approx(0, abs=1e-15))
    moved, turned = weight_decomposition(W, -W)
    assert (moved, turned) == (pytest.approx(0, abs=1e-15), pytest.approx(2))
    Q = np.linalg.qr(gaussian(5, 5))[0]
    moved, turned = weight_decomposition(W, W @ Q)
    cosines = ((W @ Q) * W).sum(1) / (W * W).sum(1)
    assert (moved, turned) == (pytest.approx(0, abs=1e-14), pytest.approx((1 - cosines).mean()))
    assert weight_decomposition(np.zeros((2, 3)), W[:2, :3])[1] == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dora_magnitude(gaussian(3)), r"W: got \(3,\); a matrix"),
        (lambda: dora_magnitude(gaussian(3, 2), "row"), "kind: got 'row'; accepted are 'column', 'scalar'"),
        (lambda: dora_weight(*factors(), gaussian(5), 1.0), r"m: got \(5,\); \(6,\), one for each output"),
        (lambda: dora_norm(gaussian(6, 4), *factors()[1:], 1.0), r"A \(r, in\).*W \(out, in\) is \(6, 4\)"),
        (lambda: dora_weight(gaussian(1, 5), *factors()[1:], gaussian(1), 1.0), "A \\(r, in\\)"),
        (
            lambda: dora_gradients(gaussian(3, 2), gaussian(3), gaussian(2, 3)),
            r"G: got \(2, 3\); the shape of V, \(3, 2\)",
        ),
        (lambda: dora_gradients(gaussian(3, 2), gaussian(3), gaussian(3, 2), "none"), "norm: got 'none'"),
        (lambda: weight_decomposition(gaussian(3, 2), gaussian(2, 3)), r"W1: got \(2, 3\); the shape of W0, \(3, 2\)"),
        (lambda: dora_magnitude([[1.0]]), "W: got list; a matrix"),
        (lambda: dora_weight(*factors(), 1.0, 1.0), "m: got float"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the fused operation ----------------------------------------------------------------------------------------------


@st.composite
def operands(draw):
    """x, W, bias or None, A, B, m, each trained or frozen, for all shapes that a layer meets."""
    rows = draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 1, 2)]))
    width, out, r = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    trained = draw(st.lists(st.booleans(), min_size=6, max_size=6))
    magnitude = draw(st.sampled_from([(out,), (1,)]))
    shapes = [(*rows, width), (out, width), (out,), (r, width), (out, r), magnitude]
    tensors = [
        Tensor(gaussian(*s, seed=i), requires_grad=t) for i, (s, t) in enumerate(zip(shapes, trained, strict=True))
    ]
    if draw(st.booleans()):
        tensors[2] = None
    if draw(st.booleans()):
        tensors[5].data[0] = 0  # a magnitude of zero is a number as any other
    return tensors


@given(operands(), NORMS)
def test_the_fused_operation_is_the_composition_of_simple_ones(tensors, norm):
    results = []
    for operation in (dora_composed, dora_linear):
        y = operation(*tensors, 0.5, norm)
        if y.requires_grad:
            y.backward(gaussian(*y.shape, seed=9))
        results.append((y, [None if t is None else t.grad for t in tensors]))
        for t in tensors:
            if t is not None:
                t.grad = None
    (expected, expected_grads), (found, found_grads) = results
    assert found.requires_grad == expected.requires_grad
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-10, atol=1e-12)
    for i, (a, b) in enumerate(zip(expected_grads, found_grads, strict=True)):
        if i == 1 and norm == "constant" and a is None:
            assert b is None
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-11)


@given(operands())
def test_the_fused_operation_passes_gradcheck(tensors):
    """With the norm in the graph: only then is the gradient the derivative of what is computed."""
    present = [t for t in tensors if t is not None]
    if not any(t.requires_grad for t in present):
        return

    def run(*given):
        x, W, *bias, A, B, m = given
        return dora_linear(x, W, bias[0] if bias else None, A, B, m, 0.5, "graph")

    assert gradcheck(run, present)


@pytest.mark.parametrize("norm", ["constant", "graph"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_fused_operation_keeps_dtype_and_library(xp, dtype, norm):
    tensors = [
        Tensor(xp.asarray(gaussian(*shape, dtype=dtype)), requires_grad=True)
        for shape in [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2), (5,)]
    ]
    y = dora_linear(*tensors, np.float64(0.5), norm)
    y.sum().backward()
    for array in (y.data, *(t.grad for t in tensors)):
        assert get_namespace(array) is xp
        assert array.dtype == dtype


@pytest.mark.parametrize("norm", ["constant", "graph"])
def test_a_row_of_zeros_gives_no_nan_and_learns(norm):
    W, A, B = factors()
    W[1], m = 0, dora_magnitude(W * (np.arange(6) != 1)[:, None])
    tensors = [Tensor(f, requires_grad=True) for f in (A, 0 * B, m)]
    y = dora_linear(Tensor(gaussian(4, 5)), Tensor(W), None, *tensors, 1.0, norm)
    y.sum().backward()
    assert all(np.isfinite(a).all() for a in (y.data, *(t.grad for t in tensors)))
    assert tensors[1].grad[1].any()


def test_a_step_costs_three_thin_products_more_than_lora():
    N, out, width, r = 10, 6, 5, 2
    W, A, B = factors(out, width, r)
    tensors = [Tensor(f, requires_grad=True) for f in (A, B, dora_magnitude(W))]
    with backend.count_flops() as flops:
        dora_linear(Tensor(gaussian(N, width)), Tensor(W), None, *tensors, 1.0).sum().backward()
    norms = 2 * out * width * r + 2 * r * width * r + 2 * out * r * r  # W Aᵀ, A Aᵀ, B (A Aᵀ)
    assert flops.forward == 2 * N * (width * out + width * r + r * out) + norms
    assert flops.backward == 2 * N * (out * r + r * width + out * r)


@pytest.mark.parametrize("norm", ["constant", "graph"])
def test_a_weight_held_as_codes_gives_what_its_dequantized_weight_gives(norm):
    from minipeft.nn import Linear

    codes = Linear4bit.from_linear(Linear(64, 8, rng=0))
    plain = codes.to_linear()
    results = []
    for layer in (plain, codes):
        tensors = [
            Tensor(gaussian(*s, seed=i, dtype="float32"), requires_grad=True)
            for i, s in enumerate([(3, 64), (2, 64), (8, 2), (8,)])
        ]
        y = dora_linear(tensors[0], layer.weight, layer.bias, *tensors[1:], 0.5, norm)
        y.sum().backward()
        results.append([y.data, *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("position", "shape", "words"),
    [
        (0, (3, 5), r"dora_linear: x \(3, 5\)"),
        (3, (2, 3), "A \\(r, in\\)"),
        (4, (4, 2), "B \\(out, r\\)"),
        (5, (4,), r"m: got \(4,\)"),
    ],
)
def test_the_fused_operation_names_shapes_that_do_not_fit(position, shape, words):
    shapes = [(3, 4), (5, 4), (5,), (2, 4), (5, 2), (5,)]
    shapes[position] = shape
    with pytest.raises(ValueError, match=words):
        dora_linear(*(Tensor(gaussian(*s)) for s in shapes), 1.0)


# --- models -----------------------------------------------------------------------------------------------------------

X, Y = batch()
CONFIGS = [
    {},
    {"dora_magnitude": "scalar"},
    {"dora_norm": "graph"},
    {"dora_magnitude": "scalar", "dora_norm": "graph", "use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "gaussian", "bias": "all"},
]


def config(**options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "use_dora": True, **options})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", CONFIGS)
def test_a_model_starts_as_its_base(dtype, options):
    before = outputs(Net(dtype))
    after = outputs(get_peft_model(Net(dtype), config(**options)))
    if "init_lora_weights" in options and options["init_lora_weights"] == "pissa":
        np.testing.assert_allclose(after, before, atol=300 * float(np.finfo(dtype).eps))
    else:
        np.testing.assert_array_equal(after, before)


def test_parameters_have_pefts_names():
    model = get_peft_model(Net(), config(target_modules=["fc"]))
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "base_model.model.fc.lora_A.default.weight": (2, 5),
        "base_model.model.fc.lora_B.default.weight": (6, 2),
        "base_model.model.fc.lora_magnitude_vector.default.weight": (6,),
    }
    assert isinstance(model.method, Dora)
    scalar = get_peft_model(Net(), config(target_modules=["fc"], dora_magnitude="scalar"))
    assert scalar.adapter_state()["base_model.model.fc.lora_magnitude_vector"].shape == (1,)


@pytest.mark.parametrize("options", CONFIGS)
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(options):
    model = get_peft_model(Net(), config(**{"bias": "none", **options} | {"bias": "none"}))
    base = {n: p.data.tobytes() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    history = fit(model, [(Tensor(X), Y)], steps=30, optimizer=optimizer, progress=False)
    assert history.loss[-1] < 0.8 * history.loss[0]
    assert base == {n: p.data.tobytes() for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("options", CONFIGS)
def test_merged_equals_unmerged_and_unmerging_gives_the_weights_bits_back(options):
    model = randomize(get_peft_model(Net(), config(**options)))
    apart, weights = outputs(model), {n: p.data.copy() for n, p in model.named_parameters()}
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model), apart, atol=1e-12)
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, weights[name])
    np.testing.assert_array_equal(outputs(model), apart)
    with model.disable_adapter():
        pass
    plain = model.merge_and_unload()
    np.testing.assert_allclose(outputs(plain), apart, atol=1e-12)
    assert not any(isinstance(m, DoraLinear) for m in plain.modules())


@pytest.mark.parametrize("options", CONFIGS)
def test_a_saved_adapter_loads_with_the_same_outputs(options, tmp_path):
    model = randomize(get_peft_model(Net(), config(**options))).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    np.testing.assert_allclose(outputs(again), outputs(model), atol=1e-12)
    layer = next(m for _, m in again.adapter_layers()).lora_magnitude_vector["default"]
    assert layer.norm == options.get("dora_norm", "constant")


@pytest.mark.parametrize("second", [{"use_dora": False}, {}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("first", [{"use_dora": False}, {}, {"init_lora_weights": "pissa"}])
def test_dora_and_lora_adapters_live_in_one_model(first, second):
    model = get_peft_model(Net(), config(**first))
    before = outputs(Net())
    randomize(model)
    apart = outputs(model)
    model.add_adapter("second", config(r=3, target_modules=["fc", "v_proj"], **second))
    np.testing.assert_allclose(outputs(model), apart, atol=1e-11)  # the second rests
    model.set_adapter("second")
    np.testing.assert_allclose(outputs(model), before, atol=1e-11)  # and starts as the base
    randomize(model, seed=4)
    for names in ("default", "second", ["default", "second"]):
        model.set_adapter(names)
        expected = outputs(model)
        model.merge_adapter()
        np.testing.assert_allclose(outputs(model), expected, atol=1e-11)
        model.unmerge_adapter()
    np.testing.assert_allclose(outputs(model), expected, atol=1e-11)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), before, atol=1e-11)
    model.set_adapter("second")
    expected = outputs(model)
    model.delete_adapter("default")
    np.testing.assert_allclose(outputs(model), expected, atol=1e-11)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), expected, atol=1e-11)


def test_dropout_sees_base_and_adapter_through_one_mask():
    from minipeft.nn import Linear

    layer = config(lora_dropout=0.5).build().wrap("fc", Linear(5, 6, dtype="float64", rng=0))
    layer.active = ["default"]
    for p in (layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight):
        p.data = p.data + gaussian(*p.shape, seed=8)
    x = gaussian(7, 5)
    A, B = layer._factors("default")
    state = layer.lora_dropout["default"].rng.bit_generator.state
    dropped = layer.lora_dropout["default"](Tensor(x)).data
    layer.lora_dropout["default"].rng.bit_generator.state = state
    W, s, m = layer.weight.data, layer.scaling["default"], layer.lora_magnitude_vector["default"].weight.data
    gain = m / dora_norm(W, A, B, s)
    expected = x @ W.T + layer.base_layer.bias.data + (gain - 1) * (dropped @ W.T) + gain * s * (dropped @ A.T @ B.T)
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, atol=1e-12)
    np.testing.assert_allclose(
        layer.eval()(Tensor(x)).data, x @ dora_weight(W, A, B, m, s).T + layer.base_layer.bias.data, atol=1e-12
    )


def test_a_scalar_magnitude_leaves_the_rows_relative_lengths_to_the_update():
    """One magnitude scales all outputs alike: rows stay unit only in the column form."""
    W, A, B = factors()
    column = dora_magnitude(dora_weight(W, A, B, dora_magnitude(W), 1.0))
    scalar = dora_magnitude(dora_weight(W, A, B, dora_magnitude(W, "scalar"), 1.0))
    np.testing.assert_allclose(column, dora_magnitude(W), rtol=1e-12)
    assert np.abs(scalar - dora_magnitude(W)).max() > 0.1


def test_a_moved_or_converted_model_computes_the_same(xp):
    model = randomize(get_peft_model(Net("float32"), config()))
    expected = outputs(model)
    moved = model.to(xp)
    np.testing.assert_array_equal(to_numpy(moved(Tensor(xp.asarray(X.astype("float32")))).data), expected)


def test_qdora_trains_on_codes_and_refuses_to_merge_into_them(tmp_path):
    from minipeft.models import MLP
    from minipeft.quant import quantize_model

    def base():
        return quantize_model(MLP(rng=0))

    x, y = gaussian(16, 64, dtype="float32"), np.arange(16) % 10
    before = base()(Tensor(x)).data
    model = get_peft_model(base(), config(r=4))
    np.testing.assert_array_equal(model(Tensor(x)).data, before)
    codes = [layer.base_layer.quantized.codes.tobytes() for _, layer in model.adapter_layers()]
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    history = fit(model, [(Tensor(x), y)], steps=20, optimizer=optimizer, progress=False)
    assert history.loss[-1] < history.loss[0]
    assert codes == [layer.base_layer.quantized.codes.tobytes() for _, layer in model.adapter_layers()]
    trained = model(Tensor(x)).data
    with pytest.raises(ValueError, match="as codes"):
        model.merge_adapter()
    assert model.merged_adapters == []
    np.testing.assert_array_equal(model(Tensor(x)).data, trained)
    model.save_pretrained(tmp_path)
    np.testing.assert_array_equal(PeftModel.from_pretrained(base(), tmp_path)(Tensor(x)).data, trained)


@pytest.mark.parametrize("options", [{}, {"dora_magnitude": "scalar"}, {"dora_norm": "graph"}])
def test_a_language_model_trains_merges_saves_and_loads(options, tmp_path):
    ids = np.random.default_rng(0).integers(0, 61, (3, 10))
    before = llama()(ids).data
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, use_dora=True, **options))
    np.testing.assert_allclose(model(ids).data, before, atol=1e-12)
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss_fn = lambda model, batch: model.loss(batch)  # noqa: E731
    history = fit(model, [ids], steps=8, optimizer=optimizer, loss_fn=loss_fn, progress=False)
    assert history.loss[-1] < history.loss[0]
    expected = model.eval()(ids).data
    assert np.abs(expected - before).max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    np.testing.assert_array_equal(loaded(ids).data, expected)
    np.testing.assert_array_equal(loaded.generate(ids[0, :4], 3), model.generate(ids[0, :4], 3))
    # 1e-11: logits of about 5, through two blocks and their norms
    np.testing.assert_allclose(loaded.merge_and_unload()(ids).data, expected, atol=1e-11)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(ids).data, before)


# --- beside PEFT, by the numbers it gave (peft_references.dora_reference) ---------------------------------------------


@pytest.fixture(scope="module")
def kept():
    return kept_in(DORA_REFERENCE)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_adapter_that_peft_wrote_gives_the_outputs_that_peft_gave(kept, dtype, xp):
    x, _ = batch(dtype)
    model = PeftModel.from_pretrained(base_of(kept, dtype).to(xp), DORA_REFERENCE)
    found = to_numpy(model(Tensor(xp.asarray(x))).data)
    # 1e-12 and 1e-5: logits of about 5 from sums of 6 products, in float64 and in float32
    np.testing.assert_allclose(found, kept["outputs.float64"], rtol=0, atol=1e-12 if dtype == "float64" else 1e-5)


def test_gradients_of_an_adapter_that_peft_wrote_are_pefts(kept):
    model = PeftModel.from_pretrained(base_of(kept, "float64"), DORA_REFERENCE, is_trainable=True)
    found = gradients(model)
    assert sum("magnitude" in name for name in found) == 5
    assert_all_close(found, part(kept, "gradient."), atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("float64", 1e-11)])
def test_thirty_steps_of_training_follow_pefts_losses(kept, dtype, rtol, tmp_path):
    """PyTorch's own float32 losses are up to 4e-6 (relative) away from its float64 ones."""
    model = get_peft_model(base_of(kept, dtype), LoraConfig(**DORA_CONFIG))
    start, state = part(kept, "start."), model.adapter_state()
    assert state.keys() == start.keys()
    for name, p in state.items():
        if "magnitude" in name:  # made of W here and there
            np.testing.assert_allclose(p.data, start[name], rtol=1e-6)
    start_from(model, start)
    losses = loss_curve(model)
    np.testing.assert_allclose(losses, kept[f"losses.{dtype}"], rtol=rtol)
    assert losses[-1] < 0.3 * losses[0]
    if dtype == "float64":  # and ends at the adapter that PEFT wrote
        model.save_pretrained(tmp_path)
        found, expected = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, DORA_REFERENCE))
        assert_all_close(found, expected, atol=1e-10)
