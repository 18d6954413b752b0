"""The methods, one file each, in the document's order."""

from . import base, lora

__all__ = ["base", "lora"]
