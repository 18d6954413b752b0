"""Full training first, then LoRA: the document's "full-parameter SFT + LoRA", its section on LoRA.

    t < T₁:   W_{t+1} = W_t − η·update(∂L/∂W)                      every weight trains
    t ≥ T₁:   h = W_T₁ x + s·B A x,  W_T₁ frozen, B A = 0 at T₁     T₁ = fraction · T, fraction 0.1 to 0.3

Weights move most, and the loss falls fastest, in the first steps; those are given to all weights. The adapter then
learns on top of what they learned. One optimizer serves both: at T₁ it forgets the moments of what no longer trains,
and meets the factors as new. A learning-rate schedule goes on, since it counts steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backend import Array
from ..checks import check_count, check_flag
from ..nn import Module, Parameter
from ..quant.linear import QuantizedLinear
from .lora import OFFSET_INITS, Lora, LoraConfig, LoraLinear

# --- formulas ---------------------------------------------------------------------------------------------------------


def full_steps(fraction: float, total_step: int) -> int:
    """T₁ = fraction·T, rounded to the nearest step: how many of a run's steps train every weight.

    Raises:
        ValueError: a fraction outside [0, 1], or fewer than one step.
    """
    if not isinstance(fraction, int | float | np.number) or not 0 <= fraction <= 1:
        raise ValueError(f"fraction: got {fraction!r}; a number in [0, 1] is accepted, 0.1 to 0.3 in the document")
    return round(float(fraction) * check_count("total_step", total_step))


# --- the config -------------------------------------------------------------------------------------------------------


@dataclass
class FullThenLoraConfig(LoraConfig):
    """LoRA's options, and how long everything trains before.

    Make the optimizer after `get_peft_model`, of all that requires a gradient then: weights and factors. `fit` does
    the rest. A saved adapter holds the changed weights beside the factors, so its file is as large as the model's;
    PEFT, which has no such kind, refuses it. For PEFT: `merge_and_unload()` and `save_model`.

    Args:
        fraction: the share of the steps that train every weight.
        total_step: T; left out, the number of steps that `fit` is told.
        train_head: whether the output head takes part in the full phase (with a tied head: and the embeddings).

    Raises:
        ValueError, TypeError: at once, for a value outside what is accepted; and for starts that are made from W or
            that are not at B A = 0, since W trains first.
    """

    fraction: float = 0.2
    total_step: int | None = None
    train_head: bool = True
    peft_type: str = "FULL_THEN_LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        full_steps(self.fraction, 1 if self.total_step is None else self.total_step)
        self.fraction = float(self.fraction)
        check_flag("train_head", self.train_head)
        if self.use_dora:
            raise ValueError("use_dora: its magnitude is made of W, which trains first; False is accepted")
        if self.init_lora_weights is False or self.init_lora_weights in OFFSET_INITS:
            raise ValueError(
                f"init_lora_weights: got {self.init_lora_weights!r}; LoRA begins here at B A = 0 on a W that trained "
                "first; True, 'kaiming', 'gaussian' and 'gaussian_b' are accepted"
            )

    def build(self) -> FullThenLora:
        """The method that this config describes."""
        return FullThenLora(self)


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """What one phase of a run held at most, read off the arrays.

    Attributes:
        steps: how many it had.
        weights: bytes of the parameters that trained.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizer's state.
    """

    steps: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


class FullThenLora(Lora):
    """Every weight trains for the first `full_steps` steps, the factors after that.

    In the full phase the adapters are off (they are 0): it is full training, and costs what full training costs. With
    the adapter taken off afterwards, the model is what the full phase made, not what it was before.

    Attributes:
        phase: "before" the run, "full" or "lora". A model whose run is over stays in "lora".
        full_steps: T₁ of the run that `start` has begun; None before.
        record: the bytes of each phase so far, "full" and "lora".
    """

    def __init__(self, config: FullThenLoraConfig) -> None:
        super().__init__(config)
        self.phase = "before" if config.fraction else "lora"
        self.full_steps: int | None = None
        self.record = {"full": Phase(), "lora": Phase()}
        self._own: dict[str, Parameter] = {}
        self._model: Any = lambda: None  # weak: a method must not keep a run's optimizer alive
        self._optimizer: Any = lambda: None

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError where full training cannot be: weights held as codes, or that another adapter rests on."""
        super().check(name, linear)
        if isinstance(linear, QuantizedLinear):
            raise ValueError(f"target_modules: {name!r} holds its weight as codes, which cannot train in full")
        if isinstance(linear, LoraLinear) and linear.adapters:
            raise ValueError(
                f"target_modules: {name!r} has the adapters {linear.adapters}, which were made for the weight as it "
                "is; full training would change it. Give the model this adapter first"
            )

    # what trains

    def weights(self, model: Module) -> dict[str, Parameter]:
        """What the full phase trains, by name: everything but factors, originals of saved modules and, where the
        config says so, the output head."""
        heads = {f"{n}.{m.output_head}".lstrip(".") for n, m in model.named_modules() if m.output_head}
        skipped = {id(p) for name in heads if not self.config.train_head for p in _at(model, name).parameters()}
        skipped |= {id(p) for layer in _lora_layers(model) for p in _factors(layer)}
        return {
            n: p for n, p in model.named_parameters() if id(p) not in skipped and ".original_module." not in f".{n}"
        }

    def owned(self, model: Module, own: dict[str, Parameter]) -> dict[str, Parameter]:
        """The factors and, since they have changed, the weights."""
        known = set(map(id, own.values()))
        weights = {f"base_model.model.{n}": p for n, p in self.weights(model).items() if id(p) not in known}
        return own | weights

    def trained(self, model: Module, own: dict[str, Parameter]) -> Iterable[Parameter]:
        """Before the run both, so that an optimizer made then has all that it will need."""
        self._own = own
        if self.phase == "lora":
            return own.values()
        return [*self.weights(model).values(), *(own.values() if self.phase == "before" else ())]

    def changed(self, model: Module) -> dict[str, Parameter]:
        """Weights and factors, whatever the phase: a checkpoint of either is taken up by a model in either."""
        if not self.config.fraction:
            return super().changed(model)
        both = {id(p) for p in [*self.weights(model).values(), *self._own.values()]}
        return {name: p for name, p in model.named_parameters() if id(p) in both}

    # the run

    def start(self, model: Module, optimizer: Any) -> None:
        """Enter the full phase, unless the model has left it in an earlier run.

        Raises:
            ValueError: the number of steps is not known, or is more than total_step; or a parameter that will train is
                not in the optimizer.
        """
        total = self.config.total_step or self.run_steps
        if total is None:
            raise ValueError("total_step: not given, and `fit` did not say how many steps there are")
        if self.run_steps is not None and self.run_steps > total:
            raise ValueError(f"steps: got {self.run_steps}, more than total_step = {total}")
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        needed = list(self._own.values()) + ([] if self.phase == "lora" else list(self.weights(model).values()))
        lost = sum(id(p) not in known for p in needed)
        if lost:
            raise ValueError(
                f"optimizer: {lost} of the {len(needed)} parameters that train in one of the phases are not in it; "
                "make it after get_peft_model, from model.parameters()"
            )
        self.full_steps = full_steps(self.config.fraction, total)
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        if self.phase == "before":
            self._enter("full" if self.full_steps else "lora", model)

    def after_step(self, model: Module, step: int) -> None:
        """Note the bytes; after step T₁ − 1 change over."""
        optimizer = self._optimizer()
        if optimizer is None or self.full_steps is None:
            raise ValueError("after_step: needs start(model, optimizer) first; `fit` calls it")
        self._note(model, optimizer)
        if self.phase == "full" and step + 1 >= self.full_steps:
            self._enter("lora", model)
            own = set(map(id, self._own.values()))
            optimizer.forget([p for group in optimizer.param_groups for p in group["params"] if id(p) not in own])

    def _enter(self, phase: str, model: Module) -> None:
        """Set what trains; what no longer does loses its gradient."""
        self.phase = phase
        for layer in _lora_layers(model):
            layer.disabled = phase == "full"
        for p in [*self.weights(model).values(), *self._own.values()]:
            p.requires_grad = False
        for p in self._own.values() if phase == "lora" else self.weights(model).values():
            p.requires_grad = True
        for p in model.parameters():
            if not p.requires_grad:
                p.grad = None

    def _note(self, model: Module, optimizer: Any) -> None:
        parameters, before = [p for p in model.parameters() if p.requires_grad], self.record[self.phase]
        self.record[self.phase] = Phase(
            before.steps + 1,
            max(before.weights, sum(p.data.nbytes for p in parameters)),
            max(before.gradients, sum(p.grad.nbytes for p in parameters if p.grad is not None)),
            max(before.optimizer, optimizer.nbytes),
        )

    def report(self) -> str:
        """The phases that there were, with their steps and bytes."""
        names = {"full": "full training", "lora": "LoRA"}
        return "; ".join(
            f"{phase.steps} steps of {names[name]}: {phase.weights / 1000:,.0f} kB of weights trained, "
            f"{phase.gradients / 1000:,.0f} kB of gradients, {phase.optimizer / 1000:,.0f} kB of optimizer state"
            for name, phase in self.record.items()
            if phase.steps
        )

    # saving

    def saved(self, model: Module, config: Any, values: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        """The weights without what is merged into them. Where the full phase is over the file says fraction = 0:
        training that goes on from it is LoRA's."""
        config, values = super().saved(model, config, dict(values))
        for name, layer in model.adapter_layers():
            for merged in layer.merged:
                key = f"base_model.model.{name}.base_layer.weight"
                values[key] = (values[key] - layer.delta(merged)).astype(values[key].dtype)
        return (replace(config, fraction=0.0) if self.phase == "lora" else config), values

    def state_dict(self) -> dict[str, Array]:
        """The phase, T₁ and the record."""
        rows = [[row.steps, row.weights, row.gradients, row.optimizer] for row in self.record.values()]
        return {
            "lora": np.array([self.phase == "lora"], np.uint8),
            "full_steps": np.array([self.full_steps or 0]),
            "record": np.array(rows),
        }

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what `state_dict` gave: the model enters the phase that the checkpoint was made in.

        Raises:
            ValueError: state that it did not give, or of a run whose full phase has another length.
        """
        if state.keys() != {"lora", "full_steps", "record"} or state["record"].shape != (2, 4):
            raise ValueError(f"method state: FullThenLora did not write it; got {sorted(state)[:4]}")
        there = int(state["full_steps"][0])
        if self.full_steps != there:
            raise ValueError(
                f"method state: that run trains in full for {there} steps, this one for {self.full_steps}; the same "
                "number of steps, or total_step, is accepted"
            )
        model = self._model()
        if model is None:
            raise ValueError("method state: needs start(model, optimizer) first; `fit` calls it")
        self.record = dict(zip(self.record, (Phase(*row) for row in state["record"].tolist()), strict=True))
        self._enter("lora" if state["lora"][0] else "full", model)


def _lora_layers(model: Module) -> Iterator[LoraLinear]:
    return (m for m in model.modules() if isinstance(m, LoraLinear))


def _factors(layer: LoraLinear) -> list[Parameter]:
    return [linear.weight for by_name in (layer.lora_A, layer.lora_B) for linear in by_name.values()]


def _at(model: Module, name: str) -> Module:
    """The module of this name, inside a PeftModel's layers too."""
    return dict(model.named_modules())[name]
