"""Flops: `backend.count_flops`, with counters that may be nested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import backend
from ..backend import FlopCounter


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCounter]:
    """Count the flops of everything that runs inside: `with count_flops() as flops: ...; flops.forward`.

    The matrix products are counted as they are executed, 2·m·n·k each, so one that a frozen weight saves is not in the
    sum. A counter around this one gets the same counts when the block ends.
    """
    outer = backend.flop_counter
    with backend.count_flops() as counter:
        try:
            yield counter
        finally:
            if outer is not None:
                _add(outer, counter)


def _add(outer: FlopCounter, inner: FlopCounter) -> None:
    for phase, counts in inner.counts.items():
        for op, flops in counts.items():
            outer.counts[phase][op] = outer.counts[phase].get(op, 0) + flops
    outer.uncredited += inner.uncredited
