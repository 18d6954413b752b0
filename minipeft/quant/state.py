"""Quantized tensors in safetensors files, named as bitsandbytes names them, so that either reads the other's.

NAME                                     codes, (⌈size/2⌉, 1) uint8
NAME.absmax                              block maxima float32, or their codes uint8
NAME.quant_map                           the table, float32[16]
NAME.nested_absmax, NAME.nested_quant_map       of double quantization
NAME.quant_state.bitsandbytes__nf4       the rest (blocksize, dtype, shape …) as JSON, in bytes
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from .blocks import BLOCKSIZES
from .blockwise import QuantizedTensor
from .codes import bits_of, dynamic_table, table_of

TABLE_TOLERANCE = 1e-6  # PyTorch's versions differ in the last bits of the dynamic table


def state_tensors(q: QuantizedTensor, name: str = "weight") -> dict[str, Array]:
    """The tensors to write for q, by full name.

    Codes that bitsandbytes has not (all but NF4 and FP4) are written likewise, with `minipeft__` in the last name.
    """
    xp = get_namespace(q.codes)
    state: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "dtype": q.dtype.name,
        "shape": list(q.shape),
    }
    tensors = {name: q.codes.reshape(-1, 1), f"{name}.absmax": q.absmax, f"{name}.quant_map": q.table}
    if q.nested:
        state |= {
            "nested_blocksize": q.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": float(q.offset),
        }
        tensors[f"{name}.nested_absmax"] = q.nested_absmax
        tensors[f"{name}.nested_quant_map"] = backend.move(dynamic_table(), xp)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[_state_name(name, q.quant_type)] = backend.move(text, xp)
    return tensors


def _state_name(name: str, quant_type: str) -> str:
    return f"{name}.quant_state.{'bitsandbytes' if quant_type in ('nf4', 'fp4') else 'minipeft'}__{quant_type}"


def is_quantized(tensors: dict[str, Array], name: str = "weight") -> bool:
    """Whether the tensors hold a quantization state of this name."""
    return any(key.startswith(f"{name}.quant_state.") for key in tensors)


def from_state_tensors(tensors: dict[str, Array], name: str = "weight", dtype: Any = None) -> QuantizedTensor:
    """The quantized tensor that `state_tensors`, or bitsandbytes, wrote under this name; others are not looked at.

    Args:
        dtype: dequantize to this dtype instead of the one that was quantized. bfloat16, where NumPy does not have it
            (from ml_dtypes), becomes float32: the same numbers, not rounded.

    Raises:
        ValueError: a part is missing, or does not fit the others.
    """
    found = [key for key in tensors if key.startswith(f"{name}.quant_state.")]
    if len(found) != 1:
        raise ValueError(f"tensors: {len(found)} names begin with '{name}.quant_state.'; exactly one is accepted")
    state = _read_state(found[0], tensors[found[0]])
    quant_type, shape, blocksize = state["quant_type"], tuple(state["shape"]), state["blocksize"]
    table, size = table_of(quant_type), math.prod(shape)
    if size < 1 or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"{found[0]}: shape {shape} and blocksize {blocksize}; at least one element and a blocksize of "
            f"{', '.join(map(str, BLOCKSIZES))} are accepted"
        )
    blocks = -(-size // blocksize)
    codes = _part(tensors, name, -(-size * bits_of(table) // 8), "uint8", f"shape {shape}")
    _check_table(tensors, f"{name}.quant_map", table)
    q = {"codes": codes, "blocksize": blocksize, "shape": shape, "quant_type": quant_type}
    nested = "nested_offset" in state
    where = f"{size} elements in blocks of {blocksize}"
    q["absmax"] = _part(tensors, f"{name}.absmax", blocks, "uint8" if nested else "float32", where)
    if nested:
        length = state["nested_blocksize"]
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"{found[0]}: nested_blocksize is {length!r}; an int of at least 1 is accepted")
        where = f"{blocks} block maxima in blocks of {length}"
        q["nested_absmax"] = _part(tensors, f"{name}.nested_absmax", -(-blocks // length), "float32", where)
        _check_table(tensors, f"{name}.nested_quant_map", dynamic_table())
        xp = get_namespace(codes)
        q |= {"nested_blocksize": length, "offset": xp.asarray(np.float32(state["nested_offset"]))}
    return QuantizedTensor(dtype=_dtype(state["dtype"]) if dtype is None else np.dtype(dtype), **q)


def _read_state(key: str, packed: Array) -> dict[str, Any]:
    """The JSON in a tensor of bytes, with the entries that every state has."""
    try:
        state = json.loads(bytes(backend.to_numpy(packed).astype(np.uint8).reshape(-1)).decode())
        wanted = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
        if "nested_offset" in state:
            wanted |= {"nested_offset": int | float, "nested_blocksize": int}
        bad = [entry for entry, kind in wanted.items() if not isinstance(state.get(entry), kind)]
        if not all(isinstance(n, int) and n >= 0 for n in state.get("shape") or [None]):
            bad.append("shape")
        if not bad and not math.isfinite(state.get("nested_offset", 0)):
            bad.append("nested_offset")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: not a quantization state in JSON ({error})") from error
    if bad:
        raise ValueError(f"{key}: {bad[0]} is {state.get(bad[0])!r}")
    return state


def _part(tensors: dict[str, Array], key: str, size: int, dtype: str, why: str) -> Array:
    """A tensor as a flat array, of the size and dtype that it must have."""
    if key not in tensors:
        raise ValueError(f"tensors: {key!r} is missing")
    part = tensors[key]
    if part.size != size or part.dtype != np.dtype(dtype):
        raise ValueError(f"{key}: got {part.size} × {part.dtype}; {why} need {size} × {dtype}")
    return part.reshape(-1)


def _check_table(tensors: dict[str, Array], key: str, table: np.ndarray) -> None:
    if key not in tensors:
        raise ValueError(f"tensors: {key!r} is missing")
    given = backend.to_numpy(tensors[key])
    if given.shape != table.shape or not np.allclose(given, table, rtol=0, atol=TABLE_TOLERANCE):
        raise ValueError(f"{key}: another table than the one of its name; {len(table)} known numbers are accepted")


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            return np.dtype(np.float32)
        return np.dtype(ml_dtypes.bfloat16)
    if name not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype: the state says {name!r}; accepted are float16, bfloat16, float32 and float64")
    return np.dtype(name)
