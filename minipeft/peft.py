"""get_peft_model and PeftModel: attach a method to a model's layers, switch adapters, merge, save and load."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .adapter_files import check_fit, portable, read_adapter, without_offset, write_adapter
from .backend import Array, generator
from .methods.base import STEP_HOOKS, AdapterLayer, Method, Replacement, with_own_weight
from .methods.lora import LoraLinear
from .nn import Module, Parameter, assign
from .quant.linear import QuantizedLinear
from .targets import Plan, SavedModule, check_adapter_name, unchanged_on_error


def get_peft_model(
    model: Module,
    config: Any,
    batches: Iterable[Any] | None = None,
    loss_fn: Any = None,
    adapter_name: str = "default",
    seed: int | np.random.Generator = 0,
) -> PeftModel:
    """Freeze `model`, wrap its target layers and return it as a PeftModel. The model is changed, not copied.

    Everything is checked before anything is changed.

    Args:
        config: what to adapt (`LoraConfig` …).
        batches, loss_fn: for methods that look at gradients before they start.
        seed: for the adapters' start values and dropout.

    Raises:
        ValueError: a target that does not exist or is no Linear, or a rank that a layer does not allow.
        TypeError: `model` is no Module, or has adapters already: use its `add_adapter`; `config` builds no Method.
    """
    _check_bare(model)
    return _adapted(model, config, batches, loss_fn, adapter_name, seed)


def _check_bare(model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    if any(isinstance(module, PeftModel | AdapterLayer | SavedModule) for module in model.modules()):
        raise TypeError("model: it has adapters already; use its PeftModel's add_adapter(name, config), or unload()")


def _adapted(model: Module, config: Any, batches: Any, loss_fn: Any, adapter_name: str, seed: Any) -> PeftModel:
    peft_model = PeftModel.__new__(PeftModel)
    peft_model.base_model, peft_model.peft_config, peft_model.methods = _Base(model), {}, {}
    peft_model.active_adapters = []
    peft_model.training = peft_model.base_model.training = model.training
    peft_model._attach(Plan(model, config, adapter_name), batches, loss_fn, seed)
    model.zero_grad()  # what is frozen now holds no gradient of an earlier training
    return peft_model


class _Base(Module):
    """Holds the model, so that names begin with PEFT's `base_model.model.`"""

    def __init__(self, model: Module) -> None:
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)


# --- the model --------------------------------------------------------------------------------------------------------


class PeftModel(Module):
    """A model with adapters, from `get_peft_model` or `PeftModel.from_pretrained`; unknown attributes are the model's.

    Attributes:
        base_model: holds the model, `base_model.model`.
        peft_config: each adapter's config, by name.
        active_adapters: the names of those that take part.
    """

    base_model: _Base
    peft_config: dict[str, Any]
    methods: dict[str, Method]
    active_adapters: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the active adapters."""
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base_model" not in vars(self):
            raise AttributeError(f"PeftModel has no attribute {name!r}")
        return getattr(self.base_model.model, name)

    def get_base_model(self) -> Module:
        """The model inside, with its adapters."""
        return self.base_model.model

    @property
    def method(self) -> Method:
        """The active adapter's method; `fit` calls its hooks. Of several active ones, the first's.

        Raises:
            ValueError: another of them acts between steps as well: AdaLoRA's ranks would never move.
        """
        first, *others = self.active_adapters
        for name in others:
            kind, trains = type(self.methods[name]), any(p.requires_grad for p in self.adapter_state(name).values())
            if trains and any(getattr(kind, hook) is not getattr(Method, hook) for hook in STEP_HOOKS):
                raise ValueError(
                    f"set_adapter: of {self.active_adapters} {name!r} ({kind.__name__}) acts between steps, which only "
                    f"the first can; set_adapter({name!r}), or a list that begins with it, is accepted"
                )
        return self.methods[first]

    def adapter_layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """The wrapped layers with their names in the base model."""
        return ((n, m) for n, m in self.base_model.model.named_modules() if isinstance(m, AdapterLayer))

    def _saved_modules(self) -> Iterator[tuple[str, SavedModule]]:
        return ((n, m) for n, m in self.base_model.model.named_modules() if isinstance(m, SavedModule))

    # adding and choosing adapters

    def add_adapter(
        self,
        adapter_name: str,
        config: Any,
        batches: Iterable[Any] | None = None,
        loss_fn: Any = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        """Attach one more adapter; it is active only after `set_adapter`.

        Args:
            seed: left out, the number of adapters there are, so that each has start values of its own.

        Raises:
            ValueError: the name is taken, adapters are merged, or as `get_peft_model`.
        """
        self._check_addable(adapter_name)
        if sum(getattr(c, "bias", "none") != "none" for c in (config, *self.peft_config.values())) > 1:
            raise ValueError("bias: another adapter trains biases already; 'none' is accepted")
        active, seed = list(self.active_adapters), len(self.peft_config) if seed is None else seed
        self._attach(Plan(self.base_model.model, config, adapter_name), batches, loss_fn, seed)
        self.set_adapter(active)

    def _check_addable(self, adapter_name: str) -> None:
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} exists; there are {sorted(self.peft_config)}")
        if self.merged_adapters:
            raise ValueError("add_adapter: adapters are merged; call unmerge_adapter() first")

    def _attach(self, plan: Plan, batches: Any, loss_fn: Any, seed: Any) -> None:
        model, method = self.base_model.model, plan.method
        method.adapter, method.names, method.rng = plan.adapter, plan.targets, generator(seed)
        with unchanged_on_error(self):
            method.prepare(model, batches, loss_fn)
            for name in plan.targets:
                module = model.get_submodule(name)
                model.set_submodule(name, _wrapped(method, name, module).train(module.training))
            for name in plan.saved:
                module = model.get_submodule(name)
                if not isinstance(module, SavedModule):
                    module = SavedModule(module)
                    model.set_submodule(name, module)
                module.modules_to_save[plan.adapter] = copy.deepcopy(module.original_module)
            self.peft_config[plan.adapter], self.methods[plan.adapter] = plan.config, method
            self.set_adapter(plan.adapter)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make this adapter (or these) the active one: only its parameters train, only it takes part in forward.

        Merged adapters are unmerged first, as in PEFT.

        Raises:
            ValueError: no adapter has this name.
        """
        names = self._existing("set_adapter", adapter_name)
        if self.merged_adapters:
            self.unmerge_adapter()
        self._activate(names)

    def _activate(self, names: list[str]) -> None:
        self.active_adapters = names
        for _, layer in [*self.adapter_layers(), *self._saved_modules()]:
            layer.active = names
        self.base_model.requires_grad_(False)
        for name in names:
            if not getattr(self.peft_config[name], "inference_mode", False):
                for parameter in self.methods[name].trained(self.base_model.model, self._own_state(name)):
                    parameter.requires_grad = True

    def _existing(self, caller: str, given: str | Iterable[str]) -> list[str]:
        """The names as a list, each once, after checking that they are adapters here."""
        names = list(given) if isinstance(given, list | tuple | set) else [given]
        if not names or any(not isinstance(name, str) or name not in self.peft_config for name in names):
            raise ValueError(f"{caller}: got {names}; there are {sorted(self.peft_config)}")
        return list(dict.fromkeys(names))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; what its start took from the weights is given back. The first of the rest becomes active
        where it was the only active one.

        Raises:
            ValueError: no adapter has this name, it is merged, or it is the only one (`unload` gives the base model).
        """
        self._existing("delete_adapter", [adapter_name])
        if adapter_name in self.merged_adapters:
            raise ValueError(f"delete_adapter: {adapter_name!r} is merged; call unmerge_adapter() first")
        rest = [name for name in self.peft_config if name != adapter_name]
        if not rest:
            raise ValueError(f"delete_adapter: {adapter_name!r} is the only adapter; unload() gives the base model")
        for _, layer in self.adapter_layers():
            if adapter_name in layer.adapters:
                layer.remove(adapter_name)
        for _, layer in self._saved_modules():
            layer.modules_to_save.pop(adapter_name, None)
        del self.peft_config[adapter_name], self.methods[adapter_name]
        self._activate([name for name in self.active_adapters if name != adapter_name] or rest[:1])

    def adapter_state(self, adapter_name: str = "default") -> dict[str, Parameter]:
        """The parameters that belong to an adapter (its factors, its saved modules, the biases it trains), under the
        names that PEFT's file has: `base_model.model.fc1.lora_A.weight`, without the adapter's own name.

        Raises:
            ValueError: no adapter has this name.
        """
        self._existing("adapter_state", adapter_name)
        return self.methods[adapter_name].owned(self.base_model.model, self._own_state(adapter_name))

    def _own_state(self, adapter_name: str) -> dict[str, Parameter]:
        """What its config alone gives an adapter, before its method says what else belongs to it."""
        bias = getattr(self.peft_config[adapter_name], "bias", "none")
        state: dict[str, Parameter] = {}
        if bias == "all":
            state = {n: p for n, p in self.named_parameters() if n.endswith("bias") and ".modules_to_save." not in n}
            state = {n: p for n, p in state.items() if ".original_module." not in n}
        for name, layer in [*self.adapter_layers(), *self._saved_modules()]:
            for inner, parameter in layer.named_parameters():
                kind, _, rest = inner.partition(".")
                key = f"base_model.model.{name}."
                if kind == "modules_to_save" and rest.startswith(adapter_name + "."):
                    state[key + rest.removeprefix(adapter_name + ".")] = parameter
                elif kind == "base_layer" and bias == "lora_only" and rest == "bias":
                    state[key + inner] = parameter
                elif kind not in ("base_layer", "original_module") and (rest + ".").startswith(adapter_name + "."):
                    state[key + layer.saved_name(kind + rest.removeprefix(adapter_name))] = parameter
        return state

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base model; merged adapters are taken out for the time."""
        merged = self.merged_adapters
        if merged:
            self.unmerge_adapter()
        layers = [layer for _, layer in [*self.adapter_layers(), *self._saved_modules()]]
        before = [layer.disabled for layer in layers]
        for layer in layers:
            layer.disabled = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer.disabled = disabled
            if merged:
                self.merge_adapter(merged)

    # merging

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are inside the weights now."""
        return list(dict.fromkeys(name for _, layer in self.adapter_layers() for name in layer.merged))

    def merge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the weights (the active ones when left out): forward costs what the base costs.

        A weight that two modules share (a tied head) is one for each from now on. Saved modules stay those of the
        active adapter, as in PEFT.

        Raises:
            ValueError: adapters are merged already, a name does not exist, weights are held as codes, or no weight can
                do what an adapter does.
        """
        names = self._existing("merge_adapter", self.active_adapters if adapter_names is None else adapter_names)
        if self.merged_adapters:
            raise ValueError(f"merge_adapter: {self.merged_adapters} are merged already; call unmerge_adapter() first")
        coded = [name for name, layer in self.adapter_layers() if isinstance(layer.base_layer, QuantizedLinear)]
        if coded:
            raise ValueError(
                f"merge_adapter: {len(coded)} layers hold their weights as codes ({coded[0]!r} …), and rounding the "
                "sum to codes loses a part of the update; finish_qlora(model, how, inputs=…) has how='keep' (apart), "
                "'merge' (in full precision) and 'requantize' (codes again), and measures what each costs"
            )
        layers = {name: layer for name, layer in self.adapter_layers() if set(names) & set(layer.adapters)}
        for name, layer in layers.items():
            if layer.unmergeable:
                raise ValueError(f"merge_adapter: {name!r} cannot be merged: {layer.unmergeable}")
        children = [child for module in self.modules() for _, child in module.named_children()]
        users = Counter(id(child) for child in children)
        for layer in layers.values():
            if max(users[id(layer.weight)], users[id(layer.base_layer)]) > 1:
                layer.base_layer = with_own_weight(layer.base_layer, layer.weight.data)
            layer.merge(names)

    def unmerge_adapter(self) -> None:
        """Take out what `merge_adapter` added. LoRA's ΔW is subtracted: those weights come back up to rounding.

        Raises:
            ValueError: nothing is merged.
        """
        if not self.merged_adapters:
            raise ValueError("unmerge_adapter: nothing is merged")
        for _, layer in self.adapter_layers():
            layer.unmerge()

    def merge_and_unload(self, adapter_names: list[str] | None = None) -> Module:
        """The base model with the adapters' ΔW inside its weights (the active ones when left out), all wrapping gone.
        The PeftModel is used up.

        Raises:
            ValueError: a name does not exist, other adapters are merged already, or it has been unloaded before.
        """
        merged = self.merged_adapters
        if not merged or (adapter_names and set(self._existing("merge_adapter", adapter_names)) != set(merged)):
            self.merge_adapter(adapter_names)
        if not self.merged_adapters:
            raise ValueError("merge_and_unload: no adapters are left; this PeftModel has been unloaded already")
        self._activate(self.merged_adapters)  # their modules_to_save go into the model
        return self._unload()

    def unload(self, changed_base: bool = False) -> Module:
        """The base model without the adapters and without wrapping. The PeftModel is used up.

        Args:
            changed_base: leave out of W what adapters took from it at their start, s·B₀A₀, as PEFT does. Such a base
                belongs to an adapter that `save_pretrained(…, changed_base=True)` wrote.
        """
        if self.merged_adapters:
            self.unmerge_adapter()
        for _, layer in self.adapter_layers():
            if changed_base and isinstance(layer, LoraLinear):
                layer.offset.clear()
        for _, layer in self._saved_modules():
            layer.disabled = True
        return self._unload()

    def _unload(self) -> Module:
        model = self.base_model.model
        for name, layer in list(self.adapter_layers()):
            merged = list(layer.merged)
            for adapter in layer.adapters:
                if adapter not in merged:
                    layer.remove(adapter)
            model.set_submodule(name, layer.base_layer)
        for name, layer in list(self._saved_modules()):
            model.set_submodule(name, layer.chosen())
        model.requires_grad_(False)
        return model

    # counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(elements that train, all elements). A weight held as codes counts with the elements it stands for."""
        sizes = [(p.size, p.requires_grad) for p in self.parameters()]
        sizes += [(m.weight.size, False) for m in self.modules() if isinstance(m, QuantizedLinear)]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # saving and loading

    def save_pretrained(
        self, path: str | os.PathLike, adapter_name: str | None = None, changed_base: bool = False
    ) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` into a directory, in PEFT's format.

        Args:
            path: the directory; it is made if it is not there.
            adapter_name: which adapter; left out, the active one.
            changed_base: whether it will be loaded into the base that `unload(changed_base=True)` gives.

        An adapter that took s·B₀A₀ from W at its start (`"both"`, `"pissa"`, `"olora"`, `"lora_ga"`) is saved as one of
        rank 2r, s·(BA − B₀A₀) = s·[B, −B₀][A; A₀], which needs no changed base; or as it is, with `changed_base`.

        Raises:
            ValueError: no adapter has this name, or this PeftModel has been unloaded; `path` is a file.
            TypeError: a config that has no `to_dict`, and so no form in a file.
        """
        adapter_name = adapter_name or self.active_adapters[0]
        self._existing("save_pretrained", adapter_name)
        targets = [name for name, layer in self.adapter_layers() if adapter_name in layer.adapters]
        if not targets:
            raise ValueError("save_pretrained: no adapters are left; this PeftModel has been unloaded already")
        if not hasattr(self.peft_config[adapter_name], "to_dict"):
            kind = type(self.peft_config[adapter_name]).__name__
            raise TypeError(f"save_pretrained: {kind} has no to_dict(), the content of adapter_config.json")
        if Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path: {path} is a file; a directory is accepted")
        config, state = self.peft_config[adapter_name], self.adapter_state(adapter_name)
        values: dict[str, Array] = {name: parameter.data for name, parameter in state.items()}
        offsets = {
            name: layer.offset[adapter_name]
            for name, layer in self.adapter_layers()
            if isinstance(layer, LoraLinear) and adapter_name in layer.offset
        }
        if offsets and not changed_base:
            values, config = without_offset(values, config, offsets)
        elif offsets:
            config = replace(config, init_lora_weights=True)
        config, values = self.methods[adapter_name].saved(self, config, values)
        write_adapter(path, portable(config, targets), values)

    @classmethod
    def from_pretrained(
        cls, model: Module, path: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
    ) -> PeftModel:
        """`model` with the adapter in a directory that `save_pretrained` or PEFT wrote.

        Everything is read and checked before the model is changed.

        Raises:
            FileNotFoundError: no adapter_config.json or adapter_model.safetensors there.
            ValueError: not an adapter, or one that does not fit this model: which tensors are missing, too many or of
                another shape.
            TypeError: `model` is no Module, or has adapters already: use its `load_adapter`.

        Unless `is_trainable`, everything is frozen and in inference mode.
        """
        _check_bare(model)
        config, values = _read(model, path, adapter_name, is_trainable)
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        peft_model._load(adapter_name, values)
        return peft_model if is_trainable else peft_model.eval()

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Attach one more adapter, from a directory; it is active only after `set_adapter`."""
        self._check_addable(adapter_name)
        config, values = _read(self.base_model.model, path, adapter_name, is_trainable)
        self.add_adapter(adapter_name, config)
        self._load(adapter_name, values)

    def _load(self, adapter_name: str, values: dict[str, Array]) -> None:
        for name, parameter in self._loadable(adapter_name, values).items():
            assign(parameter, values[name])

    def _loadable(self, adapter_name: str, names: Iterable[str]) -> dict[str, Parameter]:
        """The adapter's parameters, and the weights of its layers that are among the names: where the output head is
        adapted, PEFT writes its whole weight beside the adapter."""
        layers = {f"base_model.model.{name}.base_layer.weight": layer for name, layer in self.adapter_layers()}
        whole = {key: layers[key].weight for key in names if key in layers and adapter_name in layers[key].adapters}
        return {key: p for key, p in whole.items() if isinstance(p, Parameter)} | self.adapter_state(adapter_name)


def _wrapped(method: Method, name: str, module: Module) -> AdapterLayer:
    """The layer that takes the module's place: what the method's `wrap` gives, or a Replacement that holds it."""
    made = method.wrap(name, module.base_layer if isinstance(module, Replacement) else module)
    if isinstance(made, AdapterLayer):
        return made
    if not isinstance(made, Module):
        raise TypeError(f"wrap: expected {type(method).__name__} to give a Module, got {type(made).__name__}")
    if isinstance(module, AdapterLayer) and not isinstance(module, Replacement):
        raise ValueError(
            f"target_modules: {name!r} is a {type(module).__name__} already, and {type(made).__name__}, which "
            f"{type(method).__name__} makes, is no AdapterLayer: it cannot be beside other adapters"
        )
    layer = module if isinstance(module, Replacement) else Replacement(module)
    layer.replacement[method.adapter] = made
    return layer


def _read(
    model: Module, path: str | os.PathLike, adapter_name: str, is_trainable: bool
) -> tuple[Any, dict[str, Array]]:
    """The config and the tensors of a saved adapter, checked against the model, which is not touched."""
    config, values = read_adapter(path)
    if is_trainable and not getattr(config, "file_trains", True):
        raise ValueError(f"is_trainable: {path} holds {config.peft_type}'s result, not what made it; False is accepted")
    config = replace(config, inference_mode=not is_trainable)
    trial_config = config
    if getattr(config, "init_lora_weights", None) == "loftq":  # the shapes need no codes; codes that are there stay
        trial_config = replace(config, init_lora_weights=True)
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            config = trial_config
    shared = {id(a): a for p in model.parameters() for a in (p.data, p.grad)}  # the trial model copies no weight
    trial = _adapted(copy.deepcopy(model, shared), trial_config, None, None, adapter_name, 0)
    check_fit(path, values, {name: p.shape for name, p in trial._loadable(adapter_name, values).items()})
    return config, values
