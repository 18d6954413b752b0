"""Blockwise quantization in any code: each block of weights divided by its largest magnitude, then rounded to a table.

    block b of W:   cᵇ = max |Wᵇ|,   code = nearest(table, Wᵇ / cᵇ),   dequant = cᵇ · table[code]

Dettmers et al. 2023 (QLoRA), eq. 1 and 2, with a table instead of integers (section 3). Bit for bit what bitsandbytes
0.50 computes on a CPU, its roundings included: full blocks are multiplied by 1/c, a last block that is not full is
divided by c; c counts as 1e-38 where it is smaller (and in a last block is stored so).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from .. import backend
from ..backend import Array, get_namespace
from ..checks import check_count
from . import blocks
from .blocks import check_blocksize, check_finite, flat_floats, quietly
from .codes import bits_of, midpoints, pack, table_of, unpack

SMALLEST = 1e-38


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as codes. Immutable; `dequantize` gives the numbers.

    Attributes:
        codes: the packed codes, (⌈size·bits/8⌉,) uint8 (see `codes.pack`).
        absmax: the largest magnitude of each block, (⌈size/blocksize⌉,) float32; after `double_quantize` its
            codes, uint8.
        blocksize: elements a block, counted over the flattened tensor.
        shape, dtype: of the tensor.
        quant_type: the table's name: "nf4", "fp4", "nf3", "int8" …
        offset, nested_absmax, nested_blocksize: of double quantization: the mean that was taken from the block maxima
            (float32, no axes), the largest magnitude of each block of what was left, and that block's length.

    Raises:
        ValueError: parts that do not fit each other, or are missing; no elements; an unknown code or blocksize.
        TypeError: a dtype that is no float.
    """

    codes: Array
    absmax: Array
    blocksize: int
    shape: tuple[int, ...]
    dtype: np.dtype
    quant_type: str
    offset: Array | None = None
    nested_absmax: Array | None = None
    nested_blocksize: int | None = None

    def __post_init__(self) -> None:
        check_blocksize(self.blocksize)
        if not backend.is_float(self.dtype):
            raise TypeError(f"dtype: got {self.dtype}; a float dtype is accepted")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"shape: got {self.shape}; at least one element is accepted")
        second = (self.offset, self.nested_absmax, self.nested_blocksize)
        if 0 < sum(part is None for part in second) < len(second):
            raise ValueError("offset, nested_absmax, nested_blocksize: got some of them; all or none are accepted")
        bits, count = bits_of(table_of(self.quant_type)), -(-self.size // self.blocksize)
        needed = {"codes": ((-(-self.size * bits // 8),), "uint8"), "absmax": ((count,), "float32")}
        if self.nested:
            length = check_count("nested_blocksize", self.nested_blocksize)
            needed |= {"absmax": ((count,), "uint8"), "offset": ((), "float32")}
            needed["nested_absmax"] = (-(-count // length),), "float32"
        for name, (shape, dtype) in needed.items():
            part = getattr(self, name)
            if part.shape != shape or part.dtype != dtype:
                got, wanted = (" × ".join(map(str, (*s, d))) for s, d in ((part.shape, part.dtype), (shape, dtype)))
                raise ValueError(
                    f"{name}: got {got}; {self.quant_type} of shape {self.shape} in blocks of {self.blocksize} needs "
                    f"{wanted}"
                )

    @property
    def table(self) -> Array:
        """The numbers that the codes stand for, float32, where the codes are."""
        return backend.move(table_of(self.quant_type), get_namespace(self.codes))

    @property
    def size(self) -> int:
        """The number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def nested(self) -> bool:
        """Whether the block maxima are quantized too."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the tables, which all tensors share, do not count."""
        return sum(x.nbytes for x in (self.codes, self.absmax, self.nested_absmax, self.offset) if x is not None)

    def to(self, device: Any = None, dtype: Any = None) -> QuantizedTensor:
        """The same codes on another device, or dequantized to another dtype from now on."""
        arrays = ("codes", "absmax", "offset", "nested_absmax") if device is not None else ()
        moved = {name: backend.move(getattr(self, name), device) for name in arrays if getattr(self, name) is not None}
        return replace(self, dtype=np.dtype(dtype or self.dtype), **moved)

    def __deepcopy__(self, memo: dict) -> QuantizedTensor:
        return self  # nothing in it ever changes


def quantize(W: Array, quant_type: str = "nf4", blocksize: int = 64) -> QuantizedTensor:
    """W in any code of `codes.table_of`: "nf4", "fp4", "nf2" … "nf8", "int2" … "int8". Raises as `nf4.quantize_nf4`."""
    check_blocksize(blocksize)
    flat = flat_floats("W", W)
    table = table_of(quant_type)
    order = np.argsort(table, kind="stable")  # FP4's bit patterns do not ascend
    code_of = _ascending_codes(midpoints(table[order]))
    xp, bits, n = get_namespace(flat), bits_of(table), flat.size
    full = n - n % blocksize
    absmax = xp.empty(-(-n // blocksize), xp.float32)
    packed = xp.empty(-(-n * bits // 8), xp.uint8)
    ascending = bool((order == np.arange(len(order))).all())
    ranks = None if ascending else xp.asarray(order.astype(np.uint8))

    def codes_of(scaled: Array) -> Array:
        codes = code_of(scaled)
        return codes if ranks is None else ranks[codes]

    @quietly
    def quantize_part(start: int, stop: int) -> None:
        w = flat[start:stop].reshape(-1, blocksize).astype(xp.float32, copy=False)
        scaled = xp.abs(w)
        largest = scaled.max(axis=1)
        absmax[start // blocksize : stop // blocksize] = largest
        xp.multiply(w, (1 / xp.maximum(largest, xp.float32(SMALLEST)))[:, None], out=scaled)
        packed[start * bits // 8 : stop * bits // 8] = pack(codes_of(scaled.reshape(-1)), bits)

    @quietly
    def quantize_rest() -> None:
        w = flat[full:].astype(xp.float32)
        absmax[-1:] = xp.maximum(xp.abs(w).max(), xp.float32(SMALLEST))
        scaled = w / absmax[-1:]
        if bits == 4 and n % 2:  # the nibble that is left over holds the code of 0
            scaled = xp.concatenate([scaled, xp.zeros(1, xp.float32)])
        packed[full * bits // 8 :] = pack(codes_of(scaled), bits)

    blocks.in_parts(quantize_part, full, xp, blocksize)
    if full < n:
        quantize_rest()
    check_finite("W", absmax)
    return QuantizedTensor(packed, absmax, blocksize, tuple(W.shape), np.dtype(W.dtype), quant_type)


def _ascending_codes(bounds: np.ndarray) -> Callable[[Array], Array]:
    """A function from scaled values to codes: how many of the bounds lie below the value."""
    if len(bounds) > 15:

        def search(scaled: Array) -> Array:
            xp = get_namespace(scaled)
            return xp.searchsorted(backend.move(bounds, xp), scaled).astype(xp.uint8)

        return search
    first, *others = bounds.tolist()

    def count(scaled: Array) -> Array:
        # Fifteen comparisons of vectors, summed, take a quarter of the time of searchsorted's four branches.
        xp = get_namespace(scaled)
        codes = xp.greater(scaled, first).view(xp.uint8)
        above = xp.empty(scaled.shape, bool)
        for bound in others:
            xp.greater(scaled, bound, out=above)
            codes += above.view(xp.uint8)
        return codes

    return count


def dequantize(q: QuantizedTensor, out: Array | None = None) -> Array:
    """c · table[code], in q's shape and dtype. Dettmers et al. 2023, eq. 2.

    The product is formed in float32 and rounded once to the dtype.

    Args:
        out: write into this array, of q's size and dtype and contiguous, instead of a new one.

    Raises:
        ValueError: `out` does not fit.
    """
    xp = get_namespace(q.codes)
    if out is None:
        out = xp.empty(q.shape, q.dtype)
    elif out.size != q.size or out.dtype != q.dtype or not out.flags.c_contiguous:
        raise ValueError(f"out: got {out.shape} {out.dtype}; a contiguous array of {q.size} × {q.dtype} is accepted")
    absmax, table, bits, blocksize, n = block_maxima(q), q.table, bits_of(q.table), q.blocksize, q.size
    flat, full = out.reshape(-1), n - n % blocksize
    count, index, element = (2, xp.uint16, xp.complex128) if n >= MANY else (1, xp.uint8, xp.float64)
    numbers = backend.move(_numbers_of_bytes(q.quant_type, count), xp) if bits == 4 else None

    def dequantize_part(start: int, stop: int) -> None:
        part = flat[start:stop]
        packed = q.codes[start * bits // 8 : -(-stop * bits // 8)]
        if bits == 4 and part.size % (2 * count) == 0:
            direct = part if part.dtype == xp.float32 else xp.empty(part.shape, xp.float32)
            blocks.take(numbers, packed.view(index), direct.view(element))
        else:
            direct = table[unpack(packed, bits, stop - start)]
        scale = absmax[start // blocksize : -(-stop // blocksize), None]
        length = min(blocksize, stop - start)
        xp.multiply(direct.reshape(-1, length), scale, out=part.reshape(-1, length), casting="unsafe")

    # Four parts' worth at a time stay in the cache until they are scaled: only `out` is written.
    blocks.in_parts(dequantize_part, full, xp, blocksize, 4 * blocks.PART)
    if full < n:
        dequantize_part(full, n)
    return out.reshape(q.shape)


MANY = 1 << 22  # numbers for which a table of 1 MiB pays


@cache
def _numbers_of_bytes(quant_type: str, count: int) -> np.ndarray:
    """For every one or two bytes their two or four numbers, as one element: fewer look-ups, and no shifts.

    Two bytes at a time take 0.8 of the time for 4096 × 4096 numbers. In a training step the products between two
    weights of 576 × 1536 drive that table out of the cache, and it takes 1.5 of the time.
    """
    table = np.zeros(16, np.float32)
    known = table_of(quant_type)
    table[: len(known)] = known  # INT4 has 15 numbers
    every = np.arange(256**count, dtype=f"uint{8 * count}").view(np.uint8)
    return table[unpack(every, 4, 2 * every.size)].view(np.float64 if count == 1 else np.complex128).reshape(-1)


def block_maxima(q: QuantizedTensor) -> Array:
    """The float32 block maxima that `dequantize` uses; of a double-quantized tensor table[code]·c₂ + offset."""
    if not q.nested:
        return q.absmax
    xp, n = get_namespace(q.codes), q.absmax.size
    maxima, full = xp.empty(n, xp.float32), n - n % q.nested_blocksize
    blocks.take(backend.move(table_of("dynamic"), xp), q.absmax, maxima)
    whole = maxima[:full].reshape(-1, q.nested_blocksize)
    whole *= q.nested_absmax[: full // q.nested_blocksize, None]
    maxima[full:] *= q.nested_absmax[-1]
    maxima += q.offset
    return maxima


def bits_per_parameter(q: QuantizedTensor) -> float:
    """Bits an element from the bytes of the arrays: NF4 in blocks of 64 takes 4.5, double-quantized 4.127."""
    return 8 * q.nbytes / q.size
