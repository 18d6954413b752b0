"""What this machine does with NumPy's matrix products: `minipeft doctor`.

Every figure of the ledger is a figure of some machine, and the largest difference between two machines of the same
price is the kernel that OpenBLAS chose. `report` measures and judges; `show` prints what it found.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .blas import asked, faster_kernel, openblas, running_kernel
from .threads import usable_cpus

SETTINGS = (
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "GOTO_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_",
)  # fmt: skip

LEVELS = ("SSE", "AVX", "AVX2", "AVX-512")
# The level of each x86 kernel of OpenBLAS. Kernels of one level take the same float32 product (Zen is Haswell's).
KERNELS = {
    name.lower(): index
    for index, names in enumerate((
        "Katmai Coppermine Northwood Prescott Banias Core2 Penryn Dunnington Nehalem Atom Opteron Opteron_SSE3 "
        "Barcelona Bobcat Nano", "Sandybridge Bulldozer Piledriver Steamroller Excavator", "Haswell Zen",
        "SkylakeX Cooperlake SapphireRapids"))
    for name in names.split()
}  # fmt: skip


@dataclass
class Blas:
    """The BLAS library that NumPy multiplies with; `kernel` and `threads` are None where the library does not tell."""

    name: str
    version: str
    kernel: str | None = None
    threads: int | None = None
    set_threads: Callable[[int], Any] | None = field(default=None, repr=False)


@dataclass
class DoctorReport:
    """What `report` found. Speeds are the best of several runs; `problems` pairs each finding with its remedy."""

    machine: dict[str, Any]
    settings: dict[str, str]
    gflops: dict[int, float]  # float32 matmul, by number of threads (0: threads unknown)
    alternative: tuple[str, float] | None  # a kernel that may be faster, and its GFLOP/s with all threads
    bandwidth: float  # GB/s, bytes read plus bytes written by a copy that no cache holds
    products_exact: bool
    problems: list[tuple[str, str]]


# --- what is there ----------------------------------------------------------------------------------------------------


def cpu_info(cpuinfo: str | None = None) -> tuple[str, frozenset[str]]:
    """The processor's name and its instruction-set flags, from /proc/cpuinfo's text (no flags where there is none)."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", cpuinfo, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", cpuinfo, re.M)
    return name[1].strip() if name else platform.processor() or platform.machine(), frozenset(
        flags[1].split() if flags else ()
    )


def find_blas() -> Blas:
    """NumPy's BLAS: name and version from its build, kernel and threads from the loaded OpenBLAS itself."""
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    blas = Blas(built.get("name", "unknown"), built.get("version", "unknown"), running_kernel())
    if get_threads := openblas("openblas_get_num_threads"):
        blas.threads = int(get_threads())
    blas.set_threads = openblas("openblas_set_num_threads")
    return blas


def machine_summary() -> dict[str, Any]:
    """The machine that a figure came from, JSON-able: versions, processor, BLAS, kernel, threads."""
    blas = find_blas()
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": metadata.version("scipy"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_info()[0],
        "cpus": usable_cpus(),
        "blas": f"{blas.name} {blas.version}",
        "kernel": blas.kernel,
        "threads": blas.threads,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE"),
    }


# --- what is wrong ----------------------------------------------------------------------------------------------------


def other_kernel(kernel: str | None, flags: frozenset[str], faster: str | None = None) -> str | None:
    """A kernel to compare the running one with: `faster` (from `blas.faster_kernel`) unless that is what runs, else one
    of a higher level that a processor with these flags can run; None if there is none."""
    running = KERNELS.get((kernel or "").lower(), len(LEVELS))  # one that is not known is not judged
    if faster and running not in (KERNELS[faster.lower()], len(LEVELS)):
        return faster
    possible = {
        "SkylakeX": {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags,
        "Haswell": {"avx2", "fma"} <= flags,
        "Sandybridge": "avx" in flags,
    }
    return next((name for name, able in possible.items() if able and KERNELS[name.lower()] > running), None)


def kernel_problem(
    kernel: str, speed: float, other: str, other_speed: float, settings: Mapping[str, str]
) -> tuple[str, str] | None:
    """(finding, remedy) when OpenBLAS could run the `other` kernel and that is measurably faster, else None.

    The level alone decides nothing (see `blas.faster_kernel`). A tenth is asked for because two runs differ by some
    per cent.
    """
    if other_speed < 1.1 * speed:
        return None
    has, could = (LEVELS[KERNELS[name.lower()]] for name in (kernel, other))
    finding = (
        f"OpenBLAS runs its {kernel} kernel ({has}, {speed:.0f} GFLOP/s), "
        f"but this processor reaches {other_speed:.0f} GFLOP/s with {other} ({could})"
    )
    given = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in settings]
    if "OPENBLAS_CORETYPE" in given:
        return finding, f"unset {' '.join(given)}"
    return finding, f"export OPENBLAS_CORETYPE={other}"


def thread_problem(threads: int | None, cpus: int, settings: Mapping[str, str]) -> tuple[str, str] | None:
    """(finding, remedy) when matrix products use more or fewer threads than there are processors, else None."""
    if threads is None or threads == cpus:
        return None
    given = [name for name in SETTINGS if name.endswith("NUM_THREADS") and name in settings]
    threads_, cpus_ = (f"{n} {noun}{'s' * (n > 1)}" for n, noun in ((threads, "thread"), (cpus, "processor")))
    finding = f"matrix products run on {threads_}, and this process may use {cpus_}"
    return finding, f"unset {' '.join(given)}" if given else f"export OPENBLAS_NUM_THREADS={cpus}"


def contention_problem(gflops: Mapping[int, float]) -> tuple[str, str] | None:
    """(finding, remedy) when more threads multiply slower than one, else None.

    OpenBLAS's threads wait for each other by spinning. On two processors that other programs kept busy, a product of
    (64, 128) by (128, 128) took 9 ms on average with two threads and 0.06 ms with one.
    """
    threads = max(gflops)
    if threads < 2 or gflops[threads] > gflops.get(1, 0):
        return None
    speeds = f"{threads} threads reach {gflops[threads]:.0f} GFLOP/s, one reaches {gflops[1]:.0f}"
    return f"{speeds}: other programs keep the processors busy", "export OPENBLAS_NUM_THREADS=1"


# --- how fast ---------------------------------------------------------------------------------------------------------


def _best_seconds(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit in `seconds` (at least three, after one that warms up)."""
    run()
    best, count, start = float("inf"), 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - begin), count + 1
    return best


def matmul_gflops(n: int = 1024, seconds: float = 0.3) -> float:
    """10⁹ float32 operations a second of an (n, n) @ (n, n) product, which takes 2n³ of them."""
    a, b, out = np.ones((3, n, n), np.float32)
    return 2 * n**3 / _best_seconds(lambda: np.matmul(a, b, out=out), seconds) / 1e9


def copy_bandwidth(megabytes: int = 128, seconds: float = 0.3) -> float:
    """GB/s of a copy larger than the caches: what is read plus what is written."""
    source, target = np.ones((2, megabytes * 10**6 // 4), np.float32)
    return 2 * source.nbytes / _best_seconds(lambda: np.copyto(target, source), seconds) / 1e9


def products_exact(n: int = 257) -> bool:
    """Whether float32 products of small integers are exact, as they must be: a kernel the processor lacks may lie."""
    a, b = np.random.default_rng(0).integers(-8, 9, (2, n, n))  # |sums| ≤ 64n < 2²⁴: every float32 sum is exact
    return bool(np.array_equal(a.astype(np.float32) @ b.astype(np.float32), a @ b))


def gflops_with(kernel: str, n: int = 1024, seconds: float = 0.3) -> float | None:
    """`matmul_gflops` of a fresh process told to run `kernel`; None where that fails or computes wrong products."""
    code = f"from minipeft.doctor import *; print(find_blas().kernel, products_exact(), matmul_gflops({n}, {seconds}))"
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_L2_SIZE"} | {"OPENBLAS_CORETYPE": kernel}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    ran, exact, speed = run.stdout.split() if run.returncode == 0 else ("", "", "nan")
    return float(speed) if (ran.lower(), exact) == (kernel.lower(), "True") else None


def report(n: int = 1024, megabytes: int = 128, seconds: float = 0.3) -> DoctorReport:
    """Look at this machine and measure it: an (n, n) product and a copy of `megabytes`, `seconds` for each measurement.

    The product is timed with one thread and with as many as the library uses, which are set back afterwards.
    """
    blas, machine = find_blas(), machine_summary()
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    gflops = {}
    if blas.set_threads and blas.threads and blas.threads > 1:
        blas.set_threads(1)
        try:
            gflops[1] = matmul_gflops(n, seconds)
        finally:
            blas.set_threads(blas.threads)
    gflops[blas.threads or 0] = speed = matmul_gflops(n, seconds)
    problems = [contention_problem(gflops), thread_problem(blas.threads, machine["cpus"], settings)]
    other = other_kernel(blas.kernel, cpu_info()[1], faster_kernel())
    other_speed = gflops_with(other, n, seconds) if other else None
    if blas.kernel and other and other_speed:
        problems.append(kernel_problem(blas.kernel, speed, other, other_speed, settings))
    exact = products_exact()
    if not exact:
        problems.append(("this BLAS computes wrong float32 products here", 'pip install --upgrade "numpy>=2.0"'))
    return DoctorReport(
        machine=machine,
        settings=settings,
        gflops=gflops,
        alternative=(other, other_speed) if other and other_speed else None,
        bandwidth=copy_bandwidth(megabytes, seconds),
        products_exact=exact,
        problems=[problem for problem in problems if problem],
    )


def show(found: DoctorReport, console: Any) -> None:
    """Print a report on a rich console: one table, then every problem with the command that mends it."""
    from rich.table import Table

    m = found.machine
    table = Table("", "this machine", title="minipeft doctor", title_justify="left", show_header=False)
    table.add_row("Python", f"{m['python']} on {m['system']}")
    table.add_row("NumPy, SciPy", f"{m['numpy']}, {m['scipy']}")
    table.add_row("processor", f"{m['cpu']}, {m['cpus']} usable")
    table.add_row("BLAS", m["blas"])
    chosen = " (minipeft asks OpenBLAS for it on this processor)" if asked else ""
    table.add_row("kernel", (m["kernel"] or "unknown (this library does not tell)") + chosen)
    table.add_row("threads", str(m["threads"] or "unknown"))
    table.add_row("settings", "\n".join(f"{k}={v}" for k, v in found.settings.items()) or "none set")
    for threads, speed in found.gflops.items():
        label = "float32 matmul" + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
        table.add_row(label, f"{speed:.0f} GFLOP/s")
    if found.alternative:
        table.add_row(f"the same with {found.alternative[0]}", f"{found.alternative[1]:.0f} GFLOP/s")
    table.add_row("memory (copy)", f"{found.bandwidth:.1f} GB/s")
    table.add_row("products of integers", "exact" if found.products_exact else "[bold red]WRONG")
    console.print(table)
    for finding, remedy in found.problems:
        console.print(f"[bold yellow]warning:[/] {finding}.\n  Try: [bold]{remedy}[/]", highlight=False, soft_wrap=True)
    if not found.problems:
        console.print("[green]Nothing to mend.[/]")
