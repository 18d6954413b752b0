"""Tensor: a value, its gradient, and the operation it came from; `backward` walks that graph once, freeing it.

The whole of reverse mode is here and knows no operation: ops/ makes nodes with `result`, each with one gradient
function (vector–Jacobian product) for every parent that needs one. A parent that needs none is not part of the graph
at all, so a frozen weight costs no gradient product and keeps no activation alive. Nodes refer to nodes, not to
tensors: a value that no gradient function captured is freed as soon as nobody else uses it.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import backend
from .backend import Array

if TYPE_CHECKING:
    from .graph import Graph

GradFn = Callable[[Array], Any]
_creation = itertools.count(1).__next__  # nodes are numbered as they are made: parents come before their children
_grad_enabled = contextvars.ContextVar("grad_enabled", default=True)  # each thread has its own, as in PyTorch


class no_grad(contextlib.ContextDecorator):  # noqa: N801 - PyTorch's name
    """Build no graph: `with no_grad(): ...`, or `@no_grad()` on a function."""

    inside = False

    def __enter__(self) -> None:
        self._outer = (*getattr(self, "_outer", ()), _grad_enabled.get())
        _grad_enabled.set(self.inside)

    def _recreate_cm(self) -> no_grad:  # contextlib's hook: calls of a decorated function, in any thread, share nothing
        return type(self)()

    def __exit__(self, *exception: object) -> None:
        *self._outer, outer = self._outer
        _grad_enabled.set(outer)


class enable_grad(no_grad):  # noqa: N801 - PyTorch's name
    """Build graphs inside, even within `no_grad`."""

    inside = True


def is_grad_enabled() -> bool:
    """False inside `no_grad()`."""
    return _grad_enabled.get()


# --- in-place safety --------------------------------------------------------------------------------------------------


class Held:
    """The arrays that a node's backward needs. While any node holds an array NumPy refuses to write to it.

    So `x.data[0] = 1` between forward and backward raises at once ("assignment destination is read-only") instead of
    giving a wrong gradient later; the array is writable again once backward has run or the graph is dropped. A view
    made earlier of the same memory keeps NumPy's own flag and is not stopped. CuPy has no such flag; there only the
    library's own writers (optimizers, merging), which ask `is_held` first, are safe.
    """

    __slots__ = ("arrays",)
    live: ClassVar[dict[int, list]] = {}  # id of an array -> [array, number of nodes holding it, writable before]
    lock: ClassVar = threading.RLock()  # parts of a batch build their graphs side by side, of the same weights

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays = arrays
        with Held.lock:
            for array in arrays:
                entry = Held.live.get(id(array))
                if entry is not None:
                    entry[1] += 1
                    continue
                writable = type(array) is np.ndarray and array.flags.writeable
                Held.live[id(array)] = [array, 1, writable]
                if writable:
                    array.setflags(False)

    def __del__(self) -> None:
        with Held.lock:
            for array in self.arrays:  # the owner of memory comes before its views: NumPy asks for that order
                entry = Held.live[id(array)]
                entry[1] -= 1
                if not entry[1]:
                    del Held.live[id(array)]
                    if entry[2] and (type(array.base) is not np.ndarray or array.base.flags.writeable):
                        array.setflags(True)


def is_held(array: Array) -> bool:
    """True while a graph that has not run backward yet needs the values in `array`, or in what it is a view of."""
    return id(array) in Held.live or id(array.base) in Held.live


# --- the graph --------------------------------------------------------------------------------------------------------


class Node:
    """One recorded operation.

    Attributes:
        op: its name.
        parents: where its gradients go: nodes, and leaf tensors; None in place of one that needs no gradient.
        backward: maps dL/d(output) to one gradient a parent; or a tuple of functions, one a parent.
        held: keeps what they captured from being written to.
        order: the number of nodes made before it.
        shape, dtype: the output's.
        value: the output, where it has at most four elements; for drawing.
    """

    __slots__ = ("backward", "dtype", "held", "op", "order", "parents", "shape", "value")

    def __init__(self, op: str, data: Array, parents: tuple, backward: Any, closures: tuple[Callable, ...]) -> None:
        self.op, self.parents, self.backward, self.order = op, parents, backward, _creation()
        self.held = _hold(closures)
        self.shape, self.dtype, self.value = data.shape, data.dtype, data if data.size <= 4 else None

    def __deepcopy__(self, memo: dict) -> Node:
        raise TypeError(f"deepcopy: a tensor that {self.op!r} made has a graph, which is not copied; use .detach()")


# --- the tensor -------------------------------------------------------------------------------------------------------


class Tensor:
    """An array that remembers how it was computed.

    Args:
        data: an array (kept, not copied: library and dtype stay), or numbers in lists (floats take the default dtype).
        requires_grad: whether `backward` leaves this tensor's gradient in `.grad`.
        dtype: convert to this dtype first.

    Attributes:
        data: the array. Read-only while a graph needs it (see `Held`).
        grad: dL/d(data), an array of the same shape and dtype; None before backward. Gradients of several backward
            calls add up. Only leaves (tensors that no operation made) keep one.

    Raises:
        TypeError: not numbers, or `requires_grad` for integers.
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None) -> None:
        self.data = backend.as_array(data.data if isinstance(data, Tensor) else data, dtype)
        if requires_grad and not backend.is_float(self.data.dtype):
            raise TypeError(f"requires_grad: only floats have gradients, got {self.data.dtype}; pass dtype='float32'")
        self.requires_grad = requires_grad
        self.grad: Array | None = None
        self._node: Node | None = None

    # what it looks like

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        """The array's dtype."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.data.size

    @property
    def is_leaf(self) -> bool:
        """True for a tensor that no recorded operation made."""
        return self._node is None

    def __len__(self) -> int:
        if not self.data.ndim:
            raise TypeError("len() of a tensor without axes")
        return self.data.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __repr__(self) -> str:
        values = np.array2string(
            backend.to_numpy(self.data), precision=4, separator=", ", prefix="Tensor(", threshold=64
        )
        made_by = f", op={self._node.op}" if self._node else ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({values}, shape={self.shape}, {self.dtype}{made_by})"

    def graph(self, names: Any = None) -> Graph:
        """The computation graph that led here: an SVG picture in a notebook, `.dot` as text anywhere.

        `names` is what to call tensors: `{"W": W}`, or a module, whose parameters' names are used. See `graph.Graph`.
        """
        from .graph import Graph

        return Graph(self, names)

    # as numbers and arrays

    def item(self) -> float | int | bool:
        """The one number in it; ValueError when there are more."""
        if self.data.size != 1:
            raise ValueError(f"item(): the tensor has {self.data.size} elements, shape {self.shape}; it needs one")
        return self.data.item()

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array (the same memory on the CPU, a copy from a device)."""
        return backend.to_numpy(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not isinstance(self.data, np.ndarray):
            raise TypeError("implicit conversion of a device tensor to NumPy; call .numpy()")
        return np.array(self.data, dtype=dtype, copy=copy)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def detach(self) -> Tensor:
        """The same values outside the graph."""
        return Tensor(self.data)

    def __setitem__(self, index: object, value: object) -> None:
        raise TypeError("tensors are not assigned to: use ops.where, or write to .data outside a graph")

    __hash__ = object.__hash__  # by identity: == compares elements

    # reverse mode

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def backward(self, grad: Any = None) -> None:
        """Add dL/dx to `.grad` of every leaf x that requires it, where L = Σ grad · self, and free the graph.

        Args:
            grad: dL/d(self), of this tensor's shape; may be left out (1) when it has one element.

        Raises:
            RuntimeError: nothing here requires a gradient, or backward has already freed this graph.
            ValueError: `grad` is missing or has another shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward(): no tensor that made this one requires a gradient")
        backend.keep_freed_memory()
        grad = self._seed_gradient(grad)
        if self._node is None:
            return self._accumulate(grad, owned=False)
        counter = backend.flop_counter
        if counter is not None:
            outer, counter.phase = counter.phase, "backward"
        try:
            _walk(self._node, grad, counter)
        finally:
            if counter is not None:
                counter.phase = outer

    def _seed_gradient(self, grad: Any) -> Array:
        xp = backend.get_namespace(self.data)
        if grad is None:
            if self.data.size != 1:
                raise ValueError(
                    f"backward(): shape {self.shape} is not one number; pass grad of that shape, or .sum()"
                )
            return xp.ones_like(self.data)
        grad = backend.as_array(grad.data if isinstance(grad, Tensor) else grad, self.dtype)
        if grad.shape != self.shape:
            raise ValueError(f"grad: got shape {grad.shape}, the tensor has {self.shape}")
        return grad

    def _accumulate(self, grad: Array, owned: bool) -> None:
        """Add to a leaf's gradient. An array that something else may share is copied, so that `.grad` is its own."""
        if self.grad is None:
            self.grad = grad if owned else grad.copy()
        else:
            self.grad += grad


def gradients(node: Node | None, grad: Array) -> dict[Tensor, Array]:
    """What `backward` would add to `.grad`, by leaf, and nothing is added; for operations that hold graphs inside."""
    found: dict[Tensor, Array] = {}
    if node is not None:
        _walk(node, grad, backend.flop_counter, found)
    return found


def _walk(
    root: Node, grad: Array, counter: backend.FlopCounter | None, into: dict[Tensor, Array] | None = None
) -> None:
    """Reverse creation order is a topological order: every node's gradient is complete when its turn comes.

    The leaves' gradients go to their `.grad`, or into the dictionary, where one is given.
    """
    nodes = _nodes(root)
    grads = {root: grad}
    owned: set[Node] = set()  # nodes whose gradient array belongs to this walk alone and may be added to in place
    while nodes:
        node = nodes.pop()
        backward, parents, node.backward, node.parents = node.backward, node.parents, _freed, ()
        g = grads.pop(node, None)
        if g is None:  # a joint backward gave nothing for it
            node.held = None
            continue
        parent_grads = [f(g) for f in backward] if type(backward) is tuple else backward(g)
        if counter is not None:
            counter.credit(node.op)
        backward = node.held = None  # the closures and what they held go before the next node allocates
        for parent, p in zip(parents, parent_grads, strict=True):
            if p is None or parent is None:
                continue
            mine = p is not g and getattr(p, "base", None) is None
            if type(parent) is not Node:
                if into is None:
                    parent._accumulate(backend.keep_array(p), mine)
                elif parent in into:
                    into[parent] = into[parent] + p
                else:
                    into[parent] = backend.keep_array(p) if mine else p.copy()
            elif parent not in grads:
                grads[parent] = p
                if mine:
                    owned.add(parent)
            elif parent in owned:
                grads[parent] += p
            elif mine:
                p += grads[parent]
                grads[parent] = p
                owned.add(parent)
            else:
                grads[parent] = grads[parent] + p
                owned.add(parent)
        parent_grads = p = g = None


def leaves(node: Node | None) -> list[Tensor]:
    """The tensors at the ends of the graph below `node`, in the order in which operations first used them."""
    ends = [p for each in (_nodes(node) if node else ()) for p in each.parents if isinstance(p, Tensor)]
    return list(dict.fromkeys(ends))


def _nodes(root: Node) -> list[Node]:
    """All operations below `root`, oldest first; found with a list, not by recursion, so depth has no limit."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node.backward is _freed:
            raise RuntimeError(
                f"backward(): the graph of this {node.op!r} is freed, backward ran through it before; run forward again"
            )
        for parent in node.parents:
            if type(parent) is Node and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=lambda node: node.order)


def _freed(grad: Array) -> Any:
    """Stands for the backward of a node whose graph is gone."""
    raise RuntimeError("backward has already freed this graph")


# --- what ops/ makes nodes with ------------------------------------------------------------------------------------


def result(op: str, data: Array, *edges: tuple[Tensor, GradFn]) -> Tensor:
    """The output of an operation, with `(parent, gradient function)` for each input.

    A gradient function maps dL/d(output) to dL/d(parent). It may capture arrays (they are then held, see `Held`),
    never tensors. Those of parents that need no gradient are dropped here, with all that they captured.
    """
    if _grad_enabled.get():
        edges = [edge for edge in edges if edge[0].requires_grad]
        if edges:
            backward = tuple([function for _, function in edges])
            return _output(op, data, [parent for parent, _ in edges], backward, backward)
    return _output(op, data, (), None, ())


def joint_result(op: str, data: Array, parents: tuple[Tensor, ...], backward: Callable[[Array], tuple]) -> Tensor:
    """As `result`, for an operation whose gradients share work: `backward` maps dL/d(output) to one gradient for each
    parent, None where that parent needs none."""
    if _grad_enabled.get() and any(p.requires_grad for p in parents):
        return _output(op, data, parents, backward, (backward,))
    return _output(op, data, (), None, ())


def multi_result(
    op: str, arrays: Sequence[Array], parents: Sequence[Tensor | None], backward: Callable[[list], Sequence]
) -> list[Tensor]:
    """As `joint_result`, for an operation with several outputs; a parent that is not there may be None.

    `backward` maps their gradients, one an output and None for one that nothing came back for, to one a parent.
    """
    if not (_grad_enabled.get() and any(p is not None and p.requires_grad for p in parents)):
        return [_output(op, array, (), None, ()) for array in arrays]
    count = len(arrays)
    if count == 1:
        return [_output(op, arrays[0], parents, lambda g: backward([g]), (backward,))]
    joint = _output(op, arrays[0], parents, lambda parts: backward([parts.get(i) for i in range(count)]), (backward,))
    pick = lambda i: lambda g: (_Parts({i: g}),)  # noqa: E731
    return [_output(f"{op}.{i}", array, (joint,), pick(i), ()) for i, array in enumerate(arrays)]


class _Parts(dict):
    """The gradient of an operation with several outputs: those that have come back, by the output's number."""

    base = None  # as an array that is no view has it: it may be added to in place

    def __iadd__(self, other: _Parts) -> _Parts:
        self.update(other)  # each output comes once: its own node has added up what came back to it
        return self

    __add__ = __iadd__


def _output(op: str, data: Array, parents: Sequence[Tensor], backward: Any, closures: tuple) -> Tensor:
    out = Tensor.__new__(Tensor)
    out.data, out.grad = backend.keep_array(data), None
    if backward is None:
        out.requires_grad, out._node = False, None
    else:
        origins = tuple([(p._node or p) if p is not None and p.requires_grad else None for p in parents])
        out.requires_grad, out._node = True, Node(op, out.data, origins, backward, closures)
    if backend.flop_counter is not None:
        backend.flop_counter.credit(op)
    return out


_NO_ARRAYS = {int, float, bool, tuple, type(None), type(np), type(lambda: None)}  # most of what else is captured


def _hold(closures: tuple[Callable, ...]) -> Held | None:
    """Hold the arrays that gradient functions captured, read off their cells: no operation can forget one."""
    arrays = []
    for closure in closures:
        for cell in closure.__closure__ or ():
            value = cell.cell_contents
            kind = type(value)
            if kind in _NO_ARRAYS:
                continue
            for array in value if kind is list else (value,):
                kind = type(array)
                if kind is np.ndarray or (hasattr(kind, "nbytes") and not isinstance(array, np.generic)):
                    if type(array.base) is kind:
                        arrays.append(array.base)
                    arrays.append(array)
    return Held(arrays) if arrays else None
