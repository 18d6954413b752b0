"""NumPy's BLAS: the kernel that it is told to run, and the functions of the library itself.

`import minipeft` imports this first, because OpenBLAS chooses its kernel once, when NumPy loads it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any


def faster_kernel(cpuinfo: str | None = None) -> str | None:
    """The OpenBLAS kernel that is faster on this processor than the one OpenBLAS chooses; None if that is the best.

    AMD's Zen 4 (family 25 with AVX-512) has 256-bit units, which take a 512-bit operation in two halves. OpenBLAS
    0.3.31 chooses its SkylakeX kernel there, for AVX-512. Haswell's takes 0.9 of its time for the large products of a
    LoRA step of a 135M-parameter model, and 0.94 for the step.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None reads it. There is none but on Linux.
    """
    if cpuinfo is None:
        try:
            with open("/proc/cpuinfo") as file:
                cpuinfo = file.read(8192)  # the first processor; all of a large machine's would take long
        except OSError:
            return None
    found = [re.search(rf"^{name}\s*: *(.*)$", cpuinfo, re.M) for name in ("vendor_id", "cpu family", "flags")]
    vendor, family, flags = (match[1].split() if match else [] for match in found)
    return "Haswell" if (vendor, family) == (["AuthenticAMD"], ["25"]) and "avx512f" in flags else None


# The user's own choice stands. Where NumPy was imported first it is too late.
asked = faster_kernel() if "numpy" not in sys.modules and "OPENBLAS_CORETYPE" not in os.environ else None
if asked:
    os.environ["OPENBLAS_CORETYPE"] = asked
import numpy as np  # noqa: E402

if asked:
    del os.environ["OPENBLAS_CORETYPE"]  # OpenBLAS has read it; other programs started from here choose for themselves


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, a product runs on the thread that asks for it. Where `openblas` finds the functions for that."""
    set_threads, before = openblas("openblas_set_num_threads"), openblas("openblas_get_num_threads")()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@functools.cache
def openblas(name: str) -> Any:
    """A function of the OpenBLAS that NumPy multiplies with; None where it is another library, or has no such function.

    NumPy's wheels rename the symbols of their OpenBLAS; system builds do not.
    """
    library = _library()
    spellings = [f"{prefix}{name}{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", "", "_64")]
    return next((getattr(library, s) for s in spellings if library is not None and hasattr(library, s)), None)


def running_kernel() -> str | None:
    """The name of the kernel that OpenBLAS runs, such as Haswell; None where it is another library."""
    import ctypes  # imported here, as below: every `import minipeft` would pay for it

    if name := openblas("openblas_get_corename"):
        name.restype = ctypes.c_char_p
        return name().decode()
    return None


@functools.cache
def _library() -> Any:
    """The OpenBLAS file mapped into this process (Linux), else the one in NumPy's wheel, else None."""
    import ctypes
    from pathlib import Path

    maps = Path("/proc/self/maps")
    mapped = re.findall(r"(/.*openblas.*)$", maps.read_text(), re.M) if maps.exists() else []
    root = Path(np.__file__).parent
    bundled = [p for folder in (root.parent / "numpy.libs", root / ".dylibs") for p in folder.glob("*openblas*")]
    ours = [Path(p) for p in mapped if "numpy" in p]  # SciPy's wheel brings its own OpenBLAS: not that one
    path = next(iter(ours + [Path(p) for p in mapped if "scipy.libs" not in p] + bundled), None)
    try:
        return ctypes.CDLL(str(path)) if path else None
    except OSError:
        return None
