"""Flops, bytes and seconds: the numbers that claims, plots, benchmarks and notebooks share."""

from ..backend import count_flops
from .estimate import estimate_memory, memory_parts, nf4_bytes
from .latency import Comparison, Latency, compare_latency, latency
from .memory import MemoryReport, PeakMemory, format_bytes, memory_report, peak_memory
from .shapes import LlamaShape, llama_shape

__all__ = [
    "Comparison",
    "Latency",
    "LlamaShape",
    "MemoryReport",
    "PeakMemory",
    "compare_latency",
    "count_flops",
    "estimate_memory",
    "format_bytes",
    "latency",
    "llama_shape",
    "memory_parts",
    "memory_report",
    "nf4_bytes",
    "peak_memory",
]
