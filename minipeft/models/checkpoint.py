"""Weights in safetensors files, read one tensor at a time: nothing is in memory before it is asked for.

The format (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header, which says
for every tensor its dtype, shape and place, then all values, row by row.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, to_numpy
from ..files import read_json, write_whole

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy lacks bfloat16: its bits
CODES = {"U8": "u1", "I8": "i1"}  # weights that are quantized, and what belongs to them
NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, and `read()`, which gives its values, as floats unless they are `codes`.

    Of a safetensors file `read_bytes()` gives the same as it lies there, (bytes,) uint8: codes may be kept under a
    float's name, and as a float they would be converted.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    codes: bool = False
    read_bytes: Callable[[], np.ndarray] | None = None


def map_file(path: Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A part of a file as an array whose values come into memory when they are looked at."""
    return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray) if math.prod(shape) else np.empty(shape, dtype)


def open_safetensors(path: Path, codes: bool = False) -> dict[str, StoredTensor]:
    """The tensors of one file: floats, and with `codes` bytes too.

    Raises:
        ValueError: it is cut short or not safetensors, or a tensor is of another dtype.
    """
    dtypes = DTYPES | CODES if codes else DTYPES
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: _place(entry) for name, entry in header.items()}
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    return {name: _stored(path, name, 8 + length, size, dtypes, *place) for name, place in places.items()}


def _place(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} at {start} to {end}")
    return entry["dtype"], shape, start, end


def _stored(
    path: Path, name: str, base: int, size: int, dtypes: dict[str, str], dtype: str, shape: tuple, start: int, end: int
) -> StoredTensor:
    if dtype not in dtypes:
        raise ValueError(f"{path}: {name} is stored as {dtype}; accepted are {', '.join(dtypes)}")
    if base + end > size:
        raise ValueError(f"{path}: cut short: {name} ends at byte {base + end}, the file has {size}; download it again")
    if end - start != math.prod(shape) * np.dtype(dtypes[dtype]).itemsize:
        raise ValueError(f"{path}: damaged: {name} of shape {shape} cannot be {end - start} bytes of {dtype}")

    def read() -> np.ndarray:
        values = map_file(path, dtypes[dtype], base + start, shape)
        return from_bfloat16(values) if dtype == "BF16" else values

    return StoredTensor(
        shape, read, dtype in CODES, lambda: map_file(path, np.dtype(np.uint8), base + start, (end - start,))
    )


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, of which they are the upper half: exact."""
    values = halves.astype("<u4")
    values <<= 16
    return values.view("<f4")


def open_directory(path: Path, codes: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face directory: model.safetensors, or the shards that its index names. With `codes`
    bytes are accepted as well as floats.

    Raises:
        FileNotFoundError: there is neither, or shards are missing.
    """
    if (path / "model.safetensors").is_file():
        return open_safetensors(path / "model.safetensors", codes)
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth"))
        hint = "; only safetensors are read, nothing that is unpickled" if any("safe" not in f for f in found) else ""
        raise FileNotFoundError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json; found "
            + (", ".join(found) or "no weights")
            + hint
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise ValueError(f"{index}: weight_map must give the file beside it that each tensor is in")
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:5])}")
    opened = {shard: open_safetensors(path / shard, codes) for shard in shards}
    if lost := [name for name, shard in places.items() if name not in opened[shard]]:
        more = f", nor are {len(lost) - 1} others where they should be" if len(lost) > 1 else ""
        raise ValueError(f"{index}: {lost[0]} is not in {places[lost[0]]}{more}")
    return {name: opened[shard][name] for name, shard in places.items()}


def write_safetensors(path: Path, tensors: dict[str, Array]) -> Path:
    """Write a file whole or not at all, tensor after tensor: no copy of all of them is made on the way.

    Raises:
        ValueError: a dtype that is neither a float nor uint8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, array in tensors.items():
        if array.dtype.name not in NAMES:
            raise ValueError(f"{name}: dtype {array.dtype}; accepted are {', '.join(NAMES)}")
        start, end = end, end + array.size * array.dtype.itemsize
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight bytes

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in tensors.values():
                file.write(np.ascontiguousarray(to_numpy(array)).view(np.uint8).data if array.size else b"")

    return write_whole(path, write)
