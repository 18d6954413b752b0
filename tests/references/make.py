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

    kind, options = cases.OPTIMIZERS[name]
    params = [torch.tensor(cases.numbers(s, i).astype(dtype), requires_grad=True) for i, s in enumerate(cases.SHAPES)]
    optimizer = getattr(torch.optim, kind)(cases.groups(params), **options)
    convert, read = lambda g: torch.tensor(g.astype(dtype)), lambda p: p.detach().numpy().copy()
    return cases.steps(optimizer, params, convert, read)


def kept(history: list[list[np.ndarray]]) -> np.ndarray:
    """The steps of a trajectory that the file keeps, as one row."""
    return cases.flat([a for step in cases.KEPT_STEPS for a in history[step - 1]])


def main() -> None:
    """Write both files."""
    operations = {name: cases.flat(torch_value_and_gradients(case)) for name, case in cases.CASES.items()}
    np.savez_compressed(cases.REFERENCES / "ops.npz", **operations)
    np.savez_compressed(cases.REFERENCES / "optim.npz", **{n: kept(torch_trajectory(n)) for n in cases.OPTIMIZERS})


if __name__ == "__main__":
    main()
