"""Threads: tasks side by side, element-wise work over all of them, and on each in parts that its cache holds.

NumPy releases the GIL while it computes, so Python threads run NumPy side by side. BLAS has threads of its own, which
wait for each other by spinning: while they are awake a Python thread on their processor is slower than none (an
activation of 512 × 1536 numbers took 1.1 ms on one thread and 1.5 ms on two). Hence either BLAS uses all processors and
the rest one, or, inside `side_by_side`, BLAS uses one and Python threads use all.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import backend, blas

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

PART = 1 << 16  # elements: 256 KiB of float32, which a second-level cache holds with what is made of them


def affinity() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """Processors that this process gets: `taskset`'s and a container's share, not the whole machine's."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # "200000 100000": two processors' time; "max 100000": no limit
            used, period = file.read().split()
    except OSError:
        used, period = "max", "1"
    return affinity() if used == "max" else max(1, min(affinity(), round(int(used) / int(period))))


@functools.cache
def threads() -> int:
    """How many threads there are to use: what OPENBLAS_NUM_THREADS or OMP_NUM_THREADS says, else one a processor."""
    asked = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return min(int(asked), affinity()) if asked.isdigit() and int(asked) else usable_cpus()


def in_parts(work: Callable[[int, int], None], n: int, xp: ModuleType, width: int = 1) -> None:
    """Call work(start, stop) on parts of 0 … n rows of `width` elements, each of about `PART` elements.

    What several operations pass over then stays in the cache from the first to the last. On a device there is one part.
    """
    length = max(1, PART // max(1, width)) if xp is np else n
    for start in range(0, n, max(1, length)):
        work(start, min(n, start + length))


# --- tasks side by side -----------------------------------------------------------------------------------------------


_inside = contextvars.ContextVar("inside", default=False)


def inside() -> bool:
    """Whether this is one of the tasks of a `side_by_side`, or inside `one_by_one`: nothing splits any further."""
    return _inside.get()


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Inside, `side_by_side` runs tasks one after the other: where each would hold what is to be there only once."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def available() -> int:
    """How many tasks `side_by_side` would run at a time, here and now; 1 where they come one after the other."""
    apart = inside() or backend.flop_counter is not None or blas.openblas("openblas_set_num_threads") is None
    return 1 if apart else threads()


def side_by_side(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of the tasks, each run in a thread of its own with one BLAS thread; in their order.

    Context variables (gradients on or off, NumPy's error settings) are as they are here. The tasks must not write to
    the same arrays. They run one after the other where the number of BLAS threads cannot be set, inside another call,
    and while flops are counted.
    """
    if len(tasks) < 2 or available() < 2:
        return [task() for task in tasks]
    with one_by_one(), blas.one_thread():  # no task splits again
        return _at_once(tasks)


def run_all(parts: Sequence[Callable[[], None]]) -> None:
    """Run the parts, none of which multiplies matrices, on all threads.

    Each thread takes its own run of neighbours, then from the far end of what the others have left: fresh memory comes
    in huge pages, and threads that meet in one both clear it. Inside a `side_by_side` the thread that asks takes all.
    """
    count = 1 if inside() else min(threads(), len(parts))
    if count < 2:
        for part in parts:
            part()
        return
    shares = [deque(parts[len(parts) * i // count : len(parts) * (i + 1) // count]) for i in range(count)]

    def take(own: int) -> None:
        for share in (shares[own], *shares[own + 1 :], *shares[:own]):
            while True:
                try:  # a deque's own operations need no lock
                    part = share.popleft() if share is shares[own] else share.pop()
                except IndexError:
                    break
                part()

    _at_once([partial(take, i) for i in range(count)])


def _at_once(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    others = [_pool(os.getpid()).submit(contextvars.copy_context().run, task) for task in tasks[1:]]
    try:
        first = tasks[0]()
    finally:  # nobody else may see the arrays while they are still written to
        for other in others:
            other.exception()
    return [first, *[other.result() for other in others]]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Worker threads. One pool a process: a fork takes the object along but not its threads."""
    from concurrent.futures import ThreadPoolExecutor  # imported here: it would cost every `import minipeft` 5 ms

    return ThreadPoolExecutor(max(1, threads() - 1), thread_name_prefix="minipeft")
