"""minipeft: parameter-efficient fine-tuning in NumPy, from scratch."""

from . import backend, nn, ops, optim
from .backend import set_default_dtype
from .gradcheck import gradcheck
from .tensor import Tensor, no_grad

__version__ = "0.1.0"
__all__ = ["Tensor", "backend", "gradcheck", "nn", "no_grad", "ops", "optim", "set_default_dtype"]
