"""Continue prompts with a language model: greedy or sampled, one or many at a time, token by token.

The model needs `hidden_states(ids, attention_mask, cache)`, `lm_head`, `new_cache(batch, capacity)` and `context`, as
`models.llama.Llama` has. What it computed for earlier tokens stays in the cache, so each new token costs one pass over
one token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from . import backend
from .tensor import Tensor, no_grad


def generate(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | np.random.Generator | None = None,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> Any:
    """The prompts with their continuations; what comes back is shaped as what was given.

    Args:
        ids: one prompt (a list of ids), many of any lengths (a list of lists), or an array (T,) or (B, T).
        max_new_tokens: where to end at the latest; the end of the model's context ends it too.
        temperature: 0 takes the likeliest token; more divides the logits and samples.
        top_p: sample among the likeliest tokens that hold this share of the probability (Holtzman et al. 2020).
        seed: for sampling; each prompt has random numbers of its own, by its place in the batch.
        stop_ids: tokens that end a continuation, itself included.
        on_token: called with (number of the prompt, token) for each new token.

    Returns:
        A list for a list, a list of lists for a list of lists, an array for an array, in which continuations that end
        early are filled up with the token that ended them, as Hugging Face does.

    Raises:
        ValueError: an empty prompt, one that fills the model's context, or a number out of its range.
    """
    prompts = _prompts(ids)
    rows = [list(prompt) for prompt in prompts]
    for row, token in _tokens(model, prompts, max_new_tokens, temperature, top_p, seed, stop_ids):
        rows[row].append(token)
        if on_token is not None:
            on_token(row, token)
    if _is_flat(ids):
        return np.asarray(rows[0]) if hasattr(ids, "dtype") else rows[0]
    if not hasattr(ids, "dtype"):
        return rows
    length = max(map(len, rows))
    return np.asarray([row + row[-1:] * (length - len(row)) for row in rows])


def stream(
    model: Any,
    ids: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | np.random.Generator | None = None,
    stop_ids: Iterable[int] = (),
) -> Iterator[int]:
    """The continuation of one prompt, each token as soon as it is chosen. The arguments are `generate`'s."""
    if not _is_flat(ids):
        raise ValueError("ids: one prompt is accepted, a list of ids; use generate() for several")
    tokens = _tokens(model, _prompts(ids), max_new_tokens, temperature, top_p, seed, stop_ids)
    return (token for _, token in tokens)


def next_token(
    logits: np.ndarray, temperature: float = 0.0, top_p: float = 1.0, rng: np.random.Generator | None = None
) -> int:
    """One token from logits (V,): the largest, or drawn from softmax(logits/temperature) cut off at `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    share = np.cumsum(p[order])
    order = order[: int(np.searchsorted(share, min(top_p, 1.0) * share[-1])) + 1]  # the one that reaches top_p is in
    share = share[: len(order)]
    return int(order[np.searchsorted(share, backend.generator(rng).random() * share[-1], side="right")])


# --- the loop ---------------------------------------------------------------------------------------------------------


def _tokens(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: Any,
    stop_ids: Any,
) -> Iterator[tuple[int, int]]:
    """Check everything now, then (number of the prompt, new token) one by one."""
    context, longest = model.context, max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ValueError("ids: an empty prompt; at least one token is accepted")
    if longest >= context:
        raise ValueError(f"ids: a prompt of {longest} tokens; the model's context of {context} has no room to continue")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}; at least 1 is accepted")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"got temperature = {temperature} and top_p = {top_p}; temperature >= 0, 0 < top_p <= 1")
    rngs = backend.generator(seed).spawn(len(prompts))
    pick = lambda row, logits: next_token(logits, temperature, top_p, rngs[row])  # noqa: E731
    return _loop(model, prompts, min(max_new_tokens, context - longest), pick, frozenset(stop_ids))


def _loop(
    model: Any, prompts: list[list[int]], steps: int, pick: Callable[[int, np.ndarray], int], stop_ids: frozenset[int]
) -> Iterator[tuple[int, int]]:
    batch, longest = len(prompts), max(map(len, prompts))
    ids = np.asarray([[0] * (longest - len(p)) + list(p) for p in prompts])  # padded on the left, (B, T)
    mask = np.asarray([[0] * (longest - len(p)) + [1] * (len(p) + steps) for p in prompts])  # (B, T + steps)
    padded = not mask.all()
    training = [module for module in model.modules() if module.training]
    cache = model.new_cache(batch, longest + steps)
    running = dict.fromkeys(range(batch))
    for length in range(longest, longest + steps):
        with no_grad(), _evaluating(training):  # only around the model: between tokens the caller's code runs
            h = model.hidden_states(ids, mask[:, :length] if padded else None, cache)  # (B, T, D)
            logits = backend.to_numpy(model.lm_head(Tensor(h.data[:, -1])).data)  # (B, D) -> (B, V)
        ids = np.asarray([[pick(row, logits[row]) if row in running else 0] for row in range(batch)])  # (B, 1)
        for row in list(running):
            if int(ids[row, 0]) in stop_ids:
                del running[row]
            yield row, int(ids[row, 0])
        if not running:
            return


@contextlib.contextmanager
def _evaluating(training: list[Any]) -> Iterator[None]:
    """No dropout inside; the modules train on afterwards."""
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_flat(ids: Any) -> bool:
    """True for one prompt."""
    return ids.ndim == 1 if hasattr(ids, "ndim") else not ids or not hasattr(ids[0], "__len__")


def _prompts(ids: Any) -> list[list[int]]:
    """The prompts as lists of ints."""
    if isinstance(ids, Tensor):
        ids = ids.data
    if hasattr(ids, "dtype"):
        ids = backend.to_numpy(ids)
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise ValueError(f"ids: got {ids.dtype} of shape {ids.shape}; integers (T,) or (B, T) are accepted")
        return ids.reshape(-1, ids.shape[-1]).tolist()
    if not isinstance(ids, list | tuple):
        raise TypeError(f"ids: got {type(ids).__name__}; lists of ids or an integer array are accepted")
    return [[int(i) for i in prompt] for prompt in ([ids] if _is_flat(ids) else ids)] or [[]]
