"""A stand-in for CuPy on machines without a GPU: NumPy behind a wall, as strict as CuPy is.

The arrays here compute with NumPy but are not NumPy arrays. What CuPy refuses they refuse (mixing with NumPy arrays,
implicit conversion, functions and attributes that CuPy lacks: `setflags`, `flags.writeable`, `__index__`), and what
would be slow on a device they refuse too (iteration, index arrays that come from the host). Where the two libraries
differ silently the stand-in does as CuPy: reductions give arrays without axes, never scalars; `base` is the array that
owns the memory; `.T` of a row and `broadcast_to` to the same shape give the array itself.
"""

from __future__ import annotations

import operator
import sys
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

NOT_IN_CUPY = """
    asmatrix block bmat busday_count busday_offset datetime_as_string datetime_data einsum_path frompyfunc fromregex
    geomspace get_include getbufsize geterr geterrcall histogram_bin_edges info insert is_busday isnat matvec
    nanpercentile nanquantile nested_iters polyder polydiv polyint setbufsize seterr seterrcall show_runtime spacing
    test unstack vecdot vecmat errstate matrix memmap ndenumerate nditer recarray longdouble object_ void
"""
NOT_HERE = {*NOT_IN_CUPY.split(), "random", "testing"}  # CuPy has these two; all random numbers come from the host
SCATTER_DTYPES = {"int32", "uint32", "uint64", "float16", "float32", "float64"}  # those that CuPy's add.at takes
_REDUCTIONS = {"sum", "mean", "max", "min", "amax", "amin", "prod", "std", "var", "any", "all"}


class Flags(NamedTuple):
    """What CuPy's flags have."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class ndarray:  # noqa: N801 - the array libraries' name
    """An array on the pretended device."""

    __slots__ = ("__weakref__", "_array", "base")
    __array_ufunc__ = None  # NumPy arrays and scalars leave mixed operations to the reflected methods here
    __iter__ = None

    def __init__(self, array: np.ndarray, base: ndarray | None = None) -> None:
        self._array, self.base = array, base

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"np.{func.__name__} on a device array; use its own library's {func.__name__}")

    # layout

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    strides = property(lambda self: self._array.strides)

    @property
    def flags(self) -> Flags:
        flags = self._array.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, self.base is None)

    @property
    def T(self) -> ndarray:
        return self if self.ndim < 2 else self.transpose()

    # to the host

    def get(self) -> np.ndarray:
        return self._array.copy()

    def item(self) -> Any:
        return self._array.item()

    def tolist(self) -> Any:
        return self._array.tolist()

    def __float__(self) -> float:
        return float(self._array)

    def __int__(self) -> int:
        return int(self._array)

    def __bool__(self) -> bool:
        return bool(self._array)

    def __len__(self) -> int:
        return len(self._array)

    def __repr__(self) -> str:
        return f"standin.{self._array!r}"

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: dict) -> ndarray:
        return self.copy()

    # elements

    def __getitem__(self, index: Any) -> ndarray:
        return _wrap(self._array[_index(index)], (self,))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._array[_index(index)] = _unwrap(value)


def _method(name: str) -> Any:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        _check_options(name, kwargs)
        inputs = (self, *args, *kwargs.values())
        return _wrap(getattr(self._array, name)(*_unwrap(args), **_unwrap(kwargs)), inputs)

    return method


METHODS = """
    all any argmax argmin argpartition argsort astype clip copy cumsum diagonal dot fill flatten max mean min nonzero
    prod ravel repeat reshape round sort squeeze std sum swapaxes take trace transpose var view
"""
for _name in METHODS.split():
    setattr(ndarray, _name, _method(_name))


def _operator(name: str, reflected: bool = False) -> Any:
    apply = getattr(operator, name)

    def binary(self: ndarray, other: Any) -> Any:
        if not isinstance(other, ndarray | np.ndarray | np.generic | int | float):
            return NotImplemented
        other = _unwrap(other)
        return _wrap(apply(other, self._array) if reflected else apply(self._array, other), ())

    return binary


def _in_place(ufunc: np.ufunc) -> Any:
    def update(self: ndarray, other: Any) -> ndarray:
        ufunc(self._array, _unwrap(other), out=self._array)
        return self

    return update


for _name, _ufunc in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "pow": np.power, "and_": np.bitwise_and, "or_": np.bitwise_or, "xor": np.bitwise_xor,
    "lshift": np.left_shift, "rshift": np.right_shift, "matmul": None,
}.items():  # fmt: skip
    _plain = _name.rstrip("_")
    setattr(ndarray, f"__{_plain}__", _operator(_name))
    setattr(ndarray, f"__r{_plain}__", _operator(_name, reflected=True))
    if _ufunc is not None:  # CuPy has no @=
        setattr(ndarray, f"__i{_plain}__", _in_place(_ufunc))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operator(_name))
ndarray.__hash__ = None
ndarray.__neg__ = lambda self: _wrap(-self._array, ())
ndarray.__abs__ = lambda self: _wrap(abs(self._array), ())
ndarray.__invert__ = lambda self: _wrap(~self._array, ())


# --- through the wall -------------------------------------------------------------------------------------------------


def _unwrap(value: Any) -> Any:
    """The NumPy arrays behind stand-ins, in sequences and dictionaries too; NumPy arrays from outside are refused."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if type(value) in (tuple, list):
        return type(value)([_unwrap(item) for item in value])
    if type(value) is dict:
        return {key: _unwrap(item) for key, item in value.items()}
    return value


def _index(index: Any) -> Any:
    if isinstance(index, list):
        raise TypeError("Unsupported type <class 'list'> as an index: it would be copied to the device each time")
    return _unwrap(index)


def _wrap(value: Any, inputs: Any) -> Any:
    """A NumPy result as a stand-in: the input itself that NumPy gave back, a view of one whose memory it shares."""
    if isinstance(value, tuple | list):
        items = [_wrap(item, inputs) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, np.generic):
        return ndarray(np.asarray(value))
    if not isinstance(value, np.ndarray):
        return value
    for source in _arrays(inputs):
        if source._array is value:
            return source
    for source in _arrays(inputs):
        if _owner(source._array) is _owner(value):
            return ndarray(value, source if source.base is None else source.base)
    return ndarray(value)


def _arrays(values: Any) -> Any:
    for value in values:
        if isinstance(value, ndarray):
            yield value
        elif isinstance(value, tuple | list):
            yield from _arrays(value)


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _check_options(name: str, options: dict[str, Any]) -> None:
    """CuPy's reductions have neither `where` nor `initial`."""
    unknown = options.keys() & {"where", "initial"} if name in _REDUCTIONS else None
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {sorted(unknown)[0]!r}")


# --- the module's functions -------------------------------------------------------------------------------------------


class Function:
    """NumPy's function of one name, on stand-ins."""

    def __init__(self, function: Any) -> None:
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check_options(self.__name__, kwargs)
        value = self.function(*_unwrap(args), **_unwrap(kwargs))
        if type(value) is bool and self.__name__ in ("allclose", "array_equal"):
            value = np.bool_(value)  # arrays on the device, as every answer is
        return _wrap(value, (*args, *kwargs.values()))

    def __getattr__(self, name: str) -> Any:  # a ufunc's reduce, outer, accumulate
        return Function(getattr(self.function, name))

    def at(self, array: ndarray, index: Any, values: Any) -> None:
        """`add.at(array, index, values)`: unbuffered, repeated indices add up."""
        if array.dtype.name not in SCATTER_DTYPES:
            raise TypeError(f"{self.__name__}.at does not support {array.dtype}")
        self.function.at(array._array, _index(index), _unwrap(values))


def asarray(a: Any, dtype: Any = None, **options: Any) -> ndarray:
    """From the host to the device; an array that is there already stays itself."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    return ndarray(np.array(a, dtype=dtype, **options))


def array(a: Any, dtype: Any = None, **options: Any) -> ndarray:
    """As `asarray`, and always a copy."""
    return ndarray(np.array(a._array if isinstance(a, ndarray) else a, dtype=dtype, **options))


def asnumpy(a: ndarray) -> np.ndarray:
    """A copy on the host."""
    return a.get()


def broadcast_to(a: ndarray, shape: tuple[int, ...]) -> ndarray:
    """A view; of the same shape the array itself."""
    return a if a.shape == tuple(shape) else _wrap(np.broadcast_to(_unwrap(a), shape), (a,))


def erf(x: ndarray) -> ndarray:
    """The error function (in CuPy: cupyx.scipy.special.erf)."""
    from scipy.special import erf as scipy_erf

    return _wrap(scipy_erf(_unwrap(x)), ())


class Namespace(ModuleType):
    """A submodule, such as `linalg`."""

    def __init__(self, source: ModuleType) -> None:
        super().__init__(source.__name__.replace("numpy", __name__))
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return _forward(self.source, name)


def _forward(source: ModuleType, name: str) -> Any:
    if name.startswith("__") or name in NOT_HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(source, name)
    if isinstance(value, ModuleType):
        return Namespace(value)
    return Function(value) if callable(value) and not isinstance(value, type) else value


def __getattr__(name: str) -> Any:
    return _forward(np, name)


sys.modules.setdefault("standin", sys.modules[__name__])  # what `minipeft.backend.get_namespace` looks up
