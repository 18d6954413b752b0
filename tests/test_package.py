"""The package as it is installed: its version, what importing it costs, the files that come with it."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import minipeft

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_the_package_and_pyproject_give_the_same_version():
    assert minipeft.__version__ == re.search(r'^version = "(.+)"$', PYPROJECT.read_text(), re.M)[1]


def test_every_public_name_exists():
    assert [name for name in minipeft.__all__ if not hasattr(minipeft, name)] == []


def test_importing_the_package_imports_no_other_dependency_than_numpy():
    code = "import sys, minipeft; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    assert {"scipy", "matplotlib", "rich", "typer", "safetensors", "torch"} & set(python(code).split()) == set()


def test_importing_the_command_line_imports_no_scipy():
    assert python("import sys, minipeft.cli; print('scipy' in sys.modules)") == "False"


def test_what_importing_costs_beside_numpy(capsys: pytest.CaptureFixture[str]):
    """The ratio is printed, not asserted: on a busy machine single imports vary by half."""

    def seconds(module: str) -> float:
        return float(python(f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"))

    pairs = [(seconds("minipeft"), seconds("numpy")) for _ in range(5)]
    ratio = statistics.median(ours / numpys for ours, numpys in pairs)
    with capsys.disabled():
        print(f"\nimport minipeft takes {ratio:.2f} times as long as import numpy (aim: 1.5 at most)")
    assert ratio > 1  # it imports NumPy


@pytest.mark.parametrize(
    "name", ["data/digits.npz", "data/README.md", "models/vit.safetensors", "models/mlp.safetensors"]
)
def test_data_files_are_inside_the_package(name: str):
    assert (resources.files("minipeft") / name).read_bytes()
