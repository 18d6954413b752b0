"""Work over threads: the same numbers as on one, whatever runs beside it."""

from __future__ import annotations

import threading
from functools import partial

import llama_cases as cases
import numpy as np
import pytest

from minipeft import LoraConfig, Tensor, batch_parts, blas, get_peft_model, no_grad, ops, threads
from minipeft.backend import count_flops
from minipeft.methods.lora_ga import weight_gradients
from minipeft.nn import Linear, Module
from minipeft.tensor import Held, is_grad_enabled, multi_result


@pytest.fixture
def two_threads(monkeypatch):
    """As on a machine with two processors, whatever this one has, and whatever the environment says."""
    monkeypatch.setattr(threads, "threads", lambda: 2)
    monkeypatch.setattr(batch_parts, "LEAST", 0)
    monkeypatch.setattr(ops.losses, "_LEAST", 0)
    if blas.openblas("openblas_set_num_threads") is None:
        pytest.skip("the number of BLAS threads cannot be set here")


# --- parts and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(0, 1), (1, 1), (7, 0), (1000, 999), (5, 1 << 17), ((1 << 18) + 3, 1)])
def test_parts_cover_every_row_once(n, width):
    seen = np.zeros(n, int)

    def work(start: int, stop: int) -> None:
        assert stop > start
        seen[start:stop] += 1

    threads.in_parts(work, n, np, width)
    assert (seen == 1).all()


def test_on_a_device_there_is_one_part():
    calls = []
    threads.in_parts(lambda start, stop: calls.append((start, stop)), 1 << 20, object(), 3)
    assert calls == [(0, 1 << 20)]


@pytest.mark.parametrize(("count", "n"), [(1, 3), (2, 1), (2, 9), (3, 100), (5, 7)])
def test_every_part_is_run_once(monkeypatch, count, n):
    monkeypatch.setattr(threads, "threads", lambda: count)
    seen = []
    threads.run_all([partial(seen.append, i) for i in range(n)])
    assert sorted(seen) == list(range(n))


def test_an_index_error_in_a_part_is_no_end_of_the_parts(monkeypatch):
    monkeypatch.setattr(threads, "threads", lambda: 2)
    with pytest.raises(IndexError, match="pop from empty list"):
        threads.run_all([[].pop, [].pop])


def test_results_come_in_the_order_of_the_tasks_each_from_its_own_thread(two_threads):
    both = threading.Barrier(2, timeout=30)  # passed only if the tasks run at the same time

    def task(i: int) -> tuple[int, int]:
        both.wait()
        return i, threading.get_ident()

    (a, first), (b, second) = threads.side_by_side([lambda: task(0), lambda: task(1)])
    assert (a, b) == (0, 1)
    assert first == threading.get_ident() != second


def test_tasks_see_the_settings_of_who_asked(two_threads):
    def look() -> tuple[bool, str, int]:
        return is_grad_enabled(), np.geterr()["over"], threads.available()

    with no_grad(), np.errstate(over="raise"):
        assert threads.side_by_side([look, look]) == [(False, "raise", 1)] * 2
    assert threads.side_by_side([look, look])[0][0] is True
    assert threads.available() == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_a_task_is_raised_when_all_have_ended(two_threads, broken):
    get_threads = blas.openblas("openblas_get_num_threads")
    before, ended = get_threads(), []

    def task(i: int) -> None:
        ended.append(i)
        if i == broken:
            raise ArithmeticError(f"task {i}")

    with pytest.raises(ArithmeticError, match=f"task {broken}"):
        threads.side_by_side([lambda: task(0), lambda: task(1)])
    assert sorted(ended) == [0, 1]
    assert get_threads() == before
    assert threads.available() == 2


def test_while_flops_are_counted_tasks_come_one_after_the_other(two_threads):
    with count_flops():
        assert threads.available() == 1
        assert len(set(threads.side_by_side([threading.get_ident] * 3))) == 1


# --- several outputs --------------------------------------------------------------------------------------------------


def _halves(x: Tensor) -> list[Tensor]:
    """x·2 and x·3, by one node; the gradients that came back are recorded."""
    data = x.data

    def backward(gradients: list) -> tuple:
        _halves.seen = [None if g is None else g.copy() for g in gradients]
        return (sum(k * g for k, g in zip((2, 3), gradients, strict=True) if g is not None) + 0 * data,)

    return multi_result("halves", [data * 2, data * 3], (x,), backward)


def test_every_output_of_an_operation_brings_its_gradient_back():
    x = Tensor(np.arange(3.0), requires_grad=True)
    a, b = _halves(x)
    (a + b * 10 + a * a).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * (1 + 2 * 2 * np.arange(3.0)) + 30)


def test_an_output_that_nobody_used_has_no_gradient():
    x = Tensor(np.arange(3.0), requires_grad=True)
    _, b = _halves(x)
    b.sum().backward()
    assert _halves.seen[0] is None
    np.testing.assert_array_equal(x.grad, 3)
    assert [t.requires_grad for t in _halves(x.detach())] == [False, False]


# --- a batch in parts -------------------------------------------------------------------------------------------------


def _gradients(model, ids, mask=None):
    model.zero_grad()
    loss = model.loss(ids, attention_mask=mask)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _models():
    return {
        "lora": lambda: get_peft_model(cases.llama(), LoraConfig(r=2, init_lora_weights=False)),
        "all weights": lambda: cases.llama().requires_grad_(True),
        "the last block": _last_block,
    }


def _last_block():
    model = cases.llama()
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return model


@pytest.mark.parametrize("kind", ["lora", "all weights", "the last block"])
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(two_threads, monkeypatch, kind, batch, checkpointing):
    model, rng = _models()[kind](), np.random.default_rng(1)
    ids = rng.integers(0, model.config.vocab_size, (batch, 5))
    mask = np.ones((batch, 5), int)
    mask[0, 3:] = 0
    model.model.checkpointing = checkpointing
    loss, parts = _gradients(model, ids, mask)
    assert _gradients(model, ids, mask)[0] == loss  # the same bits again
    monkeypatch.setattr(threads, "threads", lambda: 1)
    whole_loss, whole = _gradients(model, ids, mask)
    assert loss == pytest.approx(whole_loss, rel=1e-13)
    assert parts.keys() == whole.keys()
    for name, grad in whole.items():
        np.testing.assert_allclose(parts[name], grad, rtol=0, atol=1e-13, err_msg=name)
    assert not Held.live  # nothing stays read-only


def test_without_gradients_parts_give_the_logits_of_the_whole(two_threads, monkeypatch):
    model, ids = cases.llama(), np.arange(12).reshape(3, 4)
    with no_grad():
        parts = model(ids)
    assert not parts.requires_grad
    monkeypatch.setattr(threads, "threads", lambda: 1)
    np.testing.assert_allclose(parts.data, model(ids).data, atol=1e-13)


def test_flops_are_those_of_the_whole(two_threads, monkeypatch):
    model, ids = _models()["lora"](), np.arange(8).reshape(2, 4)
    with count_flops() as parts:
        model.loss(ids).backward()
    monkeypatch.setattr(threads, "threads", lambda: 1)
    with count_flops() as whole:
        model.loss(ids).backward()
    assert (parts.forward, parts.backward) == (whole.forward, whole.backward)


def test_with_dropout_the_batch_stays_whole(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "side_by_side", lambda tasks: pytest.fail("split"))
    layer = Linear(4, 4, rng=0)
    module = get_peft_model(_Net(layer), LoraConfig(r=2, lora_dropout=0.5, target_modules=["fc"]))
    batch_parts.over_batch(module, module.train(), Tensor(np.ones((2, 4), np.float32)))
    with pytest.raises(pytest.fail.Exception):
        batch_parts.over_batch(module, module.eval(), Tensor(np.ones((2, 4), np.float32)))


class _Net(Module):
    def __init__(self, fc):
        self.fc = fc

    def forward(self, x):
        return self.fc(x)


def test_whole_weights_train_on_the_whole_batch(two_threads, monkeypatch):
    model, ids = _models()["all weights"](), np.arange(8).reshape(2, 4)
    monkeypatch.setattr(threads, "side_by_side", lambda tasks: pytest.fail("split"))
    monkeypatch.setattr(batch_parts, "MOST", 0)
    for mode in (True, False):
        model.train(mode)
        model.model(ids)
    monkeypatch.setattr(batch_parts, "MOST", 1 << 24)
    with pytest.raises(pytest.fail.Exception):
        model.model(ids)


def test_lora_ga_s_budget_of_gradients_is_held_once(two_threads, monkeypatch):
    """Each part of a batch would hold the gradients of the whole group."""
    model, ids = cases.llama(), np.arange(8).reshape(2, 4)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    loss_fn = lambda model, batch: model.loss(batch)  # noqa: E731
    whole = []
    side_by_side = threads.side_by_side
    monkeypatch.setattr(threads, "side_by_side", lambda tasks: whole.append(len(tasks)) or side_by_side(tasks))
    found = dict(weight_gradients(model, names, [ids], loss_fn))
    assert max(whole, default=1) == 1
    assert list(found) == names
    assert threads.available() == 2


def test_a_second_backward_says_so(two_threads):
    model = _models()["lora"]()
    loss = model.loss(np.arange(8).reshape(2, 4))
    loss.backward()
    with pytest.raises(RuntimeError, match="freed"):
        loss.backward()


# --- the loss of a frozen head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [(), (0,), (0, 3, 4)])
@pytest.mark.parametrize("chunk", [1, 128])
def test_the_loss_of_a_frozen_head_is_that_of_a_trained_one(two_threads, ignored, chunk):
    rng = np.random.default_rng(0)
    x, w, targets = rng.standard_normal((6, 5)) * 10, rng.standard_normal((70, 5)), rng.integers(0, 70, 6)
    targets[list(ignored)] = -100
    found = []
    for trains in (False, True):
        inputs = Tensor(x, requires_grad=True)
        loss = ops.linear_cross_entropy(inputs, Tensor(w, requires_grad=trains), targets, chunk=chunk)
        (loss * 3).backward()
        found.append((loss.item(), inputs.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-13)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-13)
    assert (found[0][1][list(ignored)] == 0).all()
