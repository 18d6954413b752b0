"""NF4, FP4 and double quantization: what QLoRA holds weights in. Dettmers et al. 2023, section 3.

The table is derived in codes.py, the blocks are worked in blockwise.py, the second level's 8-bit code is in int8.py.
"""

from __future__ import annotations

from dataclasses import replace

from ..backend import Array, get_namespace
from ..checks import check_count
from . import blocks
from .blocks import quietly
from .blockwise import QuantizedTensor, bits_per_parameter, block_maxima, dequantize, quantize
from .codes import fp4_table, nf4_table
from .int8 import dynamic_codes, llm_int8, quantize_int8

__all__ = [
    "QuantizedTensor",
    "bits_per_parameter",
    "block_maxima",
    "dequantize",
    "double_quantize",
    "fp4_table",
    "llm_int8",
    "nf4_table",
    "quantize",
    "quantize_fp4",
    "quantize_int8",
    "quantize_nf4",
]


def quantize_nf4(W: Array, blocksize: int = 64) -> QuantizedTensor:
    """W in 4-bit normal floats: 4 + 32/blocksize bits an element. Dettmers et al. 2023, section 3.

    Raises:
        TypeError: W holds no floats.
        ValueError: W is empty or not finite; a blocksize other than 32, 64 … 4096.
    """
    return quantize(W, "nf4", blocksize)


def quantize_fp4(W: Array, blocksize: int = 64) -> QuantizedTensor:
    """As `quantize_nf4`, in 4-bit floats (sign, two exponent bits, one mantissa bit)."""
    return quantize(W, "fp4", blocksize)


def double_quantize(q: QuantizedTensor, blocksize: int = 256, threads: int | None = None) -> QuantizedTensor:
    """q with its block maxima quantized to 8 bits: their mean is taken off, the rest coded in blocks of its own.

    Dettmers et al. 2023, section 3, "Double Quantization": at blocks of 64 and 256, 8/64 + 32/(64·256) = 0.127 bits an
    element instead of 32/64 = 0.5.

    Args:
        blocksize: block maxima a block of the second level.
        threads: PyTorch sums more than 32,768 maxima in one part a thread, so the mean's last bit depends on its number
            of threads; bitsandbytes' result is met for this number. None: as many as PyTorch uses here by itself.

    Raises:
        ValueError: the maxima are quantized already, or their sum is beyond float32's range; blocksize or threads below
            1.
    """
    if q.nested:
        raise ValueError("q: its block maxima are quantized already; dequantize and quantize anew to change them")
    blocksize = check_count("blocksize", blocksize)
    if threads is not None:
        check_count("threads", threads)
    offset = quietly(blocks.torch_mean)(q.absmax, threads)
    if not get_namespace(offset).isfinite(offset):
        raise ValueError("q: the sum of its block maxima is beyond float32's range; smaller weights are accepted")
    codes, nested_absmax = dynamic_codes(q.absmax - offset, blocksize)
    return replace(q, absmax=codes, offset=offset, nested_absmax=nested_absmax, nested_blocksize=blocksize)
