"""One small example of every operation and of every optimizer, beside what PyTorch calls the same.

Tests that hold for all operations run over `CASES`: dtypes, what is held, who owns a gradient, PyTorch's values. The
numbers in tests/references were made from the same tables by tests/references/make.py.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minipeft import Tensor, backend, ops, optim

REFERENCES = Path(__file__).parent / "references"


class Lazy:
    """A module that is imported at its first use: the plain test run has no PyTorch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)


torch, F = Lazy("torch"), Lazy("torch.nn.functional")


class Case(NamedTuple):
    """An operation on inputs of fixed shapes: with minipeft's tensors, and with PyTorch's."""

    run: Callable[..., Tensor]
    torch: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    positive: bool = False

    def inputs(self, dtype: Any = "float64", xp: Any = np, requires_grad: bool = True) -> list[Tensor]:
        arrays = [numbers(shape, i, self.positive).astype(dtype) for i, shape in enumerate(self.shapes)]
        return [Tensor(xp.asarray(a), requires_grad=requires_grad) for a in arrays]


def numbers(shape: tuple[int, ...], which: int = 0, positive: bool = False) -> np.ndarray:
    """Unequal numbers from −1.7 to 1.7 by a formula, for references that no generator's version can change."""
    x = 1.7 * np.sin(1.3 * np.arange(int(np.prod(shape))) + 0.7 * which + 0.4)
    return (0.4 + abs(x) if positive else x).reshape(shape)


def value_and_gradients(case: Case, dtype: Any = "float64", xp: Any = np) -> list[np.ndarray]:
    """The output and the gradient of every input, for a gradient of the output by formula."""
    inputs = case.inputs(dtype, xp)
    out = case.run(*inputs)
    out.backward(xp.asarray(numbers(out.shape, 9).astype(dtype)))
    return [backend.to_numpy(a) for a in (out.data, *(x.grad for x in inputs))]


def _like(x: Tensor, array: np.ndarray) -> Any:
    """A constant in the library, and if it has floats the dtype, of x."""
    array = array.astype(x.dtype) if array.dtype.kind == "f" else array
    return backend.move(array, backend.get_namespace(x.data))


def _torch_like(x: Any, array: np.ndarray) -> Any:
    constant = torch.from_numpy(array)
    return constant.to(x.dtype) if array.dtype.kind == "f" else constant


IDS = np.array([[0, 3, 1], [3, 3, 2]])
TARGETS = np.array([2, -100, 0, 4, 2, -100, 1])
ROWS = np.array([2, 0, 2])
CHOSEN = np.arange(12).reshape(3, 4) % 3 == 0
CAUSAL = np.tril(np.ones((3, 5), bool), 2)  # query t sees keys up to t + 2: the last query sees all five
MASK = np.array([[[[True, False, True, True, False]]], [[[True, True, True, True, True]]]])
BIAS = numbers((3, 5), 5)
COS, SIN = ops.rope_table(3, 4, dtype="float64")
QKV = ((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))  # four query heads share two heads of keys and values


def _attention(**options: Any) -> Case:
    mask = options.pop("attn_mask", None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        constant = None if mask is None else _like(q, mask)
        return ops.scaled_dot_product_attention(q, k, v, attn_mask=constant, **options)

    def run_torch(q: Any, k: Any, v: Any) -> Any:
        constant = None if mask is None else _torch_like(q, mask)
        if options.get("is_causal"):  # PyTorch's own flag lets the first query see one key, whatever S is
            constant = torch.from_numpy(CAUSAL)
        scale = options.get("scale")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=constant, scale=scale, enable_gqa=True)

    return Case(run, run_torch, QKV)


def _same(run: Callable[..., Any], *shapes: tuple[int, ...], positive: bool = False) -> Case:
    """An operation that is written the same in both libraries."""
    return Case(run, run, shapes, positive)


def _rope_torch(x: Any) -> Any:
    """The rotation as a product of complex numbers."""
    turned = torch.complex(x[..., :2], x[..., 2:]) * torch.complex(_torch_like(x, COS), _torch_like(x, SIN))
    return torch.cat([turned.real, turned.imag], -1)


def _index(*parts: Any) -> Case:
    def run(x: Tensor) -> Tensor:
        return x[tuple(_like(x, p) if isinstance(p, np.ndarray) else p for p in parts)]

    def run_torch(x: Any) -> Any:
        return x[tuple(torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in parts)]

    return Case(run, run_torch, ((3, 4),))


CASES: dict[str, Case] = {
    "add": _same(operator.add, (3, 4), (4,)),
    "sub": _same(operator.sub, (3, 1), (2, 1, 4)),
    "sub, number first": _same(lambda x: 2.5 - x, (3, 4)),
    "mul": _same(operator.mul, (3, 4), (3, 1)),
    "mul, with itself": _same(lambda x: x * x, (3, 4)),
    "div": _same(operator.truediv, (3, 4), (1, 4), positive=True),
    "div, number first": _same(lambda x: 2.5 / x, (3, 4)),
    "power": _same(operator.pow, (3, 4), (3, 1), positive=True),
    "power, whole exponent": _same(lambda x: x**3, (3, 4)),
    "power, number first": _same(lambda x: 2.5**x, (3, 4)),
    "neg": _same(operator.neg, (3, 4)),
    "matmul": _same(operator.matmul, (3, 4), (4, 2)),
    "matmul, broadcast": _same(operator.matmul, (2, 1, 3, 4), (3, 4, 2)),
    "matmul, row": _same(operator.matmul, (4,), (2, 4, 3)),
    "matmul, column": _same(operator.matmul, (2, 3, 4), (4,)),
    "matmul, row by column": _same(operator.matmul, (4,), (4,)),
    "astype": Case(
        lambda x: x.astype("float16").astype(x.dtype), lambda x: x.to(torch.float16).to(x.dtype), ((3, 4),)
    ),
    "exp": Case(ops.exp, lambda x: x.exp(), ((3, 4),)),
    "log": Case(ops.log, lambda x: x.log(), ((3, 4),), positive=True),
    "sqrt": Case(ops.sqrt, lambda x: x.sqrt(), ((3, 4),), positive=True),
    "tanh": Case(ops.tanh, lambda x: x.tanh(), ((3, 4),)),
    "sigmoid": Case(ops.sigmoid, lambda x: x.sigmoid(), ((3, 4),)),
    "relu": Case(ops.relu, lambda x: x.relu(), ((3, 4),)),
    "silu": Case(ops.silu, lambda x: F.silu(x), ((3, 4),)),
    "gelu": Case(ops.gelu, lambda x: F.gelu(x), ((3, 4),)),
    "gelu, tanh": Case(lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), ((3, 4),)),
    "swiglu": Case(ops.swiglu, lambda gate, up: F.silu(gate) * up, ((2, 3, 4), (2, 3, 4))),
    "dropout": Case(
        lambda x: ops.dropout(x, 0.25, rng=0),
        lambda x: x * _torch_like(x, (np.random.default_rng(0).random((3, 4), np.float32) >= 0.25) / 0.75),
        ((3, 4),),
    ),
    "sum": _same(lambda x: x.sum(), (3, 4)),
    "sum, axis": _same(lambda x: x.sum((0, -1), True), (3, 4, 2)),
    "mean": _same(lambda x: x.mean(), (3, 4)),
    "mean, axis": _same(lambda x: x.mean(1), (3, 4, 2)),
    "max": Case(lambda x: x.max(), lambda x: x.amax(), ((3, 4),)),
    "max, axis": Case(lambda x: x.max((0, 2)), lambda x: x.amax((0, 2)), ((3, 4, 2),)),
    "reshape": _same(lambda x: x.reshape(2, -1), (3, 4)),
    "transpose": Case(lambda x: x.transpose(2, 0, 1), lambda x: x.permute(2, 0, 1), ((3, 4, 2),)),
    "transpose, all": _same(lambda x: x.T, (3, 4)),
    "swapaxes": _same(lambda x: x.swapaxes(0, -1), (3, 4, 2)),
    "getitem": _index(slice(1, None), 2),
    "getitem, new axis": _index(..., None, slice(None, None, 2)),
    "getitem, integers": _index(ROWS),
    "getitem, two integer arrays": _index(ROWS, np.array([1, 1, 1])),
    "getitem, booleans": _index(CHOSEN),
    "concatenate": Case(
        lambda *xs: ops.concatenate(xs, axis=1), lambda *xs: torch.cat(xs, 1), ((3, 4), (3, 1), (3, 2))
    ),
    "stack": Case(lambda *xs: ops.stack(xs, axis=-1), lambda *xs: torch.stack(xs, -1), ((3, 4), (3, 4))),
    "where": Case(
        lambda a, b: ops.where(_like(a, CHOSEN), a, b),
        lambda a, b: torch.where(torch.from_numpy(CHOSEN), a, b),
        ((3, 4), (4,)),
    ),
    "embedding": Case(
        lambda w: ops.embedding(_like(w, IDS), w), lambda w: F.embedding(torch.from_numpy(IDS), w), ((5, 4),)
    ),
    "linear": Case(ops.linear, lambda x, w, b: F.linear(x, w, b), ((2, 3, 4), (5, 4), (5,))),
    "linear, no bias": Case(ops.linear, lambda x, w: F.linear(x, w), ((4,), (5, 4))),
    "softmax": Case(ops.softmax, lambda x: x.softmax(-1), ((3, 4),)),
    "softmax, axis": Case(lambda x: ops.softmax(x, 1), lambda x: x.softmax(1), ((3, 4, 2),)),
    "log_softmax": Case(ops.log_softmax, lambda x: x.log_softmax(-1), ((3, 4),)),
    "log_softmax, axis": Case(lambda x: ops.log_softmax(x, 0), lambda x: x.log_softmax(0), ((3, 4),)),
    "layer_norm": Case(ops.layer_norm, lambda x, w, b: F.layer_norm(x, (4,), w, b), ((2, 3, 4), (4,), (4,))),
    "layer_norm, plain": Case(ops.layer_norm, lambda x: F.layer_norm(x, (4,)), ((3, 4),)),
    "rms_norm": Case(ops.rms_norm, lambda x, w: F.rms_norm(x, (4,), w, 1e-6), ((2, 3, 4), (4,))),
    "rms_norm, plain": Case(ops.rms_norm, lambda x: F.rms_norm(x, (4,), None, 1e-6), ((3, 4),)),
    "rope": Case(lambda x: ops.rope(x, _like(x, COS), _like(x, SIN)), _rope_torch, ((2, 3, 4),)),
    "scaled_dot_product_attention": _attention(),
    "scaled_dot_product_attention, causal": _attention(is_causal=True),
    "scaled_dot_product_attention, boolean mask": _attention(attn_mask=MASK),
    "scaled_dot_product_attention, float mask": _attention(attn_mask=BIAS, scale=0.3),
    "cross_entropy": Case(
        lambda z: ops.cross_entropy(z, _like(z, TARGETS)),
        lambda z: F.cross_entropy(z, torch.from_numpy(TARGETS)),
        ((7, 5),),
    ),
    "cross_entropy, all counted": Case(
        lambda z: ops.cross_entropy(z, _like(z, IDS[0])),
        lambda z: F.cross_entropy(z, torch.from_numpy(IDS[0])),
        ((3, 4),),
    ),
    "linear_cross_entropy": Case(
        lambda x, w: ops.linear_cross_entropy(x, w, _like(x, TARGETS), chunk=3),
        lambda x, w: F.cross_entropy(x @ w.T, torch.from_numpy(TARGETS)),
        ((7, 4), (5, 4)),
    ),
    "mse_loss": Case(ops.mse_loss, lambda a, b: F.mse_loss(a, b), ((3, 4), (3, 4))),
}  # fmt: skip

NOT_OPERATIONS = {"tensor", "operands", "sum_to", "rope_table"}  # functions of ops that make no node


def operation_names() -> set[str]:
    """The public functions of ops that make a node."""
    ours = lambda f: callable(f) and getattr(f, "__module__", "").startswith(ops.__name__)  # noqa: E731
    functions = {name for name, f in vars(ops).items() if ours(f)}
    return {n for n in functions if not n.startswith("_")} - NOT_OPERATIONS


# --- optimizers -------------------------------------------------------------------------------------------------------

SHAPES = ((3, 4), (5,), (), (2, 3, 2))
STEPS = 50
KEPT_STEPS = (1, 2, 10, 25, 50)  # those whose parameters are in the reference file

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD, dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "SGD, nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD, maximize": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.02}),
    "Adam, all options": (
        "Adam",
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    "AdamW": ("AdamW", {}),
    "AdamW, betas": ("AdamW", {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "AdamW, amsgrad": ("AdamW", {"lr": 0.02, "amsgrad": True}),
    "AdamW, maximize": ("AdamW", {"lr": 0.02, "maximize": True, "amsgrad": True, "weight_decay": 0.3}),
}


def gradient(i: int, step: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The gradient of parameter i at a step (from 1); some have none: one now and then, one for the first ten steps."""
    if (i == 1 and step % 3 == 0) or (i == 3 and step <= 10):
        return None
    return numbers(shape, 11 * step + i) * (1 + 0.5 * np.sin(0.3 * step))


def learning_rate(base: float, step: int) -> float:
    """Warm-up, then a wave: every step has a rate of its own."""
    return base * min(1.0, step / 5) * (1.2 + np.sin(0.2 * step))


def groups(params: list[Any]) -> list[dict[str, Any]]:
    """Two parameter groups; the second has a learning rate of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]


def starting_values(dtype: Any = "float64") -> list[np.ndarray]:
    """What the parameters are before the first step."""
    return [numbers(shape, i).astype(dtype) for i, shape in enumerate(SHAPES)]


def optimizer(name: str, params: list[Any], library: Any = optim) -> Any:
    """The optimizer of this name from minipeft.optim or torch.optim."""
    kind, options = OPTIMIZERS[name]
    return getattr(library, kind)(groups(params), **options)


def steps(name: str, optimizer: Any, params: list[Any], convert: Callable, numbers: range) -> Iterator[None]:
    """Take the steps with these numbers (from 1); `convert` makes a gradient of an array."""
    base = OPTIMIZERS[name][1].get("lr", 1e-3), 0.05
    for step in numbers:
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = learning_rate(lr, step)
        for i, (p, shape) in enumerate(zip(params, SHAPES, strict=True)):
            g = gradient(i, step, shape)
            p.grad = None if g is None else convert(g)
        optimizer.step()
        yield


def trajectory(name: str, dtype: Any = "float64", xp: Any = np) -> list[list[np.ndarray]]:
    """The parameters after each of the 50 steps of an optimizer."""
    params = [Tensor(xp.asarray(values), requires_grad=True) for values in starting_values(dtype)]
    walk = steps(name, optimizer(name, params), params, lambda g: xp.asarray(g.astype(dtype)), range(1, STEPS + 1))
    return [[backend.to_numpy(p.data).copy() for p in params] for _ in walk]


def kept(history: list[list[np.ndarray]]) -> np.ndarray:
    """The steps of a trajectory that the reference file has, as one row."""
    return flat([a for step in KEPT_STEPS for a in history[step - 1]])


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    """Several arrays as one row of numbers, as the reference files keep them."""
    return np.concatenate([np.asarray(a).ravel() for a in arrays])


def references(kind: str) -> dict[str, np.ndarray]:
    """What PyTorch gave: a row of numbers for each case."""
    with np.load(REFERENCES / f"{kind}.npz", allow_pickle=False) as file:
        return dict(file)
