"""Quantized tensors as bitsandbytes writes them: what was written is read, and what does not fit is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import quant_cases

from minipeft import files, quant
from minipeft.backend import to_numpy
from minipeft.models import load_base
from minipeft.quant.state import from_state_tensors, state_tensors
from minipeft.tensor import Tensor

NAME = "model.layers.0.self_attn.q_proj.weight"


def quantized(quant_type: str = "nf4", nested: bool = True, shape: tuple[int, ...] = (33, 65)) -> quant.QuantizedTensor:
    q = quant.quantize(quant_cases.weights("normal", shape), quant_type)
    return quant.double_quantize(q) if nested else q


def with_state(tensors: dict, **changes: object) -> dict:
    """The tensors with entries of the JSON changed; None removes one."""
    key = next(k for k in tensors if ".quant_state." in k)
    state = json.loads(bytes(tensors[key])) | changes
    state = {k: v for k, v in state.items() if v is not None}
    return tensors | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def test_names_shapes_and_dtypes_are_bitsandbytes():
    tensors = state_tensors(quantized(), NAME)
    assert {key.removeprefix(NAME): (value.shape, value.dtype.name) for key, value in tensors.items()} == {
        "": ((1073, 1), "uint8"),
        ".absmax": ((34,), "uint8"),
        ".quant_map": ((16,), "float32"),
        ".nested_absmax": ((1,), "float32"),
        ".nested_quant_map": ((256,), "float32"),
        ".quant_state.bitsandbytes__nf4": (tensors[f"{NAME}.quant_state.bitsandbytes__nf4"].shape, "uint8"),
    }
    state = json.loads(bytes(tensors[f"{NAME}.quant_state.bitsandbytes__nf4"]))
    assert state.pop("nested_offset") == float(quantized().offset)
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [33, 65],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf3", "int4", "nf8"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_was_written_to_a_file_is_read_bit_for_bit(tmp_path, quant_type, nested):
    q = quantized(quant_type, nested)
    files.write_tensors(tmp_path / "model.safetensors", state_tensors(q, NAME))
    tensors, _ = files.read_tensors(tmp_path / "model.safetensors")
    again = from_state_tensors(tensors, NAME)
    assert quant.is_quantized(tensors, NAME)
    assert not quant.is_quantized(tensors, "model")
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(quant.dequantize(again), quant.dequantize(q))
    assert (again.shape, again.dtype, again.blocksize, again.quant_type) == (
        q.shape,
        q.dtype,
        q.blocksize,
        q.quant_type,
    )
    assert quant.bits_per_parameter(again) == quant.bits_per_parameter(q)


def test_the_8_bit_code_is_written_and_read_too():
    q = quant.quantize_int8(quant_cases.weights("normal", (33, 65)))
    np.testing.assert_array_equal(quant.dequantize(from_state_tensors(state_tensors(q))), quant.dequantize(q))


def test_tensors_on_every_array_library_are_written_and_read(xp):
    q = quantized().to(xp)
    again = from_state_tensors(state_tensors(q))
    assert type(again.codes) is type(q.codes)
    np.testing.assert_array_equal(to_numpy(quant.dequantize(again)), quant.dequantize(quantized()))


def test_bfloat16_is_read_as_float32_where_numpy_has_no_bfloat16():
    q = quantized()
    again = from_state_tensors(with_state(state_tensors(q), dtype="bfloat16"))
    assert again.dtype.name in ("bfloat16", "float32")
    chosen = from_state_tensors(with_state(state_tensors(q), dtype="bfloat16"), dtype="float32")
    np.testing.assert_array_equal(quant.dequantize(chosen), quant.dequantize(q))


def test_a_table_that_differs_in_last_bits_is_the_same_table():
    tensors = state_tensors(quantized())
    key = "weight.nested_quant_map"
    tensors[key] = np.nextafter(tensors[key], np.float32(2))
    np.testing.assert_array_equal(from_state_tensors(tensors).absmax, quantized().absmax)


@pytest.mark.parametrize("missing", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_part_is_named(missing):
    tensors = state_tensors(quantized(), NAME)
    del tensors[NAME + missing]
    with pytest.raises(ValueError, match=rf"^tensors: '{NAME}{missing}' is missing"):
        from_state_tensors(tensors, NAME)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight", np.zeros((1072, 1), np.uint8), r"^weight: got 1072 × uint8; shape \(33, 65\) need 1073 × uint8"),
        ("weight", np.zeros((1073, 1), np.int8), r"^weight: got 1073 × int8"),
        (
            "weight.absmax",
            np.zeros(33, np.uint8),
            r"^weight.absmax: got 33 × uint8; 2145 elements in blocks of 64 need 34",
        ),
        ("weight.absmax", np.zeros(34, np.float32), r"^weight.absmax: got 34 × float32; .* need 34 × uint8"),
        ("weight.nested_absmax", np.zeros(2, np.float32), r"^weight.nested_absmax: got 2 × float32; 34 block maxima"),
        ("weight.quant_map", quant.fp4_table(), r"^weight.quant_map: another table"),
        ("weight.nested_quant_map", np.zeros(255, np.float32), r"^weight.nested_quant_map: another table"),
        ("weight.quant_state.bitsandbytes__nf4", np.zeros(9, np.uint8), r"not a quantization state in JSON"),
    ],
)
def test_a_part_that_does_not_fit_the_others_is_refused(part, value, message):
    with pytest.raises(ValueError, match=message):
        from_state_tensors(state_tensors(quantized()) | {part: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [33, 64]}, "weight: got 1073 × uint8; shape .33, 64. need 1056"),
        ({"shape": []}, "shape is"),
        ({"shape": [-33, -65]}, "shape is"),
        ({"shape": None}, "shape is None"),
        ({"blocksize": 65}, "blocksize 65"),
        ({"blocksize": "64"}, "blocksize is '64'"),
        ({"quant_type": "nf9"}, "quant_type: got 'nf9'"),
        ({"dtype": "int32"}, "dtype: the state says 'int32'"),
        ({"nested_blocksize": 0}, "nested_blocksize is 0"),
        ({"nested_offset": "0"}, "nested_offset is '0'"),
        ({"nested_offset": float("nan")}, "nested_offset is nan"),
        ({"nested_offset": None, "nested_blocksize": None}, "need 34 × float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_state_tensors(with_state(state_tensors(quantized()), **changes))


def test_a_name_without_a_state_is_refused():
    with pytest.raises(ValueError, match=r"^tensors: 0 names begin with 'bias.quant_state.'; exactly one"):
        from_state_tensors(state_tensors(quantized()), "bias")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["nf4", "float16"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)


@given(st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"]), JSON)
def test_any_value_in_a_state_is_read_or_refused_by_a_value_error(entry, value):
    try:
        q = from_state_tensors(with_state(state_tensors(quantized()), **{entry: value}))
    except ValueError:
        return
    assert quant.dequantize(q).size == 33 * 65


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["nf4", "fp4", "nf3", "int8"])
def test_a_model_with_codes_is_saved_and_loaded_into_a_plain_model(tmp_path, code):
    model = quant.quantize_model(load_base("mlp"), code)
    files.write_tensors(tmp_path / "model.safetensors", quant.quantized_state_dict(model))
    tensors, _ = files.read_tensors(tmp_path / "model.safetensors")
    again = quant.load_quantized_state_dict(load_base("mlp"), tensors)
    x = Tensor(np.random.default_rng(0).random((5, 64), np.float32))
    np.testing.assert_array_equal(again(x).data, model(x).data)
    assert type(again.get_submodule("fc1")) is type(model.get_submodule("fc1"))
    onto_codes = quant.load_quantized_state_dict(quant.quantize_model(load_base("mlp")), tensors)
    np.testing.assert_array_equal(onto_codes(x).data, model(x).data)


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    tensors = quant.quantized_state_dict(quant.quantize_model(load_base("mlp")))
    model = load_base("mlp")
    before = {name: value.copy() for name, value in model.state_dict().items()}
    other = state_tensors(quantized(shape=(128, 63)), "fc1.weight")
    for damaged, message in (
        ({key: value for key, value in tensors.items() if key != "fc1.bias"}, r"missing \['fc1.bias'\]"),
        (tensors | {"fc9.bias": np.zeros(3)}, r"not in the model \['fc9.bias'\]"),
        (tensors | state_tensors(quantized(), "fc9.weight"), r"no module 'fc9'"),
        (tensors | other, r"^fc1.weight: saved with shape \(128, 63\), the model's is \(128, 64\)"),
        (tensors | {"fc1.bias": np.zeros(3, np.float32)}, r"fc1.bias has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            quant.load_quantized_state_dict(model, damaged)
    assert all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
