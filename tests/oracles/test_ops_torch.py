"""Operations against PyTorch: values and gradients, in both precisions, on several shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import numpy as np
import pytest
from cases import CASES

from minipeft import Tensor, ops

torch = pytest.importorskip("torch")
F = torch.nn.functional
sys.path.insert(0, str(Path(__file__).parents[1] / "references"))

import make  # noqa: E402 - it stands beside the files it writes

PRECISIONS = ["float64", "float32"]


def compare(run, run_torch, arrays, dtype):
    """The value and every gradient, to a few roundings of the largest number in each array."""
    ours = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    out, expected = run(*ours), run_torch(*theirs)
    assert out.shape == tuple(expected.shape)
    seed = cases.numbers(out.shape, 9).astype(dtype)
    out.backward(seed)
    expected.backward(torch.from_numpy(seed))
    close(out.data, expected.detach().numpy(), dtype)
    for x, y in zip(ours, theirs, strict=True):
        close(x.grad, y.grad.numpy(), dtype)


def close(found, expected, dtype):
    assert found.dtype == expected.dtype == dtype
    rounding = np.finfo(dtype).eps * max(1.0, abs(expected).max(initial=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=32 * rounding)


def draw(*shapes, positive=False, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    return [0.4 + abs(a) for a in arrays] if positive else arrays


precisions = pytest.mark.parametrize("dtype", PRECISIONS)


@precisions
@pytest.mark.parametrize("name", CASES)
def test_every_example(name, dtype):
    for found, expected in zip(
        cases.value_and_gradients(CASES[name], dtype), make.torch_value_and_gradients(CASES[name], dtype), strict=True
    ):
        close(found, expected, dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_file_has_what_pytorch_gives(name):
    found = cases.flat(make.torch_value_and_gradients(CASES[name]))
    np.testing.assert_allclose(cases.references("ops")[name], found, rtol=1e-12, atol=1e-14)  # other machines' exp


ELEMENTWISE = {
    "exp": (ops.exp, torch.exp),
    "log": (ops.log, torch.log),
    "sqrt": (ops.sqrt, torch.sqrt),
    "tanh": (ops.tanh, torch.tanh),
    "sigmoid": (ops.sigmoid, torch.sigmoid),
    "relu": (ops.relu, torch.relu),
    "silu": (ops.silu, F.silu),
    "gelu": (ops.gelu, F.gelu),
    "gelu tanh": (lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "cube": (lambda x: x**3, lambda x: x**3),
}


@precisions
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 5), (0, 4), (17, 129)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, shape, dtype):
    compare(*ELEMENTWISE[name], draw(shape, positive=name in ("log", "sqrt")), dtype)


@precisions
@pytest.mark.parametrize("shapes", [((), (3,)), ((2, 1, 4), (3, 1)), ((5, 7), (5, 7)), ((0, 3), (3,)), ((1, 1), (4,))])
@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "**"])
def test_arithmetic(sign, shapes, dtype):
    def run(a, b):
        return eval(f"a {sign} b", {"a": a, "b": b})

    compare(run, run, draw(*shapes, positive=True), dtype)


@precisions
@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (4, 5)),
        ((4,), (4,)),
        ((4,), (4, 5)),
        ((6, 1, 3, 4), (2, 4, 5)),
        ((2, 0, 4), (4, 3)),
        ((64, 65), (65, 33)),
    ],
)
def test_matmul(shapes, dtype):
    compare(lambda a, b: a @ b, lambda a, b: a @ b, draw(*shapes), dtype)


@precisions
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [0, -1, (0, 2), (-1, 1)])
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_reductions(name, axis, keepdims, dtype):
    theirs = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[name]
    run = getattr(ops, name)
    compare(lambda x: run(x, axis, keepdims), lambda x: theirs(x, axis, keepdims), draw((3, 4, 5)), dtype)


def test_equal_largest_elements_share_the_gradient():
    x = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 1.0]])
    compare(lambda x: ops.max(x, 1), lambda x: torch.amax(x, 1), [x], "float64")


@precisions
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("scale", [1, 100])
def test_softmax(axis, scale, dtype):
    arrays = [scale * a for a in draw((5, 33, 3))]
    compare(lambda x: ops.softmax(x, axis), lambda x: torch.softmax(x, axis), arrays, dtype)
    compare(lambda x: ops.log_softmax(x, axis), lambda x: torch.log_softmax(x, axis), arrays, dtype)


@precisions
@pytest.mark.parametrize("shape", [(64,), (5, 33), (2, 7, 16)])
def test_normalization(shape, dtype):
    d = shape[-1:]
    arrays = draw(shape, d, d)
    compare(ops.layer_norm, lambda x, w, b: F.layer_norm(x, d, w, b), arrays, dtype)
    compare(ops.rms_norm, lambda x, w: F.rms_norm(x, d, w, 1e-6), arrays[:2], dtype)


@precisions
@pytest.mark.parametrize("lead", [(), (1,), (9,), (2, 3), (0,)])
def test_linear(lead, dtype):
    compare(ops.linear, lambda x, w, b: F.linear(x, w, b), draw((*lead, 33), (17, 33), (17,)), dtype)


ATTENTION = {
    "one head": ((1, 1, 5, 4), (1, 1, 5, 4)),
    "several heads": ((2, 4, 16, 8), (2, 4, 16, 8)),
    "grouped heads": ((2, 6, 7, 8), (2, 2, 7, 8)),
    "one shared head": ((3, 4, 5, 8), (3, 1, 5, 8)),
    "more keys": ((2, 4, 3, 8), (2, 2, 11, 8)),
    "fewer keys": ((2, 4, 9, 8), (2, 2, 4, 8)),
    "blocks of queries": ((1, 4, 150, 8), (1, 2, 150, 8)),
    "blocks of queries, more keys": ((1, 2, 130, 8), (1, 1, 197, 8)),
    "blocks of queries, of which the first sees no keys": ((1, 2, 141, 8), (1, 1, 70, 8)),
}


@precisions
@pytest.mark.parametrize("masked", ["no mask", "causal", "booleans", "floats", "scale"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind, masked, dtype):
    q_shape, kv_shape = ATTENTION[kind]
    t, s = q_shape[2], kv_shape[2]
    masks = {
        "causal": np.tril(np.ones((t, s), bool), s - t),
        "booleans": np.random.default_rng(1).random((q_shape[0], 1, t, s)) < 0.6,  # some queries have no keys
        "floats": draw((t, s), seed=2)[0].astype(dtype),
    }
    mask = masks.get(masked)
    scale = 0.1 if masked == "scale" else None
    ours = {"is_causal": True} if masked == "causal" else {"attn_mask": mask, "scale": scale}
    theirs = {"attn_mask": None if mask is None else torch.from_numpy(mask), "scale": scale, "enable_gqa": True}
    compare(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, **ours),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **theirs),
        draw(q_shape, kv_shape, kv_shape),
        dtype,
    )


def test_causal_attention_of_equal_lengths_is_pytorchs_flag():
    compare(
        lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        draw(*[(2, 3, 6, 4)] * 3),
        "float64",
    )


@precisions
@pytest.mark.parametrize(("n", "vocabulary", "ignored"), [(1, 1, 0), (7, 5, 2), (300, 101, 50), (257, 10, 0)])
def test_cross_entropy(n, vocabulary, ignored, dtype):
    rng = np.random.default_rng(3)
    targets = rng.integers(0, vocabulary, n)
    targets[rng.permutation(n)[:ignored]] = -100
    theirs = torch.from_numpy(targets)
    z, x, w = draw((n, vocabulary), (n, 16), (vocabulary, 16))
    compare(lambda z: ops.cross_entropy(z, targets), lambda z: F.cross_entropy(z, theirs), [z * 5], dtype)
    compare(
        lambda x, w: ops.linear_cross_entropy(x, w, targets),
        lambda x, w: F.cross_entropy(x @ w.T, theirs),
        [x, w],
        dtype,
    )


@precisions
def test_embedding(dtype):
    ids = np.random.default_rng(4).integers(0, 50, (6, 33))
    compare(lambda w: ops.embedding(ids, w), lambda w: F.embedding(torch.tensor(ids), w), draw((50, 8)), dtype)


INDICES = {
    "a step": (slice(1, None, 2), slice(None)),
    "an integer": (slice(None), 2),
    "a new axis": (None, ..., slice(0, 3)),
    "integers": (np.array([[0, 4], [4, 4]]),),
    "two integer arrays": (np.array([0, 4, 4]), np.array([1, 2, 2])),
    "integers and a slice": (slice(1, 4), np.array([0, 0, 3])),
    "booleans": (np.array([True, False, True, True, False]),),
}


@pytest.mark.parametrize("kind", INDICES)
def test_indexing(kind):
    index = INDICES[kind]
    theirs = tuple(torch.from_numpy(i) if isinstance(i, np.ndarray) else i for i in index)
    compare(lambda x: x[index], lambda x: x[theirs], draw((5, 4, 3)), "float64")


def test_shapes():
    arrays = draw((3, 4, 2))
    for run, run_torch in [
        (lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1)),
        (lambda x: x.transpose(1, -1, 0), lambda x: x.permute(1, -1, 0)),
        (lambda x: x.swapaxes(-1, 0), lambda x: x.swapaxes(-1, 0)),
        (lambda x: ops.concatenate([x, x * 2, x[:, :1]], -2), lambda x: torch.cat([x, x * 2, x[:, :1]], -2)),
        (lambda x: ops.stack([x, x * 2], -2), lambda x: torch.stack([x, x * 2], -2)),
        (lambda x: ops.where(x > 0, x, x * 0.1), lambda x: torch.where(x > 0, x, x * 0.1)),
    ]:
        compare(run, run_torch, arrays, "float64")


@precisions
def test_a_network_of_many_operations(dtype):
    """One pre-norm transformer layer and its loss: gradients pass through everything at once."""
    targets = np.random.default_rng(5).integers(0, 11, 14)

    def run(x, n1, wq, wk, wo, n2, wg, wu, wd, head):
        h = ops.rms_norm(x, n1)
        q = ops.linear(h, wq).reshape(2, 7, 4, 4).transpose(0, 2, 1, 3)
        k = ops.linear(h, wk).reshape(2, 7, 2, 4).transpose(0, 2, 1, 3)
        y = ops.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(0, 2, 1, 3).reshape(2, 7, 16)
        x = x + ops.linear(y, wo)
        h = ops.rms_norm(x, n2)
        x = x + ops.linear(ops.swiglu(ops.linear(h, wg), ops.linear(h, wu)), wd)
        return ops.linear_cross_entropy(x.reshape(14, 16), head, targets)

    def run_torch(x, n1, wq, wk, wo, n2, wg, wu, wd, head):
        h = F.rms_norm(x, (16,), n1, 1e-6)
        q = F.linear(h, wq).reshape(2, 7, 4, 4).transpose(1, 2)
        k = F.linear(h, wk).reshape(2, 7, 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(2, 7, 16)
        x = x + F.linear(y, wo)
        h = F.rms_norm(x, (16,), n2, 1e-6)
        x = x + F.linear(F.silu(F.linear(h, wg)) * F.linear(h, wu), wd)
        return F.cross_entropy(F.linear(x.reshape(14, 16), head), torch.from_numpy(targets))

    shapes = [(2, 7, 16), (16,), (16, 16), (8, 16), (16, 16), (16,), (24, 16), (24, 16), (16, 24), (11, 16)]
    compare(run, run_torch, [a / 2 for a in draw(*shapes)], dtype)


def test_rotary_positions_are_those_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = draw((2, 3, 9, 8))[0]
    cos, sin = ops.rope_table(9, 8, theta=500.0, dtype="float64")
    doubled = [torch.from_numpy(np.concatenate([table, table], -1))[None] for table in (cos, sin)]
    expected, _ = llama.apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), *doubled)
    np.testing.assert_allclose(ops.rope(x, cos, sin).data, expected.numpy(), rtol=1e-13, atol=1e-15)


def test_the_rotary_table_is_that_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1, 9, 8), torch.arange(9)[None])
    for found, expected in zip(ops.rope_table(9, 8, theta=500.0), (cos, sin), strict=True):
        np.testing.assert_allclose(found, expected[0, :, :4].numpy(), atol=1e-6)  # theirs has float32 angles
