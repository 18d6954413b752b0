"""The models, and `load_base`: an MLP or a vision transformer that has learned the upright digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import backend, nn
from ..files import read_tensors
from .mlp import MLP
from .vit import ViT

__all__ = ["MLP", "ViT", "base_file", "base_metadata", "load_base"]

BASES: dict[str, type[nn.Module]] = {"mlp": MLP, "vit": ViT}


def load_base(name: str, dtype: Any = None) -> nn.Module:
    """A pre-trained base, in eval mode: "mlp" (64-128-128-10) or "vit" (16 tokens of 48 features, 2 blocks).

    Args:
        name: "mlp" or "vit".
        dtype: of the parameters (they are stored in float32); None is the default dtype.

    Raises:
        ValueError: an unknown name.
    """
    model = base_class(name)(rng=0, dtype=dtype or backend.get_default_dtype())
    weights, _ = read_tensors(base_file(name))
    model.load_state_dict(weights)
    return model.eval()


def base_metadata(name: str) -> dict[str, Any]:
    """What the base's file says of itself: the command that made it, its seed and steps, its upright test accuracy.

    Raises:
        ValueError: an unknown name.
    """
    _, metadata = read_tensors(base_file(name))
    return json.loads(metadata["made"])


def base_file(name: str) -> Path:
    """Where the base is kept; ValueError for an unknown name."""
    base_class(name)
    return Path(__file__).with_name(f"{name}.safetensors")


def base_class(name: str) -> type[nn.Module]:
    """The class of a base; ValueError for an unknown name."""
    if name not in BASES:
        raise ValueError(f"name: got {name!r}; accepted are {', '.join(map(repr, BASES))}")
    return BASES[name]
