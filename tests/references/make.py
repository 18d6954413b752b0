"""Write ops.npz and optim.npz with the numbers that PyTorch gives for the tables in tests/cases.py.

Run it where PyTorch is installed, after a change to those tables: `python tests/references/make.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases


def torch_value_and_gradients(case: cases.Case, dtype: Any = "float64") -> list[np.ndarray]:
    """As `cases.value_and_gradients`, by PyTorch."""
    import torch

    inputs = [torch.tensor(x.data, requires_grad=True) for x in case.inputs(dtype)]
    out = case.torch(*inputs)
    out.backward(torch.from_numpy(cases.numbers(tuple(out.shape), 9).astype(dtype)))
    return [a.numpy() for a in (out.detach(), *(x.grad for x in inputs))]


def torch_trajectory(name: str, dtype: Any = "float64") -> list[list[np.ndarray]]:
    """As `cases.trajectory`, by PyTorch."""
    import torch

    params = [torch.tensor(values, requires_grad=True) for values in cases.starting_values(dtype)]
    optimizer = cases.optimizer(name, params, torch.optim)
    walk = cases.steps(name, optimizer, params, lambda g: torch.tensor(g.astype(dtype)), range(1, cases.STEPS + 1))
    return [[p.detach().numpy().copy() for p in params] for _ in walk]


def main() -> None:
    """Write both files."""
    operations = {name: cases.flat(torch_value_and_gradients(case)) for name, case in cases.CASES.items()}
    trajectories = {name: cases.kept(torch_trajectory(name)) for name in cases.OPTIMIZERS}
    np.savez_compressed(cases.REFERENCES / "ops.npz", **operations)
    np.savez_compressed(cases.REFERENCES / "optim.npz", **trajectories)


if __name__ == "__main__":
    main()
