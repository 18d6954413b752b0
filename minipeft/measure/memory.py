"""Bytes: what a model, its gradients, its optimizer and the live graph hold now, and the peak of a block of code."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..backend import Array
from ..nn import Module
from ..optim import Optimizer
from ..peft import PeftModel
from ..tensor import Held, Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryReport:
    """The parts of training memory, in bytes.

    Attributes:
        weights: parameters and other arrays of the model, trained or not.
        gradients: `.grad` of the parameters.
        optimizer: the optimizer's state, and what the adapters' methods carry from step to step beside it.
        activations: what the forward pass keeps for backward; None where it is not known.
        trainable_weights: the part of `weights` that is trained.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    trainable_weights: int

    @property
    def total(self) -> int:
        """weights + gradients + optimizer + activations (0 where those are not known)."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def as_dict(self) -> dict[str, int | None]:
        """All parts by name, and "total"."""
        return {**dataclasses.asdict(self), "total": self.total}

    def __str__(self) -> str:
        def row(name: str, size: int | None) -> str:
            return f"{name:13}{'not known' if size is None else format_bytes(size):>12}"

        rows = [row(name, getattr(self, name)) for name in ("weights", "gradients", "optimizer", "activations")]
        rows[0] += f"   (trainable: {format_bytes(self.trainable_weights)})"
        return "\n".join([*rows, row("total", self.total)])

    __repr__ = __str__


def format_bytes(size: float) -> str:
    """Bytes with a binary unit: "512 B", "1.50 KiB", "3.25 GiB"."""
    if size < 1024:
        return f"{size:.0f} B"
    power = 0
    while size >= 1023.995 and power < 5:  # what would be shown as 1024.00 is 1.00 of the next unit
        size, power = size / 1024, power + 1
    return f"{size:.2f} {'KMGTP'[power - 1]}iB"


def memory_report(model: Module, optimizer: Optimizer | None = None) -> MemoryReport:
    """Bytes in use now, read off the arrays themselves; memory that arrays share counts once.

    Ask between forward and backward, with the loss still in a variable: that is when activations exist. Then:

    - weights: the arrays in the model's modules: parameters, quantized codes and scales, tables.
    - gradients: `.grad` of its parameters, where there is one.
    - optimizer: the state arrays (`optimizer.nbytes`), without the two work buffers that all units share; and the
      arrays that the methods of a PeftModel hold (the moments of LoRA-Pro's full variant, AdaLoRA's scores).
    - activations: arrays that the gradient functions of live graphs captured (`tensor.Held.live`), except the model's
      own. Of all live graphs: drop other losses first. The batch is among them where a trained first layer needs it.

    A graph also keeps the outputs between its operations alive, as its tensors' `.data`, whether or not backward needs
    them; `peak_memory` sees those too.

    Raises:
        TypeError: not a Module, not an Optimizer.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected an Optimizer, got {type(optimizer).__name__}")
    parameters = list(model.parameters())
    weights = [array for module in model.modules() for array in _arrays(list(vars(module).values()))]
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = weights + gradients
    methods = model.methods.values() if isinstance(model, PeftModel) else ()
    carried = [array for method in methods for array in _arrays(list(vars(method).values()))]
    return MemoryReport(
        weights=distinct_bytes(weights),
        gradients=distinct_bytes(gradients),
        optimizer=(0 if optimizer is None else optimizer.nbytes) + distinct_bytes(own + carried) - distinct_bytes(own),
        activations=distinct_bytes(own + captured_arrays()) - distinct_bytes(own),
        trainable_weights=distinct_bytes(p.data for p in parameters if p.requires_grad),
    )


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays in a module's attribute: itself, in lists and dictionaries, in dataclasses (quantized tensors)."""
    if isinstance(value, Tensor):
        yield value.data
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _arrays([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif hasattr(type(value), "nbytes") and hasattr(value, "strides") and not isinstance(value, np.generic):
        yield value


def captured_arrays() -> list[Array]:
    """The arrays that gradient functions of live graphs captured.

    `Held.live` also lists the array behind every captured view, once for each time; without those a batch that is a
    slice of a data set would count as the whole data set.
    """
    live = {key: (array, holders) for key, (array, holders, _) in list(Held.live.items())}
    captures = {key: holders for key, (_, holders) in live.items()}
    for array, holders in live.values():
        if id(array.base) in captures:
            captures[id(array.base)] -= holders
    return [live[key][0] for key, count in captures.items() if count > 0]


def distinct_bytes(arrays: Iterable[Array]) -> int:
    """The bytes that the arrays address, each byte counted once.

    Host arrays are intervals of addresses; an array on a device counts as the whole array that owns its memory.
    """
    spans: set[tuple[int, int, int]] = set()  # (0, start, end) on the host, (id of the owner, 0, size) on a device
    for array in arrays:
        if isinstance(array, np.ndarray):
            spans.add((0, *np.lib.array_utils.byte_bounds(array)) if array.size else (0, 0, 0))
        else:
            owner = array if array.base is None else array.base
            spans.add((id(owner), 0, owner.nbytes))
    total, place, reached = 0, 0, 0
    for where, start, end in sorted(spans):
        start = max(start, reached) if where == place else start
        total += max(0, end - start)
        place, reached = where, max(end, start)
    return total


class PeakMemory:
    """What `peak_memory` found; `bytes` is up to date when the block has ended.

    Attributes:
        bytes: the most that was allocated at one time above what was allocated when the block began.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._start = tracemalloc.get_traced_memory()[0]

    def _note(self) -> None:
        self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[1] - self._start)


_open_blocks: list[PeakMemory] = []


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Peak bytes that Python and NumPy allocate in a block: `with peak_memory() as peak: ...; peak.bytes`.

    Measured by the standard library's tracemalloc, which NumPy reports its arrays to. Every allocation in the block is
    seen, so it is exact and not sampled, but Python code runs slower. Not seen: what a BLAS, a device or a memory map
    allocates. Blocks may be nested.
    """
    started_here = not tracemalloc.is_tracing()
    if started_here:
        tracemalloc.start()
    _note_peaks()
    peak = PeakMemory()
    _open_blocks.append(peak)
    try:
        yield peak
    finally:
        _note_peaks()
        _open_blocks.remove(peak)
        if started_here:
            tracemalloc.stop()


def _note_peaks() -> None:
    """Every open block notes the peak up to now, before tracemalloc's own record of it begins anew."""
    for peak in _open_blocks:
        peak._note()
    tracemalloc.reset_peak()
