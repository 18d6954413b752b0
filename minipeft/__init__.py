"""minipeft: parameter-efficient fine-tuning in NumPy, from scratch."""

from . import backend, methods, nn, ops, optim, rank
from .backend import set_default_dtype
from .gradcheck import gradcheck
from .methods.lora import LoraConfig
from .peft import PeftModel, get_peft_model
from .tensor import Tensor, no_grad
from .train import fit

__version__ = "0.1.0"
__all__ = [
    "LoraConfig",
    "PeftModel",
    "Tensor",
    "backend",
    "fit",
    "get_peft_model",
    "gradcheck",
    "methods",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "rank",
    "set_default_dtype",
]
