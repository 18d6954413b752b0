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
from .backend import Array, generator, get_namespace, matmul
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
    if any(isinstance(module, PeftModel | AdapterLayer | SavedModule) for module in model.modules()):
        raise TypeError("model: it has adapters already; use its PeftModel's add_adapter(name, config), or unload()")
    return _adapted(model, config, batches, loss_fn, adapter_name, seed)


def _adapted(model: Module, config: Any, batches: Any, loss_fn: Any, adapter_name: str, seed: Any) -> PeftModel:
    peft_model = PeftModel.__new__(PeftModel)
    peft_model.base_model, peft_model.peft_config, peft_model.methods = _Base(model), {}, {}
    peft_model.active_adapters = []
    peft_model.training = peft_model.base_model.training = model.training
    peft_model._attach(_Plan(model, config, adapter_name), batches, loss_fn, seed)
    model.zero_grad()  # what is frozen now holds no gradient of an earlier training
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
    """The names of the modules that `modules_to_save` means; one that lies inside another is saved with that one."""
    modules = {name: module for name, module in _outer_modules(model) if name}
    found: list[str] = []
    for wanted in names:
        matching = [name for name in modules if name == wanted or name.endswith("." + wanted)]
        if not matching:
            raise ValueError(f"modules_to_save: no module is called {wanted!r}; {closest(wanted, modules)}")
        for name in matching:
            if any(isinstance(m, AdapterLayer) for m in modules[name].modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} has another adapter's layers inside; it cannot be saved whole"
                )
        found += matching
    return [name for name in modules if name in found and not any(name.startswith(f"{outer}.") for outer in found)]


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


@contextlib.contextmanager
def _unchanged_on_error(model: Module) -> Iterator[None]:
    """Give every module its attributes, and every parameter its array and flag, back if anything inside fails."""
    modules = [
        (m, {k: copy.copy(v) if type(v) in (list, dict) else v for k, v in vars(m).items()}) for m in model.modules()
    ]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for p, data, requires_grad in parameters:
            p.data, p.requires_grad = data, requires_grad
        raise


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
        self._check_addable(adapter_name)
        if sum(getattr(c, "bias", "none") != "none" for c in (config, *self.peft_config.values())) > 1:
            raise ValueError("bias: another adapter trains biases already; 'none' is accepted")
        active = list(self.active_adapters)
        self._attach(_Plan(self.base_model.model, config, adapter_name), batches, loss_fn, seed)
        self.set_adapter(active)

    def _check_addable(self, adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} exists; there are {sorted(self.peft_config)}")
        if self.merged_adapters:
            raise ValueError("add_adapter: adapters are merged; call unmerge_adapter() first")

    def _attach(self, plan: _Plan, batches: Any, loss_fn: Any, seed: Any) -> None:
        model, method = self.base_model.model, plan.method
        method.adapter, method.rng = plan.adapter, generator(seed)
        with _unchanged_on_error(model):
            method.prepare(model, batches, loss_fn)
            for name in plan.targets:
                linear = model.get_submodule(name)
                model.set_submodule(name, method.wrap(name, linear).train(linear.training))
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
        names = self._existing("set_adapter", [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        self.active_adapters = names
        for _, layer in [*self.adapter_layers(), *self._saved_modules()]:
            layer.active = names
        self.base_model.requires_grad_(False)
        for name in names:
            if not self.peft_config[name].inference_mode:
                for parameter in self.adapter_state(name).values():
                    parameter.requires_grad = True

    def _existing(self, caller: str, names: Iterable[str]) -> list[str]:
        """The names as a list, each once, after checking that they are adapters here."""
        names = list(dict.fromkeys(names))
        if not names or any(name not in self.peft_config for name in names):
            raise ValueError(f"{caller}: got {names}; there are {sorted(self.peft_config)}")
        return names

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
        self.set_adapter([name for name in self.active_adapters if name != adapter_name] or rest[0])

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

        Raises:
            ValueError: adapters are merged already, or a name does not exist.
        """
        names = self._existing("merge_adapter", self.active_adapters if adapter_names is None else adapter_names)
        if self.merged_adapters:
            raise ValueError(f"merge_adapter: {self.merged_adapters} are merged already; call unmerge_adapter() first")
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
        """The base model with the adapters' ΔW inside its weights (the active ones when left out), all wrapping gone.
        The PeftModel is used up.

        Raises:
            ValueError: a name does not exist, or other adapters are merged already.
        """
        merged = self.merged_adapters
        if not merged or (adapter_names is not None and set(adapter_names) != set(merged)):
            self.merge_adapter(adapter_names)
        self.set_adapter(self.merged_adapters)  # their modules_to_save go into the model
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
        self._existing("save_pretrained", [adapter_name])
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
        config = self._portable(config, adapter_name)
        metadata = {"format": "pt"}  # PEFT writes so; readers ask for it
        files.write_tensors(Path(path) / "adapter_model.safetensors", values, metadata)
        files.write_json(Path(path) / "adapter_config.json", {**config.to_dict(), "inference_mode": True})

    def _portable(self, config: Any, adapter_name: str) -> Any:
        """The config in words that PEFT knows: targets by their names, since its "all-linear" means another set on
        models that are not its own; and of the start values only whether the base stays as it is."""
        changes: dict[str, Any] = {}
        if isinstance(config.target_modules, str) and config.target_modules.lower() in ALL_LINEAR:
            changes["target_modules"] = [name for name, m in self.adapter_layers() if adapter_name in m.adapters]
        if getattr(config, "init_lora_weights", None) in ("kaiming", "gaussian_b"):
            changes["init_lora_weights"] = True
        return replace(config, **changes)

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

        Unless `is_trainable`, everything is frozen and in inference mode.
        """
        config, values = _read_adapter(model, path, adapter_name, is_trainable)
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        peft_model._load(adapter_name, values)
        return peft_model if is_trainable else peft_model.eval()

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Attach one more adapter, from a directory; it is active only after `set_adapter`."""
        self._check_addable(adapter_name)
        config, values = _read_adapter(self.base_model.model, path, adapter_name, is_trainable)
        self.add_adapter(adapter_name, config)
        self._load(adapter_name, values)

    def _load(self, adapter_name: str, values: dict[str, Array]) -> None:
        for name, parameter in self.adapter_state(adapter_name).items():
            assign(parameter, values[name])


def _without_offset(
    values: dict[str, Array], config: LoraConfig, offsets: dict[str, tuple[Array, Array]]
) -> tuple[dict[str, Array], LoraConfig]:
    """The same update as an ordinary adapter of rank 2r; α grows with the rank, so that s stays α/r (or α/√r).

    Where a weight has no rank 2r the product itself is one factor and the identity the other.
    """
    values, ranks, alphas = dict(values), {}, {}
    growth = lambda ratio: ratio**0.5 if config.use_rslora else ratio  # noqa: E731
    for name, (A0, B0) in offsets.items():
        xp, key = get_namespace(A0), f"base_model.model.{name}"
        A = xp.concatenate([values[f"{key}.lora_A.weight"], A0], axis=0)  # (2r, in)
        B = xp.concatenate([values[f"{key}.lora_B.weight"], -B0], axis=1)  # (out, 2r)
        most = min(B.shape[0], A.shape[1])
        if A.shape[0] > most:
            identity = xp.eye(most, dtype=A.dtype)
            A, B = (matmul(B, A), identity) if B.shape[0] == most else (identity, matmul(B, A))
        values[f"{key}.lora_A.weight"], values[f"{key}.lora_B.weight"] = A, B
        exactly = f"^{re.escape(name)}"  # "$" is added when it is matched
        ranks[exactly] = A.shape[0]
        alphas[exactly] = growth(A.shape[0] / A0.shape[0]) * config.alpha_of(name)
    r, alpha = 2 * config.r, growth(2) * config.lora_alpha
    return values, replace(
        config,
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != r},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        init_lora_weights=True,
    )


def _read_adapter(
    model: Module, path: str | os.PathLike, adapter_name: str, is_trainable: bool
) -> tuple[Any, dict[str, Array]]:
    """The config and the tensors of a saved adapter, checked against the model, which is not touched."""
    directory = Path(path)
    data = files.read_json(directory / "adapter_config.json")
    kind = data.get("peft_type")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"{directory}: peft_type is {kind!r}; accepted are {', '.join(map(repr, CONFIGS))}")
    if not (directory / "adapter_model.safetensors").exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
    config = replace(CONFIGS[kind].from_dict(data), inference_mode=not is_trainable)
    values, _ = files.read_tensors(directory / "adapter_model.safetensors")
    shared = {id(p.data): p.data for p in model.parameters()}  # the trial model copies no weight
    trial = _adapted(copy.deepcopy(model, shared), config, None, None, adapter_name, 0)
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
