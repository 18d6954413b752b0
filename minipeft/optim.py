"""Optimizers and learning-rate schedules with PyTorch's names, defaults and update rules.

An update rule is written once, over flat arrays. Parameters are gathered into units of at most `UNIT` elements: many
small ones side by side, or a piece of a large one. An array operation costs about 1 µs before it touches a number, so
for the six parameters of a 64-128-128-10 network one unit makes Adam three times faster than a loop over them; and the
pieces of a large one stay in the cache from the rule's first operation to its last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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
        ValueError: no parameters, one twice, an unknown option or one out of its range.
        TypeError: something that is not a tensor.
    """

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
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
        self._laid_out: list[list[int]] = [[] for _ in self.param_groups]  # ids of the parameters in the units
        self._resting: dict[Tensor, tuple[int, dict[str, Array]]] = {}  # state of those that are not
        self._scratch: dict[Any, list[Array]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for i, group in enumerate(self.param_groups):
            active = [p for p in group["params"] if p.grad is not None]
            ids = [id(p) for p in active]
            if ids != self._laid_out[i]:
                self._lay_out(i, active)
            for p in active:
                flags = p.data.flags
                if is_held(p.data) or not (flags.c_contiguous and getattr(flags, "writeable", True)):  # CuPy: always
                    p.data = p.data.copy()
            for unit in self._units[i]:
                unit.step += 1
                self.update(group, unit, unit.gather(), unit.work)

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """One step of the rule for a unit with flat gradient g; both g and `work` may be overwritten."""
        raise NotImplementedError

    def zeros(self, unit: Unit) -> Array:
        """A new state array for a unit."""
        return backend.get_namespace(unit.flat).zeros(unit.size, dtype=unit.flat.dtype)

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
        for unit in self._units[i]:
            for (p, part), place in zip(unit.segments, unit.places, strict=True):
                unit.step, arrays = self._resting.get(p, (0, {}))
                for name, array in arrays.items():
                    self.state(unit, name)[place] = array.reshape(-1) if part is None else array.reshape(-1)[part]
        for p in active:
            self._resting.pop(p, None)
        self._laid_out[i] = [id(p) for p in active]

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
            p: (age, {n: backend.get_namespace(a[0]).concatenate(a).reshape(p.shape) for n, a in arrays.items()})
            for p, (age, arrays) in pieces.items()
        }

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


def _check_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group with the defaults filled in, its options checked."""
    unknown = group.keys() - defaults.keys() - {"params"}
    if unknown:
        raise ValueError(f"params: unknown options {sorted(unknown)}; accepted are {sorted(defaults)}")
    members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    for p in members:
        if not isinstance(p, Tensor):
            raise TypeError(f"params: expected tensors, got {type(p).__name__}")
    group = {**defaults, **group, "params": members}
    for name in ("lr", "eps", "weight_decay", "momentum"):
        if name in group and not group[name] >= 0:
            raise ValueError(f"{name}: got {group[name]}; 0 or more is accepted")
    for beta in group.get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"betas: got {group['betas']}; both in [0, 1) are accepted")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("nesterov: needs momentum > 0 and dampening = 0")
    return group


class SGD(Optimizer):
    """Stochastic gradient descent: b ← μ·b + (1 − dampening)·g, θ ← θ − lr·b (Nesterov: θ − lr·(g + μ·b)).

    The first b is g itself; `weight_decay` is added to g as wd·θ; `maximize` climbs.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """See the class."""
        _prepare(group, unit, g, group["weight_decay"])
        mu = group["momentum"]
        if mu:
            b = self.state(unit, "momentum_buffer")
            if unit.step == 1:
                b[...] = g
            else:
                b *= mu
                g *= 1 - group["dampening"]
                b += g
                if group["nesterov"]:
                    g = unit.gather()
                    _prepare(group, unit, g, group["weight_decay"])
            if group["nesterov"]:
                g += mu * b
            else:
                g[...] = b
        g *= group["lr"]
        for theta, step, _ in unit.values():
            theta -= step


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1): m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
    θ ← θ − lr·m̂/(√v̂ + eps) with m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).

    `weight_decay` is added to g as wd·θ; `amsgrad` divides by the largest v so far; `maximize` climbs.
    """

    decoupled = False  # AdamW: the decay acts on θ, not on g

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize
        )

    def update(self, group: dict[str, Any], unit: Unit, g: Array, work: Array) -> None:
        """See the class."""
        xp, (beta1, beta2), lr = backend.get_namespace(g), group["betas"], group["lr"]
        _prepare(group, unit, g, 0 if self.decoupled else group["weight_decay"])
        m, v = self.state(unit, "exp_avg"), self.state(unit, "exp_avg_sq")
        xp.subtract(g, m, out=work)
        work *= 1 - beta1
        m += work  # m ← m + (1−β₁)(g − m)
        g *= g
        g *= 1 - beta2
        v *= beta2
        v += g
        if group["amsgrad"]:
            largest = self.state(unit, "max_exp_avg_sq")
            xp.maximum(largest, v, out=largest)
            v = largest
        xp.sqrt(v, out=work)
        work *= 1 / math.sqrt(1 - beta2**unit.step)
        work += group["eps"]
        xp.divide(m, work, out=work)
        work *= lr / (1 - beta1**unit.step)
        decay = 1 - lr * group["weight_decay"] if self.decoupled else 1.0
        for theta, _, step in unit.values():
            if decay != 1.0:
                theta *= decay
            theta -= step


class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov and Hutter 2019, algorithm 2): θ ← (1 − lr·wd)·θ before Adam's step."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize)


def _prepare(group: dict[str, Any], unit: Unit, g: Array, weight_decay: float) -> None:
    """g ← ±g + wd·θ"""
    if group["maximize"]:
        g *= -1
    if weight_decay:
        for theta, flat, _ in unit.values():
            flat += weight_decay * theta


def clip_grad_norm_(params: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm/(‖g‖₂ + 1e-6)); returns ‖g‖₂ over all of them, as before."""
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm}; a positive number is accepted")
    params = [params] if isinstance(params, Tensor) else params
    grads = [p.grad for p in params if p.grad is not None]
    norm = math.sqrt(sum(float((g * g).sum(dtype="float64")) for g in grads))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for g in grads:
            g *= scale
    return norm


# --- learning-rate schedules ------------------------------------------------------------------------------------------


class LambdaLR:
    """lr = initial lr · lr_lambda(t), where t counts the calls of `step`, from 0.

    Every schedule here is a function of t alone: nothing accumulates, so a resumed run has the same lr to the bit.
    """

    def __init__(self, optimizer: Optimizer, lr_lambda: Callable[[int], float]) -> None:
        self.optimizer, self.lr_lambda, self.last_epoch = optimizer, lr_lambda, 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._apply()

    def step(self) -> None:
        """Go on to the next t; call it after the optimizer's step."""
        self.go_to(self.last_epoch + 1)

    def go_to(self, t: int) -> None:
        """Set the lr of step t."""
        self.last_epoch = t
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.lr_lambda(self.last_epoch)

    def get_last_lr(self) -> list[float]:
        """The present lr of every group."""
        return [group["lr"] for group in self.optimizer.param_groups]


class CosineAnnealingLR(LambdaLR):
    """lr(t) = eta_min + (lr − eta_min)·(1 + cos(π·t/T_max))/2. Loshchilov and Hutter 2017, eq. 5."""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        if T_max < 1:
            raise ValueError(f"T_max: got {T_max}; at least 1 is accepted")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, lambda t: (1 + math.cos(math.pi * t / T_max)) / 2)

    def _apply(self) -> None:
        factor = self.lr_lambda(self.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = self.eta_min + (base - self.eta_min) * factor


def get_linear_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Up linearly from 0 over the warm-up, then down linearly to 0 (the name is transformers')."""
    return LambdaLR(optimizer, lambda t: _warmup(t, num_warmup_steps, num_training_steps, lambda done: 1 - done))


def get_cosine_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Up linearly from 0 over the warm-up, then down along half a cosine to 0 (the name is transformers')."""
    half = lambda done: (1 + math.cos(math.pi * done)) / 2  # noqa: E731
    return LambdaLR(optimizer, lambda t: _warmup(t, num_warmup_steps, num_training_steps, half))


def _warmup(t: int, warmup: int, total: int, shape: Callable[[float], float]) -> float:
    if t < warmup:
        return t / max(1, warmup)
    return shape(min(1.0, (t - warmup) / max(1, total - warmup)))
