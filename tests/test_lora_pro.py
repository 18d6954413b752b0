"""LoRA-Pro's formulas against least squares, and both variants in training."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import llama
from scipy.linalg import solve_sylvester

import minipeft
from minipeft import LoraConfig, LoraProConfig, Tensor, fit, get_peft_model, no_grad
from minipeft.backend import count_flops, to_numpy
from minipeft.data import digits
from minipeft.methods.lora_pro import adam_direction, equivalent_gradient, lora_pro_gradients
from minipeft.models import load_base
from minipeft.nn import Linear, ReLU, Sequential
from minipeft.optim import SGD, Adam, AdamW
from minipeft.peft import PeftModel
from minipeft.recipes import METHODS, Choice


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@st.composite
def problems(draw):
    """A, B, full training's gradient g, LoRA's own gA and gB, and s."""
    out, width = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    r, seed = draw(st.integers(1, min(out, width))), draw(st.integers(0, 99))
    s = draw(st.sampled_from([0.5, 1.0, 2.0, 16.0]))
    A, B, g = gaussian(r, width, seed=seed), gaussian(out, r, seed=seed + 100), gaussian(out, width, seed=seed + 200)
    return A, B, g, s * B.T @ g, s * g @ A.T, s


def lstsq_optimum(A, B, g, s):
    """The best s·(B gA + gB A), from the matrix of this linear map over all entries of gA and gB."""
    (r, width), out = A.shape, B.shape[0]
    columns = [s * np.outer(B[:, i], np.eye(width)[j]).ravel() for i in range(r) for j in range(width)]
    columns += [s * np.outer(np.eye(out)[i], A[j]).ravel() for i in range(out) for j in range(r)]
    M = np.array(columns).T
    return (M @ np.linalg.lstsq(M, g.ravel(), rcond=1e-10)[0]).reshape(out, width)


def projections(A, B):
    return np.linalg.pinv(A) @ A, B @ np.linalg.pinv(B)


def tolerance(A, B, rounding=1e-13):
    """Inverses of AAᵀ and BᵀB lose the square of the condition number."""
    return rounding * max(np.linalg.cond(A), np.linalg.cond(B)) ** 2 * 100


# --- what the closed form is ------------------------------------------------------------------------------------------


@given(problems())
def test_a_lora_step_is_full_training_with_the_equivalent_gradient_to_first_order(problem):
    A, B, _, gA, gB, s = problem
    moved = lambda lr: s * ((B - lr * gB) @ (A - lr * gA) - B @ A)  # noqa: E731
    lr = 1e-3
    np.testing.assert_allclose(
        moved(lr) + lr * equivalent_gradient(A, B, gA, gB, s), s * lr**2 * gB @ gA, atol=1e-9 * s**3
    )


@given(problems())
def test_the_equivalent_gradient_is_both_projections_of_the_full_one(problem):
    A, B, g, gA, gB, s = problem
    P_A, P_B = projections(A, B)
    best = equivalent_gradient(A, B, *lora_pro_gradients(A, B, gA, gB, s), s)
    np.testing.assert_allclose(best, P_B @ g + (g - P_B @ g) @ P_A, atol=tolerance(A, B))


@given(problems())
def test_the_closed_form_attains_the_least_squares_distance(problem):
    A, B, g, gA, gB, s = problem
    best = equivalent_gradient(A, B, *lora_pro_gradients(A, B, gA, gB, s), s)
    np.testing.assert_allclose(best, lstsq_optimum(A, B, g, s), atol=tolerance(A, B))


@given(problems())
def test_loras_own_gradients_are_never_nearer(problem):
    A, B, g, gA, gB, s = problem
    best = equivalent_gradient(A, B, *lora_pro_gradients(A, B, gA, gB, s), s)
    plain = equivalent_gradient(A, B, gA, gB, s)
    scale = np.vdot(plain, g) / np.vdot(plain, plain)  # the best step length for LoRA
    assert np.linalg.norm(best - g) <= np.linalg.norm(scale * plain - g) + tolerance(A, B)


@given(problems())
def test_the_equivalent_gradient_does_not_depend_on_x(problem):
    A, B, _, gA, gB, s = problem
    r = A.shape[0]
    values = [
        equivalent_gradient(A, B, *lora_pro_gradients(A, B, gA, gB, s, X), s)
        for X in ("sylvester", "zero", gaussian(r, r, seed=7))
    ]
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], atol=tolerance(A, B))


@given(problems())
def test_the_sylvester_x_is_scipys(problem):
    A, B, _, gA, gB, s = problem
    K, M = B.T @ B, A @ A.T
    X = solve_sylvester(K, M, -np.linalg.solve(K, gA) @ A.T / s**2)
    for ours, theirs in zip(lora_pro_gradients(A, B, gA, gB, s), lora_pro_gradients(A, B, gA, gB, s, X), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance(A, B) * max(1, np.abs(theirs).max()))


@given(problems(), st.integers(0, 9), st.floats(-1, 1))
def test_no_x_changes_the_gradients_less_than_sylvesters(problem, seed, size):
    A, B, _, gA, gB, s = problem
    r = A.shape[0]
    change = lambda pair: np.hypot(np.linalg.norm(pair[0] - gA), np.linalg.norm(pair[1] - gB))  # noqa: E731
    K, M = B.T @ B, A @ A.T
    X = solve_sylvester(K, M, -np.linalg.solve(K, gA) @ A.T / s**2)
    least = change(lora_pro_gradients(A, B, gA, gB, s, "sylvester"))
    for other in ("zero", X + size * gaussian(r, r, seed=seed), X + 1e-3 * gaussian(r, r, seed=seed)):
        assert least <= change(lora_pro_gradients(A, B, gA, gB, s, other)) * (1 + 1e-9)


@given(problems())
def test_the_step_is_one_of_descent(problem):
    """Theorem 2.2: dL = −η·⟨g, g̃⟩ ≤ 0; here ⟨g, g̃⟩ = ‖g̃‖², since g̃ is a projection of g."""
    A, B, g, gA, gB, s = problem
    best = equivalent_gradient(A, B, *lora_pro_gradients(A, B, gA, gB, s), s)
    assert np.vdot(g, best) == pytest.approx(np.vdot(best, best), rel=1e-6)


@given(problems())
def test_small_steps_lower_the_loss(problem):
    A, B, g, _, _, s = problem
    loss = lambda A, B: 0.5 * np.sum((s * B @ A - target) ** 2)  # noqa: E731  its gradient of W is s·BA − target
    target = s * B @ A - g
    gA, gB = lora_pro_gradients(A, B, s * B.T @ g, s * g @ A.T, s)
    lr = 1e-4 / max(1.0, np.linalg.norm(gA) * np.linalg.norm(gB))
    assert loss(A - lr * gA, B - lr * gB) < loss(A, B)


# --- where B or A has no full rank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("X", ["sylvester", "zero"])
def test_with_b_zero_a_keeps_its_gradient_and_b_gets_the_projection_on_as_rows(X):
    A, B, g, s = gaussian(3, 8), np.zeros((6, 3)), gaussian(6, 8, seed=1), 2.0
    given_A = gaussian(3, 8, seed=2)  # what comes in comes out, even where it is not the 0 that s·Bᵀg is
    gA, gB = lora_pro_gradients(A, B, given_A, s * g @ A.T, s, X)
    np.testing.assert_array_equal(gA, given_A)
    np.testing.assert_allclose(equivalent_gradient(A, B, gA, gB, s), g @ projections(A, B)[0], atol=1e-12)


def test_with_a_zero_b_keeps_its_gradient():
    A, B, g, s = np.zeros((3, 8)), gaussian(6, 3), gaussian(6, 8, seed=1), 2.0
    gA, gB = lora_pro_gradients(A, B, s * B.T @ g, s * g @ A.T, s)
    np.testing.assert_array_equal(gB, 0)
    np.testing.assert_allclose(equivalent_gradient(A, B, gA, gB, s), projections(A, B)[1] @ g, atol=1e-12)


def test_with_a_and_b_zero_nothing_moves():
    A, B = np.zeros((2, 4)), np.zeros((3, 2))
    for gradient in lora_pro_gradients(A, B, np.zeros((2, 4)), np.zeros((3, 2)), 1.0):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("singular", ["A", "B", "both"])
def test_without_full_rank_the_result_is_still_the_least_squares_optimum(singular):
    A, B, g, s = gaussian(3, 8), gaussian(6, 3, seed=1), gaussian(6, 8, seed=2), 0.5
    if singular != "B":
        A[2] = A[0] + A[1]
    if singular != "A":
        B[:, 2] = B[:, 0] - B[:, 1]
    best = equivalent_gradient(A, B, *lora_pro_gradients(A, B, s * B.T @ g, s * g @ A.T, s), s)
    np.testing.assert_allclose(best, lstsq_optimum(A, B, g, s), atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("small", [1e-2, 1e-5, 1e-9, 1e-15, 1e-30])
def test_nearly_singular_factors_give_bounded_gradients_that_descend(dtype, small):
    """A direction is inverted while λ > rtol·λ_max, so (BᵀB)⁺ is at most 1/(rtol·λ_max)."""
    A, B, g = gaussian(3, 8, dtype=dtype), gaussian(6, 3, seed=1, dtype=dtype), gaussian(6, 8, seed=2, dtype=dtype)
    A[2] = A[0] + small * A[2]
    B[:, 2] = B[:, 1] + small * B[:, 2]
    own_A, own_B = B.T @ g, g @ A.T
    gA, gB = lora_pro_gradients(A, B, own_A, own_B, 1.0)
    most = 1 / (30 * np.finfo(dtype).eps) / np.linalg.norm(A, 2) / np.linalg.norm(B, 2)
    assert gA.dtype == gB.dtype == dtype
    assert np.isfinite(gA).all()
    assert np.isfinite(gB).all()
    assert max(np.abs(gA).max(), np.abs(gB).max()) < 10 * most * np.linalg.norm(g)
    assert np.vdot(g, equivalent_gradient(A, B, gA, gB, 1.0)) > 0


def test_rtol_decides_which_directions_are_left_as_they_are():
    A, g, s = gaussian(2, 5), gaussian(4, 5, seed=1), 1.0
    B = np.linalg.qr(gaussian(4, 2, seed=2))[0] * [1.0, 1e-3]  # eigenvalues of BᵀB: 1 and 1e-6
    own = B.T @ g
    kept = lora_pro_gradients(A, B, own, g @ A.T, s, "zero", rtol=1e-7)[0]
    left = lora_pro_gradients(A, B, own, g @ A.T, s, "zero", rtol=1e-5)[0]
    np.testing.assert_allclose(kept, own / np.array([[1.0], [1e-6]]), rtol=1e-8)
    np.testing.assert_allclose(left, own, rtol=1e-8, atol=1e-12)


def test_no_matrix_of_the_weights_size_is_formed():
    A, B = gaussian(2, 2000), gaussian(2000, 2, seed=1)
    lora_pro_gradients(A, B, A, B, 1.0)  # imports and caches
    tracemalloc.start()
    lora_pro_gradients(A, B, A, B, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * A.nbytes  # W would be 1000 times A


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_and_dtype_gives_the_same(xp, dtype):
    A, B, g = gaussian(3, 8, dtype=dtype), gaussian(6, 3, seed=1, dtype=dtype), gaussian(6, 8, seed=2, dtype=dtype)
    arrays = [xp.asarray(a) for a in (A, B, B.T @ g, g @ A.T)]
    expected = lora_pro_gradients(*(a.astype("float64") for a in (A, B, B.T @ g, g @ A.T)), 1.0)
    for ours, wanted in zip(lora_pro_gradients(*arrays, 1.0), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(to_numpy(ours), wanted, atol=2e3 * np.finfo(dtype).eps)


def call(A=(2, 5), B=(4, 2), gA=(2, 5), gB=(4, 2), scaling=1.0, dtype="float64", **options):
    return lora_pro_gradients(*(gaussian(*shape, dtype=dtype) for shape in (A, B, gA, gB)), scaling, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"B": (4, 3)}, ValueError, r"\(2, 5\) and \(4, 3\)"),
        ({"A": (5,)}, ValueError, r"A \(r, in\)"),
        ({"gA": (2, 4)}, ValueError, r"gA: got \(2, 4\); the shape of A, \(2, 5\)"),
        ({"gB": (2, 4)}, ValueError, r"gB: got \(2, 4\)"),
        ({"scaling": 0.0}, ValueError, "scaling: got 0.0"),
        ({"scaling": float("nan")}, ValueError, "scaling: got nan"),
        ({"X": "symmetry"}, ValueError, "X: got 'symmetry'"),
        ({"X": gaussian(3, 3)}, ValueError, r"X: got \(3, 3\)"),
        ({"X": None}, ValueError, "X: got NoneType"),
        ({"rtol": 1.0}, ValueError, "rtol: got 1.0"),
        ({"dtype": "float16"}, TypeError, "float16; float32 and float64"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        call(**arguments)


def test_what_is_no_array_or_in_half_precision_is_named():
    A, B = gaussian(2, 5, dtype="float32"), gaussian(4, 2, dtype="float32")
    with pytest.raises(ValueError, match=r"A \(r, in\) and B \(out, r\): got list and \(4, 2\)"):
        equivalent_gradient([[1.0]], B, A, B, 1.0)
    with pytest.raises(ValueError, match="gB: got list"):
        equivalent_gradient(A, B, A, [[1.0]], 1.0)
    with pytest.raises(TypeError, match="B: got dtype float16"):
        lora_pro_gradients(A, B.astype("float16"), A, B, 1.0)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_an_X_of_another_dtype_does_not_change_the_factors(dtype):
    A, B = gaussian(2, 5, dtype="float32"), gaussian(4, 2, dtype="float32")
    X = np.array([[1, 2], [3, 4]])
    found = lora_pro_gradients(A, B, A, B, 1.0, X.astype(dtype))
    for ours, expected in zip(found, lora_pro_gradients(A, B, A, B, 1.0, X.astype("float32")), strict=True):
        assert ours.dtype == "float32"
        np.testing.assert_array_equal(ours, expected)


# --- the method in training -------------------------------------------------------------------------------------------

VARIANTS = ["plain", "full"]


def small_model(config, dtype="float64", seed=0):
    model = Sequential(Linear(6, 8, rng=1), ReLU(), Linear(8, 4, rng=2)).to(dtype)
    return get_peft_model(model, config, seed=seed)


def small_batch(number, dtype="float64"):
    rng = np.random.default_rng(number)
    return Tensor(rng.standard_normal((5, 6)).astype(dtype)), rng.integers(0, 4, 5)


def trained(model, optimizer, steps=4, **options):
    fit(model, small_batch, steps=steps, optimizer=optimizer, progress=False, **options)
    return {name: array.copy() for name, array in model.state_dict().items()}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("X", ["sylvester", "zero"])
def test_plain_hands_the_optimizer_the_adjusted_gradients(X):
    options = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
    lora, pro = (small_model(config) for config in (LoraConfig(**options), LoraProConfig(X=X, **options)))
    for model in (lora, pro):
        minipeft.ops.cross_entropy(model(small_batch(0)[0]), small_batch(0)[1]).backward()
    pro.method.before_step(pro, 0)
    for (_, plain), (_, layer) in zip(lora.adapter_layers(), pro.adapter_layers(), strict=True):
        A, B = plain.lora_A["default"].weight, plain.lora_B["default"].weight
        expected = lora_pro_gradients(A.data, B.data, A.grad, B.grad, 3.0, X)
        np.testing.assert_array_equal(layer.lora_A["default"].weight.grad, expected[0])
        np.testing.assert_array_equal(layer.lora_B["default"].weight.grad, expected[1])


def test_a_full_step_is_adams_direction_of_the_equivalent_gradient_turned_into_one_of_the_factors():
    """Two steps of the paper's algorithm written out, (out, in) matrices and all, beside fit with AdamW."""
    model = Sequential(Linear(6, 4, bias=False, rng=1)).to("float64")
    model = get_peft_model(
        model, LoraProConfig(r=2, lora_alpha=6, variant="full", target_modules=["0"], init_lora_weights=False)
    )
    _, layer = next(model.adapter_layers())
    A, B, W = (w.data.copy() for w in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.weight))
    s, lr, m, v = 3.0, 0.01, np.zeros((4, 6)), np.zeros((4, 6))
    for t in (1, 2):
        x, y = small_batch(t - 1)
        logits = x.data @ (W + s * B @ A).T
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        g = (share - np.eye(4)[y]).T @ x.data / 5
        P_A, P_B = projections(A, B)
        g = P_B @ g + (g - P_B @ g) @ P_A
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        d = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        dA, dB = lora_pro_gradients(A, B, s * B.T @ d, s * d @ A.T, s)
        shrink = np.sqrt(1 - lr * 0.1)
        A, B = shrink * A - lr * dA, shrink * B - lr * dB
    trained(model, AdamW(trainable(model), lr=lr, weight_decay=0.1), steps=2)
    np.testing.assert_allclose(layer.lora_A["default"].weight.data, A, atol=1e-9)
    np.testing.assert_allclose(layer.lora_B["default"].weight.data, B, atol=1e-9)


def test_adam_direction_is_the_optimizers():
    p, m, v = minipeft.nn.Parameter(np.zeros((3, 4))), np.zeros((3, 4)), np.zeros((3, 4))
    optimizer = Adam([p], lr=1.0)
    for t in (1, 2, 3):
        before, p.grad = p.data.copy(), gaussian(3, 4, seed=t)
        direction = adam_direction(m, v, p.grad.copy(), t, (0.9, 0.999), 1e-8)
        optimizer.step()
        np.testing.assert_allclose(p.data, before - direction, atol=1e-14)


def test_full_keeps_two_numbers_for_every_weight_and_the_optimizer_none_for_the_factors():
    model = small_model(LoraProConfig(r=2, variant="full"))
    optimizer = AdamW(trainable(model), lr=1e-3)
    trained(model, optimizer, steps=2)
    assert model.method.nbytes == 2 * 8 * sum(layer.weight.size for _, layer in model.adapter_layers())
    assert optimizer.nbytes == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_to_save_are_trained_by_the_optimizer_as_ever(variant):
    model = small_model(LoraProConfig(r=2, variant=variant, target_modules=["0"], modules_to_save=["2"]))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    after = trained(model, AdamW(trainable(model), lr=1e-2))
    changed = {name for name in after if (after[name] != before[name]).any()}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["mlp", "vit"])
def test_both_variants_learn_the_shifted_digits(base, variant):
    task = digits.transfer()
    model = get_peft_model(load_base(base), LoraProConfig(r=4, lora_alpha=8, variant=variant))
    batches = digits.batches(*task.train, batch_size=64)
    history = fit(model, batches, steps=25, optimizer=AdamW(trainable(model), lr=3e-3), progress=False)
    assert np.mean(history.loss[-3:]) < 0.6 * history.loss[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, variant, stop):
    config = LoraProConfig(r=2, lora_alpha=4, lora_dropout=0.2, variant=variant)
    whole, first, second = (small_model(config) for _ in range(3))
    expected = trained(whole, AdamW(trainable(whole), lr=0.01), steps=6)
    trained(first, AdamW(trainable(first), lr=0.01), steps=stop, checkpoint_dir=tmp_path)
    ended = trained(second, AdamW(trainable(second), lr=0.01), steps=6, checkpoint_dir=tmp_path, resume=True)
    for name, array in expected.items():
        np.testing.assert_array_equal(ended[name], array)


def test_a_checkpoint_of_the_other_variant_is_refused(tmp_path):
    first, second = (small_model(LoraProConfig(r=2, variant=variant)) for variant in ("full", "plain"))
    trained(first, AdamW(trainable(first), lr=0.01), steps=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="method state: LoraPro has none"):
        trained(second, AdamW(trainable(second), lr=0.01), steps=2, checkpoint_dir=tmp_path, resume=True)
    trained(second, AdamW(trainable(second), lr=0.01), steps=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="method state: got"):
        trained(first, AdamW(trainable(first), lr=0.01), steps=2, checkpoint_dir=tmp_path, resume=True)


def test_a_new_optimizer_starts_with_new_moments_and_the_same_one_goes_on():
    model = small_model(LoraProConfig(r=2, variant="full"))
    optimizer = AdamW(trainable(model), lr=0.01)
    trained(model, optimizer, steps=2)
    trained(model, optimizer, steps=1)
    assert model.method.steps == 3
    trained(model, AdamW(trainable(model), lr=0.01), steps=1)
    assert model.method.steps == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_is_an_ordinary_lora_and_merging_keeps_the_outputs(tmp_path, variant):
    config = LoraProConfig(r=2, lora_alpha=4, variant=variant)
    model = small_model(config)
    trained(model, AdamW(trainable(model), lr=0.01))
    model.eval().save_pretrained(tmp_path)
    fresh = Sequential(Linear(6, 8, rng=1), ReLU(), Linear(8, 4, rng=2)).to("float64")
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    x = small_batch(9)[0]
    with no_grad():
        expected = model(x).data
        np.testing.assert_array_equal(loaded(x).data, expected)
        np.testing.assert_allclose(model.merge_and_unload()(x).data, expected, atol=1e-13)
    assert type(loaded.peft_config["default"]) is LoraConfig


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_language_model_trains_merges_saves_and_loads(variant, tmp_path):
    ids = np.random.default_rng(0).integers(0, 61, (3, 10))
    before = llama()(ids).data
    model = get_peft_model(llama(), LoraProConfig(r=2, lora_alpha=4, variant=variant))
    optimizer, loss_fn = AdamW(trainable(model), lr=0.01), lambda model, batch: model.loss(batch)
    history = fit(model, [ids], steps=8, optimizer=optimizer, loss_fn=loss_fn, progress=False)
    assert history.loss[-1] < history.loss[0]
    expected = model.eval()(ids).data
    assert np.abs(expected - before).max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    np.testing.assert_array_equal(loaded(ids).data, expected)
    # 1e-11: logits of about 5, through two blocks and their norms
    np.testing.assert_allclose(loaded.merge_and_unload()(ids).data, expected, atol=1e-11)


def test_the_saved_config_is_the_one_that_lora_saves():
    assert LoraProConfig(r=2, variant="full", X="zero").to_dict() == LoraConfig(r=2).to_dict()


def test_minipeft_train_knows_both_variants():
    config = METHODS["lora-pro"].config(Choice(4, 8.0))
    assert config == LoraProConfig(r=4, lora_alpha=8.0)
    assert METHODS["lora-pro-full"].config(Choice(4, 8.0)) == LoraProConfig(r=4, lora_alpha=8.0, variant="full")


def test_only_the_active_adapters_gradients_change():
    model = small_model(LoraProConfig(r=2, init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("other")
    minipeft.ops.cross_entropy(model(small_batch(0)[0]), small_batch(0)[1]).backward()
    before = [p.grad.copy() for p in trainable(model)]
    model.methods["default"].before_step(model, 0)
    for p, grad in zip(trainable(model), before, strict=True):
        np.testing.assert_array_equal(p.grad, grad)


def test_the_adjustments_products_are_counted_under_their_own_name():
    model = small_model(LoraProConfig(r=2, init_lora_weights=False))
    minipeft.ops.cross_entropy(model(small_batch(0)[0]), small_batch(0)[1]).backward()
    with count_flops() as flops:
        model.method.before_step(model, 0)
    assert list(flops.counts["forward"]) == ["lora_pro"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda params: SGD(params, lr=0.1), "got SGD; a plain AdamW"),
        (lambda params: AdamW(params, amsgrad=True), "with amsgrad or maximize"),
        (lambda params: Adam(params, weight_decay=0.1), "Adam's weight_decay"),
    ],
)
def test_full_refuses_an_optimizer_whose_rule_it_is_not(make, words):
    model = small_model(LoraProConfig(r=2, variant="full"))
    with pytest.raises(ValueError, match=words):
        trained(model, make(trainable(model)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "adam"}, "variant: got 'adam'; accepted are 'plain', 'full'"),
        ({"X": "symmetry"}, "X: got 'symmetry'"),
        ({"rtol": 2}, "rtol: got 2"),
        ({"rtol": "small"}, "rtol: got 'small'"),
        ({"init_lora_weights": "loftq"}, "LoraProConfig has no 'loftq'; LoraConfig has it"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 0}, "r: got 0"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LoraProConfig(**options)
