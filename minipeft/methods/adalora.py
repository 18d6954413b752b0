"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023 (ICLR; arXiv 2303.10512).

    W' = W + s·P Λ Q       W (out, in) frozen; P (out, r), Λ = diag(λ), Q (r, in) trained, PᵀP ≈ I ≈ QQᵀ     (eq. 3)

All modules share one budget of directions. Directions are scored while training; those with the lowest scores get
λ = 0, and may come back until the ranks are settled. The formulas are in adalora_formulas.py, and can be called from
here as well; here are the layer, the config and the method.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import backend, ops
from ..backend import Array, get_namespace
from ..checks import check_choice, check_count
from ..nn import Dropout, Linear, Module, Parameter, assign
from ..tensor import Tensor
from .adalora_formulas import (  # noqa: F401 - the formulas' names are this module's too
    Averages,
    _check_fraction,
    _check_schedule,
    _combined,
    _penalty,
    _smooth,
    adalora_delta,
    importance_magnitude,
    importance_sensitivity,
    kept_directions,
    orthogonality_penalty,
    orthonormalize,
    rank_budget,
)
from .base import AdapterLayer, Method
from .lora import LoraConfig, check_r, lora_linear, lora_linears

# --- the layer --------------------------------------------------------------------------------------------------------


class AdaLoraLinear(AdapterLayer):
    """y = base(x) + Σ s·P Λ Q dropout(x) over the active adapters, s = α/(init_r + 1e-5) as in PEFT.

    It is LoRA's operation on A = ΛQ and B = P: forming ΛQ is all that a forward pass costs more.

    Attributes:
        lora_A, lora_E, lora_B: by adapter name, Q (r, in), λ (r, 1), P (out, r), under PEFT's names.
        ranknum: init_r, by adapter name: pruning does not change s.
        scaling: α, by adapter name.
        lora_dropout: by adapter name.
    """

    def __init__(self, base_layer: Linear) -> None:
        super().__init__(base_layer)
        self.lora_A: dict[str, Parameter] = {}
        self.lora_E: dict[str, Parameter] = {}
        self.lora_B: dict[str, Parameter] = {}
        self.ranknum: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, Dropout] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        return list(self.lora_A)

    def add(
        self, adapter: str, factors: tuple[Array, Array, Array], scaling: float, ranknum: float, dropout: Dropout
    ) -> None:
        """Add an adapter with the start values P, λ (r,), Q."""
        P, lam, Q = (backend.move(factor, get_namespace(self.weight.data)) for factor in factors)
        self.lora_A[adapter], self.lora_E[adapter] = Parameter(Q), Parameter(lam[:, None])
        self.lora_B[adapter], self.lora_dropout[adapter] = Parameter(P), dropout
        self.ranknum[adapter], self.scaling[adapter] = float(ranknum), float(scaling)

    def parameters_of(self, adapter: str) -> tuple[Parameter, Parameter, Parameter]:
        """P (out, r), λ (r, 1) and Q (r, in)."""
        return self.lora_B[adapter], self.lora_E[adapter], self.lora_A[adapter]

    def factors(self, adapter: str) -> tuple[Array, Array, Array]:
        """The arrays P (out, r), λ (r,) and Q (r, in)."""
        P, E, Q = (parameter.data for parameter in self.parameters_of(adapter))
        return P, E[:, 0], Q

    def factor(self, adapter: str) -> float:
        """s = α/(init_r + 1e-5)."""
        return self.scaling[adapter] / (self.ranknum[adapter] + 1e-5)

    def delta(self, adapter: str) -> Array:
        """ΔW = s·P Λ Q, (out, in)."""
        return self.factor(adapter) * adalora_delta(*self.factors(adapter))

    def truncate(self, adapter: str, keep: Array) -> None:
        """Drop the directions that `keep` (r,) leaves out, for good: the parameters are new and smaller."""
        P, E, Q = self.parameters_of(adapter)
        self.lora_B[adapter] = Parameter(get_namespace(P.data).ascontiguousarray(P.data[:, keep]), P.requires_grad)
        self.lora_E[adapter] = Parameter(E.data[keep], E.requires_grad)
        self.lora_A[adapter] = Parameter(Q.data[keep], Q.requires_grad)

    def _active(self) -> list[str]:
        """The adapters that take part now; one of rank 0 has nothing to add."""
        names = [] if self.disabled or self.merged else self.active
        return [name for name in names if name in self.lora_E and self.lora_E[name].size]

    def projection(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """(W, b, ΛQ, P, s) where that is all there is to forward now: one adapter, and no dropout; else None."""
        active = self._active()
        if len(active) != 1 or (self.training and self.lora_dropout[active[0]].p):
            return None
        P, E, Q = self.parameters_of(active[0])
        return self.base_layer.weight, self.base_layer.bias, Q * E, P, self.factor(active[0])

    @classmethod
    def together(cls, x: Any, layers: Sequence[AdaLoraLinear]) -> list[Tensor] | None:
        """The outputs of several layers for one x, by `lora_linears`; None where one of them needs its own way."""
        projections = [layer.projection() for layer in layers]
        return None if None in projections else lora_linears(x, *projections)

    def forward(self, x: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        projection = self.projection()
        if projection is not None:
            return lora_linear(x, *projection)
        y = self.base_layer(x)
        for name in self._active():
            P, E, Q = self.parameters_of(name)
            down = ops.linear(self.lora_dropout[name](ops.tensor(x)), Q * E)  # (..., r)
            y = y + ops.linear(down, P) * self.factor(name)
        return y

    def extra_repr(self) -> str:
        ranks = {name: E.shape[0] for name, E in self.lora_E.items()}
        return f"r={ranks}, scaling={self.scaling}, active={self.active}"


# --- the config -------------------------------------------------------------------------------------------------------

IMPORTANCES = ("sensitivity", "magnitude")
ORTHOGONALITIES = ("penalty", "gram-schmidt")
_OWN = {"importance": IMPORTANCES, "orthogonality": ORTHOGONALITIES}  # not PEFT's; its behaviour first


@dataclass
class AdaLoraConfig(LoraConfig):
    """What to adapt, and how the ranks are allocated; names and defaults are PEFT's.

    Args:
        init_r, target_r: the rank of every module at the start, and the average over modules at the end.
        total_step: how many steps the training has; `fit` refuses another number.
        tinit, tfinal: steps before pruning begins, and steps after the ranks are settled.
        deltaT: prune after every this many steps in between.
        beta1, beta2: how slowly Ī and Ū follow.
        orth_reg_weight: γ, the weight of the paper's penalty, Σ R(P, Q) over modules. (PEFT takes the mean of the norms
            instead, not squared: weaker the more modules there are, and of one strength however near I is.)
        lora_alpha: α in s = α/init_r.
        rank_pattern: of a saved adapter: which of the init_r directions are left in which module, by
            `"fc.lora_E"`; the others are gone.
        importance: how directions are scored: "sensitivity" (the paper's and PEFT's), or "magnitude" (the document's).
        orthogonality: "penalty" (the paper's γ·R, added to the loss) or "gram-schmidt" (the document's: P and Q are
            orthonormal at the start, and made so again after every step).

    Raises:
        ValueError, TypeError: at once, for a value outside what is accepted: a schedule with no step to prune in, a
            target above the start, total_step left out.
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815 - PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict)
    importance: str = "sensitivity"
    orthogonality: str = "penalty"
    peft_type: str = "ADALORA"

    def __post_init__(self) -> None:
        self._refuse_lora_options()
        pattern, self.rank_pattern = self.rank_pattern or {}, {}
        super().__post_init__()
        _check_schedule(self.total_step, self.tinit, self.tfinal)
        for name in ("init_r", "target_r", "deltaT"):
            check_count(name, getattr(self, name))
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r: got {self.target_r}, above init_r, {self.init_r}: ranks are pruned and never grow; "
                f"1 to {self.init_r} is accepted"
            )
        _check_fraction("beta1", self.beta1)
        _check_fraction("beta2", self.beta2)
        weight = self.orth_reg_weight
        if not isinstance(weight, int | float | np.number) or not 0 <= weight < float("inf"):
            raise ValueError(f"orth_reg_weight: got {weight!r}; a number of at least 0 is accepted")
        for name, accepted in _OWN.items():
            check_choice(name, getattr(self, name), accepted)
        self.rank_pattern = _checked_masks(pattern, self.init_r)

    def _refuse_lora_options(self) -> None:
        """What LoRA's config has and AdaLoRA has no place for."""
        for name, accepted, why in (
            ("r", 8, "AdaLoRA starts at init_r and ends at target_r on average"),
            ("use_dora", False, "a magnitude is not in P Λ Q"),
            ("use_rslora", False, "s is α/init_r"),
            ("alpha_pattern", {}, "one α is for all modules"),
        ):
            if getattr(self, name) != accepted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; {why}, {accepted!r} is accepted")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights: got {self.init_lora_weights!r}; True and False are accepted")

    def build(self) -> AdaLora:
        """The method that this config describes."""
        return AdaLora(self)

    def rank_of(self, name: str) -> int:
        """How many directions the module with this name has at the start."""
        kept = self.rank_pattern.get(f"{name}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json; what is not in it has PEFT's default."""
        data = {**super().to_dict(), "rank_pattern": self.rank_pattern or None}
        return {k: v for k, v in data.items() if k not in _OWN or v != _OWN[k][0]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AdaLoraConfig:
        """The config in PEFT's adapter_config.json. PEFT passes over r, use_rslora and alpha_pattern; so does this.

        Raises:
            ValueError: it uses a feature of PEFT's that is not here.
        """
        unused = ("r", "use_rslora", "alpha_pattern")
        return super().from_dict({name: value for name, value in data.items() if name not in unused})


def _checked_masks(pattern: Any, init_r: int) -> dict[str, list[bool]]:
    """PEFT's rank_pattern, with keys `fc.lora_E`, whatever prefix and adapter's name they came with."""
    if not isinstance(pattern, dict):
        raise ValueError(f"rank_pattern: expected a dictionary from names to lists of bools, got {pattern!r}")
    masks = {}
    for key, kept in pattern.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+\.lora_E)(?:\.[^.]+)?", str(key))
        if match is None or not isinstance(kept, list) or len(kept) != init_r or set(kept) - {True, False}:
            raise ValueError(
                f"rank_pattern[{key!r}]: got {kept!r}; a key such as 'fc.lora_E' with a list of init_r = {init_r} "
                "bools is accepted"
            )
        masks[match[1]] = [bool(k) for k in kept]
    return masks


# --- the method -------------------------------------------------------------------------------------------------------


class AdaLora(Method):
    """Wraps Linears in `AdaLoraLinear` and allocates their ranks while `fit` trains; nothing is called by hand.

    Attributes:
        masks: by module, which directions it has, (r,) bools, as of the last pruning.
        averages: by module, Ī and Ū of P, λ and Q, until the ranks are settled.
        rank_history: (steps done, rank by module): at the start and after each pruning.
        settled: the last pruning is done; from now on the masks are kept.
    """

    layer = AdaLoraLinear

    def __init__(self, config: AdaLoraConfig) -> None:
        super().__init__(config)
        self.pattern = dict(config.rank_pattern)
        self._known: tuple[Callable[[], Module | None], list[tuple[str, AdaLoraLinear]]] = (lambda: None, [])
        self._forget()

    def _forget(self) -> None:
        self.masks: dict[str, Array] = {}
        self.averages: dict[str, tuple[Averages, ...]] = {}
        self.rank_history: list[tuple[int, dict[str, int]]] = []
        self.settled = False

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError where init_r is more than the weight's rank: no so many directions are orthonormal."""
        check_r(f"init_r of {name!r}", self.config.init_r, *linear.weight.shape)

    def wrap(self, name: str, linear: Module) -> AdaLoraLinear:
        """The Linear with a new adapter beside it; an AdaLoraLinear gets one more.

        P and Q are N(0, 0.02²), or orthonormal for Gram–Schmidt; λ = 0, so that training starts from the base model
        (N(0, 1) with `init_lora_weights=False`, for tests).
        """
        layer = linear if isinstance(linear, AdaLoraLinear) else AdaLoraLinear(linear)
        config, (out, width) = self.config, layer.weight.shape
        dtype = layer.weight.dtype if layer.weight.dtype in (np.float32, np.float64) else np.float32
        r, size = config.rank_of(name), 0.02 if config.init_lora_weights else 1.0
        P, Q = (size * self.rng.standard_normal(shape) for shape in ((out, r), (r, width)))
        if config.orthogonality == "gram-schmidt":
            P, Q = orthonormalize(P), orthonormalize(Q.T).T
        lam = np.zeros(r) if config.init_lora_weights else self.rng.standard_normal(r)
        factors = tuple(np.ascontiguousarray(factor, dtype) for factor in (P, lam, Q))
        dropout = Dropout(config.lora_dropout, rng=int(self.rng.integers(2**62)))
        layer.add(self.adapter, factors, config.lora_alpha, config.init_r, dropout)
        return layer

    def layers(self, model: Module) -> Iterator[tuple[str, AdaLoraLinear]]:
        """The layers that have this adapter, with their names in the base model.

        They are looked for once: walking through the modules twice a step would be a quarter of a small model's step.
        """
        if self._known[0]() is not model:
            found = ((n.removeprefix("base_model.model."), m) for n, m in model.named_modules())
            self._known = weakref.ref(model), [(n, m) for n, m in found if isinstance(m, AdaLoraLinear)]
        return ((name, layer) for name, layer in self._known[1] if self.adapter in layer.lora_A)

    def ranks(self, model: Module) -> dict[str, int]:
        """How many directions each module has."""
        return {
            name: int(self.masks[name].sum()) if name in self.masks else layer.lora_E[self.adapter].shape[0]
            for name, layer in self.layers(model)
        }

    def start(self, model: Module, optimizer: Any) -> None:
        """A new schedule, unless the ranks are settled already: they stay then, whatever is trained after.

        Raises:
            ValueError: `fit` runs another number of steps than the schedule is for.
        """
        self._known = (lambda: None, [])  # adapters may have been added since
        ranks = self.ranks(model)
        spare = sum(ranks.values()) > self.config.target_r * len(ranks)
        if spare and self.run_steps not in (None, self.config.total_step):
            raise ValueError(
                f"steps: got {self.run_steps}, and AdaLoRA's schedule is for total_step = {self.config.total_step}; "
                f"that many steps, or AdaLoraConfig(total_step={self.run_steps}), are accepted"
            )
        if not self.settled:
            self._forget()
            self.rank_history.append((0, self.ranks(model)))

    def penalty(self, model: Module) -> Tensor | None:
        """γ·Σ R(P, Q) over the layers, or None where nothing is to be added to the loss."""
        weight = float(self.config.orth_reg_weight)
        if self.config.orthogonality != "penalty" or not weight:
            return None
        layers = [layer for _, layer in self.layers(model) if layer.lora_E[self.adapter].size]
        factors = [layer.lora_B[self.adapter] for layer in layers], [layer.lora_A[self.adapter] for layer in layers]
        return _penalty(*factors, weight) if layers else None

    def after_step(self, model: Module, step: int) -> None:
        """Project, score, and, where the schedule says so, prune. `step` counts from 0, the schedule from 1.

        Scores take the new values and the gradients that led to them, as in PEFT (the paper: the old values).
        """
        config, done, layers = self.config, step + 1, dict(self.layers(model))
        if config.orthogonality == "gram-schmidt":
            for layer in layers.values():
                P, _, Q = layer.parameters_of(self.adapter)
                if P.size:
                    P.data = orthonormalize(P.data)
                    assign(Q, orthonormalize(Q.data.T).T)
        if self.settled:
            return self._mask(layers)
        last = config.total_step - config.tfinal
        if config.importance == "sensitivity" and (done < last or not self.averages):
            for name, layer in layers.items():
                self._observe(name, layer)
        if done >= last:
            self._prune(done, layers)
            self.settled, self.averages = True, {}
        elif done > config.tinit and done % config.deltaT == 0:
            self._prune(done, layers)

    def _observe(self, name: str, layer: AdaLoraLinear) -> None:
        """One more step in this layer's averages. A checkpoint's are moved from the host."""
        parameters = layer.parameters_of(self.adapter)
        xp = get_namespace(parameters[0].data)
        held = self.averages.get(name) or [Averages.before(p.data) for p in parameters]
        self.averages[name] = tuple(Averages(*(backend.move(a, xp) for a in pair)) for pair in held)
        for p, averages in zip(parameters, self.averages[name], strict=True):
            if p.grad is not None:
                _smooth(averages, p.data, p.grad, self.config.beta1, self.config.beta2)

    def _scores(self, name: str, layer: AdaLoraLinear) -> Array:
        """S of this layer's directions, (r,)."""
        if self.config.importance == "magnitude":
            return importance_magnitude(*layer.factors(self.adapter))
        P, lam, Q = self.averages[name]
        return _combined(P, Averages(*(a[:, 0] for a in lam)), Q)

    def _prune(self, done: int, layers: dict[str, AdaLoraLinear]) -> None:
        """λ = 0 but for `kept_directions`. Those pruned before are scored like the rest, so that they may come back."""
        scores = [self._scores(name, layer) for name, layer in layers.items()]
        config, count = self.config, sum(len(S) for S in scores)
        budget = rank_budget(
            done, total_step=config.total_step, tinit=config.tinit, tfinal=config.tfinal,
            init_budget=count, target_budget=min(config.target_r * len(layers), count),
        )  # fmt: skip
        self.masks = dict(zip(layers, kept_directions(scores, budget), strict=True))
        self._mask(layers)
        self.rank_history.append((done, {name: int(mask.sum()) for name, mask in self.masks.items()}))

    def _mask(self, layers: dict[str, AdaLoraLinear]) -> None:
        """λ ← 0 where a mask says so."""
        for name, layer in layers.items():
            if name in self.masks:
                E = layer.lora_E[self.adapter]
                xp = get_namespace(E.data)
                self.masks[name] = backend.move(self.masks[name], xp)  # a checkpoint's come from the host
                E.data = xp.where(self.masks[name][:, None], E.data, E.data.dtype.type(0))

    def truncate(self, model: Module) -> None:
        """Drop what was pruned, for good: outputs stay, parameters become fewer. Their optimizers are to be made anew.

        Raises:
            ValueError: the ranks are not settled: what is pruned now may come back.
        """
        if not self.settled:
            last = self.config.total_step - self.config.tfinal
            raise ValueError(f"truncate: directions may come back until step {last} of the schedule; train first")
        for name, layer in self.layers(model):
            keep = self.masks[name]
            self.pattern[f"{name}.lora_E"] = self._pattern_of(name, keep)
            layer.truncate(self.adapter, keep)
            self.masks[name] = keep[keep]

    def _pattern_of(self, name: str, keep: Array) -> list[bool]:
        """Which of the init_r directions of a module are left, if of those that it still holds `keep` are."""
        held = np.array(self.pattern.get(f"{name}.lora_E", [True] * self.config.init_r))
        held[held] = backend.to_numpy(keep)
        return held.tolist()

    def saved(self, model: Module, config: Any, values: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        """PEFT's format: only the directions that are left, and `rank_pattern` to say which.

        While training, one that was pruned and has moved since is left in: a loaded adapter gives the same outputs.
        """
        if not self.masks and not self.pattern:
            return config, values
        values, pattern = dict(values), {}
        for name, layer in self.layers(model):
            lam = layer.factors(self.adapter)[1]
            xp, mask = get_namespace(lam), self.masks.get(name)
            keep = xp.ones(lam.shape, dtype=bool) if mask is None else (lam != 0) | backend.move(mask, xp)
            key = f"base_model.model.{name}.lora_"
            pattern[f"{name}.lora_E"] = self._pattern_of(name, keep)
            values[key + "E"], values[key + "A"] = values[key + "E"][keep], values[key + "A"][keep]
            values[key + "B"] = values[key + "B"][:, keep]
        return replace(config, rank_pattern=pattern), values

    def state_dict(self) -> dict[str, Array]:
        """Masks, averages and the rank history, for a run that goes on from a checkpoint."""
        state = {"settled": np.array([self.settled], np.uint8)}
        state["steps"] = np.array([done for done, _ in self.rank_history])
        for name in self.rank_history[0][1] if self.rank_history else ():
            state[f"ranks.{name}"] = np.array([ranks[name] for _, ranks in self.rank_history])
        state |= {f"mask.{name}": backend.to_numpy(mask).astype(np.uint8) for name, mask in self.masks.items()}
        for name, averages in self.averages.items():
            for part, (mean, uncertainty) in zip("PEQ", averages, strict=True):
                state[f"importance.{part}.{name}"], state[f"uncertainty.{part}.{name}"] = mean, uncertainty
        return state

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: state that it did not give.
        """
        names = [key.removeprefix("ranks.") for key in state if key.startswith("ranks.")]
        averaged = {key.partition(".P.")[2] for key in state if key.startswith("importance.P.")}
        wanted = {"settled", "steps"} | {f"ranks.{name}" for name in names}
        wanted |= {key for key in state if key.startswith("mask.") and key.removeprefix("mask.") in names}
        wanted |= {f"{kind}.{part}.{n}" for n in averaged for part in "PEQ" for kind in ("importance", "uncertainty")}
        if state.keys() != wanted or not averaged <= set(names):
            raise ValueError(f"method state: AdaLoRA did not write it; got {sorted(state)[:4]}")
        steps = state["steps"].tolist()
        self.settled = bool(state["settled"][0])
        self.rank_history = [(done, {n: int(state[f"ranks.{n}"][i]) for n in names}) for i, done in enumerate(steps)]
        self.masks = {n: state[f"mask.{n}"].astype(bool) for n in names if f"mask.{n}" in state}
        self.averages = {
            n: tuple(
                Averages(*(state[f"{kind}.{part}.{n}"].copy() for kind in ("importance", "uncertainty")))
                for part in "PEQ"
            )
            for n in names
            if n in averaged
        }
