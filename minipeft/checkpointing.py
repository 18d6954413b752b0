"""checkpoint: keep a function's inputs instead of its activations, and run it again in backward. Chen et al. 2016."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .backend import Array
from .module import Module
from .tensor import Tensor, enable_grad, gradients, joint_result, no_grad


def checkpoint(fn: Callable[..., Tensor], *args: Any) -> Tensor:
    """fn(*args), whose activations are not kept: backward runs fn a second time and then through it.

    The memory of one call of fn is needed at a time, instead of that of all calls; the price is one more forward pass.
    Generators of a module's dropout are set back for the second run, so that it drops the same elements.

    Args:
        fn: a module, or a function of its arguments alone. Parameters that a plain function uses train too, as long as
            one of the arguments requires a gradient.
        args: tensors, and anything else, which is passed on.

    Raises:
        TypeError: fn does not return a tensor.
    """
    module = fn if isinstance(fn, Module) else None
    generators = (
        [m.rng for m in module.modules() if isinstance(getattr(m, "rng", None), np.random.Generator)] if module else []
    )
    states = [rng.bit_generator.state for rng in generators]
    with no_grad():
        out = fn(*args)
    if not isinstance(out, Tensor):
        raise TypeError(f"fn: expected it to return a tensor, got {type(out).__name__}")
    tensors = [a for a in args if isinstance(a, Tensor)]
    arrays, needs = [t.data for t in tensors], [t.requires_grad for t in tensors]
    others = [None if isinstance(a, Tensor) else (a,) for a in args]  # what is no tensor, in its place

    def backward(g: Array) -> list[Array | None]:
        leaves = [Tensor(array, requires_grad=need) for array, need in zip(arrays, needs, strict=True)]
        remaining = iter(leaves)
        again = [next(remaining) if other is None else other[0] for other in others]
        with enable_grad(), _set_back(generators, states):
            found = gradients(fn(*again)._node, g)
        own = [found.pop(leaf, None) for leaf in (*leaves, *parameters)]
        for leaf, grad in found.items():  # what a plain function uses besides its arguments
            leaf._accumulate(grad, owned=True)
        return own

    parameters = list(module.parameters()) if module else []  # they say that there is something to train
    return joint_result("checkpoint", out.data, (*tensors, *parameters), backward)


@contextlib.contextmanager
def _set_back(generators: list[np.random.Generator], states: list[Any]) -> Iterator[None]:
    """Generators as they were, for the time."""
    now = [rng.bit_generator.state for rng in generators]
    for rng, state in zip(generators, states, strict=True):
        rng.bit_generator.state = state
    try:
        yield
    finally:
        for rng, state in zip(generators, now, strict=True):
            rng.bit_generator.state = state
