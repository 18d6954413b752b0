"""AdaLoRA's formulas, its layer, and models whose ranks it allocates."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cases import batch as llama_batch
from llama_cases import llama
from twins import LINEARS, Net, batch, outputs

from minipeft import AdaLoraConfig, LoraConfig, PeftModel, Tensor, fit, get_peft_model, gradcheck, ops, optim
from minipeft.backend import count_flops, get_namespace, to_numpy
from minipeft.methods.adalora import (
    AdaLora,
    AdaLoraLinear,
    _penalty,
    adalora_delta,
    importance_magnitude,
    importance_sensitivity,
    kept_directions,
    orthogonality_penalty,
    orthonormalize,
    rank_budget,
)
from minipeft.methods.lora import lora_delta
from minipeft.nn import Linear, Parameter, project
from minipeft.quant import quantize_model
from minipeft.recipes import METHODS, Choice

FLOATS = ["float32", "float64"]


def gaussian(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def triplets(out=6, width=5, r=3, seed=0, dtype="float64"):
    """P, λ, Q."""
    return tuple(gaussian(*s, seed=seed + i, dtype=dtype) for i, s in enumerate([(out, r), (r,), (r, width)]))


shapes = st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))


# --- formulas ---------------------------------------------------------------------------------------------------------


@given(shapes)
def test_the_update_is_a_sum_of_singular_directions_and_loras_product(shape):
    P, lam, Q = triplets(*shape)
    expected = sum(lam[i] * np.outer(P[:, i], Q[i]) for i in range(len(lam)))
    np.testing.assert_allclose(adalora_delta(P, lam, Q), expected, atol=1e-13)
    np.testing.assert_allclose(lora_delta(lam[:, None] * Q, P, 1.0), expected, atol=1e-13)


@given(st.integers(4, 8), st.integers(4, 8), st.integers(1, 4))
def test_with_orthonormal_factors_lambda_are_the_singular_values(out, width, r):
    P, lam, Q = triplets(out, width, r)
    delta = adalora_delta(orthonormalize(P), lam, orthonormalize(Q.T).T)
    singular = np.linalg.svd(delta, compute_uv=False)
    np.testing.assert_allclose(singular[:r], np.sort(np.abs(lam))[::-1], atol=1e-13)
    np.testing.assert_allclose(singular[r:], 0, atol=1e-13)


@given(shapes)
def test_the_magnitude_score_is_the_squared_norm_of_a_direction(shape):
    P, lam, Q = triplets(*shape)
    expected = [np.linalg.norm(lam[i] * np.outer(P[:, i], Q[i])) ** 2 for i in range(len(lam))]
    np.testing.assert_allclose(importance_magnitude(P, lam, Q), expected, rtol=1e-12)


@given(shapes, st.floats(0.1, 0.95), st.floats(0.1, 0.95))
def test_the_sensitivity_score_is_the_papers_element_by_element(shape, beta1, beta2):
    out, width, r = shape
    state, kept = None, {}
    for step in range(4):
        w, g = triplets(*shape, seed=10 * step), triplets(*shape, seed=10 * step + 5)
        before = None if state is None else [a.copy() for pair in state for a in pair]
        given_state = state
        S, state = importance_sensitivity(*w, *g, state, beta1=beta1, beta2=beta2)
        if before is not None:
            assert all((a == b).all() for a, b in zip(before, itertools.chain(*given_state), strict=True))

        def score(name, index, w, g):
            mean, uncertainty = kept.get((name, index), (0.0, 0.0))
            now = abs(w * g)
            mean = beta1 * mean + (1 - beta1) * now
            uncertainty = beta2 * uncertainty + (1 - beta2) * abs(now - mean)
            kept[name, index] = mean, uncertainty
            return mean * uncertainty

        scores = [
            {index: score(name, index, w[index], g[index]) for index in np.ndindex(w.shape)}
            for name, w, g in zip("PEQ", w, g, strict=True)
        ]
        for i in range(r):
            of_P = np.mean([scores[0][j, i] for j in range(out)])
            of_Q = np.mean([scores[2][i, j] for j in range(width)])
            np.testing.assert_allclose(S[i], scores[1][(i,)] + of_P + of_Q, rtol=1e-10)


@given(st.data())
def test_the_budget_starts_full_falls_as_a_cubic_and_ends_at_the_target(data):
    total = data.draw(st.integers(1, 200))
    tinit = data.draw(st.integers(0, total - 1))
    tfinal = data.draw(st.integers(0, total - 1 - tinit))
    target = data.draw(st.integers(0, 50))
    start = target + data.draw(st.integers(0, 50))
    schedule = {"total_step": total, "tinit": tinit, "tfinal": tfinal, "init_budget": start, "target_budget": target}
    budgets = [rank_budget(step, **schedule) for step in range(1, total + 1)]
    assert all(type(b) is int for b in budgets)
    assert budgets[:tinit] == [start] * tinit
    assert budgets[total - tfinal - 1 :] == [target] * (tfinal + 1)
    assert all(a >= b for a, b in itertools.pairwise(budgets))
    for step in range(tinit + 1, total - tfinal):
        exact = target + (start - target) * (1 - (step - tinit) / (total - tfinal - tinit)) ** 3
        assert budgets[step - 1] in (int(exact - 1e-9), int(exact + 1e-9))


def test_the_cubic_at_its_quarters():
    schedule = {"total_step": 100, "tinit": 10, "tfinal": 10, "init_budget": 72, "target_budget": 8}
    assert [rank_budget(t, **schedule) for t in (10, 30, 50, 70, 90, 91)] == [72, 35, 16, 9, 8, 8]


@given(st.integers(2, 8), st.integers(2, 8), st.integers(1, 4))
def test_the_penalty_is_zero_for_orthonormal_factors_only(out, width, r):
    P, _, Q = triplets(out, width, r)
    expected = np.linalg.norm(P.T @ P - np.eye(r)) ** 2 + np.linalg.norm(Q @ Q.T - np.eye(r)) ** 2
    np.testing.assert_allclose(orthogonality_penalty(P, Q), expected, rtol=1e-12)
    if r <= min(out, width):
        assert orthogonality_penalty(orthonormalize(P), orthonormalize(Q.T).T) < 1e-25


@given(st.integers(1, 8), st.integers(1, 4))
def test_orthonormalizing_is_gram_schmidt(out, r):
    r = min(r, out)
    P = gaussian(out, r)
    columns = []
    for i in range(r):
        column = P[:, i] - sum(((q @ P[:, i]) * q for q in columns), np.zeros(out))
        columns.append(column / np.linalg.norm(column))
    found = orthonormalize(P)
    np.testing.assert_allclose(found, np.array(columns).T, atol=1e-9)
    np.testing.assert_allclose(found.T @ found, np.eye(r), atol=1e-14)
    np.testing.assert_allclose(orthonormalize(found), found, atol=1e-14)


def test_columns_that_depend_on_each_other_or_vanish_are_orthonormalized_too():
    P = np.stack([np.ones(5), np.ones(5), np.zeros(5)], axis=1)
    found = orthonormalize(P)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_formulas_keep_dtype_and_library(xp, dtype):
    P, lam, Q = (xp.asarray(a) for a in triplets(dtype=dtype))
    g = [xp.asarray(a) for a in triplets(seed=7, dtype=dtype)]
    S, state = importance_sensitivity(P, lam, Q, *g)
    S, state = importance_sensitivity(P, lam, Q, *g, state)
    arrays = [adalora_delta(P, lam, Q), importance_magnitude(P, lam, Q), S, *itertools.chain(*state), orthonormalize(P)]
    for array in (*arrays, orthogonality_penalty(P, Q)):
        assert get_namespace(array) is xp
        assert array.dtype == dtype


SCHEDULE = {"total_step": 9, "tinit": 2, "tfinal": 2, "init_budget": 8, "target_budget": 4}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adalora_delta(gaussian(3, 2), gaussian(3), gaussian(2, 4)), r"got \(3, 2\), \(3,\) and \(2, 4\)"),
        (lambda: importance_magnitude(gaussian(3, 2), gaussian(2), gaussian(3, 4)), r"λ \(r,\) and Q \(r, in\)"),
        (lambda: orthogonality_penalty(gaussian(3, 2), gaussian(3, 4)), r"P \(out, r\)"),
        (lambda: orthogonality_penalty(gaussian(3), gaussian(3, 4)), r"P \(out, r\) and Q \(r, in\): got \(3,\) and"),
        (lambda: orthogonality_penalty([1.0], gaussian(3, 4)), "got list and"),
        (lambda: importance_sensitivity(*triplets(), *triplets(r=2)), r"gP: got \(6, 2\); the shape of P, \(6, 3\)"),
        (lambda: importance_sensitivity(*triplets(), *triplets(), beta1=1.0), "beta1: got 1.0"),
        (lambda: orthonormalize(gaussian(2, 3)), r"P: got \(2, 3\)"),
        (lambda: orthonormalize([[1.0]]), "P: got list; a matrix"),
        (lambda: adalora_delta(gaussian(3, 2), [1, 1], gaussian(2, 4)), r"got \(3, 2\), list and \(2, 4\)"),
        (lambda: rank_budget(1, **{**SCHEDULE, "tinit": 7}), "7 \\+ 2, and total_step is 9: no step is left"),
        (lambda: rank_budget(1, **{**SCHEDULE, "target_budget": 9}), "target_budget: got 9; 0 to init_budget, 8"),
        (lambda: rank_budget(1, **{**SCHEDULE, "total_step": 0}), "total_step: got 0"),
        (lambda: rank_budget(1, **{**SCHEDULE, "tinit": -1}), "tinit: got -1"),
        (lambda: rank_budget(1, **{**SCHEDULE, "init_budget": "8"}), "init_budget: got '8'"),
        (lambda: rank_budget(1, **{**SCHEDULE, "target_budget": -1}), "target_budget: got -1"),
        (lambda: rank_budget(2.5, **SCHEDULE), "step: got 2.5"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the penalty as an operation --------------------------------------------------------------------------------------


def test_the_penalty_of_all_layers_is_one_node_with_the_formulas_value(xp):
    sizes = [(5, 4, 2), (3, 6, 3)]
    Ps = [Parameter(xp.asarray(triplets(*s, dtype="float32")[0])) for s in sizes]
    Qs = [Parameter(xp.asarray(triplets(*s, dtype="float32")[2])) for s in sizes]
    penalty = _penalty(Ps, Qs, 0.5)
    expected = 0.5 * sum(
        float(orthogonality_penalty(to_numpy(P.data), to_numpy(Q.data))) for P, Q in zip(Ps, Qs, strict=True)
    )
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    penalty.backward()
    assert {(get_namespace(p.grad), p.grad.dtype.name) for p in [*Ps, *Qs]} == {(xp, "float32")}


@given(st.lists(shapes, min_size=1, max_size=3))
def test_the_penalty_passes_gradcheck(sizes):
    Ps = [Parameter(triplets(*s)[0]) for s in sizes]
    Qs = [Parameter(triplets(*s)[2]) for s in sizes]
    assert gradcheck(lambda *all_: _penalty(list(all_[: len(sizes)]), list(all_[len(sizes) :]), 0.3), [*Ps, *Qs])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_the_highest_scores_of_all_modules_stay_and_equal_ones_at_the_border_go(sizes, data):
    scores = [np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), float) for n in sizes]
    every = np.sort(np.concatenate(scores))[::-1]
    budget = data.draw(st.integers(0, len(every)))
    kept = kept_directions(scores, budget)
    border = every[budget] if budget < len(every) else -1
    assert [mask.tolist() for mask in kept] == [(border < S).tolist() for S in scores]
    assert sum(mask.sum() for mask in kept) <= budget


def test_what_stays_is_the_given_library_s(xp):
    scores = [xp.asarray(np.array([3.0, 1.0], "float32")), xp.asarray(np.array([2.0], "float32"))]
    kept = kept_directions(scores, 2)
    assert all(get_namespace(mask) is xp for mask in kept)
    assert [to_numpy(mask).tolist() for mask in kept] == [[True, False], [True]]


# --- the layer --------------------------------------------------------------------------------------------------------


def config(**options):
    defaults = {"init_r": 3, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_alpha": 5}
    return AdaLoraConfig(**{**defaults, **options})


def layer_of(dtype="float64", adapters=("default",), **options):
    layer = Linear(5, 6, dtype=dtype, rng=0)
    for i, name in enumerate(adapters):
        method = config(init_lora_weights=False, **options).build()
        method.adapter, method.rng = name, np.random.default_rng(i)
        layer = method.wrap("fc", layer)
    layer.active = list(adapters)
    return layer


@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_is_the_base_plus_the_scaled_update(xp, dtype):
    layer, x = layer_of(dtype), gaussian(2, 4, 5, dtype=dtype)
    P, lam, Q = layer.factors("default")
    expected = x @ layer.weight.data.T + layer.base_layer.bias.data
    expected = expected + 5 / (3 + 1e-5) * (x @ adalora_delta(P, lam, Q).T)
    y = layer.to(xp)(Tensor(xp.asarray(x)))
    assert get_namespace(y.data) is xp
    assert y.dtype == dtype
    np.testing.assert_allclose(to_numpy(y.data), expected, rtol=30 * float(np.finfo(dtype).eps), atol=1e-5)


@given(st.sampled_from([(), (1,), (3,), (0,), (2, 3)]), st.integers(1, 3))
def test_the_layer_passes_gradcheck(rows, r):
    layer = layer_of(init_r=r, target_r=1)
    x = Tensor(gaussian(*rows, 5), requires_grad=True)
    assert gradcheck(lambda *_: layer(x), [x, *layer.parameters_of("default")])


def test_the_layer_runs_loras_operation_and_a_product_of_lambda_and_q():
    layer = layer_of()
    with count_flops() as flops:
        layer(Tensor(gaussian(10, 5))).sum().backward()
    out, width, r, N = 6, 5, 3, 10
    assert flops.forward == 2 * N * (width * out + width * r + r * out)


def test_layers_of_one_input_share_their_small_products_and_give_what_each_gives():
    layers, x = [layer_of(init_r=r, target_r=1) for r in (1, 3)], gaussian(4, 5)
    shared = project(Tensor(x), *layers)
    (shared[0].sum() + shared[1].sum()).backward()
    for y, layer in zip(shared, layers, strict=True):
        parameters = layer.parameters_of("default")
        grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        alone = layer(Tensor(x))
        alone.sum().backward()
        np.testing.assert_allclose(y.data, alone.data, atol=1e-13)
        for g, p in zip(grads, parameters, strict=True):
            np.testing.assert_allclose(g, p.grad, atol=1e-12)
    layers[0].truncate("default", np.zeros(1, bool))  # of rank 0: each its own way
    np.testing.assert_array_equal(project(Tensor(x), *layers)[0].data, layers[0].base_layer(Tensor(x)).data)


def test_two_active_adapters_add_up_and_dropout_is_on_the_adapters_path_alone():
    layer, x = layer_of(adapters=("default", "second")), gaussian(4, 5)
    base = x @ layer.weight.data.T + layer.base_layer.bias.data
    expected = base + sum(x @ layer.delta(name).T for name in ("default", "second"))
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, atol=1e-12)
    layer = layer_of(lora_dropout=0.5)
    rng = np.random.default_rng()
    rng.bit_generator.state = layer.lora_dropout["default"].rng.bit_generator.state
    dropped = ops.dropout(Tensor(x), 0.5, True, rng).data
    np.testing.assert_allclose(layer(Tensor(x)).data, base + dropped @ layer.delta("default").T, atol=1e-12)


def test_a_layer_of_rank_zero_is_its_base(tmp_path):
    layer, x = layer_of(), gaussian(4, 5)
    layer.truncate("default", np.zeros(3, bool))
    assert [p.shape for p in layer.parameters_of("default")] == [(6, 0), (0, 1), (0, 5)]
    y = layer(Tensor(x, requires_grad=True))
    np.testing.assert_array_equal(y.data, layer.base_layer(Tensor(x)).data)
    y.sum().backward()
    before = layer.weight.data.copy()
    layer.merge(["default"])
    np.testing.assert_array_equal(layer.weight.data, before)
    np.testing.assert_array_equal(layer(Tensor(x)).data, y.data)


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_step": None}, "total_step: got None; an int of at least 1 is accepted: how many steps"),
        ({"total_step": 0}, "total_step: got 0"),
        ({"tinit": 9}, r"tinit \+ tfinal: got 9 \+ 3, and total_step is 12: no step is left to prune in"),
        ({"tinit": -1}, "tinit: got -1"),
        ({"tfinal": 1.5}, "tfinal: got 1.5"),
        ({"target_r": 4}, "target_r: got 4, above init_r, 3: ranks are pruned and never grow"),
        ({"target_r": 0}, "target_r: got 0"),
        ({"init_r": True}, "init_r: got True"),
        ({"deltaT": 0}, "deltaT: got 0"),
        ({"beta1": 1.0}, "beta1: got 1.0"),
        ({"beta2": 0}, "beta2: got 0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight: got -0.1"),
        ({"importance": "norm"}, "importance: got 'norm'; accepted are 'sensitivity', 'magnitude'"),
        ({"orthogonality": "qr"}, "orthogonality: got 'qr'; accepted are 'penalty', 'gram-schmidt'"),
        ({"r": 4}, "r: got 4; AdaLoRA starts at init_r"),
        ({"use_dora": True}, "use_dora: got True"),
        ({"use_rslora": True}, "use_rslora: got True"),
        ({"alpha_pattern": {"fc": 3}}, "alpha_pattern: got"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"lora_alpha": 0}, "lora_alpha: got 0"),
        ({"rank_pattern": {"fc": 2}}, "rank_pattern"),
        ({"rank_pattern": {"fc.lora_E": [True, False]}}, "init_r = 3 bools"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a dictionary"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_the_reason(options, words):
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_pefts_names_of_a_rank_pattern_come_down_to_one():
    kept = [True, False, True]
    for key in ("fc.lora_E", "fc.lora_E.default", "base_model.model.fc.lora_E"):
        made = config(rank_pattern={key: kept})
        assert made.rank_pattern == {"fc.lora_E": kept}
        assert (made.rank_of("fc"), made.rank_of("other")) == (2, 3)


def test_the_recipe_starts_with_half_as_many_directions_more_and_loras_scale():
    for steps in (1, 2, 7, 200):
        made = METHODS["adalora"].config(Choice(4, 8.0, steps=steps))
        assert (made.init_r, made.target_r, made.total_step) == (6, 4, steps)
        assert made.lora_alpha / made.init_r == 2.0


# --- models -----------------------------------------------------------------------------------------------------------

X, Y = batch()
VARIANTS = [
    {},
    {"importance": "magnitude"},
    {"orthogonality": "gram-schmidt"},
    {"importance": "magnitude", "orthogonality": "gram-schmidt", "lora_dropout": 0.2},
]


def optimizer_of(model, lr=0.05):
    return optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model, steps=12, callbacks=(), **options):
    return fit(
        model, [(Tensor(X.astype(next(model.parameters()).dtype)), Y)],
        steps=steps, optimizer=optimizer_of(model), callbacks=callbacks, progress=False, **options,
    )  # fmt: skip


def trained(dtype="float64", steps=12, **options):
    model = get_peft_model(Net(dtype), config(**options))
    train(model, steps)
    return model.eval()


def test_parameters_have_pefts_names():
    model = get_peft_model(Net(), config(target_modules=["fc"]))
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.fc.lora_A.default": (3, 5),
        "base_model.model.fc.lora_E.default": (3, 1),
        "base_model.model.fc.lora_B.default": (6, 3),
    }
    assert list(model.adapter_state()) == [f"base_model.model.fc.lora_{part}" for part in "AEB"]
    assert isinstance(model.method, AdaLora)
    assert model.get_nb_trainable_parameters()[0] == 3 * (5 + 1 + 6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", VARIANTS)
def test_a_model_starts_as_its_base(options, dtype):
    np.testing.assert_array_equal(outputs(get_peft_model(Net(dtype), config(**options))), outputs(Net(dtype)))


@pytest.mark.parametrize("options", VARIANTS)
def test_fit_prunes_to_the_target_and_leaves_the_base_as_it_was(options):
    model = get_peft_model(Net(), config(**options))
    base = {n: p.data.tobytes() for n, p in model.named_parameters() if not p.requires_grad}
    history = train(model)
    assert history.loss[-1] < history.loss[0]
    assert base == {n: p.data.tobytes() for n, p in model.named_parameters() if not p.requires_grad}
    ranks = model.method.ranks(model)
    assert list(ranks) == LINEARS
    assert sum(ranks.values()) == 2 * 5
    for name, layer in model.method.layers(model):
        assert np.count_nonzero(layer.lora_E["default"].data) == ranks[name]


@pytest.mark.parametrize("options", VARIANTS)
def test_the_record_of_ranks_follows_the_schedule(options):
    model = trained(**options)
    record = model.method.rank_history
    assert record[0] == (0, dict.fromkeys(LINEARS, 3))
    assert [done for done, _ in record] == [0, 4, 6, 8, 9]  # tinit = 2, every deltaT = 2, total − tfinal = 9
    for done, ranks in record[1:]:
        expected = rank_budget(done, total_step=12, tinit=2, tfinal=3, init_budget=15, target_budget=10)
        assert sum(ranks.values()) == expected
    assert record[-1][1] == model.method.ranks(model)


def test_without_final_steps_the_last_step_settles_the_ranks():
    model = trained(tfinal=0, deltaT=5)
    assert [done for done, _ in model.method.rank_history] == [0, 5, 10, 12]
    assert model.method.settled
    assert sum(model.method.ranks(model).values()) == 10


def test_pruned_directions_come_back_until_the_ranks_are_settled():
    lam, after = [], []
    model = get_peft_model(Net(), config(total_step=60, tinit=2, tfinal=20, deltaT=1, importance="magnitude"))

    def watch(progress):
        layers = [layer for _, layer in model.method.layers(model)]
        (after if progress.step > 40 else lam).append(np.concatenate([e.factors("default")[1] for e in layers]) != 0)

    train(model, 60, [watch])
    lam = np.array(lam)
    came_back = (~lam[:-1] & lam[1:]).any(axis=0)
    assert came_back[lam[-1]].any()  # some of those that stay were pruned once
    assert (np.array(after) == lam[-1]).all()


def test_budget_goes_where_the_scores_are_high():
    """Of two layers one gets all the gradient: it keeps every direction."""
    model = get_peft_model(Net(), config(target_modules=["fc", "q_proj"], importance="magnitude", target_r=1))
    layers = dict(model.method.layers(model))
    for name, layer in layers.items():
        layer.lora_E["default"].data = np.full((3, 1), 1.0 if name == "fc" else 1e-3)
    model.method.start(model, None)
    model.method.after_step(model, 8)
    assert model.method.ranks(model) == {"fc": 3, "layers.0.q_proj": 0, "layers.1.q_proj": 0}


def test_equal_ranks_at_start_and_end_prune_nothing():
    model = trained(target_r=3)
    assert model.method.ranks(model) == dict.fromkeys(LINEARS, 3)


def test_gram_schmidt_keeps_the_factors_orthonormal_and_the_penalty_brings_them_there():
    def distance(model):
        factors = [layer.factors("default") for _, layer in model.method.layers(model)]
        return max(float(orthogonality_penalty(P, Q)) for P, _, Q in factors)

    seen = []
    model = get_peft_model(Net(), config(orthogonality="gram-schmidt"))
    train(model, callbacks=[lambda _: seen.append(distance(model))])
    assert max(seen) < 1e-25
    assert model.method.penalty(model) is None
    penalized = trained(total_step=200, steps=200)
    free = trained(total_step=200, steps=200, orth_reg_weight=0)
    assert free.method.penalty(free) is None
    assert distance(penalized) < 0.1 < 2 < distance(free)


def test_the_loss_that_is_reported_is_without_the_penalty():
    model = get_peft_model(Net(), config())
    loss = ops.cross_entropy(model(Tensor(X)), Y).item()
    expected = 0.5 * sum(
        float(orthogonality_penalty(P, Q)) for P, _, Q in (e.factors("default") for _, e in model.method.layers(model))
    )
    assert model.method.penalty(model).item() == pytest.approx(expected)
    assert train(model).loss[0] == loss


@pytest.mark.parametrize("steps", [11, 13])
def test_fit_refuses_a_number_of_steps_that_is_not_the_schedules(steps):
    model = get_peft_model(Net(), config())
    with pytest.raises(ValueError, match=f"steps: got {steps}, and AdaLoRA's schedule is for total_step = 12"):
        train(model, steps)


def test_settled_ranks_stay_in_whatever_is_trained_after():
    model = trained()
    ranks, record = model.method.ranks(model), list(model.method.rank_history)
    train(model, 7)
    assert model.method.ranks(model) == ranks
    assert model.method.rank_history == record
    for name, layer in model.method.layers(model):
        assert np.count_nonzero(layer.lora_E["default"].data) == ranks[name]


def test_a_run_that_failed_is_begun_again_from_its_start():
    model = get_peft_model(Net(), config())
    with pytest.raises(ZeroDivisionError):
        train(model, callbacks=[lambda progress: 1 // (progress.step - 6)])
    assert len(model.method.rank_history) == 3
    train(model)
    assert [done for done, _ in model.method.rank_history] == [0, 4, 6, 8, 9]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("stop", [3, 6, 10])
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(options, stop, tmp_path):
    def stopping(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    results = []
    for name, stops in (("whole", False), ("stopped", True)):
        settings = {"checkpoint_dir": tmp_path / name, "checkpoint_every": 1}
        model = get_peft_model(Net("float32"), config(**options))
        if stops:
            with pytest.raises(KeyboardInterrupt):
                train(model, callbacks=[stopping], **settings)
            model = get_peft_model(Net("float32"), config(**options))
            settings["resume"] = True
        history = train(model, **settings)
        state = {n: a.tobytes() for n, a in model.state_dict().items()}
        kept = {n: a.tobytes() for n, a in model.method.state_dict().items()}
        results.append((history.loss, state, kept, model.method.rank_history))
    assert results[0] == results[1]


def test_a_methods_state_is_its_own_and_nothing_else_is_taken():
    model = get_peft_model(Net(), config())
    train(model)
    state = model.method.state_dict()
    again = get_peft_model(Net(), config())
    again.method.load_state_dict(state)
    assert again.method.rank_history == model.method.rank_history
    for wrong in ({**state, "x": state["steps"]}, {"steps": state["steps"]}, {**state, "mask.other": state["settled"]}):
        with pytest.raises(ValueError, match="method state"):
            again.method.load_state_dict(wrong)


@pytest.mark.parametrize("options", VARIANTS)
def test_truncating_gives_the_same_outputs_with_fewer_parameters(options, tmp_path):
    model = trained(**options)
    before, count, ranks = outputs(model), model.get_nb_trainable_parameters()[0], model.method.ranks(model)
    model.method.truncate(model)
    np.testing.assert_allclose(outputs(model), before, atol=1e-13)
    sizes = {name: layer.weight.shape for name, layer in model.method.layers(model)}
    expected = sum(ranks[name] * (out + width + 1) for name, (out, width) in sizes.items())
    assert model.get_nb_trainable_parameters()[0] == expected < count
    assert model.method.ranks(model) == ranks
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(PeftModel.from_pretrained(Net(), tmp_path)), before, atol=1e-13)
    train(model, 3)  # goes on, at the ranks it has
    model.method.truncate(model)
    assert model.method.ranks(model) == ranks


def test_truncating_is_refused_while_directions_may_come_back():
    model = get_peft_model(Net(), config())
    with pytest.raises(ValueError, match="directions may come back until step 9"):
        model.method.truncate(model)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("stop", [0, 5, 12])
def test_a_saved_adapter_is_pruned_and_loads_with_the_same_outputs(options, stop, tmp_path):
    model = get_peft_model(Net(), config(**options))
    files = []

    def save(progress):
        if progress.step == stop:
            model.eval().save_pretrained(tmp_path)
            files.append(outputs(model))
            model.train()

    if stop:
        train(model, callbacks=[save])
    else:
        model.eval().save_pretrained(tmp_path)
        files.append(outputs(model))
    again = PeftModel.from_pretrained(Net(), tmp_path)
    np.testing.assert_allclose(outputs(again), files[0], atol=1e-13)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "ADALORA"
    assert {k: written[k] for k in options} == options
    if stop == 12:
        assert {name: sum(kept) for name, kept in written["rank_pattern"].items()} == {
            f"{name}.lora_E": r for name, r in model.method.ranks(model).items()
        }
        assert again.method.ranks(again) == model.method.ranks(model)
    assert (written["rank_pattern"] is None) == (stop == 0)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == written
    twice = PeftModel.from_pretrained(Net(), tmp_path / "again")
    np.testing.assert_array_equal(outputs(twice), outputs(again))


def test_a_loaded_adapter_trains_on_at_its_ranks_for_any_number_of_steps(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    history = train(again, 5)
    assert history.loss[-1] < history.loss[0]
    assert again.method.ranks(again) == model.method.ranks(model)


def test_a_model_with_modules_of_rank_zero_merges_saves_and_loads(tmp_path):
    model = trained(target_r=1, importance="magnitude")
    assert 0 in model.method.ranks(model).values()
    before = outputs(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    np.testing.assert_allclose(outputs(again), before, atol=1e-13)
    train(again, 4)
    model.method.truncate(model)
    np.testing.assert_allclose(outputs(model), before, atol=1e-13)
    np.testing.assert_allclose(outputs(model.merge_and_unload()), before, atol=1e-13)


@pytest.mark.parametrize("options", VARIANTS)
def test_merged_outputs_are_the_unmerged_ones(options):
    model = trained(**options)
    apart = outputs(model)
    model.merge_adapter()
    np.testing.assert_allclose(outputs(model), apart, atol=1e-12)
    model.unmerge_adapter()
    np.testing.assert_allclose(outputs(model), apart, atol=1e-12)
    with model.disable_adapter():
        np.testing.assert_allclose(outputs(model), outputs(Net()), atol=1e-12)
    plain = model.merge_and_unload()
    np.testing.assert_allclose(outputs(plain), apart, atol=1e-12)
    assert not any(isinstance(m, AdaLoraLinear) for m in plain.modules())


def test_adapters_are_added_chosen_and_deleted():
    model = trained()
    first = outputs(model)
    model.add_adapter("second", config(init_r=2, target_r=1, target_modules=["fc", "v_proj"]))
    np.testing.assert_array_equal(outputs(model), first)
    model.set_adapter("second")
    np.testing.assert_allclose(outputs(model), outputs(Net()), atol=1e-12)
    train(model)
    second = outputs(model)
    assert sum(model.method.ranks(model).values()) == 3
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"'second' \(AdaLora\) acts between steps, which only the first can"):
        train(model)
    model.set_adapter("default")
    np.testing.assert_array_equal(outputs(model), first)
    model.delete_adapter("default")
    np.testing.assert_array_equal(outputs(model), second)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_of_another_kind_are_refused_on_the_same_layer(order):
    configs = [config(), LoraConfig(r=2)]
    model = get_peft_model(Net(), configs[order[0]])
    before = outputs(model)
    with pytest.raises(ValueError, match="cannot add an adapter to that"):
        model.add_adapter("second", configs[order[1]])
    np.testing.assert_array_equal(outputs(model), before)


def test_a_rank_that_no_weight_has_is_refused():
    with pytest.raises(ValueError, match="init_r of 'fc': got 12"):
        get_peft_model(Net(), AdaLoraConfig(total_step=9))


@pytest.mark.parametrize("options", VARIANTS)
def test_a_model_on_a_device_is_pruned_there(xp, options):
    options = {**options, "lora_dropout": 0}
    host = get_peft_model(Net("float32"), config(**options))
    train(host)
    model = get_peft_model(Net("float32"), config(**options)).to(xp)
    x = Tensor(xp.asarray(X.astype("float32")))
    y = xp.asarray(Y)
    fit(model, [(x, y)], steps=12, optimizer=optimizer_of(model), progress=False)
    assert model.method.rank_history == host.method.rank_history
    assert {get_namespace(p.data) for p in model.parameters()} == {xp}
    model.method.truncate(model)
    np.testing.assert_allclose(to_numpy(model(x).data), outputs(host), atol=1e-4)


def test_it_trains_on_a_llama_and_over_codes(tmp_path):
    ids, _, labels = llama_batch("none")

    def loss_fn(model, _):
        logits = model(ids)
        return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    for base in (lambda: llama(dtype="float32"), lambda: quantize_model(llama(dtype="float32"))):
        model = get_peft_model(base(), config(init_r=4, total_step=20))
        history = fit(
            model, [None], steps=20, optimizer=optimizer_of(model, 0.02), loss_fn=loss_fn, progress=False
        )  # fmt: skip
        assert history.loss[-1] < history.loss[0]
        assert sum(model.method.ranks(model).values()) == 2 * len(model.method.ranks(model))
        expected = model.eval()(ids).data
        model.save_pretrained(tmp_path)
        np.testing.assert_allclose(PeftModel.from_pretrained(base(), tmp_path)(ids).data, expected, atol=1e-5)
