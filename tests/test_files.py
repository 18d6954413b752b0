"""Files are written whole or not at all, and reading says what is wrong with them."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minipeft import files
from minipeft.backend import to_numpy

TENSORS = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array([1.5, -2], dtype="float16")}


def names_in(directory):
    return sorted(p.name for p in directory.iterdir())


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_directories_and_nothing_else_is_left(tmp_path):
    path = files.write_text(tmp_path / "a" / "b" / "text", "αβγ\n")
    assert path.read_bytes() == "αβγ\n".encode()
    assert names_in(path.parent) == ["text"]


def test_files_have_the_permissions_that_new_files_have_here(tmp_path):
    (tmp_path / "plain").touch()
    paths = [files.write_tensors(tmp_path / "t.safetensors", TENSORS), files.write_json(tmp_path / "j.json", {})]
    assert {p.stat().st_mode for p in paths} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = files.write_text(tmp_path / "text", "old")

    def write(temporary):
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(type(error)):
        files.write_whole(path, write)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["text"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = files.write_text(tmp_path / "text", "old")

    def write(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"

    files.write_whole(path, write)
    assert path.read_text() == "new"


def test_the_leftover_of_a_killed_write_does_not_disturb_the_next(tmp_path):
    (tmp_path / ".text.partial").write_text("left over by a kill")
    files.write_text(tmp_path / "text", "new")
    assert names_in(tmp_path) == ["text"]


def test_json_has_sorted_outer_keys_and_keeps_the_order_of_inner_ones(tmp_path):
    path = files.write_json(tmp_path / "config.json", {"b": {"z": 1, "a": 2}, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü",\n  "b": {\n    "z": 1,\n    "a": 2\n  }\n}\n'
    assert list(files.read_json(path)["b"]) == ["z", "a"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = files.write_json(tmp_path / "config.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_tensors_go_round_with_dtype_shape_and_metadata(tmp_path, xp):
    arrays = {
        "matrix": np.arange(6, dtype="float32").reshape(2, 3),
        "transposed": np.arange(6, dtype="float64").reshape(2, 3).T,  # not contiguous
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), dtype="float32"),
        "integers": np.array([2**62, -1]),
        "half": np.array([1.5, np.nan, np.inf], dtype="float16"),
    }
    path = files.write_tensors(tmp_path / "t.safetensors", {n: xp.asarray(a) for n, a in arrays.items()}, {"k": "v"})
    found, metadata = files.read_tensors(path)
    assert metadata == {"k": "v"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(to_numpy(found[name]), array)


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    a = np.arange(4.0)
    found, _ = files.read_tensors(files.write_tensors(tmp_path / "t.safetensors", {"a": a, "b": a[1:], "c": a}))
    np.testing.assert_array_equal(found["b"], a[1:])
    np.testing.assert_array_equal(found["c"], a)


# --- reading ----------------------------------------------------------------------------------------------------------


def bfloat16_file(path, values):
    """A safetensors file by hand: header length, header, the upper halves of float32 numbers."""
    data = (np.array(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [len(values)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_bfloat16_is_read_exactly_as_float32(tmp_path):
    values = [1.0, -2.5, 0.0, 3.0e38, 1e-40, np.inf]
    exact = (np.array(values, dtype="f4").view("u4") & 0xFFFF0000).view("f4")
    found = files.read_tensors(bfloat16_file(tmp_path / "t.safetensors", values))[0]["x"]
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, exact)
    assert np.isnan(files.read_tensors(bfloat16_file(tmp_path / "n.safetensors", [np.nan]))[0]["x"]).all()


@pytest.mark.parametrize("read", [files.read_json, files.read_tensors])
def test_a_file_that_is_not_there_or_is_a_directory(tmp_path, read):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(path)


@given(st.binary(max_size=60))
def test_random_bytes_are_not_safetensors(tmp_path, data):
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"t.safetensors: not a whole safetensors file"):
        files.read_tensors(path)
    assert path.read_bytes() == data


@given(st.binary(max_size=60), st.booleans())
def test_random_bytes_are_json_objects_or_refused(tmp_path, data, braces):
    path = tmp_path / "config.json"
    path.write_bytes(b"{" + data + b"}" if braces else data)
    try:
        expected = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert files.read_json(path) == expected
        return
    with pytest.raises(ValueError, match=r"config.json: (not JSON|expected a JSON object)"):
        files.read_json(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            files.read_tensors(path)


@settings(max_examples=200)
@given(st.integers(0, 119), st.integers(0, 255))
def test_a_changed_byte_gives_an_error_or_whole_tensors(tmp_path, position, byte):
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        tensors = files.read_tensors(path)[0]
    except ValueError as error:
        assert "t.safetensors: not a whole safetensors file" in str(error)  # noqa: PT017 - not every byte matters
        return
    assert all(t.nbytes <= len(data) for t in tensors.values())


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = tmp_path / "t.safetensors"
    header = b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        files.read_tensors(path)
