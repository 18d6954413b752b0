"""Files written whole or not at all, and read with errors that say what is wrong with them. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array, to_numpy


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it: a reader, and a crash at
    any moment, sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors' own files are for their owner alone
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """A text file in UTF-8."""
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, data: Any) -> Path:
    """JSON with two spaces of indent and sorted keys, as Hugging Face writes configs.

    Inner objects keep their order: in `rank_pattern` the first key that matches counts.
    """
    data = dict(sorted(data.items())) if isinstance(data, dict) else data
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | os.PathLike, tensors: dict[str, Array], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file."""
    from safetensors.numpy import save_file

    arrays = {name: to_numpy(array).copy(order="C") for name, array in tensors.items()}
    return write_whole(path, lambda temporary: save_file(arrays, temporary, metadata=metadata))


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: no such file; not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. bfloat16, which NumPy lacks, becomes float32, exactly.

    Raises:
        FileNotFoundError, ValueError: no such file; cut short, or not safetensors.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            half = [name for name in file.keys() if file.get_slice(name).get_dtype() == "BF16"]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in file.keys() if name not in half}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        if half:
            raw = dict(deserialize(path.read_bytes()))
            tensors |= {name: _from_bfloat16(raw[name]) for name in half}
        return tensors, metadata
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error


def _from_bfloat16(tensor: dict[str, Any]) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    halves = np.frombuffer(tensor["data"], "<u2").astype("<u4")
    return (halves << 16).view("<f4").reshape(tensor["shape"])
