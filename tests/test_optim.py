"""Optimizers and schedules: PyTorch's kept trajectories, the rules written plainly, saving and going on, errors."""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import standin
from cases import OPTIMIZERS

from minipeft import Tensor, backend, ops, optim

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(xp=np, dtype="float64"):
    return [Tensor(xp.asarray(values), requires_grad=True) for values in cases.starting_values(dtype)]


def walk(name, optimizer, params, numbers, xp=np):
    """Take the steps with these numbers; the parameters after the last."""
    for _ in cases.steps(name, optimizer, params, lambda g: xp.asarray(g.astype(params[0].dtype)), numbers):
        pass
    return [backend.to_numpy(p.data).copy() for p in params]


def one(values, grad=None, dtype="float64"):
    """A parameter with a gradient."""
    p = Tensor(np.asarray(values, dtype), requires_grad=True)
    p.grad = None if grad is None else np.asarray(grad, dtype)
    return p


# --- the rules --------------------------------------------------------------------------------------------------------


@every_optimizer
def test_fifty_steps_go_where_pytorch_went(xp, name, kept_trajectories):
    found = cases.kept(cases.trajectory(name, xp=xp))
    np.testing.assert_allclose(found, kept_trajectories[name], rtol=1e-12, atol=1e-14)  # 50 steps of a few roundings


@every_optimizer
def test_single_precision_goes_the_same_way(xp, name, kept_trajectories):
    history = cases.trajectory(name, "float32", xp)
    assert all(a.dtype == "float32" for arrays in history for a in arrays)
    # 50 steps with a rounding of 6e-8 each, and where a second moment is small its root enlarges them
    np.testing.assert_allclose(cases.kept(history), kept_trajectories[name], rtol=2e-5, atol=2e-5)


def plain_adamw(theta, grads, lr, beta1, beta2, eps, weight_decay):
    """Loshchilov and Hutter 2019, algorithm 2, one line a formula."""
    m = v = 0
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta = theta - lr * weight_decay * theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta


def test_adamw_is_the_algorithm_of_its_paper():
    grads = [cases.numbers((3, 4), t) for t in range(20)]
    p = one(cases.numbers((3, 4)))
    optimizer = optim.AdamW([p], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for g in grads:
        p.grad = g
        optimizer.step()
    expected = plain_adamw(cases.numbers((3, 4)), grads, 0.1, 0.8, 0.9, 1e-6, 0.2)
    np.testing.assert_allclose(p.data, expected, rtol=1e-12)  # the rule here orders its products otherwise


@every_optimizer
@pytest.mark.parametrize("unit", [1, 4, 7, 24, 1000])
def test_how_parameters_are_gathered_changes_no_bit(name, unit, monkeypatch):
    """Pieces of large parameters and many small ones side by side: the rule acts on each element alone."""
    expected = cases.trajectory(name)
    monkeypatch.setattr(optim, "UNIT", unit)
    for found, arrays in zip(cases.trajectory(name), expected, strict=True):
        for one_array, other in zip(found, arrays, strict=True):
            np.testing.assert_array_equal(one_array, other)


def test_a_parameter_longer_than_a_unit_takes_the_step_of_its_parts(xp):
    n = 2 * optim.UNIT + 17
    values, grads = cases.numbers((n,)), [cases.numbers((n,), t) for t in (1, 2)]
    whole = Tensor(xp.asarray(values), requires_grad=True)
    parts = [Tensor(xp.asarray(values[a : a + 50_000].copy()), requires_grad=True) for a in range(0, n, 50_000)]
    optimizers = optim.AdamW([whole], lr=0.1), optim.AdamW(parts, lr=0.1)
    for g in grads:
        whole.grad = xp.asarray(g)
        for i, part in enumerate(parts):
            part.grad = xp.asarray(g[i * 50_000 : (i + 1) * 50_000].copy())
        for optimizer in optimizers:
            optimizer.step()
    together = np.concatenate([backend.to_numpy(part.data) for part in parts])
    np.testing.assert_array_equal(backend.to_numpy(whole.data), together)


def test_float32_and_float64_parameters_share_an_optimizer():
    single, double = one([1.0, 2.0], [1.0, 1.0], "float32"), one([1.0, 2.0], [1.0, 1.0])
    optim.SGD([single, double], lr=0.5).step()
    assert (single.dtype, double.dtype) == ("float32", "float64")
    assert single.data.tolist() == double.data.tolist() == [0.5, 1.5]


def test_host_and_device_parameters_share_an_optimizer():
    host, device = one([1.0], [1.0]), Tensor(standin.ones(1), requires_grad=True)
    device.grad = standin.ones(1)
    optim.Adam([host, device], lr=0.5).step()
    assert host.data.tolist() == device.data.get().tolist()


def test_parameters_without_a_gradient_stay_as_they_are():
    moved, still = one([1.0], [1.0]), one([1.0])
    optimizer = optim.AdamW([moved, still], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert moved.data[0] != 1
    assert still.data[0] == 1
    assert list(optimizer.state_dict()) == ["0.step", "0.exp_avg", "0.exp_avg_sq"]


def test_empty_parameters_are_no_obstacle():
    p, empty = one([1.0], [1.0]), one(np.zeros((0, 3)), np.zeros((0, 3)))
    optim.AdamW([empty, p], lr=0.5).step()
    assert p.data[0] != 1


def test_the_gradient_is_left_as_it_is():
    p = one([1.0, 2.0], [3.0, 4.0])
    optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=False).step()
    optim.AdamW([p], lr=0.1).step()
    assert p.grad.tolist() == [3, 4]


def test_parameters_change_in_place_unless_a_graph_needs_the_old_values():
    p = one([1.0, 2.0], [1.0, 1.0])
    optimizer, array = optim.SGD([p], lr=0.5), p.data
    optimizer.step()
    assert p.data is array
    loss = (p * p).sum()
    optimizer.step()
    assert p.data is not array
    assert array.tolist() == [0.5, 1.5]
    loss.backward()
    assert p.grad.tolist() == [1 + 1, 1 + 3]


@pytest.mark.parametrize("kind", ["read-only", "columns first"])
def test_arrays_that_cannot_be_changed_in_place_are_copied(kind):
    values = np.arange(6.0).reshape(2, 3)
    array = np.broadcast_to(values, (2, 3)) if kind == "read-only" else np.asfortranarray(values)
    p = Tensor(array, requires_grad=True)
    p.grad = np.ones((2, 3))
    optim.AdamW([p], lr=0.5, weight_decay=0).step()
    np.testing.assert_allclose(p.data, values - 0.5, rtol=1e-7)  # Adam's first step is lr·g/(|g| + eps)
    np.testing.assert_array_equal(array, values)


def test_zero_grad_forgets_all_gradients():
    params = [one([1.0], [1.0]), one([1.0], [1.0])]
    optim.SGD(params).zero_grad()
    assert [p.grad for p in params] == [None, None]


def test_an_optimizer_trains(xp):
    x = Tensor(xp.asarray(np.random.default_rng(0).standard_normal((20, 3))))
    w, target = Tensor(xp.zeros((2, 3)), requires_grad=True), Tensor(xp.asarray(cases.numbers((2, 3), 1)))
    optimizer = optim.AdamW([w], lr=0.1, weight_decay=0)
    for _ in range(300):
        optimizer.zero_grad()
        ops.mse_loss(ops.linear(x, w), ops.linear(x, target)).backward()
        optimizer.step()
    np.testing.assert_allclose(w.numpy(), target.numpy(), atol=1e-3)  # far below the numbers, which are about 1


# --- saving -----------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("at", [5, 25])
def test_a_loaded_optimizer_goes_on_to_the_same_bits(xp, name, at):
    params = parameters(xp)
    optimizer = cases.optimizer(name, params)
    walk(name, optimizer, params, range(1, at + 1), xp)
    others = [Tensor(p.data.copy(), requires_grad=True) for p in params]
    other = cases.optimizer(name, others)
    other.load_state_dict({key: backend.to_numpy(array).copy() for key, array in optimizer.state_dict().items()})
    rest = range(at + 1, cases.STEPS + 1)
    for one_array, another in zip(
        walk(name, optimizer, params, rest, xp), walk(name, other, others, rest, xp), strict=True
    ):
        np.testing.assert_array_equal(one_array, another)


@every_optimizer
def test_state_is_the_same_whether_or_not_it_was_used_since_it_was_loaded(name):
    params = parameters()
    optimizer = cases.optimizer(name, params)
    walk(name, optimizer, params, range(1, 14))
    state = optimizer.state_dict()
    other = cases.optimizer(name, params)
    other.load_state_dict(state)
    again = other.state_dict()
    assert list(again) == list(state)
    for key, array in state.items():
        np.testing.assert_array_equal(again[key], array)
        assert again[key].dtype == array.dtype


def test_state_has_a_name_for_each_array_in_the_shape_of_its_parameter(monkeypatch):
    monkeypatch.setattr(optim, "UNIT", 5)
    params = parameters()
    optimizer = cases.optimizer("AdamW, amsgrad", params)
    walk("AdamW, amsgrad", optimizer, params, range(1, 14))
    state = optimizer.state_dict()
    assert len(state) == 4 * 4
    for i, shape in enumerate(cases.SHAPES):
        assert state[f"{i}.exp_avg"].shape == state[f"{i}.max_exp_avg_sq"].shape == shape
    assert [int(state[f"{i}.step"][0]) for i in range(4)] == [13, 13 - 4, 13, 13 - 10]  # a step counts with a gradient


def test_saved_state_does_not_change_with_further_steps():
    p = one([1.0, 2.0], [1.0, 1.0])
    optimizer = optim.Adam([p])
    optimizer.step()
    state = optimizer.state_dict()
    before = {key: array.copy() for key, array in state.items()}
    optimizer.step()
    for key, array in before.items():
        np.testing.assert_array_equal(state[key], array)


def test_state_takes_the_bytes_of_its_arrays():
    p, q = one(np.zeros((3, 4)), np.ones((3, 4))), one(np.zeros(5), dtype="float32")
    optimizer = optim.Adam([p, q])
    assert optimizer.nbytes == 0
    optimizer.step()
    assert optimizer.nbytes == 2 * 12 * 8
    p.grad, q.grad = None, np.ones(5, np.float32)
    optimizer.step()
    assert optimizer.nbytes == 2 * 12 * 8 + 2 * 5 * 4


def test_state_of_another_optimizer_is_refused():
    optimizer = optim.Adam([one([1.0, 2.0])])
    with pytest.raises(ValueError, match=r"'3.exp_avg' is for parameter 3, of 1 here"):
        optimizer.load_state_dict({"3.exp_avg": np.ones(2)})
    with pytest.raises(ValueError, match=r"'0.exp_avg' has shape \(3,\), the parameter \(2,\)"):
        optimizer.load_state_dict({"0.exp_avg": np.ones(3)})


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p: optim.SGD([]), ValueError, r"params: got none; pass model.parameters\(\)"),
        (lambda p: optim.SGD(iter(())), ValueError, "params: got none"),
        (lambda p: optim.SGD([p, p]), ValueError, "params: a parameter appears twice"),
        (lambda p: optim.SGD([{"params": p}, {"params": [p]}]), ValueError, "params: a parameter appears twice"),
        (lambda p: optim.SGD([p.data]), TypeError, "params: expected tensors, got ndarray"),
        (lambda p: optim.Adam([{"params": p, "momentum": 1}]), ValueError, r"unknown options \['momentum'\]; accepted"),
        (lambda p: optim.SGD(p, lr=-1), ValueError, "lr: got -1; 0 or more is accepted"),
        (lambda p: optim.SGD(p, lr=math.nan), ValueError, "lr: got nan; 0 or more is accepted"),
        (lambda p: optim.AdamW(p, weight_decay=-0.1), ValueError, "weight_decay: got -0.1"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), ValueError, r"betas: got \(0.9, 1.0\); two in \[0, 1\) are"),
        (lambda p: optim.Adam(p, betas=(0.9,)), ValueError, r"betas: got \(0.9,\); two in \[0, 1\) are"),
        (lambda p: optim.Adam(p, betas=0.9), ValueError, r"betas: got 0.9; two in \[0, 1\) are"),
        (lambda p: optim.Adam(p, lr="1e-3"), ValueError, "lr: got '1e-3'; 0 or more is accepted"),
        (lambda p: optim.Adam(5), TypeError, r"params: got int; .* model.parameters\(\)"),
        (lambda p: optim.Adam([{"lr": 1}]), ValueError, 'params: got dict among groups; {"params"'),
        (lambda p: optim.Adam([p * 2]), ValueError, "params: got a tensor that an operation made"),
        (lambda p: optim.SGD(p, nesterov=True), ValueError, "nesterov: needs momentum > 0 and dampening = 0"),
        (lambda p: optim.clip_grad_norm_([p], 0), ValueError, "max_norm: got 0; a positive number is accepted"),
        (lambda p: optim.CosineAnnealingLR(optim.SGD(p), 0), ValueError, "T_max: got 0; at least 1 is accepted"),
    ],
)
def test_errors_name_what_was_given_and_what_is_accepted(call, kind, message):
    with pytest.raises(kind, match=message):
        call(one([1.0]))


# --- clipping ---------------------------------------------------------------------------------------------------------


def test_clipping_scales_all_gradients_to_the_norm(xp):
    params = parameters(xp)
    for p in params[:3]:
        p.grad = xp.asarray(p.data * 3)
    grads = [backend.to_numpy(p.grad).copy() for p in params[:3]]
    norm = math.sqrt(sum((g * g).sum() for g in grads))
    assert optim.clip_grad_norm_(params, 0.5) == pytest.approx(norm, rel=1e-14)
    for p, g in zip(params, grads, strict=False):
        np.testing.assert_allclose(backend.to_numpy(p.grad), g * 0.5 / (norm + 1e-6), rtol=1e-14)
    assert params[3].grad is None


def test_clipping_leaves_small_gradients_alone():
    p = one([1.0], [0.3])
    assert optim.clip_grad_norm_([p], 1.0) == 0.3
    assert p.grad.tolist() == [0.3]


def test_clipping_takes_one_parameter_or_any_iterable():
    p = one([1.0, 1.0], [3.0, 4.0])
    assert optim.clip_grad_norm_(p, 10) == optim.clip_grad_norm_(iter([p]), 10) == 5
    assert optim.clip_grad_norm_([], 1.0) == 0


def test_clipping_keeps_the_dtype():
    p = one([1.0, 1.0], [3.0, 4.0], "float32")
    optim.clip_grad_norm_(p, 1.0)
    assert p.grad.dtype == "float32"


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr())
        schedule.step()
    return np.array(found)


def two_groups():
    return optim.SGD([{"params": [one([1.0])], "lr": 0.1}, {"params": [one([1.0])], "lr": 0.4}])


def test_a_lambda_multiplies_the_first_rate_of_each_group():
    found = rates(optim.LambdaLR(two_groups(), lambda t: 0.5**t), 4)
    np.testing.assert_array_equal(found, [[0.1 * f, 0.4 * f] for f in (1, 0.5, 0.25, 0.125)])


def test_cosine_annealing_goes_from_the_first_rate_to_eta_min():
    found = rates(optim.CosineAnnealingLR(two_groups(), T_max=10, eta_min=0.02), 11)
    np.testing.assert_allclose(found[0], [0.1, 0.4])
    np.testing.assert_allclose(found[5], [0.06, 0.21])  # half way: the mean of both ends
    np.testing.assert_allclose(found[10], [0.02, 0.02])


@pytest.mark.parametrize("make", [optim.get_linear_schedule_with_warmup, optim.get_cosine_schedule_with_warmup])
def test_warm_up_rises_linearly_and_the_rest_falls_to_zero(make):
    found = rates(make(two_groups(), 4, 12), 15)[:, 0] / 0.1
    np.testing.assert_allclose(found[:5], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found[8], 0.5)  # the middle of both falls
    np.testing.assert_allclose(found[12:], 0, atol=1e-15)  # and it stays there


@pytest.mark.parametrize("make", [optim.get_linear_schedule_with_warmup, optim.get_cosine_schedule_with_warmup])
def test_without_warm_up_the_first_rate_is_the_whole(make):
    assert make(two_groups(), 0, 10).get_last_lr() == [0.1, 0.4]


def test_a_resumed_schedule_has_the_same_rates_to_the_bit():
    going = optim.get_cosine_schedule_with_warmup(two_groups(), 3, 20)
    for _ in range(7):
        going.step()
    resumed = optim.get_cosine_schedule_with_warmup(two_groups(), 3, 20)
    resumed.go_to(7)
    np.testing.assert_array_equal(rates(going, 10), rates(resumed, 10))


def test_the_next_step_uses_the_new_rate():
    p = one([0.0], [1.0])
    optimizer = optim.SGD([p], lr=1.0)
    schedule = optim.LambdaLR(optimizer, lambda t: 10.0**t)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert p.data.tolist() == [-111]


def test_the_state_follows_a_model_that_changes_its_dtype():
    """Its numbers are kept, and what is computed from then on has the new dtype's digits."""
    p, q = one([1.0, -2.0]), one([1.0, -2.0])
    p.data = p.data.astype("float32")
    first, second = optim.Adam([p], lr=0.1), optim.Adam([q], lr=0.1)
    for _ in range(3):
        p.grad, q.grad = np.array([0.5, 0.25], "float32"), np.array([0.5, 0.25])
        first.step()
        second.step()
    p.data, p.grad = p.data.astype("float64"), np.array([0.1, 0.7])
    first.step()
    assert p.dtype == first.state_dict()["0.exp_avg"].dtype == "float64"
    np.testing.assert_allclose(
        first.state_dict()["0.exp_avg"], second.state_dict()["0.exp_avg"] * 0.9 + [0.01, 0.07], rtol=1e-6
    )
    assert first.state_dict()["0.step"].tolist() == [4]
