"""The stand-in refuses what CuPy refuses; what it lets pass, CuPy has."""

import operator

import numpy as np
import pytest
import standin

from minipeft.backend import get_namespace, move, to_numpy

X = standin.ones((2, 3), dtype="float32")


@pytest.mark.parametrize("apply", [operator.add, operator.mul, operator.matmul, operator.lt, operator.iadd])
def test_a_numpy_array_beside_a_device_array_is_refused(apply):
    host, device = np.ones((3, 3)), standin.ones((3, 3))
    with pytest.raises(TypeError, match="Unsupported type"):
        apply(device, host)
    with pytest.raises(TypeError):
        apply(host, device)


@pytest.mark.parametrize(
    "use",
    [
        np.asarray, np.exp, np.sum, list, standin.exp.function, operator.index,
        lambda x: standin.exp(np.ones(3)),
        lambda x: standin.concatenate([x, np.ones((2, 3))]),
        lambda x: x[np.array([0])],
        lambda x: x[[0, 1]],
        lambda x: x.sum(where=x > 0),
        lambda x: standin.add.at(standin.zeros(3, dtype="int64"), standin.asarray([0]), 1),
    ],
)  # fmt: skip
def test_what_would_leave_the_device_is_refused(use):
    with pytest.raises(TypeError):
        use(X)


@pytest.mark.parametrize("name", ["setflags", "__index__", "__array_interface__", "ctypes"])
def test_attributes_that_cupy_lacks_are_not_there(name):
    assert not hasattr(X, name)


def test_flags_do_not_know_whether_an_array_is_writeable():
    assert X.flags.c_contiguous
    assert not hasattr(X.flags, "writeable")


def test_functions_that_cupy_lacks_are_not_there():
    assert not hasattr(standin, "errstate")
    assert not hasattr(standin, "nditer")


def test_answers_without_axes_are_arrays_of_the_library():
    for answer in (X.sum(), X[0, 0], X.max(), standin.exp(X[0, 0]), standin.linalg.norm(X)):
        assert get_namespace(answer) is standin
        assert answer.shape == ()


def test_numpy_numbers_and_python_numbers_mix_with_device_arrays():
    assert (np.float64(2) * X).dtype == "float64"
    assert (2.0 * X).dtype == "float32"
    assert (np.float32(2) * X).dtype == "float32"


def test_base_is_the_array_that_owns_the_memory():
    x = standin.ones((4, 6))
    assert x.base is None
    assert x[1:].base is x
    assert x.reshape(6, 4).T[0].base is x
    assert (x + 1).base is None
    assert standin.exp(x, out=x) is x
    assert standin.broadcast_to(x, x.shape) is x


def test_writing_through_a_view_changes_the_owner():
    x = standin.zeros((2, 3))
    view = x.T
    view[0] += 1
    assert x.get().tolist() == [[1, 0, 0], [1, 0, 0]]


def test_moving_there_and_back_copies_the_values():
    host = np.arange(6.0).reshape(2, 3)
    device = move(host, standin)
    host[0, 0] = 7
    assert to_numpy(device)[0, 0] == 0
    assert move(device, standin) is device


def test_cupy_has_every_name_that_the_standin_lets_pass():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    names = [n for n in dir(np) if not n.startswith("_") and callable(getattr(np, n)) and hasattr(standin, n)]
    functions = [n for n in names if not isinstance(getattr(np, n), type)]
    assert [n for n in functions if not hasattr(cupy, n)] == []
    assert [n for n in vars(standin.ndarray) if not n.startswith("_") and not hasattr(cupy.ndarray, n)] == []
