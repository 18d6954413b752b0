"""Modules: named parameters arranged in a tree, with PyTorch's names.

A module is a plain object. Its parameters and submodules are its attributes, or items of its lists and dictionaries;
nothing is registered, so `vars(module)` is all there is to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from . import backend
from .backend import Array
from .tensor import Tensor


class Parameter(Tensor):
    """A tensor that belongs to a module and, unless `requires_grad=False`, is trained."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True, dtype: Any = None) -> None:
        super().__init__(data, requires_grad, dtype)


class Module:
    """The base of all layers and models: write `__init__` and `forward`; call the module itself.

    `output_head` names the submodule that turns features into the model's answer, which `"all-linear"` leaves out.
    """

    training = True
    output_head: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    # the tree

    def named_children(self) -> Iterator[tuple[str, Module | Parameter]]:
        """The parameters and modules directly below, with their names ("0", "1" … in lists, keys in dictionaries)."""
        for name, value in vars(self).items():
            yield from _children(name, value)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module ("") and all below it, each once, with dotted names."""
        yield from self._walk(prefix, set())

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            if isinstance(child, Module):
                yield from child._walk(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with dotted names; one that is used twice (tied) comes once, under its first name."""
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, child in module.named_children():
                if isinstance(child, Parameter) and id(child) not in seen:
                    seen.add(id(child))
                    yield (f"{prefix}.{name}" if prefix else name), child

    def parameters(self) -> Iterator[Parameter]:
        """All parameters, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def get_submodule(self, name: str) -> Module:
        """The module with this dotted name; "" is this one.

        Raises:
            ValueError: there is none.
        """
        return self._path("get_submodule", name)[-1]

    def set_submodule(self, name: str, module: Module) -> None:
        """Put `module` where the dotted name points, in place of the module that is there.

        Raises:
            ValueError: there is none.
        """
        if not name:
            raise ValueError("set_submodule: got the empty name, a module cannot replace itself; name a part of it")
        parent, last = self._path("set_submodule", name)[-2], name.rpartition(".")[2]
        if isinstance(parent, Module):
            setattr(parent, last, module)
        else:
            parent[_key(parent, last)] = module

    def _path(self, caller: str, name: str) -> list[Any]:
        """This module, then what each part of the dotted name leads to: modules, lists, dictionaries."""
        path: list[Any] = [self]
        try:
            for part in name.split(".") if name else ():
                here = path[-1]
                path.append(vars(here)[part] if isinstance(here, Module) else here[_key(here, part)])
        except (KeyError, TypeError):
            path = [None]
        if not isinstance(path[-1], Module):
            raise ValueError(f"{caller}: no module {name!r}; {closest(name, [n for n, _ in self.named_modules()])}")
        return path

    # values

    def state_dict(self) -> dict[str, Array]:
        """Every parameter's array by name: the arrays themselves, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over the values in `state`, converted to each parameter's dtype and device.

        Everything is checked before anything is changed.

        Raises:
            ValueError: names missing or unknown (with `strict`), or a shape that differs.
        """
        own = dict(self.named_parameters())
        missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
        if strict and (missing or extra):
            raise ValueError(f"state_dict: missing {_some(missing)}; unexpected {_some(extra)}")
        values = {name: backend.as_array(value) for name, value in state.items() if name in own}
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise ValueError(f"state_dict: {name} has shape {value.shape}, the model's is {own[name].shape}")
        for name, value in values.items():
            assign(own[name], value)

    def to(self, device: str | ModuleType | None = None, dtype: Any = None) -> Module:
        """Move all arrays to `"cpu"` or `"cuda"`, or convert the floats: `to("cuda")`, `to("float64")`, or both.

        Gradients are dropped: they belong to the values that were.

        Raises:
            TypeError: a dtype that is not a float.
        """
        if device is not None and dtype is None and _is_dtype(device):
            device, dtype = None, device
        if dtype is not None and not backend.is_float(dtype):
            raise TypeError(f"dtype: got {np.dtype(dtype)}; floats are accepted")
        for module in self.modules():
            for name, value in list(vars(module).items()):
                setattr(module, name, _convert(value, device, dtype))
        return self

    # switches

    def train(self, mode: bool = True) -> Module:
        """Training behaviour (dropout drops) for this module and all below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Inference behaviour: `train(False)`."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Freeze (False) or unfreeze every parameter."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def __repr__(self) -> str:
        rows = [
            f"  ({name}): " + repr(child).replace("\n", "\n  ")
            for name, child in self.named_children()
            if isinstance(child, Module)
        ]
        head = f"{type(self).__name__}({self.extra_repr()}"
        return head + ("\n" + "\n".join(rows) + "\n" if rows else "") + ")"

    def extra_repr(self) -> str:
        """What stands in the brackets when the module is printed."""
        return ""


def _children(name: str, value: Any) -> Iterator[tuple[str, Module | Parameter]]:
    if isinstance(value, Module | Parameter):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _children(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _children(f"{name}.{key}", item)


def _key(container: Any, part: str) -> Any:
    """The index or key that one part of a dotted name stands for in a list or a dictionary."""
    keys = range(len(container)) if isinstance(container, list | tuple) else container
    return {str(key): key for key in keys}[part]


def _convert(value: Any, device: Any, dtype: Any) -> Any:
    """A module's attribute with its arrays moved and converted; tensors stay the same objects (ties survive)."""
    if isinstance(value, Tensor):
        value.data, value.grad = _convert(value.data, device, dtype), None
        return value
    if type(value) in (list, tuple):
        return type(value)([_convert(item, device, dtype) for item in value])
    if isinstance(value, dict):
        return {key: _convert(item, device, dtype) for key, item in value.items()}
    if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic):
        if hasattr(value, "to"):  # a quantized tensor: its codes move, and keep their dtypes
            return value.to(device, dtype)
        if dtype is not None and backend.is_float(value.dtype):
            value = value.astype(dtype, copy=False)
        return value if device is None else backend.move(value, device)
    return value


def _is_dtype(x: Any) -> bool:
    if isinstance(x, ModuleType):  # an array library has an attribute `dtype`, of which older NumPy makes a dtype
        return False
    try:
        return np.dtype(x).name != "object"
    except TypeError:
        return False


@contextlib.contextmanager
def in_mode(model: Module, training: bool) -> Iterator[None]:
    """Inside, the whole model trains, or evaluates; afterwards each module does what it did before."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def assign(parameter: Tensor, value: Array) -> None:
    """Give a parameter new values of its own dtype and device, in a fresh array: a graph that holds the old one, and
    whoever else has it, keeps the old values."""
    target = backend.get_namespace(parameter.data)
    value = backend.move(value, target).astype(parameter.dtype)
    parameter.data = value.copy() if not value.flags.c_contiguous else value


def closest(name: str, existing: Iterable[str]) -> str:
    """A sentence that names the existing names nearest to one that does not exist."""
    import difflib

    existing = [e for e in dict.fromkeys(existing) if e]
    near = difflib.get_close_matches(name, existing, n=5, cutoff=0.4) or existing[:8]
    return f"closest are {', '.join(map(repr, near))}" if near else "there are none"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "nothing"
