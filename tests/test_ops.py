"""Operations: values against PyTorch's numbers, gradients against central differences, what holds for all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import types
from unittest import mock

import cases
import numpy as np
import pytest
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft import Tensor, backend, gradcheck, ops
from minipeft.tensor import Held, result

every_case = pytest.mark.parametrize("name", CASES)

SEEDS = st.integers(0, 99)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)  # size-1 and empty axes among them
FULL_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)


def leaf(xp, shape, seed=0, positive=False):
    """A float64 tensor that trains, of numbers that are never equal."""
    values = np.random.default_rng([seed, len(shape)]).standard_normal(shape)
    return Tensor(xp.asarray(0.4 + abs(values) if positive else values), requires_grad=True)


def axes_of(shape):
    """None, one axis, or several, counted from either end."""
    n = len(shape)
    if not n:
        return st.none()
    one = st.integers(-n, n - 1)
    return st.none() | one | st.lists(one, unique_by=lambda i: i % n, max_size=n).map(tuple)


# --- gradients against central differences ----------------------------------------------------------------------------

ELEMENTWISE = {
    "neg": ops.neg,
    "exp": ops.exp,
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "relu": ops.relu,
    "silu": ops.silu,
    "gelu": ops.gelu,
    "gelu tanh": lambda x: ops.gelu(x, approximate="tanh"),
    "dropout": lambda x: ops.dropout(x, 0.3, rng=0),
    "cube": lambda x: x**3,
    "zeroth power": lambda x: x**0,
    "itself twice": lambda x: x * x + x,
    "number after": lambda x: (x + 1) * 2.5 - 3 * x / 4,
    "number before": lambda x: 1 - 2.5 * x,
    "numpy number before": lambda x: np.float64(2.5) * x + np.int64(2),
}
POSITIVE = {
    "log": ops.log,
    "sqrt": ops.sqrt,
    "one over": lambda x: 2 / x,
    "root": lambda x: x**0.5,
    "exponent": lambda x: 1.5**x,
    "to itself": lambda x: x**x,
}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *POSITIVE])
@given(shape=SHAPES, seed=SEEDS)
def test_gradients_of_elementwise_operations(xp, name, shape, seed):
    operation = (ELEMENTWISE | POSITIVE)[name]
    gradcheck(operation, leaf(xp, shape, seed, positive=name in POSITIVE))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "power"])
@given(shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=3, max_side=3), seed=SEEDS)
def test_gradients_of_arithmetic_on_shapes_that_broadcast(xp, name, shapes, seed):
    a, b = (leaf(xp, shape, seed + i, positive=name in ("div", "power")) for i, shape in enumerate(shapes.input_shapes))
    gradcheck(getattr(ops, name), [a, b])


@given(
    shapes=hnp.mutually_broadcastable_shapes(signature="(m?,k),(k,n?)->(m?,n?)", max_dims=2, min_side=0, max_side=3),
    seed=SEEDS,
)
def test_gradients_of_matmul_with_rows_columns_and_broadcast_axes(xp, shapes, seed):
    a, b = (leaf(xp, shape, seed + i) for i, shape in enumerate(shapes.input_shapes))
    gradcheck(lambda a, b: a @ b, [a, b])


@pytest.mark.parametrize("name", ["sum", "mean", "max"])
@given(data=st.data(), shape=FULL_SHAPES, keepdims=st.booleans(), seed=SEEDS)
def test_gradients_of_reductions(xp, name, data, shape, keepdims, seed):
    axis = data.draw(axes_of(shape))
    gradcheck(lambda x: getattr(ops, name)(x, axis, keepdims), leaf(xp, shape, seed))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_the_sum_of_nothing_is_zero_and_has_a_gradient(xp, shape):
    x = leaf(xp, shape)
    x.sum().backward()
    assert x.sum().item() == 0
    assert x.grad.shape == shape


@given(data=st.data(), shape=SHAPES, seed=SEEDS)
def test_gradients_of_reshape_and_transpose(xp, data, shape, seed):
    x, n = leaf(xp, shape, seed), len(shape)
    order = data.draw(st.permutations(range(n)))
    negative = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    axes = [i - n if minus else i for i, minus in zip(order, negative, strict=True)]
    gradcheck(lambda x: x.reshape(*reversed(shape)) if n else x.reshape(1), x)
    gradcheck(lambda x: x.reshape((-1,)) if x.size else x, x)
    gradcheck(lambda x: ops.transpose(x, axes), x)
    gradcheck(lambda x: x.T, x)
    if n:
        gradcheck(lambda x: x.swapaxes(axes[0], axes[-1]), x)


@given(data=st.data(), shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_basic_indexing(xp, data, shape, seed):
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    gradcheck(lambda x: x[index], leaf(xp, shape, seed))


@given(data=st.data(), shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_integer_arrays_that_name_elements_more_than_once(xp, data, shape, seed):
    index = data.draw(hnp.integer_array_indices(shape, result_shape=hnp.array_shapes(max_dims=2, max_side=5)))
    index = tuple(xp.asarray(i) for i in index)
    gradcheck(lambda x: x[index], leaf(xp, shape, seed))


@given(data=st.data(), shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_boolean_masks(xp, data, shape, seed):
    mask = xp.asarray(data.draw(hnp.arrays(bool, shape[: data.draw(st.integers(1, len(shape)))])))
    gradcheck(lambda x: x[mask], leaf(xp, shape, seed))


MIXED = {
    "integers and a slice": lambda xp: (xp.asarray([1, 1, 0]), slice(1, None)),
    "a slice and integers": lambda xp: (slice(None, None, -1), xp.asarray([2, 2])),
    "integers, new axis, ellipsis": lambda xp: (xp.asarray([0, 1]), None, ...),
    "integers that broadcast": lambda xp: (xp.asarray([[0], [1]]), xp.asarray([1, 1, 2])),
    "an integer and integers": lambda xp: (1, xp.asarray([0, 0, 3]), slice(None, 2)),
    "separated integers": lambda xp: (xp.asarray([1, 1]), slice(None), xp.asarray([1, 1])),
    "a mask and integers": lambda xp: (xp.asarray([True, False]), xp.asarray([1, 2])),
    "a list": lambda xp: [1, 0, 1],
    "lists": lambda xp: ([1, 0, 1], [2, 2, 2]),
    "a host array": lambda xp: np.asarray([1, 0, 1]),
    "a tensor": lambda xp: Tensor(xp.asarray([1, 1])),
    "a tensor without axes": lambda xp: Tensor(xp.asarray(1)),
    "negative integers": lambda xp: xp.asarray([-1, 1, -2]),
    "a numpy integer": lambda xp: np.int64(1),
}


@pytest.mark.parametrize("kind", MIXED)
def test_gradients_of_mixed_indices(xp, kind):
    index = MIXED[kind](xp)
    gradcheck(lambda x: x[index], leaf(xp, (2, 4, 3)))


@given(data=st.data(), shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_concatenate_and_stack(xp, data, shape, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    i = axis % len(shape)
    parts = [leaf(xp, (*shape[:i], n, *shape[i + 1 :]), seed + k) for k, n in enumerate(lengths)]
    gradcheck(lambda *xs: ops.concatenate(xs, axis), parts)
    place = data.draw(st.integers(-len(shape) - 1, len(shape)))
    gradcheck(lambda *xs: ops.stack(xs, place), [leaf(xp, shape, seed + k) for k in range(len(lengths))])


@given(
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=3, min_side=0, max_dims=3, max_side=3),
    seed=SEEDS,
    data=st.data(),
)
def test_gradients_of_where(xp, shapes, seed, data):
    condition_shape, *rest = shapes.input_shapes
    condition = xp.asarray(data.draw(hnp.arrays(bool, condition_shape)))
    gradcheck(lambda a, b: ops.where(condition, a, b), [leaf(xp, s, seed + i) for i, s in enumerate(rest)])


@pytest.mark.parametrize("condition", [True, False, [True, False, True], [1, 0, 2], np.array([0.0, 1.0, 0.5])])
def test_where_takes_any_condition_and_numbers(xp, condition):
    a, b = leaf(xp, (2, 3), 1), leaf(xp, (2, 3), 2)
    gradcheck(lambda a, b: ops.where(condition, a, b), [a, b])
    gradcheck(lambda a: ops.where(condition, a, 0.5) + ops.where(condition, 2, a), a)


@pytest.mark.parametrize("index", [lambda i: i, lambda i: (slice(None), i), lambda i: (i, i), Tensor])
def test_an_index_may_be_written_to_after_it_was_used(index):
    ids, x, untouched = np.array([0, 2, 2]), leaf(np, (3, 3)), leaf(np, (3, 3))
    out = x[index(ids)].sum()
    ids[:] = 1
    out.backward()
    untouched[index(np.array([0, 2, 2]))].sum().backward()
    np.testing.assert_array_equal(x.grad, untouched.grad)


@given(ids=hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0), elements=st.integers(0, 4)))
def test_gradients_of_embedding(xp, ids):
    gradcheck(lambda w: ops.embedding(xp.asarray(ids), w), leaf(xp, (5, 3)))


@given(lead=SHAPES, d=st.integers(1, 4), out=st.integers(1, 3), bias=st.booleans(), seed=SEEDS)
def test_gradients_of_linear(xp, lead, d, out, bias, seed):
    shapes = [(*lead, d), (out, d), *[(out,)] * bias]
    gradcheck(ops.linear, [leaf(xp, shape, seed + i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@given(data=st.data(), shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_softmax(xp, name, data, shape, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    gradcheck(lambda x: getattr(ops, name)(x, axis), leaf(xp, shape, seed))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@given(shape=FULL_SHAPES.filter(lambda s: s[-1] > 1), affine=st.integers(0, 2), seed=SEEDS)
def test_gradients_of_normalization(xp, name, shape, affine, seed):
    affine = min(affine, 2 if name == "layer_norm" else 1)
    inputs = [leaf(xp, shape, seed), *[leaf(xp, shape[-1:], seed + 1 + i) for i in range(affine)]]
    gradcheck(lambda x, *wb: getattr(ops, name)(x, *wb, eps=1e-3), inputs)


def test_layer_norm_takes_a_bias_without_a_weight(xp):
    gradcheck(lambda x, b: ops.layer_norm(x, bias=b), [leaf(xp, (2, 4)), leaf(xp, (4,), 1)])


@given(
    lead=hnp.array_shapes(min_dims=0, max_dims=2, max_side=3), t=st.integers(1, 3), half=st.integers(1, 3), seed=SEEDS
)
def test_gradients_of_rope(xp, lead, t, half, seed):
    cos, sin = (xp.asarray(table) for table in ops.rope_table(t, 2 * half, dtype="float64"))
    gradcheck(lambda x: ops.rope(x, cos, sin), leaf(xp, (*lead, t, 2 * half), seed))


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    t=st.integers(1, 3),
    s=st.integers(1, 4),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "booleans", "floats"]),
    queries=st.integers(1, 3),
    seed=SEEDS,
)
def test_gradients_of_attention(xp, batch, kv_heads, group, t, s, causal, mask, queries, seed):
    q = leaf(xp, (batch, kv_heads * group, t, 2), seed)
    k, v = leaf(xp, (batch, kv_heads, s, 2), seed + 1), leaf(xp, (batch, kv_heads, s, 2), seed + 2)
    rng = np.random.default_rng(seed)
    masks = {"none": None, "booleans": rng.random((batch, 1, t, s)) < 0.7, "floats": rng.standard_normal((t, s))}
    attn_mask = None if masks[mask] is None else xp.asarray(masks[mask])
    with mock.patch.object(ops.attention, "QUERIES", queries):  # in a block
        gradcheck(lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, attn_mask, causal), [q, k, v])


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@given(data=st.data(), n=st.integers(1, 5), vocabulary=st.integers(1, 4), chunk=st.integers(1, 6), seed=SEEDS)
def test_gradients_of_cross_entropy(xp, name, data, n, vocabulary, chunk, seed):
    ignored = data.draw(st.sampled_from([-100, vocabulary, 7]))
    drawn = st.integers(0, vocabulary - 1) | st.just(ignored)
    targets = np.array([0, *data.draw(st.lists(drawn, min_size=n - 1, max_size=n - 1))])
    targets = xp.asarray(targets)
    if name == "cross_entropy":
        gradcheck(lambda z: ops.cross_entropy(z, targets, ignored), leaf(xp, (n, vocabulary), seed))
    else:
        x, w = leaf(xp, (n, 3), seed), leaf(xp, (vocabulary, 3), seed + 1)
        gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, targets, ignored, chunk), [x, w])


@pytest.mark.parametrize("name", ["mse_loss", "swiglu"])
@given(shape=FULL_SHAPES, seed=SEEDS)
def test_gradients_of_operations_on_two_equal_shapes(xp, name, shape, seed):
    gradcheck(getattr(ops, name), [leaf(xp, shape, seed), leaf(xp, shape, seed + 1)])


def test_gradcheck_finds_a_wrong_gradient():
    def wrong(x):
        return result("wrong", x.data**2, (x, lambda g: 3 * g))

    with pytest.raises(AssertionError, match=r"input 0 at \(1,\)"):
        gradcheck(wrong, Tensor(np.array([1.5, 2.0]), requires_grad=True))


def test_gradcheck_leaves_inputs_as_they_were():
    x = leaf(np, (2, 3))
    values, grad = x.data.copy(), np.ones((2, 3))
    x.grad = grad
    assert gradcheck(lambda x: x, x)
    assert gradcheck(ops.exp, x)
    calls = iter([ops.exp, ops.exp, None])
    with pytest.raises(TypeError, match="not callable"):
        gradcheck(lambda x: next(calls)(x), x)
    assert x.grad is grad
    np.testing.assert_array_equal(x.data, values)


def test_gradcheck_asks_for_a_tensor():
    with pytest.raises(TypeError, match="fn: expected it to return a tensor, got tuple"):
        gradcheck(lambda x: (x, x), leaf(np, (2,)))


def test_gradcheck_asks_for_float64():
    with pytest.raises(TypeError, match="number 0 is float32; float64 is needed"):
        gradcheck(ops.exp, Tensor([1.0], requires_grad=True))


# --- what holds for every operation -----------------------------------------------------------------------------------


def test_every_operation_has_an_example():
    assert cases.operation_names() == {name.partition(",")[0] for name in CASES}


@every_case
def test_values_and_gradients_are_those_that_pytorch_gave(xp, name, kept_operations):
    found = cases.flat(cases.value_and_gradients(CASES[name], xp=xp))
    np.testing.assert_allclose(found, kept_operations[name], rtol=1e-12, atol=1e-13)  # a few roundings of float64


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_keep_the_dtype(xp, name, dtype):
    inputs = CASES[name].inputs(dtype, xp)
    out = CASES[name].run(*inputs)
    out.backward(xp.ones(out.shape, dtype=dtype))
    assert out.dtype == dtype
    assert [x.grad.dtype for x in inputs] == [dtype] * len(inputs)
    assert backend.get_namespace(out.data) is xp
    assert all(backend.get_namespace(x.grad) is xp for x in inputs)


def test_gelu_keeps_float16():
    x = Tensor(np.ones(2, np.float16), requires_grad=True)
    y = ops.gelu(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == "float16"


@every_case
def test_gradient_functions_capture_arrays_and_never_tensors(name):
    out = CASES[name].run(*CASES[name].inputs())
    functions = out._node.backward if isinstance(out._node.backward, tuple) else (out._node.backward,)
    captured = [value for f in functions for value in contents(f)]
    assert not [value for value in captured if isinstance(value, Tensor)]


def contents(value):
    """What a closure reaches: its cells, its defaults, and what those contain."""
    yield value
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from contents(cell.cell_contents)
        yield from contents(value.__defaults__)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from contents(item)


@every_case
def test_arrays_that_the_gradients_need_cannot_be_written_to(name):
    case = CASES[name]
    out, *expected = cases.value_and_gradients(case)
    inputs = case.inputs()
    out = case.run(*inputs)
    for array in (*[x.data for x in inputs], out.data):
        with contextlib.suppress(ValueError):  # "assignment destination is read-only", where the gradients need it
            array += 1
    out.backward(cases.numbers(out.shape, 9))
    for x, gradient in zip(inputs, expected, strict=True):
        np.testing.assert_array_equal(x.grad, gradient)


@every_case
def test_each_leaf_owns_the_memory_of_its_gradient(name):
    inputs = CASES[name].inputs()
    out = CASES[name].run(*inputs)
    seed = cases.numbers(out.shape, 9)
    kept = out.data.copy(), seed.copy()
    out.backward(seed)
    for x in inputs:
        x.grad += 1
    assert all(not np.may_share_memory(a.grad, b.grad) for a in inputs for b in inputs if a is not b)
    assert all(not np.may_share_memory(x.grad, y.data) for x in inputs for y in (*inputs, out))
    np.testing.assert_array_equal(out.data, kept[0])
    np.testing.assert_array_equal(seed, kept[1])


@every_case
def test_operations_change_neither_their_inputs_nor_the_gradient_given(xp, name):
    inputs = CASES[name].inputs("float64", xp)
    before = [backend.to_numpy(x.data).copy() for x in inputs]
    out = CASES[name].run(*inputs)
    seed = cases.numbers(out.shape, 9)
    g = xp.asarray(seed.copy())
    out.backward(g)
    np.testing.assert_array_equal(backend.to_numpy(g), seed)
    for x, values in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(x.data), values)


@every_case
def test_a_frozen_input_gets_no_gradient_and_changes_none(name):
    case = CASES[name]
    out, *full = cases.value_and_gradients(case)
    for trained in range(len(case.shapes)):
        inputs = case.inputs(requires_grad=False)
        inputs[trained].requires_grad = True
        case.run(*inputs).backward(cases.numbers(out.shape, 9))
        # a frozen head's loss is summed up by columns, another's by rows
        rounding = 1e-14 if name == "linear_cross_entropy" else 0
        np.testing.assert_allclose(inputs[trained].grad, full[trained], rtol=0, atol=rounding)
        assert all(x.grad is None for i, x in enumerate(inputs) if i != trained)


@every_case
def test_without_gradients_nothing_is_kept(name):
    inputs = CASES[name].inputs(requires_grad=False)
    gc.collect()
    held = len(Held.live)
    out = CASES[name].run(*inputs)
    assert (out._node, out.requires_grad) == (None, False)
    assert len(Held.live) == held


@every_case
def test_backward_lets_go_of_all_that_forward_kept(name):
    inputs = CASES[name].inputs()
    gc.collect()
    held = len(Held.live)
    out = CASES[name].run(*inputs)
    out.backward(np.ones(out.shape))
    assert len(Held.live) == held
    assert all(x.data.flags.writeable for x in inputs)


# --- values at the edges ----------------------------------------------------------------------------------------------


def test_equal_largest_elements_share_the_gradient():
    x = Tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], requires_grad=True)
    x.max(axis=1).backward(np.array([1.0, 3.0], np.float32))
    np.testing.assert_array_equal(x.grad, np.array([[0, 0.5, 0.5], [1, 1, 1]], np.float32))


def test_powers_of_zero_have_the_limits_as_gradients():
    x, b = Tensor([0.0, 0.0, 2.0], requires_grad=True), Tensor([1.0, 2.0, 3.0], requires_grad=True)
    (x**b).sum().backward()
    np.testing.assert_allclose(x.grad, [1, 0, 12])
    np.testing.assert_allclose(b.grad, [0, 0, 8 * math.log(2)], rtol=1e-6)


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_whole_powers_of_zero_and_of_negative_numbers(exponent):
    x = Tensor(np.array([0.0, -2.0]), requires_grad=True)
    (x**exponent).sum().backward()
    np.testing.assert_allclose(x.grad, {0: [0, 0], 1: [1, 1], 2: [0, -4]}[exponent])


@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu", "tanh", "softmax", "log_softmax"])
def test_large_numbers_overflow_nowhere(xp, name):
    x = Tensor(xp.asarray(np.array([[-1e4, 0.0, 1e4]], np.float32)), requires_grad=True)
    out = getattr(ops, name)(x)
    out.backward(xp.ones(out.shape, dtype="float32"))
    assert np.isfinite(backend.to_numpy(out.data)).all()
    assert np.isfinite(backend.to_numpy(x.grad)).all()


def test_cross_entropy_of_huge_logits_is_exact(xp):
    z = Tensor(xp.asarray(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)), requires_grad=True)
    loss = ops.cross_entropy(z, xp.asarray([0, 0]))
    loss.backward()
    assert loss.item() == 5000
    np.testing.assert_array_equal(backend.to_numpy(z.grad), [[0, 0], [-0.5, 0.5]])


def test_linear_cross_entropy_is_cross_entropy_of_linear(xp):
    targets = xp.asarray(np.array([3, -100, 0, 1, 2, 6, -100]))
    found = []
    for split in (lambda x, w: ops.cross_entropy(ops.linear(x, w), targets), None):
        x, w = leaf(xp, (7, 3), 1), leaf(xp, (7, 3), 2)
        loss = split(x, w) if split else ops.linear_cross_entropy(x, w, targets, chunk=2)
        (loss * 3).backward()
        found.append([backend.to_numpy(a) for a in (loss.data, x.grad, w.grad)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)  # sums in another order


def test_a_query_without_keys_gives_zero_and_harms_no_other(xp):
    """Left padding: the first rows may attend to nothing. NaN there would spread to every gradient."""
    q, k, v = (leaf(xp, (1, 1, 3, 2), i) for i in range(3))
    mask = xp.asarray(np.array([[False, False, False], [True, False, False], [True, True, True]]))
    out = ops.scaled_dot_product_attention(q, k, v, mask)
    out.sum().backward()
    np.testing.assert_array_equal(backend.to_numpy(out.data)[0, 0, 0], [0, 0])
    np.testing.assert_array_equal(backend.to_numpy(q.grad)[0, 0, 0], [0, 0])
    assert all(np.isfinite(backend.to_numpy(x.grad)).all() for x in (q, k, v))


def test_a_causal_query_sees_as_if_it_stood_at_the_end(xp):
    """With a cache of earlier keys the last query sees all keys; one query at a time gives what all at once give."""
    q, k, v = (leaf(xp, (1, 2, 4, 2), i).detach() for i in range(3))
    whole = ops.scaled_dot_product_attention(q, k, v, is_causal=True)
    for t in range(4):
        step = ops.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], is_causal=True)
        np.testing.assert_allclose(step.numpy()[:, :, 0], whole.numpy()[:, :, t], rtol=1e-13)  # other BLAS kernels


def test_grouped_heads_are_repeated_heads(xp):
    q, k, v = leaf(xp, (2, 6, 3, 2)).detach(), leaf(xp, (2, 2, 4, 2), 1).detach(), leaf(xp, (2, 2, 4, 2), 2).detach()
    repeated = [Tensor(xp.repeat(x.data, 3, axis=1)) for x in (k, v)]
    one, other = ops.scaled_dot_product_attention(q, k, v), ops.scaled_dot_product_attention(q, *repeated)
    np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-13)  # other BLAS kernels


def test_rope_turns_by_differences_of_positions_only():
    """The product of a query at m and a key at n depends on m − n alone: what rotary positions are for."""
    cos, sin = ops.rope_table(8, 6, dtype="float64")
    q, k = (ops.rope(np.broadcast_to(cases.numbers((6,), i), (8, 6)), cos, sin).numpy() for i in range(2))
    products = q @ k.T
    for offset in range(-7, 8):
        diagonal = np.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-12, atol=1e-13)


def test_dropout_keeps_the_mean_and_draws_the_same_mask_from_the_same_seed(xp):
    x = Tensor(xp.ones((100, 100), dtype="float32"), requires_grad=True)
    y = ops.dropout(x, 0.25, rng=3)
    y.sum().backward()
    values = y.numpy()
    assert set(np.unique(values).tolist()) == {0.0, np.float32(1 / 0.75).item()}
    assert abs(values.mean() - 1) < 0.03  # five standard deviations of the mean of 10,000
    np.testing.assert_array_equal(backend.to_numpy(x.grad), values)
    np.testing.assert_array_equal(ops.dropout(x, 0.25, rng=3).numpy(), values)


def test_dropout_is_the_identity_unless_training():
    x = Tensor([1.0, 2.0])
    assert ops.dropout(x, 0.5, training=False) is x
    assert ops.dropout(x, 0.0) is x


def test_a_class_may_be_the_one_that_is_ignored(xp):
    """Padding with a token of the vocabulary: rows of that class count neither in the sum nor in n."""
    x, weight = leaf(xp, (4, 3)), leaf(xp, (5, 3), 1)
    targets = np.array([2, 0, 4, 2])
    for ignored, rows in ((2, np.array([1, 2])), (0, np.array([0, 2, 3])), (-100, np.arange(4)), (5, np.arange(4))):
        expected = ops.cross_entropy((x @ weight.T)[xp.asarray(rows)], xp.asarray(targets[rows])).item()
        for loss in (
            ops.cross_entropy(x @ weight.T, xp.asarray(targets), ignore_index=ignored),
            ops.linear_cross_entropy(x, weight, xp.asarray(targets), ignore_index=ignored),
        ):
            assert loss.item() == pytest.approx(expected, rel=1e-13)
            x.grad = None
            loss.backward()
            gone = np.delete(np.arange(4), rows)
            assert not backend.to_numpy(x.grad)[gone].any()
            assert backend.to_numpy(x.grad)[rows].any(axis=1).all()


def test_where_stops_an_infinite_gradient_on_the_other_side(xp):
    """√ of the chosen elements only: its infinite slope at the 0 that replaces the others must not become NaN."""
    x = Tensor(xp.asarray(np.array([-1.0, 4.0])), requires_grad=True)
    with np.errstate(divide="ignore"):
        ops.sqrt(ops.where(x > 0, x, 0.0)).sum().backward()
    assert x.grad.tolist() == [0, 0.25]


def test_every_kind_of_index_that_names_an_element_twice_adds(xp):
    for index in ([0, 0, 1], ([0, 0, 1],), ((0, 0, 1),), ((0, 0, 1), slice(None))):
        x = leaf(xp, (3, 2))
        x[index].sum().backward()
        assert x.grad.tolist() == [[2, 2], [1, 1], [0, 0]]
    assert leaf(xp, (3, 2))[[]].shape == (0, 2)


def test_numpy_integers_are_axes_and_lengths():
    n = np.int64(1)
    assert X.sum(n).shape == (2,)
    assert ops.softmax(X, n).shape == (2, 3)
    assert X.reshape(np.prod(X.shape)).shape == (6,)


# --- errors -----------------------------------------------------------------------------------------------------------

X = Tensor(np.ones((2, 3), np.float32))
HEADS = Tensor(np.ones((2, 1, 2, 3), np.float32))
ERRORS = {
    "shapes that do not broadcast": (lambda: X + Tensor(np.ones((2, 2), "f4")), r"add: shapes \(2, 3\) and \(2, 2\)"),
    "matmul": (lambda: X @ X, r"matmul: shapes \(2, 3\) and \(2, 3\) do not fit"),
    "matmul of a number": (lambda: X @ 2.0, r"matmul: shapes \(2, 3\) and \(\)"),
    "axis": (lambda: X.sum(2), r"axis: got 2, the tensor has 2 axes, shape \(2, 3\)"),
    "softmax axis": (lambda: ops.softmax(X, -3), "axis: got -3"),
    "reshape": (lambda: X.reshape(4, 2), r"reshape: 6 elements of shape \(2, 3\) do not fill \(4, 2\)"),
    "transpose": (lambda: X.transpose(0, 0), r"axes: got \(0, 0\); each of the 2 axes"),
    "gelu": (lambda: ops.gelu(X, "fast"), "approximate: got 'fast'; accepted are"),
    "dropout": (lambda: ops.dropout(X, 1.0), r"p: got 1.0; a probability in \[0, 1\) is accepted"),
    "swiglu": (lambda: ops.swiglu(X, X[:1]), r"swiglu: gate \(2, 3\) and up \(1, 3\) must have one shape"),
    "mse_loss": (lambda: ops.mse_loss(X, X[:1]), r"mse_loss: input \(2, 3\) and target \(1, 3\)"),
    "linear": (lambda: ops.linear(X, Tensor(np.ones((4, 2), "f4"))), r"x of shape \(2, 3\) has 3 features, weight"),
    "linear bias": (lambda: ops.linear(X, X, Tensor(np.ones(3, "f4"))), r"bias: got shape \(3,\), .* needs \(2,\)"),
    "layer_norm": (
        lambda: ops.layer_norm(X, Tensor(np.ones(2, "f4"))),
        r"got weight or bias \(2,\); x \(2, 3\) needs \(3,\)",
    ),
    "rope": (lambda: ops.rope(X, *ops.rope_table(2, 4)), r"rope: x \(2, 3\) must end in \(T, d\), d even"),
    "rope of other positions": (
        lambda: ops.rope(X[:, :2], *ops.rope_table(3, 2)),
        r"rope: x \(2, 2\) must .* cos \(3, 1\)",
    ),
    "transpose axis": (lambda: X.transpose(0, 3), "axis: got 3, the tensor has 2 axes"),
    "integers to a negative power": (lambda: Tensor([1, 2]) ** -1, "negative integer powers are not allowed"),
    "nothing to join": (lambda: ops.concatenate([]), "concatenate: tensors: got none"),
    "nothing to stack": (lambda: ops.stack([]), "stack: tensors: got none"),
    "norm of a number": (lambda: ops.layer_norm(2.0), r"layer_norm: x has no axes, shape \(\)"),
    "attention of two batches": (
        lambda: ops.scaled_dot_product_attention(HEADS, HEADS[:1], HEADS[:1]),
        r"\(2, 1, 2, 3\), key \(1, 1, 2, 3\)",
    ),
    "attention without heads": (
        lambda: ops.scaled_dot_product_attention(HEADS, HEADS[:, :0], HEADS[:, :0]),
        r"key \(2, 0, 2, 3\)",
    ),
    "attention mask": (
        lambda: ops.scaled_dot_product_attention(HEADS, HEADS, HEADS, np.ones((3, 2), bool)),
        r"attn_mask: shape \(3, 2\) does not broadcast to \(B, H, T, S\) = \(2, 1, 2, 2\)",
    ),
    "attention mask that trains": (
        lambda: ops.scaled_dot_product_attention(HEADS, HEADS, HEADS, Tensor(np.ones((2, 2)), requires_grad=True)),
        "attn_mask: got a tensor that requires a gradient",
    ),
    "embedding weight": (lambda: ops.embedding([0], X[0]), r"embedding: weight \(V, d\) has shape \(3,\)"),
    "chunk": (lambda: ops.linear_cross_entropy(X, X, [0, 0], chunk=0), "chunk: got 0; an int of at least 1"),
    "attention": (lambda: ops.scaled_dot_product_attention(X, X, X), r"query \(B, H, T, d\) = \(2, 3\)"),
    "embedding id": (lambda: ops.embedding([0, 2], X), "ids: got 0 to 2; weight has rows 0 to 1"),
    "embedding negative id": (lambda: ops.embedding([-1], X), "ids: got -1 to -1; weight has rows 0 to 1"),
    "targets": (lambda: ops.cross_entropy(X, [0, 3]), "targets: got classes from 0 to 3; logits have classes 0 to 2"),
    "negative target": (lambda: ops.cross_entropy(X, [0, -1]), "targets: got classes from -1 to 0"),
    "targets' shape": (lambda: ops.cross_entropy(X, [0]), r"logits \(N, V\) = \(2, 3\) and targets \(N,\) = \(1,\)"),
    "no targets": (lambda: ops.cross_entropy(X, [-100, -100]), "every target is ignore_index"),
    "linear_cross_entropy": (
        lambda: ops.linear_cross_entropy(X, X[:, :2], [0, 0]),
        r"x \(N, d\) = \(2, 3\) and weight",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_say_what_was_given_and_what_is_accepted(kind):
    call, message = ERRORS[kind]
    with pytest.raises(ValueError, match=message):
        call()


def test_ids_and_targets_must_be_integers():
    with pytest.raises(TypeError, match="ids: expected integers, got float64"):
        ops.embedding(np.array([0.0]), X)
    with pytest.raises(TypeError, match="targets: expected integer class numbers, got float64"):
        ops.cross_entropy(X, np.array([0.0, 1.0]))


def test_axes_must_be_integers():
    for axis in (1.0, "0", (0, 1.0)):
        with pytest.raises(TypeError, match=r"axis: got .*; an int, a tuple of ints or None is accepted"):
            X.sum(axis)


def test_a_mask_of_integers_is_refused():
    """Ones and zeros, as tokenizers give them, would be added to the scores and mask nothing."""
    with pytest.raises(TypeError, match="attn_mask: got int64; booleans"):
        ops.scaled_dot_product_attention(HEADS, HEADS, HEADS, np.array([[1, 0], [1, 1]]))
