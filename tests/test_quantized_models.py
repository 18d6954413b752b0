"""Language models loaded into codes, and saved as codes: bit for bit, without the model in full precision."""

from __future__ import annotations

import json
import struct
import tracemalloc

import llama_cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minipeft import load_model, nn, quant, save_model
from minipeft.models import download
from minipeft.models.llama import Llama
from minipeft.models.llama_config import LlamaConfig
from minipeft.quant import Linear4bit, Linear8bit, QuantizedLinear

IDS = llama_cases.batch("none")[0]
KINDS = {"nf4": Linear4bit, "fp4": Linear4bit, "int8": Linear8bit, "nf3": QuantizedLinear, "int4": QuantizedLinear}


def same_tensors(model, other):
    ours, theirs = quant.quantized_state_dict(model), quant.quantized_state_dict(other)
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        assert (a.dtype, a.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name


def edit_config(directory, **changes):
    path = directory / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"] = {**(data.get("quantization_config") or {}), **changes}
    path.write_text(json.dumps(data))


def store_as(directory, dtype, itemsize, *, but=()):
    """Call the packed codes in the file another dtype, (bytes ÷ itemsize, 1), as bitsandbytes does: the same bytes."""
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    packed = {name.partition(".quant_state.")[0] for name in header if ".quant_state." in name}
    for name in packed.difference(but):
        start, end = header[name]["data_offsets"]
        assert (end - start) % itemsize == 0
        header[name] |= {"dtype": dtype, "shape": [(end - start) // itemsize, 1]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


@pytest.fixture
def codes(tmp_path):
    """A saved model in NF4."""
    return save_model(quant.quantize_model(llama_cases.llama("biases", "float32")), tmp_path / "codes")


# --- into codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["grouped", "no grouping, tied", "biases", "qwen2"])
@pytest.mark.parametrize("code", KINDS)
def test_loading_into_codes_gives_what_quantizing_the_loaded_model_gives(tmp_path, variant, code):
    save_model(llama_cases.llama(variant, "float32"), tmp_path)
    model = load_model(tmp_path, quantization=code)
    same_tensors(model, quant.quantize_model(load_model(tmp_path), code))
    inner = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert inner
    assert all(type(m) is KINDS[code] for m in inner)
    assert type(model.lm_head) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model(IDS).dtype == np.float32


def test_a_gguf_is_loaded_into_codes(tmp_path):
    pytest.importorskip("gguf")
    from test_load import write_gguf

    write_gguf(tmp_path / "m.gguf", llama_cases.llama("grouped", "float32"), "F16")
    model = load_model(tmp_path / "m.gguf", quantization="nf4")
    same_tensors(model, quant.quantize_model(load_model(tmp_path / "m.gguf")))


@pytest.mark.parametrize(("dtype", "kept"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_beside_codes_half_precision_becomes_full(tmp_path, dtype, kept):
    save_model(llama_cases.llama("grouped", "float32"), tmp_path)
    model = load_model(tmp_path, dtype, "nf4")
    assert {p.dtype.name for p in model.parameters()} == {kept}
    assert {m.weight.dtype.name for m in model.modules() if isinstance(m, QuantizedLinear)} == {kept}
    assert model(IDS).dtype == kept


def test_the_model_in_full_precision_never_exists(tmp_path):
    """At the peak there are the codes so far, the embeddings, and what one weight takes while it is coded."""
    config = LlamaConfig(500, 256, 512, 8, 4, tie_word_embeddings=True)
    model = Llama(config, rng=0)
    full = sum(p.data.nbytes for p in model.parameters())
    largest = max(p.data.nbytes for p in model.parameters())
    save_model(model, tmp_path)
    del model
    tracemalloc.start()
    loaded = load_model(tmp_path, quantization="nf4")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    codes = sum(m.quantized.nbytes for m in loaded.modules() if isinstance(m, QuantizedLinear))
    assert kept < codes + sum(p.data.nbytes for p in loaded.parameters()) + 500_000
    assert peak < kept + 6 * largest + 500_000  # the weight, what is made of it in parts, and its codes
    assert peak < 0.5 * full


def test_a_loaded_model_does_not_need_its_file_any_more(codes):
    model = load_model(codes)
    before = model(IDS).data
    for file in codes.iterdir():
        with open(file, "r+b") as opened:  # in its place: a mapping would see it
            opened.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(model(IDS).data, before)


def test_smollm2_is_loaded_into_codes_and_knows_what_it_learned():
    try:
        download.smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = load_model("smollm2", quantization="nf4")
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 210
    ids = [504, 3575, 282, 4649, 314]  # The capital of France is
    assert model.generate(ids, 1)[-1] == 7042  # Paris


# --- codes on the disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["grouped", "no grouping, tied", "biases", "qwen2"])
@pytest.mark.parametrize("code", KINDS)
def test_a_saved_model_of_codes_loads_bit_for_bit(tmp_path, variant, code):
    model = quant.quantize_model(llama_cases.llama(variant, "float32"), code)
    again = load_model(save_model(model, tmp_path))
    same_tensors(again, model)
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert not any(p.requires_grad for p in again.parameters())
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == ("bitsandbytes" if code in ("nf4", "fp4") else "minipeft")


def test_single_quantization_other_blocks_and_whole_layers_are_kept(tmp_path):
    model = quant.quantize_model(
        llama_cases.llama("grouped", "float32"), "nf4", blocksize=128, double_quant=False, skip=("down_proj",)
    )
    same_tensors(load_model(save_model(model, tmp_path)), model)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert not written["bnb_4bit_use_double_quant"]
    assert written["llm_int8_skip_modules"] == [
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip


def test_codes_in_several_files_are_gathered(codes):
    tensors = load_file(codes / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, codes / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (codes / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_model(codes)
    (codes / "model.safetensors").unlink()
    same_tensors(load_model(codes), expected)


STORAGES = {
    "bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8), "int8": ("I8", 1),
}  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
def test_codes_stored_under_another_dtype_are_the_same_codes(codes, storage):
    """`bnb_4bit_quant_storage`: bytes that would be NaN, or −0, as such numbers come through too."""
    expected = load_model(codes)
    edit_config(codes, bnb_4bit_quant_storage=storage)
    store_as(codes, *STORAGES[storage])
    model = load_model(codes)
    same_tensors(model, expected)
    np.testing.assert_array_equal(model(IDS).data, expected(IDS).data)
    written = save_model(model, codes.parent / "again")
    assert json.loads((written / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_storage"] == "uint8"
    assert {a.dtype.name for n, a in load_file(written / "model.safetensors").items() if n == NAME} == {"uint8"}


def test_a_file_decides_how_each_of_its_tensors_is_stored(codes):
    expected = load_model(codes)
    store_as(codes, "BF16", 2, but=[NAME])  # and config.json says uint8
    same_tensors(load_model(codes), expected)


def test_the_same_code_may_be_asked_for_again_and_another_is_refused(codes):
    same_tensors(load_model(codes, quantization="nf4"), load_model(codes))
    for other in ("fp4", "int8"):
        with pytest.raises(ValueError, match=rf"^quantization: got '{other}'; .* are nf4 codes already; None"):
            load_model(codes, quantization=other)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf9", "4bit", "", 4, True])
def test_an_unknown_code_is_refused_before_anything_is_read(quantization):
    with pytest.raises(ValueError, match=r"^quantization: got .*; accepted are None, 'nf4', 'fp4', 'int8'"):
        load_model("/nowhere", quantization=quantization)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq"}, "quantized by 'gptq'; bitsandbytes in 4 bits is accepted"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "quantized by bitsandbytes in 8 bits"),
        ({"quant_method": "minipeft"}, "quantized by 'minipeft'"),
    ],
)
def test_weights_quantized_in_another_way_are_named(codes, entry, words):
    edit_config(codes, **entry)
    with pytest.raises(ValueError, match=f"quantization_config: the weights are {words}"):
        load_model(codes)


NAME = "model.layers.1.mlp.up_proj.weight"


def damaged(codes, change):
    tensors = load_file(codes / "model.safetensors")
    change(tensors)
    save_file(tensors, codes / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{NAME}.absmax"), rf"'{NAME}.absmax' is missing"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), rf"{NAME}: got \d+ × uint8; shape \(40, 24\) need"),
        (lambda t: t.update({NAME: t[NAME].astype("float32")}), rf"{NAME}: got 1920 × uint8; .* need 480 × uint8"),
        (
            lambda t: t.update({NAME: t[NAME].reshape(-1).view("float16")[1:]}),
            rf"{NAME}: got 478 × uint8; .* need 480 × uint8",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(NAME)], rf"tensors missing: {NAME}"),
        (lambda t: t.pop(f"{NAME}.quant_state.bitsandbytes__nf4"), rf"not in a model of this config: {NAME}.absmax"),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, "uint8")}), "norm.weight holds bytes without a quant"),
        (
            lambda t: t.update({n.replace(NAME, "lm_head.weight"): a for n, a in t.items() if n.startswith(NAME)}),
            "lm_head.weight: codes, but no weight of a Linear inside the model",
        ),
        (
            lambda t: t.update(
                {n.replace(NAME, NAME.replace("up", "down")): a for n, a in t.items() if n.startswith(NAME)}
            ),
            r"down_proj.weight has shape \(40, 24\), by the config it is \(24, 40\)",
        ),
    ],
)
def test_damaged_codes_are_named(codes, change, words):
    damaged(codes, change)
    with pytest.raises(ValueError, match=words):
        load_model(codes)


def test_codes_without_their_entry_in_the_config_are_refused(codes):
    data = json.loads((codes / "config.json").read_text())
    del data["quantization_config"]
    (codes / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"is stored as U8; accepted are F64"):
        load_model(codes)


def test_weights_that_are_not_finite_are_named(tmp_path):
    save_model(llama_cases.llama("grouped", "float32"), tmp_path)

    def change(tensors):
        tensors[NAME][0, 0] = np.inf

    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{NAME} cannot be quantized: W: 1 of 15 blocks hold NaN"):
        load_model(tmp_path, quantization="nf4")
