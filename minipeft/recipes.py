"""How each method is trained here: its config from the usual choices, and its learning rate.

One table for `minipeft train`, the ledger, the comparison and the benchmarks, under the names of the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .methods.adalora import AdaLoraConfig
from .methods.bottleneck import BottleneckAdapterConfig
from .methods.hybrid import FullThenLoraConfig
from .methods.lora import LoraConfig
from .methods.lora_ga import LoraGAConfig
from .methods.lora_pro import LoraProConfig
from .methods.p_tuning import PromptEncoderConfig
from .methods.qlora import LoftQConfig
from .nn import Module
from .peft import get_peft_model
from .quant.linear import QuantizedLinear
from .quant.model import quantize_model


@dataclass(frozen=True)
class Choice:
    """What a run chooses for its adapters: rank, α (the update is scaled by α/r), target layers, optimizer steps."""

    r: int = 8
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"
    steps: int = 200


@dataclass(frozen=True)
class Recipe:
    """A method's config (None: all weights but the output head train), and its learning rates.

    `lr`, on the digits, is the best on the validation digits of those that are named beside it. `language_lr` is for
    a pre-trained language model, whose weights have less far to go: chosen of the few named beside it so that SmolLM2
    learns its new name in the 60 steps of `minipeft train` and forgets little.

    With `quantize` all Linears but the output head hold their weight in that code before adapters are attached.
    `options` are those of a `Choice` that the config has a use for.
    """

    config: Callable[[Choice], Any] | None
    lr: float
    language_lr: float
    quantize: str | None = None
    options: tuple[str, ...] = ("r", "alpha", "targets")


def _lora(c: Choice, **variant: Any) -> LoraConfig:
    return LoraConfig(r=c.r, lora_alpha=c.alpha, target_modules=c.targets, **variant)


def _lora_pro(c: Choice, **variant: Any) -> LoraProConfig:
    return LoraProConfig(r=c.r, lora_alpha=c.alpha, target_modules=c.targets, **variant)


def _lora_ga(c: Choice) -> LoraConfig:
    return _lora(c, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(scale="paper"))


def _adalora(c: Choice, **variant: Any) -> AdaLoraConfig:
    """Half as many directions again at the start; r of them in each module on average at the end; LoRA's s, α/r."""
    init_r = c.r + (c.r + 1) // 2
    schedule = {"tinit": c.steps // 10, "tfinal": c.steps // 4, "deltaT": max(1, c.steps // 50)}
    return AdaLoraConfig(
        init_r=init_r, target_r=c.r, lora_alpha=c.alpha / c.r * init_r, target_modules=c.targets,
        total_step=c.steps, **{**schedule, **variant},
    )  # fmt: skip


def _full_then_lora(c: Choice) -> FullThenLoraConfig:
    """The output head stays in both phases, as it does under "full" and "lora"."""
    return FullThenLoraConfig(r=c.r, lora_alpha=c.alpha, target_modules=c.targets, total_step=c.steps, train_head=False)


def _adapter(c: Choice) -> BottleneckAdapterConfig:
    """Bottlenecks of r features, at their own places unless others are named."""
    return BottleneckAdapterConfig(bottleneck_size=c.r, target_modules=None if c.targets == "all-linear" else c.targets)


# Beside a method: the rates that were tried, on the digits; on SmolLM2, with the share of held-out questions that it
# answered with its name, and the change of its perplexity, of one run each (seed 0).
METHODS = {
    "full": Recipe(None, 3e-3, 3e-5, options=()),  # 1, 3, 6 ·1e-3; 3e-5: 94 %, −1.1 %
    "lora": Recipe(_lora, 5e-3, 5e-4),  # 5, 10, 20 ·1e-3; 5e-4: 94 %, +2.9 %
    "rslora": Recipe(  # LoRA's; 2, 3, 5 ·1e-4: 85, 94, 96 %, +1.6, 3.3, 8.4 %
        lambda c: _lora(c, use_rslora=True), 5e-3, 3e-4
    ),
    "qlora": Recipe(_lora, 5e-3, 5e-4, quantize="nf4"),  # 1, 2, 5, 10, 20 ·1e-3; 5e-4: 96 %, +1.6 %
    "dora": Recipe(  # 2, 5, 10, 20 ·1e-3; 5, 10 ·1e-4: 94, 96 %, +2.8, 8.3 %
        lambda c: _lora(c, use_dora=True), 1e-2, 5e-4
    ),
    "qdora": Recipe(  # 5, 10, 20 ·1e-3; 5e-4: 96 %, +1.8 %
        lambda c: _lora(c, use_dora=True), 1e-2, 5e-4, quantize="nf4"
    ),
    "adalora": Recipe(_adalora, 2e-2, 5e-3),  # 1, 2, 5 ·1e-2; 2, 3.5, 5, 10 ·1e-3: 0, 0, 37, 48 %, +0.2, 4.9, 11, 35 %
    "lora-ga": Recipe(_lora_ga, 5e-3, 1e-4),  # 2, 5, 10, 20 ·1e-3; 1, 2, 5 ·1e-4: 92, 92, 94 %, +1.4, 11, 57 %
    "lora-pro": Recipe(_lora_pro, 5e-3, 5e-4),  # 1, 2, 5, 10, 20 ·1e-3; 5e-4: 92 %, +0.2 %
    "lora-pro-full": Recipe(  # 1, 2, 5, 10, 20 ·1e-3; 2, 5 ·1e-4: 96, 96 %, +5.8, 18 %
        lambda c: _lora_pro(c, variant="full"), 5e-3, 2e-4
    ),
    "full-then-lora": Recipe(_full_then_lora, 5e-3, 2e-4),  # 1, 3, 5, 10 ·1e-3; 2e-4: 85 %, −0.6 %
    "adapter": Recipe(  # 5, 10, 20, 40 ·1e-3; 2, 5, 10 ·1e-4: 90, 94, 94 %, +2.9, 7.6, 13 %
        _adapter, 2e-2, 2e-4, options=("r", "targets")
    ),
    "p-tuning": Recipe(  # r virtual tokens; 0.5, 1, 2, 5, 10, 20 ·1e-3; 5, 50 ·1e-4: 0, 38 %, +32, 47 %
        lambda c: PromptEncoderConfig(num_virtual_tokens=c.r), 5e-3, 5e-3, options=("r",)
    ),
    "pissa": Recipe(  # 1, 2, 5, 10, 20 ·1e-3; 1, 2, 5 ·1e-4: 81, 85, 96 %, +2.8, 6.2, 24 %
        lambda c: _lora(c, init_lora_weights="pissa"), 5e-3, 2e-4
    ),
    "loftq": Recipe(  # 1, 2, 5, 10, 20 ·1e-3; 2, 5 ·1e-4: 92, 81 %, +16, 16 %
        lambda c: _lora(c, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=5)), 5e-3, 2e-4
    ),
}


def prepared(
    model: Module, method: str, choice: Choice, seed: int = 0, batches: Any = None, loss_fn: Any = None
) -> Module:
    """The model as `method` trains it: with its adapters, or, for "full", with all weights but the output head free.

    Raises:
        ValueError: "full" on a model that holds codes, which cannot train; or as `quantize_model`, `get_peft_model`.
    """
    recipe = METHODS[method]
    coded = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if recipe.quantize and not coded:  # codes that a checkpoint came with, or that it was loaded into, stay
        quantize_model(model, recipe.quantize)
    if recipe.config is None and coded:
        raise ValueError(f"method: {method!r} trains the weights, and these are codes; 'qlora' trains beside them")
    if recipe.config is not None:
        return get_peft_model(model, recipe.config(choice), batches, loss_fn, seed=seed)
    model.requires_grad_(True)
    if model.output_head:  # it stays as it does under LoRA, so that the two are comparable
        model.get_submodule(model.output_head).requires_grad_(False)
    return model
