"""LoRA's formulas, its fused operation, and its layer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import Tensor, backend, gradcheck, no_grad, ops, rank
from minipeft.backend import get_namespace, to_numpy
from minipeft.methods.lora import (
    INITS,
    OFFSET_INITS,
    LoraConfig,
    LoraLinear,
    init_lora,
    lora_delta,
    lora_linear,
    lora_scaling,
    merge_lora,
    unmerge_lora,
)
from minipeft.nn import Linear, Parameter

FLOATS = ["float32", "float64"]


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def eps(dtype):
    return float(np.finfo(dtype).eps)


# --- formulas ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 512), st.floats(0.1, 1024))
def test_scaling_is_alpha_over_r_and_over_its_root_for_rslora(r, alpha):
    assert lora_scaling(alpha, r) == alpha / r
    assert lora_scaling(alpha, r, rslora=True) == alpha / math.sqrt(r)


def test_rslora_keeps_the_size_of_an_update_as_the_rank_grows():
    """Kalajdzievski 2023: entries of B A have variance r for unit gaussian factors, so α/√r and not α/r is stable."""
    sizes = {
        rslora: [
            lora_delta(gaussian(r, 64), gaussian(64, r, seed=1), lora_scaling(1, r, rslora)).std() for r in (4, 16, 64)
        ]
        for rslora in (False, True)
    }
    assert max(sizes[True]) / min(sizes[True]) < 1.3  # 64 · 64 samples with few degrees of freedom at r = 4
    assert sizes[False][0] / sizes[False][2] == pytest.approx(4, rel=0.3)  # √(64/4)


@pytest.mark.parametrize(
    ("alpha", "r", "words"),
    [
        (8, 0, "r: got 0"),
        (8, -3, "r: got -3"),
        (8, 2.5, "r: got 2.5; an int of at least 1"),
        (8, "4", "r: got '4'"),
        (0, 4, "alpha: got 0; a positive number"),
        ("8", 4, "alpha: got '8'"),
        (math.nan, 4, "alpha: got nan"),
    ],
)
def test_scaling_refuses_what_is_no_rank_or_no_alpha(alpha, r, words):
    with pytest.raises(ValueError, match=words):
        lora_scaling(alpha, r)


@pytest.mark.parametrize("scaling", [2.0, np.float64(2.0), np.float32(2.0), 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_delta_is_s_times_the_product_in_the_factors_dtype(xp, dtype, scaling):
    A, B = gaussian(2, 5, dtype=dtype), gaussian(4, 2, seed=1, dtype=dtype)
    delta = lora_delta(xp.asarray(A), xp.asarray(B), scaling)
    assert get_namespace(delta) is xp
    assert delta.dtype == dtype
    np.testing.assert_allclose(to_numpy(delta), 2.0 * B @ A, rtol=0, atol=20 * eps(dtype))


def test_the_scaling_of_a_numpy_alpha_does_not_turn_float32_into_float64():
    assert type(lora_scaling(np.float64(16), 4)) is float
    assert type(lora_scaling(np.float32(16), np.int64(4), rslora=True)) is float


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_delta_has_at_most_rank_r_and_few_parameters(out_features, in_features, data):
    r = data.draw(st.integers(1, min(out_features, in_features)))
    A, B = gaussian(r, in_features), gaussian(out_features, r, seed=1)
    assert rank.matrix_rank(lora_delta(A, B, 0.5)) <= r
    assert A.size + B.size == r * (in_features + out_features)


@pytest.mark.parametrize("dtype", [*FLOATS, "float16"])
def test_merge_adds_delta_and_keeps_the_weights_dtype(xp, dtype):
    wide = "float64" if dtype == "float64" else "float32"
    W, A, B = gaussian(6, 5, dtype=dtype), gaussian(2, 5, seed=1, dtype=wide), gaussian(6, 2, seed=2, dtype=wide)
    merged = merge_lora(xp.asarray(W), xp.asarray(A), xp.asarray(B), 0.5)
    assert merged.dtype == dtype
    expected = W.astype("float64") + 0.5 * B.astype("float64") @ A.astype("float64")
    # rounded once to the weight's dtype; in float16 the float32 sum before it adds nothing to ε/2 of about 4
    np.testing.assert_allclose(to_numpy(merged).astype("float64"), expected, rtol=eps(dtype), atol=4 * eps(dtype))


@given(st.integers(1, 8), st.integers(1, 8), st.data(), st.sampled_from(FLOATS))
def test_unmerging_gives_the_weight_back_to_rounding(out_features, in_features, data, dtype):
    r = data.draw(st.integers(1, min(out_features, in_features)))
    W = gaussian(out_features, in_features, dtype=dtype)
    A, B = gaussian(r, in_features, seed=1, dtype=dtype), gaussian(out_features, r, seed=2, dtype=dtype)
    back = unmerge_lora(merge_lora(W, A, B, 2.0), A, B, 2.0)
    largest = np.abs(lora_delta(A, B, 2.0)).max() + np.abs(W).max()
    np.testing.assert_allclose(back, W, rtol=0, atol=eps(dtype) * largest)  # two roundings of at most ε/2 each


def test_unmerging_is_not_bit_for_bit():
    W, A, B = gaussian(64, 64), gaussian(8, 64, seed=1), gaussian(64, 8, seed=2)
    assert (unmerge_lora(merge_lora(W, A, B, 2.0), A, B, 2.0) != W).any()


def test_merging_leaves_its_arguments_as_they_were():
    W, A, B = gaussian(3, 4), gaussian(2, 4), gaussian(3, 2)
    copies = W.copy(), A.copy(), B.copy()
    merge_lora(W, A, B, 1.0)
    unmerge_lora(W, A, B, 1.0)
    for array, copy in zip((W, A, B), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: lora_delta(gaussian(2, 5), gaussian(4, 3), 1.0), r"\(2, 5\) and \(4, 3\)"),
        (lambda: lora_delta(gaussian(2), gaussian(4, 2), 1.0), "A \\(r, in\\)"),
        (lambda: merge_lora(gaussian(5, 4), gaussian(2, 5), gaussian(4, 2), 1.0), r"W: got \(5, 4\)"),
        (lambda: merge_lora(gaussian(1, 5), gaussian(2, 5), gaussian(4, 2), 1.0), r"W: got \("),  # would broadcast
        (lambda: unmerge_lora(gaussian(5), gaussian(2, 5), gaussian(4, 2), 1.0), r"W: got \("),
        (lambda: lora_delta([[1.0]], gaussian(4, 1), 1.0), r"got list and \(4, 1\)"),
        (lambda: merge_lora([[1.0]], gaussian(2, 5), gaussian(4, 2), 1.0), "W: got list"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- start values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("init", INITS)
def test_every_init_has_the_shapes_and_dtype_asked_for(xp, init, dtype):
    W = xp.asarray(gaussian(6, 9, dtype=dtype))
    A, B = init_lora(6, 9, 4, init, rng=0, dtype=dtype, W=W, scaling=0.5)
    assert (A.shape, B.shape) == ((4, 9), (6, 4))
    assert A.dtype == B.dtype == dtype


def test_inits_take_the_default_dtype():
    assert init_lora(3, 3, 1, rng=0)[0].dtype == "float32"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_a_weight_take_its_dtype(init, dtype):
    W = gaussian(5, 7, dtype=dtype)
    A, B = init_lora(5, 7, 5, init, W=W)
    assert A.dtype == B.dtype == dtype
    np.testing.assert_allclose(B @ A, W, atol=100 * eps(dtype))  # at full rank: the whole W


def _p_value_of_normal(sample, sigma):
    from scipy.stats import kstest

    return kstest(sample.ravel() / sigma, "norm").pvalue


@pytest.mark.parametrize("r", [4, 64])
def test_gaussian_is_normal_with_deviation_one_over_r_and_zero_b(r):
    A, B = init_lora(80, 300, r, "gaussian", rng=0, dtype="float64")
    assert _p_value_of_normal(A, 1 / r) > 0.01  # seeded: passes always or never
    assert not B.any()


@pytest.mark.parametrize("r", [4, 64])
def test_gaussian_b_is_the_other_way_round(r):
    A, B = init_lora(300, 80, r, "gaussian_b", rng=0, dtype="float64")
    assert not A.any()
    assert _p_value_of_normal(B, 1 / r) > 0.01


def test_both_draws_two_independent_gaussians():
    A, B = init_lora(200, 200, 8, "both", rng=0, dtype="float64")
    assert _p_value_of_normal(A, 1 / 8) > 0.01
    assert _p_value_of_normal(B, 1 / 8) > 0.01
    assert abs(np.corrcoef(A.ravel(), B.T.ravel())[0, 1]) < 0.1  # four deviations of 1600 pairs


def test_kaiming_is_uniform_within_one_over_root_in_and_zero_b():
    from scipy.stats import kstest

    A, B = init_lora(80, 400, 16, "kaiming", rng=0, dtype="float64")
    bound = 400**-0.5
    assert np.abs(A).max() <= bound
    assert kstest((A.ravel() / bound + 1) / 2, "uniform").pvalue > 0.01
    assert not B.any()


@pytest.mark.parametrize("init", INITS)
def test_the_same_seed_gives_the_same_bits_and_float32_is_float64_rounded(init):
    W = gaussian(5, 7)
    first, again = (init_lora(5, 7, 3, init, rng=3, dtype="float64", W=W) for _ in range(2))
    single = init_lora(5, 7, 3, init, rng=3, dtype="float32", W=W)
    for a, b, c in zip(first, again, single, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a.astype("float32"), c)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_pissa_takes_the_best_rank_r_out_of_the_weight(xp, r, scaling):
    W = gaussian(5, 7)
    A, B = (to_numpy(f) for f in init_lora(5, 7, r, "pissa", dtype="float64", W=xp.asarray(W), scaling=scaling))
    # 100 ε: an SVD of a 5 × 7 matrix with entries of about 1, multiplied out again
    np.testing.assert_allclose(lora_delta(A, B, scaling), rank.best_rank_r(W, r), atol=100 * eps("float64"))
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), rtol=1e-12)  # √S to each
    residual = rank.singular_values(unmerge_lora(W, A, B, scaling))
    np.testing.assert_allclose(residual[: 5 - r], rank.singular_values(W)[r:], atol=100 * eps("float64"))


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 7), (7, 5), (4, 4)])
def test_olora_gives_orthonormal_columns_and_the_first_rows_of_r(xp, out_features, in_features):
    W = gaussian(out_features, in_features)
    A, B = (
        to_numpy(f)
        for f in init_lora(out_features, in_features, 3, "olora", dtype="float64", W=xp.asarray(W), scaling=0.5)
    )
    np.testing.assert_allclose(B.T @ B, np.eye(3), atol=100 * eps("float64"))
    np.testing.assert_allclose(A, B.T @ W, atol=100 * eps("float64"))  # R = Qᵀ W
    np.testing.assert_allclose(np.tril(A[:, :3], -1), 0, atol=100 * eps("float64"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_a_half_precision_weight_are_computed_in_float32(init):
    W = gaussian(5, 7, dtype="float16")
    A, B = init_lora(5, 7, 5, init, dtype="float32", W=W)
    assert A.dtype == B.dtype == "float32"
    np.testing.assert_allclose(B @ A, W.astype("float32"), atol=100 * eps("float32"))  # at full rank: the whole W


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((4, 6, 0), ValueError, r"r: got 0; .*\(4, 6\).*1 to 4 is accepted"),
        ((4, 6, -1), ValueError, "r: got -1"),
        ((4, 6, 5), ValueError, "rank at most 4"),
        ((4, 6, 2.0), TypeError, "r: expected an int"),
        ((4, 6, True), TypeError, "r: expected an int"),
        ((4, 6, 2, "xavier"), ValueError, "init: got 'xavier'; accepted are 'kaiming', 'gaussian'"),
        ((4, 6, 2, "pissa"), ValueError, r"W: init 'pissa' needs the weight \(4, 6\)"),
        ((4, 6, 2, "pissa", 0, None, [[1.0]]), ValueError, "got list"),
        ((4, 6, 2, "pissa", 0, None, np.ones((4, 6)), 0.0), ValueError, "scaling: got 0.0; a positive number"),
        ((4, 6, 2, "gaussian", "seed"), TypeError, "rng: expected"),
        ((4, 6, 2, "gaussian", 0, "int32"), TypeError, "dtype: got int32; float32"),
    ],
)
def test_init_refuses_what_it_cannot_make(arguments, error, words):
    with pytest.raises(error, match=words):
        init_lora(*arguments)


def test_init_refuses_a_weight_of_another_shape():
    with pytest.raises(ValueError, match=r"got \(6, 4\)"):
        init_lora(4, 6, 2, "olora", W=gaussian(6, 4))


# --- the fused operation ----------------------------------------------------------------------------------------------


@st.composite
def lora_operands(draw):
    """x, W, bias or None, A, B, each trained or frozen, for all shapes that a layer meets."""
    rows = draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3), (1, 1), (2, 1, 2)]))
    in_features, out_features = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    r = draw(st.integers(1, 3))
    trained = draw(st.lists(st.booleans(), min_size=5, max_size=5))
    shapes = [(*rows, in_features), (out_features, in_features), (out_features,), (r, in_features), (out_features, r)]
    tensors = [
        Tensor(gaussian(*shape, seed=i), requires_grad=flag)
        for i, (shape, flag) in enumerate(zip(shapes, trained, strict=True))
    ]
    if draw(st.booleans()):
        tensors[2] = None
    return tensors


def compose(x, W, bias, A, B, scaling):
    return ops.linear(x, W, bias) + ops.linear(ops.linear(x, A), B) * scaling


@given(lora_operands(), st.sampled_from([0.5, 2.0]))
def test_the_fused_operation_is_the_composition_of_simple_ones(operands, scaling):
    results = []
    for operation in (compose, lora_linear):
        y = operation(*operands, scaling)
        if y.requires_grad:
            y.backward(gaussian(*y.shape, seed=9))
        grads = [None if t is None or t.grad is None else t.grad for t in operands]
        results.append((y, grads))
        for t in operands:
            if t is not None:
                t.grad = None
    (expected, expected_grads), (found, found_grads) = results
    assert found.requires_grad == expected.requires_grad
    # 1e-13: sums of at most 5 products of numbers of about 1, in another order
    np.testing.assert_allclose(found.data, expected.data, atol=1e-13)
    for t, a, b in zip(operands, expected_grads, found_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert b.shape == t.shape
            np.testing.assert_allclose(b, a, atol=1e-13)


@given(lora_operands())
def test_the_fused_operation_passes_gradcheck(operands):
    given_bias = [t for t in operands if t is not None]
    if not any(t.requires_grad for t in given_bias):
        return

    def run(*tensors):
        x, W, *bias, A, B = tensors
        return lora_linear(x, W, bias[0] if bias else None, A, B, 0.7)

    assert gradcheck(run, given_bias)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_fused_operation_keeps_dtype_and_library(xp, dtype):
    x, W, bias, A, B = (
        Tensor(xp.asarray(gaussian(*shape, dtype=dtype)), requires_grad=True)
        for shape in [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)]
    )
    y = lora_linear(x, W, bias, A, B, 0.5)
    y.sum().backward()
    for array in (y.data, *(t.grad for t in (x, W, bias, A, B))):
        assert get_namespace(array) is xp
        assert array.dtype == dtype


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(3, 5), (5, 4), (2, 4), (5, 2)], "lora_linear: x \\(3, 5\\)"),
        ([(3, 4), (5, 4), (2, 3), (5, 2)], "A \\(r, in\\) \\(2, 3\\)"),
        ([(3, 4), (5, 4), (2, 4), (5, 3)], "B \\(out, r\\) \\(5, 3\\)"),
        ([(3, 4), (5, 4), (2, 4), (4, 2)], "B \\(out, r\\) \\(4, 2\\)"),
        ([(), (5, 4), (2, 4), (5, 2)], "lora_linear: x"),
    ],
)
def test_the_fused_operation_names_shapes_that_do_not_fit(shapes, words):
    x, W, A, B = (Tensor(gaussian(*shape)) for shape in shapes)
    with pytest.raises(ValueError, match=words):
        lora_linear(x, W, None, A, B, 1.0)


def test_the_scaling_as_a_numpy_number_keeps_float32():
    x, W, A, B = (Tensor(gaussian(*s, dtype="float32"), True) for s in [(3, 4), (5, 4), (2, 4), (5, 2)])
    y = lora_linear(x, W, None, A, B, np.float64(0.5))
    y.sum().backward()
    assert {y.dtype.name, x.grad.dtype.name, A.grad.dtype.name, B.grad.dtype.name} == {"float32"}


def test_the_fused_operation_refuses_mixed_dtypes():
    x, W, A, B = (Tensor(gaussian(*s)) for s in [(3, 4), (5, 4), (2, 4), (5, 2)])
    with pytest.raises(TypeError, match="do not mix"):
        lora_linear(x.astype("float32"), W, None, A, B, 1.0)


# --- what a frozen weight costs ---------------------------------------------------------------------------------------

N, IN, OUT, R = 10, 7, 5, 2


def fused(train_w=False, train_x=False):
    x = Tensor(gaussian(N, IN), requires_grad=train_x)
    W = Parameter(gaussian(OUT, IN), requires_grad=train_w)
    A, B = Parameter(gaussian(R, IN)), Parameter(gaussian(OUT, R))
    with backend.count_flops() as flops:
        lora_linear(x, W, None, A, B, 1.0).sum().backward()
    return flops, W


def test_forward_flops_are_those_of_the_base_and_the_two_factors():
    flops, _ = fused()
    assert flops.forward == 2 * N * IN * OUT + 2 * N * IN * R + 2 * N * R * OUT


@pytest.mark.parametrize("train_x", [False, True])
@pytest.mark.parametrize("train_w", [False, True])
def test_backward_flops_have_no_product_for_a_frozen_weight_or_input(train_w, train_x):
    flops, W = fused(train_w, train_x)
    adapter = 2 * N * OUT * R + 2 * N * R * IN + 2 * N * OUT * R  # v = gB, dA = vᵀx, dB = gᵀu
    dx = 2 * N * OUT * IN + 2 * N * R * IN
    assert flops.backward == adapter + train_x * dx + train_w * 2 * N * OUT * IN
    assert (W.grad is None) == (not train_w)


def test_a_frozen_weight_and_frozen_factors_keep_no_input_alive():
    x, W = Tensor(gaussian(N, IN), requires_grad=True), Tensor(gaussian(OUT, IN))
    A, B = Tensor(gaussian(R, IN)), Tensor(gaussian(OUT, R))
    inner = x * 2.0
    y = lora_linear(inner, W, None, A, B, 1.0)
    assert all(array is not inner.data and array.base is not inner.data for array in y._node.held.arrays)


# --- the layer --------------------------------------------------------------------------------------------------------


def layer(init, dtype="float64", dropout=0.0, r=3, alpha=6.0, **options):
    linear = Linear(IN, OUT, dtype=dtype, rng=0)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights=init, **options)
    method = config.build()
    wrapped = method.wrap("fc", linear)
    wrapped.active = ["default"]
    return wrapped


def randomize(wrapped, seed=5):
    rng = np.random.default_rng(seed)
    for p in (wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight):
        p.data = rng.standard_normal(p.shape).astype(p.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("init", [True, "kaiming", "gaussian", "gaussian_b"])
def test_a_layer_with_a_zero_factor_starts_as_its_base_bit_for_bit(xp, init, dtype):
    x = Tensor(xp.asarray(gaussian(N, IN, dtype=dtype)))
    base = Linear(IN, OUT, dtype=dtype, rng=0).to(xp)
    np.testing.assert_array_equal(to_numpy(layer(init, dtype).to(xp)(x).data), to_numpy(base(x).data))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("init", OFFSET_INITS)
def test_a_layer_with_two_nonzero_factors_starts_as_its_base_to_rounding(xp, init, dtype):
    x = Tensor(xp.asarray(gaussian(N, IN, dtype=dtype)))
    base, wrapped = Linear(IN, OUT, dtype=dtype, rng=0).to(xp), layer(init, dtype).to(xp)
    assert float(abs(wrapped.delta("default")).max()) > 0.01
    # 50 ε: 7 products of numbers of about 1, taken apart into W − sBA and sBA
    np.testing.assert_allclose(to_numpy(wrapped(x).data), to_numpy(base(x).data), rtol=0, atol=50 * eps(dtype))


def test_a_random_start_is_not_the_identity():
    x = Tensor(gaussian(N, IN))
    assert np.abs(layer(False)(x).data - Linear(IN, OUT, dtype="float64", rng=0)(x).data).max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_computes_the_formula(xp, rslora):
    wrapped = layer("gaussian", use_rslora=rslora)
    randomize(wrapped)
    W, bias = wrapped.base_layer.weight.data, wrapped.base_layer.bias.data
    A, B = wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data
    x = gaussian(2, N, IN)
    s = 6 / math.sqrt(3) if rslora else 2
    expected = x @ W.T + bias + s * (x @ A.T @ B.T)
    np.testing.assert_allclose(to_numpy(wrapped.to(xp)(Tensor(xp.asarray(x))).data), expected, atol=1e-13)


def test_dropout_acts_only_on_the_adapters_path_and_only_in_training():
    wrapped = layer("gaussian", dropout=0.5)
    randomize(wrapped)
    x = Tensor(np.ones((2000, IN)))
    base = wrapped.base_layer(x).data[0]
    full = wrapped.eval()(x).data[0]
    np.testing.assert_array_equal(wrapped(x).data, np.broadcast_to(full, (2000, OUT)))  # no randomness in eval
    dropped = wrapped.train()(x).data
    A, B = wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data
    # every row is base + s·B A m with a mask m of 0 and 2 = 1/(1 − p)
    codes = np.array([[2.0 * (i >> j & 1) for j in range(IN)] for i in range(2**IN)])  # all 128 masks
    possible = base + 2.0 * codes @ A.T @ B.T
    distance = np.abs(dropped[:, None, :] - possible[None]).max(axis=2).min(axis=1)
    np.testing.assert_allclose(distance, 0, atol=1e-12)
    assert len(np.unique(dropped.round(9), axis=0)) > 100  # of 128 masks, 2000 draws meet nearly all
    spread = dropped.std(axis=0) / math.sqrt(2000)
    assert (np.abs(dropped.mean(axis=0) - full) < 5 * spread).all()  # the mean is that without dropout


def test_dropout_and_its_gradient_see_the_same_mask():
    wrapped = layer("gaussian", dropout=0.5)
    randomize(wrapped)
    W, A, B = wrapped.weight.data, wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data
    wrapped.weight.requires_grad = wrapped.base_layer.bias.requires_grad = False
    x = Tensor(np.eye(IN), requires_grad=True)
    y = wrapped(x)
    y.backward(np.ones((IN, OUT)))
    mask = (y.data - wrapped.base_layer.bias.data - W.T) / (2.0 * (B @ A).T)  # row i: the mask of xᵢ's only element
    np.testing.assert_allclose(np.diag(x.grad), W.sum(0) + mask[:, 0] * 2.0 * (B @ A).sum(0), atol=1e-10)
    assert set(np.unique(mask.round(6))) == {0.0, 2.0}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_trained_layer_has_no_gradient_for_its_base(dropout):
    wrapped = layer("gaussian", dropout=dropout)
    wrapped.base_layer.requires_grad_(False)
    before = wrapped.weight.data.tobytes()
    wrapped(Tensor(gaussian(N, IN))).sum().backward()
    assert wrapped.weight.grad is None
    assert wrapped.lora_A["default"].weight.grad is not None
    assert wrapped.lora_B["default"].weight.grad is not None
    assert wrapped.weight.data.tobytes() == before


@pytest.mark.parametrize("init", [True, *INITS])
def test_moving_or_converting_a_layer_moves_all_that_it_computes_with(xp, init):
    x = gaussian(N, IN, dtype="float32")
    wrapped = layer(init, "float32")
    wrapped.active = []  # now an offset is given back in forward
    expected = wrapped(Tensor(x)).data
    np.testing.assert_array_equal(to_numpy(wrapped.to(xp)(Tensor(xp.asarray(x))).data), expected)
    double = wrapped.to("float64")(Tensor(xp.asarray(x.astype("float64"))))
    np.testing.assert_allclose(to_numpy(double.data), expected, atol=50 * eps("float32"))


def test_without_gradients_no_graph_is_built():
    with no_grad():
        assert not layer("gaussian")(Tensor(gaussian(N, IN))).requires_grad


@pytest.mark.parametrize("init", INITS)
def test_a_half_precision_base_gets_float32_factors(init):
    wrapped = layer(init, "float16")
    assert wrapped.lora_A["default"].weight.dtype == "float32"
    assert wrapped.weight.dtype == "float16"


def test_a_layer_says_what_it_has():
    assert repr(layer("gaussian")).startswith("LoraLinear(r={'default': 3}, scaling={'default': 2.0}")
    assert isinstance(layer("gaussian"), LoraLinear)


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r: got 0; an int of at least 1"),
        ({"r": -2}, "r: got -2"),
        ({"r": 2.5}, "r: got 2.5"),
        ({"r": "8"}, "r: got '8'"),
        ({"r": True}, "r: got True"),
        ({"rank_pattern": {"fc1": 0}}, r"rank_pattern\['fc1'\]: got 0"),
        ({"rank_pattern": ["fc1"]}, "rank_pattern: expected a dictionary"),
        ({"rank_pattern": {"fc(": 2}}, r"rank_pattern: 'fc\(' is no regular expression"),
        ({"alpha_pattern": {"*": 2}}, r"alpha_pattern: '\*' is no regular expression"),
        ({"alpha_pattern": {"fc1": 0}}, r"alpha_pattern\['fc1'\]: got 0"),
        ({"alpha_pattern": 3}, "alpha_pattern: expected a dictionary"),
        ({"lora_alpha": 0}, "lora_alpha: got 0; a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha: got '16'"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"lora_alpha": True}, "lora_alpha: got True"),
        ({"use_rslora": "yes"}, "use_rslora: got 'yes'; True and False are accepted"),
        ({"inference_mode": None}, "inference_mode: got None"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3'; accepted are 'LORA'"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha: got inf"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout: got -0.1"),
        ({"lora_dropout": None}, "lora_dropout: got None"),
        ({"bias": "some"}, "bias: got 'some'; accepted are 'none', 'all', 'lora_only'"),
        ({"init_lora_weights": "xavier"}, "init_lora_weights: got 'xavier'; accepted are True, False, 'kaiming'"),
        ({"init_lora_weights": None}, "init_lora_weights: got None"),
        ({"use_dora": "yes"}, "use_dora: got 'yes'"),
        ({"use_dora": True, "dora_magnitude": "row"}, "dora_magnitude: got 'row'; accepted are 'column', 'scalar'"),
        ({"use_dora": True, "dora_norm": "none"}, "dora_norm: got 'none'; accepted are 'constant', 'graph'"),
        ({"dora_norm": "graph"}, "without use_dora"),
        ({"target_modules": 5}, "target_modules: got 5"),
        ({"target_modules": [5]}, r"target_modules: got \[5\]"),
        ({"target_modules": []}, r"target_modules: got \[\]"),
        ({"modules_to_save": "head"}, "modules_to_save: got 'head'; a list of names"),
    ],
)
def test_a_config_names_the_argument_and_what_is_accepted(options, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**options)


def test_a_config_takes_numpys_numbers():
    import json

    config = LoraConfig(r=np.int64(4), lora_alpha=np.float32(8), rank_pattern={"fc1": np.int32(2)})
    assert json.loads(json.dumps(config.to_dict()))["r"] == 4
    assert config.rank_of("fc1") == 2


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ({"fc1": 2}, "fc1", 2),
        ({"fc1": 2}, "net.fc1", 2),
        ({"fc1": 2}, "netfc1", 8),
        ({"fc1": 2}, "fc10", 8),
        ({"net.fc1": 2}, "net.fc1", 2),
        ({"net.fc1": 2}, "other.fc1", 8),
        ({r"layers\.[01]\..*": 2}, "model.layers.0.q_proj", 2),
        ({r"layers\.[01]\..*": 2}, "model.layers.2.q_proj", 8),
        ({"fc2": 2, "fc.": 4}, "fc2", 2),
        ({"fc2": 2, "fc.": 4}, "fc1", 4),
        ({"^fc1": 2}, "fc1", 2),
    ],
)
def test_patterns_match_names_endings_and_regular_expressions_the_first_key_winning(pattern, name, expected):
    assert LoraConfig(r=8, rank_pattern=pattern).rank_of(name) == expected
    assert LoraConfig(lora_alpha=8, alpha_pattern=pattern).alpha_of(name) == expected
