"""gradcheck: backward against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import backend
from .tensor import Tensor, gradients, no_grad


def gradcheck(
    fn: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    eps: float = 1e-6,
    atol: float = 1e-6,
    rtol: float = 1e-5,
) -> bool:
    """Compare backward with (L(x + eps·eᵢ) − L(x − eps·eᵢ))/(2·eps) for every element of every input that trains.

    L = Σ w · fn(*inputs) with a fixed random w, so that every output element takes part with a weight of its own.

    Args:
        fn: a function of the inputs; it must give the same result each time.
        inputs: float64 tensors; those with requires_grad are checked. Their `.grad` stays as it is.

    Returns:
        True; a wrong gradient raises.

    Raises:
        TypeError: an input that requires a gradient and is not float64 (differences in float32 say nothing), or fn
            does not return a tensor.
        ValueError: no input requires a gradient.
        AssertionError: names the input and the element, with both numbers.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    checked = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.requires_grad and x.dtype != np.float64:
            raise TypeError(f"inputs: number {i} is {x.dtype}; float64 is needed")
    if not checked:
        raise ValueError("inputs: none requires a gradient")
    out = fn(*inputs)
    if not isinstance(out, Tensor):
        raise TypeError(f"fn: expected it to return a tensor, got {type(out).__name__}")
    xp = backend.get_namespace(out.data)
    w = xp.asarray(np.random.default_rng(0).standard_normal(out.shape))
    grads = gradients(out._node, w) if out._node is not None else {out: w}

    def loss() -> float:
        with no_grad():
            return float((fn(*inputs).data * w).sum())

    for i, x in enumerate(inputs):
        if not (isinstance(x, Tensor) and x.requires_grad):
            continue
        found = grads.get(x, xp.zeros(x.shape))
        original = x.data
        for index in np.ndindex(x.shape):
            try:
                x.data = original.copy()
                x.data[index] += eps
                above = loss()
                x.data[index] -= 2 * eps
                expected = (above - loss()) / (2 * eps)
            finally:
                x.data = original
            if abs(float(found[index]) - expected) > atol + rtol * abs(expected):
                raise AssertionError(
                    f"gradcheck: input {i} at {index}: backward gives {float(found[index])!r}, "
                    f"central differences {expected!r}"
                )
    return True
