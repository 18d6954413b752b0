"""What every method is: its hooks, and a layer that stands in for a Linear.

A new method is one file: its formulas as array functions, a layer (`AdapterLayer`) that uses them, a `Method` that
wraps a Linear in that layer, and a config whose `build` returns the method. `get_peft_model` and `fit` do the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..backend import Array
from ..nn import Linear, Module, Parameter
from ..tensor import Tensor

STEP_HOOKS = ("changed", "start", "penalty", "before_step", "after_step")  # those that `fit` calls


class Method:
    """A way of fine-tuning. Only `wrap` must be written; the other hooks do nothing unless a method needs them.

    Attributes:
        config: the config that built it.
        adapter: the name of the adapter that `wrap` adds.
        names: of the modules that it will wrap; known from `prepare` on.
        rng: the generator for start values and dropout.
        run_steps: how many steps the run has that `fit` has begun last; None before.
        layer: the kind of layer that `wrap` makes; a module that is another kind's already is refused.
        wraps: the kind of module that it is made around.
    """

    layer: type[Module] = Module
    wraps: type[Module] = Linear

    def __init__(self, config: Any) -> None:
        self.config = config
        self.adapter = "default"
        self.names: list[str] = []
        self.rng = np.random.default_rng(0)
        self.run_steps: int | None = None

    def targets(self, model: Module) -> str | list[str]:
        """Which modules to wrap, in the words of `target_modules`; ValueError where the model has none."""
        return self.config.target_modules

    def check(self, name: str, linear: Module) -> None:
        """Raise ValueError if this Linear cannot be wrapped. Called for every target before anything is changed."""

    def prepare(self, model: Module, batches: Iterable[Any] | None, loss_fn: Any) -> None:
        """Called once before attaching; LoRA-GA estimates gradients here."""

    def wrap(self, name: str, linear: Module) -> Module:
        """The module that replaces `linear`, which is an nn.Linear or already this method's layer.

        An `AdapterLayer` has all that adapters can do. Any other module serves too (its own parameters train, it can be
        switched, disabled, saved and unloaded), but cannot be merged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no wrap()")

    def owned(self, model: Module, own: dict[str, Parameter]) -> dict[str, Parameter]:
        """The parameters that are saved with the adapter, by the names in its file: `own` are those it added."""
        return own

    def trained(self, model: Module, own: dict[str, Parameter]) -> Iterable[Parameter]:
        """The parameters that train while the adapter is active: `own` are those it added."""
        return own.values()

    def changed(self, model: Module) -> dict[str, Parameter]:
        """The parameters that a run changes, from its first step to its last, by name: what its checkpoints keep."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def start(self, model: Module, optimizer: Any) -> None:
        """Called by `fit` before its first step; the place to refuse an optimizer that does not suit the method."""

    def penalty(self, model: Module) -> Tensor | None:
        """A term that `fit` adds to the loss (AdaLoRA's orthogonality)."""
        return None

    def before_step(self, model: Module, step: int) -> None:
        """Called by `fit` after backward and before the optimizer's step; `step` counts from 0."""

    def after_step(self, model: Module, step: int) -> None:
        """Called by `fit` after the optimizer's step (AdaLoRA re-allocates rank)."""

    def saved(self, model: Module, config: Any, values: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        """The config and tensors that `save_pretrained` writes, from those that the adapter has."""
        return config, values

    def report(self) -> str:
        """What its run was like, in a sentence for people; empty where there is nothing to say."""
        return ""

    def state_dict(self) -> dict[str, Array]:
        """What the method carries from step to step, by name; `fit` keeps it in its checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: state that it did not give.
        """
        if state:
            raise ValueError(f"method state: {type(self).__name__} has none; got {sorted(state)[:4]}")


class AdapterLayer(Module):
    """A Linear with adapters beside it, any number of them, each with a name.

    A subclass keeps its parameters in dictionaries by adapter name (`self.lora_A["default"]`), so that they are saved
    under PEFT's names, and says in `delta` what an adapter adds to the weight.

    Attributes:
        base_layer: the frozen Linear.
        active: names of the adapters that take part in forward.
        merged: names of those whose `delta` is inside the weight now.
        unmerged: W as it was, while adapters are merged.
        disabled: forward is the base layer's.
        unmergeable: why no weight can take over what the adapter does; empty where one can.
    """

    unmergeable = ""

    def __init__(self, base_layer: Linear) -> None:
        self.base_layer = base_layer
        self.active: list[str] = []
        self.merged: list[str] = []
        self.unmerged: Array | None = None
        self.disabled = False

    @property
    def weight(self) -> Parameter:
        """The base layer's W, (out, in)."""
        return self.base_layer.weight

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        raise NotImplementedError

    def saved_name(self, name: str) -> str:
        """What PEFT's files call the parameter `lora_A.weight`: the same, but for PEFT's exceptions."""
        return name

    def remove(self, adapter: str) -> None:
        """Forget an adapter: what the layer's dictionaries have under its name."""
        for value in vars(self).values():
            if isinstance(value, dict):
                value.pop(adapter, None)

    def delta(self, adapter: str) -> Array:
        """What the adapter adds to W, (out, in)."""
        raise NotImplementedError

    def merge(self, adapters: list[str]) -> None:
        """W ← W + delta for each that the layer has, rounded to W's dtype; W gets a new array, the old one is kept.

        Raises:
            ValueError: no weight can take over what the adapter does.
        """
        own = [adapter for adapter in adapters if adapter in self.adapters]
        if own and self.unmergeable:
            raise ValueError(f"merge: {self.unmergeable}")
        for adapter in own:
            W = self.weight.data
            self.unmerged = W if self.unmerged is None else self.unmerged
            self.weight.data = (W + self.delta(adapter)).astype(W.dtype, copy=False)
            self.merged.append(adapter)

    def unmerge(self) -> None:
        """W as it was, bit for bit: subtracting would leave rounding, and a delta may depend on W."""
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None
        self.merged.clear()


def with_own_weight(linear: Linear, W: Array) -> Linear:
    """The same layer with W in a parameter of its own: another may share the one it has, as a tied head does."""
    own = copy.copy(linear)
    own.weight = Parameter(W, linear.weight.requires_grad)
    return own


class Replacement(AdapterLayer):
    """The adapter layer around modules that are none: one for each adapter, in the place of the base layer.

    Attributes:
        replacement: by adapter name. What it shares with the base layer stays frozen, the rest is the adapter's.
    """

    unmergeable = "its module says nothing of what it adds to the weight; an AdapterLayer with delta() can be merged"

    def __init__(self, base_layer: Module) -> None:
        super().__init__(base_layer)
        self.replacement: dict[str, Module] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that this layer has."""
        return list(self.replacement)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the first active adapter's module computes, or the base layer."""
        names = [] if self.disabled else [name for name in self.active if name in self.replacement]
        return (self.replacement[names[0]] if names else self.base_layer)(*args, **kwargs)
