"""Seconds: how long a function takes, alone or beside others in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_count


@dataclass(frozen=True)
class Latency:
    """The time of one call in seconds, over `repeat` calls.

    Attributes:
        median: half the calls were faster.
        minimum: the fastest call, the least disturbed by whatever else the machine did.
        spread: the interquartile range: the middle half of the calls lies within it.
        repeat: how many calls were timed.
    """

    median: float
    minimum: float
    spread: float
    repeat: int

    def __str__(self) -> str:
        median, minimum, spread = map(format_seconds, (self.median, self.minimum, self.spread))
        return f"{median} (minimum {minimum}, spread {spread})"


class Comparison(dict[str, Latency]):
    """The latencies by name. `ratios` are the medians ÷ the first one's median."""

    @property
    def ratios(self) -> dict[str, float]:
        """Median ÷ the median of the first function; the first itself has 1.0."""
        first = next(iter(self.values())).median
        return {name: latency.median / first for name, latency in self.items()}

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:{width}}  {self.ratios[name]:7.3f} ×  {self[name]}" for name in self)


def latency(fn: Callable[[], Any], *, repeat: int = 20, warmup: int = 3) -> Latency:
    """Time `fn()`: `warmup` calls that do not count, then `repeat` that do, each by the monotonic clock.

    Raises:
        ValueError: repeat below 1 or warmup below 0.
        TypeError: `fn` is not callable.
    """
    return compare_latency({"fn": fn}, repeat=repeat, warmup=warmup)["fn"]


def compare_latency(fns: Mapping[str, Callable[[], Any]], *, repeat: int = 20, warmup: int = 3) -> Comparison:
    """Time functions in turn, in one run: each round calls every one once, and every other round in reverse order.

    So a slow phase of the machine meets all of them, and none always runs in the cache that another one left.

    Args:
        fns: what to time, by name; the first is what `ratios` compare with.
        repeat: rounds that count.
        warmup: rounds that do not.

    Raises:
        ValueError: nothing to time, repeat below 1 or warmup below 0.
        TypeError: something that is not callable.
    """
    if not fns:
        raise ValueError("fns: got none; at least one function by name is accepted")
    for name, fn in fns.items():
        if not callable(fn):
            raise TypeError(f"fns[{name!r}]: expected a function without arguments, got {type(fn).__name__}")
    check_count("repeat", repeat)
    check_count("warmup", warmup, least=0)
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(warmup + repeat):
        for name in fns if turn % 2 else reversed(fns):
            start = time.perf_counter()
            fns[name]()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return Comparison({name: _summary(times) for name, times in seconds.items()})


def _summary(times: list[float]) -> Latency:
    low, median, high = np.percentile(times, [25, 50, 75]).tolist()
    return Latency(median, min(times), high - low, len(times))


def format_seconds(seconds: float) -> str:
    """Three digits with a unit: "1.25 s", "310 µs"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
