"""over_batch: a model's layers over parts of a batch, side by side, each part with a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import threads
from .backend import Array, get_namespace
from .module import Module, Parameter
from .nn import Dropout
from .tensor import Tensor, gradients, joint_result, leaves

LEAST = 1 << 17  # elements of the first argument; less work is not worth the threads
MOST = 1 << 24  # elements of weights that train: each part has a gradient of its own for them


def over_batch(fn: Callable[..., Tensor], module: Module, *args: Tensor | Array | None) -> Tensor:
    """fn(*args), where what happens to a row of the batch does not depend on the other rows.

    On two processors a LoRA step of a 135M-parameter model takes three quarters of the time that it takes with two BLAS
    threads: products of rank 8, and everything that is no product, run on both as well.

    Args:
        fn: a function of tensors and arrays whose first axis is the batch; so is its result's.
        module: what fn runs. It runs on the whole batch with dropout, where the order of random numbers counts, and
            where whole weights train: their gradients of every part would take memory, and time to add up.
        args: those with a batch axis, a tensor first; None is passed on.
    """
    x = args[0]
    count = min(threads.available(), len(x)) if x.size >= LEAST and get_namespace(x.data) is np else 1
    if count < 2 or _stays_whole(module):
        return fn(*args)
    ends = [len(x) * (i + 1) // count for i in range(count)]
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    cut = [[_cut(arg, part) for arg in args] for part in parts]
    outputs = threads.side_by_side([partial(fn, *own) for own in cut])
    data, nodes = np.concatenate([out.data for out in outputs]), [out._node for out in outputs]
    del outputs
    inputs = [[arg for arg in own if isinstance(arg, Tensor)] for own in cut]
    parameters = [leaf for leaf in leaves(nodes[0]) if all(leaf is not arg for arg in inputs[0])]  # as in all parts

    def backward(g: Array) -> list[Array | None]:
        tasks = [partial(gradients, node, g[part]) for node, part in zip(nodes, parts, strict=True)]
        found = threads.side_by_side(tasks)
        joined = []
        for own in zip(*inputs, strict=True):
            each = [grads.get(leaf) for grads, leaf in zip(found, own, strict=True)]
            joined.append(None if any(grad is None for grad in each) else np.concatenate(each))
        return joined + [_sum([grads[p] for grads in found if p in grads]) for p in parameters]

    parents = [arg for arg in args if isinstance(arg, Tensor)]
    return joint_result("over_batch", data, (*parents, *parameters), backward)


def _stays_whole(module: Module) -> bool:
    trained = 0
    for m in module.modules():
        trained += sum(p.size for p in vars(m).values() if isinstance(p, Parameter) and p.requires_grad)
        if trained > MOST or (isinstance(m, Dropout) and m.p and m.training):
            return True
    return False


def _cut(arg: Any, part: slice) -> Any:
    if isinstance(arg, Tensor):
        return Tensor(arg.data[part], requires_grad=arg.requires_grad)
    return None if arg is None else arg[part]


def _sum(parts: list[Array]) -> Array | None:
    """Added up in the order of the parts, so that the same batch gives the same bits."""
    total = parts[0] if parts else None
    for part in parts[1:]:
        total = np.add(total, part, out=total)
    return total
