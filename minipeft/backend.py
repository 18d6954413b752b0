"""Which array library an array belongs to, its random numbers, its dtypes, and the one matrix product that is counted.

This is the only file that names NumPy and CuPy for work on tensor data: everything else asks `get_namespace(x)`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray: the library comes from the array, so no type says it

_default_dtype = np.dtype("float32")


def get_namespace(x: Array) -> ModuleType:
    """The library that `x` belongs to: `numpy` for NumPy arrays and scalars, else its type's root module (`cupy`)."""
    if type(x) is np.ndarray or isinstance(x, (np.generic, np.ndarray)):
        return np
    return sys.modules[type(x).__module__.partition(".")[0]]


def device_namespace(device: str | ModuleType) -> ModuleType:
    """`"cpu"` is NumPy, `"cuda"` is CuPy; a module that acts as an array library stands for itself."""
    if isinstance(device, ModuleType):
        return device
    if device == "cpu":
        return np
    if device.partition(":")[0] == "cuda":
        try:
            import cupy
        except ImportError as error:
            raise RuntimeError('device "cuda" needs CuPy: pip install "minipeft[gpu]"') from error
        return cupy
    raise ValueError(f'device: got {device!r}; accepted are "cpu", "cuda" or an array library')


def move(x: Array, device: str | ModuleType) -> Array:
    """`x` as an array of the device's library; the same object where it is there already."""
    source, target = get_namespace(x), device_namespace(device)
    return x if source is target else target.asarray(to_numpy(x))


def to_numpy(x: Array) -> np.ndarray:
    """`x` as a NumPy array, copied from the device where it lives on one (CuPy's `.get()`)."""
    return x if isinstance(x, np.ndarray) else x.get() if hasattr(x, "get") else np.asarray(x)


def is_float(dtype: Any) -> bool:
    """True for the dtypes that gradients exist in: float16, bfloat16 (ml_dtypes), float32, float64."""
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name == "bfloat16"  # .name costs 2 µs, .kind nothing


def get_default_dtype() -> np.dtype:
    """The dtype of Python numbers and of new parameters; float32 until `set_default_dtype` says otherwise."""
    return _default_dtype


def set_default_dtype(dtype: Any) -> None:
    """Set the dtype of Python numbers and of new parameters.

    Raises:
        TypeError: `dtype` is not float32 or float64 (half precision is for storage: compute in float32).
    """
    global _default_dtype
    if np.dtype(dtype).name not in ("float32", "float64"):
        raise TypeError(f"dtype: got {np.dtype(dtype).name}; accepted are float32 and float64")
    _default_dtype = np.dtype(dtype)


def as_array(data: Any, dtype: Any = None) -> Array:
    """`data` as an array: arrays keep their library and dtype and are not copied, Python floats take the default dtype.

    Raises:
        TypeError: `data` holds something that is not a number (strings, objects, ragged lists).
    """
    if type(data) is np.ndarray and data.dtype.kind == "f":  # the common case first
        return data if dtype is None or data.dtype == dtype else data.astype(dtype)
    if isinstance(data, np.ndarray | np.generic) or not hasattr(data, "dtype"):
        try:
            array = np.asarray(data)
        except ValueError as error:
            raise TypeError(f"data: rows of different lengths do not make an array ({error})") from error
        if array.dtype.kind not in "biuf" and not is_float(array.dtype):
            raise TypeError(f"data: expected numbers, got {type(data).__name__} of dtype {array.dtype}")
        if dtype is None and array.dtype == np.float64 and not isinstance(data, np.ndarray | np.generic):
            dtype = _default_dtype
        return array if dtype is None else array.astype(dtype, copy=False)
    return data if dtype is None else data.astype(dtype, copy=False)


def keep_array(x: Array) -> Array:
    """NumPy gives scalars where an array has no axes; values and gradients here are always arrays."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """The generator behind an `rng` argument: itself, one made from a seed, or (None) a fresh unpredictable one.

    Random numbers are always drawn by NumPy and then moved, so that the same seed gives the same bits on every device.
    """
    if rng is None or isinstance(rng, int | np.integer | np.random.Generator):
        return np.random.default_rng(rng)
    raise TypeError(f"rng: expected a numpy.random.Generator or an int seed, got {type(rng).__name__}")


def erf(x: Array) -> Array:
    """The error function 2/√π ∫₀ˣ exp(−t²) dt, from the array library's own special functions."""
    xp = get_namespace(x)
    if xp is np:
        from scipy.special import erf as scipy_erf  # imported here: it would cost every `import minipeft` 50 ms

        return scipy_erf(x).astype(x.dtype, copy=False)  # float16 comes back as float32
    if xp.__name__ == "cupy":
        from cupyx.scipy.special import erf as cupy_erf

        return cupy_erf(x)
    return xp.erf(x)


class FlopCounter:
    """Floating-point operations of the matrix products that ran: `counts[phase][operation]`, 2·m·n·k for each.

    Products are all but a few per mille of a network's arithmetic (PyTorch's counter leaves the rest out as well).
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
        self.phase = "forward"
        self.uncredited = 0  # products whose operation is not known yet: `credit` gives them their name

    def credit(self, op: str) -> None:
        """Give the products since the last call their operation's name."""
        if self.uncredited:
            counts = self.counts[self.phase]
            counts[op] = counts.get(op, 0) + self.uncredited
            self.uncredited = 0

    def backward_already(self, op: str, flops: int) -> None:
        """So many of the products since the last call formed a gradient, in an operation's forward pass."""
        self.uncredited -= flops
        self.counts["backward"][op] = self.counts["backward"].get(op, 0) + flops

    def add(self, other: FlopCounter) -> None:
        """Take over another counter's counts."""
        for phase, counts in other.counts.items():
            for op, flops in counts.items():
                self.counts[phase][op] = self.counts[phase].get(op, 0) + flops
        self.uncredited += other.uncredited

    @property
    def forward(self) -> int:
        """Flops of the forward passes."""
        return sum(self.counts["forward"].values())

    @property
    def backward(self) -> int:
        """Flops of the backward passes."""
        return sum(self.counts["backward"].values())

    @property
    def total(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward


flop_counter: FlopCounter | None = None


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCounter]:
    """Count the flops of everything that runs inside: `with count_flops() as flops: ...; flops.forward`.

    The products are counted as they are executed, so one that a frozen weight saves is not in the sum. A counter around
    this one gets the same counts when the block ends.
    """
    global flop_counter
    outer, flop_counter = flop_counter, FlopCounter()
    inner = flop_counter
    try:
        yield inner
    finally:
        flop_counter = outer
        if outer is not None:
            outer.add(inner)


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b. Every product of the library goes through here, so that `count_flops` sees what really ran."""
    product = get_namespace(a).matmul(a, b, out=out)
    if flop_counter is not None:
        flop_counter.uncredited += 2 * product.size * a.shape[-1]
    return product


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the system; elsewhere nothing happens.

    A training step frees and takes the same arrays again and again. Given back, each costs a page fault for every
    4 KiB: without them a LoRA step of a 135M-parameter model is 4 % faster. The process stays as large as it once was.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: arrays up to 32 MiB, the most it takes, come from the heap,
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: whose end is given back only beyond 1 GiB
