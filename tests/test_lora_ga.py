"""LoRA-GA: start values from the full gradient, found a few layers at a time; and the adapter's life after that."""

import io
import itertools
import json
import sys

import numpy as np
import peft_references
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import llama
from rich.console import Console
from rich.progress import Progress

from minipeft import (
    LoraConfig,
    LoraGAConfig,
    LoraProConfig,
    Tensor,
    fit,
    get_peft_model,
    load_model,
    nn,
    no_grad,
    ops,
    quant,
    save_model,
)
from minipeft.backend import to_numpy
from minipeft.data import digits
from minipeft.measure import peak_memory
from minipeft.methods import lora_ga
from minipeft.methods.lora import init_lora
from minipeft.methods.lora_ga import (
    DIRECTIONS,
    SCALES,
    alignment_bound,
    gradient_alignment,
    leading_singular_vectors,
    lora_ga_init,
    weight_gradients,
)
from minipeft.models import load_base
from minipeft.optim import SGD, AdamW
from minipeft.peft import PeftModel
from minipeft.rank import best_rank_r
from minipeft.recipes import METHODS, Choice, prepared
from minipeft.train import classification_loss

PLAIN = [scale for scale in SCALES if scale not in ("weight_svd", "paper")]


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@st.composite
def gradients(draw):
    """G (out, in), an r with 2r ≤ min(out, in), s."""
    out, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    r = draw(st.integers(1, min(out, width) // 2))
    return gaussian(out, width, seed=draw(st.integers(0, 99))), r, draw(st.sampled_from([0.5, 1.0, 2.0]))


# --- the formulas -----------------------------------------------------------------------------------------------------


@given(gradients(), st.sampled_from(DIRECTIONS[:3]))
def test_directions_share_out_the_first_2r_singular_vectors(problem, direction):
    G, r, s = problem
    A, B = lora_ga_init(G, r, scaling=s, direction=direction, scale="unit")
    numbers = {
        "ArBr": (range(0, 2 * r, 2), range(1, 2 * r, 2)),
        "A2rBr": (range(r), range(r, 2 * r)),
        "ArB2r": (range(r, 2 * r), range(r)),
    }
    in_B, in_A = (list(n) for n in numbers[direction])
    # from eigenvectors of G Gᵀ and Gᵀ G, which share no code with the SVD; projections have no sign
    left, right = np.linalg.eigh(G @ G.T)[1][:, ::-1], np.linalg.eigh(G.T @ G)[1][:, ::-1]
    S = np.sqrt(np.linalg.eigvalsh(G @ G.T)[::-1][in_B])
    for column, length, i in zip(B.T, S, in_B, strict=True):
        np.testing.assert_allclose(np.outer(column, column), length**2 * np.outer(left[:, i], left[:, i]), atol=1e-7)
    for row, j in zip(A, in_A, strict=True):
        np.testing.assert_allclose(np.outer(row, row), np.outer(right[:, j], right[:, j]), atol=1e-7)


@given(gradients())
def test_a_random_direction_takes_the_same_r_for_both_factors(problem):
    G, r, s = problem
    A, B = lora_ga_init(G, r, scaling=s, direction="random", scale="unit", rng=3)
    terms = B @ A  # each vᵢ meets its own uᵢ: the sum of r of G's first 2r terms S_i·u_i v_iᵀ
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1)
    np.testing.assert_allclose(terms @ G.T @ terms, terms @ terms.T @ terms, atol=1e-9 * np.linalg.norm(G) ** 3)
    assert {*np.linalg.svd(terms)[1][:r].round(8)} <= {*np.linalg.svd(G)[1][: 2 * r].round(8)}
    again = lora_ga_init(G, r, scaling=s, direction="random", scale="unit", rng=3)
    np.testing.assert_array_equal(again[0], A)


@given(gradients(), st.sampled_from(DIRECTIONS), st.sampled_from([1.0, 16.0, 64.0]))
def test_scales_are_multiples_of_unit(problem, direction, gamma):
    G, r, s = problem
    W = gaussian(*G.shape, seed=500)
    A, B = lora_ga_init(G, r, scaling=s, direction=direction, scale="unit", rng=1)
    S_B, size = np.linalg.norm(B, axis=0), len(G) ** 0.25 / gamma**0.5
    expected = {
        "unit": (A, B),
        "stable": (A, B * size),
        "gd_scale": (A / s, B / s),
        "weight_svd": (A, B * np.linalg.svd(W)[1][0] / S_B[0]),
        "paper": (A * size, B / S_B * size),
    }
    assert set(expected) == set(SCALES)
    for scale, pair in expected.items():
        found = lora_ga_init(G, r, scaling=s, gamma=gamma, direction=direction, scale=scale, W=W, rng=1)
        for ours, theirs in zip(found, pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@given(gradients(), st.sampled_from(["ArBr", "A2rBr", "ArB2r"]))
def test_the_papers_first_update_is_the_best_of_rank_2r(problem, direction):
    """Theorem 3.1."""
    G, r, s = problem
    A, B = lora_ga_init(G, r, scaling=s, direction=direction, scale="paper")
    D = s**2 * (B @ B.T @ G + G @ A.T @ A)
    length = s**2 * len(G) ** 0.5 / 16
    np.testing.assert_allclose(D, length * best_rank_r(G, 2 * r), atol=1e-9)
    assert gradient_alignment(G, A, B, s) == pytest.approx(alignment_bound(G, r), abs=1e-9)


@given(gradients(), st.integers(0, 99), st.sampled_from(["both", "gaussian"]))
def test_no_factors_are_aligned_better_than_the_bound(problem, seed, init):
    G, r, s = problem
    A, B = init_lora(*G.shape, r, init, seed, "float64")
    assert 0 < gradient_alignment(G, A, B, s) <= alignment_bound(G, r) + 1e-12


@given(gradients(), st.sampled_from(DIRECTIONS), st.sampled_from(PLAIN))
def test_pefts_scales_are_aligned_at_most_as_well(problem, direction, scale):
    G, r, s = problem
    A, B = lora_ga_init(G, r, scaling=s, direction=direction, scale=scale, rng=0)
    assert 0 < gradient_alignment(G, A, B, s) <= alignment_bound(G, r) + 1e-12


@given(gradients())
def test_the_alignment_is_that_of_gradient_descents_first_step(problem):
    """A and B moved by η against the gradients that backward gives, for a loss whose gradient of W is G."""
    G, r, s = problem
    A, B = (Tensor(a, requires_grad=True) for a in init_lora(*G.shape, r, "both", 5, "float64"))
    (ops.matmul(B, A) * s * G).sum().backward()
    lr = 1e-7
    moved = s * ((B.data - lr * B.grad) @ (A.data - lr * A.grad) - B.data @ A.data)
    cosine = -(moved * G).sum() / np.linalg.norm(moved) / np.linalg.norm(G)
    assert gradient_alignment(G, A.data, B.data, s) == pytest.approx(cosine, abs=1e-5)


def test_alignment_is_zero_where_nothing_moves():
    G, A, B = gaussian(4, 6), np.zeros((2, 6)), np.zeros((4, 2))
    assert gradient_alignment(G, A, B, 1.0) == 0
    assert gradient_alignment(0 * G, gaussian(2, 6), B, 1.0) == 0


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_alignment_does_not_depend_on_the_gradients_size(size):
    """Its squares leave float32's range, which would make the cosine 0 or the bound NaN."""
    G = gaussian(6, 8)
    small = (size * G).astype("float32")
    A, B = lora_ga_init(small, 2, scaling=1.0, scale="paper")
    assert gradient_alignment(small, A, B, 1.0) == pytest.approx(alignment_bound(G, 2), rel=1e-6)
    assert alignment_bound(small, 2) == pytest.approx(alignment_bound(G, 2), rel=1e-6)


def test_the_bound_of_a_gradient_of_zero_is_one():
    assert alignment_bound(np.zeros((4, 6), "float32"), 1) == 1


def test_a_gradient_of_zero_gives_a_start_that_changes_nothing():
    for scale in SCALES[:-1]:
        A, B = lora_ga_init(np.zeros((6, 8)), 2, scaling=1.0, scale=scale, W=np.ones((6, 8)))
        assert np.isfinite(A).all()
        assert not B.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_formulas_run_on_every_array_library_and_keep_dtypes(xp, direction, scale, dtype):
    G, W = gaussian(6, 9, dtype=dtype), gaussian(6, 9, seed=1, dtype=dtype)
    expected = lora_ga_init(G, 2, scaling=2.0, direction=direction, scale=scale, W=W, rng=0)
    found = lora_ga_init(xp.asarray(G), 2, scaling=2.0, direction=direction, scale=scale, W=xp.asarray(W), rng=0)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, type(xp.asarray(G)))
        assert (ours.dtype, ours.base) == (dtype, None)
        np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-3 if dtype == "float16" else 1e-5)
    if dtype != "float16":
        G = xp.asarray(G)
        assert gradient_alignment(G, *found, 2.0) == pytest.approx(gradient_alignment(to_numpy(G), *expected, 2.0))
        assert alignment_bound(G, 2) == pytest.approx(alignment_bound(to_numpy(G), 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"G": np.ones(3)}, r"^G: expected a matrix of floats \(out, in\), got \(3,\)"),
        ({"G": np.ones((4, 4), int)}, "^G: expected a matrix of floats"),
        ({"G": [[1.0]]}, "^G: expected a matrix of floats"),
        ({"G": np.ones((4, 4), int)}, "got dtype int64"),
        ({"scaling": "1"}, "^scaling: got '1'"),
        ({"G": np.full((4, 4), np.nan)}, "^G: it has numbers that are not finite"),
        ({"r": 0}, r"^r: got 0; .* \(6, 8\), so 1 to 3 is accepted"),
        ({"r": 4}, "^r: got 4"),
        ({"G": np.ones((1, 4)), "r": 1}, "^r: got 1; .* so no r is accepted"),
        ({"scaling": 0.0}, "^scaling: got 0.0; a positive"),
        ({"gamma": -1}, "^gamma: got -1"),
        ({"direction": "ArB"}, "^direction: got 'ArB'; accepted are 'ArBr', 'A2rBr', 'ArB2r', 'random'"),
        ({"scale": "big"}, "^scale: got 'big'; accepted are 'stable', 'weight_svd', 'gd_scale', 'unit', 'paper'"),
        ({"scale": "weight_svd"}, r"^W: scale 'weight_svd' needs the weight \(6, 8\), got NoneType"),
        ({"scale": "weight_svd", "W": np.ones((8, 6))}, r"^W: .* got \(8, 6\)"),
    ],
)
def test_the_formula_says_what_it_does_not_take(change, words):
    given = {"G": gaussian(6, 8), "r": 2, "scaling": 1.0} | change
    with pytest.raises(ValueError, match=words):
        lora_ga_init(given.pop("G"), given.pop("r"), **given)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize("decay", [0.5, 2, 4])  # S_8/S_1 of 0.35, 0.016 and 2e-4
def test_the_leading_singular_vectors_are_the_svds_to_float32s_rounding(xp, shape, decay):
    k, n = 8, min(shape)
    U, V = (np.linalg.qr(gaussian(size, n, seed=size))[0] for size in shape)
    G = ((U * np.arange(1.0, n + 1) ** -decay) @ V.T).astype("float32")
    U, S, Vt = np.linalg.svd(G.astype("float64"), full_matrices=False)
    found = [to_numpy(a) for a in leading_singular_vectors(xp.asarray(G), k)]
    signs = np.sign((found[0] * U[:, :k]).sum(0))
    assert [a.dtype for a in found] == ["float32"] * 3
    np.testing.assert_allclose(found[1], S[:k], rtol=2e-7)
    np.testing.assert_allclose(found[0] * signs, U[:, :k], rtol=0, atol=1e-7)
    np.testing.assert_allclose(found[2] * signs[:, None], Vt[:k], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [0, 3, 40])
def test_singular_vectors_are_orthonormal_where_squares_have_too_few_digits(monkeypatch, dtype, rank):
    """A matrix of lower rank than is asked for, and one in float64: both are left to the SVD."""
    taken, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **options: taken.append(a) or svd(*a, **options))
    G = (gaussian(40, rank) @ gaussian(rank, 64)).astype(dtype)
    U, S, Vt = leading_singular_vectors(G, 8)
    np.testing.assert_allclose(U.T @ U, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(S, svd(G)[1][:8], rtol=1e-6, atol=1e-5)
    assert bool(taken) == (dtype == "float64" or rank < 8)


def test_other_formulas_say_what_they_do_not_take():
    with pytest.raises(TypeError, match=r"^r: expected an int, got float"):
        lora_ga_init(gaussian(6, 8), 2.0, scaling=1.0)
    with pytest.raises(ValueError, match=r"^G \(out, in\), A \(r, in\), B \(out, r\): got"):
        gradient_alignment(gaussian(6, 8), gaussian(2, 6), gaussian(8, 2), 1.0)
    with pytest.raises(ValueError, match=r"^A \(r, in\) and B \(out, r\): got list and"):
        gradient_alignment(gaussian(6, 8), [[1.0]], gaussian(8, 2), 1.0)
    with pytest.raises(ValueError, match=r"^r: got 4"):
        alignment_bound(gaussian(6, 8), 4)
    with pytest.raises(ValueError, match=r"^G: expected a matrix of floats \(out, in\), got \(6,\)"):
        alignment_bound(gaussian(6), 1)
    with pytest.raises(ValueError, match=r"^k: got 7; 1 to 6 is accepted for a matrix \(6, 8\)"):
        leading_singular_vectors(gaussian(6, 8), 7)


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "paper"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_start_values_are_those_that_peft_gave(direction, scale):
    """By peft_references. 1e-4: PEFT's SVD is a randomized one in float32; a pair's sign is free."""
    G, W = peft_references.lora_ga_problem()
    options = peft_references.LORA_GA
    found = lora_ga_init(
        G, options["r"], scaling=options["scaling"], gamma=options["gamma"], direction=direction, scale=scale, W=W
    )
    with np.load(peft_references.LORA_GA_REFERENCE, allow_pickle=False) as kept:
        A, B = (kept[f"{direction}.{scale}.{name}"] for name in "AB")
    for rows, expected in ((found[0], A), (found[1].T, B.T)):
        for row, other in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row * np.sign(row @ other), other, rtol=0, atol=1e-4 * np.linalg.norm(other))


# --- gradients, a few layers at a time --------------------------------------------------------------------------------


class Deep(nn.Module):
    """Eight layers of one width, with dropout between."""

    output_head = "head"

    def __init__(self, width=8, depth=8, dtype="float64"):
        self.layers = [nn.Linear(width, width, rng=i, dtype=dtype) for i in range(depth)]
        self.dropout, self.head = nn.Dropout(0.5, rng=0), nn.Linear(width, 3, rng=99, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = self.dropout(ops.tanh(layer(x)))
        return self.head(x)


NAMES = [f"layers.{i}" for i in range(8)]


def batches(count=3, width=8, n=5, dtype="float64"):
    return [(gaussian(n, width, seed=i, dtype=dtype), np.arange(n) % 3) for i in range(count)]


def direct(model, data):
    """All gradients at once."""
    model.eval().requires_grad_(True)
    for batch in data:
        (classification_loss(model, batch) * (1 / len(data))).backward()
    found = {name: model.get_submodule(name).weight.grad for name in NAMES}
    model.zero_grad()
    return found


@pytest.mark.parametrize("budget", [None, 1, 8 * 8 * 8, 3 * 8 * 8 * 8, 10**9])
def test_gradients_are_those_of_one_pass_whatever_the_budget(budget):
    model, data = Deep(), batches()
    expected = direct(model, data)
    found = dict(weight_gradients(model, NAMES, data, classification_loss, budget))
    assert list(found) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.fixture
def live(monkeypatch):
    """The bytes of all gradients of leaves, looked at whenever one is made or grows: a list."""
    leaves, seen, accumulate = {}, [], Tensor._accumulate

    def watched(self, grad, owned):
        accumulate(self, grad, owned)
        leaves[id(self)] = self
        seen.append(sum(leaf.grad.nbytes for leaf in leaves.values() if leaf.grad is not None))

    monkeypatch.setattr(Tensor, "_accumulate", watched)
    return seen


LAYER = 8 * 8 * 8  # bytes of one gradient


@pytest.mark.parametrize(
    ("budget", "most", "passes"), [(None, 1, 8), (1, 1, 8), (2 * LAYER, 2, 4), (3.9 * LAYER, 3, 3), (10**9, 8, 1)]
)
def test_gradients_that_live_at_one_time_keep_to_the_budget(live, budget, most, passes):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return classification_loss(model, batch)

    for _ in weight_gradients(Deep(), NAMES, batches(), loss_fn, budget):
        pass
    assert max(live) == most * LAYER
    assert len(calls) == 3 * passes


def test_preparing_a_model_never_holds_all_gradients(live):
    """By the gradients themselves, and by all that is allocated: far below one copy of the weights."""
    width, depth = 96, 12
    model, whole = Deep(width, depth, "float32"), 4 * depth * width**2
    config = LoraConfig(r=2, init_lora_weights="lora_ga")
    with peak_memory() as peak:
        get_peft_model(model, config, batches(2, width, dtype="float32"), classification_loss)
    assert max(live) <= whole / 8 + 4 * width**2
    # twelve new W less s·B A (which stay) beside a group's gradients, one SVD and its workspace
    assert peak.bytes < whole + 0.5 * whole
    assert peak.bytes - whole < whole * 0.5


def test_late_layers_need_no_graph_below_them():
    needed = []

    def loss_fn(model, batch):
        h = model(batch[0])
        needed.append([p.requires_grad for p in model.parameters()].count(True))
        return ops.cross_entropy(h, batch[1])

    list(weight_gradients(Deep(), NAMES, batches(1), loss_fn, 1))
    assert needed == [1] * 8


@pytest.mark.parametrize("stop", ["end", "error", "close"])
def test_the_model_is_as_before_afterwards(stop):
    model = get_peft_model(Deep(), LoraConfig(r=2, init_lora_weights=False, bias="all")).train()
    base = model.get_base_model()
    model.get_submodule("base_model.model.layers.3.base_layer").weight.grad = kept = np.ones((8, 8))
    state = lambda: (  # noqa: E731
        [(m.training, getattr(m, "disabled", None)) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.tobytes(), p.data.tobytes()) for p in model.parameters()],
    )
    before = state()
    walk = weight_gradients(base, NAMES, batches(1), classification_loss)
    next(walk)
    assert not any(m.training for m in base.modules())
    if stop == "end":
        list(walk)
    elif stop == "close":
        walk.close()
    else:
        with pytest.raises(RuntimeError, match="mine"):
            walk.throw(RuntimeError("mine"))
    assert state() == before
    assert model.get_submodule("base_model.model.layers.3.base_layer").weight.grad is kept


def test_gradients_are_the_bases_where_adapters_are_active():
    expected = direct(Deep(), batches())
    model = get_peft_model(Deep(), LoraConfig(r=2, init_lora_weights=False))
    found = dict(weight_gradients(model.get_base_model(), NAMES, batches(), classification_loss))
    for name in NAMES:
        np.testing.assert_array_equal(found[name], expected[name])


def test_gradients_are_made_under_no_grad_too():
    with no_grad():
        assert len(list(weight_gradients(Deep(), NAMES, batches(), classification_loss))) == 8


# --- attaching --------------------------------------------------------------------------------------------------------


def config(**options):
    chosen = options.pop("chosen", {})
    return LoraConfig(**{"r": 4, "lora_alpha": 8} | options, init_lora_weights="lora_ga", lora_ga_config=chosen)


def task_batches(dtype=None):
    task = digits.transfer(dtype=dtype)
    return task, digits.batches(*task.train, batch_size=32)


IDS = np.random.default_rng(1).integers(0, 61, (4, 3, 10))


def adapted(kind, **options):
    """A PeftModel, an input, what the base gave for it, its batches and loss."""
    if kind == "llama":
        model, x, data, loss_fn = llama(), IDS[0], list(IDS), lambda m, ids: m.loss(ids)
    else:
        task, data = task_batches()
        model, x, loss_fn = load_base(kind), task.test.x[:50], classification_loss
    expected = model.eval()(x).data
    return get_peft_model(model, config(**options), data, loss_fn, seed=0), x, expected, data, loss_fn


def near(found, expected, tolerance):
    assert float(abs(found - expected).max()) <= tolerance * float(abs(expected).max())


KINDS = {"mlp": 5e-6, "vit": 1e-5, "llama": 1e-12}  # float32, float32, float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_outputs_are_unchanged_at_the_start(kind, scale):
    model, x, expected, *_ = adapted(kind, chosen={"scale": scale, "gradient_batches": 1})
    near(model(x).data, expected, KINDS[kind])
    layers = [layer for _, layer in model.adapter_layers()]
    assert all(np.abs(layer.delta("default")).max() > 1e-5 for layer in layers)
    with model.disable_adapter():
        near(model(x).data, expected, KINDS[kind])


def test_factors_are_the_formulas_of_the_mean_gradient():
    model, data = Deep(), batches(3)
    expected = direct(Deep(), data)
    before = {name: model.get_submodule(name).weight.data for name in NAMES}
    options = {"rank_pattern": {"layers.1": 2}, "alpha_pattern": {"layers.2": 3}, "use_rslora": True}
    chosen = {"direction": "ArBr", "scale": "gd_scale", "stable_gamma": 4}
    model = get_peft_model(model, config(chosen=chosen, **options), data, classification_loss)
    for name, layer in model.adapter_layers():
        r, alpha = (2 if name == "layers.1" else 4), (3 if name == "layers.2" else 8)
        s = alpha / r**0.5
        A, B = lora_ga_init(expected[name], r, scaling=s, gamma=4, direction="ArBr", scale="gd_scale")
        assert layer.scaling["default"] == s
        np.testing.assert_array_equal(layer.lora_A["default"].weight.data, A)
        np.testing.assert_array_equal(layer.lora_B["default"].weight.data, B)
        np.testing.assert_allclose(layer.weight.data, before[name] - s * B @ A, atol=1e-14)


def test_the_first_batches_are_taken_from_whatever_gives_them():
    data = batches(5)
    endless = type("Endless", (), {"__getitem__": lambda self, i: data[i % 5]})()
    kinds = [data[:2], iter(data), endless, lambda i: data[i], (batch for batch in itertools.cycle(data))]
    factors = []
    for kind in kinds:
        model = get_peft_model(Deep(), config(chosen={"gradient_batches": 2}), kind, classification_loss)
        factors.append([p.data.tobytes() for p in model.parameters() if p.requires_grad])
    assert all(found == factors[0] for found in factors)
    few = get_peft_model(Deep(), config(chosen={"gradient_batches": 7}), data[:2], classification_loss)
    assert [p.data.tobytes() for p in few.parameters() if p.requires_grad] == factors[0]


def test_the_same_seed_gives_the_same_bits_and_random_directions_follow_the_seed():
    factors = []
    for seed in (0, 0, 1):
        model = get_peft_model(
            Deep(), config(r=2, chosen={"direction": "random"}), batches(), classification_loss, seed=seed
        )
        factors.append(b"".join(p.data.tobytes() for p in model.parameters() if p.requires_grad))
    assert factors[0] == factors[1] != factors[2]


def test_a_half_precision_base_gets_float32_factors():
    model = Deep(dtype="float16")
    before = [layer.weight.data for layer in model.layers]
    data = [(x.astype("float16"), y) for x, y in batches()]
    model = get_peft_model(model, config(chosen={"scale": "paper"}), data, classification_loss)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {np.dtype("float32")}
    for (_, layer), W in zip(model.adapter_layers(), before, strict=True):
        assert layer.weight.dtype == "float16"
        np.testing.assert_allclose(layer.weight.data + layer.delta("default"), W, atol=1e-3)  # W − s·BA has 11 bits


def test_a_model_on_another_array_library_is_prepared_there(xp):
    data = [(xp.asarray(x), xp.asarray(y)) for x, y in batches()]
    ours = get_peft_model(Deep().to(xp), config(), data, classification_loss)
    theirs = get_peft_model(Deep(), config(), batches(), classification_loss)
    for (_, layer), (_, other) in zip(ours.adapter_layers(), theirs.adapter_layers(), strict=True):
        assert isinstance(layer.weight.data, type(xp.asarray(1.0)))
        np.testing.assert_allclose(to_numpy(layer.delta("default")), other.delta("default"), atol=1e-10)


class Unused(Deep):
    def forward(self, x):
        return self.head(self.layers[0](x))


@pytest.mark.parametrize(
    ("model", "data", "loss_fn", "words"),
    [
        (Deep, None, classification_loss, r"^batches: got None; init_lora_weights='lora_ga' starts from gradients"),
        (Deep, batches(), None, r"^loss_fn: got None; .*get_peft_model\(model, config, batches, loss_fn\) needs both"),
        (Deep, [], classification_loss, "^batches: got none"),
        (Unused, batches(), classification_loss, r"^target_modules: the loss does not depend on 'layers\.1'"),
        (Deep, [(np.full((2, 8), np.nan), np.arange(2))], classification_loss, "^batches: the gradient of 'layers.0'"),
    ],
)
def test_what_cannot_be_prepared_leaves_the_model_as_it_was(model, data, loss_fn, words):
    model = model()
    before = [(n, p.data, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config(), data, loss_fn)
    assert all(
        n == m and p.data is data and p.requires_grad == flag
        for (n, p), (m, data, flag) in zip(model.named_parameters(), before, strict=True)
    )
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_a_loss_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"^loss_fn: expected a Tensor"):
        get_peft_model(Deep(), config(), batches(), lambda model, batch: 1.0)


def test_codes_and_ranks_without_2r_vectors_are_refused():
    model = quant.quantize_model(load_base("mlp"))
    with pytest.raises(ValueError, match=r"^init_lora_weights: 'lora_ga' takes the gradient .* 'fc1' holds its weight"):
        get_peft_model(model, config(), task_batches()[1], classification_loss)
    with pytest.raises(ValueError, match=r"^r of 'layers.0': got 5; .* so 1 to 4 is accepted"):
        get_peft_model(Deep(), config(r=5), batches(), classification_loss)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "BrA"}, "direction: got 'BrA'; accepted are 'ArBr'"),
        ({"scale": "none"}, "scale: got 'none'; accepted are 'stable'"),
        ({"stable_gamma": 0}, "stable_gamma: got 0; a positive number"),
        ({"stable_gamma": "16"}, "stable_gamma: got '16'"),
        ({"gradient_batches": 0}, "gradient_batches: got 0; an int of at least 1"),
        ({"gradient_batches": True}, "gradient_batches: got True"),
        ({"gradient_bytes": 1.5}, "gradient_bytes: got 1.5"),
        ({"gamma": 4}, r"lora_ga_config: got \{'gamma': 4\}; LoraGAConfig\(direction, scale, stable_gamma\)"),
    ],
)
def test_a_config_names_the_argument_and_what_is_accepted(options, words):
    with pytest.raises(ValueError, match="^" + words):
        LoraConfig(init_lora_weights="lora_ga", lora_ga_config=options)


def test_combinations_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"^use_dora: got True with init_lora_weights='lora_ga'"):
        LoraConfig(init_lora_weights="lora_ga", use_dora=True)
    with pytest.raises(ValueError, match=r"^init_lora_weights: LoraProConfig has no 'lora_ga'; LoraConfig has it"):
        LoraProConfig(init_lora_weights="lora_ga")
    with pytest.raises(ValueError, match=r"^lora_ga_config: got 4"):
        LoraConfig(init_lora_weights="lora_ga", lora_ga_config=4)


def test_a_config_has_pefts_defaults():
    made = LoraConfig(init_lora_weights="lora_ga")
    assert made.lora_ga_config == LoraGAConfig("ArB2r", "stable", 16)
    assert made.to_dict()["lora_ga_config"] == {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16}
    assert "lora_ga_config" not in LoraConfig().to_dict()
    read = LoraConfig.from_dict(made.to_dict())  # A and B come from the file, and its base has changed already
    assert (read.init_lora_weights, read.lora_ga_config) == (True, None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_counts_the_layers(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    config = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=NAMES)
    get_peft_model(Deep(), config, batches(), classification_loss)
    assert "LoRA-GA: gradients" in sys.stderr.getvalue()
    assert "8/8" in sys.stderr.getvalue()


def test_no_bar_where_another_is_shown_or_nobody_looks(monkeypatch, capsys):
    config = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=NAMES)
    get_peft_model(Deep(), config, batches(), classification_loss)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress(console=Console(stderr=True)) as outer:
        outer.add_task("all methods")
        get_peft_model(Deep(), config, batches(), classification_loss)
    assert "all methods" in sys.stderr.getvalue()
    assert "LoRA-GA" not in sys.stderr.getvalue()


# --- training, merging, saving ----------------------------------------------------------------------------------------


def trained(kind, steps=5, **options):
    model, x, expected, data, loss_fn = adapted(kind, chosen={"scale": "paper", "gradient_batches": 2}, **options)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    history = fit(model, data, steps=steps, optimizer=optimizer, loss_fn=loss_fn, progress=False)
    return model.eval(), x, expected, history


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_merges_saves_and_loads(kind, tmp_path):
    base = {"llama": llama}.get(kind) or (lambda: load_base(kind))
    model, x, start, history = trained(kind, r=3, lora_alpha=6)
    assert history.loss[-1] < history.loss[0]
    expected = model(x).data
    assert float(abs(expected - start).max()) > 1e-3
    model.save_pretrained(tmp_path / "2r")
    model.save_pretrained(tmp_path / "r", changed_base=True)
    written = {name: json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("2r", "r")}
    assert [written["2r"]["r"], written["r"]["r"]] == [6, 3]
    assert all(w["init_lora_weights"] is True and "lora_ga_config" not in w for w in written.values())

    loaded = PeftModel.from_pretrained(base(), tmp_path / "2r")
    near(loaded(x).data, expected, KINDS[kind])
    with model.disable_adapter():
        near(model(x).data, start, KINDS[kind])
    model.merge_adapter()
    near(model(x).data, expected, KINDS[kind])
    model.unmerge_adapter()
    near(model(x).data, expected, KINDS[kind])

    changed = model.unload(changed_base=True)
    assert float(abs(changed.eval()(x).data - start).max()) > 1e-3
    near(PeftModel.from_pretrained(changed, tmp_path / "r").eval()(x).data, expected, KINDS[kind])
    near(loaded.merge_and_unload()(x).data, expected, KINDS[kind])


def test_unloading_gives_the_base_back():
    model, x, start, _ = trained("mlp")
    near(model.unload()(x).data, start, 5e-6)


def test_a_changed_base_is_saved_as_a_model(tmp_path):
    model, x, _, _ = trained("llama")
    expected = model(x).data
    model.save_pretrained(tmp_path / "adapter", changed_base=True)
    save_model(model.unload(changed_base=True), tmp_path / "base")
    again = PeftModel.from_pretrained(load_model(tmp_path / "base", dtype="float64"), tmp_path / "adapter")
    near(again(x).data, expected, 1e-12)


def test_where_a_weight_has_no_rank_2r_more_the_product_is_saved(tmp_path):
    """MLP's fc1 is (128, 64): r = 32 is LoRA-GA's most, and 2r the weight's."""
    model, x, _, _ = trained("mlp", r=32, lora_alpha=32)
    model.save_pretrained(tmp_path)
    near(PeftModel.from_pretrained(load_base("mlp"), tmp_path)(x).data, model(x).data, 5e-6)


def test_a_second_adapter_starts_as_the_base_and_both_are_saved_right(tmp_path):
    task, data = task_batches("float64")
    x = task.test.x[:20]
    start = load_base("mlp", dtype="float64").eval()(x).data
    model = get_peft_model(
        load_base("mlp", dtype="float64"), config(chosen={"scale": "paper"}), data, classification_loss
    )
    starts = [layer.delta("default") for _, layer in model.adapter_layers()]
    fit(model, data, steps=3, optimizer=SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), progress=False)
    first = model.eval()(x).data
    model.add_adapter("second", config(chosen={"scale": "paper"}), data, classification_loss)
    near(model(x).data, first, 1e-12)
    model.set_adapter("second")
    near(model(x).data, start, 1e-12)
    for (_, layer), delta in zip(model.adapter_layers(), starts, strict=True):  # the base's gradient, not the first's
        near(layer.delta("second"), delta, 1e-6)  # through W − s·BA and back; some singular values are small
    model.save_pretrained(tmp_path, "default")
    near(PeftModel.from_pretrained(load_base("mlp", dtype="float64"), tmp_path)(x).data, first, 1e-12)


def test_merged_adapters_must_come_out_first():
    _, data = task_batches()
    model = get_peft_model(load_base("mlp"), LoraConfig(r=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.add_adapter("second", config(), data, classification_loss)


@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_the_recipe_trains(kind):
    _, data = task_batches()
    model = prepared(load_base(kind), "lora-ga", Choice(4, 8.0), 0, data, classification_loss)
    assert isinstance(model.method, lora_ga.LoraGA)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=METHODS["lora-ga"].lr)
    history = fit(model, data, steps=20, optimizer=optimizer, progress=False)
    assert np.mean(history.loss[-3:]) < np.mean(history.loss[:3])
