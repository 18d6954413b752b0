"""doctor: what it reads off the machine, and when it warns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from rich.console import Console

from minipeft import blas, doctor

AVX2 = {"sse4_2", "avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512vl", "avx512bw", "avx512dq"}


def test_cpu_info_reads_name_and_flags():
    name, flags = doctor.cpu_info("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma\n")
    assert (name, flags) == ("Some CPU @ 2 GHz", {"fpu", "avx2", "fma"})


def test_cpu_info_of_an_unknown_system_has_no_flags():
    name, flags = doctor.cpu_info("")
    assert name
    assert flags == frozenset()


@pytest.mark.parametrize(
    ("kernel", "flags", "expected"),
    [
        ("SkylakeX", AVX512, None),
        ("Haswell", AVX512, "SkylakeX"),
        ("Zen", AVX512, "SkylakeX"),
        ("Haswell", AVX2, None),
        ("Zen", AVX2, None),
        ("Nehalem", AVX2, "Haswell"),
        ("Nehalem", {"avx"}, "Sandybridge"),
        ("Prescott", set(), None),
        ("Haswell", AVX2 | {"avx512f"}, None),  # AVX-512 without VL, BW, DQ (Knights Landing): no kernel for it here
        ("neoversen1", {"asimd", "sve"}, None),
        (None, AVX512, None),
    ],
)
def test_a_higher_kernel_is_one_that_the_flags_allow(kernel: str | None, flags: set[str], expected: str | None):
    assert doctor.other_kernel(kernel, frozenset(flags)) == expected


@pytest.mark.parametrize(("kernel", "expected"), [("SkylakeX", "Haswell"), ("Haswell", "SkylakeX"), (None, None)])
def test_the_faster_kernel_is_compared_with_the_one_that_openblas_chooses(kernel: str | None, expected: str | None):
    assert doctor.other_kernel(kernel, frozenset(AVX512), "Haswell") == expected


def cpuinfo(vendor: str, family: int, flags: str) -> str:
    return f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\nflags\t\t: fpu {flags}\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpuinfo("AuthenticAMD", 25, "avx2 avx512f avx512bw"), "Haswell"),  # Zen 4
        (cpuinfo("AuthenticAMD", 25, "avx2 fma"), None),  # Zen 3: OpenBLAS chooses Zen
        (cpuinfo("AuthenticAMD", 26, "avx2 avx512f"), None),  # Zen 5 has 512-bit units
        (cpuinfo("GenuineIntel", 6, "avx2 avx512f"), None),
        ("processor\t: 0\nFeatures\t: fp asimd\n", None),
        ("", None),
    ],
)
def test_only_on_zen_4_is_another_kernel_asked_for(text: str, expected: str | None):
    assert blas.faster_kernel(text) == expected


@pytest.mark.parametrize(
    ("code", "given", "asks"),
    [("", None, True), ("import numpy", None, False), ("", "Nehalem", False)],
    ids=["minipeft first", "numpy first", "the user's choice"],
)
def test_the_kernel_is_asked_for_before_numpy_loads_and_the_environment_stays(code: str, given: str | None, asks: bool):
    program = f"{code}\nimport os, minipeft.blas as b\nprint(b.asked, os.environ.get('OPENBLAS_CORETYPE'))"
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    environment |= {"OPENBLAS_CORETYPE": given} if given else {}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(blas.faster_kernel() if asks else None), str(given)]


def test_a_slower_kernel_is_a_problem_with_a_remedy():
    finding, remedy = doctor.kernel_problem("Nehalem", 33.0, "SkylakeX", 102.0, {})
    assert "Nehalem kernel (SSE, 33 GFLOP/s)" in finding
    assert "102 GFLOP/s with SkylakeX (AVX-512)" in finding
    assert remedy == "export OPENBLAS_CORETYPE=SkylakeX"


def test_a_kernel_that_the_environment_asked_for_is_mended_by_unsetting_it():
    settings = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_L2_SIZE": "512", "OMP_NUM_THREADS": "2"}
    _, remedy = doctor.kernel_problem("Nehalem", 33.0, "SkylakeX", 102.0, settings)
    assert remedy == "unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE"


def test_a_lower_kernel_that_is_as_fast_is_no_problem():
    assert doctor.kernel_problem("Haswell", 219.0, "SkylakeX", 202.0, {}) is None


@pytest.mark.parametrize(
    ("threads", "cpus", "settings", "remedy"),
    [
        (1, 4, {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Zen"}, "unset OMP_NUM_THREADS"),
        (64, 2, {}, "export OPENBLAS_NUM_THREADS=2"),
    ],
)
def test_threads_that_are_not_the_processors_are_a_problem(threads: int, cpus: int, settings: dict, remedy: str):
    finding, what_helps = doctor.thread_problem(threads, cpus, settings)
    assert f"run on {threads} thread" in finding
    assert what_helps == remedy


@pytest.mark.parametrize("threads", [None, 2])
def test_threads_that_fit_or_are_unknown_are_no_problem(threads: int | None):
    assert doctor.thread_problem(threads, 2, {}) is None


def test_threads_that_wait_for_each_other_are_a_problem():
    finding, remedy = doctor.contention_problem({1: 51.0, 2: 30.0})
    assert "2 threads reach 30 GFLOP/s, one reaches 51" in finding
    assert remedy == "export OPENBLAS_NUM_THREADS=1"


@pytest.mark.parametrize("gflops", [{1: 100.0, 2: 199.0}, {1: 100.0}, {0: 100.0}])
def test_threads_that_help_or_are_unknown_are_no_problem(gflops: dict[int, float]):
    assert doctor.contention_problem(gflops) is None


def test_the_report_has_measured_speeds_and_leaves_the_threads_as_they_were():
    before = doctor.find_blas().threads
    found = doctor.report(n=64, megabytes=1, seconds=0.001)
    assert all(speed > 0 for speed in found.gflops.values())
    assert found.bandwidth > 0
    assert found.products_exact
    assert doctor.find_blas().threads == before


def test_the_machine_summary_names_what_figures_depend_on():
    summary = doctor.machine_summary()
    assert summary.keys() >= {
        "python",
        "numpy",
        "scipy",
        "cpu",
        "cpus",
        "blas",
        "kernel",
        "threads",
        "OPENBLAS_CORETYPE",
    }
    assert summary["cpus"] >= 1


def test_every_row_and_every_problem_is_shown():
    found = doctor.report(n=64, megabytes=1, seconds=0.001)
    found.problems = [("the sky is low", "look up")]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - the console keeps it
    doctor.show(found, console)
    text = console.export_text()
    assert all(word in text for word in ("kernel", "GFLOP/s", "GB/s", "warning: the sky is low", "Try: look up"))
    console.file.close()


def test_a_kernel_set_by_hand_is_seen_and_warned_of():
    """The real thing: OpenBLAS told to run its SSE kernel, on a processor that has more."""
    if doctor.other_kernel("Nehalem", doctor.cpu_info()[1]) is None or doctor.find_blas().kernel is None:
        pytest.skip("needs OpenBLAS on an x86 processor with AVX")
    for _ in range(3):  # beside other tests one of the two measurements may be far too slow
        run = subprocess.run(
            [sys.executable, "-m", "minipeft", "doctor"],
            env=os.environ | {"OPENBLAS_CORETYPE": "Nehalem", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=True,
        )
        if "OpenBLAS runs" in run.stdout:
            break
    assert "OpenBLAS runs its Nehalem kernel (SSE" in run.stdout
    assert "Try: unset OPENBLAS_CORETYPE" in run.stdout
