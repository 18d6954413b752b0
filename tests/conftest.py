"""What all tests share: the array libraries they run on, and settings that make every run the same."""

from __future__ import annotations

import os

# A console takes COLUMNS when it is made, which the command's is at its import; tests set their own later.
os.environ.pop("COLUMNS", None)

import minipeft.cli  # noqa: F401

# isort: split
import cases
import numpy as np
import pytest
import standin
from hypothesis import HealthCheck, settings

# The same examples in every run, and few: the operations are small formulas, what matters is the kinds of shapes.
settings.register_profile(
    "plain",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("plain")


def _libraries() -> list:
    """NumPy, the stand-in for CuPy, and CuPy itself where it finds a device."""
    libraries = [np, standin]
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            libraries.append(cupy)
    except Exception:  # not installed, or installed without a driver
        pass
    return libraries


@pytest.fixture(params=_libraries(), ids=lambda library: library.__name__)
def xp(request: pytest.FixtureRequest) -> object:
    """An array library; a test that takes it runs on all of them. Models move with `module.to(xp)`."""
    return request.param


@pytest.fixture(scope="session")
def kept_operations() -> dict[str, np.ndarray]:
    """What PyTorch gave for `cases.CASES`."""
    return cases.references("ops")


@pytest.fixture(scope="session")
def kept_trajectories() -> dict[str, np.ndarray]:
    """What PyTorch gave for `cases.OPTIMIZERS`."""
    return cases.references("optim")
