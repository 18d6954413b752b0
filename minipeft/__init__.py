"""minipeft: parameter-efficient fine-tuning in NumPy, from scratch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import blas  # noqa: F401  # isort: skip  # before anything loads NumPy: it asks for the faster kernel
from . import backend, nn, ops, optim
from .backend import set_default_dtype
from .tensor import Tensor, no_grad

if TYPE_CHECKING:
    from . import methods, rank
    from .checkpointing import checkpoint
    from .gradient_check import gradcheck
    from .methods.adalora import AdaLoraConfig
    from .methods.bottleneck import BottleneckAdapterConfig
    from .methods.hybrid import FullThenLoraConfig
    from .methods.lora import LoraConfig
    from .methods.lora_ga import LoraGAConfig
    from .methods.lora_pro import LoraProConfig
    from .methods.p_tuning import PromptEncoderConfig
    from .methods.qlora import LoftQConfig, finish_qlora, prepare_model_for_kbit_training
    from .models.load import load_model, save_model
    from .peft import PeftModel, get_peft_model
    from .tokenizer import load_tokenizer
    from .train import fit

__version__ = "0.1.0"
__all__ = [
    "AdaLoraConfig",
    "BottleneckAdapterConfig",
    "FullThenLoraConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraProConfig",
    "PeftModel",
    "PromptEncoderConfig",
    "Tensor",
    "backend",
    "checkpoint",
    "finish_qlora",
    "fit",
    "get_peft_model",
    "gradcheck",
    "load_model",
    "load_tokenizer",
    "methods",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "prepare_model_for_kbit_training",
    "rank",
    "save_model",
    "set_default_dtype",
]

# What is imported when it is first asked for: `import minipeft` costs little more than `import numpy`. "" is a module.
LATER = {
    "AdaLoraConfig": "methods.adalora",
    "BottleneckAdapterConfig": "methods.bottleneck",
    "FullThenLoraConfig": "methods.hybrid",
    "LoftQConfig": "methods.qlora",
    "LoraConfig": "methods.lora",
    "LoraGAConfig": "methods.lora_ga",
    "LoraProConfig": "methods.lora_pro",
    "PeftModel": "peft",
    "PromptEncoderConfig": "methods.p_tuning",
    "checkpoint": "checkpointing",
    "finish_qlora": "methods.qlora",
    "fit": "train",
    "get_peft_model": "peft",
    "gradcheck": "gradient_check",
    "load_model": "models.load",
    "load_tokenizer": "tokenizer",
    "methods": "",
    "prepare_model_for_kbit_training": "methods.qlora",
    "rank": "",
    "save_model": "models.load",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    home = LATER[name]
    globals()[name] = (
        getattr(import_module(f".{home}", __name__), name) if home else import_module(f".{name}", __name__)
    )
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(globals().keys() | LATER.keys())
