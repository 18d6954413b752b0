"""The numbers behind the page's live parts: small decompositions, code tables, the sizes of models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from .. import data
from ..measure.shapes import SIZES
from ..plots.lora import weight_and_update
from ..quant.codes import fp4_table, normal_float_table


def embedded() -> dict[str, Any]:
    """Everything the page's script needs, as JSON can hold it."""
    return {"matrices": matrices(), "codes": code_tables(), "sizes": model_sizes()}


def matrices() -> dict[str, dict[str, Any]]:
    """Decompositions from which any rank is put together: an image is `mean + U[:, :r] diag(S[:r]) Vt[:r]`."""
    images = data.digits.load().images.astype("float64")
    W, delta = weight_and_update()
    digit = images[12]
    mean = images.mean(axis=0)
    components = np.linalg.svd(images - mean, full_matrices=False)[2]
    scores = (digit - mean) @ components.T
    return {
        "pca": {"shape": [8, 8], **_pca(mean, scores, components)},
        "digit": _svd(digit.reshape(8, 8)),
        "weight": _svd(W),
        "update": _svd(delta),
    }


def _svd(W: np.ndarray) -> dict[str, Any]:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return {"shape": list(W.shape), "U": _short(U), "S": _short(S), "Vt": _short(Vt)}


def _pca(mean: np.ndarray, scores: np.ndarray, components: np.ndarray) -> dict[str, Any]:
    """One image as mean + Σ scoreᵢ·componentᵢ, the components in the order of what they explain of all images."""
    return {"mean": _short(mean), "scores": _short(scores), "components": _short(components)}


def code_tables() -> dict[str, list[float]]:
    """NF2 to NF8 and FP4, ascending; uniform codes need no table."""
    tables = {f"nf{bits}": normal_float_table(bits) for bits in range(2, 9)}
    return {name: [float(x) for x in table] for name, table in {**tables, "fp4": np.unique(fp4_table())}.items()}


def model_sizes() -> dict[str, dict[str, Any]]:
    """The sizes that have a name, by their nominal number of parameters."""
    return {str(number): asdict(shape) for number, shape in SIZES.items()}


def _short(x: np.ndarray) -> list[Any]:
    """Four significant digits: a page has no use for more."""
    return [_short(row) for row in x] if x.ndim > 1 else [float(f"{value:.4g}") for value in x]
