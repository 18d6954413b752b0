"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import files
from .backend import Array, get_namespace, matmul
from .methods.adalora import AdaLoraConfig
from .methods.bottleneck import BottleneckAdapterConfig
from .methods.hybrid import FullThenLoraConfig
from .methods.lora import LoraConfig
from .methods.p_tuning import PromptEncoderConfig
from .targets import ALL_LINEAR

CONFIGS: dict[str, type] = {  # by the peft_type in adapter_config.json; PEFT has the first three
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "P_TUNING": PromptEncoderConfig,
    "BOTTLENECK_ADAPTER": BottleneckAdapterConfig,
    "FULL_THEN_LORA": FullThenLoraConfig,
}


def write_adapter(path: str | os.PathLike, config: Any, values: dict[str, Array]) -> None:
    """Write an adapter's tensors and config into a directory, each file whole or not at all."""
    data = {**config.to_dict(), "inference_mode": True}
    metadata = {"format": "pt"}  # PEFT writes so; readers ask for it
    files.write_tensors(Path(path) / "adapter_model.safetensors", values, metadata)
    files.write_json(Path(path) / "adapter_config.json", data)


def read_adapter(path: str | os.PathLike) -> tuple[Any, dict[str, Array]]:
    """The config and the tensors of a saved adapter.

    Raises:
        FileNotFoundError: no adapter_config.json or adapter_model.safetensors there.
        ValueError: not an adapter, one of a kind that is not here or whose base is lost (PEFT's LoftQ), or pickled
            weights, which can run code.
    """
    directory = Path(path)
    data = files.read_json(directory / "adapter_config.json")
    kind = data.get("peft_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"{directory}: peft_type is {kind!r}; accepted are {', '.join(map(repr, CONFIGS))}")
    if data.get("init_lora_weights") == "loftq":
        raise ValueError(
            f"{directory}: init_lora_weights is 'loftq': the adapter belongs to codes that PEFT made and did not save; "
            "save the base with them there, set init_lora_weights=True before saving the adapter, and load both"
        )
    if not (directory / "adapter_model.safetensors").exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
    values, _ = files.read_tensors(directory / "adapter_model.safetensors")
    values = {name: a for name, a in values.items() if not _is_repeated(name)}
    return _with_used_targets(CONFIGS[kind].from_dict(data), values), values


def _with_used_targets(config: Any, values: dict[str, Array]) -> Any:
    """The config without target names that no tensor is for: PEFT passes over names that its model does not have."""
    if isinstance(getattr(config, "target_modules", None), str | None):
        return config
    adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in values if ".lora_" in name}
    used = [target for target in config.target_modules if any(f".{name}".endswith(f".{target}") for name in adapted)]
    return replace(config, target_modules=used or config.target_modules)


def _is_repeated(name: str) -> bool:
    """With bias="all" PEFT writes the biases of its `modules_to_save` wrappers twice, and those of the originals."""
    return ".original_module." in name or ".modules_to_save." in name


def check_fit(path: str | os.PathLike, values: dict[str, Array], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the tensors are those that a model wants: `wanted` are its shapes by name."""
    missing, extra = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path}: the adapter does not fit the model: missing {missing[:4] or 'nothing'}, "
            f"not in the model {extra[:4] or 'nothing'} ({len(missing)} and {len(extra)} in all)"
        )
    for name, shape in wanted.items():
        if values[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {values[name].shape}, the model needs {shape}")


def portable(config: Any, targets: list[str]) -> Any:
    """The config in words that PEFT knows: targets by their names, since its "all-linear" means another set on models
    that are not its own; and of the start values only whether the base stays as it is.

    LoftQ's authors save so too, for the base with the codes. PEFT passes over the `loftq_config` that stays; here it
    says that an unquantized base is to become codes first.
    """
    changes: dict[str, Any] = {}
    wanted = getattr(config, "target_modules", targets)
    if wanted is None or (isinstance(wanted, str) and wanted.lower() in ALL_LINEAR):
        changes["target_modules"] = targets
    if getattr(config, "init_lora_weights", None) in ("kaiming", "gaussian_b", "loftq"):
        changes["init_lora_weights"] = True
    return replace(config, **changes)


def without_offset(
    values: dict[str, Array], config: LoraConfig, offsets: dict[str, tuple[Array, Array]]
) -> tuple[dict[str, Array], LoraConfig]:
    """The same update as an ordinary adapter of rank 2r; α grows with the rank, so that s stays α/r (or α/√r).

    Where a weight has no rank 2r the product itself is one factor and the identity the other.
    """
    values, ranks, alphas = dict(values), {}, {}
    growth = lambda ratio: ratio**0.5 if config.use_rslora else ratio  # noqa: E731
    for name, (A0, B0) in offsets.items():
        xp, key = get_namespace(A0), f"base_model.model.{name}"
        A = xp.concatenate([values[f"{key}.lora_A.weight"], A0], axis=0)  # (2r, in)
        B = xp.concatenate([values[f"{key}.lora_B.weight"], -B0], axis=1)  # (out, 2r)
        most = min(B.shape[0], A.shape[1])
        if A.shape[0] > most:
            identity = xp.eye(most, dtype=A.dtype)
            A, B = (matmul(B, A), identity) if B.shape[0] == most else (identity, matmul(B, A))
        values[f"{key}.lora_A.weight"], values[f"{key}.lora_B.weight"] = A, B
        exactly = f"^{re.escape(name)}"  # "$" is added when it is matched
        ranks[exactly] = A.shape[0]
        alphas[exactly] = growth(A.shape[0] / A0.shape[0]) * config.alpha_of(name)
    r, alpha = 2 * config.r, growth(2) * config.lora_alpha
    return values, replace(
        config,
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != r},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        init_lora_weights=True,
    )
