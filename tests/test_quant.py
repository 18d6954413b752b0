"""Codes of 2 to 8 bits: the tables, blockwise quantization against its definition, double quantization, LLM.int8()."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import quant_cases

from minipeft import quant
from minipeft.backend import to_numpy
from minipeft.quant import blocks, blockwise, codes, nf4
from minipeft.tensor import Tensor

FOUR_BIT = ("nf4", "fp4")
ALL_TYPES = ("nf2", "nf3", "nf4", "nf8", "int2", "int3", "int4", "int8", "fp4")


def simple_quantize(W: np.ndarray, table: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, block by block: codes (n,) and block maxima. What the fast version must give bit for bit."""
    order = np.argsort(table, kind="stable")
    bounds = (table[order][1:] + table[order][:-1]) / np.float32(2)
    flat, all_codes, absmax = W.reshape(-1).astype(np.float32), [], []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        largest = np.abs(block).max()
        divisor = max(largest, np.float32(1e-38))
        whole = len(block) == blocksize
        scaled = block * (np.float32(1) / divisor) if whole else block / divisor
        all_codes.append(order[np.searchsorted(bounds, scaled)])
        absmax.append(largest if whole else divisor)
    return np.concatenate(all_codes), np.array(absmax, np.float32)


def simple_dequantize(indices: np.ndarray, absmax: np.ndarray, table: np.ndarray, blocksize: int) -> np.ndarray:
    """c · table[code], element by element."""
    return np.array([table[code] * absmax[i // blocksize] for i, code in enumerate(indices)], np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, dtype and every bit: −0 is not 0."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --- tables -----------------------------------------------------------------------------------------------------------


def test_nf4_derived_from_quantiles_differs_from_the_published_constants_in_eight_last_bits():
    published, derived = quant.nf4_table(), quant.nf4_table(derived=True)
    assert (published != derived).sum() == 8
    assert 0 < np.abs(published - derived).max() <= 1.2e-7


def test_probabilities_rounded_to_float32_give_the_published_constants_bit_for_bit():
    from scipy.special import ndtri

    def quantiles(count: int) -> np.ndarray:  # PyTorch's linspace in float32, then Φ⁻¹ of those
        return ndtri(codes._linspace(0.9677083, 0.5, count)[:-1].astype(np.float64))

    values = np.sort(np.concatenate([quantiles(9), [0], -quantiles(8)])).astype(np.float32)
    assert same_bits(values / values.max(), quant.nf4_table())


def test_the_steps_of_the_derivation_are_what_their_names_say():
    steps = quant.normal_float_steps(4)
    assert steps.offset == pytest.approx(1 - (1 / 30 + 1 / 32) / 2, abs=5e-8)
    assert (len(steps.positive), len(steps.negative), len(steps.values)) == (8, 7, 16)
    assert steps.positive.max() == pytest.approx(-steps.negative.min(), rel=1e-15)  # Φ⁻¹(offset), on both sides
    assert steps.values[7] == 0
    np.testing.assert_array_equal(steps.values, np.sort(steps.values))
    np.testing.assert_array_equal(steps.table, steps.values / steps.values.max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_floats_are_ascending_from_minus_one_to_one_with_a_zero(bits: int):
    table = quant.normal_float_table(bits)
    assert table.shape == (2**bits,)
    assert table.dtype == np.float32
    assert (table[0], table[2 ** (bits - 1) - 1], table[-1]) == (-1, 0, 1)
    assert (np.diff(table) > 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_tables_are_evenly_spaced_and_symmetric(bits: int):
    table = quant.uniform_table(bits)
    assert len(table) == 2**bits - 1
    np.testing.assert_array_equal(table, -table[::-1])
    np.testing.assert_allclose(np.diff(table), 1 / (2 ** (bits - 1) - 1), rtol=1e-4)  # float32 steps of 1/127


def test_fp4_holds_what_its_bits_say():
    """Sign, two exponent bits, one mantissa bit; 001 is subnormal; divided by 12."""
    expected = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    np.testing.assert_array_equal(quant.fp4_table()[:8], np.float32(expected) / np.float32(12))
    np.testing.assert_array_equal(quant.fp4_table()[8:], -quant.fp4_table()[:8])


def test_the_dynamic_code_has_127_numbers_on_each_side_and_zero_and_one():
    table = quant.dynamic_table()
    assert len(np.unique(table)) == 256
    np.testing.assert_array_equal(table[:127], -table[128:255][::-1])
    assert (table[127], table[255]) == (0, 1)


def test_tables_cannot_be_written_to():
    for table in (quant.nf4_table(), quant.fp4_table(), quant.uniform_table(3), quant.dynamic_table()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**32))
def test_unpacking_gives_the_packed_codes_and_packing_wastes_less_than_a_byte(bits: int, n: int, seed: int):
    given_codes = np.random.default_rng(seed).integers(0, 2**bits, n, dtype=np.uint8)
    packed = codes.pack(given_codes, bits)
    assert packed.size == -(-n * bits // 8)
    np.testing.assert_array_equal(codes.unpack(packed, bits, n), given_codes)


def test_the_first_code_is_in_the_high_bits():
    assert codes.pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x12, 0x30]
    assert codes.pack(np.array([1, 2, 3], np.uint8), 2).tolist() == [0b01101100]
    assert codes.pack(np.array([1, 2, 7], np.uint8), 3).tolist() == [0b00101011, 0b10000000]


# --- blockwise quantization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", quant_cases.KEPT_CASES, ids=quant_cases.name)
def test_codes_maxima_and_values_are_bitsandbytes_bit_for_bit(case: tuple):
    kind, shape, dtype, quant_type, blocksize = case
    with np.load(quant_cases.KEPT, allow_pickle=False) as file:
        kept = {k.partition(": ")[2]: v for k, v in file.items() if k.startswith(quant_cases.name(case) + ":")}
    W = quant_cases.weights(kind, shape, dtype)
    dynamic = quant_type == "dynamic"
    q = quant.quantize_int8(W, blocksize) if dynamic else quant.quantize(W, quant_type, blocksize)
    assert same_bits(q.codes, kept["codes"].reshape(-1))
    assert same_bits(q.absmax, kept["absmax"])
    np.testing.assert_array_equal(quant.dequantize(q), kept["values"].reshape(shape))
    if not dynamic:
        double = quant.double_quantize(q)
        assert same_bits(double.absmax, kept["double absmax"])
        assert same_bits(np.asarray(double.offset), kept["offset"])
        assert same_bits(double.nested_absmax, kept["nested absmax"])
        np.testing.assert_array_equal(quant.dequantize(double), kept["double values"].reshape(shape))


@pytest.mark.parametrize("kind", quant_cases.KINDS)
@pytest.mark.parametrize("quant_type", ALL_TYPES)
@pytest.mark.parametrize(("shape", "blocksize"), [((1,), 64), ((33, 65), 32), ((7, 96), 4096), ((2, 3, 64), 64)])
def test_the_fast_version_gives_what_the_definition_gives(kind: str, quant_type: str, shape: tuple, blocksize: int):
    W, table = quant_cases.weights(kind, shape), codes.table_of(quant_type)
    q = quant.quantize(W, quant_type, blocksize)
    indices, absmax = simple_quantize(W, table, blocksize)
    np.testing.assert_array_equal(codes.unpack(q.codes, codes.bits_of(table), W.size), indices)
    assert same_bits(q.absmax, absmax)
    assert same_bits(quant.dequantize(q).reshape(-1), simple_dequantize(indices, absmax, table, blocksize))


@pytest.mark.parametrize("quant_type", ["nf4", "nf3", "dynamic"])
@pytest.mark.parametrize("n", [blocks.PART - 1, blocks.PART, blocks.PART + 1, 9 * blocks.PART + 100])
def test_long_arrays_worked_in_parts_give_what_the_blocks_give_alone(quant_type: str, n: int):
    W = quant_cases.weights("normal", (n,))
    quantize = quant.quantize_int8 if quant_type == "dynamic" else lambda w, b: quant.quantize(w, quant_type, b)
    whole = quantize(W, 64)
    for start in (0, blocks.PART - 64, n - n % 64 - 64):
        alone = quantize(W[start : start + 64].copy(), 64)
        assert whole.absmax[start // 64] == alone.absmax[0]
        np.testing.assert_array_equal(quant.dequantize(whole)[start : start + 64], quant.dequantize(alone))
    rest = quantize(W[n - n % 64 :].copy(), 64) if n % 64 else None
    if rest:
        np.testing.assert_array_equal(quant.dequantize(whole)[n - n % 64 :], quant.dequantize(rest))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 2, 64, 65, 67, 1000, blocks.PART + 2, 9 * blocks.PART + 100])
def test_two_bytes_at_a_time_give_what_one_byte_gives(xp, quant_type: str, n: int, monkeypatch: pytest.MonkeyPatch):
    q = quant.double_quantize(quant.quantize(xp.asarray(quant_cases.weights("normal", (n,))), quant_type, 64))
    one = to_numpy(quant.dequantize(q))
    monkeypatch.setattr(blockwise, "MANY", 0)
    assert same_bits(to_numpy(quant.dequantize(q)), one)


@given(st.integers(0, 2**32), st.sampled_from(ALL_TYPES), st.sampled_from(blocks.BLOCKSIZES), st.integers(1, 5000))
def test_every_element_takes_the_nearest_number_of_the_table(seed: int, quant_type: str, blocksize: int, n: int):
    W = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    q = quant.quantize(W, quant_type, blocksize)
    table = q.table.astype(np.float64)
    absmax = np.repeat(q.absmax.astype(np.float64), blocksize)[:n]
    nearest = np.abs(W[:, None] - absmax[:, None] * table).min(axis=1)
    # W/c and the middle between two numbers are rounded to float32: near a tie the farther one may be taken.
    assert (np.abs(quant.dequantize(q) - W) <= nearest + 4 * np.finfo(np.float32).eps * absmax).all()


@pytest.mark.parametrize("quant_type", [*ALL_TYPES, "dynamic"])
def test_quantizing_what_was_dequantized_changes_nothing(quant_type: str):
    def quantize(W: np.ndarray) -> quant.QuantizedTensor:
        return quant.quantize_int8(W, 64) if quant_type == "dynamic" else quant.quantize(W, quant_type)

    once = quantize(quant_cases.weights("normal", (64, 64)))
    if quant_type == "dynamic":  # −1 is not in the table, so a block whose largest is negative shrinks
        once = quantize(np.abs(quant_cases.weights("normal", (64, 64))))
    twice = quantize(quant.dequantize(once))
    np.testing.assert_array_equal(quant.dequantize(once), quant.dequantize(twice))


def test_blocks_of_zeros_stay_zero():
    W = np.zeros(130, np.float32)
    for quant_type in ALL_TYPES:
        assert not quant.dequantize(quant.quantize(W, quant_type)).any()
    assert not quant.dequantize(quant.quantize_int8(W, 64)).any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_come_back_in_the_weights_dtype_rounded_once_from_float32(dtype: str):
    W = quant_cases.weights("normal", (10, 96)).astype(dtype)
    q = quant.quantize_nf4(W)
    assert q.dtype == quant.dequantize(q).dtype == np.dtype(dtype)
    in_float32 = quant.dequantize(quant.quantize_nf4(W.astype(np.float32)))
    assert same_bits(quant.dequantize(q), in_float32.astype(dtype))


def test_bfloat16_is_quantized_as_its_float32_values():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    W = quant_cases.weights("normal", (10, 96)).astype(bfloat16)
    q, wide = quant.quantize_nf4(W), quant.quantize_nf4(W.astype(np.float32))
    np.testing.assert_array_equal(q.codes, wide.codes)
    assert same_bits(quant.dequantize(q), quant.dequantize(wide).astype(bfloat16))


def test_dequantizing_into_a_buffer_writes_there_and_nowhere_else():
    q = quant.quantize_nf4(quant_cases.weights("normal", (10, 65)))
    buffer = np.empty(650, np.float32)
    out = quant.dequantize(q, out=buffer)
    assert out.base is buffer
    assert same_bits(out, quant.dequantize(q))


def test_columns_and_other_views_are_quantized_as_their_values():
    W = quant_cases.weights("normal", (64, 96))
    for view in (W.T, W[::2], W[:, ::-1]):
        q, copied = quant.quantize_nf4(view), quant.quantize_nf4(view.copy())
        np.testing.assert_array_equal(q.codes, copied.codes)
        np.testing.assert_array_equal(quant.dequantize(q), quant.dequantize(copied))


def test_the_weights_are_not_changed():
    W = quant_cases.weights("normal", (10, 65))
    before = W.copy()
    quant.double_quantize(quant.quantize_nf4(W)), quant.quantize_int8(W), quant.llm_int8(W, W)
    assert same_bits(W, before)


# --- double quantization ----------------------------------------------------------------------------------------------


def test_bits_per_parameter_are_the_papers():
    """4 + 32/64 = 4.5, and 4 + 8/64 + 32/(64·256) = 4.127, read off the arrays."""
    q = quant.quantize_nf4(quant_cases.weights("normal", (1024, 1024)))
    assert quant.bits_per_parameter(q) == 4.5
    offset = 32 / 1024**2  # the mean, one number a tensor
    assert quant.bits_per_parameter(quant.double_quantize(q)) == 4 + 8 / 64 + 32 / (64 * 256) + offset
    assert quant.bits_per_parameter(quant.quantize(quant_cases.weights("normal", (1024,)), "nf3", 64)) == 3.5


def test_double_quantization_changes_the_block_maxima_by_at_most_half_a_step_of_their_code():
    q = quant.quantize_nf4(quant_cases.weights("normal", (256, 256)))
    double = quant.double_quantize(q)
    widest = np.diff(quant.dynamic_table()).max() / 2 + 2 / 65535  # the grid that bitsandbytes rounds to comes on top
    bound = widest * np.repeat(double.nested_absmax, 256)[: q.absmax.size]
    assert (np.abs(nf4.block_maxima(double) - q.absmax) <= bound).all()


def test_codes_of_the_weights_survive_double_quantization():
    q = quant.quantize_nf4(quant_cases.weights("normal", (64, 64)))
    assert quant.double_quantize(q).codes is q.codes


@pytest.mark.parametrize("n", [1, 7, 8, 33, 1000, 32767, 32768, 70001])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_pytorchs_order_of_summation_is_close_to_the_exact_mean(n: int, threads: int):
    """That it is PyTorch's to the bit is tested beside PyTorch."""
    x = np.random.default_rng(n).random(n, np.float32)
    assert blocks.torch_mean(x, threads) == pytest.approx(x.mean(dtype=np.float64), rel=1e-6)


# --- LLM.int8() -------------------------------------------------------------------------------------------------------


def activations(rows: int = 12, columns: int = 64, outliers: tuple[int, ...] = (3, 40)) -> np.ndarray:
    """Normal numbers with a few columns of large ones, as in large language models."""
    X = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    X[:, list(outliers)] *= 30
    return X


def test_int8_products_are_exact():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-127, 128, (n, 3000), dtype=np.int8) for n in (5, 7))
    a[0], b[0] = 127, 127  # the largest sum
    from minipeft.quant.int8 import int8_matmul

    np.testing.assert_array_equal(int8_matmul(a, b), a.astype(np.int64) @ b.astype(np.int64).T)


def test_outlier_columns_in_full_precision_save_the_product():
    X, W = activations(), quant_cases.weights("normal", (32, 64))
    exact = X @ W.T
    without, kept = (np.abs(quant.llm_int8(X, W, threshold) - exact).max() for threshold in (0, 6.0))
    assert kept < without / 5
    assert kept < 0.02 * np.abs(exact).max()


def test_the_outlier_columns_are_those_with_a_magnitude_at_the_threshold():
    X = np.zeros((2, 4), np.float32)
    X[0] = [1, 6, -6, 5.99]
    assert quant.quantize_rows(X, threshold=6.0).outliers.tolist() == [1, 2]
    assert quant.quantize_rows(X).outliers.tolist() == []


def test_rows_come_back_within_half_a_step():
    X = activations(outliers=())
    q = quant.quantize_rows(X)
    assert (np.abs(quant.dequantize_rows(q) - X) <= q.absmax[:, None] / 127 * 0.5001).all()
    assert not quant.dequantize_rows(quant.quantize_rows(np.zeros((2, 3), np.float32))).any()


def test_int8_rows_of_the_weight_give_the_product_without_the_weight():
    X, W = activations(), quant_cases.weights("normal", (32, 64))
    q, x = quant.quantize_rows(W), quant.quantize_rows(X, 6.0)
    w, out = quant.dequantize_rows(q), x.outliers
    expected = quant.dequantize_rows(x) @ w.T + X[:, out] @ w[:, out].T
    np.testing.assert_allclose(quant.llm_int8(X, q), expected, rtol=1e-4, atol=1e-4)


# --- other array libraries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf3", "int8", "dynamic"])
def test_every_array_library_gives_the_same_bits(xp: object, quant_type: str):
    W = quant_cases.weights("normal", (33, 65))
    quantize = quant.quantize_int8 if quant_type == "dynamic" else lambda w: quant.quantize(w, quant_type)
    here, there = quantize(W), quantize(xp.asarray(W))
    if quant_type in FOUR_BIT:
        here, there = quant.double_quantize(here), quant.double_quantize(there)
        assert to_numpy(there.offset) == here.offset
    assert type(there.codes) is type(xp.zeros(1))
    assert same_bits(to_numpy(there.codes), here.codes)
    assert same_bits(to_numpy(there.absmax), here.absmax)
    assert same_bits(to_numpy(quant.dequantize(there)), quant.dequantize(here))
    moved = here.to(xp)
    assert same_bits(to_numpy(quant.dequantize(moved)), quant.dequantize(here))


def test_llm_int8_runs_on_every_array_library(xp: object):
    X, W = activations(), quant_cases.weights("normal", (32, 64))
    there = to_numpy(quant.llm_int8(xp.asarray(X), xp.asarray(W)))
    np.testing.assert_allclose(there, quant.llm_int8(X, W), rtol=1e-5, atol=1e-5)  # products may sum in another order


# --- bad input --------------------------------------------------------------------------------------------------------

QUANTIZERS = {
    "nf4": quant.quantize_nf4,
    "fp4": quant.quantize_fp4,
    "nf3": lambda W, blocksize=64: quant.quantize(W, "nf3", blocksize),
    "int8": quant.quantize_int8,
    "linear int8": lambda W, blocksize=64: quant.quantize_int8(W, blocksize, code="linear"),
}


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
class TestBadInput:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 70, 129])
    def test_numbers_that_are_not_finite_are_refused(self, quantize, bad, place):
        W = np.ones(130, np.float32)
        W[place] = bad
        with pytest.raises(ValueError, match=r"^W: 1 of .* finite numbers are accepted"):
            quantize(W)

    def test_numbers_beyond_float32_are_refused(self, quantize):
        with pytest.raises(ValueError, match=r"^W: .*beyond float32's range"):
            quantize(np.array([1e300]))

    def test_empty_tensors_are_refused(self, quantize):
        with pytest.raises(ValueError, match=r"^W: got shape \(0, 4\)"):
            quantize(np.zeros((0, 4), np.float32))

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
    def test_what_is_not_a_float_is_refused(self, quantize, dtype):
        with pytest.raises(TypeError, match=rf"^W: expected float.* got {dtype}"):
            quantize(np.ones(64, dtype))

    def test_lists_are_refused(self, quantize):
        with pytest.raises(TypeError, match=r"^W: expected an array of floats, got list"):
            quantize([1.0])

    @pytest.mark.parametrize("blocksize", [0, -64, 1, 63, 65, 8192, 64.0, "64", None, True])
    def test_other_block_sizes_are_refused(self, quantize, blocksize):
        with pytest.raises(ValueError, match=r"^blocksize: got .* accepted are 32, 64, 128, .* 4096"):
            quantize(np.ones(64, np.float32), blocksize)


def test_tensors_are_refused_and_the_array_in_them_is_named():
    with pytest.raises(TypeError, match=r"^W: expected an array of floats, got Tensor; of a tensor pass its .data"):
        quant.quantize_nf4(Tensor(np.ones(64, np.float32)))


def test_integers_to_dequantize_to_are_refused():
    with pytest.raises(TypeError, match=r"^dtype: got int32; a float dtype is accepted"):
        quant.quantize_nf4(np.ones(64, np.float32)).to(dtype="int32")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^quant_type: got 'nf9'; accepted are"):
        quant.quantize(np.ones(64, np.float32), "nf9")
    with pytest.raises(ValueError, match=r"^code: got 'fp8'; accepted are 'dynamic' and 'linear'"):
        quant.quantize_int8(np.ones(64, np.float32), code="fp8")
    with pytest.raises(ValueError, match=r"^bits: got 1; an int from 2 to 8"):
        quant.normal_float_table(1)


def test_a_buffer_that_does_not_fit_is_refused():
    q = quant.quantize_nf4(np.ones((8, 8), np.float32))
    for out in (np.empty(63, np.float32), np.empty(64, np.float16), np.empty((64, 2), np.float32)[:, 0]):
        with pytest.raises(ValueError, match=r"^out: got .* a contiguous array of 64 × float32 is accepted"):
            quant.dequantize(q, out=out)


def test_double_quantization_refuses_what_it_cannot_code():
    q = quant.quantize_nf4(np.ones(128, np.float32))
    with pytest.raises(ValueError, match=r"^q: its block maxima are quantized already"):
        quant.double_quantize(quant.double_quantize(q))
    for wrong in (0, True, 2.5, "two"):
        with pytest.raises(ValueError, match=rf"^blocksize: got {wrong!r}; an int of at least 1"):
            quant.double_quantize(q, blocksize=wrong)
        with pytest.raises(ValueError, match=rf"^threads: got {wrong!r}; an int of at least 1"):
            quant.double_quantize(q, threads=wrong)
    huge = quant.quantize_nf4(np.full(128, 3e38, np.float32))
    with pytest.raises(ValueError, match=r"^q: the sum of its block maxima is beyond"):
        quant.double_quantize(huge)


def test_llm_int8_refuses_what_does_not_fit():
    X = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"^W: got shape \(5, 4\).* needs in = 3"):
        quant.llm_int8(X, np.ones((5, 4), np.float32))
    with pytest.raises(ValueError, match=r"^X: got shape \(3,\)"):
        quant.llm_int8(X[0], X)
    with pytest.raises(ValueError, match=r"^threshold: got -1"):
        quant.llm_int8(X, X, threshold=-1)
    for bad in (np.nan, 1e300):  # float64 numbers may be beyond float32's range: without a warning on the way
        with pytest.raises(ValueError, match=r"^X: 1 of 2 rows hold NaN, or numbers beyond"):
            quant.llm_int8(np.array([[1, bad], [1, 1]]), X[:, :2])
        with pytest.raises(ValueError, match=r"^W: 1 of 2 rows hold NaN, or numbers beyond"):
            quant.llm_int8(X[:, :2], np.array([[1, bad], [1, 1]]))
    with pytest.raises(ValueError, match=r"^W: got shape \(3,\); a matrix"):
        quant.llm_int8(X, X[0])
