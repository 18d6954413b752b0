"""The place in a model where virtual tokens may stand before its own; empty, it leaves everything as it is.

A model that has one calls `before` on its embedded tokens and `after` on what its blocks made of them. P-Tuning
(methods/p_tuning.py) puts a layer with trained tokens in this one's place.
"""

from __future__ import annotations

from .backend import Array
from .module import Module
from .tensor import Tensor


class VirtualTokens(Module):
    """No virtual tokens.

    Args:
        dim: the features of a token.

    Attributes:
        length: how many virtual tokens stand before each sequence.
    """

    length = 0

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def before(self, x: Tensor, mask: Array | None = None, first: bool = True) -> tuple[Tensor, Array | None]:
        """The tokens (B, T, dim) with the virtual ones, (B, length + T, dim), and the mask of all (B, 1, 1, S).

        Args:
            mask: True where a token may be seen, of all tokens so far but the virtual ones.
            first: these are a sequence's first tokens; later ones find the virtual ones in the cache.
        """
        return x, mask

    def after(self, x: Tensor, mask: Array | None = None, first: bool = True) -> Tensor:
        """What became of the tokens (B, T, dim), without the virtual ones. The mask is the one `before` was given."""
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
