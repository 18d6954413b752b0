"""get_peft_model and PeftModel: choose targets, attach a method, switch, merge, save and load, in PEFT's format."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .backend import Array, generator
from .methods.base import AdapterLayer, Method
from .methods.lora import LoraConfig, LoraLinear
from .nn import Linear, Module, Parameter, assign, closest

CONFIGS: dict[str, type] = {"LORA": LoraConfig}  # by the peft_type in adapter_config.json
ALL_LINEAR = ("all-linear", "all")  # the second is the document's "ALL"


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
        TypeError: `model` has adapters already: use its `add_adapter`.
    """
    if isinstance(model, PeftModel):
        raise TypeError("model: it is a PeftModel already; use model.add_adapter(name, config)")
    peft_model = PeftModel.__new__(PeftModel)
    peft_model.base_model, peft_model.peft_config, peft_model.methods = _Base(model), {}, {}
    peft_model.active_adapters, peft_model._disabled = [], False
    was_trainable = [(p, p.requires_grad) for p in model.parameters()]
    plan = _Plan(model, config, adapter_name)
    model.requires_grad_(False)
    try:
        peft_model._attach(plan, batches, loss_fn, seed)
    except BaseException:
        for p, requires_grad in was_trainable:
            p.requires_grad = requires_grad
        raise
    return peft_model


# --- which modules ----------------------------------------------------------------------------------------------------


class _Plan:
    """The modules a config adapts and saves, checked; making it changes nothing."""

    def __init__(self, model: Module, config: Any, adapter: str) -> None:
        if not adapter or "." in adapter:
            raise ValueError(f"adapter_name: got {adapter!r}; a name without dots is accepted")
        self.config, self.adapter = config, adapter
        self.method: Method = config.build()
        self.saved = _find_saved(model, config.modules_to_save or [])
        self.targets = [
            name
            for name in find_targets(model, config.target_modules)
            if not any(name == saved or name.startswith(saved + ".") for saved in self.saved)
        ]
        if not self.targets:
            raise ValueError(f"target_modules: {config.target_modules!r} leaves no Linear to adapt")
        for name in self.targets:
            self.method.check(name, model.get_submodule(name))


def find_targets(model: Module, target_modules: str | Iterable[str]) -> list[str]:
    """The names of the Linears that `target_modules` means, in the model's order.

    Raises:
        ValueError: a name that no module has (the closest are listed), or that belongs to something else than a Linear.
    """
    modules = dict(_outer_modules(model))
    linears = [name for name, module in modules.items() if isinstance(module, Linear | AdapterLayer)]
    if isinstance(target_modules, str):
        if target_modules.lower() in ALL_LINEAR:
            heads = _output_heads(model)
            return [name for name in linears if name not in heads]
        try:
            matches = lambda name: re.fullmatch(target_modules, name) is not None  # noqa: E731
            found = [name for name in modules if matches(name)]
        except re.error as error:
            raise ValueError(f"target_modules: {target_modules!r} is no regular expression ({error})") from error
        wanted = {target_modules: found}
    else:
        wanted = {target: [n for n in modules if n == target or n.endswith("." + target)] for target in target_modules}
    for target, found in wanted.items():
        if not found:
            endings = {name.rpartition(".")[2] for name in linears}
            raise ValueError(f"target_modules: no module is called {target!r}; {closest(target, [*endings, *linears])}")
        for name in found:
            if name not in linears:
                kind = type(modules[name]).__name__
                raise ValueError(f"target_modules: {name!r} is a {kind}; only Linear layers are adapted")
    chosen = {name for found in wanted.values() for name in found}
    return [name for name in linears if name in chosen]


def _outer_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """All modules but those inside adapter layers and saved copies."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, AdapterLayer | SavedModule):
            inside.append(name + ".")
        yield name, module


def _output_heads(model: Module) -> set[str]:
    """The full names of the output heads that the model and its parts declare."""
    return {f"{name}.{m.output_head}".lstrip(".") for name, m in model.named_modules() if m.output_head}


def _find_saved(model: Module, names: Iterable[str]) -> list[str]:
    modules = [name for name, _ in _outer_modules(model) if name]
    found: list[str] = []
    for wanted in names:
        matching = [name for name in modules if name == wanted or name.endswith("." + wanted)]
        if not matching:
            raise ValueError(f"modules_to_save: no module is called {wanted!r}; {closest(wanted, modules)}")
        found += matching
    return found


class SavedModule(Module):
    """A module of `modules_to_save`: the original, and a trained copy for each adapter."""

    def __init__(self, original: Module) -> None:
        self.original_module = original
        self.modules_to_save: dict[str, Module] = {}
        self.active: list[str] = []
        self.disabled = False

    def chosen(self) -> Module:
        """The copy of the first active adapter that has one, else the original."""
        names = [] if self.disabled else [n for n in self.active if n in self.modules_to_save]
        return self.modules_to_save[names[0]] if names else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the chosen one computes."""
        return self.chosen()(*args, **kwargs)


class _Base(Module):
    """Holds the model, so that names begin with PEFT's `base_model.model.`"""

    def __init__(self, model: Module) -> None:
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)


# --- the model --------------------------------------------------------------------------------------------------------


class PeftModel(Module):
    """A model with adapters. Made by `get_peft_model` or `PeftModel.from_pretrained`; unknown attributes are the model's.

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
        """The active adapter's method; `fit` calls its hooks."""
        return self.methods[self.active_adapters[0]]

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
        seed: int | np.random.Generator = 0,
    ) -> None:
        """Attach one more adapter; it is active only after `set_adapter`.

        Raises:
            ValueError: the name is taken, adapters are merged, or as `get_peft_model`.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} exists; there are {sorted(self.peft_config)}")
        if self.merged_adapters:
            raise ValueError("add_adapter: adapters are merged; call unmerge_adapter() first")
        active = list(self.active_adapters)
        self._attach(_Plan(self.base_model.model, config, adapter_name), batches, loss_fn, seed)
        self.set_adapter(active)

    def _attach(self, plan: _Plan, batches: Any, loss_fn: Any, seed: Any) -> None:
        model, method = self.base_model.model, plan.method
        method.adapter, method.rng = plan.adapter, generator(seed)
        method.prepare(model, batches, loss_fn)
        for name in plan.targets:
            model.set_submodule(name, method.wrap(name, model.get_submodule(name)))
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

        Raises:
            ValueError: no adapter has this name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"set_adapter: no adapter {name!r}; there are {sorted(self.peft_config)}")
        self.active_adapters = names
        for _, layer in [*self.adapter_layers(), *self._saved_modules()]:
            layer.active = names
        self.base_model.requires_grad_(False)
        for name in names:
            if not self.peft_config[name].inference_mode:
                for parameter in self.adapter_state(name).values():
                    parameter.requires_grad = True

    def adapter_state(self, adapter_name: str = "default") -> dict[str, Parameter]:
        """The parameters that belong to an adapter (its factors, its saved modules, the biases it trains), under the
        names that PEFT's file has: `base_model.model.fc1.lora_A.weight`, without the adapter's own name."""
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
                    state[key + kind + rest.removeprefix(adapter_name)] = parameter
        return state

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base model; merged adapters are taken out for the time."""
        merged = self.merged_adapters
        if merged:
            self.unmerge_adapter()
        layers = [layer for _, layer in [*self.adapter_layers(), *self._saved_modules()]]
        for layer in layers:
            layer.disabled = True
        try:
            yield
        finally:
            for layer in layers:
                layer.disabled = False
            if merged:
                self.merge_adapter(merged)

    # merging

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are inside the weights now."""
        return next((list(layer.merged) for _, layer in self.adapter_layers() if layer.merged), [])

    def merge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' ΔW to the weights (the active ones when left out): forward costs what the base costs.

        Raises:
            ValueError: adapters are merged already, or a name does not exist.
        """
        names = list(self.active_adapters) if adapter_names is None else list(adapter_names)
        if self.merged_adapters:
            raise ValueError(f"merge_adapter: {self.merged_adapters} are merged already; call unmerge_adapter() first")
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"merge_adapter: no adapter {name!r}; there are {sorted(self.peft_config)}")
        for _, layer in self.adapter_layers():
            layer.merge(names)

    def unmerge_adapter(self) -> None:
        """Subtract what `merge_adapter` added. The weights come back up to rounding, not bit for bit.

        Raises:
            ValueError: nothing is merged.
        """
        if not self.merged_adapters:
            raise ValueError("unmerge_adapter: nothing is merged")
        for _, layer in self.adapter_layers():
            layer.unmerge()

    def merge_and_unload(self, adapter_names: list[str] | None = None) -> Module:
        """The base model with the adapters' ΔW inside its weights and all wrapping gone. The PeftModel is used up."""
        if not self.merged_adapters:
            self.merge_adapter(adapter_names)
        return self._unload()

    def unload(self) -> Module:
        """The base model without the adapters and without wrapping. The PeftModel is used up."""
        if self.merged_adapters:
            self.unmerge_adapter()
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
        """(elements that train, all elements)."""
        sizes = [(p.size, p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # saving and loading

    def save_pretrained(self, path: str | os.PathLike, adapter_name: str = "default") -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` into a directory, in PEFT's format.

        An adapter that took s·B₀A₀ from W at its start (`"both"`, `"pissa"`, `"olora"`) is saved as one of rank 2r,
        s·(BA − B₀A₀) = s·[B, −B₀][A; A₀], which needs no changed base.

        Raises:
            ValueError: no adapter has this name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name: no adapter {adapter_name!r}; there are {sorted(self.peft_config)}")
        if Path(path).exists() and not Path(path).is_dir():
            raise ValueError(f"path: {path} is a file; a directory is accepted")
        config, state = self.peft_config[adapter_name], self.adapter_state(adapter_name)
        values: dict[str, Array] = {name: parameter.data for name, parameter in state.items()}
        offsets = {
            name: layer.offset[adapter_name]
            for name, layer in self.adapter_layers()
            if isinstance(layer, LoraLinear) and adapter_name in layer.offset
        }
        if offsets:
            values, config = _without_offset(values, config, offsets)
        metadata = {"format": "pt"}  # PEFT writes so; readers ask for it
        files.write_tensors(Path(path) / "adapter_model.safetensors", values, metadata)
        files.write_json(Path(path) / "adapter_config.json", {**config.to_dict(), "inference_mode": True})

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
        """
        config, values = _read_adapter(model, path, adapter_name, is_trainable)
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        peft_model._load(adapter_name, values)
        return peft_model

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Attach one more adapter, from a directory; it is active only after `set_adapter`."""
        config, values = _read_adapter(self.base_model.model, path, adapter_name, is_trainable)
        self.add_adapter(adapter_name, config)
        self._load(adapter_name, values)

    def _load(self, adapter_name: str, values: dict[str, Array]) -> None:
        for name, parameter in self.adapter_state(adapter_name).items():
            assign(parameter, values[name])


def _without_offset(
    values: dict[str, Array], config: LoraConfig, offsets: dict[str, tuple[Array, Array]]
) -> tuple[dict[str, Array], LoraConfig]:
    """The same update as an ordinary adapter of rank 2r; α grows with it, so that s stays α/r (or α/√r)."""
    values = dict(values)
    for name, (A0, B0) in offsets.items():
        a, b = f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"
        values[a] = np.concatenate([values[a], A0], axis=0)
        values[b] = np.concatenate([values[b], -B0], axis=1)
    growth = 2**0.5 if config.use_rslora else 2
    return values, replace(
        config,
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def _read_adapter(
    model: Module, path: str | os.PathLike, adapter_name: str, is_trainable: bool
) -> tuple[Any, dict[str, Array]]:
    """The config and the tensors of a saved adapter, checked against the model, which is not touched."""
    directory = Path(path)
    data = files.read_json(directory / "adapter_config.json")
    kind = data.get("peft_type")
    if kind not in CONFIGS:
        raise ValueError(f"{directory}: peft_type is {kind!r}; accepted are {', '.join(map(repr, CONFIGS))}")
    if not (directory / "adapter_model.safetensors").exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
    config = replace(CONFIGS[kind].from_dict(data), inference_mode=not is_trainable)
    values, _ = files.read_tensors(directory / "adapter_model.safetensors")
    shared = {id(p.data): p.data for p in model.parameters()}  # the trial model copies no weight
    trial = get_peft_model(copy.deepcopy(model, shared), config, adapter_name=adapter_name)
    wanted = {name: parameter.shape for name, parameter in trial.adapter_state(adapter_name).items()}
    missing, extra = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{directory}: the adapter does not fit the model: missing {missing[:4] or 'nothing'}, "
            f"not in the model {extra[:4] or 'nothing'} ({len(missing)} and {len(extra)} in all)"
        )
    for name, shape in wanted.items():
        if values[name].shape != shape:
            raise ValueError(f"{directory}: {name} has shape {values[name].shape}, the model needs {shape}")
    return config, values
