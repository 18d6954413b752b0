"""Quantization: weights as codes of 2 to 8 bits.

`codes` has the tables, `nf4` and `int8` the formulas, `linear` the layers, `model` whole models, `state` the files.
"""

from .codes import dynamic_table, fp4_table, nf4_table, normal_float_steps, normal_float_table, uniform_table
from .int8 import RowQuantized, dequantize_rows, llm_int8, quantize_int8, quantize_rows
from .linear import (
    Linear4bit,
    Linear8bit,
    QuantizedLinear,
    QuantizedWeight,
    quantized_linear,
    release_buffers,
)
from .model import dequantize_model, load_quantized_state_dict, quantize_model, quantized_state_dict
from .nf4 import (
    QuantizedTensor,
    bits_per_parameter,
    dequantize,
    double_quantize,
    quantize,
    quantize_fp4,
    quantize_nf4,
)
from .state import from_state_tensors, is_quantized, state_tensors

__all__ = [
    "Linear4bit",
    "Linear8bit",
    "QuantizedLinear",
    "QuantizedTensor",
    "QuantizedWeight",
    "RowQuantized",
    "bits_per_parameter",
    "dequantize",
    "dequantize_model",
    "dequantize_rows",
    "double_quantize",
    "dynamic_table",
    "fp4_table",
    "from_state_tensors",
    "is_quantized",
    "llm_int8",
    "load_quantized_state_dict",
    "nf4_table",
    "normal_float_steps",
    "normal_float_table",
    "quantize",
    "quantize_fp4",
    "quantize_int8",
    "quantize_model",
    "quantize_nf4",
    "quantize_rows",
    "quantized_linear",
    "quantized_state_dict",
    "release_buffers",
    "state_tensors",
    "uniform_table",
]
