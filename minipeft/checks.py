"""What many functions ask of an argument, in the same words: the argument, what was given, what is accepted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np


def check_choice(argument: str, value: Any, accepted: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if value not in tuple(accepted):  # a tuple compares what has no hash, too
        raise ValueError(f"{argument}: got {value!r}; accepted are {', '.join(map(repr, accepted))}")


def check_flag(argument: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument}: got {value!r}; True and False are accepted")


def check_count(argument: str, value: Any, least: int = 1) -> int:
    """`value` as an int.

    Raises:
        ValueError: it is no int, or below `least`; True is no int here.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{argument}: got {value!r}; an int of at least {least} is accepted")
    return int(value)


def check_positive(argument: str, value: Any) -> float:
    """`value` as a Python number.

    Raises:
        ValueError: it is no number, or not in (0, ∞).
    """
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{argument}: got {value!r}; a positive number is accepted")
    return value if isinstance(value, int) else float(value)


def shape_or_type(x: Any) -> Any:
    """For messages: (2, 3), or the name of the type of what is no array."""
    return getattr(x, "shape", type(x).__name__)
