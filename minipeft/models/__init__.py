"""The models, and `load_base`: an MLP or a vision transformer that has learned the upright digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import backend, nn
from .mlp import MLP
from .vit import ViT

__all__ = ["MLP", "ViT", "base_metadata", "load_base"]

BASES: dict[str, type[nn.Module]] = {"mlp": MLP, "vit": ViT}


def load_base(name: str, dtype: Any = None) -> nn.Module:
    """A pre-trained base, in eval mode: "mlp" (64-128-128-10) or "vit" (16 tokens of 48 features, 2 blocks).

    Args:
        name: "mlp" or "vit".
        dtype: of the parameters (they are stored in float32); None is the default dtype.

    Raises:
        ValueError: an unknown name.
    """
    from safetensors.numpy import load_file  # imported here: `import minipeft` does without

    path = _path(name)
    model = BASES[name](rng=0, dtype=dtype or backend.get_default_dtype())
    model.load_state_dict(load_file(path))
    return model.eval()


def base_metadata(name: str) -> dict[str, str]:
    """What the base's file says of itself: the command that made it, its seed and steps, its upright test accuracy."""
    from safetensors import safe_open

    with safe_open(_path(name), framework="numpy") as file:
        return file.metadata()


def _path(name: str) -> Path:
    if name not in BASES:
        raise ValueError(f"name: got {name!r}; accepted are {', '.join(map(repr, BASES))}")
    return Path(__file__).with_name(f"{name}.safetensors")
