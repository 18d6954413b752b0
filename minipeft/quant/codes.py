"""Code tables: the numbers in [−1, 1] that a k-bit code stands for, and the packing of codes into bytes.

A weight is stored as the index of the table's nearest number, after its block was divided by the block's largest
magnitude. Which 2ᵏ numbers are best depends on how the weights are spread; the tables here are the usual answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..backend import Array, get_namespace

# Dettmers et al. 2023, appendix E: the sixteen numbers that all implementations use.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NormalFloatSteps:
    """How a normal-float table comes about, one attribute a step. Dettmers et al. 2023, section 3, eq. 4.

    Attributes:
        offset: the outermost probability. The quantiles of 0 and 1 are infinite, so the range stops half a step short:
            1 − ½·(½/(2ᵏ − 1) + ½/2ᵏ), the mean of the half steps of 2ᵏ − 1 and of 2ᵏ equal parts. Rounded to seven
            digits as the authors do: 0.9677083 for k = 4.
        positive: 2ᵏ⁻¹ quantiles Φ⁻¹(p) for p evenly spaced from the offset down to ½ (½ itself, which is 0, left out).
        negative: 2ᵏ⁻¹ − 1 quantiles −Φ⁻¹(p), spaced likewise: one fewer, which makes room for the zero.
        values: both and an exact zero, ascending, in float32: 2ᵏ numbers. With the zero, padding and pruned weights
            stay exact.
        table: `values` divided by the largest, so that they fill [−1, 1]. Both outermost quantiles have the size
            Φ⁻¹(offset), so the smallest becomes −1.
    """

    offset: float
    positive: np.ndarray
    negative: np.ndarray
    values: np.ndarray
    table: np.ndarray


def normal_float_steps(bits: int) -> NormalFloatSteps:
    """The derivation of the k-bit normal float."""
    from scipy.special import ndtri  # Φ⁻¹; imported here: it would cost every `import minipeft` 50 ms

    _check_bits(bits)
    offset = round(1 - 0.5 * (0.5 / (2**bits - 1) + 0.5 / 2**bits), 7)
    half = 2 ** (bits - 1)
    positive = ndtri(np.linspace(offset, 0.5, half + 1)[:-1])
    negative = -ndtri(np.linspace(offset, 0.5, half)[:-1])
    values = np.sort(np.concatenate([negative, [0.0], positive])).astype(np.float32)
    return NormalFloatSteps(offset, positive, negative, values, values / values.max())


@cache
def normal_float_table(bits: int) -> np.ndarray:
    """NFk, float32[2ᵏ] ascending: quantiles of the normal distribution, so that all codes are used about equally often.

    Dettmers et al. 2023, eq. 4, for any k from 2 to 8.
    """
    return _constant(normal_float_steps(bits).table)


@cache
def nf4_table(derived: bool = False) -> np.ndarray:
    """NF4, float32[16] ascending. Dettmers et al. 2023, appendix E.

    By default the published constants; `derived=True` computes them (see `normal_float_steps`). Eight entries differ,
    in their last bits and by at most 1.2e-7. The constants come from probabilities that had been rounded to float32
    before Φ⁻¹; with that rounding the derivation gives all sixteen bit for bit.
    """
    return normal_float_table(4) if derived else _constant(_NF4)


@cache
def fp4_table() -> np.ndarray:
    """FP4, float32[16] by bit pattern (sign, two exponent bits, one mantissa bit), divided by its largest number, 12.

    The order is bitsandbytes': the patterns do not ascend, and both 0000 and 1000 are zero.
    """
    half = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)
    return _constant(np.concatenate([half, np.float32(0) - half]) / np.float32(12))


@cache
def uniform_table(bits: int) -> np.ndarray:
    """INTk, float32[2ᵏ − 1]: −1 … 1 in equal steps of 1/(2ᵏ⁻¹ − 1), zero among them (so one code stays unused)."""
    _check_bits(bits)
    levels = 2 ** (bits - 1) - 1
    return _constant(np.arange(-levels, levels + 1) / levels)


@cache
def dynamic_table() -> np.ndarray:
    """The signed 8-bit dynamic code, float32[256] ascending. Dettmers 2016 (arXiv 1511.04561); Dettmers et al. 2022.

    A decimal exponent 10⁻⁶ … 10⁰ in unary, the bits left over a linear fraction: 2ⁱ numbers for 10ⁱ⁻⁶, the middles of
    2ⁱ equal parts of [0.1, 1]. So small numbers keep their size and large ones their digits. With 0 and 1.
    """
    magnitudes = []
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        magnitudes.append((edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6)))
    positive = np.concatenate(magnitudes)
    return _constant(np.sort(np.concatenate([-positive, positive, [0.0, 1.0]])))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced float32 numbers, counted from the nearer end, each rounded once: PyTorch's, bit for bit."""
    start, stop = np.float32(start), np.float32(stop)
    step = np.float64((stop - start) / np.float32(count - 1))  # float64 holds step·i exactly, as a fused product does
    i = np.arange(count)
    return np.where(i < count // 2, start + step * i, stop - step * (count - 1 - i)).astype(np.float32)


def table_of(quant_type: str) -> np.ndarray:
    """The table by its name: `"nf4"`, `"fp4"`, `"dynamic"`, `"nf2"` … `"nf8"`, `"int2"` … `"int8"`.

    Raises:
        ValueError: another name.
    """
    if quant_type in ("nf4", "fp4", "dynamic"):
        return {"nf4": nf4_table, "fp4": fp4_table, "dynamic": dynamic_table}[quant_type]()
    kind, bits = str(quant_type)[:-1], str(quant_type)[-1:]
    if kind in ("nf", "int") and bits in tuple("2345678"):
        return normal_float_table(int(bits)) if kind == "nf" else uniform_table(int(bits))
    raise ValueError(
        f"quant_type: got {quant_type!r}; accepted are 'nf4', 'fp4', 'dynamic', 'nf2' to 'nf8' and 'int2' to 'int8'"
    )


def bits_of(table: Array) -> int:
    """The bits of a code into this table: 4 for 16 numbers, and for the 15 of `uniform_table(4)`."""
    return (len(table) - 1).bit_length()


def midpoints(table: np.ndarray) -> np.ndarray:
    """Where the nearest number of an ascending table changes: the float32 means of neighbours."""
    return (table[:-1] + table[1:]) / np.float32(2)


def pack(codes: Array, bits: int) -> Array:
    """Codes (n,) uint8 as one stream of bits, the first code in the highest bits: (⌈n·bits/8⌉,) uint8.

    Four bits: two codes a byte, the first in the high nibble. Unused bits at the end are 0.
    """
    xp = get_namespace(codes)
    if bits == 8:
        return codes
    if bits == 4:
        if codes.size % 2:
            codes = xp.concatenate([codes, xp.zeros(1, codes.dtype)])
        # Two codes as one 16-bit number, the first in its low byte: five times as fast as codes[::2] and codes[1::2].
        both = codes.view(xp.uint16)
        return ((both << 4) | (both >> 8)).astype(xp.uint8)
    return xp.packbits(xp.unpackbits(codes).reshape(-1, 8)[:, 8 - bits :].reshape(-1))


def unpack(packed: Array, bits: int, n: int) -> Array:
    """The n codes that `pack` packed, (n,) uint8."""
    xp = get_namespace(packed)
    if bits == 8:
        return packed
    if bits == 4:
        return xp.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    stream = xp.unpackbits(packed)[: n * bits].reshape(n, bits)
    padded = xp.concatenate([xp.zeros((n, 8 - bits), xp.uint8), stream], axis=1)
    return xp.packbits(padded.reshape(-1))


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits: got {bits!r}; an int from 2 to 8 is accepted")


def _constant(values: object) -> np.ndarray:
    """A float32 array that cannot be written to: every caller gets the same one."""
    table = np.array(values, np.float32)
    table.setflags(write=False)
    return table
