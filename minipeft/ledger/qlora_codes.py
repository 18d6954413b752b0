"""The claims of the document's QLoRA section about codes: what 4 and 8 bits keep of a weight, and what they take."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy.special import ndtri

from ..measure import llama_shape, memory_report, nf4_bytes
from ..models import load_base
from ..nn import Linear
from ..quant import Linear4bit, Linear8bit, codes, dequantize_rows, llm_int8, quantize_rows
from ..quant.codes import normal_float_steps, table_of
from ..quant.nf4 import (
    bits_per_parameter,
    block_maxima,
    dequantize,
    double_quantize,
    nf4_table,
    quantize,
    quantize_int8,
    quantize_nf4,
)
from . import Evidence, claim

CODES = ("nf4", "fp4", "int4")
BLOCKSIZES = (32, 64, 256, 1024, 4096)


@functools.cache
def normal_weights() -> np.ndarray:
    """512² numbers from N(0, 0.02²), about as language models' weights are spread."""
    return (0.02 * np.random.default_rng(0).standard_normal((512, 512))).astype("float32")


@functools.cache
def trained_weights() -> np.ndarray:
    """The twelve projections of the pre-trained ViT, one after the other: 36,864 numbers.

    Each projection's size is a multiple of 256, so that blocks up to there hold numbers of one matrix only.
    """
    state = load_base("vit").state_dict()
    return np.concatenate([W.reshape(-1) for name, W in state.items() if name.endswith("proj.weight")])


def relative_error(W: np.ndarray, back: np.ndarray) -> float:
    """Mean square of W − back ÷ mean square of W."""
    return float(((W - back) ** 2).sum(dtype="float64") / (W**2).sum(dtype="float64"))


@claim("qlora.nf4-table", "NF4 is a non-uniform 4-bit code, made for normally distributed weights.")
def nf4_is_normal() -> Evidence:
    """The table derived from normal quantiles against the published constants; its steps."""
    steps, published, derived = normal_float_steps(4), nf4_table(), nf4_table(derived=True)
    difference = np.abs(published.astype("float64") - derived)
    # The constants come from float32 probabilities, as PyTorch spaces them: the same derivation then gives their bits
    p = [codes._linspace(steps.offset, 0.5, n)[:-1].astype("float64") for n in (9, 8)]
    values = np.sort(np.concatenate([-ndtri(p[1]), [0.0], ndtri(p[0])])).astype("float32")
    exact = int((values / values.max() == published).sum())
    gaps = np.diff(published)
    return Evidence(
        f"Sixteen numbers from the quantiles of N(0, 1) up to p = {steps.offset} differ from the published ones by at "
        f"most {difference.max():.1e} ({int((difference > 0).sum())} in their last bits; from probabilities in float32 "
        f"{exact} of 16 are the same bits). Steps are {gaps.min():.3f} near zero and {gaps.max():.3f} at the "
        "ends.",
        f"由 N(0, 1) 的分位数（最大到 p = {steps.offset}）推出的十六个数，与公布的常数最多相差 {difference.max():.1e}"
        f"（{int((difference > 0).sum())} 个在末几位上不同；概率用 float32 计算时，16 个中有 {exact} 个逐位相同）。"
        f"相邻两数的间隔，零附近为 {gaps.min():.3f}，两端为 {gaps.max():.3f}。",
        holds=float(difference.max()) <= 1.2e-7 and exact == 16 and float(gaps.max()) > 2 * float(gaps.min()),
        figures={
            "published": published.tolist(),
            "derived": derived.tolist(),
            "largest_difference": float(difference.max()),
            "equal_bits_from_float32_probabilities": exact,
            "gaps": gaps.tolist(),
        },
    )


# --- the error of a code ----------------------------------------------------------------------------------------------


@claim("qlora.nf4-error", "NF4 loses the least information.")
def nf4_error() -> Evidence:
    """Error and code entropy of three codes on normal and on trained weights by block size; the best code for each."""
    found = {
        name: {size: _errors(W, size) for size in BLOCKSIZES}
        for name, W in (("normal", normal_weights()), ("trained", trained_weights()))
    }
    cases = [case for by_size in found.values() for case in by_size.values()]
    least = sum(case["error"]["nf4"] < min(case["error"]["fp4"], case["error"]["int4"]) for case in cases)
    excess = {name: [case["error"]["nf4"] / case["lloyd_max"] - 1 for case in found[name].values()] for name in found}
    usual, wide = found["normal"][64], found["normal"][4096]
    nf4, fp4, int4 = (f"{usual['error'][code]:.4f}" for code in CODES)
    bits = [f"{usual['entropy'][code]:.2f}" for code in CODES]
    best, best_wide, nf4_wide = f"{usual['lloyd_max']:.4f}", f"{wide['lloyd_max']:.4f}", f"{wide['error']['nf4']:.4f}"
    entropy = {name: [case["entropy"]["nf4"] for case in by_size.values()] for name, by_size in found.items()}
    return Evidence(
        f"Smallest squared error of the three in {least} of {len(cases)} cases; normal weights, blocks of 64: NF4 "
        f"{nf4} of ‖W‖², FP4 {fp4}, INT4 {int4}, codes of {', '.join(bits)} bits entropy. But it is no optimum: a "
        f"Lloyd–Max code has {best}, and in blocks of 4096 {best_wide} where NF4 has {nf4_wide}.",
        f"三种编码相比，{len(cases)} 种情形中有 {least} 种平方误差最小；正态权重、块大小 64 时：NF4 为 ‖W‖² 的 {nf4}，"
        f"FP4 为 {fp4}，INT4 为 {int4}，编码的熵依次为 {'、'.join(bits)} 比特。但它并不是最优："
        f"Lloyd–Max 编码为 {best}；块大小 4096 时，Lloyd–Max 为 {best_wide}，NF4 为 {nf4_wide}。",
        holds=all(e <= 0.01 for values in excess.values() for e in values),
        within=least == len(cases),
        figures={
            **{name: {str(size): case for size, case in by_size.items()} for name, by_size in found.items()},
            "nf4_above_lloyd_max": excess,
            "nf4_entropy": entropy,
        },
    )


def _errors(W: np.ndarray, blocksize: int) -> dict[str, Any]:
    """Relative squared error and entropy in bits of each code, and the error of the Lloyd–Max code for these blocks."""
    quantized = {code: quantize(W, code, blocksize) for code in CODES}
    maxima = np.repeat(quantized["nf4"].absmax, blocksize)[: W.size].astype("float64")
    scaled = np.where(maxima > 0, W.reshape(-1) / np.where(maxima > 0, maxima, 1), 0)
    best = lloyd_max(scaled, maxima**2)
    return {
        "error": {code: relative_error(W, dequantize(q)) for code, q in quantized.items()},
        "entropy": {code: code_entropy(scaled, table_of(code)) for code in CODES},
        "lloyd_max": relative_error(W.reshape(-1), maxima * nearest(scaled, best)),
    }


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The table's number that is nearest to each x; the table ascends."""
    return table[np.searchsorted((table[:-1] + table[1:]) / 2, x)]


def code_entropy(scaled: np.ndarray, table: np.ndarray) -> float:
    """−Σ p log₂ p over how often each number of the table is used: 4 where sixteen are used equally often."""
    levels = np.unique(table)  # FP4 has two zeros, and its bit patterns do not ascend
    counts = np.bincount(np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled.reshape(-1)), minlength=len(levels))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def lloyd_max(scaled: np.ndarray, weight: np.ndarray, levels: int = 16, bins: int = 512) -> np.ndarray:
    """The `levels` numbers with the least Σ weight·(scaled − nearest)², for scaled in [−1, 1]. Max 1960, Lloyd 1982.

    Each number is the mean of its cell, so that a cell costs Σ w·x² − (Σ w·x)²/Σ w. Which cells are best is found by
    dynamic programming over borders of bins, exactly, where Lloyd's turns may end at a worse code.

    Give a block's squared maximum as the weight of its elements: so their errors count in W.
    """
    bin_of = np.minimum(((scaled + 1) * (bins / 2)).astype(int), bins - 1)
    mass = np.concatenate([[0.0], np.cumsum(np.bincount(bin_of, weight, bins))])
    moment = np.concatenate([[0.0], np.cumsum(np.bincount(bin_of, weight * scaled, bins))])
    inside = mass[None, :] - mass[:, None]  # of the cell from border i to border j
    cost = -((moment[None, :] - moment[:, None]) ** 2) / np.where(inside > 0, inside, np.inf)
    cost[np.tril_indices(bins + 1, -1)] = np.inf
    best, came_from = cost[0], []
    for _ in range(levels - 1):
        total = best[:, None] + cost
        came_from.append(total.argmin(axis=0))
        best = total.min(axis=0)
    borders = [bins]
    for previous in reversed(came_from):
        borders.append(int(previous[borders[-1]]))
    borders = np.array([0, *borders[::-1]])
    filled = np.diff(mass[borders]) > 0
    return np.diff(moment[borders])[filled] / np.diff(mass[borders])[filled]


# --- bytes ------------------------------------------------------------------------------------------------------------


@claim("qlora.storage", "Weights are stored in 4 bits.")
def storage() -> Evidence:
    """Bits a weight from the live arrays of a layer, by block size, with and without double quantization."""
    linear = Linear(1024, 1024, bias=False, rng=0)
    single, double = {}, {}
    for size in (64, 128, 256):
        for bits, nested in ((single, False), (double, True)):
            layer = Linear4bit.from_linear(linear, blocksize=size, double_quant=nested)
            bits[size] = 8 * memory_report(layer).weights / linear.weight.size
    full = 8 * memory_report(linear).weights / linear.weight.size
    formula = 8 * nf4_bytes(linear.weight.size) / linear.weight.size
    right = all(abs(single[size] - (4 + 32 / size)) < 1e-9 for size in single) and double[64] == formula
    return Evidence(
        f"Live bytes of a 1024² layer: codes and scales take {single[64]:.3f} bits a weight in blocks of 64 "
        f"(4 + 32/64), {double[64]:.3f} with the block maxima quantized too, instead of {full:.0f}: "
        f"{full / double[64]:.2f} times smaller than float32. 4 bits are the codes alone.",
        f"1024² 的层实际占用：块大小 64 时，编码与块最大值合计每个权重 {single[64]:.3f} 比特（4 + 32/64），"
        f"块最大值也量化后为 {double[64]:.3f} 比特，而原来是 {full:.0f}：float32 的大小是它的 {full / double[64]:.2f} "
        "倍。4 比特指的只是编码本身。",
        holds=right and 4 < double[64] < single[64] < 5,
        figures={
            "single": {str(k): v for k, v in single.items()},
            "double": {str(k): v for k, v in double.items()},
            "formula": formula,
        },
    )


@claim("qlora.double-quant", "(paper) The block maxima are quantized as well.")
def double_quantization() -> Evidence:
    """Bytes saved by the second level and the error that it adds, on normal and on trained weights."""
    found = {name: _second_level(W) for name, W in (("normal", normal_weights()), ("trained", trained_weights()))}
    normal, trained = found["normal"], found["trained"]
    shape = llama_shape("7B")
    sizes = [out * in_ for out, in_ in shape.matrices.values()]
    saved = shape.num_hidden_layers * sum(n // 2 + 4 * n // 64 - nf4_bytes(n) for n in sizes)
    bits, gigabytes = f"{normal['saved']:.3f}", f"{saved / 1e9:.2f}"
    grows, grows_trained = (f"{case['error_ratio'] - 1:.2%}" for case in (normal, trained))
    off, off_trained = (f"{case['maxima']:.2%}" for case in (normal, trained))
    return Evidence(
        f"{bits} bits a weight are saved ({gigabytes} GB of a 7B model), and the squared error grows by {grows} on "
        f"normal weights and {grows_trained} on trained ones: the block maxima themselves are off by {off} and "
        f"{off_trained} of their size (root mean square).",
        f"每个权重省下 {bits} 比特（7B 模型共省 {gigabytes} GB），平方误差在正态权重上增加 {grows}，"
        f"在训练过的权重上增加 {grows_trained}：块最大值本身的误差分别是其大小的 {off} 和 {off_trained}（均方根）。",
        holds=normal["saved"] > 0.37 and all(1 <= case["error_ratio"] < 1.05 for case in found.values()),
        figures={**found, "saved_bytes_7b": saved},
    )


def _second_level(W: np.ndarray) -> dict[str, float]:
    once = quantize_nf4(W)
    twice = double_quantize(once)
    return {
        "saved": bits_per_parameter(once) - bits_per_parameter(twice),
        "error_once": relative_error(W, dequantize(once)),
        "error_twice": relative_error(W, dequantize(twice)),
        "error_ratio": relative_error(W, dequantize(twice)) / relative_error(W, dequantize(once)),
        "maxima": relative_error(once.absmax, block_maxima(twice)) ** 0.5,
    }


# --- eight bits -------------------------------------------------------------------------------------------------------


@claim("qlora.8bit", "8-bit quantization is the alternative to 4 bits.")
def eight_bits() -> Evidence:
    """Blockwise int8 and LLM.int8(): error and bytes; products with and without outlier columns in the input."""
    W = normal_weights()
    weight = {
        "NF4": (relative_error(W, dequantize(quantize_nf4(W))), bits_per_parameter(quantize_nf4(W))),
        "dynamic": _error_and_bits(quantize_int8(W, 256), W),
        "linear": _error_and_bits(quantize_int8(W, 256, code="linear"), W),
    }
    rows = quantize_rows(W)
    weight["rows"] = (relative_error(W, dequantize_rows(rows)), 8 * rows.nbytes / W.size)
    live = 8 * memory_report(Linear8bit.from_linear(Linear(512, 512, bias=False, rng=0))).weights / W.size
    products = {f"{kind} inputs": _products(W, outliers) for kind, outliers in (("even", 0), ("outlying", 4))}
    even, outlying = products["even inputs"], products["outlying inputs"]
    e = {name: error**0.5 for name, (error, _) in weight.items()}
    dynamic, linear, by_rows, nf4 = f"{e['dynamic']:.2%}", f"{e['linear']:.2%}", f"{e['rows']:.2%}", f"{e['NF4']:.1%}"
    bits, nf4_bits = f"{weight['dynamic'][1]:.2f}", f"{weight['NF4'][1]:.1f}"
    off, apart, without = f"{even['threshold']:.2%}", f"{outlying['threshold']:.2%}", f"{outlying['no threshold']:.1%}"
    return Evidence(
        f"Relative error of normal weights {dynamic} (dynamic code, blocks of 256), {linear} (linear code), {by_rows} "
        f"(int8 rows) against NF4's {nf4}, for {bits} bits instead of {nf4_bits}. LLM.int8() products: {off} off; with "
        f"4 outlying columns in the input {apart}, but {without} if those go through int8 too.",
        f"正态权重的相对误差：动态编码（块大小 256）{dynamic}，线性编码 {linear}，按行的 int8 {by_rows}，"
        f"NF4 则为 {nf4}；代价是每个权重 {bits} 比特，而不是 {nf4_bits} 比特。LLM.int8() 的乘积误差为 {off}；"
        f"输入有 4 个离群列时为 {apart}，但如果离群列也走 int8，则为 {without}。",
        holds=all(e[name] < e["NF4"] / 4 for name in ("dynamic", "linear", "rows"))
        and abs(live - weight["dynamic"][1]) < 1e-9
        and outlying["threshold"] < 0.02 < outlying["no threshold"],
        figures={
            "weight": {name: {"relative_error": e[name], "bits": bits} for name, (_, bits) in weight.items()},
            "products": products,
        },
    )


def _error_and_bits(q: Any, W: np.ndarray) -> tuple[float, float]:
    return relative_error(W, dequantize(q)), bits_per_parameter(q)


def _products(W: np.ndarray, outliers: int) -> dict[str, float]:
    """Relative error of X Wᵀ by LLM.int8(), where some columns of X are forty times as large as the others."""
    X = np.random.default_rng(1).standard_normal((64, W.shape[1])).astype("float32")
    X[:, :outliers] *= 40
    X = np.where(np.arange(W.shape[1]) < outliers, X, np.clip(X, -4, 4))
    exact = X.astype("float64") @ W.T.astype("float64")
    # The outlying columns' own share of Y is large and exact with the threshold; the error is judged beside the rest.
    rest = X[:, outliers:].astype("float64") @ W[:, outliers:].T.astype("float64")
    return {
        name: float(np.linalg.norm(llm_int8(X, W, threshold) - exact) / np.linalg.norm(rest))
        for name, threshold in (("threshold", 6.0), ("no threshold", 0.0))
    }
