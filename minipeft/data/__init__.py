"""The data that ships with the package: `digits` (images, and the transfer task the methods are compared on)."""

from . import digits

__all__ = ["digits"]
