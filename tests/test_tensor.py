"""Tensors and reverse mode: what backward gives, what it keeps, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import standin

from minipeft import Tensor, backend, no_grad, ops, optim, set_default_dtype
from minipeft.tensor import Held, is_grad_enabled, is_held, result


def trained(values, xp=np, dtype="float64"):
    return Tensor(xp.asarray(np.asarray(values, dtype=dtype)), requires_grad=True)


def frozen(values, xp=np, dtype="float64"):
    return Tensor(xp.asarray(np.asarray(values, dtype=dtype)))


@contextlib.contextmanager
def no_collector():
    """Objects go by reference counts alone: a reference cycle would keep them."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def held_bytes():
    """Bytes of the memory that graphs hold: an array and its views are counted once."""
    owners = {id(o): o for o in (a if a.base is None else a.base for a, *_ in Held.live.values())}
    return sum(o.nbytes for o in owners.values())


# --- what backward gives ----------------------------------------------------------------------------------------------


def test_gradients_of_several_backward_calls_add_up(xp):
    x = trained([1, 2, 3], xp)
    (x * x).sum().backward()
    (x * 3).sum().backward()
    np.testing.assert_array_equal(backend.to_numpy(x.grad), [5, 7, 9])
    x.zero_grad()
    assert x.grad is None


def test_broadcasting_is_undone(xp):
    x, row, number = trained(np.ones((2, 3)), xp), trained([1, 2, 3], xp), trained(2.0, xp)
    (x * row + number).sum().backward()
    np.testing.assert_array_equal(backend.to_numpy(row.grad), [2, 2, 2])
    assert backend.to_numpy(number.grad) == 6
    assert (x.grad.shape, row.grad.shape, number.grad.shape) == ((2, 3), (3,), ())


def test_a_tensor_that_is_used_several_times_gets_the_sum_of_its_gradients(xp):
    x = trained([2.0, 3.0], xp)
    y = x * x
    (y + y * y + x).sum().backward()
    np.testing.assert_array_equal(backend.to_numpy(x.grad), [2 * 2 + 4 * 8 + 1, 2 * 3 + 4 * 27 + 1])


def test_backward_takes_the_gradient_of_the_output(xp):
    x = trained([1.0, 2.0], xp)
    for grad in (xp.asarray(np.array([3.0, 4.0])), frozen([3.0, 4.0], xp)):
        x.zero_grad()
        (x * x).backward(grad)
        np.testing.assert_array_equal(backend.to_numpy(x.grad), [6, 16])


def test_a_leaf_is_its_own_gradient(xp):
    x, seed = trained([1.0, 2.0], xp), xp.asarray(np.array([3.0, 4.0]))
    x.backward(seed)
    x.backward(seed)
    np.testing.assert_array_equal(backend.to_numpy(x.grad), [6, 8])
    np.testing.assert_array_equal(backend.to_numpy(seed), [3, 4])


def test_detached_values_have_no_gradient():
    x = trained([1.0, 2.0])
    (x * x.detach()).sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 2])
    assert x.detach().data is x.data


def test_tensors_that_do_not_lead_to_the_output_keep_no_gradient():
    x, other = trained([1.0]), trained([1.0])
    (other * 2).sum()
    (x * 2).sum().backward()
    assert other.grad is None


def test_only_leaves_keep_a_gradient():
    x = trained([1.0])
    y = x * 2
    (y * 3).sum().backward()
    assert (y.grad, y.is_leaf, x.is_leaf) == (None, False, True)


def test_leaf_gradients_share_no_memory():
    """`add` hands one array to both inputs, and `sum` a view that repeats one number."""
    a, b = trained(np.ones((2, 3))), trained(np.ones((2, 3)))
    (a + b).sum().backward()
    assert not np.may_share_memory(a.grad, b.grad)
    a.grad[0, 0] = 7
    assert a.grad.tolist() == [[7, 1, 1], [1, 1, 1]]
    assert b.grad.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_seed_gradient_stays_as_it_was_when_backward_adds_to_it():
    x, seed = trained([1.0, 2.0]), np.ones(2)
    y = x + 0
    (y + y + y).backward(seed)
    np.testing.assert_array_equal(seed, [1, 1])
    np.testing.assert_array_equal(x.grad, [3, 3])


def test_a_gradient_that_is_a_view_of_another_is_not_added_to_in_place():
    """`reshape` hands on a view of the gradient it gets, which here also waits for `v`."""
    x, seed = trained([1.0, 2.0]), np.ones(2)
    h, v = x + 0, x * 1
    k = h * 3
    (h.reshape(2) + v + k).backward(seed)
    np.testing.assert_array_equal(seed, [1, 1])
    np.testing.assert_array_equal(x.grad, [5, 5])


# --- long chains and memory -------------------------------------------------------------------------------------------


def chain(x, length):
    for _ in range(length):
        x = x + 1
    return x


def test_a_chain_of_100000_operations_has_a_backward():
    x = trained(0.0)
    chain(x, 100_000).backward()
    assert x.grad == 1


def test_a_chain_of_100000_operations_can_be_dropped():
    x = trained(0.0)
    y = chain(x * x, 100_000)
    del y
    gc.collect()
    assert not is_held(x.data)


def test_a_value_that_no_gradient_needs_is_freed_while_the_graph_lives():
    x = trained(np.ones((4, 5)))
    h = x + 1.0  # neither + nor the sum needs h's values
    values = weakref.ref(h.data)
    loss = h.sum()
    del h
    assert values() is None
    loss.backward()
    assert (x.grad == 1).all()


def test_a_dropped_graph_is_freed_at_once():
    x = trained(np.ones(10))
    with no_collector():
        y = x.exp()
        values = weakref.ref(y.data)
        z = (y * y).sum()
        del y
        assert values() is not None
        del z
        assert values() is None


def test_backward_frees_each_operation_before_the_next():
    """When the first operation's turn comes, the arrays that all later ones held are gone."""
    x, values, alive = trained(np.ones(10)), [], []
    with no_collector():
        y = result("probe", x.data + 0, (x, lambda g: alive.extend([v() is not None for v in values]) or g))
        for _ in range(5):
            y = y.tanh()
            values.append(weakref.ref(y.data))
        loss = y.sum()
        del y
        loss.backward()
    assert alive == [False] * 5


def test_backward_needs_no_more_memory_than_a_few_arrays_on_top_of_the_graph():
    x, mebibyte = trained(np.zeros(1 << 18), dtype="float32"), 1 << 20
    y = x
    for _ in range(20):
        y = y.tanh()
    loss = y.sum()
    del y
    tracemalloc.start()
    loss.backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * mebibyte  # the gradient that comes, the one that goes, and two of tanh's own; the graph holds 20


def test_a_graph_that_was_walked_holds_nothing():
    x = trained(np.ones((3, 4)))
    before = held_bytes()
    loss = ops.softmax(ops.linear(x, trained(np.ones((5, 4)))), 0).sum()
    assert held_bytes() > before
    loss.backward()
    assert held_bytes() == before


# --- nothing for what is frozen ---------------------------------------------------------------------------------------


def test_a_frozen_weight_costs_no_product_and_keeps_no_input():
    """The point of adapters: dW = gᵀ x is not computed, so x need not be kept for it."""
    x, w, v = trained(np.ones((6, 4))), frozen(np.ones((5, 4))), frozen(np.ones((2, 5)))
    held = held_bytes()
    with backend.count_flops() as flops:
        h = x + 0
        y = ops.linear(ops.linear(h, w), v)
        assert not is_held(h.data)
        assert held_bytes() - held == w.data.nbytes + v.data.nbytes
        y.sum().backward()
    assert flops.forward == 2 * 6 * 4 * 5 + 2 * 6 * 5 * 2
    assert flops.backward == flops.forward  # dx alone: one product of the same size for each; with dW it were two
    assert w.grad is None


def test_a_trained_weight_costs_one_product_more_and_keeps_its_input():
    x, w = trained(np.ones((6, 4))), trained(np.ones((5, 4)))
    with backend.count_flops() as flops:
        h = x + 0
        y = ops.linear(h, w)
        assert is_held(h.data)
        y.sum().backward()
    assert flops.backward == 2 * flops.forward


def test_inputs_that_need_no_gradient_cost_no_product():
    x, w = frozen(np.ones((6, 4))), trained(np.ones((5, 4)))
    with backend.count_flops() as flops:
        ops.linear(x, w).sum().backward()
    assert flops.backward == flops.forward == flops.counts["backward"]["linear"] == 2 * 6 * 4 * 5
    assert x.grad is None


def test_with_nothing_to_train_there_is_no_graph():
    held = held_bytes()
    y = ops.softmax(ops.linear(frozen(np.ones((6, 4))), frozen(np.ones((5, 4)))))
    assert not y.requires_grad
    assert y._node is None
    assert held_bytes() == held


def test_flops_are_counted_by_operation_and_by_phase():
    a, b = trained(np.ones((2, 3))), trained(np.ones((3, 4)))
    q = trained(np.ones((1, 2, 3, 4)))
    with backend.count_flops() as flops:
        (a @ b).sum().backward()
        ops.scaled_dot_product_attention(q, q, q).sum().backward()
    product, attention = 2 * 2 * 3 * 4, 2 * 2 * (2 * 3 * 3 * 4)
    assert flops.counts["forward"] == {"matmul": product, "attention": attention}
    assert flops.counts["backward"] == {"matmul": 2 * product, "attention": 2 * attention}
    assert flops.total == 3 * (product + attention)


# --- no_grad ----------------------------------------------------------------------------------------------------------


def test_no_grad_builds_no_graph_inside_and_one_again_outside():
    x = trained([1.0])
    with no_grad():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad


def test_no_grad_nests():
    with no_grad():
        with no_grad():
            pass
        assert not is_grad_enabled()
    assert is_grad_enabled()


def test_no_grad_decorates_functions_and_they_may_call_themselves():
    @no_grad()
    def double(x, times):
        return x if not times else double(x * 2, times - 1)

    assert not double(trained([1.0]), 3).requires_grad
    assert is_grad_enabled()


def test_calls_of_a_decorated_function_in_two_threads_share_nothing():
    """The first in is the first out: from a stack that both used each would take the other's setting."""
    call = no_grad()(lambda entered, leave: (entered.set(), leave.wait(10)))
    one_in, two_in, one_out = threading.Event(), threading.Event(), threading.Event()
    after = {}

    def one():
        with no_grad():
            call(one_in, two_in)
            after["one"] = is_grad_enabled()
        one_out.set()

    def two():
        one_in.wait(10)
        call(two_in, one_out)
        after["two"] = is_grad_enabled()

    threads = [threading.Thread(target=target) for target in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == {"one": False, "two": True}


def test_no_grad_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert is_grad_enabled()


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b,
        lambda a, b: a < b,
        lambda a, b: a * b.data,
        lambda a, b: b.data * a,
        lambda a, b: ops.concatenate([a, b]),
        lambda a, b: ops.where(True, a, b),
        ops.linear,
        ops.mse_loss,
    ],
)
def test_float32_and_float64_do_not_mix(mix):
    single, double = Tensor(np.ones((2, 2), np.float32)), Tensor(np.ones((2, 2)))
    with pytest.raises(TypeError, match=r"float(32|64) and float(32|64) do not mix; convert one with .astype\(\)"):
        mix(single, double)


@pytest.mark.parametrize("number", [2, 2.5, True, np.float64(2.5), np.float32(2.5), np.int64(2)])
def test_numbers_take_the_dtype_of_the_tensor(xp, number):
    x = trained([1.0, 2.0], xp, "float32")
    for y in (x * number, number * x, x + number, number - x, x / number, x > number):
        assert y.dtype in ("float32", "bool")


def test_integers_become_floats_beside_floats_and_beside_fractions():
    whole, half = Tensor([1, 2]), Tensor([0.5, 0.5])
    for y in (whole * half, half * whole, whole * 0.5, 0.5 + whole, whole * half.data, half.data - whole, whole / 2.0):
        assert y.dtype == "float32"
        assert y.data.tolist() in ([0.5, 1], [1.5, 2.5], [-0.5, -1.5])
    assert (whole * 2).dtype == (whole + whole).dtype == "int64"


def test_python_floats_take_the_default_dtype():
    assert Tensor([1.0, 2.0]).dtype == "float32"
    set_default_dtype("float64")
    try:
        assert Tensor([1.0, 2.0]).dtype == "float64"
    finally:
        set_default_dtype("float32")
    assert Tensor(np.array([1.0])).dtype == "float64"  # arrays keep theirs


def test_the_default_dtype_is_single_or_double():
    with pytest.raises(TypeError, match="dtype: got float16; accepted are float32 and float64"):
        set_default_dtype("float16")


def test_astype_brings_the_gradient_back_in_the_own_dtype(xp):
    x = trained([1.0, 2.0], xp)
    y = x.astype("float32")
    assert y.dtype == "float32"
    (y * y).sum().backward()
    assert x.grad.dtype == "float64"
    assert x.grad.tolist() == [2, 4]
    assert not x.astype("int64").requires_grad


@pytest.mark.parametrize(
    "make",
    [
        ops.exp, ops.log, ops.sqrt, ops.tanh, ops.sigmoid, ops.silu, ops.gelu, ops.softmax, ops.log_softmax, ops.mean,
        ops.layer_norm, ops.rms_norm, lambda x: ops.swiglu(x, x), lambda x: x / 2, lambda x: x / x,
        lambda x: ops.mse_loss(x, x), lambda x: ops.rope(x, *ops.rope_table(1, 2)), lambda x: ops.dropout(x, rng=0),
        lambda x: ops.cross_entropy(x, [0]), lambda x: ops.linear_cross_entropy(x, x, [0]),
        lambda x: ops.scaled_dot_product_attention(*[x.reshape(1, 1, 1, 2)] * 3),
    ],
)  # fmt: skip
def test_operations_that_need_floats_make_integers_the_default_dtype(make):
    whole = Tensor([[1, 2]])
    assert make(whole).dtype == "float32"
    np.testing.assert_array_equal(make(whole).data, make(whole.astype("float32")).data)


# --- writing to arrays that a graph needs -----------------------------------------------------------------------------


def test_writing_between_forward_and_backward_raises():
    x = trained([1.0, 2.0])
    y = (x * x).sum()
    with pytest.raises(ValueError, match="read-only"):
        x.data[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        x.data += 1
    y.backward()
    np.testing.assert_array_equal(x.grad, [2, 4])


def test_arrays_are_writable_after_backward():
    x = trained([1.0, 2.0])
    (x * x).sum().backward()
    x.data[0] = 5
    assert x.data[0] == 5


def test_arrays_are_writable_when_the_graph_is_dropped():
    x = trained([1.0, 2.0])
    y = (x * x).sum()
    assert not x.data.flags.writeable
    del y
    x.data[0] = 5
    assert x.data[0] == 5


def test_arrays_are_writable_when_the_last_of_several_graphs_is_gone():
    x = trained([1.0, 2.0])
    first, second = (x * x).sum(), x.exp() * x
    first.backward()
    assert not x.data.flags.writeable
    del second
    assert x.data.flags.writeable


def test_outputs_are_protected_where_the_gradient_needs_them():
    x = trained([1.0, 2.0])
    y = x.exp()
    with pytest.raises(ValueError, match="read-only"):
        y.data[0] = 0
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, np.exp([1, 2]))


def test_arrays_that_no_gradient_needs_can_be_written_to():
    x = trained([1.0, 2.0])
    y = (x + 1).sum()
    x.data[0] = 5
    y.backward()
    np.testing.assert_array_equal(x.grad, [1, 1])


def test_views_are_protected_with_the_array_they_look_into():
    owner = np.ones((2, 3))
    x = Tensor(owner[0], requires_grad=True)
    y = (x * x).sum()
    for array in (owner, x.data, owner[1:], x.data[:1]):
        assert not array.flags.writeable
    y.backward()
    owner[0] = 2
    x.data[0] = 3
    assert owner.tolist() == [[3, 2, 2], [1, 1, 1]]


def test_read_only_arrays_stay_read_only():
    x = Tensor(np.broadcast_to(np.ones(3), (2, 3)), requires_grad=True)
    (x * x).sum().backward()
    assert not x.data.flags.writeable


STEPS = {"SGD": lambda p: optim.SGD(p, lr=0.5), "AdamW": lambda p: optim.AdamW(p, lr=0.5)}
USES = {
    "mul": lambda x, w: x * w,
    "linear": lambda x, w: ops.linear(x, w),
    "matmul of a row": lambda x, w: x.reshape(-1)[:3] @ w,
    "attention": lambda x, w: ops.scaled_dot_product_attention(*[x.reshape(1, 1, 3, 3) * w] * 3),
    "exp": lambda x, w: x.exp() * w,
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("view", [False, True])
def test_an_optimizer_step_between_forward_and_backward_does_not_change_the_gradient(xp, kind, use, view):
    def leaves():
        x, w = xp.asarray(np.arange(1.0, 10).reshape(3, 3)), xp.asarray(np.arange(9.0, 0, -1).reshape(3, 3) / 9)
        return [Tensor(a[:, :] if view else a, requires_grad=True) for a in (x, w)]

    expected, params = leaves(), leaves()
    USES[use](*expected).sum().backward()
    loss = USES[use](*params).sum()
    for p in params:
        p.grad = xp.ones(p.shape, dtype="float64")
    STEPS[kind](params).step()
    for p in params:
        p.grad = None
    loss.backward()
    for p, e in zip(params, expected, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(p.grad), backend.to_numpy(e.grad))
        assert (backend.to_numpy(p.data) != backend.to_numpy(e.data)).all()  # and the step was taken


def test_tensors_are_not_assigned_to():
    x = trained([1.0, 2.0])
    with pytest.raises(TypeError, match=r"tensors are not assigned to: use ops.where"):
        x[0] = 1.0
    y = x
    y += 1  # makes a new tensor
    np.testing.assert_array_equal(x.data, [1, 2])


# --- numbers, arrays, NumPy's functions -------------------------------------------------------------------------------


def test_a_tensor_becomes_an_array_and_numbers():
    x = Tensor([[1.5]])
    assert np.asarray(x) is x.data
    assert np.array(x) is not x.data
    assert np.asarray(x, dtype="float64").dtype == "float64"
    assert (float(x), int(x), bool(x), x.item()) == (1.5, 1, True, 1.5)
    assert np.asarray(Tensor([1, 2])).tolist() == [1, 2]


def test_a_device_tensor_becomes_an_array_only_when_asked():
    x = frozen([1.0], standin)
    with pytest.raises(TypeError, match=r"implicit conversion of a device tensor to NumPy; call .numpy\(\)"):
        np.asarray(x)
    assert x.numpy().tolist() == [1.0]


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "tanh", "negative"])
def test_numpy_functions_of_one_tensor_are_operations(name):
    x = trained([0.5, 2.0])
    y = getattr(np, name)(x)
    assert isinstance(y, Tensor)
    assert y.requires_grad
    np.testing.assert_array_equal(y.data, getattr(np, name)(x.data))


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "**", "@", "==", "!=", "<", "<=", ">", ">="])
def test_arrays_and_tensors_mix_on_either_side(sign):
    a, b = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    expected = eval(f"a {sign} b", {"a": a, "b": b})
    for left, right in ((trained(a), b), (a, trained(b)), (trained(a), trained(b))):
        y = eval(f"left {sign} right", {"left": left, "right": right})
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, expected)
        assert y.requires_grad == (sign in "+-**/@")


def test_a_device_array_and_a_tensor_mix_on_either_side():
    a, x = standin.asarray(np.array([1.0, 2.0])), trained([3.0, 4.0], standin)
    for y in (a * x, x * a):
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.numpy(), [3, 8])


def test_numpy_numbers_and_tensors_mix_on_either_side(xp):
    x = trained([1.0, 2.0], xp)
    for y in (np.float64(2) * x, x * np.float64(2)):
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.numpy(), [2, 4])


def test_functions_without_a_gradient_are_refused():
    x = trained([1.0])
    for call in (lambda: np.sin(x), lambda: np.add(x, 1, out=np.zeros(1)), lambda: np.add.reduce(x)):
        with pytest.raises(TypeError, match=r"has no gradient here; use minipeft\.ops"):
            call()


def test_two_array_libraries_do_not_mix():
    with pytest.raises(TypeError, match=r"add: one operand is numpy's, the other standin's; use .to\(\)"):
        frozen([1.0]) + frozen([1.0], standin)


def test_tensors_are_compared_by_element_and_hashed_by_identity():
    x, y = Tensor([1.0, 2.0]), Tensor([1.0, 3.0])
    assert (x == y).data.tolist() == [True, False]
    assert len({x, y, x}) == 2


def test_tensors_can_be_taken_apart(xp):
    x = trained([[1.0, 2.0], [3.0, 4.0]], xp)
    first, second = x
    (first * second).sum().backward()
    np.testing.assert_array_equal(backend.to_numpy(x.grad), [[3, 4], [1, 2]])
    assert len(x) == 2


def test_a_number_is_no_sequence():
    """Without a word, `sum(loss)` would be 0."""
    with pytest.raises(TypeError, match="a tensor without axes"):
        sum(Tensor(3.0))


def test_one_number_is_formatted_as_python_formats_it():
    assert f"{Tensor(3.14159):.2f} {Tensor([2]):03d}" == "3.14 002"
    assert f"{Tensor([1.0, 2.0])}" == "Tensor([1., 2.], shape=(2,), float32)"


def test_leaves_are_copied_deeply_and_graphs_are_not():
    x = trained([1.0, 2.0])
    y = x * x
    copied = copy.deepcopy(x)
    assert copied.requires_grad
    assert copied.data.flags.writeable
    assert not np.shares_memory(copied.data, x.data)
    with pytest.raises(TypeError, match=r"deepcopy: a tensor that 'mul' made has a graph.*\.detach\(\)"):
        copy.deepcopy(y)


def test_the_printed_form_shows_values_shape_dtype_and_operation():
    assert repr(Tensor([1.0, 2.0])) == "Tensor([1., 2.], shape=(2,), float32)"
    assert repr(trained([1.0])) == "Tensor([1.], shape=(1,), float64, requires_grad=True)"
    assert repr(trained([1.0]).exp()) == "Tensor([2.7183], shape=(1,), float64, op=exp)"
    assert repr(frozen([1.0], standin)) == "Tensor([1.], shape=(1,), float64)"


def test_a_tensor_keeps_the_array_it_is_made_of(xp):
    array = xp.zeros((2, 3), dtype="float32")
    assert Tensor(array).data is array
    assert Tensor(Tensor(array)).data is array


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_second_backward_says_that_the_graph_is_freed():
    loss = (trained([1.0]) * 2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"the graph of this 'sum' is freed, .* run forward again"):
        loss.backward()


def test_a_second_backward_through_a_shared_part_says_which_part_is_freed():
    x = trained([1.0, 2.0])
    shared = x.exp()
    first, second = shared.sum(), (shared * 2).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="the graph of this 'exp' is freed"):
        second.backward()
    np.testing.assert_array_equal(x.grad, np.exp([1, 2]))  # nothing was added


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Tensor([1, 2], requires_grad=True), TypeError, "requires_grad: only floats have gradients, got int64"),
        (lambda: Tensor(["a"]), TypeError, "data: expected numbers, got list of dtype <U1"),
        (lambda: Tensor([[1.0], [1.0, 2.0]]), TypeError, "data: rows of different lengths"),
        (lambda: Tensor(None), TypeError, "data: expected numbers, got NoneType"),
        (lambda: frozen([1.0]).backward(), RuntimeError, "no tensor that made this one requires a gradient"),
        (lambda: (trained([1.0, 2.0]) * 2).backward(), ValueError, r"shape \(2,\) is not one number; pass grad"),
        (
            lambda: (trained([1.0]) * 2).backward(np.ones(3)),
            ValueError,
            r"grad: got shape \(3,\), the tensor has",
        ),
        (lambda: frozen([1.0, 2.0]).item(), ValueError, r"the tensor has 2 elements, shape \(2,\); it needs one"),
        (lambda: float(frozen([1.0, 2.0])), ValueError, "the tensor has 2 elements"),
        (lambda: bool(frozen([1.0, 2.0]) > 0), ValueError, "the tensor has 2 elements"),
        (lambda: len(frozen(1.0)), TypeError, r"len\(\) of a tensor without axes"),
        (lambda: backend.device_namespace("tpu"), ValueError, 'device: got \'tpu\'; accepted are "cpu", "cuda"'),
        (
            lambda: backend.generator("seed"),
            TypeError,
            "rng: expected a .* or an int seed, got str",
        ),
    ],
)
def test_errors_name_what_was_given_and_what_is_accepted(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_the_same_seed_draws_the_same_numbers():
    assert backend.generator(3).random() == backend.generator(np.random.default_rng(3)).random()
