"""Which modules a config means: by name, ending or regular expression, checked before anything is changed."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

from .methods.base import AdapterLayer, Method
from .nn import Linear, Module, closest

ALL_LINEAR = ("all-linear", "all")  # the second is the document's "ALL"


class Plan:
    """The modules a config adapts and saves, checked; making it changes nothing."""

    def __init__(self, model: Module, config: Any, adapter: str) -> None:
        check_adapter_name(adapter)
        self.config, self.adapter = config, adapter
        self.method: Method = _method(config)
        self.saved = find_saved(model, getattr(config, "modules_to_save", None) or [])
        wanted = self.method.targets(model)
        self.targets = [
            name
            for name in find_targets(model, wanted, self.method.wraps)
            if not any(name == saved or name.startswith(saved + ".") for saved in self.saved)
        ]
        if not self.targets:
            raise ValueError(f"target_modules: {wanted!r} leaves no Linear to adapt")
        for name in self.targets:
            module = model.get_submodule(name)
            if isinstance(module, AdapterLayer) and not isinstance(module, self.method.layer):
                raise ValueError(
                    f"target_modules: {name!r} is a {type(module).__name__} already; "
                    f"{type(self.method).__name__} cannot add an adapter to that"
                )
            self.method.check(name, module)


def check_adapter_name(name: Any) -> None:
    """Raise ValueError unless it can be a part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name: got {name!r}; a name without dots is accepted")


def _method(config: Any) -> Method:
    """What `config` builds; TypeError for what is no config here (PEFT's own configs, classes, dictionaries)."""
    if not hasattr(config, "build") or isinstance(config, type):
        kind = config if isinstance(config, type) else type(config)
        raise TypeError(
            f"config: got {'the class' if kind is config else 'a'} {kind.__module__}.{kind.__qualname__}; "
            "a config of minipeft is accepted, such as LoraConfig(r=8), or an object whose build() gives a Method"
        )
    method = config.build()
    if not isinstance(method, Method):
        raise TypeError(f"config: build() of {type(config).__name__} gave a {type(method).__name__}, and no Method")
    return method


def find_targets(model: Module, target_modules: str | Iterable[str], kind: type[Module] = Linear) -> list[str]:
    """The names of the Linears (or modules of another kind) that `target_modules` means, in the model's order.

    Raises:
        ValueError: a name that no module has (the closest are listed), or that belongs to something else than a Linear.
    """
    modules = dict(outer_modules(model))
    linears = [n for n, m in modules.items() if isinstance(m.base_layer if isinstance(m, AdapterLayer) else m, kind)]
    if isinstance(target_modules, str):
        if target_modules.lower() in ALL_LINEAR:
            heads = output_heads(model)
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
            what = f"no module is called {target!r}"
            if isinstance(target_modules, str):
                what = f"no module's whole name matches {target!r}, a regular expression; [{target!r}] means an ending"
            raise ValueError(f"target_modules: {what}; {closest(target, [*endings, *linears])}")
        for name in found:
            if name not in linears:
                found_kind = type(modules[name]).__name__
                raise ValueError(f"target_modules: {name!r} is a {found_kind}; only {kind.__name__} layers are adapted")
    chosen = {name for found in wanted.values() for name in found}
    return [name for name in linears if name in chosen]


def outer_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """All modules but those inside adapter layers and saved copies."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, AdapterLayer | SavedModule):
            inside.append(name + ".")
        yield name, module


def output_heads(model: Module) -> set[str]:
    """The full names of the output heads that the model and its parts declare."""
    return {f"{name}.{m.output_head}".lstrip(".") for name, m in model.named_modules() if m.output_head}


def find_saved(model: Module, names: Iterable[str]) -> list[str]:
    """The names of the modules that `modules_to_save` means: all that end so, as in PEFT, where "norm" means
    "input_layernorm" too. One that lies inside another is saved with that one."""
    modules = {name: module for name, module in outer_modules(model) if name}
    found: list[str] = []
    for wanted in names:
        matching = [name for name in modules if name.endswith(wanted)]
        if not matching:
            raise ValueError(f"modules_to_save: no module is called {wanted!r}; {closest(wanted, modules)}")
        for name in matching:
            if any(isinstance(m, AdapterLayer) for m in modules[name].modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} has another adapter's layers inside; it cannot be saved whole"
                )
        found += matching
    return [name for name in modules if name in found and not any(name.startswith(f"{outer}.") for outer in found)]


@contextlib.contextmanager
def unchanged_on_error(model: Module) -> Iterator[None]:
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
