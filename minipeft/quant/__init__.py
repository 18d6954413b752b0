"""Quantization: weights as codes of 2 to 8 bits. `codes` has the tables, `nf4` and `int8` the formulas."""

from .codes import dynamic_table, fp4_table, nf4_table, normal_float_steps, normal_float_table, uniform_table
from .int8 import RowQuantized, dequantize_rows, llm_int8, quantize_int8, quantize_rows
from .nf4 import (
    QuantizedTensor,
    bits_per_parameter,
    dequantize,
    double_quantize,
    quantize,
    quantize_fp4,
    quantize_nf4,
)

__all__ = [
    "QuantizedTensor",
    "RowQuantized",
    "bits_per_parameter",
    "dequantize",
    "dequantize_rows",
    "double_quantize",
    "dynamic_table",
    "fp4_table",
    "llm_int8",
    "nf4_table",
    "normal_float_steps",
    "normal_float_table",
    "quantize",
    "quantize_fp4",
    "quantize_int8",
    "quantize_nf4",
    "quantize_rows",
    "uniform_table",
]
