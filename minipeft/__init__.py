"""minipeft: parameter-efficient fine-tuning in NumPy, from scratch."""

import importlib
from typing import TYPE_CHECKING, Any

from . import backend, methods, nn, ops, optim, rank
from .backend import set_default_dtype
from .gradcheck import gradcheck
from .methods.lora import LoraConfig
from .peft import PeftModel, get_peft_model
from .tensor import Tensor, no_grad
from .train import fit

if TYPE_CHECKING:
    from .models.load import load_model, save_model
    from .tokenizer import load_tokenizer

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "PeftModel",
    "Tensor",
    "backend",
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
    "rank",
    "save_model",
    "set_default_dtype",
]

LATER = {"load_model": ".models.load", "save_model": ".models.load", "load_tokenizer": ".tokenizer"}


def __getattr__(name: str) -> Any:
    """Language models are imported when they are first asked for: `import minipeft` stays quick."""
    if name not in LATER:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(LATER[name], __name__), name)
    return globals()[name]
