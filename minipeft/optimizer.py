"""The optimizers' base: parameters gathered into units, so that an update rule is written once, over flat arrays.

A unit is at most `UNIT` elements: many small parameters side by side, or a piece of a large one. An array operation
costs about 1 µs before it touches a number, so for the six parameters of a 64-128-128-10 network one unit makes Adam
three times faster than a loop over them; and the pieces of a large one stay in the cache from the rule's first
operation to its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

from . import backend
from .backend import Array
from .tensor import Tensor, is_held

UNIT = 1 << 16  # elements; four float32 arrays of this length fit in a second-level cache of 1 MiB


class Unit:
    """Up to `UNIT` elements of parameters, and their optimizer state, that one pass of the update rule covers.

    Attributes:
        segments: (parameter, None) for a whole one, (parameter, slice of its flat elements) for a piece.
        step: how many updates it has had.
        state: flat arrays by name, in the order of the segments.
    """

    def __init__(self, segments: list[tuple[Tensor, slice | None]], scratch: list[Array]) -> None:
        self.segments, self.step, self.state = segments, 0, {}
        sizes = [p.size if part is None else part.stop - part.start for p, part in segments]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.places = [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]
        self.size = ends[-1]
        self.flat, self.work = scratch[0][: self.size], scratch[1][: self.size]
        self.views = self._shaped(self.flat), self._shaped(self.work)

    def _shaped(self, flat: Array) -> list[Array]:
        """One view of `flat` for each segment, in the parameter's shape where the segment is a whole one."""
        pairs = zip(self.segments, self.places, strict=True)
        return [flat[place].reshape(p.shape) if part is None else flat[place] for (p, part), place in pairs]

    def gather(self) -> Array:
        """The gradients as one flat array, a copy that the rule may overwrite."""
        for (p, part), view in zip(self.segments, self.views[0], strict=True):
            view[...] = p.grad if part is None else p.grad.reshape(-1)[part]
        return self.flat

    def values(self) -> Iterator[tuple[Array, Array, Array]]:
        """For each segment: the parameter's elements, and its places in `flat` and in `work`."""
        for (p, part), flat, work in zip(self.segments, *self.views, strict=True):
            yield (p.data if part is None else p.data.reshape(-1)[part]), flat, work


class Optimizer:
    """The base: `param_groups` as in PyTorch, `step`, `zero_grad`, `state_dict`, `load_state_dict`.

    A parameter without gradient is skipped. A parameter is changed in place, unless a graph that has not run backward
    still needs the old values (see `tensor.Held`): then it gets a new array.

    Args:
        params: parameters, or dictionaries `{"params": [...], "lr": ...}` with options of their own.
        defaults: the options of parameters that have none of their own.

    Raises:
        ValueError: no parameters, one twice, one that keeps no gradient, an unknown option or one out of its range.
        TypeError: something that is not a tensor.
    """

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        if not isinstance(params, Iterable):
            raise TypeError(f"params: got {type(params).__name__}; pass parameters, such as model.parameters()")
        groups = [params] if isinstance(params, Tensor) else list(params)
        if not groups:
            raise ValueError("params: got none; pass model.parameters()")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups = [_check_group(group, defaults) for group in groups]
        everything = [id(p) for group in self.param_groups for p in group["params"]]
        if len(set(everything)) < len(everything):
            raise ValueError("params: a parameter appears twice")
        self._units: list[list[Unit]] = [[] for _ in self.param_groups]
        self._laid_out: list[list[tuple]] = [[] for _ in self.param_groups]  # `_layout` of the units' parameters
        self._resting: dict[Tensor, tuple[int, dict[str, Array]]] = {}  # state of those that are not
        self._scratch: dict[Any, list[Array]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group, units in zip(self.param_groups, self.units(), strict=True):
            for p in group["params"]:
                flags = p.data.flags
                if p.grad is not None and (
                    is_held(p.data) or not (flags.c_contiguous and getattr(flags, "writeable", True))  # CuPy: always
                ):
                    p.data = p.data.copy()
            for unit in units:
                unit.step += 1
                self.update(group, unit, unit.gather(), unit.work)

    def units(self) -> list[list[Unit]]:
        """The units of each group, laid out for the parameters that have a gradient now."""
        for i, group in enumerate(self.param_groups):
            active = [p for p in group["params"] if p.grad is not None]
            if _layout(active) != self._laid_out[i]:
                self._lay_out(i, active)
        return self._units

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """One step of the rule for a unit with flat gradient g; both g and `work` may be overwritten."""
        raise NotImplementedError

    def zeros(self, unit: Unit) -> Array:
        """A new state array for a unit."""
        return backend.get_namespace(unit.flat).zeros(unit.size, dtype=unit.flat.dtype)

    def forget(self, params: Iterable[Tensor]) -> None:
        """Drop these parameters' state and free its memory; one that gets a gradient again starts anew."""
        gone = set(map(id, params))
        for i, units in enumerate(self._units):  # all segments of a unit that is dropped whole need no copy
            self._resting |= self._collect([u for u in units if not all(id(p) in gone for p, _ in u.segments)])
            self._units[i], self._laid_out[i] = [], []
        self._resting = {p: state for p, state in self._resting.items() if id(p) not in gone}

    def state(self, unit: Unit, name: str) -> Array:
        """The unit's state array of this name, zeros at its first use."""
        if name not in unit.state:
            unit.state[name] = self.zeros(unit)
        return unit.state[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all state arrays, read off the arrays."""
        resting = [a.nbytes for _, arrays in self._resting.values() for a in arrays.values()]
        return sum(a.nbytes for units in self._units for u in units for a in u.state.values()) + sum(resting)

    # layout: which parameters share a unit

    def _lay_out(self, i: int, active: list[Tensor]) -> None:
        """Units for the parameters that have a gradient now, with the state they had."""
        self._resting |= self._collect(self._units[i])
        self._units[i] = [Unit(segments, self._buffers(segments[0][0])) for segments in self._segments(active)]
        try:
            self._fill(self._units[i])
        except BaseException:  # no room: the state rests, whole, until there is
            self._units[i], self._laid_out[i] = [], []
            raise
        for p in active:
            self._resting.pop(p, None)
        self._laid_out[i] = _layout(active)

    def _fill(self, units: list[Unit]) -> None:
        """Give new units the state that their parameters had."""
        for unit in units:
            for (p, part), place in zip(unit.segments, unit.places, strict=True):
                unit.step, arrays = self._resting.get(p, (0, {}))
                for name, array in arrays.items():
                    self.state(unit, name)[place] = array.reshape(-1) if part is None else array.reshape(-1)[part]

    def _segments(self, active: list[Tensor]) -> Iterator[list[tuple[Tensor, slice | None]]]:
        """Parameters of one library, dtype and age together, `UNIT` elements at a time."""
        kinds: dict[Any, list[Tensor]] = {}
        for p in active:
            age = self._resting.get(p, (0, {}))[0]
            kinds.setdefault((backend.get_namespace(p.data), p.dtype.name, age), []).append(p)
        for members in kinds.values():
            row: list[tuple[Tensor, slice | None]] = []
            filled = 0
            for p in members:
                if p.size > UNIT:
                    yield from ([(p, slice(a, min(a + UNIT, p.size)))] for a in range(0, p.size, UNIT))
                    continue
                if filled + p.size > UNIT:
                    yield row
                    row, filled = [], 0
                row.append((p, None))
                filled += p.size
            if row:
                yield row

    def _buffers(self, p: Tensor) -> list[Array]:
        """Two work arrays, shared by all units of a library and dtype (fresh ones would cost page faults)."""
        xp = backend.get_namespace(p.data)
        if (xp, p.dtype.name) not in self._scratch:
            self._scratch[xp, p.dtype.name] = [xp.empty(UNIT, dtype=p.dtype) for _ in range(2)]
        return self._scratch[xp, p.dtype.name]

    def _collect(self, units: list[Unit]) -> dict[Tensor, tuple[int, dict[str, Array]]]:
        """(age, state arrays in the parameter's shape) of every parameter in the units."""
        pieces: dict[Tensor, tuple[int, dict[str, list[Array]]]] = {}
        for unit in units:
            for (p, _), place in zip(unit.segments, unit.places, strict=True):
                _, arrays = pieces.setdefault(p, (unit.step, {}))
                for name, array in unit.state.items():
                    arrays.setdefault(name, []).append(array[place])
        return {
            p: (age, {name: self.joined(parts).reshape(p.shape) for name, parts in arrays.items()})
            for p, (age, arrays) in pieces.items()
        }

    def joined(self, pieces: list[Array]) -> Array:
        """The flat pieces of a state array as one new array."""
        return backend.get_namespace(pieces[0]).concatenate(pieces)

    # saving

    def state_dict(self) -> dict[str, Array]:
        """Copies of the state by parameter number: `{"0.step": …, "0.exp_avg": …}`. Options and lr are not in it."""
        known = dict(self._resting)
        for units in self._units:
            known |= self._collect(units)
        state: dict[str, Array] = {}
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if p in known:
                age, arrays = known[p]
                state[f"{i}.step"] = backend.as_array([age], "int64")
                state |= {f"{i}.{name}": array for name, array in arrays.items()}
        return state

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: state for a parameter that is not here, or of another shape.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        loaded: dict[Tensor, tuple[int, dict[str, Array]]] = {}
        for key, array in state.items():
            number, _, name = key.partition(".")
            if not number.isdigit() or int(number) >= len(params):
                raise ValueError(f"optimizer state: {key!r} is for parameter {number}, of {len(params)} here")
            p = params[int(number)]
            age, arrays = loaded.get(p, (0, {}))
            if name == "step":
                age = int(array[0])
            elif array.shape != p.shape:
                raise ValueError(f"optimizer state: {key!r} has shape {array.shape}, the parameter {p.shape}")
            else:
                arrays[name] = backend.move(backend.as_array(array, p.dtype), backend.get_namespace(p.data))
            loaded[p] = (age, arrays)
        self._resting, self._units = loaded, [[] for _ in self.param_groups]
        self._laid_out = [[] for _ in self.param_groups]


def _layout(params: list[Tensor]) -> list[tuple]:
    """What a layout depends on: which parameters, and their dtypes, which `Module.to` may change."""
    return [(id(p), p.data.dtype) for p in params]


def _check_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group with the defaults filled in, its options checked."""
    if not isinstance(group, dict) or "params" not in group:
        raise ValueError(f'params: got {type(group).__name__} among groups; {{"params": [...]}} is accepted')
    unknown = group.keys() - defaults.keys() - {"params"}
    if unknown:
        raise ValueError(f"params: unknown options {sorted(unknown)}; accepted are {sorted(defaults)}")
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    for p in members:
        if not isinstance(p, Tensor):
            raise TypeError(f"params: expected tensors, got {type(p).__name__}")
        if not p.is_leaf:
            raise ValueError("params: got a tensor that an operation made, which keeps no gradient; pass a Parameter")
    group = {**defaults, **group, "params": members}
    for name in ("lr", "eps", "weight_decay", "momentum"):
        if name in group and not (isinstance(group[name], Real) and group[name] >= 0):
            raise ValueError(f"{name}: got {group[name]!r}; 0 or more is accepted")
    betas = group.get("betas", (0, 0))
    if not isinstance(betas, tuple | list) or [isinstance(b, Real) and 0 <= b < 1 for b in betas] != [True, True]:
        raise ValueError(f"betas: got {betas!r}; two in [0, 1) are accepted")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov: needs momentum > 0 and dampening = 0")
    return group
