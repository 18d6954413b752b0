"""Quantization beside bitsandbytes on the CPU: codes, scales and values bit for bit, files in both directions."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references import quant_cases

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would compile its fallback for every shape anew
torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
import bitsandbytes.functional as bnb  # noqa: E402

from minipeft import quant  # noqa: E402
from minipeft.files import read_tensors, write_tensors  # noqa: E402
from minipeft.models.load import load_model  # noqa: E402
from minipeft.quant import blocks, codes  # noqa: E402
from minipeft.quant.int8 import int8_matmul  # noqa: E402
from minipeft.quant.state import from_state_tensors, state_tensors  # noqa: E402

SHAPES = [(1,), (2,), (64,), (65,), (4097,), (33, 65), (3, 100), (64, 64), (2, 3, 64)]
SIZES = st.sampled_from([(1,), (7,), (64,), (129,), (5, 7), (10, 130), (3, 5, 64), (70, 64)])


def bits(x: object) -> tuple:
    """Shape, dtype and bytes: −0 differs from 0."""
    x = x.numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    return x.shape, x.dtype, x.tobytes()


def theirs(W: np.ndarray, quant_type: str, blocksize: int, nested: bool = False) -> tuple:
    """Packed codes, and the state with a flat shape: where rows are no whole number of blocks, bitsandbytes' kernel for
    CPUs reads the wrong block maximum."""
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(W.copy()), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    state.shape = torch.Size([W.size])
    return packed, state


def values_of(packed: torch.Tensor, state: bnb.QuantState) -> np.ndarray:
    """The dequantized values, (n,)."""
    return bnb.dequantize_4bit(packed, state).numpy().reshape(-1)


def check(W: np.ndarray, quant_type: str, blocksize: int) -> None:
    """Everything that quantizing W gives, single and double."""
    q = quant.quantize(W, quant_type, blocksize)
    packed, state = theirs(W, quant_type, blocksize)
    assert bits(q.codes) == bits(packed.reshape(-1))
    assert bits(q.absmax) == bits(state.absmax)
    # Equal, not the same bits: in the rest of a row that no vector fills, bitsandbytes' second FP4 zero is −0.
    np.testing.assert_array_equal(quant.dequantize(q).reshape(-1), values_of(packed, state))
    packed, state = theirs(W, quant_type, blocksize, nested=True)
    if not torch.isfinite(state.offset):
        with pytest.raises(ValueError, match=r"^q: the sum of its block maxima"):
            quant.double_quantize(q)
        return
    double = quant.double_quantize(q, threads=torch.get_num_threads())
    assert bits(double.offset) == bits(state.offset)
    assert bits(double.absmax) == bits(state.absmax)
    assert bits(double.nested_absmax) == bits(state.state2.absmax)
    np.testing.assert_array_equal(quant.dequantize(double).reshape(-1), values_of(packed, state))


def test_tables_are_bitsandbytes():
    for quant_type in ("nf4", "fp4"):
        assert bits(codes.table_of(quant_type)) == bits(bnb.get_4bit_type(quant_type, device="cpu"))
    assert bits(quant.dynamic_table()) == bits(bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", quant_cases.KINDS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_four_bits(kind, quant_type, dtype):
    for shape in SHAPES:
        for blocksize in (64, 4096):
            check(quant_cases.weights(kind, shape, dtype), quant_type, blocksize)


@settings(max_examples=30)
@given(
    SIZES,
    st.sampled_from(blocks.BLOCKSIZES),
    st.sampled_from(["nf4", "fp4"]),
    st.integers(0, 2**32),
    st.integers(-40, 38),
)
@example((7,), 64, "nf4", 0, -40)
def test_four_bits_of_any_size_and_magnitude(shape, blocksize, quant_type, seed, exponent):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        W = (rng.standard_normal(shape) * 10.0**exponent).astype(np.float32)
    W[~np.isfinite(W)] = 0
    W[rng.random(shape) < 0.1] = -0.0
    check(W, quant_type, blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bfloat16(quant_type):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    for shape in SHAPES:
        W = quant_cases.weights("normal", shape).astype(bfloat16)
        q = quant.quantize(W, quant_type, 64)
        packed, state = bnb.quantize_4bit(
            torch.from_numpy(W.view(np.int16)).view(torch.bfloat16), blocksize=64, quant_type=quant_type
        )
        state.shape = torch.Size([W.size])
        assert bits(q.codes) == bits(packed.reshape(-1))
        assert bits(q.absmax) == bits(state.absmax)
        values = bnb.dequantize_4bit(packed, state).float().numpy().reshape(-1)
        np.testing.assert_array_equal(quant.dequantize(q).reshape(-1).astype(np.float32), values)


def test_a_large_matrix_whose_maxima_pytorch_sums_on_all_its_threads():
    W = quant_cases.weights("normal", (1500, 2048))  # 48,000 blocks
    check(W, "nf4", 64)


def test_rows_of_whole_blocks_need_no_flat_shape():
    W = quant_cases.weights("normal", (33, 128))
    packed, state = bnb.quantize_nf4(torch.from_numpy(W))
    assert bits(quant.dequantize(quant.quantize_nf4(W))) == bits(bnb.dequantize_nf4(packed, state))


def test_bitsandbytes_kernel_still_mistakes_blocks_that_rows_cut():
    """When this fails bitsandbytes has mended its kernel, and `theirs` needs no flat shape any more."""
    W = quant_cases.weights("normal", (64, 64))
    packed, state = bnb.quantize_nf4(torch.from_numpy(W), blocksize=128)
    wrong, right = bnb.dequantize_nf4(packed, state).numpy(), quant.dequantize(quant.quantize_nf4(W, 128))
    if torch.backends.cpu.get_cpu_capability() != "AVX512" and (wrong == right).all():
        pytest.skip("the mistake is in the AVX-512 kernel")
    assert np.abs(right - W).mean() < np.abs(wrong - W).mean()


@pytest.mark.parametrize("threads", [1, 2])
def test_means_are_pytorchs_to_the_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (*range(1, 70), 100, 127, 128, 255, 511, 513, 2047, 5000, 32767, 32768, 32769, 65536, 100003):
            x = np.random.default_rng(n).random(n, np.float32)
            assert bits(blocks.torch_mean(x, threads)) == bits(torch.from_numpy(x).mean()), n
    finally:
        torch.set_num_threads(before)


def test_without_being_told_the_mean_takes_as_many_threads_as_pytorch():
    assert blocks._torch_threads() == torch.get_num_threads()


# --- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quant_cases.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_eight_bits(kind, dtype):
    for shape in SHAPES:
        W = quant_cases.weights(kind, shape, dtype)
        for blocksize in (64, 4096):
            q = quant.quantize_int8(W, blocksize)
            codes, state = bnb.quantize_blockwise(torch.from_numpy(W), blocksize=blocksize)
            assert bits(q.codes) == bits(codes.reshape(-1))
            assert bits(q.absmax) == bits(state.absmax)
            assert bits(quant.dequantize(q)) == bits(bnb.dequantize_blockwise(codes, state))


def test_the_8_bit_code_at_and_beside_every_border():
    """Blocks of 1 and v for every v near a number or a middle of the table, where one code ends and the next begins."""
    table = quant.dynamic_table()
    v = np.concatenate([table, (table[1:] + table[:-1]) / 2, np.linspace(-1, 1, 65537, dtype=np.float32)])
    v = np.concatenate([v, np.nextafter(v, np.float32(2)), np.nextafter(v, np.float32(-2))]).clip(-1, 1)
    W = np.ones((len(v), 64), np.float32)
    W[:, 1] = v
    theirs, _ = bnb.quantize_blockwise(torch.from_numpy(W), blocksize=64)
    assert bits(quant.quantize_int8(W, 64).codes) == bits(theirs.reshape(-1))


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize(("rows", "columns", "out"), [(3, 16, 5), (1, 40, 7), (20, 3000, 33)])
def test_llm_int8(threshold, rows, columns, out):
    rng = np.random.default_rng(0)
    X, W = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, columns), (out, columns)))
    X[:, 3] *= 8
    x, w = quant.quantize_rows(X, threshold), quant.quantize_rows(W)
    x_codes, x_absmax, outliers = bnb.int8_vectorwise_quant(torch.from_numpy(X.copy()), threshold=threshold)
    w_codes, w_absmax, _ = bnb.int8_vectorwise_quant(torch.from_numpy(W.copy()))
    assert bits(x.codes) == bits(x_codes)
    assert bits(x.absmax) == bits(x_absmax)
    assert bits(w.codes) == bits(w_codes)
    if threshold:
        np.testing.assert_array_equal(x.outliers, outliers.numpy())
    np.testing.assert_array_equal(int8_matmul(x.codes, w.codes), bnb.int8_linear_matmul(x_codes, w_codes).numpy())
    product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        torch.from_numpy(X), x_codes, w_codes, x_absmax, w_absmax, outliers, None
    )
    # bitsandbytes writes 1/127² as 6.200124e-05; it is 6.200012e-05, so its int8 part is 1.8e-5 larger.
    int8_part = np.abs(quant.dequantize_rows(x) @ quant.dequantize_rows(w).T).max()
    np.testing.assert_allclose(quant.llm_int8(X, w, threshold), product.numpy(), rtol=1e-5, atol=2e-5 * int8_part)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bitsandbytes_reads_what_is_written_here_and_the_other_way_round(quant_type, nested, dtype):
    W = quant_cases.weights("normal", (32, 64), dtype)
    q = quant.quantize(W, quant_type)
    q = quant.double_quantize(q) if nested else q
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(W), quant_type=quant_type, compress_statistics=nested, blocksize=64
    )
    their_file = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    our_file = state_tensors(q)
    assert {key: bits(value) for key, value in our_file.items()} == {key: bits(v) for key, v in their_file.items()}

    parts = {key.removeprefix("weight."): torch.tensor(value) for key, value in our_file.items() if key != "weight"}
    their_state = bnb.QuantState.from_dict(parts, device="cpu")
    values = bnb.dequantize_4bit(torch.tensor(our_file["weight"]), their_state)
    np.testing.assert_array_equal(values.numpy(), quant.dequantize(q))
    again = from_state_tensors({key: value.numpy() for key, value in their_file.items()})
    assert bits(quant.dequantize(again)) == bits(quant.dequantize(q))


@pytest.fixture(scope="module")
def four_bit_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A small Llama in NF4 by transformers and bitsandbytes, and the directories of the full one and of the codes."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "full")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        directory / "full", device_map="cpu", dtype=torch.float32, quantization_config=options
    )
    model.save_pretrained(directory / "codes")
    return model, directory / "full", directory / "codes"


def test_a_checkpoint_of_transformers_and_bitsandbytes_is_read_here(four_bit_llama):
    model, full, codes = four_bit_llama
    tensors, _ = read_tensors(codes / "model.safetensors")
    assert sum(quant.is_quantized(tensors, name) for name in tensors) == 7  # four of attention, three of the MLP
    ours = quant.load_quantized_state_dict(load_model(full), tensors)
    layers = [(name, m) for name, m in ours.named_modules() if isinstance(m, quant.Linear4bit)]
    assert len(layers) == 7
    for name, layer in layers:
        weight = model.get_submodule(name).weight
        np.testing.assert_array_equal(layer.weight.data, bnb.dequantize_4bit(weight.data, weight.quant_state).numpy())
    ids = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    # Where the CPU can, bitsandbytes multiplies in bfloat16, which has eight bits: 2⁻⁸ of logits below 1.
    np.testing.assert_allclose(ours(ids).data, expected, atol=2**-8)


def test_codes_made_here_are_those_of_transformers_and_bitsandbytes(four_bit_llama):
    _, full, codes = four_bit_llama
    theirs, _ = read_tensors(codes / "model.safetensors")
    ours = quant.quantized_state_dict(quant.quantize_model(load_model(full)))
    assert {key: bits(value) for key, value in ours.items()} == {key: bits(value) for key, value in theirs.items()}


def test_a_checkpoint_written_here_is_read_by_transformers_and_bitsandbytes(four_bit_llama, tmp_path):
    model, full, codes = four_bit_llama
    ours = quant.quantize_model(load_model(full))
    write_tensors(tmp_path / "model.safetensors", quant.quantized_state_dict(ours), {"format": "pt"})
    (tmp_path / "config.json").write_text((codes / "config.json").read_text())
    again = type(model).from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        np.testing.assert_array_equal(again(ids).logits.numpy(), model(ids).logits.numpy())
